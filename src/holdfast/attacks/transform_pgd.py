"""TransformPGD: gradient descent on the parameters of rotations, shifts, scales and colour changes of each image.

Engstrom et al., "Exploring the Landscape of Spatial Robustness", ICML 2019, arXiv:1712.02779 (their first-order
method), and Hsiung et al., "Towards Compositional Adversarial Robustness", CVPR 2023, arXiv:2202.04235, for colours.
Differs from the papers: the margin is lowered, with step sizes along a cosine, over all axes at once, from random
starts; hue and saturation change in YIQ instead of HSV, which preserves the brightness and has a gradient everywhere.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.images import reached
from holdfast.attacks.parts.losses import Best, margin
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Restarts, Steps
from holdfast.threats.transformations import Transformation, expect_transformations


@dataclass(frozen=True)
class TransformPGD:
    """Optimises rotation, shift, scale or colour by gradient descent on the margin from random starts."""

    steps: Steps = 20
    """number of gradient steps of one restart"""
    restarts: Restarts = 10
    """number of starts, the first at the clean image; each is run on the examples that survive the previous starts"""
    step_size: Positive = 0.1
    """mean step size along each axis, as a fraction of its limit"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_transformations(threat.constraint, self), Best(batch)
        for restart in range(self.restarts):
            remaining = batch.take(best.surviving)
            if not len(remaining):
                break
            start = (
                2
                * rng.at("restart", restart).uniform(
                    remaining.ids, len(constraint.axes), dtype=remaining.x.dtype
                )
                - 1
            )
            start = start if restart else torch.zeros_like(start)
            self._descend(model, remaining, start, constraint, best)
        return best.x

    def _descend(
        self, model: Model, remaining: Batch, amounts: torch.Tensor, constraint: Transformation, best: Best
    ) -> None:
        """One path; all points are offered to `best`, and broken examples are dropped."""
        for step in range(self.steps + 1):
            amounts = amounts.detach().requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                x = reached(remaining.x, amounts, constraint, model.bounds)
                margins = margin(model(x, remaining.ids), remaining)
            best.offer(remaining, x.detach(), margins.detach())
            surviving = margins.detach() > 0
            if step == self.steps or not surviving.any():
                return
            uphill = -input_gradient(margins, amounts).sign()
            amounts = (amounts + self.step_size * cosine(step, self.steps) * uphill).clamp(-1, 1)[surviving]
            remaining = remaining.take(surviving)
