"""Immunising: training a fresh parameter set not to break under what an attacker can make on sets that leaked.

Examples that transfer are made on the exposed sets by momentum PGD (Dong et al., "Boosting Adversarial Attacks with
Momentum", CVPR 2018, arXiv:1710.06081), from training inputs alone, and their loss is added to that of half an epoch of
an ordinary recipe (Tramèr et al., "Ensemble Adversarial Training", ICLR 2018, arXiv:1705.07204). Differs from the
latter: it is aimed at what leaked, by networks of the same architecture, and made once.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, NonNegative, Positive, Steps
from holdfast.ops.ascent import ascend
from holdfast.ops.immunity import Immunity
from holdfast.ops.losses import cross_entropy
from holdfast.ops.norms import expect_eps
from holdfast.ops.recipe import Recipe, trained_as
from holdfast.rotation.collecting import last_of, rows_of

_AT_ONCE = 1_000


class Making(Protocol):
    """How examples are made on exposed sets: `Crafting`, or `Distilled`."""

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """Changed inputs of `data` with the labels they had."""


def ball(threat: ThreatModel, overshoot: float, making: Making) -> Constraint:
    """The constraint of a threat that has an eps, `overshoot` times as large; `UsageError` where it has none."""
    whole = expect_eps(threat.constraint, making)
    return whole.resized(overshoot * whole.eps)


def shared_out(
    exposed: Sequence[Classifier],
    data: Batch,
    n: int,
    made: Callable[[Classifier, Batch], Batch],
    rng: Draws,
) -> Batch:
    """What `made` makes of at most `n` of the examples, each on a copy of one of the exposed models, in eval mode."""
    if not exposed:
        raise UsageError(
            "no exposed parameter set was given to immunise against; name what leaked, or what serves now"
        )
    some = rows_of(data, n, rng)
    found = [
        made(deepcopy(model).eval(), few)
        for place, model in enumerate(exposed[: len(some)])
        for few in some.take(torch.arange(place, len(some), len(exposed))).split(_AT_ONCE)
    ]
    return Batch(*(torch.cat([getattr(batch, name) for batch in found]) for name in ("x", "y", "ids")))


@dataclass(frozen=True)
class Crafting:
    """How examples that transfer are made of training inputs."""

    examples: Steps = 6_000
    """training inputs, at most; each goes to one of the exposed sets"""
    overshoot: Positive = 1.25
    """size of the ball, in multiples of eps"""
    steps: Steps = 6
    """gradient steps, none of which stops at success"""
    reach: Positive = 2.5
    """path length, in multiples of that size"""
    momentum: NonNegative = 0.9
    """share of the direction that the next step keeps"""

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """The changed inputs with the labels they had. Cost: `steps` forwards and backwards of each example."""
        made = partial(self._made, constraint=ball(threat, self.overshoot, self), rng=rng.at("start"))
        return shared_out(exposed, data, self.examples, made, rng.at("inputs"))

    def _made(self, model: Classifier, few: Batch, *, constraint: Constraint, rng: Draws) -> Batch:
        x_adv, _ = ascend(
            model,
            few,
            constraint.sample(few, model.bounds, rng),
            cross_entropy,
            constraint,
            steps=self.steps,
            step_size=self.reach * constraint.eps / self.steps,
            momentum=self.momentum,
            keep="last",
        )
        return few.at(x_adv)


@dataclass(frozen=True)
class Immunise:
    """Train a set for part of an epoch on what a recipe trains on, and on examples made on exposed sets."""

    share: Fraction = 0.5
    """of the training data, of which there is one epoch"""
    weight: Positive = 0.5
    """of the loss of those examples beside that of the recipe"""
    batch: Steps = 64
    """of those examples in each update"""
    lr: Positive = 1e-3
    """largest learning rate; it goes in one cycle"""
    crafting: Making = field(default_factory=Crafting)

    def updates(self, examples: int, batch: int) -> int:
        """How many updates it makes of so many training examples, `batch` of which a recipe takes at once."""
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
        """A new model that was trained on from `model`, whose parameters stay as they are.

        `exposed` are models with the sets that an attacker may hold, `recipe` any recipe; its own number of epochs,
        optimiser, rate, warm-up and averaging give way. `data` is training data, and nothing that judges.
        """
        examples = self.crafting(exposed, data, threat, rng=rng.at("crafting"))
        how = replace(
            recipe.training,
            epochs=1,
            optimizer="adamw",
            lr=self.lr,
            schedule="cycle",
            warmup=0.0,
            averaging="none",
            weight_decay=0.0,
            immunity=Immunity(examples, self.weight, self.batch),
        )
        some = rows_of(data, max(round(self.share * len(data)), 1), rng.at("data"))
        learner = deepcopy(model).requires_grad_()
        return last_of(trained_as(recipe, how), learner, some, threat, rng.at("training"))


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
    """The model and what `rotations` steps make of it, each immunised against the last `remembered` before it.

    On models that were hardened by single steps, each rotation hardens them further, where more of the same does not;
    PGD training of as many passes does as much. On others it is adversarial training in instalments, and no better.
    """
    line = [model]
    for step in range(rotations):
        line.append(
            immunise(line[-1], line[-remembered:], recipe, data, threat, rng=rng.at("rotation", step))
        )
    return line
