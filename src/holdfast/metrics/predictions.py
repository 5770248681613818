"""Metrics of predictions and detectors, and of the perturbations that break examples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Labels, Mask, PerExample
from holdfast.metrics.comparisons import paired_examples
from holdfast.metrics.names import CORRUPTIONS, DETECTION, PERCENTS, at_percent
from holdfast.metrics.shares import ATTACKED_INPUT, MINIMUM_NORM, Absent, broken_examples, column, untargeted
from holdfast.statistics.intervals import (
    CONFIDENCE,
    Support,
    bonferroni,
    bootstrap,
    clopper_pearson,
    complement,
    fewest_examples,
    mean,
    median,
    proportion,
    threshold,
)
from holdfast.statistics.intervals import auroc as area_under_roc

POINTS = 100
"""largest number of steps of a curve; a page cannot show more"""


@dataclass(frozen=True)
class Curve:
    """A curve of robust accuracy as a decreasing step function: from `x[i]` to `x[i + 1]` the accuracy is `y[i]`, with
    a pointwise confidence interval.
    """

    x: tuple[float, ...]
    y: tuple[Estimate, ...]


@dataclass(frozen=True)
class EpsCurve:
    """Robust accuracy on `n` examples as a function of the perturbation radius eps: a decreasing step function with a
    limited number of steps.

    From `eps[i]` to `eps[i + 1]` the accuracy is `accuracy[i]`, with the pointwise interval `low[i]` to `high[i]`. The
    first step is at eps 0 and is the clean accuracy. Eps is in the units of the threat.
    """

    eps: tuple[float, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n: int

    def __len__(self) -> int:
        return len(self.eps)


def eps_curve(evidence: Evidence) -> EpsCurve:
    """Return robust accuracy as a function of the perturbation radius eps. Raises `Absent` if no minimum-norm attack
    was run on every example.
    """
    curve = accuracy_against_eps(evidence)
    value, low, high = ([getattr(y, of) for y in curve.y] for of in ("value", "low", "high"))
    return EpsCurve(curve.x, tuple(value), tuple(low), tuple(high), curve.y[0].n)


def accuracy_against_eps(evidence: Evidence) -> Curve:
    """Return robust accuracy as a function of the perturbation radius eps, computed from the smallest perturbation that
    breaks each example.

    The first point is the clean accuracy.
    """
    untargeted(evidence, "the eps curve")
    distance = column(evidence, "distance", remedies=MINIMUM_NORM).double()
    return _decreasing(torch.where(evidence["correct"], distance, 0.0))


def accuracy_against_queries(evidence: Evidence) -> Curve:
    """Return robust accuracy as a function of the number of queries for each example, computed from the first query
    that broke it.
    """
    broken = broken_examples(evidence, "the query curve", None)
    first_query = column(evidence, "first_success", "run at least one attack").double()
    broken_at = torch.where(broken, first_query, torch.inf)
    return _decreasing(torch.where(evidence["correct"], broken_at, 0.0))


def _decreasing(broken_at: PerExample) -> Curve:
    n = len(broken_at)
    steps = torch.unique(broken_at[broken_at.isfinite() & (broken_at > 0)])
    if len(steps) > POINTS - 1:
        steps = steps[torch.linspace(0, len(steps) - 1, POINTS - 1).round().long()]
    x = (0.0, *steps.tolist())
    n_robust = [int((broken_at > at).sum()) for at in x]
    return Curve(x, tuple(Estimate(k / n, *clopper_pearson(k, n), n) for k in n_robust))


NormName = Literal["linf", "l2", "l1", "l0"]


def _sizes(evidence: Evidence, norm: NormName) -> PerExample:
    """Smallest perturbation found for each example. Raises `Absent` if it was not measured."""
    return column(evidence, f"distance_{norm}", "run at least one attack")


def _counted(evidence: Evidence) -> Mask:
    """Mask of the examples that count: all of them, or the eligible ones under a targeted goal."""
    return evidence["eligible"] if "eligible" in evidence else torch.ones_like(evidence["correct"])


def perturbation(evidence: Evidence, *, norm: NormName) -> Estimate:
    """Return the median size of the smallest perturbation found for each example: 0 for a misclassified clean input,
    infinite if none was found.
    """
    counted = _counted(evidence)
    if not counted.any():
        raise Absent("no example is eligible, so there is no perturbation to measure")
    return median(_sizes(evidence, norm)[counted])


def mean_perturbation(evidence: Evidence, *, norm: NormName) -> Estimate:
    """Return the mean size of the smallest perturbation of each example that an attack broke. Examples that survive do
    not count.
    """
    size = _sizes(evidence, norm)
    # a misclassified clean input needs no perturbation; under a targeted goal it may still reach the target
    broken = evidence["success"] & _counted(evidence) & size.isfinite()
    if evidence.threat.goal is None:
        broken &= evidence["correct"]
    if not broken.any():
        raise Absent("no attack broke any example, so there is no mean perturbation")
    constraint = evidence.threat.constraint
    most = constraint.eps if constraint.name == norm else math.inf
    # the harness allows a tolerance, by which a rounded size may exceed eps
    return mean(size[broken], support=Support(0.0, max(most, float(size[broken].max()))))


def robust_margin(evidence: Evidence) -> Estimate:
    """Return the median size of the perturbations that minimum-norm attacks found, an upper bound on the median size of
    the smallest ones.
    """
    untargeted(evidence, "robust_margin")
    return median(column(evidence, "distance", remedies=MINIMUM_NORM))


def adversarial_radius(evidence: Evidence) -> Estimate:
    """Return the largest perturbation radius eps at which robust accuracy is at least half of clean accuracy.

    It is the upper median of the distances of the correct examples, because at a smaller eps at least half of them are
    robust (a supremum: at this eps one of them is broken). It is 0 if no example is correct.
    """
    untargeted(evidence, "adversarial_radius")
    distance = column(evidence, "distance", remedies=MINIMUM_NORM)[evidence["correct"]].double()
    if not len(distance):
        return Estimate(0.0, 0.0, 0.0, 0)
    estimate = median(distance)
    # for an even number, half of the examples may break before the other half must be robust
    upper = float(distance.sort().values[len(distance) // 2])
    return Estimate(upper, estimate.low, estimate.high, len(distance))


PERTURBATIONS = {
    **{f"perturbation_{norm}": partial(perturbation, norm=norm) for norm in get_args(NormName)},
    **{f"mean_perturbation_{norm}": partial(mean_perturbation, norm=norm) for norm in get_args(NormName)},
}
"""functions for the median and the mean size in each norm, by the names of the catalogue"""


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


_NEEDS_CORRUPTIONS: Final = "use a threat such as corruptions:3"


def measured(evidence: Evidence) -> list[str]:
    """Return the names of the common corruptions under which a run evaluated the model."""
    return [name for name in CORRUPTIONS if f"{name}.right" in evidence]


def _right(evidence: Evidence) -> Tensor:
    """Whether each example is correct under each corruption, (corruptions, n)."""
    names = measured(evidence)
    if not names:
        raise Absent(f"this run measured none of the fifteen common corruptions; {_NEEDS_CORRUPTIONS}")
    return torch.stack([evidence[f"{name}.right"] for name in names])


def corrupted_accuracy(evidence: Evidence, *, name: str) -> Estimate:
    """Return the share of all examples that the model classifies correctly under the corruption `name`."""
    return proportion(column(evidence, f"{name}.right", _NEEDS_CORRUPTIONS))


def corruption_error_rate(evidence: Evidence) -> Estimate:
    """Return the error rate of the model under common corruptions, averaged over the corruptions that were measured."""
    return complement(mean(_right(evidence).double().mean(0)))


def worst_corruption(evidence: Evidence) -> Estimate:
    """Return the accuracy under the corruption with the lowest accuracy. The interval is corrected for the number of
    corruptions (Bonferroni).
    """
    right = _right(evidence)
    intervals = [proportion(row, bonferroni(CONFIDENCE, len(right))) for row in right]
    worst = min(intervals, key=lambda estimate: estimate.value)
    return Estimate(worst.value, min(e.low for e in intervals), min(e.high for e in intervals), worst.n)


def mce(evidence: Evidence, baseline: Evidence) -> Estimate:
    """Return the mean corruption error: the error rate under each corruption divided by that of the baseline, averaged
    over the corruptions.

    Raises `Absent` if the baseline has no error under a corruption, or measured other corruptions.
    """
    refuse_incomparable(evidence, baseline)
    shared = paired_examples(evidence, baseline)
    after, before = ~_right(evidence)[:, shared.first], ~_right(baseline)[:, shared.second]
    wrong = torch.stack((after, before)).double()

    def statistic(rows: Tensor) -> PerExample:
        errors = wrong[:, :, rows].mean(-1)
        # if the baseline makes no error in a resample, half an error is counted
        return (errors[0] / errors[1].clamp_min(0.5 / rows.shape[1])).mean(0)

    return bootstrap(statistic, len(shared), support=Support(0.0, float(2 * len(shared))))


def refuse_incomparable(evidence: Evidence, baseline: Evidence) -> None:
    """Raise `Absent`, with the reason and advice, if the mean corruption error (mCE) cannot be computed relative to
    this baseline.
    """
    _right(evidence)
    if measured(evidence) != measured(baseline):
        raise Absent(
            "mce needs a baseline with the same corruptions; assess both runs with the same corruptions"
        )
    wrong = ~_right(baseline)[:, paired_examples(evidence, baseline).second]
    spotless = [name for name, errors in zip(measured(baseline), wrong, strict=True) if not errors.any()]
    if spotless:
        raise Absent(
            f"mce has no value: the baseline makes no error under {', '.join(spotless)}, and a mean corruption error "
            "divides by its error rates; raise the severity, take more examples, or skip these corruptions"
        )


ACCURACIES = {f"{name}_accuracy": partial(corrupted_accuracy, name=name) for name in CORRUPTIONS}
"""functions for the accuracy under each corruption, by the names of the catalogue"""


Attacker = Literal["aware", "oblivious"]
_MEASURABLE = 0.01
"""false positive rate below which a sample may have too few clean inputs"""
_NEEDS_DETECTOR = (
    "it needs holdfast.with_detector(net, detector, ...), a named suite, access to gradients and no target"
)


def _scores(evidence: Evidence, of: Attacker) -> tuple[PerExample, PerExample, Mask]:
    """Return clean and attacked scores of all examples, and the mask of those that the attacker broke."""
    attacked = column(evidence, f"{of}_score", _NEEDS_DETECTOR)
    return evidence["score"], attacked, (evidence["class_margin"] > 0) & (attacked < torch.inf)


def _fooled(evidence: Evidence, of: Attacker) -> tuple[PerExample, PerExample]:
    clean, attacked, broken = _scores(evidence, of)
    if not broken.any():
        raise Absent("no attacked input was misclassified by the network, so there is nothing to detect")
    return clean[broken], attacked[broken]


def auroc_estimate(evidence: Evidence, *, of: Attacker = "aware") -> Estimate:
    """Return the area under the ROC curve of a detector: the probability that its score is higher for an attacked input
    than for a clean one.
    """
    return area_under_roc(*_fooled(evidence, of))


def rate_estimate(evidence: Evidence, *, false_positives: float, of: Attacker = "aware") -> Estimate:
    """Return the detection rate: the share of attacked inputs that the detector rejects at the threshold with a given
    false positive rate.

    `false_positives` is a fraction of the clean inputs.
    """
    attacked = _fooled(evidence, of)[1]
    return proportion(attacked > _limit(evidence["score"], false_positives))


def accepted_right(evidence: Evidence, *, false_positives: float) -> Estimate:
    """Return robust accuracy with rejection: the share of examples that are classified correctly and accepted when
    clean, and for which no attacked input is accepted and misclassified.

    The threshold rejects the fraction `false_positives` of the clean inputs.
    """
    clean, attacked, _ = _scores(evidence, "aware")
    limit = _limit(clean, false_positives)
    return proportion((evidence["class_margin"] > 0) & (clean <= limit) & (attacked > limit))


def accepted_wrong(evidence: Evidence, *, false_positives: float) -> Estimate:
    """Return the share of examples for which a clean or attacked input is misclassified and accepted by the detector.

    The threshold rejects the fraction `false_positives` of the clean inputs.
    """
    clean, attacked, _ = _scores(evidence, "aware")
    return proportion(attacked <= _limit(clean, false_positives))


def _limit(clean: PerExample, false_positives: float) -> float:
    """The threshold with a false positive rate. Rates below 1 % need enough clean inputs to distinguish them from 0."""
    least = fewest_examples(false_positives)
    if false_positives < _MEASURABLE and len(clean) < least:
        raise Absent(
            f"a false positive rate of {100 * false_positives:g} % is measured on {least:,} clean inputs or more, and "
            f"the sample has {len(clean):,}"
        )
    return threshold(clean, false_positives)


def _at_rates() -> Mapping[str, Callable[[Evidence], Estimate]]:
    metrics: dict[str, Callable[[Evidence], Estimate]] = {
        "detection_auroc": auroc_estimate,
        "oblivious_detection_auroc": partial(auroc_estimate, of="oblivious"),
    }
    for percent in PERCENTS:
        rate = float(percent) / 100
        metrics |= {
            at_percent("detection_rate", percent): partial(rate_estimate, false_positives=rate),
            at_percent("oblivious_detection_rate", percent): partial(
                rate_estimate, false_positives=rate, of="oblivious"
            ),
            at_percent("accepted_right", percent): partial(accepted_right, false_positives=rate),
            at_percent("accepted_wrong", percent): partial(accepted_wrong, false_positives=rate),
        }
    return {name: metrics[name] for name in DETECTION}


DETECTION_METRICS: Final = _at_rates()
"""metrics of a detector by name"""
