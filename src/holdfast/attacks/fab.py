"""FAB (fast adaptive boundary attack): finds the smallest change by projections onto the linearised decision boundary.
Its targeted version is FAB-T.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020,
arXiv:1907.02044; targeting the likeliest classes in turn: arXiv:2003.01690. Differs from the paper: the points at which
gradients are computed are evaluated too, an example is dropped once it is broken inside a finite eps, and the closest
broken point is moved to the boundary by a bisection. `patience` and `refine` are our own, and off by default.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
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
from holdfast.ops.halfspace import Flat, plane, to_plane
from holdfast.ops.losses import aims, margin
from holdfast.ops.norms import expect_norm, farthest
from holdfast.ops.starts import unit_noise

_NEAR = 1.35  # multiple of eps within which points are refined (docs/decisions/0007)
_NEAR_ETA, _NEAR_BETA = 1.3, 0.8  # upper limits of eta and beta in these runs


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
