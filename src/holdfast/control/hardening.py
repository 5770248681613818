"""Training of policies that hold under perturbed observations: the methods of the recipe `robust-policy`.

`search`: random search of linear policies (Mania, Guy & Recht, "Simple Random Search Provides a Competitive Approach to
Reinforcement Learning", NeurIPS 2018, arXiv:1803.07055) for the largest return under the worst of a set of attackers.
After each round PPO trains an adversary against the best policy, which is added to the set. `smooth`: Zhang et al.,
"Robust Deep Reinforcement Learning against Adversarial Perturbations on State Observations", NeurIPS 2020,
arXiv:2003.08938 (SA-PPO). `alternating`: Zhang et al., "Robust Reinforcement Learning on State Observations with
Learned Optimal Adversary", ICLR 2021, arXiv:2101.08452 (ATLA). `worst-case`: Liang et al., "Efficient Adversarial
Training without Attacking: Worst-Case-Aware Robust Reinforcement Learning", NeurIPS 2022, arXiv:2210.05927 (WocaR-PPO).

Differs from the papers: the regulariser of `smooth` is maximised by gradient steps; the adversary of `alternating`
chooses target actions instead of perturbations, and its policy has the regulariser too; `search` estimates the
distribution of the best policies (cross-entropy method) instead of a gradient; in `worst-case`, CROWN decides whether
an action can change, and if it can, every action counts as reachable.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss

from holdfast.control.attackers import Ball, ChoosesTarget, InBlocks, View, episodes, towards_target
from holdfast.control.certification import CertifiedActions, certified_actions
from holdfast.control.environments import Actions, Discrete, Environment, episode_seeds
from holdfast.control.learning import (
    PPO,
    Attacked,
    Fit,
    Learner,
    Progress,
    Regulariser,
    learned_adversary,
    new_critics,
    new_learner,
    pushes,
    trained,
)
from holdfast.control.policies import Network, Policy
from holdfast.core.draws import Draws
from holdfast.core.types import NonNegative, PerExample, Steps

Method = Literal["search", "ppo", "smooth", "alternating", "worst-case"]
"""Methods of the recipe `robust-policy`."""
_GRADIENT_STEPS = 2
"""gradient steps of a perturbation during a training"""
_BEST = 6
"""number of the best policies of a generation, from which the next one is drawn"""


@dataclass(frozen=True)
class Hardening:
    """Settings of the recipe `robust-policy`."""

    method: Method = "search"
    rounds: Steps = 3
    """number of rounds of `search`, between which an adversary is trained"""
    generations: Steps = 5
    """number of generations of a round"""
    population: Annotated[int, Ge(_BEST)] = 48
    """number of policies of a generation"""
    updates: Steps = 120
    """number of updates of the policy and the adversary together"""
    warm_up: Steps = 25
    """number of updates without attack at the beginning"""
    turns: Steps = 10
    """number of updates of the policy, and then of the adversary, that alternate"""
    weight: NonNegative = 0.3
    """weight of the regulariser of `smooth`, `alternating` and `worst-case`"""
    worst_weight: NonNegative = 0.3
    """weight of the worst-case action value of `worst-case`"""
    ppo: PPO = field(default_factory=PPO)


def divergence(network: nn.Module, x: Tensor, x_adv: Tensor, *, discrete: bool) -> PerExample:
    """Return the divergence of the actions for `x_adv` (n, d) from those for `x` (n): of Kullback and Leibler, or the
    squared distance of vectors.
    """
    clean: Tensor = network(x)
    attacked: Tensor = network(x_adv)
    if not discrete:
        return (clean - attacked).square().sum(1)
    p, q = log_softmax(clean, 1), log_softmax(attacked, 1)
    return (p.exp() * (p - q)).sum(1)


@dataclass(frozen=True)
class Smooth:
    """The largest divergence of the actions within the ball, which gradient steps find."""

    ball: Ball
    weight: float
    generator: torch.Generator
    discrete: bool

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        return self.per_state(network, x).mean()

    def per_state(self, network: nn.Module, x: Tensor) -> PerExample:
        """Return the weighted divergence in each of the states (n, d)."""
        d = self.ball.steepest(torch.randn(x.shape, generator=self.generator)) * 0.5
        for _ in range(_GRADIENT_STEPS):
            at = (x + d).requires_grad_()
            found = divergence(network, x, at, discrete=self.discrete)
            (gradient,) = torch.autograd.grad(found.sum(), at)
            d = self.ball.project(d + self.ball.steepest(gradient))
        return self.weight * divergence(network, x, (x + d).detach(), discrete=self.discrete)


_ITERATIONS, _FITTED = 4, 16
"""times that the worst-case action value is bootstrapped before an update of PPO, and gradient steps of each"""
_BOUNDED = 1024
"""steps of an update on which that value is trained; bounds for all of them would take most of the training"""


@dataclass(frozen=True)
class WorstCase:
    """The loss of a policy that neither lowers its worst-case action value nor changes its action where that matters.

    The worst-case action value is the return after an action, multiplied by 1 - `discount`, if the attacker chooses the
    worst of the actions that it can cause in every later step. Its network is trained beside the policy.
    """

    smooth: Smooth
    weight: float
    discount: float
    actions: Actions
    value: Network
    """network from observations to the values of the actions (n, k), or of observations and actions (n, d + a)"""
    optimiser: torch.optim.Adam

    @classmethod
    def new(
        cls, smooth: Smooth, how: Hardening, environment: Environment, rng: Draws, scale: Tensor
    ) -> "WorstCase":
        """Return the loss with a value network of random weights."""
        _, value = new_critics(environment, scale, rng)
        optimiser = torch.optim.Adam(value.parameters(), lr=how.ppo.learning_rate)
        return cls(smooth, how.worst_weight, how.ppo.discount, environment.actions, value, optimiser)

    def fit(self, learner: Learner, kept: Mapping[str, Tensor]) -> None:
        """Train the value on the steps of an update: observations (t, n, d), actions, rewards and ends of episodes."""
        drawn = torch.randperm(kept["ended"][1:].numel(), generator=self.smooth.generator)[:_BOUNDED]
        x, action, reward, ended = (
            kept[name][:-1].flatten(0, 1)[drawn] for name in ("x", "action", "reward", "ended")
        )
        after, policy = kept["x"][1:].flatten(0, 1)[drawn], learner.policy()
        proved = certified_actions(policy, after, self.smooth.ball)
        with torch.no_grad():
            usual = policy.act(policy.outputs(after))
        for _ in range(_ITERATIONS):
            with torch.no_grad():
                worst = self._worst(after, usual, proved)
                target = (1 - self.discount) * reward + self.discount * ~ended * worst
            for _ in range(_FITTED):
                some = torch.randint(len(x), (256,), generator=self.smooth.generator)
                loss = mse_loss(self._of(x[some], action[some]), target[some])
                self.optimiser.zero_grad()
                torch.autograd.backward(loss)
                self.optimiser.step()

    def _of(self, x: Tensor, action: Tensor) -> PerExample:
        discrete = isinstance(self.actions, Discrete)
        values: Tensor = self.value(x if discrete else torch.cat((x, action), 1))
        return values.gather(1, action[:, None])[:, 0] if discrete else values[:, 0]

    def _worst(self, x: Tensor, usual: Tensor, proved: CertifiedActions) -> PerExample:
        if isinstance(self.actions, Discrete):
            values: Tensor = self.value(x)
            return torch.where(proved.fixed, self._of(x, usual), values.amin(1))
        ends = [self._of(x, action) for action in (usual, proved.low, proved.high)]
        return torch.stack(ends).amin(0)

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        outputs: Tensor = network(x)
        changes = self.smooth.per_state(network, x)
        if not isinstance(self.actions, Discrete):
            value = self._of(x, outputs)
            return changes.mean() - self.weight * value.mean() / value.detach().std().clamp_min(1e-3)
        with torch.no_grad():
            values: Tensor = self.value(x)
            advantages = values - values.mean(1, keepdim=True)
            advantages /= advantages.std().clamp_min(1e-3)
            importance = advantages.amax(1) - advantages.amin(1)
        expected = (outputs.softmax(1) * advantages).sum(1).mean()
        return (changes * importance).mean() / importance.mean().clamp_min(1e-3) - self.weight * expected


_EPISODES = 8
"""number of training episodes of each policy and attacker of `search`"""
_PROPOSED = 30
"""number of PPO updates of the adversary after a round"""


@dataclass(frozen=True)
class _Population:
    """A function of observations in which each row has its own linear policy."""

    weights: Tensor
    """weights (n, k, d), one for each row"""

    def __call__(self, x: Tensor) -> Tensor:
        return (self.weights * x[:, None]).sum(2)


def searched(
    environment: Environment, ball: Ball, how: Hardening, rng: Draws, *, scale: Tensor, deadline: float
) -> Iterator[tuple[Progress, Policy]]:
    """Search for a linear policy, and yield after each generation the mean of its best ones and the return of the
    best one.
    """
    generator = torch.Generator().manual_seed(rng.at("search").seed)
    actions, d = environment.actions, len(scale)
    k = actions.n if isinstance(actions, Discrete) else actions.size
    free = k - 1 if isinstance(actions, Discrete) else k  # the score of action 0 is 0
    attackers: list[ChoosesTarget] = [*pushes(environment)]
    mean, spread = torch.zeros(free, d), torch.ones(free, d)
    best, best_return, generation = mean, float("-inf"), 0
    for number in range(how.rounds):
        for _ in range(how.generations):
            candidates = mean + spread * torch.randn(how.population, free, d, generator=generator)
            candidates[0], candidates[1] = mean, best
            if isinstance(actions, Discrete):  # only the direction decides
                candidates = candidates / candidates.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-9)
            seeds = episode_seeds(rng.at("episodes", generation), torch.arange(_EPISODES))
            worst = _worst(
                environment, candidates / scale, attackers, ball, seeds, rng.at("worst", generation)
            )
            top = worst.topk(_BEST).indices
            mean, spread = candidates[top].mean(0), candidates[top].std(0) + 0.02
            best, best_return, generation = candidates[top[0]], float(worst[top[0]]), generation + 1
            policy = linear_policy(mean, environment, scale)
            yield Progress(generation, how.rounds * how.generations, best_return), policy
            if time.monotonic() > deadline:
                return
        if number < how.rounds - 1:
            schedule = replace(how.ppo, updates=_PROPOSED)
            attackers.append(
                learned_adversary(
                    environment,
                    policy,
                    ball,
                    schedule,
                    rng.at("adversary", number),
                    scale=scale,
                    deadline=deadline,
                )
            )


def _worst(
    environment: Environment,
    weights: Tensor,
    attackers: Sequence[ChoosesTarget],
    ball: Ball,
    seeds: Tensor,
    rng: Draws,
) -> Tensor:
    """Return for each linear policy the lowest mean return over the attackers (p)."""
    if isinstance(environment.actions, Discrete):
        weights = torch.cat((torch.zeros_like(weights[:, :1]), weights), 1)
    rows = weights.repeat_interleave(len(seeds), 0).repeat(len(attackers), 1, 1)
    policy = Policy(_Population(rows), environment.actions)
    every = seeds.repeat(len(attackers) * len(weights))
    measured = episodes(environment, policy, InBlocks(attackers), ball, every, rng, steps=1)
    return measured.returns.view(len(attackers), len(weights), len(seeds)).mean(2).amin(0)


def linear_policy(weights: Tensor, environment: Environment, scale: Tensor) -> Policy:
    """Return the network of a linear policy with weights (k, d) for observations divided by `scale`."""
    if isinstance(environment.actions, Discrete):
        weights = torch.cat((torch.zeros_like(weights[:1]), weights))
    network = Network(len(scale), len(weights), 8)
    with torch.no_grad():
        for parameter in network.body.parameters():
            parameter.zero_()
        network.scale.copy_(1 / scale)
        network.linear.weight.copy_(weights)
    return Policy(network.requires_grad_(False), environment.actions)


def hardened(
    environment: Environment,
    ball: Ball,
    how: Hardening,
    rng: Draws,
    *,
    scale: Tensor,
    deadline: float = float("inf"),
) -> Iterator[tuple[Progress, Policy]]:
    """Train a new policy, and yield what each of its updates measured and the policy. The methods `ppo`, `smooth`,
    `alternating` and `worst-case` take the same number of environment steps.
    """
    if how.method == "search":
        yield from searched(environment, ball, how, rng, scale=scale, deadline=deadline)
        return
    learner = new_learner(environment, rng.at("policy"), scale=scale)
    regulariser, critic = _regularised(environment, ball, how, rng, scale)
    if how.method != "alternating":
        schedule = replace(how.ppo, updates=how.updates)
        for progress in trained(
            environment,
            learner,
            schedule,
            rng.at("training"),
            regulariser=regulariser,
            critic=critic,
            deadline=deadline,
        ):
            yield progress, learner.policy()
        return
    done, adversary, turn = 0, None, 0
    while done < how.updates and time.monotonic() < deadline:
        attacked = adversary is not None
        n = min(how.turns if attacked else how.warm_up, how.updates - done)
        rate = how.ppo.learning_rate * (1 - 0.8 * done / how.updates)
        schedule = replace(how.ppo, updates=n, learning_rate=rate, decay=1.0)
        for progress in trained(
            environment,
            learner,
            schedule,
            rng.at("training", turn),
            regulariser=regulariser,
            observe=_Observed(ball, adversary, rng.at("observed", turn)) if adversary is not None else _clean,
            deadline=deadline,
        ):
            done += 1
            yield replace(progress, update=done, of=how.updates), learner.policy()
        n = min(how.turns, how.updates - done)
        if n <= 0:
            return
        against = Attacked(environment, learner.policy(), ball, rng.at("against", turn), _GRADIENT_STEPS)
        if adversary is None:
            adversary = new_learner(against, rng.at("adversary"), scale=scale)
        schedule = replace(schedule, updates=n, learning_rate=how.ppo.learning_rate)
        for _ in trained(against, adversary, schedule, rng.at("adversary", turn), deadline=deadline):
            done += 1
        turn += 1


def _regularised(
    environment: Environment, ball: Ball, how: Hardening, rng: Draws, scale: Tensor
) -> tuple[Regulariser | None, Fit | None]:
    """The regulariser of the policy in a method, and what is trained beside the policy."""
    if how.method == "ppo":
        return None, None
    generator = torch.Generator().manual_seed(rng.at("smooth").seed)
    smooth = Smooth(ball, how.weight, generator, isinstance(environment.actions, Discrete))
    if how.method != "worst-case":
        return smooth, None
    worst = WorstCase.new(smooth, how, environment, rng.at("worst-case"), scale)
    return worst, worst.fit


def _clean(x: Tensor, learner: Learner, step: int) -> Tensor:
    return x


@dataclass(frozen=True)
class _Observed:
    """What the policy sees while it is trained against an adversary."""

    ball: Ball
    adversary: Learner
    rng: Draws

    def __call__(self, x: Tensor, learner: Learner, step: int) -> Tensor:
        policy = Policy(learner.network, learner.actions)
        rows = torch.arange(len(x))
        view = View(policy, None, self.ball, rows, step, self.rng, _GRADIENT_STEPS)
        with torch.no_grad():
            target = self.adversary.network(x)
        chosen = target.argmax(1) if isinstance(learner.actions, Discrete) else target
        return towards_target(x, view, chosen).detach()
