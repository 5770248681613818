"""Adversarial training under several norms, on the worst attack of each example, on the attacks of all norms, or on one
attack that combines all norms.

Tramèr & Boneh, "Adversarial Training and Robustness for Multiple Perturbations", NeurIPS 2019, arXiv:1904.13000 (`max`
and `average`). Maini et al., "Adversarial Robustness Against the Union of Multiple Perturbation Models", ICML 2020,
arXiv:1909.04068 (`msd`, multi steepest descent): each step is tried under every norm, and the one with the largest loss
is taken. Differs from the papers: every attack of `max` and `average` has the same number of steps, eps grows at first,
the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, PerExample, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.recipe import LossRecipe

_OTHERS = Remedy("recipe.others", Placeholder("l2:1.5,l1:10", "(L2(1.5), L1(10.0))"))


@dataclass(frozen=True)
class MultiNormTraining(LossRecipe):
    """Adversarial training under several norms: that of the threat model and further ones."""

    others: tuple[Constraint, ...] = ()
    """further constraints, each written as in a threat: l2:1.5,l1:10"""
    method: Literal["max", "average", "msd"] = "msd"
    """`max`: the worst attack on each example; `average`: all attacks; `msd`: one attack with the worst norm in every
    step"""
    steps: Steps = 10
    """number of gradient steps of each inner attack"""
    reach: Positive = 2.5
    """path length of each inner attack, in multiples of eps"""
    training: Training = field(default_factory=lambda: Training(warmup=0.5))

    def __post_init__(self) -> None:
        foreign = [other for other in self.others if not isinstance(other, (Linf, L2, L1))]
        if foreign:
            raise UsageError(
                f"others contains {foreign[0]!r}, and multi-norm trains under linf, l2 and l1",
                _OTHERS,
            )

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    @property
    def further_norms(self) -> tuple[Constraint, ...]:
        """The other norms."""
        return self.others

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if there are no other norms."""
        if not self.others:
            raise UsageError(
                f"multi-norm trains under {threat.constraint} and other norms, and others is empty",
                _OTHERS,
                Remedy("recipe", "pgd"),
            )

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch: for each example those of the worst constraint, or with the method
        `average` those of all constraints, concatenated.
        """
        constraints = [learner.threat.constraint, *(c.resized(update.grown * c.eps) for c in self.others)]
        if self.method == "msd":
            return self._steepest_of_all(learner, batch, constraints)
        ends = []
        for constraint in constraints:
            under = replace(learner, threat=replace(learner.threat, constraint=constraint))
            ends.append(under.worst(batch, update.rng, steps=self.steps, reach=self.reach))
        return torch.cat(ends) if self.method == "average" else _worst(learner, batch, ends)[0]

    def _steepest_of_all(self, learner: Learner, batch: Batch, constraints: list[Constraint]) -> Inputs:
        """The point of largest loss on a path on which each step uses the constraint that raises the loss most."""
        model, x_adv = learner.frozen, batch.x
        worst, highest = x_adv, x_adv.new_full((len(x_adv),), -torch.inf)
        for _ in range(self.steps):
            grad, _ = gradient(model, batch.at(x_adv), cross_entropy)
            candidates = []
            for constraint in constraints:
                climb = constraint.steepest(grad, x_adv, model.bounds)
                stepped = torch.add(x_adv, climb, alpha=self.reach * constraint.eps / self.steps)
                candidates.append(constraint.project(stepped, batch.x, model.bounds))
            x_adv, losses = _worst(learner, batch, candidates)
            worst = torch.where(spread(losses > highest, x_adv), x_adv, worst)
            highest = torch.maximum(losses, highest)
        return worst

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy over all attacked inputs of a batch, and the number of examples that are
        correct at all their attacked inputs.
        """
        logits, n = learner.net(x_adv), len(x_adv) // len(batch)
        y = batch.y.repeat(n)
        right = (logits.argmax(1) == y).view(n, -1).all(0).sum()
        return learner.mean_cross_entropy(logits, y), right


def _worst(learner: Learner, batch: Batch, candidates: list[Inputs]) -> tuple[Inputs, PerExample]:
    """The point with the largest loss for each example, and that loss; one forward for each element of `candidates`."""

    def losses_at(x: Inputs) -> PerExample:
        with torch.no_grad():
            return cross_entropy(learner.frozen(x), batch)

    worst, highest = candidates[0], losses_at(candidates[0])
    for x in candidates[1:]:
        losses = losses_at(x)
        worst = torch.where(spread(losses > highest, x), x, worst)
        highest = torch.maximum(losses, highest)
    return worst, highest
