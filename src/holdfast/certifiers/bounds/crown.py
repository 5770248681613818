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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from holdfast.certifiers.bounds import windows
from holdfast.certifiers.bounds.graph import Graph, Region, Relaxation, gamma
from holdfast.certifiers.bounds.operations import (
    Activation,
    Curved,
    Dense,
    Differences,
    ExponentialSum,
    Interval,
    Linear,
    MaxPool,
    Planes,
    PoolLines,
    Product,
    ReLU,
    SumLines,
    weighted,
)

_ELEMENTS, _ON_CPU = 2**22, 2**20
"""largest numbers of coefficients of one value that are computed at once, on accelerators and on a CPU, whose cache
they should fit into"""
_DEEP = 3
"""number of nonlinear operations that a substitution must save so that it is ended before the input"""
_LATER = (2, 6)
"""least numbers of nonlinear operations between a value and the ends of such substitutions: one residual block, and
three of them"""
_MANY = 1024
"""number of values from which they are bounded by a substitution that ends before the input first"""
_WORTH = 0.25
"""part of the signs that a substitution that ends before the input must show, so that it is continued"""
_WASTE = 0.75
"""part of the examples with values to bound from which all examples are treated, without a selection of them"""


@dataclass(frozen=True)
class Choices:
    """Free choices of a substitution. Any choice gives valid bounds."""

    slopes: dict[int, Tensor] = field(default_factory=dict)
    """positions in [0, 1] of the slopes of lower lines between the smallest and the largest slope, (n, k, *shape), by
    the index of an activation; for a ReLU, they are used where the sign of the input is not known"""
    upper_slopes: dict[int, Tensor] = field(default_factory=dict)
    """the same for the upper lines of activations other than ReLUs"""
    multipliers: dict[int, Tensor] = field(default_factory=dict)
    """Lagrange multipliers (n, k, *shape) of the bounds of a value, by its index: those of the lower bound, minus those
    of the upper bound"""
    planes: dict[int, Tensor] = field(default_factory=dict)
    """numbers in [-1, 1] (n, 2, *joint shape) of the lower and of the upper planes of each single product, by the index
    of a product: s and t of `Product`"""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Choices":
        """Return the choices with every tensor changed by a function."""
        return Choices(*({i: change(each) for i, each in values.items()} for values in self.all))

    def of_function(self, k: int) -> "Choices":
        """Return the choices of the function with the index `k` alone."""
        of_it = self.mapped(lambda each: each[:, k : k + 1])
        return replace(of_it, planes=self.planes)

    def updated(self, others: "Choices") -> "Choices":
        """Return the choices, with those of others in place of the same ones."""
        return Choices(*({**mine, **theirs} for mine, theirs in zip(self.all, others.all, strict=True)))

    @staticmethod
    def joined(parts: "Sequence[Choices]") -> "Choices":
        """Return the choices of the rows of all parts, which are about the same operations."""
        return Choices(
            *(
                {i: torch.cat([each[i] for each in kinds]) for i in kinds[0]}
                for kinds in zip(*(part.all for part in parts), strict=True)
            )
        )

    @property
    def all(self) -> tuple[dict[int, Tensor], ...]:
        """All choices, by their kind."""
        return self.slopes, self.upper_slopes, self.multipliers, self.planes


