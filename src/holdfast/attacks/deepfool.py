"""DeepFool: walk to the nearest boundary of the linearised classifier, again and again.

Moosavi-Dezfooli et al., "DeepFool: A Simple and Accurate Method to Fool Deep Neural Networks", CVPR 2016,
arXiv:1511.04599. Differs from the paper: the classes are ranked once, at the clean input; with a target, the only
boundary is the one between the target and the class that leads; every step overshoots and ends inside the box, and in
the second half of the steps features that the box holds no longer count; a step under L1 is shared by the features with
the largest gradient; and it ends with a bisection to the boundary.
"""

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
from holdfast.ops.norms import expect_norm, free

_BACK = 5  # forwards of the way back, which is about as long as the overshoot


@dataclass(frozen=True)
class DeepFool:
    """Linearise the model around the point and step just across the nearest class boundary."""

    steps: Steps = 50
    """steps at most; an example stops at its first success"""
    candidates: Steps = 9
    """how many of the likeliest other classes are looked at"""
    overshoot: Positive = 0.02
    """share by which a step goes beyond the linear boundary"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, Linf, L2, L1)
        closest, left, x = Closest(batch), batch, batch.x
        for step in range(self.steps + 1):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = model(x, left.ids)
                if step == 0:
                    rivals = self._rivals(logits.detach(), left)
                gaps = logits.gather(1, rivals) - _leading(logits, left)[:, None]
            broken = firmly_broken(logits.detach(), left)
            closest.offer(left, x.detach(), norm.distance(x.detach(), left.x), broken)
            if step == self.steps or broken.all() or not logits.requires_grad:
                break
            grads = torch.stack(
                [torch.autograd.grad(g.sum(), x, retain_graph=True)[0] for g in gaps.unbind(1)], 1
            )
            margins = gaps.detach().abs() + leeway(logits.detach())[:, None]
            stands = ~broken
            left, rivals = left.take(stands), rivals[stands]
            x, grads = x.detach()[stands], grads[stands]
            if step >= self.steps // 2:
                grads = torch.stack([free(grad, x, model.bounds) for grad in grads.unbind(1)], 1)
            x = self._across(norm, model.bounds, x, grads, margins[stands])
        return to_boundary(model, batch, closest.x, norm, forwards=_BACK)

    def _rivals(self, logits: Logits, batch: Batch) -> Labels:
        """The classes that each example may be pushed into, likeliest first."""
        if batch.target is not None:
            return batch.target[:, None]
        others = logits.scatter(1, batch.y[:, None], -torch.inf)
        return others.topk(min(self.candidates, logits.shape[1] - 1), dim=1).indices

    def _across(self, norm: Norm, bounds: Bounds, x: Inputs, grads: Tensor, margins: Tensor) -> Inputs:
        """`x` moved just beyond the nearest of the linear boundaries with these normals and heights."""
        best, shift = torch.full_like(margins[:, 0], torch.inf), torch.zeros_like(x)
        for grad, margin in zip(grads.unbind(1), margins.unbind(1), strict=True):
            direction = norm.steepest(grad, x, bounds)
            distance = margin / (grad * direction).flatten(1).sum(1).clamp_min(1e-30)
            nearer = distance < best
            best = torch.where(nearer, distance, best)
            shift = torch.where(spread(nearer, x), spread(distance, x) * direction, shift)
        return bounds.clamp(x + (1 + self.overshoot) * shift)


def _leading(logits: Logits, batch: Batch) -> PerExample:
    """The logit to be overtaken: the label's, or with a target the largest other one."""
    if batch.target is None:
        return logits.gather(1, batch.y[:, None])[:, 0]
    return logits.scatter(1, batch.target[:, None], -torch.inf).amax(1)
