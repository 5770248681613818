"""ADWIN (adaptive windowing): compares the means of the older and the newer part of a window, for many divisions.

Bifet & Gavaldà, "Learning from time-changing data with adaptive windowing", SDM 2007: ADWIN2, which stores the window
as an exponential histogram, so that its state grows with the logarithm of the length of the window.
Differs from the paper, as river 0.26 does, whose detections it reproduces with the same `delta`: the window is examined
at every 32nd value, and the state begins again after a detection.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from holdfast.core.draws import Draws
from holdfast.monitoring.protocol import Alarm, Part
from holdfast.monitoring.series import SeriesDetectors
from holdfast.monitoring.signals import Signals

_CLOCK = 32  # values between two examinations
_BUCKETS = 5  # buckets of each size, before the two oldest are merged
_FEWEST = 5  # values in a part
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
                if min(n_old, n_new) >= _FEWEST and self._differ(n_old, total_old, n_new):
                    return True
        return False

    def _differ(self, n_old: int, total_old: float, n_new: int) -> bool:
        spread = math.log(2 * math.log(self.n) / self.delta)
        reciprocal = 1 / (n_old - _FEWEST + 1) + 1 / (n_new - _FEWEST + 1)
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
