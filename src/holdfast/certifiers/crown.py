"""Linear bounds of a network by backward substitution (CROWN).

A lower bound of a linear function of a value is propagated backwards through the network: each linear operation is
substituted exactly, and each nonlinear one by its linear lower or upper bound, depending on the sign of its
coefficient. At the input, the minimum over the region of the threat model is the result. Zhang et al., "Efficient
Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018, arXiv:1811.00866; on graphs:
Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020,
arXiv:2002.12920. Differs: only values of which interval arithmetic does not know the sign are bounded by
substitution, and every bound is reduced by a bound of its rounding error.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.certifiers import windows
from holdfast.certifiers.graph import Graph
from holdfast.certifiers.linear import Linear
from holdfast.certifiers.nonlinear import MaxPool, PoolLines, ReLU
from holdfast.certifiers.region import Region
from holdfast.certifiers.relaxation import Relaxation

_ELEMENTS = 2**22
"""largest number of coefficients of one value that are computed at once"""
_WINDOW = 1024
"""assumed number of values in a window"""


@dataclass(frozen=True)
class Choices:
    """Free choices of a substitution, by the index of a ReLU. Any choice gives valid bounds."""

    slopes: Mapping[int, Tensor] = field(default_factory=dict)
    """slopes in [0, 1] of the lower bounds of ReLUs, (n, k, *shape); they are used where the sign of the input is not
    known"""
    multipliers: Mapping[int, Tensor] = field(default_factory=dict)
    """numbers (n, k, *shape), for inputs of ReLUs that are assumed to be nonnegative (at least 0) or nonpositive (at
    most 0): Lagrange multipliers of the assumptions, times their signs"""


NO_CHOICES = Choices()
"""the slopes of `Activation.lines`, and no assumed signs"""


@dataclass(frozen=True)
class Substituted:
    """Result of a backward substitution."""

    lower: Tensor
    """lower bounds (n, k) of the linear functions, reduced by the rounding error"""
    coefficients: Tensor
    """coefficients (n, k, *shape) of the lower bounds with respect to the input"""
    passed: Mapping[int, Tensor]
    """coefficients (n, k, *shape) with respect to the outputs of the nonlinear operations, by index, if required"""


def substitute(
    relaxation: Relaxation,
    index: int,
    coefficients: Tensor,
    choices: Choices = NO_CHOICES,
    *,
    rounded: bool = True,
    passed: bool = False,
) -> Substituted:
    """Return lower bounds of linear functions of a value, given by their coefficients (n, k, *shape of the value).

    The first dimension may be 1 if the functions are the same for all examples. Without `rounded`, the rounding error
    is not subtracted, as while the choices are optimised. With `passed`, the result contains the coefficients at the
    nonlinear operations.
    """
    graph = relaxation.graph
    n = len(relaxation.region.low)
    constant = coefficients.new_zeros(n, coefficients.shape[1])
    error, stored = torch.zeros_like(constant), {}
    pending = {index: coefficients}
    for i in range(index, 0, -1):
        if i not in pending:
            continue
        a, node = pending.pop(i), graph.node(i)
        if rounded:
            error = error + _weighted(a.abs(), relaxation.error_of(i))
        if isinstance(node.operation, Linear):
            if (offset := node.operation.constant(a)) is not None:
                constant = constant + offset
            back = node.operation.transposed(a, [graph.shape_of(j) for j in node.inputs])
        else:
            if passed:
                stored[i] = a
            moved, offset = _relaxed(relaxation, i, a, choices)
            constant, back = constant + offset, (moved,)
        for j, moved in zip(node.inputs, back, strict=True):
            pending[j] = pending[j] + moved if j in pending else moved
    a = pending[0]
    if len(a) < n:
        a = a.expand(n, *a.shape[1:])
    lower = relaxation.region.minimum(a) + constant - error * 1.01
    return Substituted(lower, a, stored)


def _weighted(a: Tensor, values: Tensor) -> Tensor:
    """Sums (n, k) of the products of coefficients (n or 1, k, *shape) with values (n, features)."""
    rows = a.flatten(2)
    if len(rows) == 1:
        return values @ rows[0].t()
    return (rows @ values[:, :, None])[:, :, 0]


def _relaxed(relaxation: Relaxation, index: int, a: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
    """Coefficients and constants after the substitution of a nonlinear operation by its linear bounds."""
    lines, node = relaxation.lines_of(index), relaxation.graph.node(index)
    negative = a.clamp(max=0)
    if isinstance(lines, PoolLines):
        assert isinstance(node.operation, MaxPool)
        back = node.operation.transposed(a, lines, relaxation.graph.shape_of(node.inputs[0]))
        return back, _weighted(negative, lines.upper_offset.flatten(1))
    slopes, upper = lines.lower_slope[:, None], lines.upper_slope[:, None]
    if index in choices.slopes:
        low, high = relaxation.bound(node.inputs[0])
        slopes = torch.where(((low < 0) & (high > 0))[:, None], choices.slopes[index], slopes)
    back = torch.addcmul(a * slopes, negative, upper - slopes)
    if index in choices.multipliers:
        back = back - choices.multipliers[index]
    if isinstance(node.operation, ReLU):  # its lower bound has no offset
        return back, _weighted(negative, lines.upper_offset.flatten(1))
    offset = _weighted(a - negative, lines.lower_offset.flatten(1))
    return back, offset + _weighted(negative, lines.upper_offset.flatten(1))


def relaxed(
    graph: Graph, region: Region, *, substituted: bool = True, deadline: float = math.inf
) -> Relaxation:
    """Return the relaxation of a network over a region.

    Bounds of the inputs of nonlinear operations are computed in the order of execution. With `substituted`, those whose
    sign is not known are bounded by backward substitution; otherwise all bounds are those of interval arithmetic.
    `deadline` is a value of `time.perf_counter()` after which all further bounds are those of interval arithmetic, and
    the relaxation is marked as `stopped`.
    """
    relaxation = Relaxation(graph, region)
    if not substituted:
        return relaxation
    for index in graph.bounded:
        # in a ball that is no box, the interval of a sum is not exact
        if index != 0 and not (region.norm is None and _exact(graph, index)):
            refine(relaxation, index, deadline)
    return relaxation


def _exact(graph: Graph, index: int) -> bool:
    """Whether interval arithmetic is exact for a value: a linear function of the input with one mixing operation."""
    mixing = 0
    while index:
        node = graph.node(index)
        if len(node.inputs) != 1 or not isinstance(node.operation, Linear):
            return False
        mixing += node.operation.terms > 3
        index = node.inputs[0]
    return mixing <= 1


def refine(relaxation: Relaxation, index: int, deadline: float = math.inf) -> None:
    """Tighten the bounds of a value by backward substitution, where the sign of the value is not known, until the
    deadline.

    First the bound closer to zero is computed. Where it shows the sign of the input of a ReLU, the other bound is not
    needed.
    """
    low, high = relaxation.bound(index)
    # the values of a ReLU are exact where the sign of its input is known
    signed = _only_relu(relaxation.graph, index)
    below, above = low.flatten(1).clone(), high.flatten(1).clone()
    first = torch.where(-below <= above, 1.0, -1.0).to(low.dtype)
    for signs in (first, -first):
        unknown = (below < 0) & (above > 0) if signed else below < above
        most = int(unknown.sum(1).max())
        if not most:
            continue
        # the indices of the values of unknown sign, filled up to equal numbers with others
        chosen = unknown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        for rows in torch.split(chosen, _rows_at_once(relaxation.graph, index, len(low)), 1):
            if time.perf_counter() >= deadline:
                relaxation.stopped = True
                break
            sign = signs.gather(1, rows)
            lower = sign * lower_bounds(relaxation, index, rows, sign)
            old_below, old_above = below.gather(1, rows), above.gather(1, rows)
            below.scatter_(1, rows, torch.where(sign > 0, torch.maximum(old_below, lower), old_below))
            above.scatter_(1, rows, torch.where(sign < 0, torch.minimum(old_above, lower), old_above))
    relaxation.bounds[index] = (below.view_as(low), above.view_as(high))


def _rows_at_once(graph: Graph, index: int, n: int) -> int:
    """How many values of each of `n` examples are bounded at once, so that their coefficients fit into the memory."""
    widest = max(graph.shape_of(i).numel() for i in range(index + 1))
    return max(1, _ELEMENTS // (n * (_WINDOW if windows.local(graph, index) else widest)))


def lower_bounds(relaxation: Relaxation, index: int, chosen: Tensor, signs: Tensor) -> Tensor:
    """Return lower bounds (n, k) of the chosen values, indices (n, k), times signs (n, k)."""
    if windows.local(relaxation.graph, index):
        return windows.window_bounds(relaxation, index, chosen, signs)
    return substitute(relaxation, index, one_hot(chosen, signs, relaxation.graph.shape_of(index))).lower


def one_hot(chosen: Tensor, signs: Tensor, shape: torch.Size) -> Tensor:
    """Return the coefficients (n, k, *shape) of the chosen values, indices (n, k), times signs (n, k)."""
    one = torch.zeros(*chosen.shape, shape.numel(), dtype=signs.dtype, device=chosen.device)
    return one.scatter_(2, chosen[:, :, None], signs[:, :, None]).view(*chosen.shape, *shape)


def _only_relu(graph: Graph, index: int) -> bool:
    return all(
        isinstance(graph.node(i).operation, ReLU) for i in graph.nonlinear if graph.node(i).inputs[0] == index
    )
