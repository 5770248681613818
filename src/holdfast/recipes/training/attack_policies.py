"""Policies that choose the strategy of an attack for each example, and learn by REINFORCE.

Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", Machine Learning
8, 1992. A policy is a network with one hidden layer. It receives what the trained network predicts for the clean input,
and not the input, so that it is small and the same for images and tables.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy, dlr
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.meter import lead_of
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample
from holdfast.recipes.training.fit import Update
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.losses import kullback_leibler

_LOSSES: Final = ("cross-entropy", "dlr", "kl")
STEPS: Final = (1, 2, 4, 7, 10)
"""numbers of gradient steps"""
_STEP_SIZES: Final = (0.25, 0.5, 1.0)  # in multiples of eps
_STARTS: Final = ("near", "anywhere")
_NEAR = 0.1  # of the way to a random point of the ball: at the input itself, the divergence has no gradient

ALTERNATIVES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("loss", _LOSSES),
    ("steps", tuple(map(str, STEPS))),
    ("step size", tuple(f"{size:g} eps" for size in _STEP_SIZES)),
    ("start", _STARTS),
)
"""parts of a strategy, each with its alternatives; the start is a random point of the ball, or near the input"""
_LOSS, _STEP, _SIZE, _START = range(len(ALTERNATIVES))


def steps_of(choices: Tensor) -> Tensor:
    """Return the number of steps of each strategy, int64 (n). A strategy is a row of `choices` (n, parts), with the
    position of the chosen alternative of each part.
    """
    return torch.tensor(STEPS, device=choices.device)[choices[:, _STEP]]


def attacked(
    model: Model,
    batch: Batch,
    constraint: Constraint,
    choices: Tensor,
    clean: Logits,
    rng: Draws,
    *,
    whole: bool = False,
) -> Inputs:
    """Return the inputs of a batch after the attack of each example's strategy in `choices` (n, parts), which is
    gradient ascent without a choice among its points.

    `clean` are the logits of the clean inputs. Examples whose attack has ended are left out of the passes; with
    `whole`, each pass contains the whole batch, as batch norm with the statistics of the batch needs it. Cost: as many
    forwards and backwards of an example as its strategy has steps.
    """
    anywhere = constraint.sample(batch, model.bounds, rng.at("start"))
    share = torch.where(choices[:, _START] == 0, _NEAR, 1.0).to(batch.x)
    x_adv = torch.lerp(batch.x, anywhere, spread(share, batch.x))
    n_steps = steps_of(choices)
    sizes = (
        constraint.eps
        * torch.tensor(_STEP_SIZES, dtype=batch.x.dtype, device=batch.x.device)[choices[:, _SIZE]]
    )
    for step in range(int(n_steps.max())):
        moving = n_steps > step
        rows = torch.arange(len(batch), device=batch.x.device) if whole else moving.nonzero()[:, 0]
        part, x = batch.take(rows), x_adv[rows]
        grad = _gradient(model, part.at(x), choices[rows, _LOSS], clean[rows])
        climb = constraint.steepest(grad, x, model.bounds)
        stepped = x + climb * spread((sizes * moving)[rows].to(x), x)
        x_adv = x_adv.index_copy(0, rows, constraint.project(stepped, part.x, model.bounds))
    return x_adv


def _gradient(model: Model, batch: Batch, losses: Tensor, clean: Logits) -> Inputs:
    """The gradient of the chosen loss of each example."""

    def loss(logits: Logits, examples: Batch) -> PerExample:
        values = (cross_entropy(logits, examples), dlr(logits, examples), kullback_leibler(logits, clean))
        return torch.stack(values).gather(0, losses[None])[0]

    return gradient(model, batch, loss)[0]


_N_FEATURES, _HIDDEN = 5, 16
_SIZES = [len(alternatives) for _, alternatives in ALTERNATIVES]
_SHAPES = ((_HIDDEN, _N_FEATURES), (_HIDDEN,), (sum(_SIZES), _HIDDEN), (sum(_SIZES),))
_LR, _BETAS, _TINY = 0.02, (0.9, 0.999), 1e-8  # of Adam: there are few updates, of few parameters
_MOVING = 0.9  # share of the baseline that an update keeps
_LARGEST = 10.0  # in nats, of a loss that is a feature
EVERY = 4
"""number of updates of the network for each update of a policy, on average, because rewards need further passes"""
_AHEAD_STEPS = 2  # of the attack on the updated network
REACH = 2.5
"""path length of attacks with a fixed number of steps, in multiples of eps"""
PERIODS = 4
"""parts of the training for which the chosen alternatives are counted"""


def features_of(clean: Logits, y: Labels, done: float) -> Tensor:
    """Return what a policy knows of each example, (n, 5): the loss, the margin and the entropy of the prediction for
    the clean input, its largest probability, and the completed fraction of the training.
    """
    logs = clean.float().log_softmax(1)
    probabilities = logs.exp()
    loss = -logs.gather(1, y[:, None])[:, 0].clamp(min=-_LARGEST)
    entropy = -(probabilities * logs).sum(1) / math.log(max(clean.shape[1], 2))
    gap = lead_of(probabilities, y)
    return torch.stack((loss, gap, entropy, probabilities.amax(1), torch.full_like(loss, done)), 1)


def label_probability(logits: Logits, y: Labels) -> PerExample:
    """Return the probability of the label of each example, between 0 and 1."""
    return logits.detach().float().softmax(1).gather(1, y[:, None])[:, 0]


@dataclass(frozen=True)
class Played:
    """A batch that was attacked by strategies of a policy."""

    batch: Batch
    features: Tensor
    choices: Tensor
    """position of the chosen alternative of each part of the strategy, int64 (n, parts)"""
    clean: PerExample
    """probability of the label for the clean input"""

    @property
    def forwards(self) -> int:
        """Number of forward passes of single examples: one of the clean input, and one for each step."""
        return len(self.batch) + int(steps_of(self.choices).sum())

    def gain(self, logits: Logits, price: float) -> PerExample:
        """Return the probability of the label that the attack removed, minus `price` for each of its steps. `logits`
        are those of the attacked inputs.
        """
        gained = self.clean - label_probability(logits, self.batch.y)
        return gained - price * steps_of(self.choices)


@dataclass(frozen=True)
class Policy:
    """A policy, whose tensors are part of the state of a training and are changed in place."""

    parameters: Tensor
    """weights of both layers, (parameters)"""
    moments: Tensor
    """first and second moments of their gradients, (2, parameters)"""
    numbers: Tensor
    """baseline of the rewards, and number of updates"""
    counts: Tensor
    """number of examples for each alternative, (periods, alternatives)"""

    @classmethod
    def new(cls, rng: Draws, device: torch.device) -> "Policy":
        """Return a policy that chooses all strategies with equal probability."""
        hidden = rng.normal(torch.zeros(1, dtype=torch.int64, device=device), _HIDDEN * _N_FEATURES)[0]
        parameters = torch.zeros(sum(map(math.prod, _SHAPES)), device=device)
        parameters[: len(hidden)] = hidden / math.sqrt(_N_FEATURES)
        counts = torch.zeros(PERIODS, sum(_SIZES), dtype=torch.float64, device=device)
        return cls(
            parameters, torch.zeros(2, len(parameters), device=device), torch.zeros(2, device=device), counts
        )

    @classmethod
    def of(cls, state: Mapping[str, Tensor], prefix: str) -> "Policy":
        """Return the policy whose tensors are in `state` under names with a prefix."""
        return cls(*(state[prefix + name] for name in cls.__dataclass_fields__))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of the policy under names with a prefix."""
        return {prefix + name: value for name, value in vars(self).items()}

    def logs(self, features: Tensor) -> list[Tensor]:
        """Return the log-probabilities of the alternatives of each part, (n, alternatives) each."""
        return _logs(self.parameters, features)

    def play(
        self,
        model: Model,
        batch: Batch,
        constraint: Constraint,
        rng: Draws,
        *,
        done: float,
        whole: bool = False,
        count: bool = True,
    ) -> tuple[Inputs, Played]:
        """Attack a batch by strategies that are drawn from the policy, and return the attacked inputs and the play.

        `done` is the completed fraction of the training; with `count`, the strategies are counted. `whole` is that of
        `attacked`. Cost: a forward, and a forward and a backward for each step of a strategy.
        """
        with torch.no_grad():
            clean = model(batch.x, batch.ids)
        features = features_of(clean, batch.y, done)
        choices = self._drawn(features, batch.ids, rng.at("strategy"))
        if count:
            period = self.counts[min(int(PERIODS * done), PERIODS - 1)]
            for part, counts in zip(choices.T, torch.split(period, _SIZES), strict=True):
                counts += torch.bincount(part, minlength=len(counts))
        x_adv = attacked(model, batch, constraint, choices, clean, rng, whole=whole)
        return x_adv, Played(batch, features, choices, label_probability(clean, batch.y))

    def _drawn(self, features: Tensor, ids: Ids, rng: Draws) -> Tensor:
        with torch.no_grad():
            logs = self.logs(features)
        uniform = rng.uniform(ids, len(logs))
        parts = [
            (uniform[:, k, None] >= each.exp().cumsum(1)).sum(1).clamp_(max=each.shape[1] - 1)
            for k, each in enumerate(logs)
        ]
        return torch.stack(parts, 1)

    @torch.enable_grad()
    def learn(self, played: Played, rewards: PerExample, entropy: float) -> None:
        """Make a step of REINFORCE along the rewards of a play, minus their moving baseline. `entropy` is the weight of
        the entropy of the strategies, which is added to the mean reward.
        """
        mean, (baseline, n) = rewards.mean(), self.numbers.unbind()
        advantages = rewards - (baseline if n else mean)
        weights = self.parameters.detach().requires_grad_()
        logs = _logs(weights, played.features)
        chosen = sum(each.gather(1, played.choices[:, k, None])[:, 0] for k, each in enumerate(logs))
        spread = -sum((each.exp() * each).sum(1) for each in logs)
        (grad,) = torch.autograd.grad((advantages * chosen + entropy * spread).mean(), weights)
        self.numbers.copy_(torch.stack((torch.lerp(mean, baseline, _MOVING if n else 0.0), n + 1)))
        step = float(self.numbers[1])
        for moment, value, keep in zip(self.moments, (grad, grad.square()), _BETAS, strict=True):
            moment.lerp_(value, 1 - keep)
        first, second = (moment / (1 - keep**step) for moment, keep in zip(self.moments, _BETAS, strict=True))
        self.parameters.add_(_LR * first / (second.sqrt() + _TINY))

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """Return the share of the examples for each alternative of each part, in each period of the training in which
        there were any.
        """
        rows = torch.split(self.counts[self.counts.sum(1) > 0], _SIZES, dim=1)
        return {
            name: {
                alternative: (counts[:, k] / counts.sum(1)).tolist()
                for k, alternative in enumerate(alternatives)
            }
            for (name, alternatives), counts in zip(ALTERNATIVES, rows, strict=True)
        }

    def mean_steps(self) -> list[float]:
        """Return the mean number of steps in each period of the training in which there were any."""
        by_period = zip(*self.shares()["steps"].values(), strict=True)
        return [sum(n * share for n, share in zip(STEPS, shares, strict=True)) for shares in by_period]


