"""Quality of a detector of adversarial examples: thresholds for a false positive rate, and the area under the ROC
curve.
"""

import math

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.types import PerExample
from holdfast.statistics.intervals import bootstrap


def threshold(clean: PerExample, false_positives: float) -> float:
    """Return the threshold of a detector: the lowest score of a clean input that at most the fraction `false_positives`
    of the clean scores exceed. At least one score is needed.
    """
    return float(clean.sort().values[len(clean) - 1 - math.floor(false_positives * len(clean))])


def auroc(clean: PerExample, attacked: PerExample, confidence: float = 0.95) -> Estimate:
    """Return the area under the ROC curve of a detector with its confidence interval: the probability that an attacked
    input has a higher score than a clean one, where ties count half.

    The bootstrap interval resamples examples, so that the clean and the attacked input of an example stay together.
    """
    n = len(clean)
    scores, codes = torch.unique(torch.cat((clean, attacked)), return_inverse=True)

    def statistic(rows: torch.Tensor) -> PerExample:
        below, equal = (_counts(codes[half][rows], len(scores)) for half in (slice(n), slice(n, None)))
        return (equal * (below.cumsum(1) - below / 2)).sum(1) / n**2

    return bootstrap(statistic, n, confidence)


def _counts(codes: torch.Tensor, of: int) -> torch.Tensor:
    """Counts of the codes 0 to `of` - 1 in each row, float64."""
    counts = torch.zeros(len(codes), of, dtype=torch.float64)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float64))


def median_width(margins: PerExample) -> float:
    """Return the median of the absolute margins of a classifier, which is used as the scale of its logits; 0 if it is
    not finite.
    """
    width = float(margins.double().abs().median())
    return width if math.isfinite(width) else 0.0


def balance(scores: PerExample, width: float) -> float:
    """Return the factor by which the scores of a detector are multiplied so that their interquartile range is `width`;
    1 if one of the two is zero or infinite.
    """
    ordered = scores.double().sort().values
    spread = float(ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4])
    return width / spread if width > 0 and 0 < spread < math.inf else 1.0
