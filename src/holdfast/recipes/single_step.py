"""Adversarial training with a single gradient step: FGSM, FGSM-RS and N-FGSM, which differ in start and clipping.

Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv:1412.6572: from the input itself.
Wong et al., "Fast is Better than Free: Revisiting Adversarial Training", ICLR 2020, arXiv:2001.03994 (FGSM-RS): from a
random point of the ball, a step of 1.25 eps. De Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step
Adversarial Training", NeurIPS 2022, arXiv:2202.01181 (N-FGSM): from noise of twice eps, without a projection onto the
ball at the end. Differs from the papers: any norm, eps grows at first, the weights are averaged, and the learning rate
follows one cycle.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.follow_up import N_HELD_OUT, RAISED, OverfittingGuard
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class SingleStep(LossRecipe):
    """Adversarial training with a single gradient step on each batch, which needs two passes for each update."""

    noise: NonNegative = 2.0
    """radius of the ball from which the start is sampled, in multiples of eps"""
    step: Positive = 1.0
    """step size, in multiples of eps"""
    clip: bool = False
    """whether the result is projected onto the ball"""
    guard: bool = True
    """whether a guard checks for catastrophic overfitting on 128 examples that are not used for training (only if there
    are more than twice as many). If an attack of ten steps breaks far more of them than one step, the last updates are
    undone and each attack gets a further step; this happens at most three times"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with a guard on examples that are not used for training."""
        data = loop.data
        first = loop.rng.at("guarded").bits(data.ids).argsort()
        n = N_HELD_OUT if self.guard and len(data) > 2 * N_HELD_OUT else 0
        return replace(
            loop,
            data=data.subset(first[n:].sort().values),
            state={RAISED: torch.zeros((), dtype=torch.int64, device=data.ids.device)},
            guard=partial(OverfittingGuard, held_out=data.take(first[:n])) if n else None,
        )

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch after one gradient step. After signs of catastrophic overfitting,
        several shorter steps with the same total length are used.
        """
        constraint, bounds = learner.threat.constraint, learner.frozen.bounds
        assert isinstance(constraint, Norm)
        x, steps = batch.x, 1 + int(learner.state[RAISED])
        if self.noise:
            x = constraint.resized(self.noise * constraint.eps).sample(batch, bounds, update.rng.at("start"))
        for _ in range(steps):
            grad, _ = gradient(learner.frozen, batch.at(x), cross_entropy)
            climb = constraint.steepest(grad, x, bounds)
            stepped = torch.add(x, climb, alpha=self.step * constraint.eps / steps)
            x = constraint.project(stepped, batch.x, bounds) if self.clip else bounds.clamp(stepped)
        return x

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy at the attacked inputs of a batch, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, smoothing=self.label_smoothing)