NO_CHOICES = Choices()
"""the lines of `Activation.lines`, and no multipliers"""


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
    constant = Total(coefficients.new_zeros(n, coefficients.shape[1]))
    error, stored = torch.zeros_like(constant.sum), {}
    pending = {index: coefficients}
    for i in range(index, 0, -1):
        if i not in pending:
            continue
        a = pending.pop(i)
        if i in choices.multipliers:
            multiplier, bounds = choices.multipliers[i], relaxation.bound(i)
            a = a - multiplier
            constant = constant.plus(_of_bounds(bounds, multiplier), sized=rounded)
            if rounded:  # of the sum over the values, and of the difference
                sizes = weighted(multiplier.abs(), torch.maximum(*(each.abs() for each in bounds)))
                error = error + gamma(multiplier[0, 0].numel() + 4, a.dtype) * sizes
        if passed and not isinstance(graph.node(i).operation, Linear):
            stored[i] = a
        inputs, back, offset = _stepped(relaxation, i, a, choices)
        if rounded and not relaxation.moves(i):
            with torch.no_grad():  # gradients of rounding errors are not needed
                error = error + weighted(a.abs(), relaxation.error_of(i))
        constant = constant.plus(offset, sized=rounded)
        _add(pending, inputs, back)
    a = pending[0]
    if len(a) < n:
        a = a.expand(n, *a.shape[1:])
    lower = relaxation.region.minimum(a) + constant.sum
    if rounded:
        lower = finite(lower - (error + constant.rounding) * 1.01)
    return Substituted(lower, a, stored)


@dataclass(frozen=True)
class Total:
    """A sum of constants, with what bounds its rounding error."""

    sum: Tensor
    sizes: Tensor | float = 0.0
    """sum of the magnitudes"""
    terms: int = 1

    def plus(self, constant: Tensor | None, *, sized: bool = True) -> "Total":
        """Return the sum with one more constant; None is zero. Without `sized`, no error is bounded."""
        if constant is None:
            return self
        sizes = self.sizes + constant.abs() if sized else self.sizes
        return Total(self.sum + constant, sizes, self.terms + 1)

    @property
    def rounding(self) -> Tensor | float:
        """Bound of the rounding error of the sum, and of a last sum of it with another number."""
        return gamma(self.terms, self.sum.dtype) * self.sizes


def finite(lower: Tensor) -> Tensor:
    """Return lower bounds, with minus infinity for those that are NaN or infinity after an overflow, which prove
    nothing.
    """
    return torch.where(lower < torch.inf, lower, -torch.inf)


def _add(pending: dict[int, Tensor], inputs: Sequence[int], back: Sequence[Tensor]) -> None:
    """Add coefficients with respect to the inputs of an operation to those that are known."""
    for j, moved in zip(inputs, back, strict=True):
        pending[j] = pending[j] + moved if j in pending else moved


def _stepped(
    relaxation: Relaxation, index: int, a: Tensor, choices: Choices
) -> tuple[Sequence[int], Sequence[Tensor], Tensor | None]:
    """The values on which an operation depends, usually its inputs, the coefficients with respect to each, and the
    constants (n, k) or None for zero.
    """
    graph, node = relaxation.graph, relaxation.graph.node(index)
    if isinstance(node.operation, Linear):
        shapes = [graph.shape_of(j) for j in node.inputs]
        return node.inputs, node.operation.transposed(a, shapes), node.operation.constants(a)
    if isinstance(node.operation, ExponentialSum):
        lines = relaxation.lines_of(index)
        assert isinstance(lines, SumLines)
        back, constant = node.operation.transposed(a, lines)
        return graph.node(node.inputs[0]).inputs, (back,), constant
    return node.inputs, *_relaxed(relaxation, index, a, choices)


def _of_bounds(bounds: Interval, multiplier: Tensor) -> Tensor:
    """The least values (n, k) of the functions with the coefficients `multiplier` (n, k, *shape) over bounds of a
    value: what the multipliers of bounds add to a function whose coefficients they are subtracted from.
    """
    low, high = bounds
    return weighted(multiplier.clamp(min=0), low) + weighted(multiplier.clamp(max=0), high)


