"""Adversarial training whose augmentation is chosen by a learned policy, a categorical distribution that is rewarded by
the robust accuracy on reserved examples.

Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", Machine Learning
8, 1992, for REINFORCE with a baseline; Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", CVPR
2019, arXiv:1805.09501, for augmentation as a policy. Differs from AutoAugment: the policy is learned during the one
training of the network, as a bandit over single augmentations, and its reward is robust accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.augment import cut_and_mixed, drawn_moves, refuse_augmentation
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.recipe import Finished, LossRecipe, reserved, robust_share

AUGMENTATIONS: Final = (
    *((reach, flips, 0.0) for flips in (False, True) for reach in (0, 1, 2, 4)),
    *((0, False, chance) for chance in (0.5, 1.0)),
)
"""choices of the policy: largest shift in pixels, whether half of the images are flipped, and the share of batches with
CutMix"""
_KEPT = 0.8  # decay of the baseline
_LEAST_SPREAD = 0.01  # smallest standard deviation of rewards by which they are divided
_PREFERENCES, _CURRENT, _BASELINE, _UPDATES = "preferences", "current", "baseline", "updates"


@dataclass(frozen=True)
class AugmentPolicy(LossRecipe):
    """PGD adversarial training that draws an augmentation for every few updates from a distribution, and moves the
    distribution towards augmentations after which reserved examples are classified more robustly.
    """

    period: Steps = 20
    """number of updates with one augmentation, after which its reward is measured"""
    rate: Positive = 0.1
    """learning rate of the policy"""
    entropy: NonNegative = 0.01
    """weight of the entropy of the policy, which keeps it from choosing one augmentation only"""
    steps: Steps = 4
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.0
    """path length of the inner attack, in multiples of eps"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    keeps_state: ClassVar[bool] = True

    in_one_process: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with a policy that chooses the augmentation by reserved examples."""
        example = loop.data.first(1).x
        refuse_augmentation(example, "shift", 0.0)
        if self.training.augment != "none" or self.training.cutmix:
            raise UsageError(
                "augment-policy learns which augmentation is used, and recipe.training sets one; leave "
                "recipe.training.augment and recipe.training.cutmix out",
                Remedy("recipe", "pgd"),
            )
        rest, held_out = reserved(loop.data, loop.rng)
        zeros = example.new_zeros(1, len(AUGMENTATIONS), dtype=torch.float64)
        # with a first dimension of 1, so that none is taken for a tensor with a row for each example
        state = {
            _PREFERENCES: zeros,
            _CURRENT: loop.data.y.new_full((1,), -1),
            _BASELINE: zeros[:, :2].clone(),
            _UPDATES: torch.zeros_like(zeros),
        }
        mixed: list[tuple[Batch, float]] = []

        def inner(learner: Learner, batch: Batch, update: Update) -> Inputs:
            if not learner.state[_UPDATES].sum() % self.period:
                self._choose(learner, held_out, update.rng.at("choice"))
            k = int(learner.state[_CURRENT])
            learner.state[_UPDATES][0, k] += 1
            reach, flips, chance = AUGMENTATIONS[k]
            if reach or flips:
                batch = batch.at(drawn_moves(batch, reach, update.rng, flips=flips).of(batch.x))
            batch, mixed_in, own_share = cut_and_mixed(batch, chance, update.rng)
            mixed[:] = [(batch, own_share), (mixed_in, 1 - own_share)]
            return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach)

        def loss(learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
            logits, own = learner.net(x_adv), mixed[0][0]
            values = [
                share * learner.mean_cross_entropy(logits, part.y, smoothing=self.label_smoothing)
                for part, share in mixed
            ]
            return values[0] + values[1], hits(logits, own.y)

        return replace(loop, data=rest, inner=inner, loss=loss, state=state)

    def _choose(self, learner: Learner, held_out: Batch, rng: Draws) -> None:
        """Learn from the robust accuracy after the updates with the current augmentation, and draw the next one."""
        if learner.state[_CURRENT] >= 0:
            self._learn(learner.state, robust_share(learner, held_out))
        probabilities = _policy(learner.state)
        u = rng.uniform(held_out.ids[:1] * 0, dtype=torch.float64).to(probabilities)
        learner.state[_CURRENT].fill_((probabilities.cumsum(0) > u).to(torch.int8).argmax())

    def _learn(self, state: dict[str, Tensor], reward: float) -> None:
        """Update preferences and baseline after the robust accuracy `reward` of the current augmentation."""
        probabilities, (mean, square) = _policy(state), state[_BASELINE][0]
        is_first = not square
        spread = max(float((square - mean.square()).clamp(min=0).sqrt()), _LEAST_SPREAD)
        advantage = 0.0 if is_first else (reward - float(mean)) / spread
        logs = probabilities.log()
        gradient = -probabilities * (logs - (probabilities * logs).sum()) * self.entropy
        gradient -= advantage * probabilities
        gradient[int(state[_CURRENT])] += advantage
        state[_PREFERENCES][0] += self.rate * gradient
        moments = torch.tensor([reward, reward**2]).to(mean)
        state[_BASELINE][0] = moments if is_first else torch.lerp(moments, state[_BASELINE][0], _KEPT)

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the probabilities of the policy at the end of the training, and the updates with each augmentation."""
        probabilities, updates = _policy(finished.state), finished.state[_UPDATES][0]
        entry = {
            _name(k): {"probability": float(probabilities[k]), "updates": int(updates[k])}
            for k in range(len(AUGMENTATIONS))
        }
        best = int(probabilities.argmax())
        return {"policy": entry}, (
            f"the policy augments by {_name(best)} with a probability of {float(probabilities[best]):.2f}, "
            f"of {len(AUGMENTATIONS)} augmentations with {1 / len(AUGMENTATIONS):.2f} each at the start"
        )


def _policy(state: Mapping[str, Tensor]) -> Tensor:
    return state[_PREFERENCES][0].softmax(0)


def _name(k: int) -> str:
    reach, flips, chance = AUGMENTATIONS[k]
    parts = [f"shift {reach}"] * bool(reach) + ["flip"] * flips + [f"cutmix {chance:g}"] * bool(chance)
    return " and ".join(parts) or "none"
