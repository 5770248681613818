"""Runs the tests on a stream, on recorded or live inputs, and the result of monitoring."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.monitoring.signals import CONFIDENCE, DISTANCE, ERROR, INPUTS, Accuracy, Array, Signals
from holdfast.reports import audit as reported
from holdfast.reports.terminal import body
from holdfast.reports.tree import Report
from holdfast.reports.words import strict
from holdfast.reports.write import rendered, write

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


SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # standard deviations
DROPS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)  # of the accuracy
STREAMS = 20
_FOUND = 16  # 80 % of the streams, as is usual for the power of a test


@dataclass(frozen=True)
class Power:
    """What a test would find within 1,000 samples of a stream."""

    signal: str
    """name of the signal that was shifted"""
    shift: float | None
    """smallest shift of its mean that was found, in standard deviations; None if 3 were not"""
    drop: float | None
    """smallest drop of the accuracy that was found; None if errors were not added, or if 50 points were not found"""
    false_alarms: int | None
    """streams of 20 without a shift, of 1,000 samples each, with an alarm; None for a test with a guarantee"""
    errors: bool
    """whether errors were added; False without labels, and for a test that does not compare errors"""


def power_of(kind: type[StreamTest], reference: Signals, alpha: float, rng: Draws) -> Power:
    """Return the power of a kind of test on a reference."""
    drop, false_alarms, series = None, None, kind.compares == "series"
    errors = ERROR in reference.names and kind.compares != "views"
    if kind.compares == "views":
        part, share = reference.only(reference.views[INPUTS], INPUTS), len(reference.views)
        column = _varying(part, slice(None))
    else:
        share = reference.n_series if series else len(reference.names)
        preferred = CONFIDENCE if CONFIDENCE in reference.names else DISTANCE
        place = reference.names.index(preferred) if series else _varying(reference, reference.views[INPUTS])
        part, column = reference.only(slice(place, place + 1)), 0
        if errors:
            place = reference.names.index(ERROR)
            error = reference.only(slice(place, place + 1))
            drop = _smallest(DROPS, kind, error, alpha / share, _less_accurate, rng.at("drop"))

    def shifted(values: Array, shift: float, rng: Draws) -> Array:
        moved = values.copy()
        moved[:, column] += shift * part.values[:, column].std()
        return moved

    if series:
        streams = (_stream(reference, rng.at("stationary", k), HORIZON) for k in range(STREAMS))
        test = kind(reference, alpha, rng.at("test"))
        tests = (deepcopy(test) for _ in range(STREAMS))
        false_alarms = sum(
            test.update(stream) is not None for test, stream in zip(tests, streams, strict=True)
        )
    shift = _smallest(SHIFTS, kind, part, alpha / share, shifted, rng.at("shift"))
    return Power(part.names[column], shift, drop, false_alarms, errors)


Change = Callable[[Array, float, Draws], Array]


def _smallest(
    sizes: Sequence[float],
    kind: type[StreamTest],
    reference: Signals,
    alpha: float,
    change: Change,
    rng: Draws,
) -> float | None:
    """The smallest of the sizes of a change that the test finds, by bisection; None if it does not find the largest."""
    low, high, fresh = 0, len(sizes), kind(reference, alpha, rng.at("test"))
    while low < high:
        middle = (low + high) // 2
        found = 0
        for k in range(STREAMS):
            place = rng.at(k)
            test = deepcopy(fresh)
            stream = _stream(reference, place.at("after"), HORIZON)
            changed = Signals(
                stream.names, change(stream.values, sizes[middle], place.at("change")), stream.views
            )
            found += test.update(changed) is not None
            if found >= _FOUND or k - found >= STREAMS - _FOUND:
                break
        low, high = (low, middle) if found >= _FOUND else (middle + 1, high)
    return sizes[low] if low < len(sizes) else None


def _stream(reference: Signals, rng: Draws, n: int) -> Signals:
    return reference.at(rng.integers(torch.arange(n), len(reference)).numpy())


def _less_accurate(errors: Array, drop: float, rng: Draws) -> Array:
    """Errors (n, 1) with further ones, so that the accuracy is lower by `drop`."""
    right = errors.min()
    wrong = errors.max() if errors.max() > right else right + 1.0  # a reference without errors is not scaled
    share = drop / max(float((errors == right).mean()), drop)
    chosen = rng.uniform(torch.arange(len(errors)), dtype=torch.float64).numpy() < share
    return np.where(chosen[:, None], wrong, errors)


def _varying(signals: Signals, columns: slice) -> int:
    """The first of some columns that is not constant."""
    deviations = signals.values[:, columns].std(0)
    return (columns.start or 0) + int((deviations > 0).argmax())


ALPHA = 0.05
"""Probability of a false alarm that each test with a guarantee allows."""

State = Literal["alarm", "no alarm", "too few samples"]


@dataclass(frozen=True)
class DriftResult:
    """What a test found on a stream."""

    name: str
    kind: type[Described]
    state: State
    alarm: Alarm | None
    power: Power | None
    """None while it is computed, on a running server"""
    restarted: tuple[str, ...] = ()
    """names of the series on which the test detected a change within the reference, and began again there"""


def test_of(name: str) -> type[StreamTest]:
    """Return the class of a test by its name."""
    module, _, attribute = DRIFT_TESTS[name].partition(":")
    kind: type[StreamTest] = getattr(import_module(f"holdfast.monitoring.{module}"), attribute)
    return kind


class Watch:
    """All tests on one stream. `results` may be asked for at any time."""

    def __init__(self, reference: Signals, seed: int) -> None:
        self._rng = Draws(seed).at("monitor")
        self._reference = reference
        self._kinds = {name: test_of(name) for name in DRIFT_TESTS}
        self._tests = {name: kind(reference, ALPHA, self._rng.at(name)) for name, kind in self._kinds.items()}
        self.alarms: dict[str, Alarm] = {}
        self.n = 0
        """number of samples so far"""

    def update(self, batch: Signals) -> dict[str, Alarm]:
        """Add the signals of further samples, and return the alarms that they raise, by test."""
        self.n += len(batch)
        raised = {}
        for name, test in self._tests.items():
            if name not in self.alarms and (alarm := test.update(batch)) is not None:
                raised[name] = self.alarms[name] = alarm
        return raised

    def power(self, name: str) -> Power:
        """Return the power of a test on the reference, which takes seconds."""
        return power_of(self._kinds[name], self._reference, ALPHA, self._rng.at("power", name))

    def state(self, name: str) -> State:
        """Return what a test has found so far."""
        if name in self.alarms:
            return "alarm"
        return "no alarm" if self.n >= self._kinds[name].fewest else "too few samples"

    def result(self, name: str, power: Power | None) -> DriftResult:
        """Return what a test has found so far, with its power if that is known."""
        restarted = self._tests[name].restarted
        return DriftResult(name, self._kinds[name], self.state(name), self.alarms.get(name), power, restarted)


def watch(reference: Signals, stream: Iterable[Signals], seed: int) -> tuple[DriftResult, ...]:
    """Run all tests on the batches of a stream, and return what they found."""
    tests = Watch(reference, seed)
    for batch in stream:
        tests.update(batch)
    return tuple(tests.result(name, tests.power(name)) for name in DRIFT_TESTS)


Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A stream or a reference."""

    name: str
    n: int
    labelled: bool
    """whether the classes of its samples are known and used"""


