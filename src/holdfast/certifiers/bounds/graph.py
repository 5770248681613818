"""Sets of inputs around examples, the graph of operations with bounds of all values, and their linear relaxation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from holdfast.certifiers.bounds import operations
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs

Operation = operations.Linear | operations.Activation | operations.MaxPool

ROUNDINGS = 2
"""number of times that the rounding error of an operation is counted: in the computation of its bounds, and in the
network itself, so that bounds contain what the network returns in the same data type, in any order of summation"""


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a network."""

    operation: Operation
    inputs: tuple[int, ...]
    """indices of the nodes whose values are the inputs; 0 is the input of the network"""
    shape: torch.Size
    """shape of the value for one example"""
    place: str = ""
    """place in the user's code"""


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as a list of operations in the order of their execution. The last one returns the logits.

    Node 0 is the input of the network, and node i the i-th operation of `nodes`, counted from 1.
    """

    shape: torch.Size
    """shape of one input"""
    nodes: tuple[Node, ...]

    @property
    def output(self) -> int:
        """Index of the node that returns the logits."""
        return len(self.nodes)

    def node(self, index: int) -> Node:
        """Return the operation with the given index, which is at least 1."""
        return self.nodes[index - 1]

    def shape_of(self, index: int) -> torch.Size:
        """Return the shape of a value for one example."""
        return self.shape if index == 0 else self.node(index).shape

    def ancestors(self, index: int) -> set[int]:
        """Return the indices of the values on which a value depends, with itself."""
        known, pending = {index}, [index]
        while pending:
            place = pending.pop()
            new = () if place == 0 else [i for i in self.node(place).inputs if i not in known]
            known.update(new)
            pending.extend(new)
        return known

    @cached_property
    def uses(self) -> tuple[int, ...]:
        """Number of times that each value is an input of an operation, by index."""
        counts = [0] * (len(self.nodes) + 1)
        for node in self.nodes:
            for i in node.inputs:
                counts[i] += 1
        return tuple(counts)

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """Indices of the nonlinear operations, in the order of execution."""
        return tuple(
            i for i, node in enumerate(self.nodes, 1) if not isinstance(node.operation, operations.Linear)
        )

    @cached_property
    def bounded(self) -> tuple[int, ...]:
        """Indices of the values that are inputs of nonlinear operations, in the order of execution."""
        return tuple(sorted({self.node(i).inputs[0] for i in self.nonlinear}))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits for a batch of inputs."""
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Return the values of all nodes for a batch of inputs, beginning with the inputs."""
        values = [x]
        for node in self.nodes:
            values.append(node.operation(*(values[i] for i in node.inputs)))
        return values

    def intervals(self, x: operations.Interval, *, rounded: bool = True) -> list[operations.Interval]:
        """Return bounds of the values of all nodes for all inputs within the given bounds (n, *shape).

        Bounds are enlarged by the rounding errors of their computation and of the network; without `rounded`, as in
        training, those of linear operations are not, which takes two thirds of the time. Gradients pass through them.
        """
        bounds = [x]
        for node in self.nodes:
            bounds.append(interval_of(node, [bounds[i] for i in node.inputs], rounded=rounded))
        return bounds

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Graph":
        """Return the graph with all of its constants in another data type or on another device."""
        return Graph(self.shape, tuple(_converted(node, dtype, device) for node in self.nodes))


def interval_of(
    node: Node, inputs: Sequence[operations.Interval], *, rounded: bool = True
) -> operations.Interval:
    """Return bounds of the values of an operation for inputs within the given bounds, enlarged by rounding errors.

    Without `rounded`, those of a linear operation are not enlarged.
    """
    operation = node.operation
    if not isinstance(operation, operations.Linear):
        return operation.interval(inputs[0])
    low, high = operation.interval(*inputs)
    if not operation.terms or not rounded:
        return low, high
    with torch.no_grad():
        sizes = operation.magnitude_bound(*(largest(each) for each in inputs))
        error = ROUNDINGS * sizes * gamma(operation.terms + 4, low.dtype)
    return low - error, high + error


def largest(x: operations.Interval) -> Tensor:
    """Return the largest magnitude within each interval."""
    return torch.maximum(x[0].abs(), x[1].abs())


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return the bound for the relative rounding error of a sum of `terms` products, in any order of summation."""
    product = (terms + 1) * torch.finfo(dtype).eps / 2
    return product / (1 - product) if product < 1 else math.inf


