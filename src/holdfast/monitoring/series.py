"""Change detectors that read the series of a stream: Page-Hinkley and ADWIN."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch

from holdfast.core.draws import Draws
from holdfast.monitoring.signals import Array, Signals
from holdfast.monitoring.watching import HORIZON, Alarm, Part


class Detector(Protocol):
    """Protocol of a detector of changes in a sequence of numbers, which begins again after a detection."""

    def update(self, value: float) -> bool:
        """Add a value, and return whether a change is detected."""


@dataclass
class SeriesDetectors:
    """State of the detectors of all series, by the names of the series."""

    detectors: Mapping[str, Detector]
    n: int = 0
    """number of samples of the stream so far"""
    restarted: tuple[str, ...] = ()
    """names of the series whose detectors detected a change within the reference, and began again there"""

    @classmethod
    def started(cls, detectors: Mapping[str, Detector], reference: Signals) -> "SeriesDetectors":
        """Return detectors that have read at most 1,000 samples of the reference before the stream."""
        columns = reference.values[:HORIZON].T.tolist()
        restarted = [
            name
            for values, (name, detector) in zip(columns, detectors.items(), strict=False)
            if sum(map(detector.update, values))
        ]
        return cls(detectors, restarted=tuple(restarted))

    def update(self, batch: Signals, evidence: str) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        for row in batch.values[:, : len(self.detectors)].tolist():
            self.n += 1
            for value, (name, detector) in zip(row, self.detectors.items(), strict=True):
                if detector.update(value):
                    return Alarm(self.n, name, name, evidence)
        return None


_FADING = 1 - 1e-4  # as in river
_STREAMS = 400  # simulated for the threshold
_FEWEST_BEFORE_DECISION = 30  # samples before the first decision, as in river


@dataclass
class PageHinkley:
    """State of the test for one series. It begins again after a detection."""

    tolerance: float = 0.15
    """deviation of a value from the mean that does not count as a change"""
    threshold: float = 30.0
    """cumulative deviation above which a change is detected"""
    n: int = 0
    mean: float = 0.0
    increase: float = 0.0
    decrease: float = 0.0
    lowest: float = math.inf
    highest: float = -1.0  # as in river

    def update(self, value: float) -> bool:
        """Add a value, and return whether a change is detected."""
        self.n += 1
        self.mean += (value - self.mean) / self.n
        deviation = value - self.mean
        self.increase = _FADING * self.increase + deviation - self.tolerance
        self.decrease = _FADING * self.decrease + deviation + self.tolerance
        self.lowest = min(self.lowest, self.increase)
        self.highest = max(self.highest, self.decrease)
        rise, fall = self.increase - self.lowest, self.highest - self.decrease
        detected = self.n >= _FEWEST_BEFORE_DECISION and max(rise, fall) > self.threshold
        if detected:
            self.n, self.mean, self.increase, self.decrease = 0, 0.0, 0.0, 0.0
            self.lowest, self.highest = math.inf, -1.0
        return detected


class PageHinkleyTest:
    """The Page-Hinkley test of each series."""

    guarantee: ClassVar[str] = (
        "No guarantee: the threshold is at least the value that 5 % of simulated streams of 1,000 samples of the "
        "reference exceed."
    )
    reads: ClassVar[str] = "the mean of each series with its mean so far"
    compares: ClassVar[Part] = "series"
    fewest: ClassVar[int] = _FEWEST_BEFORE_DECISION

    def __init__(self, reference: Signals, alpha: float, rng: Draws) -> None:
        names, columns = reference.names[: reference.n_series], reference.values[:HORIZON].T
        detectors = {
            name: PageHinkley(threshold=_threshold(values, alpha / len(names), rng.at(name)))
            for name, values in zip(names, columns, strict=False)
        }
        self._series = SeriesDetectors.started(detectors, reference)
        self.restarted = self._series.restarted

    def update(self, batch: Signals) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        return self._series.update(batch, "the cumulative deviation exceeds its threshold")


def _threshold(values: Array, alpha: float, rng: Draws) -> float:
    """The larger of the default threshold and the cumulative deviation that streams of 1,000 of the values exceed with
    the probability `alpha` after as many values as there are in the reference, by simulation.
    """
    length = len(values) + HORIZON
    streams = values[rng.integers(torch.arange(_STREAMS), len(values), length).numpy()]
    n = np.arange(1, length + 1)
    deviations = streams - streams.cumsum(1) / n
    tolerance = PageHinkley.tolerance * n
    sums = deviations.cumsum(1)
    rise = (sums - tolerance) - np.minimum.accumulate(sums - tolerance, axis=1)
    fall = np.maximum.accumulate(sums + tolerance, axis=1) - (sums + tolerance)
    largest = np.maximum(rise, fall)[:, -HORIZON:].max(1)
    return max(PageHinkley.threshold, float(np.quantile(largest, 1 - alpha, method="higher")))


_CLOCK = 32  # values between two examinations
_BUCKETS = 5  # buckets of each size, before the two oldest are merged
_FEWEST_IN_PART = 5  # values in a part
_SHARE = 0.04  # of alpha, so that `delta` is 0.002 as in river for an alpha of 0.05


@dataclass
class Adwin:
    """State of the test of one series. It begins again after a detection."""

    delta: float = 0.002
    """probability of a wrong detection in one examination, for values from 0 to 1"""
    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    """sum of the squared deviations of all values of the window from their mean"""
    levels: list[list[float]] = field(default_factory=lambda: [[]])
    """sums of the buckets of 1, 2, 4, … values, the oldest of each size first"""

    def update(self, value: float) -> bool:
        """Add a value, and return whether a change is detected."""
        if self.n:
            self.squares += self.n * (value - self.total / self.n) ** 2 / (self.n + 1)
        self.n += 1
        self.total += value
        self.levels[0].append(value)
        self._merge()
        detected = self.n % _CLOCK == 0 and self._changed()
        if detected:
            self.n, self.total, self.squares, self.levels = 0, 0.0, 0.0, [[]]
        return detected

    def _merge(self) -> None:
        """Merge the two oldest buckets of each size that has too many."""
        for level, buckets in enumerate(self.levels):
            if len(buckets) <= _BUCKETS:
                return
            if level + 1 == len(self.levels):
                self.levels.append([])
            self.levels[level + 1].append(buckets[0] + buckets[1])
            del buckets[:2]

    def _changed(self) -> bool:
        """Whether the means of an older and the newer part of the window differ significantly, for any division."""
        n_old, total_old = 0, 0.0
        for level in reversed(range(len(self.levels))):
            for total in self.levels[level]:
                n_old, total_old = n_old + 2**level, total_old + total
                n_new = self.n - n_old
                if min(n_old, n_new) >= _FEWEST_IN_PART and self._differ(n_old, total_old, n_new):
                    return True
        return False

    def _differ(self, n_old: int, total_old: float, n_new: int) -> bool:
        spread = math.log(2 * math.log(self.n) / self.delta)
        reciprocal = 1 / (n_old - _FEWEST_IN_PART + 1) + 1 / (n_new - _FEWEST_IN_PART + 1)
        limit = math.sqrt(2 * reciprocal * self.squares / self.n * spread) + 2 / 3 * spread * reciprocal
        return abs(total_old / n_old - (self.total - total_old) / n_new) > limit


class AdwinTest:
    """ADWIN of each series."""

    guarantee: ClassVar[str] = (
        "No guarantee: the bound of the paper holds for values from 0 to 1 and a single examination. The share of "
        "false alarms is measured on the reference."
    )
    reads: ClassVar[str] = "the means of older and newer samples, for each series"
    compares: ClassVar[Part] = "series"
    fewest: ClassVar[int] = _CLOCK

    def __init__(self, reference: Signals, alpha: float, rng: Draws) -> None:
        names = reference.names[: reference.n_series]
        detectors = {name: Adwin(_SHARE * alpha / len(names)) for name in names}
        self._series = SeriesDetectors.started(detectors, reference)
        self.restarted = self._series.restarted

    def update(self, batch: Signals) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        return self._series.update(batch, "the means of older and newer samples differ")
