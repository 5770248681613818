"""Grid search: an attack that tries every point of a regular grid of rotations and shifts, or of colour changes.

Engstrom et al., "Exploring the Landscape of Spatial Robustness", ICML 2019, arXiv:1712.02779, where it breaks far more
examples than gradients do. Differs from the paper: the largest changes are tried first, an example is dropped once it
is broken, and hue, saturation, brightness and contrast are searched in the same way.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.images import reached
from holdfast.attacks.parts.losses import Best, margin
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps
from holdfast.threats.transformations import Transformation, expect_transformations


@dataclass(frozen=True)
class GridSearch:
    """Tries every point of a grid of rotations, shifts, scales or colours within the limits of the threat model."""

    turns: Steps = 31
    """number of angles between the two limits of `rotate`, and in the whole circle of `hue`"""
    values: Steps = 5
    """number of values between the two limits of every other axis, and smallest number of hues"""

    needs: ClassVar[Access] = "scores"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_transformations(threat.constraint, self), Best(batch)
        points = self.grid_points(constraint)
        with torch.no_grad():
            for point in points[: threat.queries]:
                remaining = batch.take(best.surviving)
                if not len(remaining):
                    break
                amounts = remaining.x.new_tensor(point).expand(len(remaining), -1)
                x = reached(remaining.x, amounts, constraint, model.bounds)
                best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
        return best.x

    def grid_points(self, constraint: Transformation) -> list[tuple[float, ...]]:
        """Return the points of the grid that the attack tries, the largest changes first. A point has one number for
        each parameter, such as rotation or horizontal shift, as a fraction of its limit.
        """
        hues = max(self.values, math.ceil(self.turns * min(constraint.axes.get("hue", 0.0) / 180, 1)))
        counts = {"rotate": self.turns, "hue": hues}
        lengths = (counts.get(axis, self.values) for axis in constraint.axes)
        sides = (torch.linspace(-1, 1, length).tolist() if length > 1 else [1.0] for length in lengths)
        return sorted(itertools.product(*sides), key=lambda point: -sum(map(abs, point)))