def _converted(node: Node, dtype: torch.dtype, device: torch.device | None) -> Node:
    changed = {}
    for name, value in vars(node.operation).items():
        if isinstance(value, Tensor):
            changed[name] = value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if not changed:
        return node
    operation = type(node.operation)(**{**vars(node.operation), **changed})
    return Node(operation, node.inputs, node.shape, node.place)


@dataclass(frozen=True, eq=False)
class Region:
    """Inputs in a box that are also in a ball, for each example of a batch.

    The ball has the Euclidean norm (`norm` 2) or the L1 norm (`norm` 1); a ball of the maximum norm is a box, so that
    `norm` is None.
    """

    low: Tensor
    """smallest value of each input, (n, *shape)"""
    high: Tensor
    """largest value of each input, (n, *shape)"""
    centre: Tensor
    """centres of the balls, (n, *shape)"""
    norm: int | None = None
    radius: float = 0.0

    @property
    def box(self) -> operations.Interval:
        """Smallest and largest value of each input."""
        return self.low, self.high

    def minimum(self, a: Tensor) -> Tensor:
        """Return lower bounds (n, k) of the linear functions a . x over the region, from their coefficients `a` (n, k,
        *shape). Bounds are reduced by their rounding error.

        For a box they are exact up to rounding. For a ball, the larger one of the minima over box and ball is returned.
        """
        rows = a.flatten(2)
        middle, radius = ((self.high + self.low) / 2).flatten(1), ((self.high - self.low) / 2).flatten(1)
        sizes = rows.abs()
        spread = torch.stack((radius, middle.abs() + radius), 2)
        products = sizes @ spread
        least = (rows @ middle[:, :, None])[:, :, 0] - products[:, :, 0]
        error = gamma(rows.shape[2] + 4, a.dtype) * products[:, :, 1]
        if self.norm is None:
            return least - error
        centre = self.centre.flatten(1)
        dual = rows.norm(dim=2) if self.norm == 2 else sizes.amax(2)
        in_ball = (rows @ centre[:, :, None])[:, :, 0] - self.radius * dual * (
            1 + gamma(rows.shape[2] + 4, a.dtype)
        )
        return torch.maximum(least, in_ball) - 2 * error

    def minimiser(self, a: Tensor) -> Tensor:
        """Return for each linear function a . x, with coefficients (n, k, *shape), an input of the region at which it
        is small: for a box the exact minimiser. The result has the shape of `a`.
        """
        low, high, centre = (each[:, None] for each in (self.low, self.high, self.centre))
        if self.norm is None:
            return torch.where(a > 0, low, high)
        if self.norm == 2:
            size = a.flatten(2).norm(dim=2).clamp(min=torch.finfo(a.dtype).tiny)
            step = a * (self.radius / size).reshape(*size.shape, *(1,) * (a.dim() - 2))
            return torch.maximum(torch.minimum(centre - step, high), low)
        largest = a.flatten(2).abs().argmax(2, keepdim=True)
        step = torch.zeros_like(a).flatten(2).scatter_(2, largest, self.radius).reshape(a.shape) * a.sign()
        return torch.maximum(torch.minimum(centre - step, high), low)

    def of(self, rows: Tensor) -> "Region":
        """Return the regions of the examples with the given indices."""
        return Region(self.low[rows], self.high[rows], self.centre[rows], self.norm, self.radius)

    def to(self, dtype: torch.dtype) -> "Region":
        """Return the regions in another data type, rounded outwards."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        low = torch.where(
            low.to(self.low.dtype) > self.low, low.nextafter(torch.full_like(low, -torch.inf)), low
        )
        high = torch.where(
            high.to(self.high.dtype) < self.high, high.nextafter(torch.full_like(high, torch.inf)), high
        )
        return Region(low, high, self.centre.to(dtype), self.norm, self.radius)


def region_of(x: Inputs, constraint: Constraint, bounds: Bounds) -> Region:
    """Return the inputs that a threat model allows in place of each of the inputs `x`, in the data type of `x`.

    The radius includes the tolerance with which the harness accepts an input (`core/constraints.py`, `allowed`), so
    that an accepted adversarial input is inside. Raises `UsageError` for a constraint that is no ball of Linf, L2 or
    L1.
    """
    if not isinstance(constraint, Linf | L2 | L1):
        raise UsageError(
            f"{constraint} cannot be certified; expected a ball of the norm linf, l2 or l1",
            Remedy("threat", "linf:8/255"),
        )
    low, high = (limit + shift for limit, shift in zip(bounds.like(x), (-1e-7, 1e-7), strict=True))
    norm = 2 if isinstance(constraint, L2) else 1 if isinstance(constraint, L1) else None
    # the norm of the rounding of all values
    values = x[0].numel() ** (0.0 if norm is None else 1 / norm) if len(x) else 1.0
    stored = torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs()).amax()
    eps = constraint.eps * (1 + 1e-6) + 1e-7 + float(stored) * values
    below, above = (x.double() - eps).to(x.dtype), (x.double() + eps).to(x.dtype)
    # rounding to the data type may move the ends inwards
    below = below.nextafter(torch.full_like(below, -torch.inf))
    above = above.nextafter(torch.full_like(above, torch.inf))
    free = constraint.changeable(x)
    below, above = torch.where(free, below, x), torch.where(free, above, x)
    least, most = torch.maximum(below, low), torch.minimum(above, high)
    if bool((least > most).any()):
        raise UsageError(
            "an input is further outside of the bounds of the model than eps, so that the threat model allows no input "
            "in its place; check the bounds of the model with holdfast doctor"
        )
    return Region(least, most, x, norm, 0.0 if norm is None else eps)


@dataclass(eq=False)
class Relaxation:
    """Bounds of the values of a network over a region, the linear bounds of its nonlinear operations, and what bounds
    the rounding errors of a substitution.
    """

    graph: Graph
    region: Region
    bounds: dict[int, operations.Interval] = field(default_factory=dict)
    """bounds of the values, by index"""
    lines: dict[int, operations.Lines | operations.PoolLines] = field(default_factory=dict)
    """linear bounds of the nonlinear operations, by index"""
    errors: dict[int, Tensor] = field(default_factory=dict)
    """rounding error of the substitution of an operation per unit of its coefficients, (n, *shape), by index"""

    stopped: bool = False
    """whether a deadline ended the computation of bounds, so that some are those of interval arithmetic"""

    def __post_init__(self) -> None:
        self.bounds.setdefault(0, self.region.box)

    def bound(self, index: int) -> operations.Interval:
        """Return bounds of a value, computed by interval arithmetic if they are not known."""
        pending = [] if index in self.bounds else [index]
        while pending:  # not recursive: networks may have more operations than Python allows calls
            node = self.graph.node(pending[-1])
            missing = [i for i in node.inputs if i not in self.bounds]
            if not missing:
                self.bounds[pending.pop()] = interval_of(node, [self.bounds[i] for i in node.inputs])
            pending.extend(missing)
        return self.bounds[index]

    def lines_of(self, index: int) -> operations.Lines | operations.PoolLines:
        """Return the linear bounds of a nonlinear operation, computed from the bounds of its input."""
        if index not in self.lines:
            node = self.graph.node(index)
            assert isinstance(node.operation, operations.Activation | operations.MaxPool)
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
        if isinstance(operation, operations.Linear):
            return ROUNDINGS * operation.magnitude_bound(*sizes) * gamma(operation.terms + 4 + sums, dtype)
        lines, n_values = self.lines_of(index), node.shape.numel()
        if isinstance(lines, operations.PoolLines):
            slopes = lines.upper + lines.lower
            assert isinstance(operation, operations.MaxPool)
            moved = (slopes * operation.windows(sizes[0])).sum(-1)
            return (
                gamma(slopes.shape[-1] + 4 + sums, dtype) * moved
                + gamma(n_values, dtype) * lines.upper_offset.abs()
            )
        offsets = torch.maximum(lines.lower_offset.abs(), lines.upper_offset.abs())
        # the products with the slopes, and the rounding of the slopes themselves
        if isinstance(operation, operations.ReLU):  # any slope from 0 to 1 may be chosen
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
