"""When to swap: after so many answers to one principal, after some time, on an alarm, on an exposure.

Answers count more than hours: among independent sets, a swap every 50 answers or fewer halves what an attacker gains
by asking. A timer only bounds how long a theft that nobody noticed stays useful.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from holdfast.core.errors import UsageError
from holdfast.core.types import Count, NonNegative, Positive, Steps


@dataclass(frozen=True)
class Reading:
    """What the triggers go by, of the set that serves."""

    answers: Count = 0
    """the most that one principal got from it"""
    served_s: NonNegative = 0.0
    """how long it has served"""
    alarm: str | None = None
    """why an alarm was raised since it began; None where none was"""
    exposure: str | None = None
    """why an attacker may hold it; None where nothing says so"""


Trigger = Callable[[Reading], str]
"""Why it is time to swap, in words; empty while it is not."""


@dataclass(frozen=True)
class AnswersPerPrincipal:
    """Swap once a principal has had `most` answers from one set: `50q/principal`."""

    most: Steps

    def __call__(self, reading: Reading) -> str:
        if reading.answers < self.most:
            return ""
        return f"one principal got {reading.answers} answers from the set, which gives {self.most}"


@dataclass(frozen=True)
class Elapsed:
    """Swap once a set has served for `period_s` seconds: `24h`."""

    period_s: Positive

    def __call__(self, reading: Reading) -> str:
        if reading.served_s < self.period_s:
            return ""
        return f"the set has served for {reading.served_s:g} s, of {self.period_s:g}"


def alarmed(reading: Reading) -> str:
    """Swap on an alarm, such as that of a detector of query attacks."""
    return "" if reading.alarm is None else f"alarm: {reading.alarm}"


def exposed(reading: Reading) -> str:
    """Swap once the set is held to be in an attacker's hands."""
    return "" if reading.exposure is None else f"exposed: {reading.exposure}"


def due(triggers: Sequence[Trigger], reading: Reading) -> tuple[str, ...]:
    """Every reason to swap now, in the order of the triggers; none while the set may go on."""
    return tuple(why for trigger in triggers if (why := trigger(reading)))


class Watch:
    """Asks the triggers, and remembers since when the set serves and what was raised against it.

    `clock` gives seconds that never go back, such as `time.monotonic`. `served_s` is how long the set had served before
    the watch began, which after a restart the ledger knows. Any thread may call it.
    """

    def __init__(
        self, triggers: Sequence[Trigger], clock: Callable[[], float], *, served_s: float = 0.0
    ) -> None:
        self._triggers, self._clock, self._lock = tuple(triggers), clock, threading.Lock()
        self._began_s, self._raised = clock() - served_s, Reading()

    def alarm(self, why: str) -> None:
        """Note an alarm; the next set begins without it."""
        with self._lock:
            self._raised = replace(self._raised, alarm=why)

    def expose(self, why: str) -> None:
        """Note that an attacker may hold the set that serves."""
        with self._lock:
            self._raised = replace(self._raised, exposure=why)

    def swapped(self) -> None:
        """Another set serves from now on."""
        with self._lock:
            self._began_s, self._raised = self._clock(), Reading()

    def due(self, answers: int) -> tuple[str, ...]:
        """Every reason to swap now; `answers` is the most that one principal got of the set, `RotatingModel.asked`."""
        with self._lock:
            reading = replace(self._raised, answers=answers, served_s=self._clock() - self._began_s)
        return due(self._triggers, reading)


def refuse_faster(triggers: Sequence[Trigger], made_in_s: float, *, answers_per_s: float = 0.0) -> None:
    """`UsageError` where swaps are due more often than sets can be made.

    `made_in_s` is the time for one admitted set, those that were refused included: sets in store put off the end and do
    not change it. `answers_per_s` is the most that one principal may get, its rate limit; where there is none (0), a
    trigger by answers has no pace and is let pass.
    """
    for trigger in triggers:
        match trigger:
            case Elapsed(period_s) if period_s < made_in_s:
                raise UsageError(
                    f"a swap is due every {period_s:g} s, and an admitted set takes {made_in_s:.3g} s to make: the "
                    f"pool would run empty. Swap every {math.ceil(made_in_s)}s or less often, or make sets faster"
                )
            case AnswersPerPrincipal(most) if most < made_in_s * answers_per_s:
                raise UsageError(
                    f"a swap is due after {most} answers to a principal, which at {answers_per_s:g} answers a second "
                    f"is every {most / answers_per_s:.3g} s, and an admitted set takes {made_in_s:.3g} s to make: the "
                    f"pool would run empty. Swap after {math.ceil(made_in_s * answers_per_s)}q/principal or more, "
                    f"lower the rate limit, or make sets faster"
                )
