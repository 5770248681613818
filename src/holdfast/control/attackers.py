"""Attackers that change what a policy observes, and the episodes in which they do so.

The state of the environment is not changed: an attacker adds a perturbation to the observation of each step. The
attackers are those of Huang et al., "Adversarial Attacks on Neural Network Policies", 2017, arXiv:1702.02284 (greedy
flipping); Zhang et al., "Robust Deep Reinforcement Learning against Adversarial Perturbations on State Observations",
NeurIPS 2020, arXiv:2003.08938 (critic, maximal action difference, robust Sarsa); and Sun et al., "Who Is the Strongest
Enemy?", ICLR 2022, arXiv:2106.05087 (a learned direction of the action).

Differs from the papers: robust Sarsa and the critic are fitted to discounted returns of episodes with random actions,
without the regulariser of robust Sarsa, and the adversary chooses a target action, for which the perturbation is then
computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, one_hot

from holdfast.control.environments import Discrete, Environment
from holdfast.control.policies import Memory, Policy
from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Labels, Mask, PerExample

Norm = Literal["linf", "l2", "l1"]

_STEPS = 10
"""gradient steps of an attack on a network, as in Zhang et al."""
_TRIES = 32
"""random perturbations that an attack on a policy without gradients tries"""


@dataclass(frozen=True)
class Ball:
    """The perturbations d of an observation with |d / scale| ≤ eps.

    Differs from the norms of `core/constraints.py`: each value has its own unit, and perturbed observations have no
    bounds.
    """

    norm: Norm
    eps: float
    scale: Tensor
    """unit of eps for each value of an observation (d)"""

    @classmethod
    def empty(cls, size: int) -> "Ball":
        """Return the ball without any perturbation of observations of a size."""
        return cls("linf", 0.0, torch.ones(size))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the perturbations (n, d) with the largest product with a gradient (n, d)."""
        g = gradient * self.scale
        if self.norm == "linf":
            unit = g.sign()
        elif self.norm == "l2":
            unit = g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)
        else:
            unit = one_hot(g.abs().argmax(1), g.shape[1]) * g.sign()
        step: Tensor = self.eps * self.scale * unit
        return step

    def project(self, d: Tensor) -> Tensor:
        """Return perturbations (n, d) moved into the ball: clamped for linf, and otherwise shrunk."""
        units = d / self.scale
        if self.norm == "linf":
            return units.clamp(-self.eps, self.eps) * self.scale
        size: Tensor = units.norm(p=2 if self.norm == "l2" else 1, dim=1, keepdim=True)
        return d * (self.eps / size.clamp_min(1e-30)).clamp_max(1)

    def largest(self, weights: Tensor) -> Tensor:
        """Return the largest product of a perturbation with each of the weights (…, d)."""
        p = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[self.norm]
        largest: Tensor = self.eps * (weights * self.scale).norm(p=p, dim=-1)
        return largest

    def sample(self, rng: Draws, ids: Ids) -> Tensor:
        """Return random perturbations (n, d) of the largest size."""
        return self.steepest(rng.normal(ids, len(self.scale)))


@dataclass(frozen=True)
class View:
    """What an attacker sees in a step, besides the observations."""

    policy: Policy
    memory: Memory
    ball: Ball
    seeds: Ids
    """seeds of the episodes"""
    time: int
    """number of the step"""
    rng: Draws
    steps: int = _STEPS
    """gradient steps of an attack on a network"""


Attacker = Callable[[Tensor, View], Tensor]
"""type of an attacker: a function that returns the observations (n, d) that the policy sees in place of those given"""
Objective = Callable[[Tensor], PerExample]
"""what an attack maximises, from the outputs of a policy (n, k)"""


def maximised(x: Tensor, view: View, objective: Objective, *, linear: bool = False) -> Tensor:
    """Return the observations in the ball around `x` with the largest objective that was found.

    One step is exact for a network of linear layers and an objective that is `linear`. Otherwise one full step from a
    random point is followed by smaller ones; policies without gradients are tried at random perturbations.
    """
    ball, rng = view.ball, view.rng.at("attack", view.time)

    def value(at: Tensor) -> PerExample:
        return objective(view.policy.outputs(at, view.memory))

    with torch.no_grad():
        best, best_value = x, value(x)
    if not view.policy.differentiable:
        for k in range(_TRIES):
            candidate = x + ball.sample(rng.at(k), view.seeds)
            with torch.no_grad():
                found = value(candidate)
            best = torch.where((found > best_value)[:, None], candidate, best)
            best_value = torch.maximum(found, best_value)
        return best
    exact = linear and view.policy.affine() is not None
    d = torch.zeros_like(x) if exact else 0.1 * ball.sample(rng, view.seeds)
    at = (x + d).requires_grad_()
    found = value(at)
    for k in range(1 if exact else view.steps):
        (gradient,) = torch.autograd.grad(found.sum(), at)
        step = ball.steepest(gradient)
        d = step if k == 0 else ball.project(d + step * (2 * (1 - k / view.steps)))
        at = (x + d).requires_grad_()
        found = value(at)
        best = torch.where((found > best_value)[:, None], at.detach(), best)
        best_value = torch.maximum(found.detach(), best_value)
    return best