def _relaxed(
    relaxation: Relaxation, index: int, a: Tensor, choices: Choices
) -> tuple[Sequence[Tensor], Tensor]:
    """Coefficients and constants after the substitution of a nonlinear operation by its linear bounds."""
    lines, node = relaxation.lines_of(index), relaxation.graph.node(index)
    if isinstance(lines, Planes):
        assert isinstance(node.operation, Product)
        chosen = choices.planes.get(index)
        return node.operation.transposed(a, lines, None if chosen is None else (chosen[:, 0], chosen[:, 1]))
    negative = a.clamp(max=0)
    if isinstance(lines, PoolLines):
        assert isinstance(node.operation, MaxPool)
        back = node.operation.transposed(a, lines, relaxation.graph.shape_of(node.inputs[0]))
        return (back,), weighted(negative, lines.upper_offset)
    if index in choices.upper_slopes:
        assert isinstance(node.operation, Activation)
        positions = (choices.slopes[index], choices.upper_slopes[index])
        lines = node.operation.lines_at(positions, relaxation.bound(node.inputs[0]))
        back = torch.addcmul(a * lines.lower_slope, negative, lines.upper_slope - lines.lower_slope)
        offsets = (a - negative) * lines.lower_offset + negative * lines.upper_offset
        return (back,), offsets.flatten(2).sum(2)
    slopes, upper = lines.lower_slope[:, None], lines.upper_slope[:, None]
    if index in choices.slopes:
        low, high = relaxation.bound(node.inputs[0])
        slopes = torch.where(((low < 0) & (high > 0))[:, None], choices.slopes[index], slopes)
    back = torch.addcmul(a * slopes, negative, upper - slopes)
    if isinstance(node.operation, ReLU):  # its lower bound has no offset
        return (back,), weighted(negative, lines.upper_offset)
    offset = weighted(a - negative, lines.lower_offset)
    return (back,), offset + weighted(negative, lines.upper_offset)


def lowest(relaxation: Relaxation, rows: Tensor) -> Tensor:
    """Return lower bounds (n, k) of linear functions of the outputs (n, k, outputs): those of a substitution, and if
    the network has products or other functions whose linear bounds leave the intervals of their values, those from the
    intervals of the last hidden values where they are larger.
    """
    graph = relaxation.graph
    lower = substitute(relaxation, graph.output, rows).lower
    leaving = Product | ExponentialSum | Curved
    if not any(isinstance(graph.node(i).operation, leaving) for i in graph.nonlinear):
        return lower
    return torch.maximum(lower, finite(from_intervals(relaxation, rows)))


def from_intervals(relaxation: Relaxation, rows: Tensor) -> Tensor:
    """Return lower bounds (n, k) of linear functions of the outputs (n, k, outputs) from the bounds of the last hidden
    values: the last operation is substituted if it is linear, because the interval of a difference of logits is smaller
    than the difference of their intervals.
    """
    graph = relaxation.graph
    last = graph.node(graph.output)
    at, constant, error = graph.output, rows.new_zeros(rows.shape[:2]), rows.new_zeros(rows.shape[:2])
    if isinstance(last.operation, Dense):
        error = weighted(rows.abs(), relaxation.error_of(at))
        added, (rows,) = last.operation.constants(rows), last.operation.transposed(rows, [])
        constant, at = constant if added is None else added, last.inputs[0]
    low, high = (each.flatten(1) for each in relaxation.bound(at))
    return Region(low, high, low).minimum(rows.flatten(2)) + constant - error * 1.01


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
        if index != 0 and not (region.norm is None and _exact(graph, index)) and not _by_input(graph, index):
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


def _by_input(graph: Graph, index: int) -> bool:
    """Whether the interval of a value is exact for the bounds of the input of a function of single values, or of a sum
    of exponentials, both of which are those of a substitution.
    """
    operation = graph.node(index).operation
    return isinstance(operation, Activation | ExponentialSum) and not isinstance(operation, ReLU)