def distance(first: Policy, second: Policy, features: Tensor) -> float:
    """Return how different two policies are: the mean total variation distance, over examples with these features, of
    the part of the strategy in which they differ most. It is between 0 and 1.
    """
    pairs = zip(first.logs(features), second.logs(features), strict=True)
    return max(float((one.exp() - other.exp()).abs().sum(1).mean()) / 2 for one, other in pairs)


def is_due(update: Update) -> bool:
    """Return whether policies learn from an update, which a quarter of the updates, chosen at random, have."""
    one = torch.zeros(1, dtype=torch.int64)
    return int(update.rng.at("learns").integers(one, EVERY)) == 0


def after_update(learner: Learner, batch: Batch, rng: Draws) -> tuple[PerExample, int]:
    """Return what an update leaves of each example of its batch, and the number of forward passes: the probability of
    the label under a short attack, minus the probability of other classes for the clean input.
    """
    x_adv = learner.worst(batch, rng, steps=_AHEAD_STEPS, reach=REACH)
    with torch.no_grad():
        attacked_one, clean = (label_probability(learner.frozen(x), batch.y) for x in (x_adv, batch.x))
    return attacked_one - (1 - clean), (_AHEAD_STEPS + 2) * len(batch)


def refuse_other_norms(recipe: str, threat: ThreatModel) -> None:
    """Raise `UsageError` for a threat model for which strategies are not defined."""
    if not isinstance(threat.constraint, (Linf, L2)):
        raise UsageError(
            f"the recipe {recipe} trains for the threats linf and l2, and the threat is {threat.constraint.name}",
            Remedy("threat", threat.with_change("linf:8/255")),
            Remedy("recipe", "pgd"),
        )


