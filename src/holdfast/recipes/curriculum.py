"""Friendly adversarial training: the attack on each example stops soon after its success, and stops later as the
training proceeds.

Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", ICML 2020, arXiv:2002.11242
(friendly adversarial training, FAT): among the adversarial examples, train on those with the smallest loss. Training
that begins with weak attacks is from Cai et al., "Curriculum Adversarial Training", IJCAI 2018, arXiv:1805.04807, who
raise the number of steps. Differs from the papers: the number of steps after a success grows linearly over the training
instead of at chosen epochs; eps grows at first, the weights are averaged, and the learning rate follows one cycle.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Count, Fraction, Inputs, Logits, Positive, Rows, Steps
from holdfast.ops.ascent import gradient
from holdfast.ops.fit import Training, Turn
from holdfast.ops.learner import Learner, taught, trained
from holdfast.ops.losses import cross_entropy


@dataclass(frozen=True)
class CurriculumTraining:
    """Adversarial training on PGD attacks that stop for each example at its first error or a few steps later."""

    beyond: Count = 3
    """number of steps that an example takes after its first error, at the end of the training; it grows from 0"""
    steps: Steps = 10
    """largest number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of all steps, in multiples of eps"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    def __call__(
        self,
        model: Classifier,
        data: Batch,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        return trained(
            self.inner, self.loss, model, data, threat, self.training, rng=rng, after=after, linear=True
        )

    def inner(self, learner: Learner, batch: Batch, turn: Turn) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy that stops for each
        example some steps after its first misclassification.
        """
        constraint, model = learner.threat.constraint, learner.frozen
        x_adv = constraint.sample(batch, model.bounds, turn.rng.at("start"))
        going = torch.arange(len(batch), device=batch.x.device)
        more = torch.full_like(going, int((self.beyond + 1) * turn.done))
        for _ in range(self.steps):
            grad, logits = self._slope(learner, batch.at(x_adv), going)
            wrong = logits.argmax(1) != batch.y[going]
            goes = ~wrong | (more > 0)
            if not goes.any():
                break
            going, more = going[goes], (more - wrong.long())[goes]
            few, x = batch.take(going), x_adv[going]
            climb = constraint.steepest(grad[goes], x, model.bounds)
            moved = torch.add(x, climb, alpha=self.reach * constraint.eps / self.steps)
            x_adv = x_adv.index_copy(0, going, constraint.project(moved, few.x, model.bounds))
        return x_adv

    def _slope(self, learner: Learner, batch: Batch, going: Rows) -> tuple[Inputs, Logits]:
        """Gradients and logits of the rows `going`; the whole batch is used if batch norm uses its statistics."""
        if self.training.attack_statistics == "batch":
            grad, logits = gradient(learner.frozen, batch, cross_entropy)
            return grad[going], logits[going]
        return gradient(learner.frozen, batch.take(going), cross_entropy)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy at the attacked inputs of a batch, and the number of correct examples."""
        return taught(learner, batch, x_adv, smoothing=self.label_smoothing)
