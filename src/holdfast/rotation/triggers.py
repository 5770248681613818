"""Triggers, which are conditions for a swap of the serving set: a number of answers to one client, a period of time, an
alarm, or a stolen set.

The number of answers matters more than time: among independent sets, a swap every 50 answers or fewer halves what an
attacker gains by queries. A period only limits how long an undetected theft stays useful.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from holdfast.core.errors import UsageError
from holdfast.core.types import Count, NonNegative, Positive, Steps


@dataclass(frozen=True)
class Counters:
    """State of the serving set that decides whether a swap is due: its answers, its time of service, alarms, and
    whether it is assumed to be stolen.
    """

    answers: Count = 0
    """largest number of answers to one principal"""
    served_s: NonNegative = 0.0
    """seconds since it began to serve"""
    alarm: str | None = None
    """reason of an alarm since the set began to serve; None if there was no alarm"""
    exposure: str | None = None
    """reason to assume that the set was stolen; None if there is no reason"""


Trigger = Callable[[Counters], str]
"""function of the state of the serving set that returns the reason to swap, or an empty string if there is none"""


@dataclass(frozen=True)
class AnswersPerPrincipal:
    """Trigger of a swap after one client got `most` answers from the serving set, written as `50q/principal` in
    settings.
    """

    most: Steps

    def __call__(self, reading: Counters) -> str:
        if reading.answers < self.most:
            return ""
        return f"one principal got {reading.answers} answers from the set, of at most {self.most}"


@dataclass(frozen=True)
class Elapsed:
    """Trigger of a swap after a set has served for `period_s` seconds, written as `24h` in settings."""

    period_s: Positive

    def __call__(self, reading: Counters) -> str:
        if reading.served_s < self.period_s:
            return ""
        return f"the set has served for {reading.served_s:g} s, of at most {self.period_s:g}"


def alarmed(reading: Counters) -> str:
    """Return the reason to swap if there was an alarm while the set served, such as that of a detector of query
    attacks; otherwise an empty string.
    """
    return "" if reading.alarm is None else f"alarm: {reading.alarm}"


def exposed(reading: Counters) -> str:
    """Return the reason to swap if the serving set is assumed to be stolen; otherwise an empty string."""
    return "" if reading.exposure is None else f"listed as stolen: {reading.exposure}"


def due_triggers(triggers: Sequence[Trigger], reading: Counters) -> tuple[str, ...]:
    """Return the reasons of all triggers whose condition for a swap is met, in the order of the triggers, or an empty
    tuple.
    """
    return tuple(why for trigger in triggers if (why := trigger(reading)))


class Watch:
    """Decides when a swap of the serving set is due: evaluates triggers, and records alarms and the beginning of
    service.

    `clock` returns seconds that never decrease, such as `time.monotonic`. `served_s` is the number of seconds for which
    the set had already served; after a restart it is read from the ledger. All methods are thread-safe.
    """

    def __init__(
        self, triggers: Sequence[Trigger], clock: Callable[[], float], *, served_s: float = 0.0
    ) -> None:
        self._triggers, self._clock, self._lock = tuple(triggers), clock, threading.Lock()
        self._began_s, self._raised = clock() - served_s, Counters()

    def alarm(self, why: str) -> None:
        """Record an alarm about the serving set, with its reason `why`. The next swap clears it."""
        with self._lock:
            self._raised = replace(self._raised, alarm=why)

    def expose(self, why: str) -> None:
        """Record that the serving set may be stolen, with the reason `why`. The next swap clears it."""
        with self._lock:
            self._raised = replace(self._raised, exposure=why)

    def swapped(self) -> None:
        """Record that another parameter set serves from now on, which clears alarms and restarts the
        time of service.
        """
        with self._lock:
            self._began_s, self._raised = self._clock(), Counters()

    def due(self, answers: int) -> tuple[str, ...]:
        """Return all reasons for a swap of the serving set at this time, or an empty tuple if no swap is due.

        `answers` is the largest number of answers to one principal from the serving set, as in
        `RotatingModel.most_answers`.
        """
        with self._lock:
            reading = replace(self._raised, answers=answers, served_s=self._clock() - self._began_s)
        return due_triggers(self._triggers, reading)


def refuse_faster(triggers: Sequence[Trigger], made_in_s: float, *, answers_per_s: float = 0.0) -> None:
    """Raise `UsageError` if triggers require swaps more often than new parameter sets can be produced.

    `made_in_s` is the time in seconds to produce one admitted set, including the time for sets that were refused; a
    stock of waiting sets only delays the shortage. `answers_per_s` is the rate limit of one principal; without one (0),
    a trigger that counts answers is not tested.
    """
    for trigger in triggers:
        match trigger:
            case Elapsed(period_s) if period_s < made_in_s:
                raise UsageError(
                    f"a swap is due every {period_s:g} s, but it takes {made_in_s:.3g} s to produce an admitted "
                    f"set: the pool would run empty. Swap every {math.ceil(made_in_s)}s or less often, or produce "
                    "sets faster"
                )
            case AnswersPerPrincipal(most) if most < made_in_s * answers_per_s:
                raise UsageError(
                    f"a swap is due after {most} answers to a principal, which at {answers_per_s:g} answers a "
                    f"second is every {most / answers_per_s:.3g} s, but it takes {made_in_s:.3g} s to produce an "
                    "admitted set: the pool would run empty. Swap after "
                    f"{math.ceil(made_in_s * answers_per_s)}q/principal or more, lower the rate limit, or produce "
                    "sets faster"
                )
