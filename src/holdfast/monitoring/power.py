"""The power of a test on a reference: the smallest shift that it finds within 1,000 samples, by simulation.

A simulated stream consists of samples of the reference, drawn with replacement, in which one signal is shifted from
the first sample on. The shift is the smallest of a list with which the test raises an alarm in at least 16 of 20
streams.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch

from holdfast.core.draws import Draws
from holdfast.monitoring.protocol import HORIZON, StreamTest
from holdfast.monitoring.signals import CONFIDENCE, DISTANCE, ERROR, INPUTS, Array, Signals

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