def refine(relaxation: Relaxation, index: int, deadline: float = math.inf) -> None:
    """Tighten the bounds of a value by backward substitution, where the sign of the value is not known, until the
    deadline.

    First the bound closer to zero is computed. Where it shows the sign of the input of a ReLU, the other bound is not
    needed. In deep networks, a substitution that ends at a value in between shows most of the signs at a lower cost.
    """
    graph = relaxation.graph
    low, high = relaxation.bound(index)
    # the values of a ReLU are exact where the sign of its input is known
    signed = only_relu(graph, index)
    below, above = low.flatten(1).clone(), high.flatten(1).clone()
    first = torch.where(-below <= above, 1.0, -1.0).to(low.dtype)
    # a lower bound of a difference is an upper bound of the opposite one
    opposite = isinstance(graph.node(index).operation, Differences)
    if opposite:
        first = torch.ones_like(first)
    for until in (*cuts(graph, index), 0) if signed else (0,):
        functions = Functions(relaxation, index, until)
        for signs in (first,) if until or opposite else (first, -first):
            unknown = (below < 0) & (above > 0) if signed else below < above
            for examples, rows in functions.pieces(unknown):
                if time.perf_counter() >= deadline:
                    relaxation.stopped = True
                    break
                sign = signs[examples[:, None], rows]
                lower = functions.of(examples).lower(rows, sign)
                place = (examples[:, None], rows)
                below[place] = torch.where(sign > 0, torch.maximum(below[place], lower), below[place])
                above[place] = torch.where(sign < 0, torch.minimum(above[place], -lower), above[place])
                if until and (lower > 0).float().mean() < _WORTH:
                    break
    below, above = below.view_as(low), above.view_as(high)
    if opposite:
        above = torch.minimum(above, -below.transpose(-1, -2))
    relaxation.bounds[index] = (below, above)


def cuts(graph: Graph, index: int) -> list[int]:
    """Return the values, the nearest first, at which a backward substitution from a value may end before the input.

    Every path from the input to the value passes through them. There are none for small values, whose substitution is
    cheap.
    """
    if graph.shape_of(index).numel() < _MANY:
        return []
    needed = sorted(graph.ancestors(index))
    deep = [i for i in graph.nonlinear if i in needed and i < index]
    chosen: list[int] = []
    earliest = index  # the earliest value that a value after the candidate depends on
    for i in reversed(needed):
        later = [j for j in deep if j > i]
        if (
            i in deep
            and i <= earliest
            and len(deep) - len(later) >= _DEEP
            and len(later) >= _LATER[len(chosen)]
        ):
            chosen.append(i)
            if len(chosen) == len(_LATER):
                break
        if i:
            earliest = min(earliest, *graph.node(i).inputs)
    return chosen


