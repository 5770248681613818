"""Tests of a stream: a conformal test martingale, change detectors that read the examples one after another, tests of
windows, and tests of generated samples.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Inputs, Mask, PerExample
from holdfast.monitoring.signals import Array, Signals, joined
from holdfast.monitoring.watching import ALPHA, HORIZON, IN_WINDOWS, WINDOW, Alarm, DriftResult, Part, State
from holdfast.reports.words import percent
from holdfast.statistics.intervals import confidence_sequence, proportion
from holdfast.statistics.repeats import copy_threshold, nearest_example

RATES = (1e-2, 1e-3, 1e-4)
"""rates of jumping. A further one falls as 1 / n after n samples, so that the wealth of long streams without a change
decreases slowly, and a late change is found"""
_BETS = 5
_SMALLEST = 1e-12  # p-value, for the bets that are infinite at 0 or 1


@dataclass
class ConformalMartingale:
    """State of the martingales of all columns: their wealth, and the sorted values of the reference and of the stream
    so far, because a p-value is the rank among all of them.
    """

    guarantee: ClassVar[str] = (
        "If reference and stream are exchangeable, an alarm has a probability of at most 5 %, however long the stream "
        "is (Ville's inequality)."
    )
    reads: ClassVar[str] = "the rank of each sample, in each signal, among the reference and earlier samples"
    compares: ClassVar[Part] = "columns"
    fewest: ClassVar[int] = 1
    restarted: ClassVar[tuple[str, ...]] = ()

    reference: Signals
    alpha: float
    rng: Draws

    def __post_init__(self) -> None:
        self._sorted = [array("d", np.sort(column)) for column in self.reference.values.T]
        n_columns = len(self._sorted)
        n_rates = len(RATES) + 1
        self._wealth = np.full((n_rates, n_columns, _BETS), 1 / (n_rates * _BETS))
        self._n = 0

    def update(self, batch: Signals) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        n_columns = len(self._sorted)
        limit = n_columns / self.alpha
        ids = torch.arange(self._n, self._n + len(batch))
        ties = self.rng.uniform(ids, n_columns, dtype=torch.float64).numpy()
        for row, tie in zip(batch.values, ties, strict=True):
            self._n += 1
            rates = np.array((*RATES, min(RATES[0], 1 / self._n)))[:, None, None]
            mean = self._wealth.mean(2, keepdims=True)
            stakes = (1 - rates) * self._wealth + rates * mean
            self._wealth = stakes * betting_factors(self.p_values(row, tie))
            wealth = self._wealth.sum((0, 2))
            column = int(wealth.argmax())
            if wealth[column] >= limit:
                evidence = f"wealth {wealth[column]:,.0f}, at least {limit:,.0f}"
                return Alarm(self._n, self.reference.names[column], self.reference.view_of(column), evidence)
        return None

    def p_values(self, row: Array, ties: Array) -> Array:
        """Return the p-value of a sample for each signal (columns): the fraction of the reference and earlier samples,
        with the sample itself, that are larger. Equal values count by the fraction in `ties`, uniform random numbers in
        [0, 1), one for each signal. The sample is then added to the earlier samples.
        """
        p = np.empty(len(row))
        for column, value in enumerate(row.tolist()):
            values = self._sorted[column]
            low, high = bisect_left(values, value), bisect_right(values, value)
            p[column] = (len(values) - high + ties[column] * (high - low + 1)) / (len(values) + 1)
            values.insert(high, value)
        return p


def betting_factors(p: Array) -> Array:
    """Factors (columns, bets) of the stakes for p-values (columns,). Each has the mean 1 for uniform p-values."""
    small, large = p.clip(_SMALLEST), (1 - p).clip(_SMALLEST)
    return np.stack([np.ones_like(p), 1.5 - p, 0.5 + p, 0.5 / np.sqrt(small), 0.5 / np.sqrt(large)], axis=1)


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


@dataclass
class Windows:
    """Signals of the incomplete window, and the number of samples in complete ones."""

    waiting: list[Signals] = field(default_factory=list)
    n_tested: int = 0

    def completed(self, batch: Signals) -> Iterator[Signals]:
        """Yield each window that is complete with the samples of a batch."""
        rows = joined([*self.waiting, batch])
        while len(rows) >= WINDOW:
            self.n_tested += WINDOW
            window, rows = rows.at(slice(WINDOW)), rows.at(slice(WINDOW, None))
            yield window
        self.waiting = [rows]


@dataclass
class WindowTest:
    """State of tests that are evaluated when a window is complete."""

    guarantee: ClassVar[str] = IN_WINDOWS
    fewest: ClassVar[int] = WINDOW
    restarted: ClassVar[tuple[str, ...]] = ()

    reference: Signals
    alpha: float
    rng: Draws
    windows: Windows = field(default_factory=Windows)


class KolmogorovSmirnov(WindowTest):
    """State of the tests of all columns."""

    reads: ClassVar[str] = "the distribution of each signal in windows of 250 samples"
    compares: ClassVar[Part] = "columns"

    def __init__(self, reference: Signals, alpha: float, rng: Draws) -> None:
        super().__init__(reference, alpha, rng)
        self._sorted = np.sort(reference.values, axis=0)

    def update(self, batch: Signals) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        for window in self.windows.completed(batch):
            p = np.array(
                [two_sample_p_value(a, b) for a, b in zip(self._sorted.T, window.values.T, strict=True)]
            )
            limit = self.alpha * WINDOW / HORIZON / len(p)
            column = int(p.argmin())
            if p[column] <= limit:
                evidence = f"p = {p[column]:.2g}, at most {limit:.2g}"
                return Alarm(
                    self.windows.n_tested,
                    self.reference.names[column],
                    self.reference.view_of(column),
                    evidence,
                )
        return None


def two_sample_p_value(ordered: Array, window: Array) -> float:
    """The asymptotic p-value, which is not below the exact one for continuous columns, and larger with ties."""
    from scipy.special import kolmogorov

    values = np.concatenate([ordered, window])
    shares = [np.searchsorted(each, values, side="right") / len(each) for each in (ordered, np.sort(window))]
    size = len(ordered) * len(window) / len(values)
    return float(kolmogorov(np.sqrt(size) * np.abs(shares[0] - shares[1]).max()))


PERMUTATIONS = 999
_REACHED = (
    10  # permutations with a value as large as the observed one, after which the p-value is known well enough
)
_AT_ONCE = 111
_ROUNDING = 1e-9  # of the values; without it, those of identical points would differ by chance


class MMD(WindowTest):
    """State of the tests of all views."""

    reads: ClassVar[str] = "the joint distribution of the signals of each view in windows of 250 samples"
    compares: ClassVar[Part] = "views"

    def update(self, batch: Signals) -> Alarm | None:
        """Add the signals of further samples, and return the first alarm among them, if there is one."""
        limit = self.alpha * WINDOW / HORIZON / len(self.reference.views)
        for window in self.windows.completed(batch):
            rng = self.rng.at("window", self.windows.n_tested)
            order = rng.at("reference").uniform(torch.arange(len(self.reference)), dtype=torch.float64)
            sample = self.reference.at(order.argsort()[:WINDOW].numpy())
            for view, columns in self.reference.views.items():
                points = np.concatenate([sample.values[:, columns], window.values[:, columns]])
                p = permutation_p_value(points, len(sample), rng.at("permutations", view))
                if p <= limit:
                    return Alarm(self.windows.n_tested, view, view, f"p = {p:.2g}, at most {limit:.2g}")
        return None


def permutation_p_value(points: Array, n: int, rng: Draws) -> float:
    """p-value of the hypothesis that the first `n` points have the distribution of the others."""
    x = torch.from_numpy(points).double()
    distances = torch.cdist(x, x)
    median = distances[*torch.triu_indices(len(x), len(x), 1)].median()
    kernel = (-(distances**2) / (2 * median**2).clamp_min(1e-12)).exp()
    weights = torch.full((len(x),), -1 / (len(x) - n), dtype=torch.float64)
    weights[:n] = 1 / n
    observed, n_reached = float(weights @ kernel @ weights), 0
    for first in range(0, PERMUTATIONS, _AT_ONCE):
        ids = torch.arange(first, first + _AT_ONCE)
        permuted = weights[rng.uniform(ids, len(x)).argsort(1)]
        values = ((permuted @ kernel) * permuted).sum(1)
        for place, reached in enumerate((values >= observed - _ROUNDING).tolist(), first + 1):
            n_reached += reached
            if n_reached == _REACHED:
                return float(n_reached / place)
    p: float = (n_reached + 1) / (PERMUTATIONS + 1)
    return p


_COMPARED = 1000
"""examples of the reference whose nearest other example is searched for"""
_AT_ALL_TIMES = (
    "In samples that are independent and distributed like the reference, a false alarm has a probability of about 5 %, "
    "however long the stream is."
)


@dataclass(frozen=True)
class Threshold:
    """The distance of copies, and how frequent they are in the reference."""

    distance: float
    rate: float
    """upper end of the interval of the share of examples that are as near to another one"""

    @classmethod
    def of(cls, x: Inputs, rng: Draws) -> "Threshold":
        """Return the threshold of the examples of a reference (n, *features), at least two. It is set on every second
        one of at most 1,000 of them, and its rate is measured on the others.
        """
        rows = rng.bits(torch.arange(len(x))).argsort()[:_COMPARED]
        nearest = _nearest_other(x, rows)
        distance = copy_threshold(nearest)
        return cls(distance, proportion(nearest[1::2] <= distance).high)


def _nearest_other(x: Inputs, rows: Tensor) -> PerExample:
    """Distance of some examples (n) to their nearest other example."""
    flat, found = x.flatten(1), []
    for some in torch.split(rows, 500):
        distances = torch.cdist(flat[some], flat)
        distances[torch.arange(len(some)), some] = torch.inf
        # computed again, because the errors of matrix products are as large as the distance of a copy
        found.append(torch.linalg.vector_norm(flat[some] - flat[distances.argmin(1)], dim=1))
    return torch.cat(found)


@dataclass
class Counted:
    """State of a test that counts samples of a kind."""

    name: ClassVar[str]
    compares: ClassVar[str] = "series"
    guarantee: ClassVar[str] = _AT_ALL_TIMES
    reads: ClassVar[str]
    fewest: ClassVar[int] = 1

    rate: float
    """share that is expected at most"""
    n: int = 0
    k: int = 0
    alarm: Alarm | None = None

    def update(self, found: Mask) -> None:
        """Count further samples (n) of the stream."""
        for is_one in found.tolist():
            self.n, self.k = self.n + 1, self.k + is_one
            if not is_one or self.alarm is not None:
                continue
            low, _ = confidence_sequence(self.k, self.n, 1 - ALPHA, expected=self.rate)
            if low > self.rate:
                evidence = f"{self.k} of {self.n}, at most {percent(self.rate)} expected"
                self.alarm = Alarm(self.n, self.name, self.name, evidence)

    def result(self) -> DriftResult:
        """Return what the test has found so far."""
        state: State = "too few samples" if not self.n else "alarm" if self.alarm else "no alarm"
        return DriftResult(self.name, type(self), state, self.alarm, None)


class Copies(Counted):
    """Counts samples that are copies of examples of the reference."""

    name = "copies"
    reads = "the distance of each sample to the nearest example of the reference"


class Repeats(Counted):
    """Counts samples that repeat an earlier one, as those of a generator that has collapsed do."""

    name = "repeats"
    reads = "the distance of each sample to the nearest of the 250 samples before it"


class SampleTests:
    """Both tests on one stream."""

    def __init__(self, reference: Inputs, rng: Draws) -> None:
        self._reference = reference
        self._threshold = Threshold.of(reference, rng)
        self._before = reference.flatten(1)[:0]
        # no more than the reference has, for whose examples the rate is known
        self._window = min(WINDOW, len(reference) - 1)
        self.copies, self.repeats = Copies(self._threshold.rate), Repeats(self._threshold.rate)

    def update(self, x: Inputs) -> None:
        """Add further samples of the stream (n, *features)."""
        distance, _ = nearest_example(x, self._reference)
        self.copies.update(distance <= self._threshold.distance)
        for sample in x.flatten(1):
            before = self._before
            near = len(before) > 0 and bool(
                torch.linalg.vector_norm(before - sample, dim=1).min() <= self._threshold.distance
            )
            self.repeats.update(torch.tensor([near]))
            self._before = torch.cat((before, sample[None]))[-self._window :]

    def results(self) -> tuple[DriftResult, ...]:
        """Return what both tests have found so far."""
        return self.copies.result(), self.repeats.result()