def margin_of(target: Labels) -> Objective:
    """Return the difference of the score of a target action (n) and the largest other score."""

    def margin(outputs: Tensor) -> PerExample:
        aimed = outputs.gather(1, target[:, None])[:, 0]
        others = outputs.masked_fill(one_hot(target, outputs.shape[1]).bool(), float("-inf"))
        return aimed - others.amax(1)

    return margin


def towards_action(x: Tensor, view: View, target: Labels) -> Tensor:
    """Return the observations with which the policy takes the `target` actions (n), and `x` where none was found."""
    exact = len(view.policy.outputs(x[:1], _first(view.memory))[0]) == 2
    x_adv = maximised(x, view, margin_of(target), linear=exact)
    with torch.no_grad():
        reached = view.policy.outputs(x_adv, view.memory).argmax(1) == target
    return torch.where(reached[:, None], x_adv, x)


def _first(memory: Memory) -> Memory:
    return None if memory is None else memory[:1]


def towards_direction(x: Tensor, view: View, direction: Tensor) -> Tensor:
    """Return the observations with the action farthest in a direction (n, a) of actions that are vectors."""
    return maximised(x, view, lambda actions: (actions * direction).sum(1), linear=True)


@dataclass(frozen=True)
class Unattacked:
    """No attacker."""

    def __call__(self, x: Tensor, view: View) -> Tensor:
        return x


@dataclass(frozen=True)
class RandomNoise:
    """A random perturbation of the largest size in each step."""

    def __call__(self, x: Tensor, view: View) -> Tensor:
        return x + view.ball.sample(view.rng.at("random", view.time), view.seeds)


class ChoosesTarget(Protocol):
    """Protocol of an attacker that chooses a target action in each step, or a direction of actions that are vectors."""

    def target(self, x: Tensor, view: View) -> Tensor:
        """Return the actions (n) or the directions (n, a)."""


@dataclass(frozen=True)
class InBlocks:
    """Applies each of several attackers to its own block of rows. The blocks are equally large."""

    attackers: Sequence[ChoosesTarget]

    def __call__(self, x: Tensor, view: View) -> Tensor:
        blocks = x.chunk(len(self.attackers))
        targets = [each.target(block, view) for each, block in zip(self.attackers, blocks, strict=True)]
        return towards_target(x, view, torch.cat(targets))


@dataclass(frozen=True)
class GreedyFlip:
    """Replaces the action of each step by the next best one wherever that is possible."""

    def __call__(self, x: Tensor, view: View) -> Tensor:
        with torch.no_grad():
            runner_up = view.policy.outputs(x, view.memory).topk(2, dim=1).indices[:, 1]
        return towards_action(x, view, runner_up)


@dataclass(frozen=True)
class Directed:
    """Pushes one way: the target is the same action in every step, or one of two by the sign of one value of the
    observation.

    Actions that are vectors are pushed in the direction of one of their values.
    """

    below: int
    """action while the value is below 0; for vectors, 2 i for more of value i and 2 i + 1 for less of it"""
    above: int
    """action while the value is 0 or more"""
    value: int = 0
    """position of the value in the observation"""

    def target(self, x: Tensor, view: View) -> Tensor:
        """Return the actions (n) or the directions (n, a)."""
        target = torch.where(x[:, self.value] < 0, self.below, self.above)
        if isinstance(view.policy.actions, Discrete):
            return target
        direction = one_hot(target // 2, view.policy.actions.size) * (1 - 2 * (target[:, None] % 2))
        return direction.float()

    def __call__(self, x: Tensor, view: View) -> Tensor:
        return towards_target(x, view, self.target(x, view))


@dataclass(frozen=True)
class MaximalDifference:
    """Maximises the difference between the action distributions with and without the perturbation.

    The difference is the Kullback-Leibler divergence of the softmax of scores, and the squared distance of vectors.
    """

    def __call__(self, x: Tensor, view: View) -> Tensor:
        with torch.no_grad():
            clean = view.policy.outputs(x, view.memory)
        affine = view.policy.affine()
        if not isinstance(view.policy.actions, Discrete):
            if affine is not None and clean.shape[1] == 1:
                return x + view.ball.steepest(affine[0].expand(len(x), -1))
            return maximised(x, view, lambda outputs: (outputs - clean).square().sum(1))
        if clean.shape[1] == 2 and affine is not None:  # the divergence grows with the distance of the scores
            return maximised(x, view, lambda outputs: -margin_of(clean.argmax(1))(outputs), linear=True)
        p = clean.softmax(1)
        return maximised(x, view, lambda outputs: -(p * log_softmax(outputs, 1)).sum(1))


@dataclass(frozen=True)
class Critic:
    """Minimises a learned value of the observation that the policy sees."""

    value: nn.Module
    """network from observations to returns"""

    def __call__(self, x: Tensor, view: View) -> Tensor:
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.value(at).sum(), at)
        return x - view.ball.steepest(gradient)


