"""Policies: networks and functions from observations to actions, with or without memory."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.control.environments import Actions, Box, Discrete, Environment
from holdfast.core.errors import HoldfastError, TargetError
from holdfast.io.models.factories import error_text

Memory = Tensor | None
"""state of a policy with memory (n, h); None for a policy without"""

_AFFINE = (nn.Sequential, nn.Linear, nn.Identity, nn.Flatten)


@dataclass(frozen=True)
class Policy:
    """A deterministic policy. It takes the action with the largest score, or the action itself if that is a vector."""

    function: Callable[..., Any]
    """function of observations (n, d), and of the memory (n, h) if it has one"""
    actions: Actions
    memory: Memory = None
    """memory at the beginning of an episode (h)"""
    differentiable: bool = True
    """whether outputs are differentiable with respect to observations"""
    shape: tuple[int, ...] = ()
    """shape of an observation as the function reads it; empty for a vector"""
    name: str = "the policy"
    """name in messages"""

    def begin(self, n: int) -> Memory:
        """Return the memory at the beginning of n episodes."""
        return None if self.memory is None else self.memory.expand(n, -1)

    def __call__(self, x: Tensor, memory: Memory = None) -> tuple[Tensor, Memory]:
        """Return the scores of the actions (n, k), or the actions (n, d) of a `Box`, and the memory after them."""
        x = x.reshape(len(x), *self.shape) if self.shape else x
        try:
            if self.memory is None:
                return self._read(self.function(x)), None
            outputs, memory = self.function(x, memory)
            return self._read(outputs), memory
        except (HoldfastError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code may raise anything; its message is shown
            raise TargetError(
                f"{self.name} was called with observations of shape {tuple(x.shape)}, and raised "
                f"{error_text(error, [self.name.rpartition(':')[0]])}"
            ) from error

    def outputs(self, x: Tensor, memory: Memory = None) -> Tensor:
        """Return the outputs without the memory after them."""
        return self(x, memory)[0]

    def act(self, outputs: Tensor) -> Tensor:
        """Return the actions for outputs: indices (n), or vectors (n, d) within the bounds.

        Raises `TargetError` for outputs that are not finite.
        """
        if not bool(outputs.isfinite().all()):
            raise TargetError(
                f"the policy returned {int((~outputs.isfinite()).sum())} values that are not finite in an episode; "
                "expected finite scores or actions for all observations that an episode reaches"
            )
        return outputs.argmax(1) if isinstance(self.actions, Discrete) else self.actions.clamp(outputs)

    def _read(self, outputs: Any) -> Tensor:
        values = torch.as_tensor(outputs)
        if isinstance(self.actions, Box):
            return values.float().reshape(len(values), -1)
        if values.dtype.is_floating_point:
            if values.dim() == 1:
                values = values[:, None]
            # one score decides between two actions
            return torch.cat((torch.zeros_like(values), values), 1) if values.shape[1] == 1 else values
        chosen = values.flatten().long()
        if not bool(((chosen >= 0) & (chosen < self.actions.n)).all()):
            raise TargetError(
                f"the policy returned the action {int(chosen.min() if chosen.min() < 0 else chosen.max())} in an "
                f"episode; the actions are 0 to {self.actions.n - 1}"
            )
        return nn.functional.one_hot(chosen, self.actions.n).float()

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Return the matrix (k, d) and the offset (k) of a network of linear layers alone, and None for another."""
        module = self.function
        if not isinstance(module, nn.Module):
            return None
        # a subclass may have a forward of its own
        linear = all(type(part) in _AFFINE for part in module.modules())
        if not linear and not (type(module) is Network and module.is_linear()):
            return None
        width = next((p.shape[1] for p in module.parameters() if p.dim() == 2), 0)
        with torch.no_grad():
            offset = self.outputs(torch.zeros(1, width))[0]
            return (self.outputs(torch.eye(width)) - offset).T, offset


def policy_of(made: object, environment: Environment, name: str) -> Policy:
    """Return the policy of an object: a function or module of observations (n, d), or a pair of such a function of
    observations and memory, and the memory at the beginning (h).

    The outputs for discrete actions are scores (n, k), one score (n, 1) that decides between two actions, or whole
    numbers (n). Raises `TargetError` if they do not fit the environment.
    """
    function, memory = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(function):
        raise TargetError(
            f"{name} is {type(made).__name__}; a module or function of observations was expected"
        )
    if isinstance(function, nn.Module):
        function = deepcopy(function).eval().requires_grad_(False)
    if memory is not None:
        memory = torch.as_tensor(memory).float().flatten()
    policy = Policy(function, environment.actions, memory, shape=environment.shape, name=name)
    x = environment.reset(torch.arange(2)).clone().requires_grad_()
    try:
        raw = function(
            x.reshape(len(x), *policy.shape) if policy.shape else x,
            *([] if memory is None else [policy.begin(2)]),
        )
        raw = raw[0] if memory is not None else raw
        refuse_outputs(torch.as_tensor(raw), environment, name)
        outputs = policy.outputs(x, policy.begin(2))
    except HoldfastError:
        raise
    except Exception as error:  # as in `Policy`
        raise TargetError(
            f"{name} does not accept observations of {environment.name}, whose shape is {tuple(x.shape)}: it raised "
            f"{error_text(error, [name.rpartition(':')[0]]).splitlines()[0]}; expected a policy for {x.shape[1]} values"
        ) from error
    return replace(policy, differentiable=outputs.requires_grad)


def refuse_outputs(raw: Tensor, environment: Environment, name: str) -> None:
    """Raise `TargetError` if the outputs of a policy for two observations do not fit the actions."""
    actions = environment.actions
    if raw.dtype.is_floating_point and not raw.isfinite().all():
        raise TargetError(f"{name} returns values that are not finite; expected finite scores or actions")
    if isinstance(actions, Box):
        if raw.dim() == 0 or raw.numel() != len(raw) * actions.size or len(raw) != 2:
            raise TargetError(
                f"{name} returns actions of shape {tuple(raw.shape)} for 2 observations; {environment.name} has "
                f"actions of {actions.size} values, so that (2, {actions.size}) was expected"
            )
        return
    if raw.dtype.is_floating_point:
        width = 1 if raw.dim() == 1 else raw.shape[-1]
        if (
            raw.dim() not in (1, 2)
            or len(raw) != 2
            or (width != actions.n and not (width == 1 and actions.n == 2))
        ):
            raise TargetError(
                f"{name} returns scores of shape {tuple(raw.shape)} for 2 observations; {environment.name} has "
                f"{actions.n} actions, so that (2, {actions.n}) was expected"
            )
    elif raw.numel() != 2 or not ((raw >= 0) & (raw < actions.n)).all():
        raise TargetError(
            f"{name} returns the actions {raw.flatten().tolist()} for 2 observations; {environment.name} has the "
            f"actions 0 to {actions.n - 1}, one for each observation"
        )


class Network(nn.Module):
    """A policy of two hidden layers with tanh beside a linear one. Observations are normalised."""

    def __init__(self, d: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(d))
        self.scale = nn.Buffer(torch.ones(d))
        self.body = nn.Sequential(
            nn.Linear(d, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
        )
        self.linear = nn.Linear(d, outputs, bias=False)
        nn.init.zeros_(self.linear.weight)

    def is_linear(self) -> bool:
        """Return whether the hidden layers have no effect."""
        return not any(bool(parameter.any()) for parameter in self.body[-1].parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Return scores or actions (n, outputs)."""
        units = (x - self.mean) * self.scale
        out: Tensor = self.body(units) + self.linear(units)
        return out
