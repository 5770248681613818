"""The graph of operations of a network, with interval bounds of all of its values (IBP).

IBP: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
arXiv:1810.12715.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from holdfast.certifiers.bounds.linear import Interval, Linear
from holdfast.certifiers.bounds.nonlinear import Activation, MaxPool

Operation = Linear | Activation | MaxPool

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
        return tuple(i for i, node in enumerate(self.nodes, 1) if not isinstance(node.operation, Linear))

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

    def intervals(self, x: Interval, *, rounded: bool = True) -> list[Interval]:
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


def interval_of(node: Node, inputs: Sequence[Interval], *, rounded: bool = True) -> Interval:
    """Return bounds of the values of an operation for inputs within the given bounds, enlarged by rounding errors.

    Without `rounded`, those of a linear operation are not enlarged.
    """
    operation = node.operation
    if not isinstance(operation, Linear):
        return operation.interval(inputs[0])
    low, high = operation.interval(*inputs)
    if not operation.terms or not rounded:
        return low, high
    with torch.no_grad():
        sizes = operation.magnitude_bound(*(largest(each) for each in inputs))
        error = ROUNDINGS * sizes * gamma(operation.terms + 4, low.dtype)
    return low - error, high + error


def largest(x: Interval) -> Tensor:
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
