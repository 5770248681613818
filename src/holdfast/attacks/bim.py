"""BIM (basic iterative method): several FGSM steps of a small constant size.

Kurakin et al., "Adversarial Examples in the Physical World", ICLR 2017 workshop, arXiv:1607.02533. Differs from the
paper: the step size is a fraction of eps instead of one grey level, and the best iterate of each example is returned.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import Loss, cross_entropy, expect_eps
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps


@dataclass(frozen=True)
class BIM:
    """Takes several gradient steps of constant size from the clean input (iterated FGSM)."""

    steps: Steps = 10
    """number of gradient steps"""
    reach: Positive = 1.25
    """path length in multiples of eps; in the paper, 1.25 steps of one grey level for each grey level in eps"""
    loss: Loss = cross_entropy
    """loss that is maximised, such as the cross-entropy or the margin"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        step_size = self.reach * constraint.eps / self.steps
        x_adv, _ = ascend(model, batch, batch.x, self.loss, constraint, steps=self.steps, step_size=step_size)
        return x_adv
