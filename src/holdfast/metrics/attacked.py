"""Precision, recall, F1, entropy, margin and calibration of a model, on clean inputs and on inputs attacked by PGD with
40 steps.

Guo et al., "On calibration of modern neural networks", ICML 2017, arXiv:1706.04599, for the calibration error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Labels, PerExample
from holdfast.metrics.columns import ATTACKED_INPUT, Absent, column
from holdfast.statistics.intervals import Support, bootstrap, mean

BINS = 15
"""number of equal-width bins of confidence, as in Guo et al. 2017"""

Input = Literal["clean", "attacked"]
_PREFIX: dict[Input, str] = {"clean": "", "attacked": "attacked_"}


def _values(evidence: Evidence, name: str, of: Input) -> Tensor:
    return column(evidence, _PREFIX[of] + name, remedies=ATTACKED_INPUT)


def _numbers(values: PerExample, name: str) -> PerExample:
    """Return the values as float64, without examples where the model returned NaN, which the doubt `nan` reports."""
    numbers = values.double()[~values.isnan()]
    if not len(numbers):
        raise Absent(f"{name} cannot be computed: the model returned NaN for all {len(values)} examples")
    return numbers


def _confusions(y: Labels, prediction: Labels, rows: Tensor) -> Tensor:
    """Counts (resamples, classes, classes) of each label and prediction, over the classes that occur."""
    occurring, coded = torch.unique(torch.cat((y, prediction)), return_inverse=True)
    classes = len(occurring)
    cell = coded[: len(y)] * classes + coded[len(y) :]
    counts = torch.zeros(len(rows), classes * classes, dtype=torch.float64)
    cells = cell[rows]
    return counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.float64)).view(
        -1, classes, classes
    )


@dataclass(frozen=True)
class Counts:
    """Numbers of correct predictions, of all predictions and of all labels of each class, for each bootstrap resample,
    of shape (resamples, classes).
    """

    hits: Tensor
    predicted: Tensor
    labelled: Tensor


Score = Callable[[Counts], Tensor]
"""function that returns the score of each class (resamples, classes) from their counts"""


def _precision(counts: Counts) -> Tensor:
    # a class that is never predicted has no hits, so that its score is 0
    return counts.hits / counts.predicted.clamp_min(1)


def _recall(counts: Counts) -> Tensor:
    return counts.hits / counts.labelled.clamp_min(1)


def _f1(counts: Counts) -> Tensor:
    return 2 * counts.hits / (counts.labelled + counts.predicted).clamp_min(1)


def _macro(evidence: Evidence, score: Score, of: Input) -> Estimate:
    """Unweighted mean over the classes that occur as label or prediction. A class that is never predicted scores 0.

    Rejected inputs (-1) count as predictions of no class.
    """
    y, prediction = evidence["y"], _values(evidence, "prediction", of)
    # the classes are sorted, so that rejected inputs (-1) are the first
    skipped = int((prediction < 0).any())

    def statistic(rows: Tensor) -> PerExample:
        table = _confusions(y, prediction, rows)
        totals = (table.diagonal(dim1=1, dim2=2), table.sum(1), table.sum(2))
        counts = Counts(*(per_class[:, skipped:] for per_class in totals))
        occurs = counts.labelled + counts.predicted > 0
        return (score(counts) * occurs).sum(1) / occurs.sum(1)

    return bootstrap(statistic, len(y))


def precision(evidence: Evidence, *, of: Input = "clean") -> Estimate:
    """Return the macro precision of a model, which is the unweighted mean of the precision of each class, with a
    confidence interval.
    """
    return _macro(evidence, _precision, of)


def recall(evidence: Evidence, *, of: Input = "clean") -> Estimate:
    """Return the macro recall of a model, which is the unweighted mean of the recall of each class, with a confidence
    interval.
    """
    return _macro(evidence, _recall, of)


def f1(evidence: Evidence, *, of: Input = "clean") -> Estimate:
    """Return the macro F1 of a model, which is the mean of the F1 of each class, not the F1 of mean precision and mean
    recall.
    """
    return _macro(evidence, _f1, of)


def _entropy_limit(evidence: Evidence) -> float:
    """Entropy of the uniform distribution over the classes up to the largest label or prediction."""
    classes = int(torch.cat((evidence["y"], evidence["prediction"])).max()) + 1
    return math.log(max(classes, 2))


def defensive_entropy(evidence: Evidence) -> Estimate:
    """Return the mean entropy of the predicted class probabilities on attacked inputs, in nats."""
    values = _numbers(_values(evidence, "entropy", "attacked"), "defensive_entropy")
    # the model may have more classes than occur, so that an entropy may exceed this limit
    return mean(values, support=Support(0.0, max(_entropy_limit(evidence), float(values.max()))))


def defensive_entropy_rise(evidence: Evidence) -> Estimate:
    """Return the mean increase of the entropy of the predicted class probabilities from clean to attacked inputs, in
    nats.
    """
    rise = _values(evidence, "entropy", "attacked").double() - evidence["entropy"].double()
    values = _numbers(rise, "defensive_entropy_rise")
    limit = max(_entropy_limit(evidence), float(values.abs().max()))
    return mean(values, support=Support(-limit, limit))


def defensive_margin(evidence: Evidence) -> Estimate:
    """Return the mean decrease, from clean to attacked inputs, of the probability of the true class minus the largest
    other probability.
    """
    after = _values(evidence, "probability_margin", "attacked").double()
    drop = _numbers(evidence["probability_margin"].double() - after, "defensive_margin")
    return mean(drop, support=Support(-2.0, 2.0))


def calibration_error(evidence: Evidence, *, of: Input = "clean") -> Estimate:
    """Return the expected calibration error of a model: the mean absolute difference between confidence and accuracy
    over bins of confidence.

    The estimate is biased upwards in small samples, and resampling adds to the bias. The interval is corrected for the
    latter. For a model that rejects inputs, only accepted inputs count.
    """
    confidences, prediction = (
        _values(evidence, "confidence", of).double(),
        _values(evidence, "prediction", of),
    )
    correct = (prediction == evidence["y"]).double()
    _numbers(confidences, "calibration_error")
    valid = ~confidences.isnan() & (prediction >= 0)
    if not valid.any():
        raise Absent("calibration_error is computed on accepted inputs, and the model accepts none")
    confidences, correct = confidences[valid], correct[valid]
    # bins are open below and closed above, as in Guo et al.; a confidence of 0 is in the first one
    bin_of = (confidences * BINS).ceil().long().clamp(1, BINS) - 1
    gap = correct - confidences

    def statistic(rows: Tensor) -> PerExample:
        sums = torch.zeros(len(rows), BINS, dtype=torch.float64).scatter_add_(1, bin_of[rows], gap[rows])
        return sums.abs().sum(1) / rows.shape[1]

    return bootstrap(statistic, len(confidences))
