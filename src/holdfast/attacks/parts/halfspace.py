"""Linear approximation of a decision boundary by a plane, and the exact projection of points onto it within the valid
inputs.

The projections of Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML
2020, arXiv:1907.02044. Every coordinate moves along the plane's normal until it reaches a side of the box: all at the
same speed for Linf, each at the speed of its weight for L2, one after the other from the largest weight for L1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Bounds, Model
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, Labels, Logits, PerExample

_TINY, _HUGE = 1e-30, 1e30
_CLOSE = 1e-5  # share of the distance that may be missing: rounding of sums, far below any overshoot

Flat = Linf | L2 | L1
"""norms that have an exact projection"""


def to_plane(
    points: Tensor, normal: Inputs, height: Tensor, norm: Flat, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """Return the shortest step from each point (k, n, *features) onto a plane with the given normal (n, *features) that
    stays within valid inputs, and the length of the step (k, n).

    `height` (k, n) is the value at each point of the affine function that is zero on the plane. If the plane does not
    intersect the box, the step leads to the corner of the box that is nearest to the plane. The box must be finite.
    """
    low, high = bounds.like(points)
    side = torch.where(height >= 0, -1.0, 1.0).to(normal.dtype)
    direction = normal.sign() * side.view(*height.shape, *[1] * (normal.dim() - 1))
    # arithmetic instead of torch.where, which is ten times slower with an irregular mask
    room = torch.addcmul((high - low) / 2, direction, (high + low) / 2 - points).clamp_min_(0).flatten(2)
    weight = normal.abs().flatten(1)
    # weights of at most 1, so that their products and sums stay within float32
    scale = weight.amax(1).clamp_min(_TINY)
    weight, rise = weight / scale[:, None], height.abs() / scale
    if isinstance(norm, L1):
        size = _one_by_one(weight, room, rise)
    else:
        size = _together(weight, room, rise, weight if isinstance(norm, L2) else None)
    step = size.view_as(points).mul_(direction)
    return step, _length(step.flatten(2), norm)


def _length(step: Tensor, norm: Flat) -> Tensor:
    """Lengths (k, n) of steps (k, n, features)."""
    if isinstance(norm, L2):
        squared: Tensor = torch.linalg.vecdot(step, step)
        return squared.sqrt()
    return torch.maximum(step.amax(2), -step.amin(2)) if isinstance(norm, Linf) else step.abs().sum(2)


def _dual_size(gradient: Inputs, norm: Flat) -> PerExample:
    """Dual norm: largest change of an affine function with this gradient in a step of length one."""
    size = gradient.flatten(1)
    if isinstance(norm, Linf):
        return size.abs().sum(1)
    return size.norm(dim=1) if isinstance(norm, L2) else size.abs().amax(1)


def _together(weight: Tensor, room: Tensor, rise: Tensor, speed: Tensor | None) -> Tensor:
    """Sizes `min(t*speed, room)` whose weighted sum is `rise`, or all of `room` if that is too small; None is speed 1.

    The sum is concave in t, so that Newton's method from below approaches the root from below; the root is exact once
    the linear piece that contains it is reached.
    """
    drive = weight if speed is None else weight * speed
    reached = torch.linalg.vecdot(room, weight) > rise
    t = torch.where(reached, rise / drive.sum(1).clamp_min(_TINY), _HUGE)
    for _ in range(room.shape[-1] + 1):
        moved = t[..., None] if speed is None else t[..., None] * speed
        size = torch.minimum(room, moved)
        short = (rise - torch.linalg.vecdot(size, weight)) * reached
        if not (short > _CLOSE * rise).any():
            break
        still_moving = (room - size).sign_()
        t = t + short.clamp_min(0) / torch.linalg.vecdot(still_moving, drive).clamp_min(_TINY)
    return size


def _one_by_one(weight: Tensor, room: Tensor, rise: Tensor) -> Tensor:
    """Use all the room of the coordinates with the largest weights, and of the next one as much as `rise` requires."""
    ordered, order = weight.sort(dim=1, descending=True)
    order = order.expand_as(room)
    ordered_room = room.gather(-1, order)
    before = F.pad((ordered * ordered_room)[..., :-1].cumsum(-1), (1, 0))
    size = ((rise[..., None] - before) / ordered.clamp_min(_TINY)).clamp_min(0).minimum(ordered_room)
    return torch.zeros_like(room).scatter_(-1, order, size * ordered.sign())


def plane(model: Model, batch: Batch, aim: Labels | None, norm: Flat) -> tuple[PerExample, Inputs, Logits]:
    """Return the linear approximation of a decision boundary at each input: value and gradient of the gap between the
    logits of the label and of the class `aim`. Also returns all logits.

    Without `aim`, the gap is the margin if the batch has targets, otherwise the one whose plane is closest (one
    backward for each class).
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        label_logit = logits.gather(1, batch.y[:, None])
        if aim is None and batch.target is None:
            return *_closest_plane(x, label_logit - logits, batch.y, norm), logits.detach()
        gap = margin(logits, batch) if aim is None else (label_logit - logits.gather(1, aim[:, None]))[:, 0]
        return gap.detach().nan_to_num(), input_gradient(gap, x), logits.detach()


def _closest_plane(x: Inputs, gaps: Logits, y: Labels, norm: Flat) -> tuple[PerExample, Inputs]:
    height, normal = torch.zeros_like(gaps[:, 0]), torch.zeros_like(x)
    nearest = torch.full_like(height, torch.inf)
    for number, gap in enumerate(gaps.unbind(1)):
        grad = input_gradient(gap, x, retain=True)
        value = gap.detach().nan_to_num()
        distance = (value.abs() / _dual_size(grad, norm).clamp_min(1e-12)).masked_fill(y == number, torch.inf)
        closer = distance < nearest
        height, nearest = torch.where(closer, value, height), torch.where(closer, distance, nearest)
        normal = torch.where(spread(closer, x), grad, normal)
    return height, normal
