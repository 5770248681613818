"""A conformal test martingale: the wealth of a bet against the hypothesis that reference and stream are exchangeable.

Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005, for smoothed conformal p-values, in
which ties are broken at random. Vovk, Petej, Nouretdinov, Ahlberg, Carlsson & Gammerman, "Retrain or not retrain:
conformal test martingales for change-point detection", COPA 2021, arXiv:2102.10439, for the Simple Jumper, which bets
on small or large p-values and changes the direction at a rate. Ville, "Étude critique de la notion de collectif", 1939:
the wealth ever exceeds 1 / alpha with a probability of at most alpha.
Differs from the paper: two bets of the power martingale, for very small and very large p-values, are added to the three
of the Simple Jumper; the wealth is the mean over four rates of jumping, of which one falls; each column has a
martingale of its own, whose nonconformity score is the value, and an alarm needs a wealth of columns / alpha.
"""

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from holdfast.core.draws import Draws
from holdfast.monitoring.signals import Array, Signals
from holdfast.monitoring.watching import Alarm, Part

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
        """Smoothed p-value of a sample for each column. It is then a part of the values."""
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