def _logs(parameters: Tensor, features: Tensor) -> list[Tensor]:
    into, bias, out, out_bias = (
        flat.view(shape)
        for flat, shape in zip(torch.split(parameters, [*map(math.prod, _SHAPES)]), _SHAPES, strict=True)
    )
    outputs = (features @ into.T + bias).tanh() @ out.T + out_bias
    return [part.log_softmax(1) for part in torch.split(outputs, _SIZES, dim=1)]


def distribution(policy: Policy) -> dict[str, Any]:
    """Return what a policy chose, as an entry of a card: shares of the alternatives and mean number of steps, by
    period of the training.
    """
    return {
        "shares": policy.shares(),
        "mean_steps": policy.mean_steps(),
        "policy_updates": int(policy.numbers[1]),
    }


def in_words(policy: Policy) -> str:
    """Return a sentence part with the shares of the alternatives in the last period, and the mean numbers of steps in
    the first and the last one.
    """
    steps = policy.mean_steps()
    if not steps:
        return "no attack was made"
    parts = [
        f"{name} "
        + ", ".join(f"{alternative} {100 * shares[-1]:.0f} %" for alternative, shares in each.items())
        for name, each in policy.shares().items()
    ]
    return f"{'; '.join(parts)}; mean number of steps {steps[0]:.1f} at first and {steps[-1]:.1f} at last"
