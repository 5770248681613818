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

from holdfast.attacks.parts.ascent import unit_noise
from holdfast.attacks.parts.boundaries import Flat, plane, to_boundary, to_plane
from holdfast.attacks.parts.losses import Closest, aims, expect_norm, farthest, leeway, margin
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
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

_NEAR = 1.35  # multiple of eps within which points are refined (docs/decisions/0007)
_NEAR_ETA, _NEAR_BETA = 1.3, 0.8  # upper limits of eta and beta in these runs


@dataclass(frozen=True)
class FAB:
    """Finds the smallest change by projections onto the linearised decision boundary, biased to the clean input."""

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
        sufficient = norm.eps if norm.eps < math.inf else 0.0
        for rank, aim in enumerate(aims(model, batch, self.targets)):
            for restart in range(self.restarts):
                rows = (closest.distance > sufficient).nonzero()[:, 0]
                if not len(rows):
                    break
                remaining, targets, x = batch.take(rows), None if aim is None else aim[rows], batch.x[rows]
                if restart:
                    room = farthest(norm, x, model.bounds).clamp_max(norm.eps)
                    radius = closest.distance[rows].minimum(room)
                    noise = unit_noise(remaining, norm, rng.at("target", rank, "restart", restart))
                    x = model.bounds.clamp(x + 0.5 * spread(radius, x) * noise)
                self._run(model, remaining, targets, x, norm, closest)
        if self.refine:
            self._from_near(model, batch, norm, closest)
        outside = (closest.found & (closest.distance > sufficient)).nonzero()[:, 0]
        if len(outside):
            closest.x[outside] = to_boundary(
                model, batch.take(outside), closest.x[outside], norm, self.refine
            )
        return closest.x

    def _from_near(self, model: Model, batch: Batch, norm: Flat, closest: Closest) -> None:
        """One more run from points near the ball, towards the likeliest wrong class."""
        distance = closest.distance
        rows = ((distance > norm.eps) & (distance < _NEAR * norm.eps)).nonzero()[:, 0]
        if not len(rows):
            return
        near_ball, x = batch.take(rows), closest.x[rows]
        eta, beta = min(self.eta, _NEAR_ETA), min(self.beta, _NEAR_BETA)
        shorter = replace(self, steps=2 * self.refine, eta=eta, beta=beta)
        (aim,) = aims(model, near_ball.at(x), 1)
        shorter._run(model, near_ball, aim, x, norm, closest)

    def _run(
        self, model: Model, remaining: Batch, aim: Labels | None, x: Inputs, norm: Flat, closest: Closest
    ) -> None:
        sufficient = norm.eps if norm.eps < math.inf else 0.0
        run, earlier_distance = (
            Closest(remaining),
            torch.full_like(closest.distance[: len(remaining)], math.inf),
        )
        for step in range(self.steps):
            gap, normal, logits = plane(model, remaining.at(x), aim, norm)
            _offer_broken(run, remaining, x, logits, norm)
            x = self._step(x, remaining.x, gap, normal, norm, model)
            with torch.no_grad():
                # before the point moves back, because FAB would miss many broken points (docs/decisions/0007)
                broken = _offer_broken(run, remaining, x, model(x, remaining.ids), norm)
            x = torch.lerp(remaining.x, x, spread(torch.where(broken, self.beta, 1.0).to(x.dtype), x))
            active = run.distance > sufficient
            if self.patience and sufficient and (step + 1) % self.patience == 0:
                # distance * (distance / earlier distance): the next distance at the same rate
                active &= run.found & (run.distance**2 <= sufficient * earlier_distance)
                earlier_distance = run.distance.clone()
            if not active.all():
                closest.offer(remaining, run.x, run.distance, run.found)
                remaining, x, aim = remaining.take(active), x[active], None if aim is None else aim[active]
                if not len(remaining):
                    return
                run, earlier_distance = run.take(remaining), earlier_distance[active]
        closest.offer(remaining, run.x, run.distance, run.found)

    def _step(
        self, x: Inputs, clean: Inputs, gap: PerExample, normal: Inputs, norm: Flat, model: Model
    ) -> Inputs:
        gap_clean = gap + torch.linalg.vecdot(normal.flatten(1), (clean - x).flatten(1))
        points = torch.stack((x, clean))
        steps, length = to_plane(points, normal, torch.stack((gap, gap_clean)), norm, model.bounds)
        length_x, length_clean = length.clamp_min(1e-8)
        alpha = spread((length_x / (length_x + length_clean)).clamp_max(self.alpha_max), x)
        step, step_clean = points.add_(steps, alpha=self.eta)
        return model.bounds.clamp(torch.lerp(step, step_clean, alpha))


def _offer_broken(closest: Closest, batch: Batch, x: Inputs, logits: Logits, norm: Flat) -> Mask:
    """Keep the closest points that are broken by more than rounding; return which are broken by any amount."""
    margins = margin(logits, batch)
    broken = ~(margins > 0)
    if broken.any():
        closest.offer(batch, x, norm.distance(x, batch.x), ~(margins > -leeway(logits)))
    return broken
