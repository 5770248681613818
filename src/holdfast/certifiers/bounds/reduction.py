"""The network that remains of a ReLU network over a region: only the ReLUs whose inputs have both signs there.

Where the sign of the input of a ReLU is known, the ReLU is linear, so that the network is a function of its input and
of the few other ReLUs. Each of their inputs is an affine function of the input of the network and of the ReLUs before
it. These matrices are small for a network with few ReLUs of unknown sign, as in the mixed-integer programs of Tjeng,
Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", ICLR 2019, arXiv:1711.07356,
and bounds are computed faster with them. The rounding errors of their computation, and those of the network itself, are
added to the rounding errors of the new operations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds.crown import Total, one_hot
from holdfast.certifiers.bounds.graph import ROUNDINGS, Graph, Node, gamma
from holdfast.certifiers.bounds.linear import Convolution, Dense, Interval, Linear
from holdfast.certifiers.bounds.nonlinear import ReLU
from holdfast.certifiers.bounds.relaxation import Relaxation


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
