"""FAB: fast adaptive boundary attack, a minimum-norm attack; with targets, FAB-T.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020,
arXiv:1907.02044; targeting the likeliest classes in turn: arXiv:2003.01690. Differs from the paper: the points at which
gradients are computed are evaluated too, an example is dropped once it is broken inside a finite eps, and the closest
broken point is moved to the boundary by a bisection. `patience` and `refine` are our own, and off by default.

The decision boundary is approximated by a plane, and the projection onto it inside the box is exact. Every coordinate
moves along the plane's normal until it reaches a side of the box: all at the same speed for Linf, each at the speed of
its weight for L2, one after the other from the largest weight for L1.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import (
    Access,
    Count,
    Fraction,
    Inputs,
    Labels,
    Logits,
    Mask,
    PerExample,
    Positive,
    Restarts,
    Steps,
)
from holdfast.ops.boundary import to_boundary
from holdfast.ops.closest import Closest, leeway
from holdfast.ops.gradients import input_gradient
from holdfast.ops.losses import aims, margin
from holdfast.ops.norms import expect_norm, farthest
from holdfast.ops.starts import unit_noise

_NEAR = 1.35  # multiple of eps within which points are refined (docs/decisions/0007)
_NEAR_ETA, _NEAR_BETA = 1.3, 0.8  # upper limits of eta and beta in these runs

_TINY, _HUGE = 1e-30, 1e30
_CLOSE = 1e-5  # share of the distance that may be missing: rounding of sums, far below any overshoot

Flat = Linf | L2 | L1
"""norms that have an exact projection"""


@dataclass(frozen=True)
class FAB:
    """Projects onto the linearised decision boundary in each step, with a bias towards the clean input."""

    steps: Steps = 100
    """number of steps of one run; each costs one forward pass, and one forward pass with a gradient"""
    restarts: Restarts = 1
    """number of runs for each target: the first from the clean input, the others from random points around it"""
    targets: Count = 9
    """number of wrong classes that are targeted in turn, likeliest first; 0 for the closest boundary (one gradient a
    class)"""
    alpha_max: Fraction = 0.1
    """largest weight of the projection of the clean input in a step"""
    eta: Positive = 1.05
    """step size in multiples of the distance to the linearised boundary"""
    beta: Fraction = 0.9
    """factor of the distance of a broken point from the clean input, applied before the next step"""
    patience: Count = 0
    """number of steps between checks. A check ends a run that is not broken yet, and a run whose distance would stay
    above eps if it fell again by the same factor as since the last check. 0 for no checks"""
    refine: Count = 0
    """number of gradient steps inside a finite ball, from the projections of the points that ended outside; points
    within 1.35 eps first get up to twice as many steps of another run that starts from them, towards the likeliest
    wrong class"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm, closest = expect_norm(threat.constraint, self, Linf, L2, L1), Closest(batch)
        assert isinstance(norm, (Linf, L2, L1))
        enough = norm.eps if norm.eps < math.inf else 0.0
        for rank, aim in enumerate(aims(model, batch, self.targets)):
            for restart in range(self.restarts):
                rows = (closest.distance > enough).nonzero()[:, 0]
                if not len(rows):
                    break
                left, aimed, x = batch.take(rows), None if aim is None else aim[rows], batch.x[rows]
                if restart:
                    room = farthest(norm, x, model.bounds).clamp_max(norm.eps)
                    reach = closest.distance[rows].minimum(room)
                    noise = unit_noise(left, norm, rng.at("target", rank, "restart", restart))
                    x = model.bounds.clamp(x + 0.5 * spread(reach, x) * noise)
                self._run(model, left, aimed, x, norm, closest)
        if self.refine:
            self._from_near(model, batch, norm, closest)
        far = (closest.found & (closest.distance > enough)).nonzero()[:, 0]
        if len(far):
            closest.x[far] = to_boundary(model, batch.take(far), closest.x[far], norm, self.refine)
        return closest.x

    def _from_near(self, model: Model, batch: Batch, norm: Flat, closest: Closest) -> None:
        """One more run from points near the ball, towards the likeliest wrong class."""
        far = closest.distance
        rows = ((far > norm.eps) & (far < _NEAR * norm.eps)).nonzero()[:, 0]
        if not len(rows):
            return
        left, x = batch.take(rows), closest.x[rows]
        eta, beta = min(self.eta, _NEAR_ETA), min(self.beta, _NEAR_BETA)
        shorter = replace(self, steps=2 * self.refine, eta=eta, beta=beta)
        (aim,) = aims(model, left.at(x), 1)
        shorter._run(model, left, aim, x, norm, closest)

    def _run(
        self, model: Model, left: Batch, aim: Labels | None, x: Inputs, norm: Flat, closest: Closest
    ) -> None:
        enough = norm.eps if norm.eps < math.inf else 0.0
        run, before = Closest(left), torch.full_like(closest.distance[: len(left)], math.inf)
        for step in range(self.steps):
            height, normal, logits = plane(model, left.at(x), aim, norm)
            _keep(run, left, x, logits, norm)
            x = self._step(x, left.x, height, normal, norm, model)
            with torch.no_grad():
                beyond = _keep(run, left, x, model(x, left.ids), norm)
            x = torch.lerp(left.x, x, spread(torch.where(beyond, self.beta, 1.0).to(x.dtype), x))
            stays = run.distance > enough
            if self.patience and enough and (step + 1) % self.patience == 0:
                stays &= run.found & (run.distance**2 <= enough * before)
                before = run.distance.clone()
            if not stays.all():
                closest.offer(left, run.x, run.distance, run.found)
                left, x, aim = left.take(stays), x[stays], None if aim is None else aim[stays]
                if not len(left):
                    return
                run, before = run.take(left), before[stays]
        closest.offer(left, run.x, run.distance, run.found)

    def _step(
        self, x: Inputs, clean: Inputs, height: PerExample, normal: Inputs, norm: Flat, model: Model
    ) -> Inputs:
        from_clean = height + torch.linalg.vecdot(normal.flatten(1), (clean - x).flatten(1))
        points = torch.stack((x, clean))
        way, length = to_plane(points, normal, torch.stack((height, from_clean)), norm, model.bounds)
        near, far = length.clamp_min(1e-8)
        alpha = spread((near / (near + far)).clamp_max(self.alpha_max), x)
        step, back = points.add_(way, alpha=self.eta)
        return model.bounds.clamp(torch.lerp(step, back, alpha))


