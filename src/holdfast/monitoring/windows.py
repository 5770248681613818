"""Tests of windows of a stream: Kolmogorov-Smirnov and the maximum mean discrepancy."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from holdfast.core.draws import Draws
from holdfast.monitoring.signals import Array, Signals, joined
from holdfast.monitoring.watching import HORIZON, IN_WINDOWS, WINDOW, Alarm, Part


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
class KolmogorovSmirnov:
    """State of the tests of all columns, which are evaluated when a window is complete."""

    guarantee: ClassVar[str] = IN_WINDOWS
    reads: ClassVar[str] = "the distribution of each signal in windows of 250 samples"
    compares: ClassVar[Part] = "columns"
    fewest: ClassVar[int] = WINDOW
    restarted: ClassVar[tuple[str, ...]] = ()

    reference: Signals
    alpha: float
    rng: Draws
    windows: Windows = field(default_factory=Windows)

    def __post_init__(self) -> None:
        self._sorted = np.sort(self.reference.values, axis=0)

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


@dataclass
class MMD:
    """State of the tests of all views, which are evaluated when a window is complete."""

    guarantee: ClassVar[str] = IN_WINDOWS
    reads: ClassVar[str] = "the joint distribution of the signals of each view in windows of 250 samples"
    compares: ClassVar[Part] = "views"
    fewest: ClassVar[int] = WINDOW
    restarted: ClassVar[tuple[str, ...]] = ()

    reference: Signals
    alpha: float
    rng: Draws
    windows: Windows = field(default_factory=Windows)

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
