"""Linear bounds of a network by backward substitution (CROWN).

A lower bound of a linear function of a value is propagated backwards through the network: each linear operation is
substituted exactly, and each nonlinear one by its linear lower or upper bound, depending on the sign of its
coefficient. At the input, the minimum over the region of the threat model is the result. Zhang et al., "Efficient
Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018, arXiv:1811.00866; on graphs:
Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020,
arXiv:2002.12920. Differs: only values of which interval arithmetic does not know the sign are bounded by
substitution, and every bound is reduced by a bound of its rounding error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.certifiers.graph import Graph, gamma, interval_of, largest
from holdfast.certifiers.linear import Interval, Linear
from holdfast.certifiers.nonlinear import Activation, Lines, MaxPool, PoolLines, ReLU
from holdfast.certifiers.region import Region

_ELEMENTS = 2**22
"""largest number of coefficients of one value that are computed at once"""


@dataclass(eq=False)
class Relaxation:
    """Bounds of the values of a network over a region, the linear bounds of its nonlinear operations, and what bounds
    the rounding errors of a substitution.
    """

    graph: Graph
    region: Region
    bounds: dict[int, Interval] = field(default_factory=dict)
    """bounds of the values, by index"""
    lines: dict[int, Lines | PoolLines] = field(default_factory=dict)
    """linear bounds of the nonlinear operations, by index"""
    errors: dict[int, Tensor] = field(default_factory=dict)
    """rounding error of the substitution of an operation per unit of its coefficients, (n, *shape), by index"""

    def __post_init__(self) -> None:
        self.bounds.setdefault(0, self.region.box)

    def bound(self, index: int) -> Interval:
        """Return bounds of a value, computed by interval arithmetic if they are not known."""
        if index not in self.bounds:
            node = self.graph.node(index)
            self.bounds[index] = interval_of(node, [self.bound(i) for i in node.inputs])
        return self.bounds[index]

    def lines_of(self, index: int) -> Lines | PoolLines:
        """Return the linear bounds of a nonlinear operation, computed from the bounds of its input."""
        if index not in self.lines:
            node = self.graph.node(index)
            assert isinstance(node.operation, Activation | MaxPool)
            self.lines[index] = node.operation.lines(self.bound(node.inputs[0]))
        return self.lines[index]

    def error_of(self, index: int) -> Tensor:
        """Return the rounding error of the substitution of an operation, per unit of its coefficients."""
        if index not in self.errors:
            self.errors[index] = self._error(index).flatten(1)
        return self.errors[index]

    def _error(self, index: int) -> Tensor:
        node = self.graph.node(index)
        operation, dtype = node.operation, self.region.low.dtype
        sizes = [largest(self.bound(i)) for i in node.inputs]
        if isinstance(operation, Linear):
            return operation.magnitude(*sizes) * gamma(operation.terms + 4, dtype)
        lines, n_values = self.lines_of(index), node.shape.numel()
        if isinstance(lines, PoolLines):
            slopes = lines.upper + lines.lower
            assert isinstance(operation, MaxPool)
            moved = (slopes * operation.windows(sizes[0])).sum(-1)
            return gamma(slopes.shape[-1] + 4, dtype) * moved + gamma(n_values, dtype) * lines.upper_offset.abs()
        slopes = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
        offsets = torch.maximum(lines.lower_offset.abs(), lines.upper_offset.abs())
        return gamma(4, dtype) * slopes * sizes[0] + gamma(n_values, dtype) * offsets

    def tighten(self, index: int, low: Tensor, high: Tensor) -> None:
        """Replace the bounds of a value by the intersection with other valid bounds."""
        old_low, old_high = self.bound(index)
        self.bounds[index] = (torch.maximum(old_low, low), torch.minimum(old_high, high))


@dataclass(frozen=True)
class Substituted:
    """Result of a backward substitution."""

    lower: Tensor
    """lower bounds (n, k) of the linear functions, reduced by the rounding error"""
    coefficients: Tensor
    """coefficients (n, k, *shape) of the lower bounds with respect to the input"""


def substitute(relaxation: Relaxation, index: int, coefficients: Tensor) -> Substituted:
    """Return lower bounds of linear functions of a value, given by their coefficients (n, k, *shape of the value).

    The first dimension may be 1 if the functions are the same for all examples.
    """
    graph = relaxation.graph
    n = len(relaxation.region.low)
    constant = coefficients.new_zeros(n, coefficients.shape[1])
    error = torch.zeros_like(constant)
    pending = {index: coefficients}
    for i in range(index, 0, -1):
        if i not in pending:
            continue
        a, node = pending.pop(i), graph.node(i)
        error = error + _weighted(a.abs(), relaxation.error_of(i))
        if isinstance(node.operation, Linear):
            if (offset := node.operation.constant(a)) is not None:
                constant = constant + offset
            back = node.operation.transposed(a, [graph.shape_of(j) for j in node.inputs])
        else:
            moved, offset = _relaxed(relaxation, i, a)
            constant, back = constant + offset, (moved,)
        for j, moved in zip(node.inputs, back, strict=True):
            pending[j] = pending[j] + moved if j in pending else moved
    a = pending[0]
    if len(a) < n:
        a = a.expand(n, *a.shape[1:])
    lower = relaxation.region.minimum(a) + constant - error * 1.01
    return Substituted(lower, a)


def _weighted(a: Tensor, values: Tensor) -> Tensor:
    """Sums (n, k) of the products of coefficients (n or 1, k, *shape) with values (n, features)."""
    rows = a.flatten(2)
    if len(rows) == 1:
        return values @ rows[0].t()
    return (rows @ values[:, :, None])[:, :, 0]


def _relaxed(relaxation: Relaxation, index: int, a: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and constants after the substitution of a nonlinear operation by its linear bounds."""
    lines, node = relaxation.lines_of(index), relaxation.graph.node(index)
    negative = a.clamp(max=0)
    if isinstance(lines, PoolLines):
        assert isinstance(node.operation, MaxPool)
        back = node.operation.transposed(a, lines, relaxation.graph.shape_of(node.inputs[0]))
        return back, _weighted(negative, lines.upper_offset.flatten(1))
    slopes, difference = lines.lower_slope[:, None], (lines.upper_slope - lines.lower_slope)[:, None]
    back = torch.addcmul(a * slopes, negative, difference)
    if isinstance(node.operation, ReLU):  # its lower bound has no offset
        return back, _weighted(negative, lines.upper_offset.flatten(1))
    offset = _weighted(a - negative, lines.lower_offset.flatten(1))
    return back, offset + _weighted(negative, lines.upper_offset.flatten(1))