@dataclass(frozen=True)
class RobustSarsa:
    """Targets the actions with the smallest learned action value."""

    action_value: nn.Module
    """network from observations to the values of the actions (n, k), or of observations and actions (n, d + a)"""

    def __call__(self, x: Tensor, view: View) -> Tensor:
        if isinstance(view.policy.actions, Discrete):
            with torch.no_grad():
                worst = self.action_value(x).argmin(1)
            return towards_action(x, view, worst)
        return maximised(x, view, lambda outputs: -self.action_value(torch.cat((x, outputs), 1))[:, 0])


@dataclass(frozen=True)
class Learned:
    """Targets the action, or the direction, that a trained network chooses for each observation."""

    network: nn.Module
    """network from observations to the scores of actions (n, k), or to directions (n, a)"""

    def target(self, x: Tensor, view: View) -> Tensor:
        """Return the actions (n) or the directions (n, a)."""
        with torch.no_grad():
            chosen: Tensor = self.network(x)
        return chosen.argmax(1) if isinstance(view.policy.actions, Discrete) else chosen

    def __call__(self, x: Tensor, view: View) -> Tensor:
        return towards_target(x, view, self.target(x, view))


def towards_target(x: Tensor, view: View, target: Tensor) -> Tensor:
    """Return the observations with which a policy takes the target actions (n), or the actions farthest in the target
    directions (n, a).
    """
    if isinstance(view.policy.actions, Discrete):
        return towards_action(x, view, target)
    return towards_direction(x, view, target)


@dataclass(frozen=True)
class Episodes:
    """What was measured in n episodes."""

    returns: PerExample
    lengths: Tensor
    """numbers of steps (n)"""
    cut: Mask
    """whether an episode was cut by the limit of its environment"""
    visited: Tensor = field(default_factory=lambda: torch.empty(0))
    """observations of all steps (m, d), if they were kept"""
    shown: Tensor = field(default_factory=lambda: torch.empty(0))
    """observations that the policy got in their place (m, d), if they were kept"""
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    """number of the episode of each of them (m)"""
    first: tuple[Tensor, Tensor, Tensor] = (torch.empty(0), torch.empty(0), torch.empty(0))
    """of the first episode: observations (t, d), those that the policy got, and actions (t, a)"""


def episodes(
    environment: Environment,
    policy: Policy,
    attacker: Attacker,
    ball: Ball,
    seeds: Ids,
    rng: Draws,
    *,
    keep: bool = False,
    steps: int = _STEPS,
    disturb: Callable[[Tensor, Tensor, int], Tensor] = lambda actions, x, time: actions,
) -> Episodes:
    """Run one episode for each seed until all have ended or are cut.

    `steps` is the number of gradient steps of an attack on a network, and `disturb` changes the actions of each step,
    from the actions, the observations (n, d) and the number of the step. With `keep`, observations are returned.
    """
    x, memory = environment.reset(seeds), policy.begin(len(seeds))
    running = torch.ones(len(seeds), dtype=torch.bool)
    cut = torch.zeros_like(running)
    returns, lengths = (
        torch.zeros(len(seeds), dtype=torch.float64),
        torch.zeros(len(seeds), dtype=torch.int64),
    )
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    first: list[tuple[Tensor, Tensor, Tensor]] = []
    for time in range(environment.limit):
        view = View(policy, memory, ball, seeds, time, rng, steps)
        x_adv = attacker(x, view).detach()
        if keep:
            kept.append((x[running], x_adv[running], running.nonzero()[:, 0]))
        with torch.no_grad():
            outputs, memory = policy(x_adv, memory)
        actions = disturb(policy.act(outputs), x, time)
        if running[0]:
            first.append((x[0], x_adv[0], actions[0].float().reshape(-1)))
        x, rewards, ended, truncated = environment.step(actions)
        returns += torch.where(running, rewards.double(), 0.0)
        lengths += running
        cut |= running & truncated
        running &= ~ended
        if not running.any():
            break
    of_all = [torch.cat(each) for each in zip(*kept, strict=True)] if keep else [torch.empty(0)] * 3
    x_of, shown_of, actions_of = (torch.stack(each) for each in zip(*first, strict=True))
    return Episodes(
        returns, lengths, cut | running, of_all[0], of_all[1], of_all[2], (x_of, shown_of, actions_of)
    )
