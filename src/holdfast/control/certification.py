"""Certified actions: bounds of the outputs of a policy over all observations that are allowed in place of a state."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.certifiers.bounds.crown import relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph, Region
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.objectives import margin_rows
from holdfast.control.attackers import Ball
from holdfast.control.environments import Discrete
from holdfast.control.policies import Policy
from holdfast.core.errors import UsageError
from holdfast.core.training import exactly
from holdfast.core.types import Mask

_AT_ONCE = 1024
"""number of states whose bounds are computed together"""
_NORMS = {"linf": None, "l2": 2, "l1": 1}


class _InUnits(nn.Module):
    """A policy of observations in the unit of eps."""

    def __init__(self, policy: Policy, scale: Tensor) -> None:
        super().__init__()
        if isinstance(policy.function, nn.Module):
            self.function = policy.function  # so that its parameters are constants of the traced network
        self.policy, self.scale = policy, nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the policy."""
        return self.policy.outputs(x * self.scale)


@dataclass(frozen=True)
class CertifiedActions:
    """What is proved about the actions in m states."""

    fixed: Mask
    """whether no allowed observation changes the action (m); for vectors, whether the interval is the action alone"""
    low: Tensor
    """lower bounds: of the smallest margin of the action (m, 1), or of each value of the action (m, a)"""
    high: Tensor
    """upper bounds of each value of the action (m, a); infinite for discrete actions"""


def certified_actions(policy: Policy, x: Tensor, ball: Ball) -> CertifiedActions:
    """Return what CROWN proves about the actions of a policy in the states `x` (m, d) under perturbations of the
    observations.

    The bounds contain the rounding of the policy in float32, and are wider than exact bounds by about 1e-5 of the
    largest values that occur in it. Raises `UsageError` for a policy with memory, and for operations without sound
    bounds.
    """
    if policy.memory is not None:
        raise UsageError(
            "the policy has a memory, which an attacker changes too; certified actions need a policy without memory"
        )
    if not policy.differentiable or policy.shape:
        raise UsageError(
            "the policy is no network of vectors, and bounds are computed from the operations of a network; give a "
            "torch.nn.Module"
        )
    net = _InUnits(policy, ball.scale)
    units = x.float() / ball.scale
    graph = traced(net, units[:1]).to(torch.float32)
    with torch.no_grad(), exactly(units):
        parts = [_bounds(policy, net, graph, some, ball) for some in torch.split(units, _AT_ONCE)]
    return CertifiedActions(
        torch.cat([part.fixed for part in parts]),
        torch.cat([part.low for part in parts]),
        torch.cat([part.high for part in parts]),
    )


def _bounds(policy: Policy, net: nn.Module, graph: Graph, units: Tensor, ball: Ball) -> CertifiedActions:
    # the rounding of x / scale, of its product with the scale, and of an attacker's sum, half a unit in the last place
    slack = 1.5 * torch.finfo(torch.float32).eps * (units.abs() + ball.eps)
    reach, norm = ball.eps + slack, _NORMS[ball.norm]
    region = Region(units - reach, units + reach, units, norm, ball.eps + float(slack.sum(1).amax()))
    relaxation = relaxed(graph, region)
    outputs = net(units)
    if isinstance(policy.actions, Discrete):
        rows = margin_rows(outputs.argmax(1), outputs.shape[1], units.dtype)
        low = substitute(relaxation, relaxation.graph.output, rows).lower.amin(1, keepdim=True)
        return CertifiedActions(low[:, 0] > 0, low, torch.full_like(low, torch.inf))
    size = outputs.shape[1]
    rows = torch.cat((torch.eye(size), -torch.eye(size)))[None].expand(len(units), -1, -1)
    both = substitute(relaxation, relaxation.graph.output, rows).lower
    low, high = policy.actions.clamp(both[:, :size]), policy.actions.clamp(-both[:, size:])
    return CertifiedActions((low == high).all(1), low, high)