class Functions:
    """Lower bounds of single values of a node, or of linear functions of the values at one place, by a substitution
    that ends at the value `until`.
    """

    def __init__(self, relaxation: Relaxation, index: int, until: int) -> None:
        self.relaxation, self.index, self.until = relaxation, index, until
        self.frames = windows.frames(relaxation.graph, index, until)
        region = relaxation.region
        if until:
            low, high = relaxation.bound(until)
            region = Region(low, high, low)
        self.region = region
        self.largest = _ON_CPU if region.low.device.type == "cpu" else _ELEMENTS
        graph = relaxation.graph
        self.differences = bool(index) and isinstance(graph.node(index).operation, Differences)
        needed = [i for i in graph.ancestors(index) if i >= until]
        # coefficients of differences are those of their values
        shapes = {
            i: graph.shape_of(i)
            for i in needed
            if not i or not isinstance(graph.node(i).operation, Differences)
        }
        frames = {i: (shapes[i][0], frame.height, frame.width) for i, frame in self.frames.items()}
        self.elements = max(math.prod(frames.get(i, shape)) for i, shape in shapes.items())

    def pieces(self, unknown: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the values that are marked (n, values) in pieces whose coefficients fit into the memory, as the indices
        (m) of examples and those (m, k) of values of each. Examples with few values are filled up with others.
        """
        counts = unknown.sum(1)
        chosen = unknown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        start, most = 0, int(counts.max())
        while start < most:
            examples = (counts > start).nonzero()[:, 0]
            if len(examples) > _WASTE * len(counts):
                examples = torch.arange(len(counts), device=counts.device)
            stop = min(most, start + max(1, self.largest // (len(examples) * self.elements)))
            yield examples, chosen[examples, start:stop]
            start = stop

    def of(self, examples: Tensor) -> "Functions":
        """Return the functions for some examples, given by their indices."""
        if len(examples) == len(self.region.low):
            return self
        return Functions(self.relaxation.of(examples), self.index, self.until)

    def lower(self, chosen: Tensor, signs: Tensor) -> Tensor:
        """Return lower bounds (n, k) of the chosen values, indices (n, k), times signs (n, k)."""
        graph = self.relaxation.graph
        shape = graph.shape_of(self.index)
        if self.differences:
            (source,) = graph.node(self.index).inputs
            size = shape[-1]
            second, first = chosen // size, chosen // size**2 * size + chosen % size
            of_source = graph.shape_of(source)
            rows = one_hot(first, signs, of_source) - one_hot(second, signs, of_source)
            error = self.relaxation.error_of(self.index).gather(1, chosen)
            return self.lower_of(rows, source, error)
        if self.index in self.frames:
            return self.lower_of(windows.Windows.single(chosen, signs, shape))
        return self.lower_of(one_hot(chosen, signs, shape))

    def lower_of(
        self, functions: windows.Windows | Tensor, start: int | None = None, error: Tensor | None = None
    ) -> Tensor:
        """Return lower bounds (n, k) of linear functions of the value, with coefficients on windows of one place, if
        the value has a frame, or otherwise with those of the whole value (n, k, *shape). They may also be functions of
        an earlier value `start`, with a rounding error (n, k).
        """
        relaxation, graph = self.relaxation, self.relaxation.graph
        start = self.index if start is None else start
        on_windows: dict[int, list[windows.Windows]] = {}
        whole: dict[int, Tensor] = {}
        if isinstance(functions, windows.Windows):
            on_windows[start], a = [functions], functions.a
        else:
            whole[start] = a = functions
        constant, error = (
            Total(a.new_zeros(a.shape[:2])),
            a.new_zeros(a.shape[:2]) if error is None else error,
        )
        for i in range(start, self.until, -1):
            inputs: Sequence[int] = graph.node(i).inputs
            if i in on_windows:
                joined = windows.Windows.joined(on_windows.pop(i), self.frames[i])
                moved, offset, rounding = windows.step(relaxation, i, joined)
                constant, error = constant.plus(offset), error + rounding
                for j, part in zip(inputs, moved, strict=True):
                    if j in self.frames:
                        on_windows.setdefault(j, []).append(part)
                    else:
                        _add(whole, (j,), (part.whole(graph.shape_of(j)),))
            elif i in whole:
                a = whole.pop(i)
                inputs, back, added = _stepped(relaxation, i, a, NO_CHOICES)
                if not relaxation.moves(i):
                    with torch.no_grad():  # gradients of rounding errors are not needed
                        error = error + weighted(a.abs(), relaxation.error_of(i))
                constant = constant.plus(added)
                _add(whole, inputs, back)
        if self.until in on_windows:
            last = windows.Windows.joined(on_windows[self.until], self.frames[self.until])
            least = last.minimum(self.region)
        else:
            least = self.region.minimum(whole[self.until])
        return finite(least + constant.sum - (error + constant.rounding) * 1.01)


def one_hot(chosen: Tensor, signs: Tensor, shape: torch.Size) -> Tensor:
    """Return the coefficients (n, k, *shape) of the chosen values, indices (n, k), times signs (n, k)."""
    one = torch.zeros(*chosen.shape, shape.numel(), dtype=signs.dtype, device=chosen.device)
    return one.scatter_(2, chosen[:, :, None], signs[:, :, None]).view(*chosen.shape, *shape)


def only_relu(graph: Graph, index: int) -> bool:
    """Return whether ReLUs are the only nonlinear operations on a value, so that only its sign matters."""
    return all(
        isinstance(graph.node(i).operation, ReLU) for i in graph.nonlinear if index in graph.node(i).inputs
    )
