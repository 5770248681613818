"""Curves of robust accuracy as a function of the perturbation radius eps and as a function of the number of queries."""

from dataclasses import dataclass

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import PerExample
from holdfast.metrics.columns import MINIMUM_NORM, broken_examples, column, untargeted
from holdfast.statistics.intervals import clopper_pearson

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
