"""Thresholds: coordinate search over the values on both sides of the thresholds of a tree ensemble.

The score of a tree ensemble is constant between two thresholds of a feature, so that one value of each interval is
enough. For sums of trees with one feature each, such as stumps, and two classes, one pass over the features finds the
worst input (Andriushchenko & Hein, "Provably robust boosted decision stumps and trees against adversarial attacks",
NeurIPS 2019, arXiv:1906.03526). For other ensembles the passes are repeated until no change of one value lowers the
margin. Thresholds are read from the model; for models without readable thresholds a grid replaces them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import Best, expect_eps, expect_norm, margin
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps


@dataclass(frozen=True)
class Thresholds:
    """Sets one feature after another to the value between two thresholds at which the margin is lowest."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    values: Steps = 64
    """largest number of intervals between thresholds that are tried for each feature"""
    grid: Steps = 4
    """number of values that are tried for each feature between the ends of the ball if no thresholds are known"""
    read: bool = True
    """whether thresholds are read from the model if it is a tree ensemble, instead of the use of a grid"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return _searched(self, None, model, batch, threat)

    def reading(self, inner_values: Sequence[Tensor]) -> Attack:
        """Return the attack on a tree ensemble whose thresholds are known.

        `inner_values` has a tensor for each feature: one value of each interval between successive thresholds, in
        ascending order, so that the attack need not search for the intervals.
        """
        return _Reading(self, tuple(inner_values)) if self.read else self

    def without_reading(self) -> Attack:
        """Return the attack for an attacker who gets scores only."""
        return replace(self, read=False)


@dataclass(frozen=True, eq=False)
class _Reading:
    """The attack on a model whose thresholds are known."""

    settings: Thresholds
    inner_values: tuple[Tensor, ...]

    needs: ClassVar[Access] = "scores"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return _searched(self.settings, self.inner_values, model, batch, threat)


def _searched(
    settings: Thresholds,
    inner_values: tuple[Tensor, ...] | None,
    model: Model,
    batch: Batch,
    threat: ThreatModel,
) -> Inputs:
    norm = expect_norm(expect_eps(threat.constraint, settings), settings, Linf)
    limit = min(settings.queries, threat.queries or settings.queries)
    best = Best(batch)
    if not len(batch):
        return best.x
    low, high = (
        norm.project(torch.full_like(batch.x, side), batch.x, model.bounds).flatten(1)
        for side in (-torch.inf, torch.inf)
    )
    with torch.no_grad():
        best.offer(batch, batch.x, margin(model(batch.x, batch.ids), batch))
        queries = torch.ones_like(batch.ids)
        active = best.surviving
        while len(active):
            before = best.margin.clone()
            for feature in range(low.shape[1]):
                rows = active[(best.margin[active] > 0) & (queries[active] < limit)]
                inner = None if inner_values is None else inner_values[feature]
                tried = _tried(settings, inner, low[rows, feature], high[rows, feature])
                tried = tried.masked_fill(tried == best.x.flatten(1)[rows, feature, None], torch.nan)
                missing = tried.isnan()
                missing |= (~missing).cumsum(1) > (limit - queries[rows])[:, None]
                queries[rows] += (~missing).sum(1)
                if not missing.all():
                    _offer(best, model, batch, rows, feature, tried, missing)
            active = active[(best.margin[active] > 0) & (best.margin[active] < before[active])]
    return best.x


def _tried(settings: Thresholds, inner: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
    """Return the values of a feature that are tried for each example, filled up with NaN: both ends of its interval in
    the ball, and values in between.
    """
    ends = torch.stack((low, torch.where(high > low, high, torch.nan)), 1)
    if inner is None:
        shares = torch.arange(1, settings.grid + 1).to(low) / (settings.grid + 1)
        between = low[:, None] + shares * (high - low)[:, None]
        return torch.cat((ends, between.masked_fill((high <= low)[:, None], torch.nan)), 1)
    inner = inner.to(low)
    first, stop = torch.searchsorted(inner, low.contiguous()), torch.searchsorted(inner, high.contiguous())
    count = (stop - first).clamp_min(0)
    kept = count.clamp_max(settings.values)[:, None]
    places = torch.arange(int(kept.max()) if len(kept) else 0, device=low.device).expand(len(low), -1)
    chosen = first[:, None] + places * count[:, None] // kept.clamp_min(1)
    if not chosen.numel():
        return ends
    values = inner[chosen.clamp_max(len(inner) - 1)].masked_fill(places >= kept, torch.nan)
    return torch.cat((ends, values), 1)


def _offer(
    best: Best, model: Model, batch: Batch, rows: Tensor, feature: int, tried: Tensor, missing: Tensor
) -> None:
    """Query the model at the tried values of a feature of the examples `rows`, and offer the best value of each."""
    at, _ = (~missing).nonzero(as_tuple=True)
    subset = batch.take(rows[at])
    points = best.x[rows[at]].flatten(1)
    points[:, feature] = tried[~missing]
    points = points.view_as(subset.x)
    margins = tried.new_full(tried.shape, torch.inf)
    margins[~missing] = margin(model(points, subset.ids), subset).to(tried.dtype)
    lowest, place = margins.nan_to_num(-torch.inf, torch.inf, -torch.inf).min(1)
    x = best.x[rows].flatten(1)
    x[:, feature] = torch.where(lowest < torch.inf, tried.gather(1, place[:, None])[:, 0], x[:, feature])
    best.offer(batch.take(rows), x.view_as(batch.x[rows]), lowest)
