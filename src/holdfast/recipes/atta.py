"""ATTA: adversarial training in which the attack on an example starts from its result of the previous epoch.

Zheng et al., "Efficient Adversarial Training With Transferable Adversarial Examples", CVPR 2020, arXiv:1912.11969:
adversarial examples of the network an epoch ago nearly break it now, so that two steps in each epoch have the effect of
ten. If images are augmented, the stored changes are shifted and flipped with them, and back. Differs from the paper: a
loss on clean inputs is added with a weight, eps grows at first, the weights are averaged, the learning rate goes in one
cycle, and the stored examples are never reset, because attacks of two steps from noise are so weak that the network
loses robustness.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import IN_MEMORY_BYTES, Batch, Lookup
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.types import Count, Fraction, Inputs, NonNegative, Positive, Rows, Steps
from holdfast.recipes.training.augment import moves
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe

_BYTES = 2  # of a stored value


@dataclass(frozen=True)
class ATTA(LossRecipe):
    """Trains on adversarial examples that are stored from epoch to epoch and improved by a few steps each time."""

    steps: Steps = 2
    """number of gradient steps on each stored example in each epoch"""
    step: Positive = 0.33
    """step size, in multiples of eps"""
    refresh: Count = 0
    """number of epochs after which the stored examples are reset to noise; 0 for never"""
    clean: NonNegative = 0.25
    """weight of the loss on clean inputs, relative to that on attacked ones"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    in_one_process: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with a stored change of each example. Raises `UsageError` for settings that change an
        example in another way.
        """
        data = loop.data
        if self.training.cutmix:
            raise UsageError(
                f"atta stores the perturbation of each image, and cutmix={self.training.cutmix:g} would replace a part "
                "of the image by another one; leave it out",
                Remedy("recipe", "pgd"),
            )
        if not isinstance(self.training.augment, str):
            raise UsageError(
                "atta shifts the stored perturbation of each image together with the image, and augment is a function, "
                "whose changes are not known; use a named augmentation",
                Remedy("recipe", "pgd"),
            )
        shape = (len(data), *data.example_shape)
        size = _BYTES * math.prod(shape)
        if not isinstance(data, Batch) and size > IN_MEMORY_BYTES:
            raise UsageError(
                f"atta stores a perturbation of each of {len(data):,} examples, {size / 2**30:.1f} GiB in all, and "
                "the inputs of these examples are too large to be stored in memory",
                Remedy("recipe", "pgd"),
            )
        # each change in multiples of the full eps, with a relative error of at most a thousandth
        state = {"kept": torch.zeros(shape, dtype=torch.float16, device=data.ids.device)}
        lookup, unit = Lookup(data.ids), loop.threat.constraint.eps or 1.0

        def inner(learner: Learner, batch: Batch, update: Update) -> Inputs:
            return self.attacked(learner, batch, update, lookup.rows(batch.ids), unit)

        return replace(loop, inner=inner, state=state)

    def attacked(self, learner: Learner, batch: Batch, update: Update, rows: Rows, unit: float) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent that starts from the stored changes of the
        previous epoch, and store the new changes.

        `rows` are the positions of the examples in the store, and stored changes are in multiples of `unit`.
        """
        constraint, bounds, stored = learner.threat.constraint, learner.frozen.bounds, learner.state["kept"]
        assert isinstance(constraint, (Linf, L2, L1))
        augmentation, change = (
            moves(batch, self.training.augment, update.rng),
            stored[rows].to(batch.x) * unit,
        )
        reset = update.epoch % self.refresh == 0 if self.refresh else update.epoch == 0
        if reset:
            start = constraint.sample(batch, bounds, update.rng.at("start"))
        else:
            start_change = change if augmentation is None else augmentation.of(change)
            start = constraint.project(batch.x + start_change, batch.x, bounds)
        x_adv, _ = ascend(
            learner.frozen,
            batch,
            start,
            cross_entropy,
            constraint,
            steps=self.steps,
            step_size=self.step * constraint.eps,
            keep="last",
        )
        new_change = x_adv - batch.x
        stored[rows] = (
            (new_change if augmentation is None else augmentation.back(new_change, change)) / unit
        ).to(stored)
        return x_adv

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy at attacked
        inputs plus the weighted cross-entropy at clean inputs.
        """
        return adversarial_cross_entropy(
            learner, batch, x_adv, clean=self.clean, smoothing=self.label_smoothing
        )
