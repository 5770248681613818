"""Virtual adversarial training: trains for predictions that are constant around every example, whether or not it has a
label.

Miyato et al., "Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning", IEEE
TPAMI 41(8), 2018, arXiv:1704.03976. The direction in which the prediction changes most is the first eigenvector of the
divergence's Hessian, computed by power iteration from a random direction. Differs from the paper: under norms other
than L2 each iteration uses that norm's steepest direction, which maximises the same quadratic form over the norm's own
ball; the finite difference is a fraction of eps and not 1e-6, which is lost in float32 rounding; labelled and
unlabelled examples are in the same batches; eps grows at first, the weights are averaged, and the learning rate follows
one cycle.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.types import Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.losses import kullback_leibler
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class VAT(LossRecipe):
    """Penalises the change of the prediction in the worst direction around each example, labelled or not."""

    weight: NonNegative = 1.0
    """weight of the divergence"""
    iterations: Steps = 1
    """number of power iterations; each costs a forward and a backward pass"""
    reach: Positive = 0.1
    """length of the finite difference, in multiples of eps"""
    training: Training = field(default_factory=Training)

    uses_unlabelled: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the share of the examples that have labels."""
        n, labelled = len(loop.data), int((loop.data.y != UNLABELLED).sum())
        loss = partial(self.labelled_loss, labelled=max(labelled, 1) / n)
        # several processes would each know the labels of their own share only
        return replace(loop, loss=loss, in_one_process=labelled < n)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs of a batch after a step of length eps in the direction that changes the prediction most
        (the virtual adversarial direction).
        """
        constraint, model, x = learner.threat.constraint, learner.frozen, batch.x
        with torch.no_grad():
            clean = model(x)
        nearby = constraint.resized(self.reach * constraint.eps).sample(
            batch, model.bounds, update.rng.at("start")
        )
        for _ in range(self.iterations):
            grad, _ = gradient(model, batch.at(nearby), lambda logits, _: kullback_leibler(logits, clean))
            direction = constraint.steepest(grad, x, model.bounds)
            nearby = model.bounds.clamp(torch.add(x, direction, alpha=self.reach * constraint.eps))
        return constraint.project(torch.add(x, direction, alpha=constraint.eps), x, model.bounds)

    def labelled_loss(
        self, learner: Learner, batch: Batch, x_adv: Inputs, *, labelled: float
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy of the
        labelled examples plus the weighted divergence of all examples.

        `labelled` is the fraction of the data with labels. A batch may contain no label, so the first mean is correct
        only on average over batches.
        """
        repeated = learner.repeated_forward()
        clean, logits = learner.net(batch.x), repeated(x_adv)
        clean_loss = F.cross_entropy(clean, batch.y, ignore_index=UNLABELLED, reduction="sum")
        divergence = kullback_leibler(logits, clean.detach()).mean()
        return clean_loss / (labelled * len(batch)) + self.weight * divergence, hits(logits, batch.y)
