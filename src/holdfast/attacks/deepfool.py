"""DeepFool: walk to the nearest boundary of the linearised classifier, again and again.

Moosavi-Dezfooli et al., "DeepFool: A Simple and Accurate Method to Fool Deep Neural Networks", CVPR 2016,
arXiv:1511.04599. Differs from the paper: the classes are ranked once, at the clean input; with a target, the only
boundary is the one between the target and the class that leads; every step overshoots the whole way walked and ends
inside the box, and in the second half of the steps features that the box holds no longer count; a step under L1 is
shared by the features with the largest gradient; and it ends with a bisection, which takes the overshoot back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.rows import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Labels, Logits, PerExample, Positive, Steps
from holdfast.ops.boundary import to_boundary
from holdfast.ops.closest import Closest, firmly_broken, leeway
from holdfast.ops.gradients import input_gradient
from holdfast.ops.losses import likeliest
from holdfast.ops.norms import expect_norm, free


@dataclass(frozen=True)
class DeepFool:
    """Linearise the model around the point and step just across the nearest class boundary."""

    steps: Steps = 50
    """steps at most; an example stops at its first success"""
    candidates: Steps = 9
    """how many of the likeliest other classes are looked at"""
    overshoot: Positive = 0.02
    """share of the whole way by which a step goes beyond the linear boundary"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, Linf, L2, L1)
        closest, left, x = Closest(batch), batch, batch.x
        with torch.no_grad():
            logits = model(x, batch.ids)
        rivals = self._rivals(logits, batch)
        for step in range(self.steps + 1):
            broken = firmly_broken(logits, left)
            closest.offer(left, x, norm.distance(x, left.x), broken)
            left, x, rivals = left.take(~broken), x[~broken], rivals[~broken]
            if step == self.steps or not len(left):
                break
            margins, grads = _planes(model, left, x, rivals)
            if not grads:
                break
            if step >= self.steps // 2:
                grads = [free(grad, x, model.bounds) for grad in grads]
            x = self._across(norm, model.bounds, left, x, grads, margins)
            with torch.no_grad():  # judged before the next gradients: a broken example costs none of them
                logits = model(x, left.ids)
        return to_boundary(model, batch, closest.x, norm)

    def _rivals(self, logits: Logits, batch: Batch) -> Labels:
        """The classes that each example may be pushed into, likeliest first."""
        if batch.target is not None:
            return batch.target[:, None]
        return likeliest(logits, batch.y, self.candidates)

    def _across(
        self, norm: Norm, bounds: Bounds, batch: Batch, x: Inputs, grads: Sequence[Inputs], margins: Tensor
    ) -> Inputs:
        """`x` moved just beyond the nearest of the linear boundaries with these normals and heights."""
        best, shift = torch.full_like(margins[:, 0], torch.inf), torch.zeros_like(x)
        beyond = self.overshoot * norm.distance(x, batch.x)
        for grad, margin in zip(grads, margins.unbind(1), strict=True):
            direction = norm.steepest(grad, x, bounds)
            distance = margin / (grad * direction).flatten(1).sum(1).clamp_min(1e-30)
            nearer, length = distance < best, (1 + self.overshoot) * distance + beyond
            best = torch.where(nearer, distance, best)
            shift = torch.where(spread(nearer, x), spread(length, x) * direction, shift)
        return bounds.clamp(x + shift)


def _planes(model: Model, batch: Batch, x: Inputs, rivals: Labels) -> tuple[Tensor, list[Inputs]]:
    """How far below the leading logit each rival is at `x` (n, rivals); the gradient of each gap, if there is any."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        gaps = logits.gather(1, rivals) - _leading(logits, batch)[:, None]
    margins = gaps.detach().abs() + leeway(logits.detach())[:, None]
    each = gaps.unbind(1) if logits.requires_grad else ()
    return margins, [input_gradient(gap, x, again=True) for gap in each]


def _leading(logits: Logits, batch: Batch) -> PerExample:
    """The logit to be overtaken: the label's, or with a target the largest other one."""
    if batch.target is None:
        return logits.gather(1, batch.y[:, None])[:, 0]
    return logits.scatter(1, batch.target[:, None], -torch.inf).amax(1)
