"""Lipschitz constraint: training in which the Lipschitz constant of each layer is bounded, with a penalty on the input
gradient of the loss.

Gouk et al., "Regularisation of Neural Networks by Enforcing Lipschitz Continuity", Machine Learning 110, 2021,
arXiv:1804.04368, for the constraint, which under L2 is a spectral normalisation (Miyato et al., "Spectral Normalization
for Generative Adversarial Networks", ICLR 2018, arXiv:1802.05957) that shrinks and never enlarges; Finlay & Oberman,
"Scaleable input gradient regularization for adversarial robustness", arXiv:1905.11468, for the penalty. Differs from
the papers: both are combined, eps grows at first, and see `ops/gains.py`. The bound of a whole network is the product
over its layers and far too loose for a certificate: see `ops/lipschitz.py` for layers that are made for one.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, NonNegative, Positive
from holdfast.ops.fit import Training
from holdfast.ops.gains import Confined, gain_directions, order_of, trained_layers
from holdfast.ops.gradients import rise, sloped
from holdfast.ops.learner import Learner, as_it_is, hits, taught, trained


@dataclass(frozen=True)
class LipschitzConstraint:
    """Bounds the gain of every layer by `gain`, and penalises the input gradient of the loss by `weight`."""

    gain: Positive = 10.0
    """largest Lipschitz constant (gain) of each layer; under L2 as estimated by power iteration"""
    norm: Literal["threat", "l2"] = "threat"
    """norm in which the gain is measured: that of the threat, or `l2`, which is spectral normalisation with another
    bound"""
    weight: NonNegative = 6.0
    """weight of the first-order increase of the loss in a step of length eps; with 0 only the constraint remains"""
    training: Training = field(default_factory=lambda: Training(weight_decay=5e-4))

    def __call__(
        self,
        model: Classifier,
        data: Batch,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        order = order_of(threat.constraint) if self.norm == "threat" else "l2"

        def confined(learner: Learner) -> Confined:
            return Confined(trained_layers(learner.net, data.x), order, self.gain, learner.state)

        return trained(
            as_it_is,
            self.loss,
            model,
            data,
            threat,
            self.training,
            rng=rng,
            after=after,
            state=gain_directions(deepcopy(model).eval(), data.x, order, rng.at("gain")),
            settle=confined,
            slope=self.weight > 0,
        )

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus its
        weighted first-order increase in a step of length eps.
        """
        if not self.weight:
            return taught(learner, batch, x_adv)
        x, logits, each = sloped(learner.net, x_adv, batch.y)
        slope = rise(each, x, learner.threat.constraint, learner.net.bounds)
        return each.mean() + self.weight * slope.mean(), hits(logits, batch.y)
