"""Sets of inputs around examples, the graph of operations with bounds of all values, and their linear relaxation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.certifiers.bounds import operations
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import NoBounds, Remedy, UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs

Operation = (
    operations.Linear
    | operations.Activation
    | operations.MaxPool
    | operations.Product
    | operations.ExponentialSum
)

_SUMMED = 1.01
"""factor for the rounding errors of the sums of magnitudes from which rounding errors are computed"""
_CONSTANTS = 2
"""number of roundings of a constant in the data type to which it was rounded, as of the reciprocal of a divisor"""
_BLOCKS = 32
"""largest number of parts of the minimum of a linear function over a region, each of which is summed for itself,
because the rounding error of a sum grows with its length"""
_FUSED = 16
"""number of roundings that are counted for the constants of an operation, which may be computed in several ways: the
factors of batch norm with reciprocal square roots of two units in the last place, or joined with the weights of the
layer before, and a division in place of a multiplication"""
_ELEMENTARY = 32
"""largest error of functions such as tanh in float32, in roundings of the larger one of argument and value: libraries
state up to four units in the last place of each elementary function, and GELU or softplus consist of several"""


_WITH_ERROR = (
    operations.Linear,
    operations.Product,
    operations.ReLU,
    operations.MaxPool,
    operations.Piecewise,
    operations.Smooth,
    operations.Curved,
)
"""operations whose error in float32 `network_error` states"""


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
    computed: Literal["exact", "float32", "float32 with probabilities"] = "exact"
    """arithmetic of the network: the value of the operation may differ from its exact value for the computed inputs by
    the error of float32; `with probabilities` if the network also computes probabilities of the values at its end"""
    name: str = ""
    """name of the operation of torch that was translated into this one, such as `aten.log`"""
    roundoff: float = 0.0
    """largest unit roundoff of the data types to which constants of the operation were rounded; 0 for exact ones"""
    inexact: bool = False
    """whether that operation is computed in another way, so that its rounding error in float32 is not known"""

    def __str__(self) -> str:
        """Name of the operation with its place."""
        name = self.name or type(self.operation).__name__
        return f"{name}, at {self.place}" if self.place else name

    @property
    def has_error(self) -> bool:
        """Whether the rounding error in float32 is known."""
        return not self.inexact and isinstance(self.operation, _WITH_ERROR)


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as a list of operations in the order of their execution. The last one returns the logits.

    Node 0 is the input of the network, and node i the i-th operation of `nodes`, counted from 1.
    """

    shape: torch.Size
    """shape of one input"""
    nodes: tuple[Node, ...]
    probabilities: bool = False
    """whether the network returns probabilities of the logits, or their logarithms, which are no operations here"""

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
        return tuple(sorted({j for i in self.nonlinear for j in self.node(i).inputs}))

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
        """Return the graph with all of its constants in another data type or on another device. Its bounds contain the
        values of this graph also if constants were rounded, and those of a graph with longer constants before it.
        """
        nodes = tuple(_converted(node, dtype, device) for node in self.nodes)
        return replace(self, nodes=nodes)

    def in_float32(self) -> "Graph":
        """Return the graph whose bounds contain the values that the network computes in float32, in any order of
        summation, also if they are computed in double precision.

        Raises `NoBounds` for an operation whose error is not known, with its place in the user's code.
        """
        for node in self.nodes:
            if not node.has_error:
                raise NoBounds(
                    f"the rounding error in float32 is not known for the operation {node}; replace it, or certify "
                    "the network in exact arithmetic (arithmetic: exact)"
                )
        nodes = [replace(node, computed="float32") for node in self.nodes]
        if self.probabilities:
            nodes[-1] = replace(nodes[-1], computed="float32 with probabilities")
        return replace(self, nodes=tuple(nodes))


