"""Attackers that change the actions of a policy, which are vectors, before the environment gets them.

Tessler, Efroni & Mannor, "Action Robust Reinforcement Learning", ICML 2019, arXiv:1901.09184, for the threat: the
perturbation of each step has a norm of at most eps.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from holdfast.control.attackers import Ball, Unattacked, episodes
from holdfast.control.environments import Actions, Box, Environment, Step
from holdfast.control.learning import PPO, new_learner, trained
from holdfast.control.policies import Policy
from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Mask


@dataclass(frozen=True)
class RandomActions:
    """Adds a random perturbation of the largest size."""

    ball: Ball
    actions: Actions
    seeds: Ids
    rng: Draws

    def __call__(self, actions: Tensor, x: Tensor, time: int) -> Tensor:
        return _within(self.actions, actions + self.ball.sample(self.rng.at("random", time), self.seeds))


@dataclass(frozen=True)
class DirectedActions:
    """Pushes one value of the actions, by the sign of one value of the observation."""

    ball: Ball
    actions: Actions
    value: int
    """position of the value of the observation"""
    direction: Tensor
    """direction of the actions (a) while the value is 0 or more; the opposite below"""

    def __call__(self, actions: Tensor, x: Tensor, time: int) -> Tensor:
        sign = torch.where(x[:, self.value] < 0, -1.0, 1.0)[:, None]
        return _within(self.actions, actions + self.ball.steepest(sign * self.direction))

    @classmethod
    def chosen(
        cls, environment: Environment, policy: Policy, ball: Ball, seeds: Ids, rng: Draws
    ) -> "DirectedActions":
        """Return the push with the lowest mean return on training episodes."""
        assert isinstance(environment.actions, Box)
        still = Ball("linf", 0.0, torch.ones(environment.observations.size))
        directions = torch.cat((torch.eye(environment.actions.size), -torch.eye(environment.actions.size)))
        tried = [
            cls(ball, environment.actions, value, direction)
            for value in range(environment.observations.size)
            for direction in directions
        ]
        means = [
            float(episodes(environment, policy, Unattacked(), still, seeds, rng, disturb=push).returns.mean())
            for push in tried
        ]
        return tried[min(range(len(tried)), key=means.__getitem__)]


@dataclass(frozen=True)
class LearnedActions:
    """Pushes in the direction that a trained network chooses."""

    ball: Ball
    actions: Actions
    network: nn.Module

    def __call__(self, actions: Tensor, x: Tensor, time: int) -> Tensor:
        with torch.no_grad():
            return _within(self.actions, actions + self.ball.steepest(self.network(x)))


@dataclass
class _ActedUpon:
    """The environment of an adversary whose action is the direction of a perturbation of the actions of a policy."""

    environment: Environment
    policy: Policy
    ball: Ball

    def __post_init__(self) -> None:
        self.name, self.limit = self.environment.name, self.environment.limit
        self.observations, self.parameters = self.environment.observations, self.environment.parameters
        self.returns, self.shape = (None, None), self.environment.shape
        ends = torch.ones(len(self.ball.scale))
        self.actions: Actions = Box(-ends, ends)

    def reset(self, seeds: Ids) -> Tensor:
        """Start one episode for each seed."""
        self._x, self._memory = self.environment.reset(seeds), self.policy.begin(len(seeds))
        return self._x

    def restart(self, rows: Mask, seeds: Ids) -> Tensor:
        """Start episodes again in some rows."""
        self._x = self.environment.restart(rows, seeds)
        if self._memory is not None:
            start = self.policy.begin(len(seeds))
            assert start is not None
            self._memory = torch.where(rows[:, None], start, self._memory)
        return self._x

    def step(self, actions: Tensor) -> Step:
        """Push the actions of the policy, and take the step."""
        with torch.no_grad():
            outputs, self._memory = self.policy(self._x, self._memory)
        own = self.policy.act(outputs) + self.ball.steepest(actions)
        self._x, rewards, ended = self.environment.step(_within(self.environment.actions, own))
        return Step(self._x, -rewards, ended)

    def changed(self, factors: Mapping[str, Tensor]) -> "_ActedUpon":
        """Return the environment with other parameters."""
        return replace(self, environment=self.environment.changed(factors))


def learned_actions(
    environment: Environment, policy: Policy, ball: Ball, how: PPO, rng: Draws, *, scale: Tensor
) -> LearnedActions:
    """Return an adversary on actions that PPO trained against a policy."""
    acted = _ActedUpon(environment, policy, ball)
    learner = new_learner(acted, rng, scale=scale)
    for _ in trained(acted, learner, how, rng):
        pass
    return LearnedActions(ball, environment.actions, deepcopy(learner.network).requires_grad_(False))


def _within(actions: Actions, perturbed: Tensor) -> Tensor:
    assert isinstance(actions, Box)
    return actions.clamp(perturbed)
