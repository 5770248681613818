"""Optimised slopes and multipliers of linear bounds, and the network that remains of a ReLU network in a region."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from holdfast.certifiers.bounds.crown import NO_CHOICES, Choices, Total, one_hot, substitute
from holdfast.certifiers.bounds.graph import ROUNDINGS, Graph, Node, Relaxation, gamma
from holdfast.certifiers.bounds.operations import Convolution, Dense, Interval, Linear, Lines, ReLU

_RATE, _DECAY = 0.25, 0.93
"""step size of Adam for slopes, and its factor after each step"""
_ELEMENTS = 2**21
"""largest number of coefficients of one value that are optimised at once"""


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
    signs: Mapping[int, Tensor] | None = None,
    until_positive: bool = True,
) -> Optimised:
    """Return lower bounds of linear functions of a value, with slopes that are optimised by Adam.

    `coefficients` are (n, k, *shape). `signs` (n, *shape), by the index of a ReLU, are 1 for inputs that are assumed to
    be nonnegative, -1 for nonpositive ones and 0 otherwise; their multipliers are optimised too. With `until_positive`,
    functions with a positive bound are not optimised further.
    """
    slopes = {i: _initial(relaxation, i, coefficients, start) for i in _free(relaxation, index)}
    multipliers = {
        i: start.multipliers[i].abs().clone() if i in start.multipliers else _zeros(sign, coefficients)
        for i, sign in (signs or {}).items()
    }
    parameters = [*slopes.values(), *multipliers.values()]
    if not parameters or not steps:
        return Optimised(substitute(relaxation, index, coefficients, start).lower, start)
    for parameter in parameters:
        parameter.requires_grad_()
    groups = [
        {"params": list(slopes.values()), "lr": _RATE},
        {"params": list(multipliers.values()), "lr": _RATE / 2},
    ]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]], maximize=True)
    best = torch.full(
        coefficients.shape[:2], -torch.inf, dtype=coefficients.dtype, device=coefficients.device
    )
    kept = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps + 1):
        with torch.enable_grad():
            choices = Choices(slopes, {i: multipliers[i] * (signs or {})[i][:, None] for i in multipliers})
            lower = substitute(relaxation, index, coefficients, choices, rounded=False).lower
            better = lower.detach() > best
            best = torch.where(better, lower.detach(), best)
            for known, parameter in zip(kept, parameters, strict=True):
                mask = better.reshape(*better.shape, *(1,) * (parameter.dim() - 2))
                known.copy_(torch.where(mask, parameter.detach(), known))
            open_rows = best <= 0 if until_positive else torch.ones_like(better)
            if step == steps or not open_rows.any():
                break
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward((lower * open_rows).sum())
        optimiser.step()
        with torch.no_grad():
            for parameter in slopes.values():
                parameter.clamp_(0, 1)
            for parameter in multipliers.values():
                parameter.clamp_(min=0)
        for group in optimiser.param_groups:
            group["lr"] *= _DECAY
    final = dict(zip(slopes, kept, strict=False))
    chosen = {
        i: known * (signs or {})[i][:, None]
        for i, known in zip(multipliers, kept[len(slopes) :], strict=True)
    }
    choices = Choices(final, chosen)
    with torch.no_grad():
        return Optimised(substitute(relaxation, index, coefficients, choices).lower, choices)


def _free(relaxation: Relaxation, index: int) -> list[int]:
    """ReLUs before a value that have an input of unknown sign."""
    graph = relaxation.graph
    free, ancestors = [], graph.ancestors(index)
    for i in graph.nonlinear:
        if i in ancestors and isinstance(graph.node(i).operation, ReLU):
            low, high = relaxation.bound(graph.node(i).inputs[0])
            if bool(((low < 0) & (high > 0)).any()):
                free.append(i)
    return free


def _initial(relaxation: Relaxation, index: int, coefficients: Tensor, start: Choices) -> Tensor:
    n, k = coefficients.shape[:2]
    if index in start.slopes:
        return start.slopes[index].detach().clone()
    lines = relaxation.lines_of(index)
    assert isinstance(lines, Lines)
    return lines.lower_slope[:, None].expand(n, k, *lines.lower_slope.shape[1:]).detach().clone()


def _zeros(sign: Tensor, coefficients: Tensor) -> Tensor:
    return torch.zeros(
        len(sign), coefficients.shape[1], *sign.shape[1:], dtype=coefficients.dtype, device=sign.device
    )


def sharpen(relaxation: Relaxation, steps: int, deadline: float = math.inf) -> bool:
    """Tighten the bounds of all values that are inputs of ReLUs and whose sign is not known, layer by layer, until the
    deadline, a value of `time.perf_counter()`. Return whether it was not reached.
    """
    return all(
        _sharpen(relaxation, index, steps, deadline)
        for index in relaxation.graph.bounded
        if index and not relaxation.graph.ancestors(index).isdisjoint(relaxation.graph.nonlinear)
    )


def _sharpen(relaxation: Relaxation, index: int, steps: int, deadline: float) -> bool:
    low, high = relaxation.bound(index)
    unknown = ((low < 0) & (high > 0)).flatten(1)
    most = int(unknown.sum(1).max())
    if not most:
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
        lower = optimised(relaxation, index, functions, steps=steps).lower
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
        return sums + self.error / (ROUNDINGS * gamma(self.terms + 4, self.error.dtype))


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
    relaxation: Relaxation, signs: Mapping[int, Tensor], rows: Tensor, constants: Tensor
) -> SolvedLeaf:
    """Return the bound of a claim with the functions `rows` (k, outputs) and `constants` (k) for one subproblem.

    `relaxation` has one example, whose region is a box, and bounds that are cut at zero where a sign is assumed;
    `signs` are the assumed signs (1, *shape) by the index of the ReLU.
    """
    graph, region = relaxation.graph, relaxation.region
    claim, claim_constants = _linear(relaxation, graph.output, rows[None])
    assumed, places = [], []
    for index, sign in signs.items():
        flat = sign.flatten().to(rows)
        chosen = flat.nonzero()[:, 0]
        if not len(chosen):
            continue
        functions = torch.zeros(1, len(chosen), len(flat), dtype=rows.dtype, device=rows.device)
        functions[0, torch.arange(len(chosen)), chosen] = flat[chosen]
        node = graph.node(index).inputs[0]
        assumed.append(_linear(relaxation, node, functions.view(1, len(chosen), *sign.shape[1:])))
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
        values[chosen] = part * signs[index].flatten().to(rows)[chosen]
        chosen_multipliers[index] = values.view(1, 1, *signs[index].shape[1:])
        start += len(chosen)
    lower = substitute(
        relaxation, graph.output, (weight @ rows)[None, None], Choices({}, chosen_multipliers)
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
    solved = linprog(cost, A_ub=matrix, b_ub=right, bounds=bounds, method="highs")
    if solved.status != 0:
        return None
    duals = np.maximum(-solved.ineqlin.marginals, 0.0)
    total = duals[:k].sum()
    if not total > 0:
        return None
    return np.clip(solved.x[:d], low, high), duals[:k] / total, duals[k:] / total