def interval_of(
    node: Node, inputs: Sequence[operations.Interval], *, rounded: bool = True
) -> operations.Interval:
    """Return bounds of the values of an operation for inputs within the given bounds, enlarged by rounding errors.

    Without `rounded`, those of a linear operation are not enlarged.
    """
    operation = node.operation
    if not isinstance(operation, operations.Linear | operations.Product):
        low, high = operation.interval(inputs[0])
    else:
        low, high = operation.interval(*inputs)
        if rounded:
            low, high = _enlarged(node, inputs, (low, high))
    if node.computed != "exact":
        error = network_error(node, inputs)
        low, high = low - error, high + error
    if isinstance(operation, operations.Sum) and operation.least > -math.inf:
        low = low.clamp(min=operation.least)
    return low, high


def _enlarged(
    node: Node, inputs: Sequence[operations.Interval], x: operations.Interval
) -> operations.Interval:
    """Bounds of the values of an operation, enlarged by the rounding errors of their computation."""
    operation, (low, high) = node.operation, x
    assert isinstance(operation, operations.Linear | operations.Product)
    terms = _terms(operation, inputs)
    if not terms:
        return low, high
    with torch.no_grad():
        factor = _SUMMED * gamma(terms + 8, low.dtype) + _of_constants(node, low.dtype)
        if _monotone(operation):  # each bound depends on those of one side
            below, above = (operation.magnitude_bound(*(x[i].abs() for x in inputs)) for i in (0, 1))
            return low - factor * below, high + factor * above
        if isinstance(operation, operations.Scaled) and operation.offset is None:  # so do those of a product
            return low - factor * low.abs(), high + factor * high.abs()
        error = factor * operation.magnitude_bound(*(largest(each) for each in inputs))
    return low - error, high + error


def _of_constants(node: Node, dtype: torch.dtype) -> float:
    """Relative error of the constants of an operation, if they were rounded to a shorter data type than `dtype`, whose
    rounding errors contain it otherwise.
    """
    return _CONSTANTS * node.roundoff if node.roundoff > torch.finfo(dtype).eps / 2 else 0.0


def _monotone(operation: operations.Linear | operations.Product) -> bool:
    """Whether an operation has nonnegative weights, such as a sum."""
    shifted = isinstance(operation, operations.Scaled) and operation.scale is None
    return shifted or isinstance(operation, operations.Nonnegative)


def _terms(operation: operations.Linear | operations.Product, inputs: Sequence[operations.Interval]) -> int:
    if isinstance(operation, operations.Product):
        return operation.terms([each[0].shape[1:] for each in inputs])[0]
    return operation.terms


def network_error(node: Node, inputs: Sequence[operations.Interval]) -> Tensor:
    """Return by how much the value of an operation that a network computes in float32 may differ from its exact value,
    for computed inputs within the given bounds, (n, *shape).
    """
    operation, sizes = node.operation, [largest(each) for each in inputs]
    unit, least = torch.finfo(torch.float32).eps / 2, torch.finfo(torch.float32).tiny
    if isinstance(operation, operations.Linear | operations.Product):
        values, terms = operation.magnitude_bound(*sizes), _terms(operation, inputs)
        error = (
            values * gamma(terms + _FUSED, torch.float32) + terms * least
            if terms
            else torch.zeros_like(values)
        )
    else:
        values = largest(operation.interval(inputs[0]))
        if isinstance(operation, operations.Smooth | operations.Curved):
            error = _ELEMENTARY * unit * torch.maximum(sizes[0], values) + least
        elif isinstance(operation, operations.Piecewise):  # the points may be rounded
            error = torch.full_like(values, 2 * unit * max(map(abs, operation.points), default=0.0))
        else:  # returns one of its inputs, or zero
            assert isinstance(operation, operations.ReLU | operations.MaxPool)
            error = torch.zeros_like(values)
    if node.computed == "float32 with probabilities":
        # a softmax in float32 may map different logits to the same probability: others are further apart
        error = error + _ELEMENTARY * unit * (values + 1 + math.log(node.shape.numel()))
    # a sum that overflows in float32 is finite in double precision
    return torch.where(values < torch.finfo(torch.float32).max / 2, error, torch.inf)


