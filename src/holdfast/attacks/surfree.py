"""SurFree: a label-based attack that searches random planes through the clean input for a direction with a nearer
decision boundary.

Maho, Furon & Le Merrer, "SurFree: a fast surrogate-free black-box attack", CVPR 2021, arXiv:2011.12807. Differs from
the paper: a direction is orthogonal to the ray only, not to a hundred earlier directions; one bisection searches for
the largest angle, up to twice the one that helped; and the nearest of several starts is used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.boundaries import Decisions
from holdfast.attacks.parts.losses import expect_norm
from holdfast.attacks.parts.random_search import ray_and_orthogonal
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Mask, PerExample, Positive, Steps


@dataclass(frozen=True)
class SurFree:
    """Searches random planes for directions with a nearer boundary, from labels alone, without gradient estimates."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    angle: Positive = 30.0
    """first angle by which the ray is turned, in degrees"""
    rho: Fraction = 0.95
    """factor of the angle if neither direction gives a closer point; otherwise the angle is divided by it"""
    halvings: Steps = 1
    """number of angles that are tried between one that gives a closer point and one that does not"""
    frequencies: Fraction = 0.5
    """fraction of an image's frequencies, lowest first, with half of the energy of each direction; 1 for white noise"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        decisions = Decisions(model, batch, norm, min(self.queries, threat.queries or self.queries))
        angle = torch.full_like(decisions.closest.distance, self.angle).deg2rad()
        with torch.no_grad():
            for step, active in decisions.steps(rng):
                rows, (x, distance) = decisions.closest.rows(active), decisions.closest_points(active)
                ray, beside = ray_and_orthogonal(
                    active, x, model.bounds, rng.at(step), share=self.frequencies
                )
                circle = _Circle(active.x, spread(distance, x) * ray, spread(distance, x) * beside)
                closer = self._search_angle(decisions, active, circle, angle[rows])
                angle[rows] = torch.where(closer, angle[rows] / self.rho, angle[rows] * self.rho)
        return decisions.result()

    def _search_angle(
        self, decisions: Decisions, active: Batch, circle: "_Circle", angle: PerExample
    ) -> Mask:
        """Try an angle in both directions, then larger ones in the better direction; return where it helped."""
        broken_ahead = decisions.ask(active, decisions.bounds.clamp(circle.at(angle)))
        closer = broken_ahead | decisions.ask(
            active, decisions.bounds.clamp(circle.at(-angle)), ~broken_ahead
        )
        best = torch.where(broken_ahead, angle, -angle)
        beyond = 2 * best
        for _ in range(self.halvings):
            middle = (best + beyond) / 2
            broken = decisions.ask(active, decisions.bounds.clamp(circle.at(middle)), closer)
            best, beyond = torch.where(broken, middle, best), torch.where(broken, beyond, middle)
        return closer


@dataclass(frozen=True)
class _Circle:
    """The circle through the clean input and the end of the ray, in the plane of the ray and `beside`."""

    clean: Inputs
    ray: Inputs
    beside: Inputs

    def at(self, angle: PerExample) -> Inputs:
        """Return the point of the circle in the direction at this angle from the ray, for each example. Its distance
        from the clean input is the length of the ray times the cosine of the angle.
        """
        cosine, sine = spread(angle.cos(), self.ray), spread(angle.sin(), self.ray)
        return self.clean + cosine * (cosine * self.ray + sine * self.beside)
