"""Metrics of the perturbations that break a model: their sizes, and curves of robust accuracy over eps and
queries.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask, PerExample
from holdfast.metrics.shares import MINIMUM_NORM, Absent, broken_examples, column, untargeted
from holdfast.statistics.intervals import Support, clopper_pearson, mean, median

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
