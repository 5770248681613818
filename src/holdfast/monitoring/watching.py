"""Runs the tests on a stream, one batch after another."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.draws import Draws
from holdfast.monitoring.power import Power, power_of
from holdfast.monitoring.protocol import Alarm, StreamTest
from holdfast.monitoring.signals import Signals

ALPHA = 0.05
"""Probability of a false alarm that each test with a guarantee allows."""

State = Literal["alarm", "no alarm", "too few samples"]


@dataclass(frozen=True)
class DriftResult:
    """What a test found on a stream."""

    name: str
    kind: type[StreamTest]
    state: State
    alarm: Alarm | None
    power: Power


def test_of(name: str) -> type[StreamTest]:
    """Return the class of a test by its name."""
    module, _, attribute = DRIFT_TESTS[name].partition(":")
    kind: type[StreamTest] = getattr(import_module(f"holdfast.monitoring.{module}"), attribute)
    return kind


def watch(reference: Signals, stream: Iterable[Signals], seed: int) -> tuple[DriftResult, ...]:
    """Run all tests on the batches of a stream, and return what they found."""
    rng = Draws(seed).at("monitor")
    kinds = {name: test_of(name) for name in DRIFT_TESTS}
    tests = {name: kind(reference, ALPHA, rng.at(name)) for name, kind in kinds.items()}
    alarms: dict[str, Alarm] = {}
    n = 0
    for batch in stream:
        n += len(batch)
        for name, test in tests.items():
            if name not in alarms and (alarm := test.update(batch)) is not None:
                alarms[name] = alarm
    results = []
    for name, kind in kinds.items():
        state: State = "alarm" if name in alarms else "no alarm" if n >= kind.fewest else "too few samples"
        power = power_of(kind, reference, ALPHA, rng.at("power", name))
        results.append(DriftResult(name, kind, state, alarms.get(name), power))
    return tuple(results)
