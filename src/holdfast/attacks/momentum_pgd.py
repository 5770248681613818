"""Momentum PGD (MI-FGSM): gradient steps along an accumulated sum of normalised gradients.

Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv:1710.06081. Differs from the paper: the path
is ten times as long, it raises the cross-entropy of scaled logits, the best iterate of each example is returned instead
of the last, and other norms step along their own steepest direction. The paper's own settings are
`loss=cross_entropy, reach=1`.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import Loss, expect_eps, scaled_cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, NonNegative, Positive, Steps


@dataclass(frozen=True)
class MomentumPGD:
    """Steps from the clean input along an accumulated, normalised gradient (MI-FGSM on the model itself)."""

    steps: Steps = 10
    """number of gradient steps"""
    reach: Positive = 10.0
    """path length, in multiples of eps"""
    momentum: NonNegative = 1.0
    """factor of the accumulated direction in each step"""
    loss: Loss = scaled_cross_entropy
    """loss that is maximised"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        x_adv, _ = ascend(
            model,
            batch,
            batch.x,
            self.loss,
            constraint,
            steps=self.steps,
            step_size=self.reach * constraint.eps / self.steps,
            momentum=self.momentum,
        )
        return x_adv
