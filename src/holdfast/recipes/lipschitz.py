"""Lipschitz constraint: training in which the Lipschitz constant of each layer is bounded, with a penalty on the input
gradient of the loss.

Gouk et al., "Regularisation of Neural Networks by Enforcing Lipschitz Continuity", Machine Learning 110, 2021,
arXiv:1804.04368, for the constraint, which under L2 is a spectral normalisation (Miyato et al., "Spectral Normalization
for Generative Adversarial Networks", ICLR 2018, arXiv:1802.05957) that shrinks and never enlarges; Finlay & Oberman,
"Scaleable input gradient regularization for adversarial robustness", arXiv:1905.11468, for the penalty. Differs from
the papers: both are combined, eps grows at first, and see `recipes/training/gains.py`. The bound of a whole network is
the product over its layers and far too loose for a certificate: see `io/models/lipschitz_layers.py` for layers that are
made for one.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.gradients import rise, sloped
from holdfast.core.types import Inputs, NonNegative, Positive
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.gains import Confined, gain_directions, order_of, trained_layers
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy, hits
from holdfast.recipes.training.loss_recipe import LossRecipe


@dataclass(frozen=True)
class LipschitzConstraint(LossRecipe):
    """Limits the Lipschitz constant of each layer to `gain`, and adds a penalty on the loss's input gradient."""

    gain: Positive = 10.0
    """largest Lipschitz constant (gain) of each layer; under L2 as estimated by power iteration"""
    norm: Literal["threat", "l2"] = "threat"
    """norm in which the gain is measured: that of the threat, or `l2`, which is spectral normalisation with another
    bound"""
    weight: NonNegative = 6.0
    """weight of the first-order increase of the loss in a step of length eps; with 0 only the constraint remains"""
    training: Training = field(default_factory=lambda: Training(weight_decay=5e-4))

    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the power iterations that estimate the gains of layers."""
        order = order_of(loop.threat.constraint) if self.norm == "threat" else "l2"
        x = loop.data.first(1).x

        def confined(learner: Learner) -> Confined:
            return Confined(trained_layers(learner.net, x), order, self.gain, learner.state)

        # a copy, because a recipe must not change the mode of the given model
        directions = gain_directions(deepcopy(loop.model).eval(), x, order, loop.rng.at("gain"))
        return replace(loop, state=directions, settle=confined, differentiated_twice=self.weight > 0)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus its
        weighted first-order increase in a step of length eps.
        """
        if not self.weight:
            return adversarial_cross_entropy(learner, batch, x_adv)
        x, logits, losses = sloped(learner.net, x_adv, batch.y)
        slope = rise(losses, x, learner.threat.constraint, learner.net.bounds)
        return learner.mean(losses, batch.y) + self.weight * learner.mean(slope, batch.y), hits(
            logits, batch.y
        )
