"""The Page-Hinkley test: cumulative sums of the deviations of a series from its mean, for increases and decreases.

Page, "Continuous inspection schemes", Biometrika 41, 1954; Hinkley, "Inference about the change-point from cumulative
sum tests", Biometrika 58, 1971. The two-sided form with a fading factor is that of river 0.26, whose detections it
reproduces with the same settings.
Differs from river: tolerance and threshold are 0.15 and 30 standard deviations of the reference instead of 0.005 and
50, with which many stationary streams raise an alarm; the row `monitor` of the benchmarks has both. For a series with
rare large values, such as errors, the threshold is raised by simulation.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from holdfast.core.draws import Draws
from holdfast.monitoring.protocol import HORIZON, Alarm, Part
from holdfast.monitoring.series import SeriesDetectors
from holdfast.monitoring.signals import Array, Signals

_FADING = 1 - 1e-4  # as in river
_STREAMS = 400  # simulated for the threshold
_FEWEST = 30  # samples before the first decision, as in river


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
        detected = self.n >= _FEWEST and max(rise, fall) > self.threshold
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
    fewest: ClassVar[int] = _FEWEST

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
