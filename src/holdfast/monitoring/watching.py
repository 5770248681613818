"""Runs the tests on a stream, one batch after another."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.draws import Draws
from holdfast.monitoring.power import Power, power_of
from holdfast.monitoring.protocol import Alarm, Described, StreamTest
from holdfast.monitoring.signals import Signals

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
