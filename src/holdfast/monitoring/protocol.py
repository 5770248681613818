"""The interface of the tests of a stream."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from holdfast.core.draws import Draws
from holdfast.monitoring.signals import Signals

WINDOW = 250
"""Samples in a window of the tests that compare windows with the reference."""
HORIZON = 1000
"""Samples of a stream to which the rates of false alarms and the power of a test refer."""

IN_WINDOWS = (
    "In 1,000 samples that are independent and distributed like the reference, a false alarm has a probability of at "
    "most 5 %. It is larger in longer streams."
)
"""Guarantee of the tests that compare windows with the reference."""
Part = Literal["columns", "views", "series"]


@dataclass(frozen=True)
class Alarm:
    """The first alarm of a test on a stream."""

    after: int
    """number of samples of the stream after which the alarm was raised"""
    signal: str
    """name of the column or view of the signals on which it was raised"""
    view: str
    """name of the view, or of the series, to which the signal belongs"""
    evidence: str
    """value of the statistic and its limit, as text"""


class Described(Protocol):
    """What a report states about a test."""

    guarantee: ClassVar[str]
    """what is known about the probability of a false alarm, as a sentence"""
    reads: ClassVar[str]
    """what the test compares, in a few words"""
    fewest: ClassVar[int]
    """smallest number of samples of the stream after which the test can raise an alarm"""


class StreamTest(Described, Protocol):
    """Protocol of a test that compares a stream with a reference. It is created from the signals of the reference, the
    probability `alpha` of a false alarm, and a source of random numbers.

    Its state can be pickled at any time and continued later. The result does not depend on how the stream is divided
    into batches.
    """

    compares: ClassVar[Part]
    """parts of the signals that are tested one by one, with a correction for their number"""

    def __init__(self, reference: Signals, alpha: float, rng: Draws) -> None: ...

    @property
    def restarted(self) -> tuple[str, ...]:
        """Names of the series on which the test detected a change within the reference, and began again there."""

    def update(self, batch: Signals) -> Alarm | None:
        """Add the signals of further samples of the stream, and return the first alarm among them, if there is one. A
        test that has raised an alarm is not updated again.
        """
