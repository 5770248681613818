"""The network that remains of a ReLU network over a region, and exact solutions of its subproblems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from holdfast.certifiers.bounds.crown import Choices, Total, one_hot, substitute
from holdfast.certifiers.bounds.graph import ROUNDINGS, Graph, Node, Relaxation, gamma
from holdfast.certifiers.bounds.operations import Convolution, Dense, Interval, Linear, ReLU


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
