"""Metrics of the size of the perturbations that break a model. The larger they are, the more robust is the model."""

import math
from functools import partial
from typing import Literal, get_args

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask, PerExample
from holdfast.metrics.columns import MINIMUM_NORM, Absent, column, untargeted
from holdfast.statistics.intervals import Support, mean, median

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
