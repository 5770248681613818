"""What a detector's scores are worth: thresholds at a rate of false positives, and the area under the ROC curve."""

import math

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.types import PerExample
from holdfast.ops.statistics import bootstrap


def threshold(clean: PerExample, false_positives: float) -> float:
    """The lowest of the clean scores that at most this share of them exceeds. At least one is needed."""
    return float(clean.sort().values[len(clean) - 1 - math.floor(false_positives * len(clean))])


def auroc(clean: PerExample, attacked: PerExample, confidence: float = 0.95) -> Estimate:
    """The chance that an attacked input scores above a clean one, of as many pairs; ties count half.

    With its bootstrap interval, in which clean and attacked input of an example are drawn together.
    """
    n = len(clean)
    known, coded = torch.unique(torch.cat((clean, attacked)), return_inverse=True)

    def statistic(rows: torch.Tensor) -> PerExample:
        below, at = (_counts(coded[half][rows], len(known)) for half in (slice(n), slice(n, None)))
        return (at * (below.cumsum(1) - below / 2)).sum(1) / n**2

    return bootstrap(statistic, n, confidence)


def _counts(codes: torch.Tensor, of: int) -> torch.Tensor:
    """How often each of so many codes occurs in each row, float64."""
    counts = torch.zeros(len(codes), of, dtype=torch.float64)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float64))


def median_width(margins: PerExample) -> float:
    """The median size of the margins; 0 where that is no number."""
    width = float(margins.double().abs().median())
    return width if math.isfinite(width) else 0.0


def balance(scores: PerExample, width: float) -> float:
    """The weight at which scores spread as far between their quartiles as `width`; 1 where there is none."""
    ordered = scores.double().sort().values
    spread = float(ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4])
    return width / spread if width > 0 and 0 < spread < math.inf else 1.0