def largest(x: operations.Interval) -> Tensor:
    """Return the largest magnitude within each interval."""
    return torch.maximum(x[0].abs(), x[1].abs())


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return the bound for the relative rounding error of a sum of `terms` products, in any order of summation."""
    product = (terms + 1) * torch.finfo(dtype).eps / 2
    return product / (1 - product) if product < 1 else math.inf


def _converted(node: Node, dtype: torch.dtype, device: torch.device | None) -> Node:
    roundoffs = [node.roundoff]

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            new = value.to(device, dtype)
            if bool((new.to(value) != value).any()):
                roundoffs.append(torch.finfo(dtype).eps / 2)
            return new
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(converted(each) for each in value)
        return value

    operation = type(node.operation)(
        **{name: converted(value) for name, value in vars(node.operation).items()}
    )
    return replace(node, operation=operation, roundoff=max(roundoffs))


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
    free: Tensor | None = None
    """mask of the values that may differ from the centre, which broadcasts to (n, *shape); None for all"""

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
        spread = torch.stack((radius, middle.abs() + radius), 1)
        length = max(64, math.ceil(rows.shape[2] / _BLOCKS))
        parts = [slice(start, start + length) for start in range(0, rows.shape[2], length)]
        products = torch.stack(
            [spread[:, :, part] @ sizes[:, :, part].transpose(1, 2) for part in parts]
        ).sum(0)
        least = _blocked(rows, middle, parts) - products[:, 0]
        error = _SUMMED * gamma(min(length, rows.shape[2]) + len(parts) + 4, a.dtype) * products[:, 1]
        if self.norm is None:
            return least - error
        centre = self.centre.flatten(1)
        free = sizes if self.free is None else sizes * self.free.expand_as(self.low).flatten(1)[:, None]
        dual = free.norm(dim=2) if self.norm == 2 else free.amax(2)
        in_ball = _blocked(rows, centre, parts) - self.radius * dual * (1 + gamma(rows.shape[2] + 4, a.dtype))
        return torch.maximum(least, in_ball) - 2 * error

    def minimiser(self, a: Tensor) -> Tensor:
        """Return for each linear function a . x, with coefficients (n, k, *shape), an input of the region at which it
        is small: for a box the exact minimiser. The result has the shape of `a`.
        """
        low, high, centre = (each[:, None] for each in (self.low, self.high, self.centre))
        if self.norm is None:
            return torch.where(a > 0, low, high)
        a = a if self.free is None else a * self.free[:, None]
        if self.norm == 2:
            size = a.flatten(2).norm(dim=2).clamp(min=torch.finfo(a.dtype).tiny)
            step = a * (self.radius / size).reshape(*size.shape, *(1,) * (a.dim() - 2))
            return torch.maximum(torch.minimum(centre - step, high), low)
        largest = a.flatten(2).abs().argmax(2, keepdim=True)
        step = torch.zeros_like(a).flatten(2).scatter_(2, largest, self.radius).reshape(a.shape) * a.sign()
        return torch.maximum(torch.minimum(centre - step, high), low)

    def of(self, rows: Tensor) -> "Region":
        """Return the regions of the examples with the given indices."""
        return Region(
            self.low[rows], self.high[rows], self.centre[rows], self.norm, self.radius, self._free_of(rows)
        )

    def _free_of(self, rows: Tensor) -> Tensor | None:
        if self.free is None or len(self.free) == 1:
            return self.free
        return self.free[rows]

    def to(self, dtype: torch.dtype) -> "Region":
        """Return the regions in another data type, rounded outwards."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        low = torch.where(
            low.to(self.low.dtype) > self.low, low.nextafter(torch.full_like(low, -torch.inf)), low
        )
        high = torch.where(
            high.to(self.high.dtype) < self.high, high.nextafter(torch.full_like(high, torch.inf)), high
        )
        return Region(low, high, self.centre.to(dtype), self.norm, self.radius, self.free)