def _keep(closest: Closest, batch: Batch, x: Inputs, logits: Logits, norm: Flat) -> Mask:
    """Keep the closest points that are broken by more than rounding; return which are broken by any amount."""
    height = margin(logits, batch)
    broken = ~(height > 0)
    if broken.any():
        closest.offer(batch, x, norm.distance(x, batch.x), ~(height > -leeway(logits)))
    return broken


def to_plane(
    points: Tensor, normal: Inputs, height: Tensor, norm: Flat, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """Return the step from each of `points` (k, n, *features) onto the plane with `normal` (n, *features), and its
    length (k, n).

    `height` (k, n) is the value at each point of the affine function that is zero on the plane. If the plane does not
    intersect the box, the step leads to the corner of the box that is nearest to the plane. The box must be finite.
    """
    low, high = bounds.like(points)
    side = torch.where(height >= 0, -1.0, 1.0).to(normal.dtype)
    way = normal.sign() * side.view(*height.shape, *[1] * (normal.dim() - 1))
    # arithmetic instead of torch.where, which is ten times slower with an irregular mask
    room = torch.addcmul((high - low) / 2, way, (high + low) / 2 - points).clamp_min_(0).flatten(2)
    weight = normal.abs().flatten(1)
    scale = weight.amax(1).clamp_min(_TINY)
    weight, rise = weight / scale[:, None], height.abs() / scale
    if isinstance(norm, L1):
        size = _one_by_one(weight, room, rise)
    else:
        size = _together(weight, room, rise, weight if isinstance(norm, L2) else None)
    step = size.view_as(points).mul_(way)
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
        reach = t[..., None] if speed is None else t[..., None] * speed
        size = torch.minimum(room, reach)
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
    """Return the value and the gradient of the gap between the logits of the label and of class `aim`, and all logits.

    Without `aim`, the gap is the margin if the batch has targets, otherwise the one whose plane is closest (one
    backward for each class).
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        own = logits.gather(1, batch.y[:, None])
        if aim is None and batch.target is None:
            return *_closest_plane(x, own - logits, batch.y, norm), logits.detach()
        gap = margin(logits, batch) if aim is None else (own - logits.gather(1, aim[:, None]))[:, 0]
        return gap.detach().nan_to_num(), input_gradient(gap, x), logits.detach()


def _closest_plane(x: Inputs, gaps: Logits, y: Labels, norm: Flat) -> tuple[PerExample, Inputs]:
    height, normal = torch.zeros_like(gaps[:, 0]), torch.zeros_like(x)
    nearest = torch.full_like(height, torch.inf)
    for number, gap in enumerate(gaps.unbind(1)):
        grad = input_gradient(gap, x, again=True)
        value = gap.detach().nan_to_num()
        distance = (value.abs() / _dual_size(grad, norm).clamp_min(1e-12)).masked_fill(y == number, torch.inf)
        closer = distance < nearest
        height, nearest = torch.where(closer, value, height), torch.where(closer, distance, nearest)
        normal = torch.where(spread(closer, x), grad, normal)
    return height, normal
