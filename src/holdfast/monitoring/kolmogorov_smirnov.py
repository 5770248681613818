"""Two-sample Kolmogorov-Smirnov tests of each column in windows of the stream, with the Bonferroni correction.

Kolmogorov, "Sulla determinazione empirica di una legge di distribuzione", 1933; Smirnov, "Table for estimating the
goodness of fit of empirical distributions", Annals of Mathematical Statistics 19, 1948. Rabanser, Günnemann & Lipton,
arXiv:1810.11953, find that one-dimensional tests with the correction detect shifts of images as well as multivariate
ones.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from holdfast.core.draws import Draws
from holdfast.monitoring.protocol import HORIZON, IN_WINDOWS, WINDOW, Alarm, Part
from holdfast.monitoring.signals import Array, Signals
from holdfast.monitoring.windows import Windows


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
