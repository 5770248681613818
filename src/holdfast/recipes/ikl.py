"""IKL (improved Kullback-Leibler loss): TRADES with its divergence decomposed into two terms, the first of which also
trains the clean prediction.

Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024, arXiv:2305.13948: the divergence has the
gradients of a weighted squared error of the gaps between logits and of a cross-entropy with soft labels. Differs from
the paper: the mean predictions that weight the gaps are running means instead of those of the epoch before, the inner
attack starts from a random point of the ball instead of from small Gaussian noise, eps grows at first, the weights are
averaged, and the learning rate follows one cycle.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Inputs, Labels, Logits, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.losses import kullback_leibler, weighted_gaps
from holdfast.recipes.training.optimisation import average
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class IKL(LossRecipe):
    """Replaces the divergence of TRADES by a squared error of logit gaps and a cross-entropy with soft labels."""

    alpha: NonNegative = 4.0
    """weight of the cross-entropy whose soft label is the clean prediction"""
    beta: NonNegative = 20.0
    """weight of the gaps between logits"""
    temperature: Positive = 4.0
    """divisor of the logits in the predictions whose class means weight the gaps"""
    keep: Annotated[float, Gt(0), Lt(1)] = 0.99
    """weight of the earlier mean prediction of a class in its running mean, for each update"""
    steps: Steps = 10
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    training: Training = field(default_factory=Training)

    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with uniform mean predictions of the classes."""
        x = loop.data.first(1).x
        with torch.no_grad():
            classes = deepcopy(loop.model).eval()(x).shape[1]
        means = torch.full((classes, classes), 1 / classes, device=x.device, dtype=x.dtype)
        return replace(loop, state={"means": means, "seen": means.clone()}, settle=_settled)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the divergence between attacked and clean
        prediction.
        """
        return learner.most_divergent(batch, update.rng, kullback_leibler, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, which is the weighted sum of the three terms of the recipe, and the number
        of correct examples.
        """
        clean, logits = learner.net(batch.x), learner.net(x_adv)
        target = clean.detach()
        means = learner.state["means"]
        learner.state["seen"].copy_(self._updated(means, target, batch.y))
        gaps = learner.mean(weighted_gaps(logits, clean, means[batch.y]), batch.y)
        soft = learner.mean_cross_entropy(logits, batch.y, towards=target.softmax(1))
        clean_loss = learner.mean_cross_entropy(clean, batch.y)
        return clean_loss + self.beta * gaps + self.alpha * soft, hits(logits, batch.y)

    def _updated(self, means: Tensor, clean: Logits, y: Labels) -> Tensor:
        """The running mean prediction of each class, updated with the predictions of a batch."""
        member = F.one_hot(y, len(means)).to(means)
        sums, count = member.t() @ (clean / self.temperature).softmax(1).to(means), member.sum(0)[:, None]
        average((sums, count))  # over the processes
        batch_means = sums / torch.where(count > 0, count, 1)
        return torch.where(count > 0, torch.lerp(batch_means, means, self.keep), means)


def _settled(learner: Learner) -> Callable[[], None]:
    """A function that updates the means once an update, independently of the number of evaluations of the loss."""

    def follow() -> None:
        learner.state["means"].copy_(learner.state["seen"])

    return follow
