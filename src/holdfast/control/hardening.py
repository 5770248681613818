"""Training of policies that hold under perturbed observations: the methods of the recipe `robust-policy`.

`search`: random search of linear policies (Mania, Guy & Recht, "Simple Random Search Provides a Competitive Approach to
Reinforcement Learning", NeurIPS 2018, arXiv:1803.07055) for the largest return under the worst of a set of attackers.
After each round PPO trains an adversary against the best policy, which is added to the set. `smooth`: Zhang et al.,
"Robust Deep Reinforcement Learning against Adversarial Perturbations on State Observations", NeurIPS 2020,
arXiv:2003.08938 (SA-PPO). `alternating`: Zhang et al., "Robust Reinforcement Learning on State Observations with
Learned Optimal Adversary", ICLR 2021, arXiv:2101.08452 (ATLA).

Differs from the papers: the regulariser of `smooth` is maximised by gradient steps; the adversary of `alternating` asks
for actions instead of perturbations, and its policy has the regulariser too; `search` estimates the distribution of the
best policies (cross-entropy method) instead of a gradient.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from holdfast.control.attackers import Asking, Ball, View, Wishing, asked, episodes
from holdfast.control.environments import Discrete, Environment, episode_seeds
from holdfast.control.learning import (
    PPO,
    Attacked,
    Learner,
    Progress,
    learned_adversary,
    new_learner,
    pushes,
    trained,
)
from holdfast.control.policies import Network, Policy
from holdfast.core.draws import Draws

Method = Literal["search", "ppo", "smooth", "alternating"]
METHODS: tuple[Method, ...] = ("search", "ppo", "smooth", "alternating")
"""Methods of the recipe `robust-policy`."""
_GRADIENT_STEPS = 2
"""gradient steps of a perturbation during a training"""


@dataclass(frozen=True)
class Hardening:
    """Settings of the recipe `robust-policy`."""

    method: Method = "search"
    rounds: int = 3
    """number of rounds of `search`, between which an adversary is trained"""
    generations: int = 5
    """number of generations of a round"""
    population: int = 48
    """number of policies of a generation"""
    updates: int = 120
    """number of updates of the policy and the adversary together"""
    warm_up: int = 25
    """number of updates without attack at the beginning"""
    turns: int = 10
    """number of updates of the policy, and then of the adversary, that alternate"""
    weight: float = 0.3
    """weight of the regulariser"""
    ppo: PPO = PPO()


def divergence(network: nn.Module, x: Tensor, x_adv: Tensor, *, discrete: bool) -> Tensor:
    """Return the mean divergence of the actions for `x_adv` from those for `x`: of Kullback and Leibler, or the squared
    distance of vectors.
    """
    clean: Tensor = network(x)
    attacked: Tensor = network(x_adv)
    if not discrete:
        return (clean - attacked).square().sum(1).mean()
    p, q = log_softmax(clean, 1), log_softmax(attacked, 1)
    found: Tensor = (p.exp() * (p - q)).sum(1).mean()
    return found


@dataclass(frozen=True)
class Smooth:
    """The largest divergence of the actions within the ball, which gradient steps find."""

    ball: Ball
    weight: float
    generator: torch.Generator
    discrete: bool

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        d = self.ball.steepest(torch.randn(x.shape, generator=self.generator)) * 0.5
        for _ in range(_GRADIENT_STEPS):
            at = (x + d).requires_grad_()
            found = divergence(network, x, at, discrete=self.discrete)
            (gradient,) = torch.autograd.grad(found, at)
            d = self.ball.project(d + self.ball.steepest(gradient))
        return self.weight * divergence(network, x, (x + d).detach(), discrete=self.discrete)


_EPISODES = 8
"""number of training episodes of each policy and attacker of `search`"""
_BEST = 6
"""number of the best policies of a generation, from which the next one is drawn"""
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
    attackers: list[Wishing] = [*pushes(environment)]
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
    attackers: Sequence[Wishing],
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
    measured = episodes(environment, policy, Asking(attackers), ball, every, rng, steps=1)
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
    """Train a new policy, and yield what each of its updates measured and the policy. The methods `ppo`, `smooth` and
    `alternating` take the same number of environment steps.
    """
    if how.method == "search":
        yield from searched(environment, ball, how, rng, scale=scale, deadline=deadline)
        return
    learner = new_learner(environment, rng.at("policy"), scale=scale)
    regulariser = None
    if how.method in ("smooth", "alternating"):
        discrete = isinstance(environment.actions, Discrete)
        generator = torch.Generator().manual_seed(rng.at("smooth").seed)
        regulariser = Smooth(ball, how.weight, generator, discrete)
    if how.method != "alternating":
        schedule = replace(how.ppo, updates=how.updates)
        for progress in trained(
            environment, learner, schedule, rng.at("training"), regulariser=regulariser, deadline=deadline
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
            wish = self.adversary.network(x)
        chosen = wish.argmax(1) if isinstance(learner.actions, Discrete) else wish
        return asked(x, view, chosen).detach()
