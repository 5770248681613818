"""Attackers that change the actions of a policy, which are vectors, before the environment gets them.

Tessler, Efroni & Mannor, "Action Robust Reinforcement Learning", ICML 2019, arXiv:1901.09184, for the threat: the
perturbation of each step has a norm of at most eps.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.control.attackers import Ball, Unattacked, episodes
from holdfast.control.environments import Actions, Box, Environment
from holdfast.control.learning import PPO, AgainstPolicy, new_learner, trained, within
from holdfast.control.policies import Policy
from holdfast.core.draws import Draws
from holdfast.core.types import Ids


@dataclass(frozen=True)
class RandomActions:
    """Adds a random perturbation of the largest size."""

    ball: Ball
    actions: Actions
    seeds: Ids
    rng: Draws

    def __call__(self, actions: Tensor, x: Tensor, time: int) -> Tensor:
        return within(self.actions, actions + self.ball.sample(self.rng.at("random", time), self.seeds))


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
        return within(self.actions, actions + self.ball.steepest(sign * self.direction))

    @classmethod
    def chosen(
        cls, environment: Environment, policy: Policy, ball: Ball, seeds: Ids, rng: Draws
    ) -> "DirectedActions":
        """Return the push with the lowest mean return on training episodes."""
        assert isinstance(environment.actions, Box)
        still = Ball.empty(environment.observations.size)
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
            return within(self.actions, actions + self.ball.steepest(self.network(x)))


@dataclass
class _ActedUpon(AgainstPolicy):
    """The environment of an adversary whose action is the direction of a perturbation of the actions of a policy."""

    def _choices(self) -> Actions:
        ends = torch.ones(len(self.ball.scale))
        return Box(-ends, ends)

    def _acted(self, actions: Tensor) -> Tensor:
        with torch.no_grad():
            outputs, self._memory = self.policy(self._x, self._memory)
        return within(self.environment.actions, self.policy.act(outputs) + self.ball.steepest(actions))


def learned_actions(
    environment: Environment, policy: Policy, ball: Ball, how: PPO, rng: Draws, *, scale: Tensor
) -> LearnedActions:
    """Return an adversary on actions that PPO trained against a policy."""
    acted = _ActedUpon(environment, policy, ball)
    learner = new_learner(acted, rng, scale=scale)
    for _ in trained(acted, learner, how, rng):
        pass
    return LearnedActions(ball, environment.actions, deepcopy(learner.network).requires_grad_(False))
