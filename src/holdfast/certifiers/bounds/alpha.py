"""Optimised slopes and multipliers of linear bounds, and the network that remains of a ReLU network in a region."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from holdfast.certifiers.bounds.crown import NO_CHOICES, Choices, Total, one_hot, only_relu, substitute
from holdfast.certifiers.bounds.graph import Graph, Node, Relaxation, gamma
from holdfast.certifiers.bounds.operations import (
    Activation,
    Convolution,
    Dense,
    Interval,
    Linear,
    Lines,
    Product,
    ReLU,
)

_RATE, _FINE_RATE, _DECAY = 0.25, 0.03, 0.93
"""step sizes of Adam for the slopes of ReLUs and for those of other activations, whose first slopes are nearly the best
ones, and the factor of both after each step"""
_LEAST = 1e-20
"""least magnitude of a multiplier of an assumed bound"""
_SHARPENED = 512
"""largest number of inputs of functions other than ReLUs whose bounds are optimised, as those of wide layers gain
little for their cost"""
_PRODUCTS = 2**14
"""largest number of single products of an operation whose planes are optimised"""
_ELEMENTS = 2**21
"""largest number of coefficients of one value that are optimised at once"""


@dataclass(frozen=True)
class Cuts:
    """Which bounds of a value are assumed in a subproblem, so that their multipliers are optimised."""

    low: Tensor
    """mask (n, *shape) of the assumed lower bounds"""
    high: Tensor
    """mask (n, *shape) of the assumed upper bounds"""

    def limit_(self, multipliers: Tensor) -> None:
        """Change multipliers (n, k, *shape) in place to the nearest ones whose bound with their sign is assumed.

        They are not zero there, because the gradient at zero would be that of the sum of both bounds.
        """
        low, high = self.low[:, None], self.high[:, None]
        one_sided = torch.where(low, multipliers.clamp(min=_LEAST), multipliers.clamp(max=-_LEAST))
        multipliers.copy_(torch.where(low & high, multipliers, torch.where(low | high, one_sided, 0.0)))


@dataclass(frozen=True)
class Optimised:
    """Result of an optimisation."""

    lower: Tensor
    """lower bounds (n, k) of the linear functions, reduced by the rounding error"""
    choices: Choices
    """the choices with which they were computed"""


def optimised(
    relaxation: Relaxation,
    index: int,
    coefficients: Tensor,
    *,
    steps: int,
    start: Choices = NO_CHOICES,
    cuts: Mapping[int, Cuts] | None = None,
    until_positive: bool = True,
) -> Optimised:
    """Return lower bounds of linear functions of a value, with slopes and planes that are optimised by Adam.

    `coefficients` are (n, k, *shape). `cuts`, by the index of a value, are the bounds whose multipliers are optimised
    too. With `until_positive`, functions with a positive bound are not optimised further.
    """
    cuts = cuts or {}
    choices = started(relaxation, index, coefficients, start, cuts)
    parameters = [each for values in choices.all for each in values.values()]
    if not parameters or not steps:
        return Optimised(substitute(relaxation, index, coefficients, start).lower, start)
    for i, multipliers in choices.multipliers.items():
        cuts[i].limit_(multipliers)
    optimiser = _optimiser(choices)
    best = torch.full(
        coefficients.shape[:2], -torch.inf, dtype=coefficients.dtype, device=coefficients.device
    )
    shared = best[:, :1]
    kept = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps + 1):
        with torch.enable_grad():
            lower = substitute(relaxation, index, coefficients, choices, rounded=False).lower
            better = lower.detach() > best
            if choices.planes:  # all functions of an example share them
                value = lower.detach().clamp(max=0 if until_positive else torch.inf).sum(1, keepdim=True)
                better = (value > shared).expand_as(best)
                shared = torch.maximum(shared, value)
            best = torch.where(better, lower.detach(), best)
            for known, parameter in zip(kept, parameters, strict=True):
                mask = better if parameter.shape[:2] == better.shape else better[:, :1]
                mask = mask.reshape(*mask.shape, *(1,) * (parameter.dim() - 2))
                known.copy_(torch.where(mask, parameter.detach(), known))
            open_rows = best <= 0 if until_positive else torch.ones_like(better)
            if step == steps or not open_rows.any():
                break
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward((lower * open_rows).sum())
        optimiser.step()
        with torch.no_grad():
            for parameter in (*choices.slopes.values(), *choices.upper_slopes.values()):
                parameter.clamp_(0, 1)
            for parameter in choices.planes.values():
                parameter.clamp_(-1, 1)
            for i, parameter in choices.multipliers.items():
                cuts[i].limit_(parameter)
        for group in optimiser.param_groups:
            group["lr"] *= _DECAY
    values = iter(kept)
    choices = choices.mapped(lambda _: next(values))
    with torch.no_grad():
        return Optimised(substitute(relaxation, index, coefficients, choices).lower, choices)


def _optimiser(choices: Choices) -> torch.optim.Optimizer:
    """Adam for the choices, whose gradients are computed from now on."""
    of_relus = [slopes for i, slopes in choices.slopes.items() if i not in choices.upper_slopes]
    fine = [slopes[i] for slopes in (choices.slopes, choices.upper_slopes) for i in choices.upper_slopes]
    groups = [
        {"params": of_relus, "lr": _RATE},
        {"params": [*fine, *choices.planes.values()], "lr": _FINE_RATE},
        {"params": list(choices.multipliers.values()), "lr": _RATE / 2},
    ]
    for values in choices.all:
        for parameter in values.values():
            parameter.requires_grad_()
    return torch.optim.Adam([group for group in groups if group["params"]], maximize=True)


def started(
    relaxation: Relaxation, index: int, coefficients: Tensor, start: Choices, values: Iterable[int]
) -> Choices:
    """Return copies of the choices from which an optimisation starts, for all activations before a value whose lines
    are not exact, for small products, and for the multipliers of the bounds of the given values.
    """
    graph, ancestors, (n, k) = relaxation.graph, relaxation.graph.ancestors(index), coefficients.shape[:2]
    chosen = Choices({}, {}, {}, {})
    for i in graph.nonlinear:
        operation = graph.node(i).operation
        if i not in ancestors:
            continue
        if isinstance(operation, Product):
            joint = operation.joint_shape([graph.shape_of(j) for j in graph.node(i).inputs])
            if joint.numel() <= _PRODUCTS:
                known = start.planes.get(i)
                if known is None:
                    usual = coefficients.new_tensor(operation.usual).view(1, 2, *[1] * len(joint))
                    known = usual.expand(len(relaxation.region.low), 2, *joint)
                chosen.planes[i] = known.detach().clone()
        if not isinstance(operation, Activation):
            continue
        low, high = relaxation.bound(graph.node(i).inputs[0])
        relu = isinstance(operation, ReLU)
        if not bool(((low < 0) & (high > 0) if relu else low < high).any()):
            continue
        kinds = [(start.slopes, chosen.slopes), (start.upper_slopes, chosen.upper_slopes)][: 2 - relu]
        if not all(i in known for known, _ in kinds):
            first = [each[:, None].expand(n, k, *each.shape[1:]) for each in _positions(relaxation, i)]
        else:
            first = [known[i] for known, _ in kinds]
        for (_, new), value in zip(kinds, first, strict=False):
            new[i] = value.detach().clone()
    for i in values:
        assumed = start.multipliers.get(i)
        shape = (n, k, *graph.shape_of(i))
        chosen.multipliers[i] = coefficients.new_zeros(shape) if assumed is None else assumed.detach().clone()
    return chosen


def _positions(relaxation: Relaxation, index: int) -> tuple[Tensor, Tensor]:
    """Positions (n, *shape) of the slopes of the lines of an activation between the smallest and the largest slope."""
    lines, node = relaxation.lines_of(index), relaxation.graph.node(index)
    assert isinstance(lines, Lines)
    assert isinstance(node.operation, Activation)
    if isinstance(node.operation, ReLU):
        return lines.lower_slope, lines.upper_slope
    least, most = node.operation.slope_range(relaxation.bound(node.inputs[0]))
    width = (most - least).clamp(min=torch.finfo(least.dtype).tiny)
    return tuple(((each - least) / width).clamp(0, 1) for each in (lines.lower_slope, lines.upper_slope))  # type: ignore[return-value]


def sharpen(relaxation: Relaxation, steps: int, deadline: float = math.inf) -> bool:
    """Tighten the bounds of all inputs of nonlinear operations, of ReLUs only those whose sign is not known, layer by
    layer, until the deadline, a value of `time.perf_counter()`. Return whether it was not reached.
    """
    return all(
        _sharpen(relaxation, index, steps, deadline)
        for index in relaxation.graph.bounded
        if index and not relaxation.graph.ancestors(index).isdisjoint(relaxation.graph.nonlinear)
    )


def _sharpen(relaxation: Relaxation, index: int, steps: int, deadline: float) -> bool:
    low, high = relaxation.bound(index)
    signed = only_relu(relaxation.graph, index)
    unknown = ((low < 0) & (high > 0) if signed else low < high).flatten(1)
    most = int(unknown.sum(1).max())
    if not most or (not signed and most > _SHARPENED):
        return True
    chosen = unknown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    shape = relaxation.graph.shape_of(index)
    n, below, above = len(low), low.flatten(1).clone(), high.flatten(1).clone()
    at_once = max(
        1, _ELEMENTS // (2 * n * max(relaxation.graph.shape_of(i).numel() for i in range(index + 1)))
    )
    in_time = True
    for start in range(0, most, at_once):
        in_time = time.perf_counter() < deadline
        if not in_time:
            break
        rows = chosen[:, start : start + at_once]
        signs = torch.ones(len(rows), 2 * rows.shape[1], dtype=low.dtype, device=low.device)
        signs[:, rows.shape[1] :] = -1.0
        functions = one_hot(rows.repeat(1, 2), signs, shape)
        lower = optimised(relaxation, index, functions, steps=steps, until_positive=signed).lower
        half = rows.shape[1]
        below.scatter_(1, rows, torch.maximum(below.gather(1, rows), lower[:, :half]))
        above.scatter_(1, rows, torch.minimum(above.gather(1, rows), -lower[:, half:]))
    relaxation.replace_bounds(index, below.view_as(low), above.view_as(high))
    return in_time


@dataclass(frozen=True, eq=False)
class AffineSum(Linear):
    """Affine function of several values: y = sum_i x_i W_i^T + b, with x_i flattened, `weights` W_i (out, in_i), and
    `bias` (out).
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    error: Tensor
    """by how much each output (out) may differ from that of the network, with the rounding errors of both"""

    @property
    def terms(self) -> int:  # type: ignore[override]
        """Larger one of the numbers of all inputs and of the outputs, plus one for the offset."""
        return max(sum(weight.shape[1] for weight in self.weights), len(self.bias)) + 1

    def _applied(self, x: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        total = F.linear(x[0].flatten(1), weights[0])
        for value, weight in zip(x[1:], weights[1:], strict=True):
            total = total + F.linear(value.flatten(1), weight)
        return total

    def __call__(self, *x: Tensor) -> Tensor:
        """Return the sum of the products, plus b."""
        return self._applied(x, self.weights) + self.bias

    def interval(self, *x: Interval) -> Interval:
        """Return the exact range of each output by interval arithmetic with centre and radius."""
        centre = self(*((low + high) / 2 for low, high in x))
        radius = self._applied([(high - low) / 2 for low, high in x], [each.abs() for each in self.weights])
        return centre - radius, centre + radius

    def transposed(self, a: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        """Return a W_i, in the shape of each input."""
        return tuple(
            (a @ weight).view(*a.shape[:2], *shape)
            for weight, shape in zip(self.weights, shapes, strict=True)
        )

    def constants(self, a: Tensor) -> Tensor | None:
        """Return a b."""
        return a @ self.bias

    def magnitude_bound(self, *x: Tensor) -> Tensor:
        """Return sum_i x_i |W_i|^T + |b|, and what adds the error of the matrices to the rounding error."""
        sums = self._applied(x, [weight.abs() for weight in self.weights]) + self.bias.abs()
        return sums + self.error / gamma(self.terms + 4, self.error.dtype)


def reducible(relaxation: Relaxation) -> bool:
    """Return whether bounds of the network that remains cost less than those of the network: if it has no nonlinear
    operations other than ReLUs, and the matrices are small.
    """
    graph = relaxation.graph
    if len(relaxation.region.low) != 1 or any(
        not isinstance(graph.node(i).operation, ReLU) for i in graph.nonlinear
    ):
        return False
    entries, before = 0, graph.shape.numel()
    for relu in graph.nonlinear:
        count = len(_unknown(relaxation, relu))
        entries, before = entries + before * count, before + count
    if before == graph.shape.numel():  # a linear function, about which there is nothing to search
        return False
    entries += before * graph.shape_of(graph.output).numel()
    return entries <= sum(_products(node) for node in graph.nodes)


def _products(node: Node) -> int:
    """Number of products in one backward substitution of an operation."""
    if isinstance(node.operation, Dense):
        return node.operation.weight.shape[1] * node.shape.numel()
    if isinstance(node.operation, Convolution):
        return node.operation.weight[0].numel() * node.shape.numel()
    return node.shape.numel()


def reduced(relaxation: Relaxation) -> Relaxation:
    """Return the relaxation of the network that remains, with the bounds of the given one, whose region contains one
    example. Inputs and outputs are those of the network, which must be `reducible`.
    """
    graph = relaxation.graph
    unknown = {i: _unknown(relaxation, i) for i in graph.nonlinear}
    kept = [i for i in graph.nonlinear if len(unknown[i])]
    nodes: list[Node] = []
    places: dict[int, int] = {}
    bounds: dict[int, Interval] = {}
    for relu in kept:
        index, chosen = graph.node(relu).inputs[0], unknown[relu]
        nodes.append(_expressed(relaxation, index, chosen, unknown, places))
        low, high = (each.flatten(1)[:, chosen] for each in relaxation.bound(index))
        bounds[len(nodes)] = low, high
        nodes.append(Node(ReLU(), (len(nodes),), nodes[-1].shape))
        places[relu] = len(nodes)
    outputs = torch.arange(graph.shape_of(graph.output).numel(), device=relaxation.region.low.device)
    nodes.append(_expressed(relaxation, graph.output, outputs, unknown, places))
    return Relaxation(Graph(graph.shape, tuple(nodes)), relaxation.region, bounds, stopped=relaxation.stopped)


def _unknown(relaxation: Relaxation, relu: int) -> Tensor:
    """Indices of the inputs of a ReLU whose sign is not known."""
    low, high = relaxation.bound(relaxation.graph.node(relu).inputs[0])
    return ((low < 0) & (high > 0)).flatten().nonzero()[:, 0]


def _expressed(
    relaxation: Relaxation,
    index: int,
    chosen: Tensor,
    unknown: Mapping[int, Tensor],
    places: Mapping[int, int],
) -> Node:
    """The chosen values of a node as an affine function of the input and of the ReLUs of unknown sign before it.

    It is a backward substitution that ends at those ReLUs, with the same rounding errors. `places` are the indices of
    the ReLUs in the new graph, by their indices in the old one.
    """
    graph = relaxation.graph
    ones = torch.ones(1, len(chosen), dtype=relaxation.region.low.dtype, device=chosen.device)
    rows = one_hot(chosen[None], ones, graph.shape_of(index))
    constant, error = Total(torch.zeros_like(ones)), torch.zeros_like(ones)
    weights: dict[int, Tensor] = {}
    pending = {index: rows}
    for i in range(index, 0, -1):
        if i not in pending:
            continue
        a, node = pending.pop(i), graph.node(i)
        error = error + a.abs().flatten(2)[0] @ relaxation.error_of(i)[0]
        if isinstance(node.operation, Linear):
            constant = constant.plus(node.operation.constants(a))
            back = node.operation.transposed(a, [graph.shape_of(j) for j in node.inputs])
        else:
            if i in places:
                weights[places[i]] = a.flatten(2)[0, :, unknown[i]]
            low, _ = relaxation.bound(node.inputs[0])
            back = (a * (low >= 0)[:, None],)
        for j, moved in zip(node.inputs, back, strict=True):
            pending[j] = pending[j] + moved if j in pending else moved
    weights[0] = pending[0].flatten(2)[0]
    inputs = tuple(sorted(weights))
    error = (error + constant.rounding) * 1.01
    affine = AffineSum(tuple(weights[i] for i in inputs), constant.sum[0], error[0])
    return Node(affine, inputs, torch.Size([len(chosen)]))


_PENALTY = 1e3
"""cost of the violation of an assumed sign, in units of the largest coefficient of the claim: signs that contradict
each other give a positive optimum, and multipliers that prove it"""


class SolvedLeaf(NamedTuple):
    """Result of the linear program."""

    bound: float
    """proved lower bound of the largest function of the claim; minus infinity if the solver failed"""
    point: Tensor
    """input (1, *shape) of the region at which the largest function is smallest, up to rounding"""


def solved_leaf(
    relaxation: Relaxation, cuts: Mapping[int, Cuts], rows: Tensor, constants: Tensor
) -> SolvedLeaf:
    """Return the bound of a claim with the functions `rows` (k, outputs) and `constants` (k) for one subproblem.

    `relaxation` has one example, whose region is a box, ReLUs as its only nonlinear operations, and bounds that are cut
    at zero where a sign is assumed; `cuts` are these bounds by the index of the value.
    """
    graph, region = relaxation.graph, relaxation.region
    claim, claim_constants = _linear(relaxation, graph.output, rows[None])
    assumed, places = [], []
    signs = {index: cut.low.to(rows) - cut.high.to(rows) for index, cut in cuts.items()}
    for index, sign in signs.items():
        flat = sign.flatten()
        chosen = flat.nonzero()[:, 0]
        if not len(chosen):
            continue
        functions = torch.zeros(1, len(chosen), len(flat), dtype=rows.dtype, device=rows.device)
        functions[0, torch.arange(len(chosen)), chosen] = flat[chosen]
        assumed.append(_linear(relaxation, index, functions.view(1, len(chosen), *sign.shape[1:])))
        places.append((index, chosen))
    middle = (region.low + region.high) / 2
    solution = _program(
        np.concatenate((claim, *(each for each, _ in assumed))),
        np.concatenate((claim_constants + constants.double().cpu().numpy(), *(each for _, each in assumed))),
        len(rows),
        region.low.double().flatten().cpu().numpy(),
        region.high.double().flatten().cpu().numpy(),
    )
    if solution is None:
        return SolvedLeaf(-np.inf, middle)
    x, weights, multipliers = solution
    point = torch.as_tensor(x).to(region.low).view_as(region.low)
    weight = torch.as_tensor(weights).to(rows)
    chosen_multipliers, start = {}, 0
    for index, chosen in places:
        values = torch.zeros(signs[index].numel(), dtype=rows.dtype, device=rows.device)
        part = torch.as_tensor(multipliers[start : start + len(chosen)]).to(rows)
        values[chosen] = part * signs[index].flatten()[chosen]
        chosen_multipliers[index] = values.view(1, 1, *signs[index].shape[1:])
        start += len(chosen)
    lower = substitute(
        relaxation, graph.output, (weight @ rows)[None, None], Choices(multipliers=chosen_multipliers)
    ).lower
    bound = float(lower.double()) + float(weight.double() @ constants.double())
    # the sum of the constants is rounded, and so is that of the functions with their weights
    slack = 8 * len(rows) * torch.finfo(rows.dtype).eps
    largest = float(weight.double() @ constants.double().abs()) + (
        _largest_sum(relaxation, rows) if len(rows) > 1 else 0.0
    )
    return SolvedLeaf(bound - slack * largest, point)


def _largest_sum(relaxation: Relaxation, rows: Tensor) -> float:
    """A bound of the sum of the magnitudes of the terms of every function."""
    low, high = relaxation.bound(relaxation.graph.output)
    return float((torch.maximum(low.abs(), high.abs()) @ rows.abs().t()).amax())


def _linear(
    relaxation: Relaxation, index: int, functions: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients (k, d) and constants (k) in terms of the input of functions of a value."""
    result = substitute(relaxation, index, functions, rounded=False)
    a = result.coefficients.flatten(2)[0].double()
    region = relaxation.region
    lowest = torch.where(a > 0, a * region.low.double().flatten(), a * region.high.double().flatten()).sum(1)
    return a.cpu().numpy(), (result.lower[0].double() - lowest).cpu().numpy()


def _program(
    functions: NDArray[np.float64],
    constants: NDArray[np.float64],
    k: int,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Minimise the largest of the first `k` functions where the others are at least zero.

    Returns the input, the weights of the first functions, which are nonnegative with sum 1, and the multipliers of the
    others; None if the solver failed.
    """
    if not (np.isfinite(functions).all() and np.isfinite(constants).all()):
        return None
    m, d = len(functions) - k, functions.shape[1]
    # variables: input, largest function, violation of each of the other functions
    cost = np.concatenate(
        (np.zeros(d), [1.0], np.full(m, _PENALTY * max(1.0, float(np.abs(functions[:k]).max()))))
    )
    matrix = np.zeros((k + m, d + 1 + m))
    matrix[:k, :d], matrix[:k, d] = functions[:k], -1.0
    matrix[k:, :d], matrix[k:, d + 1 :] = -functions[k:], -np.eye(m)
    bounds = [*zip(low, high, strict=True), (None, None), *[(0.0, None)] * m]
    right = np.concatenate((-constants[:k], constants[k:]))
    from scipy.optimize import linprog  # late: it takes a quarter of a second, and few searches need it

    solved = linprog(cost, A_ub=matrix, b_ub=right, bounds=bounds, method="highs")
    if solved.status != 0:
        return None
    duals = np.maximum(-solved.ineqlin.marginals, 0.0)
    total = duals[:k].sum()
    if not total > 0:
        return None
    return np.clip(solved.x[:d], low, high), duals[:k] / total, duals[k:] / total
