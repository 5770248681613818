"""Immunising, which trains a parameter set against the attacks on the sets before it, and distilled examples."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from holdfast.attacks.parts.losses import cross_entropy, expect_eps
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Logits, NonNegative, PerExample, Positive, Steps
from holdfast.recipes.training.learner import climbed
from holdfast.recipes.training.losses import Immunity
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.rotation.collecting import further, last_of, rows_of

_AT_ONCE = 1_000  # examples in one call of the attack, a limit of memory


class Making(Protocol):
    """Protocol of a method that computes, on stolen parameter sets, the examples for immunising: `Crafting` or
    `Distilled`.
    """

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """Return changed inputs of `data` with their original labels, computed on the models `exposed`, which have
        stolen sets.
        """


def ball(threat: ThreatModel, overshoot: float, making: Making) -> Constraint:
    """Return the constraint of a threat model with its radius eps multiplied by `overshoot`, inside which the examples
    for immunising are computed.

    Raises `UsageError`, with the name of `making`, if the constraint has no eps.
    """
    constraint = expect_eps(threat.constraint, making)
    return constraint.resized(overshoot * constraint.eps)


def shared_out(
    exposed: Sequence[Classifier],
    data: Batch,
    n: int,
    compute: Callable[[Classifier, Batch], Batch],
    rng: Draws,
) -> Batch:
    """Sample at most `n` examples, divide them among models with stolen sets, and return the results of a function of
    each model and its examples in one batch.

    Each model is copied and in eval mode. Returns the results of `compute` in one batch. Raises `UsageError` if
    `exposed` is empty.
    """
    if not exposed:
        raise UsageError(
            "no parameter set was given to immunise against; give the stolen sets, or the serving set"
        )
    examples = rows_of(data, n, rng)
    results = [
        compute(deepcopy(model).eval(), part)  # a copy, since the mode changes
        for place, model in enumerate(exposed[: len(examples)])
        for part in examples.take(torch.arange(place, len(examples), len(exposed))).split(_AT_ONCE)
    ]
    return Batch(*(torch.cat([getattr(batch, name) for batch in results]) for name in ("x", "y", "ids")))


@dataclass(frozen=True)
class Crafting:
    """Settings of the transfer examples for immunising, which momentum PGD computes from training inputs on stolen
    sets.
    """

    examples: Steps = 6_000
    """largest number of training inputs; each is assigned to one of the stolen sets"""
    overshoot: Positive = 1.25
    """radius of the ball, in multiples of eps"""
    steps: Steps = 6
    """number of gradient steps; they do not stop when an example is adversarial"""
    reach: Positive = 2.5
    """path length, in multiples of that radius"""
    momentum: NonNegative = 0.9
    """decay factor of the momentum in each step"""

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """Return the changed inputs (n, *features) with their original labels.

        Cost: `steps` forward and backward passes for each example.
        """
        compute = partial(self._computed, constraint=ball(threat, self.overshoot, self), rng=rng.at("start"))
        return shared_out(exposed, data, self.examples, compute, rng.at("inputs"))

    def _computed(self, model: Classifier, batch: Batch, *, constraint: Constraint, rng: Draws) -> Batch:
        x_adv = climbed(
            model, batch, constraint, rng, cross_entropy,
            steps=self.steps, reach=self.reach, momentum=self.momentum,
        )  # fmt: skip
        return batch.at(x_adv)


@dataclass(frozen=True)
class Immunise:
    """Settings of immunising, in which a parameter set is trained for a part of an epoch on a recipe's loss and on
    transfer examples from stolen sets.
    """

    share: Fraction = 0.5
    """fraction of the training data that is used, for one epoch"""
    weight: Positive = 0.5
    """weight of the loss of the computed examples, relative to the loss of the recipe"""
    batch: Steps = 64
    """number of computed examples in each update"""
    lr: Positive = 1e-3
    """largest learning rate of a one-cycle schedule"""
    crafting: Making = field(default_factory=Crafting)

    def updates(self, examples: int, batch: int) -> int:
        """Return the number of updates of the optimiser that immunising takes with `examples` training examples in
        batches of size `batch`.
        """
        return max(math.ceil(max(round(self.share * examples), 1) / batch), 1)

    def __call__(
        self,
        model: Classifier,
        exposed: Sequence[Classifier],
        recipe: Recipe,
        data: Batch,
        threat: ThreatModel,
        *,
        rng: Draws,
    ) -> Classifier:
        """Return a new model, trained from the parameters of `model`, which is not changed.

        `exposed` are models with the stolen sets. `recipe` is any recipe; its epochs, optimiser, learning rate,
        warm-up and averaging are overridden. `data` is training data and must contain no example of the evaluation.
        """
        examples = self.crafting(exposed, data, threat, rng=rng.at("crafting"))
        immunity = Immunity(examples, self.weight, self.batch)
        how = replace(further(recipe.training, 1, self.lr, "cycle"), immunity=immunity)
        training = rows_of(data, max(round(self.share * len(data)), 1), rng.at("data"))
        learner = deepcopy(model).requires_grad_()
        return last_of(trained_as(recipe, how), learner, training, threat, rng.at("training"))


def chain(
    model: Classifier,
    rotations: int,
    immunise: Immunise,
    recipe: Recipe,
    data: Batch,
    threat: ThreatModel,
    *,
    remembered: int = 4,
    rng: Draws,
) -> list[Classifier]:
    """Immunise a model several times in a row, each time against its last `remembered` predecessors, and return all
    resulting models.

    Returns the model and its successors, `rotations + 1` models. For models that were hardened by single-step training,
    each rotation increases robustness further, while a longer single-step training does not; PGD training with as many
    passes achieves the same. For other models the result is no better than that of ordinary adversarial training of the
    same length.
    """
    line = [model]
    for step in range(rotations):
        line.append(
            immunise(line[-1], line[-remembered:], recipe, data, threat, rng=rng.at("rotation", step))
        )
    return line


class Features:
    """Record of the features of a network, that is of the input of its last layer in the latest forward pass."""

    def __init__(self) -> None:
        self._rows = 0
        self._features: Tensor | None = None

    def or_logits(self, logits: Logits) -> Tensor:
        """Return the recorded features of the latest forward pass, with at least as many rows as the batch, or `logits`
        if none were recorded.
        """
        return logits if self._features is None else self._features

    def _begin(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._rows, self._features = len(inputs[0]), None

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # a layer that runs for single examples or for a part of the batch is left out
        if inputs and inputs[0].dim() > 1 and len(inputs[0]) >= self._rows:
            self._features = inputs[0]


@contextmanager
def watched(model: nn.Module) -> Iterator[Features]:
    """Context manager that records the features of a network: the input of the last linear layer or convolution that is
    called for a whole batch.

    Layers are recognised by their type; none is found in a network that was imported as one graph or program, or that
    stores its weights elsewhere. All hooks are removed on exit, also after an error.
    """
    features = Features()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
    hooks = [model.register_forward_pre_hook(features._begin, prepend=True)]
    hooks += [layer.register_forward_pre_hook(features._note) for layer in layers]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Distilled:
    """Settings of distilled examples for immunising. They look like one training input, but a stolen set computes for
    them the features of another training input.
    """

    examples: Steps = 6_000
    """largest number of training inputs; each is assigned to one of the stolen sets"""
    overshoot: Positive = 1.25
    """radius of the ball, in multiples of eps"""
    steps: Steps = 6
    """number of gradient steps towards the features of the other input"""
    reach: Positive = 2.0
    """path length, in multiples of that radius"""

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """Return the changed inputs (n, *features) with their original labels.

        The other input, whose features are the goal, is a random example of `data`. The features are the input of the
        last linear layer or convolution, of any shape; for a network in which none is found, the logits. Cost for each
        example: `steps` forward and backward passes, and one forward pass of the other input. Raises `UsageError` if no
        stolen set is given, or if the threat model has no eps.
        """
        compute = partial(self._computed, data=data, constraint=ball(threat, self.overshoot, self), rng=rng)
        return shared_out(exposed, data, self.examples, compute, rng.at("inputs"))

    def _computed(
        self, model: Classifier, batch: Batch, *, data: Batch, constraint: Constraint, rng: Draws
    ) -> Batch:
        goals = data.take(rng.at("others").integers(batch.ids, len(data)))
        with watched(model) as features:
            with torch.no_grad():
                goal_features = features.or_logits(model(goals.x))

            def nearness(logits: Logits, _: Batch) -> PerExample:
                change = features.or_logits(logits) - goal_features
                return -change.square().flatten(1).sum(1)

            start = rng.at("start")
            x_adv = climbed(model, batch, constraint, start, nearness, steps=self.steps, reach=self.reach)
        return batch.at(x_adv)
