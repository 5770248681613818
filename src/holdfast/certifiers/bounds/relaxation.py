"""The relaxation of a network over a region: bounds of its values, linear bounds of its nonlinear operations, and what
bounds the rounding errors of a substitution.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.certifiers.bounds.graph import ROUNDINGS, Graph, gamma, interval_of, largest
from holdfast.certifiers.bounds.linear import Interval, Linear
from holdfast.certifiers.bounds.nonlinear import Activation, Lines, MaxPool, PoolLines, ReLU
from holdfast.certifiers.bounds.region import Region


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

    stopped: bool = False
    """whether a deadline ended the computation of bounds, so that some are those of interval arithmetic"""

    def __post_init__(self) -> None:
        self.bounds.setdefault(0, self.region.box)

    def bound(self, index: int) -> Interval:
        """Return bounds of a value, computed by interval arithmetic if they are not known."""
        pending = [] if index in self.bounds else [index]
        while pending:  # not recursive: networks may have more operations than Python allows calls
            node = self.graph.node(pending[-1])
            missing = [i for i in node.inputs if i not in self.bounds]
            if not missing:
                self.bounds[pending.pop()] = interval_of(node, [self.bounds[i] for i in node.inputs])
            pending.extend(missing)
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
        # the coefficients of an input are summed over the operations that use it
        sums = max(self.graph.uses[i] for i in node.inputs)
        if isinstance(operation, Linear):
            return ROUNDINGS * operation.magnitude_bound(*sizes) * gamma(operation.terms + 4 + sums, dtype)
        lines, n_values = self.lines_of(index), node.shape.numel()
        if isinstance(lines, PoolLines):
            slopes = lines.upper + lines.lower
            assert isinstance(operation, MaxPool)
            moved = (slopes * operation.windows(sizes[0])).sum(-1)
            return (
                gamma(slopes.shape[-1] + 4 + sums, dtype) * moved
                + gamma(n_values, dtype) * lines.upper_offset.abs()
            )
        offsets = torch.maximum(lines.lower_offset.abs(), lines.upper_offset.abs())
        # the products with the slopes, and the rounding of the slopes themselves
        if isinstance(operation, ReLU):  # any slope from 0 to 1 may be chosen
            return gamma(8 + sums, dtype) * sizes[0] + gamma(n_values, dtype) * offsets
        slopes = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
        return gamma(8 + sums, dtype) * slopes * sizes[0] + gamma(n_values, dtype) * offsets

    def of(self, rows: Tensor) -> "Relaxation":
        """Return the relaxation for some examples, given by their indices."""
        return Relaxation(
            self.graph,
            self.region.of(rows),
            {i: (low[rows], high[rows]) for i, (low, high) in self.bounds.items()},
            {i: type(each)(*(part[rows] for part in each)) for i, each in self.lines.items()},
            {i: error[rows] for i, error in self.errors.items()},
        )

    def replace_bounds(self, index: int, low: Tensor, high: Tensor) -> None:
        """Replace the bounds of a value by tighter ones. What was computed from the former bounds is forgotten."""
        self.bounds = {i: known for i, known in self.bounds.items() if i <= index}
        self.bounds[index] = (low, high)
        self.lines = {i: known for i, known in self.lines.items() if i < index}
        self.errors = {i: known for i, known in self.errors.items() if i < index}