@dataclass(frozen=True)
class Monitored:
    """What the tests found on a stream, and the accuracy of the model on it."""

    stream: Source
    reference: Source
    model: str | None
    """name of the model; None if only the inputs were compared"""
    layer: str | None
    """layer whose outputs are the embeddings; None if there are none"""
    decisive: tuple[str, ...]
    """names of the tests whose alarm sets the exit code 1"""
    results: tuple[DriftResult, ...]
    measured: Accuracy | None = None
    """on the stream; None without its labels or without a model"""
    of_reference: Accuracy | None = None
    """on the reference; None without its labels or without a model"""
    expected: Estimate | None = None
    """accuracy that is expected on the stream from the confidence; None without a model or labels of the reference"""
    notes: tuple[str, ...] = ()
    """notes on the stream and the reference"""

    @property
    def alarmed(self) -> tuple[DriftResult, ...]:
        """The tests that decide the exit code and raised an alarm."""
        return tuple(each for each in self.results if each.name in self.decisive and each.alarm is not None)

    def summary(self) -> Json:
        """Return the content of all reports as strict JSON."""
        return self._summary

    @cached_property
    def _summary(self) -> Json:
        content = {
            "schema_version": reported.MONITORING_VERSION,
            "verb": "monitor",
            "verdict": "alarm" if self.alarmed else "no alarm",
            "alpha": ALPHA,
            "stream": asdict(self.stream),
            "reference": asdict(self.reference),
            "measured": _plain(self.measured),
            "of_reference": _plain(self.of_reference),
            "expected": _plain(self.expected),
            "model": self.model,
            "layer": self.layer,
            "decisive": list(self.decisive),
            "notes": list(self.notes),
            "tests": [_test(result) for result in self.results],
        }
        written: Json = strict(content)
        return written

    @property
    def report(self) -> Report:
        """The report of the stream."""
        return reported.monitoring_report(self._summary)

    def text(self, *, colour: bool = False, width: int | None = None) -> str:
        """Return the tables of the report as text for a terminal."""
        return body(self.report, colour=colour, width=width)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def __str__(self) -> str:
        return reported.monitoring_headline(self._summary)


def _plain(part: Accuracy | Estimate | None) -> Json | None:
    return None if part is None else asdict(part)


def _test(result: DriftResult) -> Json:
    kind = result.kind
    return {
        "name": result.name,
        "compares": kind.reads,
        "state": result.state,
        "alarm": None if result.alarm is None else asdict(result.alarm),
        "guarantee": kind.guarantee,
        "power": None if result.power is None else asdict(result.power),
        "fewest": kind.fewest,
        "restarted": list(result.restarted),
    }
