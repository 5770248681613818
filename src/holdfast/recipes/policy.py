"""Adversarial training with a learned attack strategy: a small network chooses loss, steps, step size and start of the
attack on each example, and learns by REINFORCE.

Jia et al., "LAS-AT: Adversarial Training with Learnable Attack Strategy", CVPR 2022, arXiv:2203.06616: the policy is
rewarded if its attack succeeds, and if the network after an update with its examples is robust and accurate. Differs
from the paper: the policy sees the prediction for the clean input and not the image; it also chooses loss and start,
and not eps; rewards are probabilities of the label instead of losses; passes have a price; the update itself is the
look-ahead; a moving baseline is subtracted, and an entropy bonus added; eps grows at first, the weights are averaged,
and the learning rate follows one cycle. The description of the paper was implemented, not its code.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.training import TrainingPlan
from holdfast.core.types import Inputs, Logits, NonNegative, Steps
from holdfast.recipes.training.attack_policies import (
    REACH,
    Played,
    Policy,
    after_update,
    distribution,
    in_words,
    is_due,
    refuse_other_norms,
)
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.optimisation import Pacing
from holdfast.recipes.training.recipe import Finished, LossRecipe

_POLICY, _PASSES = "policy.", "passes"
_PLANS = 20  # plans of a training that ends after a number of passes
_USUAL = 8.0  # passes of an example in an update, in the first plan


@dataclass(frozen=True)
class PolicyTraining(LossRecipe):
    """Adversarial training in which a policy chooses the attack on each example, beside a random and a fixed one."""

    strategy: Literal["learned", "random", "fixed"] = "learned"
    """how attacks are chosen: by the learned policy, at random, or `fixed`, which is PGD with `steps` steps"""
    steps: Steps = 7
    """number of gradient steps of the fixed strategy"""
    price: NonNegative = 0.01
    """price of one gradient step, in probability of the label"""
    entropy: NonNegative = 0.01
    """weight of the entropy of the strategies, which is added to the mean reward"""
    passes: NonNegative = 0.0
    """number of forward passes for each training example after which the training ends, in place of epochs, so that
    strategies are compared at equal passes; 0 for no limit"""
    training: Training = field(default_factory=Training)

    keeps_state: ClassVar[bool] = True

    in_one_process: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    @property
    def most_passes(self) -> float:
        """The setting `passes`."""
        return self.passes

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with a policy that attacks its batches."""
        refuse_other_norms("policy", loop.threat)
        device, how = loop.data.ids.device, self.training
        passes = torch.zeros((), dtype=torch.float64, device=device)
        policy = Policy.new(loop.rng.at("policy"), device)
        if self.passes:
            if how.pacing is not None:
                raise UsageError(
                    f"passes is {self.passes:g}, and a budget of time is given; expected one of both"
                )
            how = replace(how, pacing=ending_after(self.passes * len(loop.data), passes, _USUAL * how.batch))
        play = _Play(self, policy, passes)
        return replace(
            loop,
            how=how,
            inner=play.inner,
            loss=play.loss,
            state={**policy.state(_POLICY), _PASSES: passes},
            settle=(lambda learner: partial(play.settle, learner)) if self.strategy == "learned" else None,
        )

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the passes of the training and the strategies that were chosen."""
        passes = float(finished.state[_PASSES]) / len(finished.training)
        entry: dict[str, Any] = {"strategy": self.strategy, "passes": passes}
        made = f"{passes:.1f} forward passes for each training example up to the checkpoint"
        if self.strategy == "fixed":
            return entry, f"the fixed strategy made {made}"
        policy = Policy.of(finished.state, _POLICY)
        entry |= distribution(policy)
        return entry, f"the {self.strategy} strategy made {made}; its choices at last: {in_words(policy)}"


class _Play:
    """Attacks of a policy in one training, and what it learns from the update after an attack."""

    def __init__(self, recipe: PolicyTraining, policy: Policy, passes: Tensor) -> None:
        self._recipe, self._policy, self._passes = recipe, policy, passes
        self._last: tuple[Played, Update] | None = None
        self._logits: Logits | None = None

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch."""
        recipe = self._recipe
        if recipe.strategy == "fixed":
            self._passes += recipe.steps * len(batch)
            return learner.worst(batch, update.rng, steps=recipe.steps, reach=REACH)
        whole = recipe.training.attack_statistics == "batch"
        x_adv, played = self._policy.play(
            learner.frozen, batch, learner.threat.constraint, update.rng, done=update.done, whole=whole
        )
        self._passes += played.forwards
        self._last = played, update
        return x_adv

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy at the attacked inputs of a batch, and the number of correct examples."""
        logits = learner.net(x_adv)
        self._passes += len(batch)
        self._logits = logits.detach()
        return learner.mean_cross_entropy(logits, batch.y), hits(logits, batch.y)

    def settle(self, learner: Learner) -> None:
        """Update the policy after every few updates of the network."""
        assert self._last is not None
        played, update = self._last
        if is_due(update):
            ahead, forwards = after_update(learner.with_current_eps, played.batch, update.rng.at("ahead"))
            self._passes += forwards
            assert self._logits is not None
            rewards = played.gain(self._logits, self._recipe.price) + ahead
            self._policy.learn(played, rewards, self._recipe.entropy)


def ending_after(total: float, made: Tensor, first: float) -> Pacing:
    """Return a function that plans a training of `total` forward passes of single examples. `made` is their number so
    far, which the training counts, and `first` the expected number in the first update.
    """

    def plan(done: int, position: int, per_epoch: int, last: TrainingPlan | None) -> TrainingPlan:
        left = total - float(made)
        n = max(int(left / (float(made) / done if done else first)), 0 if done else 1)
        share = 0.0 if last is None else last.done(done)
        return TrainingPlan(done, share, done + n, done + max(min(n // _PLANS, done), 1))

    return plan