def _blocked(rows: Tensor, values: Tensor, parts: Sequence[slice]) -> Tensor:
    """Sums (n, k) of the products of rows (n, k, d) with values (n, d), first over each part of the values."""
    return torch.stack([operations.weighted(rows[:, :, part], values[:, part]) for part in parts]).sum(0)


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
    few = None if norm is None or bool(free.all()) else free
    return Region(least, most, x, norm, 0.0 if norm is None else eps, few)


AnyLines = operations.Lines | operations.PoolLines | operations.Planes | operations.SumLines


@dataclass(eq=False)
class Relaxation:
    """Bounds of the values of a network over a region, the linear bounds of its nonlinear operations, and what bounds
    the rounding errors of a substitution.
    """

    graph: Graph
    region: Region
    bounds: dict[int, operations.Interval] = field(default_factory=dict)
    """bounds of the values, by index"""
    lines: dict[int, AnyLines] = field(default_factory=dict)
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

    def lines_of(self, index: int) -> AnyLines:
        """Return the linear bounds of a nonlinear operation, computed from the bounds of its inputs."""
        if index not in self.lines:
            node = self.graph.node(index)
            inputs = [self.bound(i) for i in node.inputs]
            if isinstance(node.operation, operations.Product):
                self.lines[index] = node.operation.planes(*inputs)
            else:
                assert not isinstance(node.operation, operations.Linear)
                self.lines[index] = node.operation.lines(*inputs)
        return self.lines[index]

    def undefined(self, ids: Tensor) -> dict[int, str]:
        """Return the first operation whose domain the bounds of an example leave, by the id of the example; `ids` (n)
        are those of all examples.
        """
        left: dict[int, str] = {}
        for node in self.graph.nodes:
            if isinstance(node.operation, operations.Curved):
                defined = node.operation.defined(self.bound(node.inputs[0])).flatten(1).all(1)
                for id_ in ids[~defined].tolist():
                    left.setdefault(id_, str(node))
        return left

    def moves(self, index: int) -> bool:
        """Return whether an operation only moves values that no other operation uses, so that its substitution makes no
        rounding error.
        """
        node = self.graph.node(index)
        moves = isinstance(node.operation, operations.Linear) and not node.operation.terms
        moves = moves and node.computed != "float32 with probabilities"
        return moves and all(self.graph.uses[i] == 1 for i in node.inputs)

    def error_of(self, index: int) -> Tensor:
        """Return the rounding error of the substitution of an operation, per unit of its coefficients."""
        if index not in self.errors:
            # they are multiplied by coefficients and summed, which makes a rounding error
            summed = 1 + gamma(self.graph.shape_of(index).numel(), self.region.low.dtype)
            self.errors[index] = self._error(index).flatten(1) * summed
        return self.errors[index]

    def _error(self, index: int) -> Tensor:
        node = self.graph.node(index)
        inputs = [self.bound(i) for i in node.inputs]
        error = self._error_of_bounds(index, [largest(each) for each in inputs])
        return error if node.computed == "exact" else error + network_error(node, inputs)

    def _error_of_bounds(self, index: int, sizes: Sequence[Tensor]) -> Tensor:
        node = self.graph.node(index)
        operation, dtype = node.operation, self.region.low.dtype
        # the coefficients of an input are summed over the operations that use it
        sums = max(self.graph.uses[i] for i in node.inputs)
        if isinstance(operation, operations.Scaled | operations.Sum):  # and over the copies of a value
            smallest = min(self.graph.shape_of(i).numel() for i in node.inputs)
            sums += node.shape.numel() // smallest - 1
        if isinstance(operation, operations.Linear):
            factor = gamma(operation.back_terms + 4 + sums, dtype) + _of_constants(node, dtype)
            # constants are sums over all values, and other coefficients are not
            offsets = operation.magnitude_bound(*(torch.zeros_like(each[:1]) for each in sizes))
            of_offsets = max(gamma(sum(node.shape) + 4, dtype) - factor, 0.0)
            return factor * operation.magnitude_bound(*sizes) + of_offsets * offsets
        lines, n_values = self.lines_of(index), node.shape.numel()
        if isinstance(operation, operations.Product):
            assert isinstance(lines, operations.Planes)
            # the slopes and the constants of any planes are at most those of the largest magnitudes
            forward, backward = operation.terms([self.graph.shape_of(i) for i in node.inputs])
            # the sums of the planes have as many terms as those of the products
            relative = gamma(backward + 2 * forward + 2 * sums + 16, dtype)
            return relative * operation.magnitude_bound(*sizes) + gamma(n_values + 8, dtype) * lines.spread
        if isinstance(operation, operations.ExponentialSum):
            # with the rounding errors of the differences, whose inputs get the coefficients
            assert isinstance(lines, operations.SumLines)
            (source,) = self.graph.node(node.inputs[0]).inputs
            differences = operations.Differences(node.shape[-1])
            sizes_of = differences.magnitude_bound(largest(self.bound(source)))
            moved = (torch.maximum(lines.lower_slope, lines.upper_slope) * sizes_of).sum(-1)
            terms = 2 * node.shape[-1] + 12 + self.graph.uses[source]
            offsets = torch.maximum(lines.lower_offset.abs(), lines.upper_offset.abs())
            # a coefficient of an infinite offset proves nothing without an error, too
            return gamma(terms, dtype) * moved + gamma(n_values, dtype) * offsets.nan_to_num(posinf=0.0)
        if isinstance(lines, operations.PoolLines):
            weights = lines.upper + lines.lower
            assert isinstance(operation, operations.MaxPool)
            moved = (weights * operation.windows(sizes[0])).sum(-1)
            return (
                gamma(weights.shape[-1] + 4 + sums, dtype) * moved
                + gamma(n_values, dtype) * lines.upper_offset.abs()
            )
        assert isinstance(lines, operations.Lines)
        offsets = torch.maximum(lines.lower_offset.abs(), lines.upper_offset.abs())
        # the products with the slopes, and the rounding of the slopes themselves
        if isinstance(operation, operations.ReLU):  # any slope from 0 to 1 may be chosen
            return gamma(8 + sums, dtype) * sizes[0] + gamma(n_values, dtype) * offsets
        assert isinstance(operation, operations.Activation)
        # any slope between the smallest and the largest one may be chosen
        slopes = largest(operation.slope_range(self.bound(node.inputs[0])))
        # the size may be infinite where the slope is zero
        moved = torch.where(slopes == 0, 0.0, slopes * sizes[0])
        return gamma(8 + sums, dtype) * moved + gamma(n_values, dtype) * (offsets + 2 * moved)

    def of(self, rows: Tensor) -> "Relaxation":
        """Return the relaxation for some examples, given by their indices."""
        return Relaxation(
            self.graph,
            self.region.of(rows),
            {i: (low[rows], high[rows]) for i, (low, high) in self.bounds.items()},
            {i: type(each)(*(part[rows] for part in each)) for i, each in self.lines.items()},
            {i: error[rows] for i, error in self.errors.items()},
        )

    def to(self, dtype: torch.dtype) -> "Relaxation":
        """Return the relaxation in a longer data type. Linear bounds are computed again, since their errors are bounded
        in the data type in which they were computed.
        """
        bounds = {i: (low.to(dtype), high.to(dtype)) for i, (low, high) in self.bounds.items()}
        return Relaxation(self.graph.to(dtype), self.region.to(dtype), bounds, stopped=self.stopped)

    def replace_bounds(self, index: int, low: Tensor, high: Tensor) -> None:
        """Replace the bounds of a value by tighter ones. What was computed from the former bounds is forgotten."""
        self.bounds = {i: known for i, known in self.bounds.items() if i <= index}
        self.bounds[index] = (low, high)
        self.lines = {i: known for i, known in self.lines.items() if i < index}
        self.errors = {i: known for i, known in self.errors.items() if i < index}
