"""Linear approximations of the decision boundaries between classes around a point, and the step across the nearest one.

Moosavi-Dezfooli et al., "DeepFool: A Simple and Accurate Method to Fool Deep Neural Networks", CVPR 2016,
arXiv:1511.04599.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.attacks.parts.closest import leeway
from holdfast.attacks.parts.losses import likeliest
from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Bounds, Model
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, Logits, PerExample


def rivals_of(logits: Logits, batch: Batch, k: int) -> Tensor:
    """Return for each example the classes that an attack tries to reach, int64 (n, k): the target class if there is
    one, else the `k` wrong classes with the largest logits.
    """
    if batch.target is not None:
        return batch.target[:, None]
    return likeliest(logits, batch.y, k)


def across(
    norm: Norm,
    bounds: Bounds,
    batch: Batch,
    x: Inputs,
    grads: Sequence[Inputs],
    margins: Tensor,
    overshoot: float,
) -> Inputs:
    """Return each point `x` moved just beyond the nearest of several linearised decision boundaries, which are given by
    gradients and logit gaps. It is unchanged if there are none.
    """
    if not grads:
        return x
    best, shift = torch.full_like(margins[:, 0], torch.inf), torch.zeros_like(x)
    beyond = overshoot * norm.distance(x, batch.x)
    for grad, margin in zip(grads, margins.unbind(1), strict=True):
        direction = norm.steepest(grad, x, bounds)
        distance = margin / (grad * direction).flatten(1).sum(1).clamp_min(1e-30)
        nearer, length = distance < best, (1 + overshoot) * distance + beyond
        best = torch.where(nearer, distance, best)
        shift = torch.where(spread(nearer, x), spread(length, x) * direction, shift)
    return bounds.clamp(x + shift)


def planes(model: Model, batch: Batch, x: Inputs, rivals: Tensor) -> tuple[Tensor, list[Inputs]]:
    """Return linear approximations of the decision boundaries at `x`: the absolute gap between the logit of each class
    in `rivals` and the leading logit (n, rivals), and the gradients of these gaps.

    The list of gradients is empty if the logits have none.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        gaps = logits.gather(1, rivals) - _leading(logits, batch)[:, None]
    margins = gaps.detach().abs() + leeway(logits.detach())[:, None]
    single_gaps = gaps.unbind(1) if logits.requires_grad else ()
    return margins, [input_gradient(gap, x, retain=True) for gap in single_gaps]


def _leading(logits: Logits, batch: Batch) -> PerExample:
    """The logit that a rival must exceed: that of the label, or with a target the largest other one."""
    if batch.target is None:
        return logits.gather(1, batch.y[:, None])[:, 0]
    return logits.scatter(1, batch.target[:, None], -torch.inf).amax(1)
