"""FGSM (fast gradient sign method): one gradient step from the clean input to the surface of the ball.

Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv:1412.6572. Differs from the paper:
the step follows the constraint's own steepest direction, which is the sign of the gradient for Linf only.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import Loss, cross_entropy, expect_eps
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs


@dataclass(frozen=True)
class FGSM:
    """Takes one gradient step of length eps (under Linf along the sign of the gradient)."""

    loss: Loss = cross_entropy
    """loss that is maximised"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        x_adv, _ = ascend(model, batch, batch.x, self.loss, constraint, steps=1, step_size=constraint.eps)
        return x_adv
