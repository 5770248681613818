"""The networks of a query as one function, whose bounds can be computed, and the replay of inputs on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.vnnlib.problems import Problem, UnsafeSet
from holdfast.io.onnx.networks import OnnxNetwork

_TOLERANCE = 1e-4
"""largest distance of a reported input from its box, as in VNN-COMP; it is only used for inputs that are no numbers of
the network's data type"""


class _Joined(nn.Module):
    """The function from all inputs, joined, to all outputs, followed by the inputs if `with_inputs`."""

    def __init__(self, networks: Sequence[OnnxNetwork], *, with_inputs: bool) -> None:
        super().__init__()
        self.nets = nn.ModuleList(network.net for network in networks)
        self.examples = [network.example for network in networks]
        self.sizes = [int(np.prod(network.example)) for network in networks]
        self.with_inputs = with_inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (n, values) for inputs (n, *shape)."""
        if len(self.nets) == 1:
            parts = [self.nets[0](x).flatten(1)]
        else:
            parts, start = [], 0
            for net, example, size in zip(self.nets, self.examples, self.sizes, strict=True):
                parts.append(net(x[:, start : start + size].reshape(len(x), *example)).flatten(1))
                start += size
        if self.with_inputs:
            parts.append(x.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True)
class Witness:
    """Inputs of all networks that lead to a target, with the outputs of onnxruntime."""

    inputs: Tensor
    """values (d), float64, each of which is a number of the data type of its network"""
    outputs: Tensor
    """values of onnxruntime, float64"""


@dataclass(frozen=True, eq=False)
class JoinedNetworks:
    """The networks of a query, joined to one function."""

    networks: tuple[OnnxNetwork, ...]
    graph: Graph
    """the function with constants of 64 bits"""
    with_inputs: bool
    narrow: tuple[bool, ...]
    """for each input whether its network computes with 32 bits or fewer"""

    @staticmethod
    def of(networks: Sequence[OnnxNetwork], problem: Problem, *, with_inputs: bool) -> "JoinedNetworks":
        """Return the joined networks. Raises `UsageError` for an operation without sound bounds."""
        module = (
            _Joined(networks, with_inputs=with_inputs).double().eval().requires_grad_(requires_grad=False)
        )
        shape = networks[0].example if len(networks) == 1 else (len(problem.low),)
        middle = (problem.low + problem.high) / 2
        sample = torch.stack((middle, problem.low, problem.high)).reshape(3, *shape)
        graph = traced(module, sample).to(torch.float64)
        narrow = [n.dtype != np.float64 for n in networks for _ in range(int(np.prod(n.example)))]
        return JoinedNetworks(tuple(networks), graph, with_inputs, tuple(narrow))

    def rounded(self, x: Tensor, problem: Problem) -> Tensor:
        """Return inputs (n, d) as numbers of the data types of the networks, inside the box if it contains some."""
        x = torch.minimum(torch.maximum(x, problem.low), problem.high)
        nearest = x.float()
        up = nearest.nextafter(torch.full_like(nearest, torch.inf)).double()
        down = nearest.nextafter(torch.full_like(nearest, -torch.inf)).double()
        single = nearest.double()
        single = torch.where((single < problem.low) & (up <= problem.high), up, single)
        single = torch.where((single > problem.high) & (down >= problem.low), down, single)
        return torch.where(torch.tensor(self.narrow), single, x)

    def values(self, x: Tensor) -> Tensor:
        """Return the values (n, values) of inputs (n, d) with 64 bits."""
        return self.graph(x.reshape(len(x), *self.graph.shape))

    def confirmed(self, x: Tensor, problem: Problem, target: UnsafeSet) -> Witness | None:
        """Return the first of some inputs (n, d) that leads to a target, or None.

        The target must be reached in the computation with 64 bits and in onnxruntime, without a tolerance.
        """
        candidates = self.rounded(x.double(), problem)
        near = ((candidates >= problem.low - _TOLERANCE) & (candidates <= problem.high + _TOLERANCE)).all(1)
        with torch.no_grad():
            reached = near & target.reached(self.values(candidates))
        for row in candidates[reached]:
            outputs = self._replayed(row)
            values = torch.cat((outputs, row)) if self.with_inputs else outputs
            if bool(target.reached(values[None])):
                return Witness(row, outputs)
        return None

    def _replayed(self, x: Tensor) -> Tensor:
        """The outputs of all networks in onnxruntime."""
        outputs, start = [], 0
        for network in self.networks:
            size = int(np.prod(network.example))
            y = network.runtime(x[start : start + size].numpy())
            outputs.append(torch.from_numpy(np.asarray(y, np.float64).reshape(-1)))
            start += size
        return torch.cat(outputs)