def relaxed(graph: Graph, region: Region, *, given: Mapping[int, Interval] | None = None, substituted: bool = True) -> Relaxation:
    """Return the relaxation of a network over a region.

    Bounds of the inputs of nonlinear operations are computed in the order of execution. With `substituted`, those whose
    sign is not known are bounded by backward substitution; otherwise all bounds are those of interval arithmetic.
    `given` are valid bounds that are known already.
    """
    relaxation = Relaxation(graph, region, dict(given or {}))
    if not substituted:
        return relaxation
    for index in graph.bounded:
        if index not in relaxation.bounds and index != 0 and not _exact(graph, index):
            refine(relaxation, index)
    return relaxation


def _exact(graph: Graph, index: int) -> bool:
    """Whether interval arithmetic is exact for a value: it is one sum of values that are each a function of one input."""
    mixing = 0
    while index:
        node = graph.node(index)
        if len(node.inputs) != 1 or not isinstance(node.operation, Linear):
            return False
        mixing += node.operation.terms > 3
        index = node.inputs[0]
    return mixing <= 1


def refine(relaxation: Relaxation, index: int) -> None:
    """Tighten the bounds of a value by backward substitution, where the sign of the value is not known."""
    low, high = relaxation.bound(index)
    if _only_relu(relaxation.graph, index):
        unknown = ((low < 0) & (high > 0)).flatten(1)
    else:
        unknown = (low < high).flatten(1)
    most = int(unknown.sum(1).max())
    if not most:
        return
    # the indices of the values of unknown sign, filled up to equal numbers with others
    chosen = unknown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    n, features = unknown.shape
    below, above = low.flatten(1).clone(), high.flatten(1).clone()
    step = max(1, _ELEMENTS // (2 * n * _widest(relaxation.graph, index)))
    for start in range(0, most, step):
        rows = chosen[:, start : start + step]
        one = torch.zeros(n, rows.shape[1], features, dtype=low.dtype, device=low.device)
        one.scatter_(2, rows[:, :, None], 1.0)
        a = torch.cat((one, -one), 1).unflatten(2, relaxation.graph.shape_of(index))
        lower = substitute(relaxation, index, a).lower
        half = rows.shape[1]
        below.scatter_(1, rows, torch.maximum(below.gather(1, rows), lower[:, :half]))
        above.scatter_(1, rows, torch.minimum(above.gather(1, rows), -lower[:, half:]))
    relaxation.bounds[index] = (below.view_as(low), above.view_as(high))


def _only_relu(graph: Graph, index: int) -> bool:
    return all(
        isinstance(graph.node(i).operation, ReLU) for i in graph.nonlinear if graph.node(i).inputs[0] == index
    )


def _widest(graph: Graph, index: int) -> int:
    return max(graph.shape_of(i).numel() for i in range(index + 1))
