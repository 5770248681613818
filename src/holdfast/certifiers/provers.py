"""Provers by bound propagation: interval bounds, and linear bounds with intervals or substitution in between."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.bounds.crown import finite, from_intervals, lowest, relaxed
from holdfast.certifiers.bounds.graph import Graph, Region, Relaxation, region_of
from holdfast.certifiers.bounds.operations import Scaled
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.estimator_networks import has_network, network_of
from holdfast.certifiers.objectives import Objective, objective_of
from holdfast.certifiers.pixels import PixelBounder
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.core.batch import Batch
from holdfast.core.catalogue import Arithmetic
from holdfast.core.constraints import Constraint
from holdfast.core.errors import NoBounds, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import exactly
from holdfast.tasks.segmentation import Segmentation

_INTERVALS_AT_ONCE, _BOUNDS_AT_ONCE = 256, 8
"""numbers of examples whose bounds are computed together, so that the values fit into the caches"""


Method = Callable[[Graph, Region, Tensor, float], tuple[Tensor, Relaxation]]
"""function of a graph, regions, coefficients of linear functions of the outputs, and a deadline, which returns lower
bounds (n, k) of the functions, and the relaxation from which they follow"""


@dataclass(frozen=True, eq=False)
class Bounder:
    """A function that bounds the objective of the examples of a batch over the inputs of a threat model."""

    objective: Objective
    graph: Graph
    constraint: Constraint
    bounds: Bounds
    method: Method
    at_once: int
    """number of examples whose bounds are computed together"""
    timeout_s: float = math.inf
    """time limit for one example"""

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the bounds prove about the examples of a batch."""
        parts = [Proofs.none(batch.take(torch.zeros_like(batch.ids[:0])))]
        with torch.no_grad(), exactly(batch.x):
            for part in batch.split(self.at_once):
                region, deadline = region_of(part.x, self.constraint, self.bounds), self._deadline(len(part))
                rows = self.objective.rows(part, self.graph.shape_of(self.graph.output)[0])
                lower, relaxation = self.method(self.graph, region, rows, deadline)
                proofs = self.objective.proofs(part, finite(lower))
                late = torch.full_like(proofs.stopped, relaxation.stopped) & ~proofs.certified
                parts.append(replace(proofs, stopped=late, undefined=relaxation.undefined(part.ids)))
        return Proofs.joined(parts)

    def _deadline(self, n: int) -> float:
        return time.perf_counter() + n * self.timeout_s


def prepared_graph(model: Classifier, sample: Batch) -> Graph:
    """Return the graph of a model with the outputs of its objective, in the data type of its inputs.

    Raises `UsageError` for inputs of less than single precision.
    """
    if sample.x.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"inputs are {sample.x.dtype}, in which rounding errors are larger than the bounds; give them as float32"
        )
    if has_network(model):
        graph = traced(network_of(model, sample.x), sample.x.double())
        graph = replace(graph, probabilities=model.output == "probability")
    else:
        graph = traced(model, sample.x)
        # factors and offsets are computed from other constants, as the reciprocals of divisors are, and rounded
        roundoff = torch.finfo(sample.x.dtype).eps / 2
        nodes = [
            replace(node, roundoff=roundoff) if isinstance(node.operation, Scaled) else node
            for node in graph.nodes
        ]
        graph = replace(graph, nodes=tuple(nodes))
    if not isinstance(model.task, Segmentation):
        graph = objective_of(model).extended(graph)
    return graph.to(sample.x.dtype, sample.x.device)


def computed(graph: Graph, model: Classifier, arithmetic: Arithmetic) -> Graph:
    """Return the graph of a model whose bounds hold for the network in an arithmetic.

    Raises `NoBounds` if the rounding error of an operation in float32 is not known, and for weights of another type.
    """
    if arithmetic == "exact":
        return graph
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise NoBounds(
                f"arithmetic is float32, and {name.removeprefix('net.')} of the model is {weight.dtype}; convert the "
                "network with net.float(), or certify it in exact arithmetic (arithmetic: exact)"
            )
    return graph.in_float32()


class GraphProver(ABC):
    """Base class of provers that need the graph of the operations of a model."""

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Trace the model, and prepare the prover. Raises `UsageError` for operations without sound bounds."""
        return self.on(prepared_graph(model, sample), model, threat)

    @abstractmethod
    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""


def _by_intervals(graph: Graph, region: Region, rows: Tensor, deadline: float) -> tuple[Tensor, Relaxation]:
    relaxation = relaxed(graph, region, substituted=False)
    return from_intervals(relaxation, rows), relaxation


def _by_lines_from_intervals(
    graph: Graph, region: Region, rows: Tensor, deadline: float
) -> tuple[Tensor, Relaxation]:
    relaxation = relaxed(graph, region, substituted=False)
    return lowest(relaxation, rows), relaxation


def _by_lines(graph: Graph, region: Region, rows: Tensor, deadline: float) -> tuple[Tensor, Relaxation]:
    relaxation = relaxed(graph, region, deadline=deadline)
    if rows.device.type != "cpu":  # many accelerators are slow in double precision, or have none
        return lowest(relaxation, rows), relaxation
    # the functions of the outputs are few beside the values in between, so that double precision costs little
    return lowest(relaxation.to(torch.float64), rows.double()), relaxation


def _bounder(
    graph: Graph,
    model: Classifier,
    threat: ThreatModel,
    method: Method,
    at_once: int,
    timeout_s: float = math.inf,
) -> ReadyProver:
    if isinstance(model.task, Segmentation):
        linear, whole = method is not _by_intervals, method is _by_lines
        return PixelBounder(model.task, graph, threat.constraint, model.bounds, whole, linear, timeout_s)
    return Bounder(objective_of(model), graph, threat.constraint, model.bounds, method, at_once, timeout_s)


@dataclass(frozen=True)
class IBP(GraphProver):
    """Interval bound propagation: bounds each value by interval arithmetic.

    Gowal et al., 2018, arXiv:1810.12715. It is the fastest method, and proves little for networks that were not trained
    with it.
    """

    name: ClassVar[str] = "ibp"
    arithmetic: Arithmetic = "exact"
    """arithmetic of the network: exact or float32"""

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        return _bounder(
            computed(graph, model, self.arithmetic), model, threat, _by_intervals, _INTERVALS_AT_ONCE
        )


@dataclass(frozen=True)
class CrownIBP(GraphProver):
    """CROWN-IBP: linear bounds of the margins, with intervals as bounds of the values in between.

    Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks", ICLR 2020,
    arXiv:1906.06316.
    """

    name: ClassVar[str] = "crown-ibp"
    arithmetic: Arithmetic = "exact"
    """arithmetic of the network: exact or float32"""

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        return _bounder(
            computed(graph, model, self.arithmetic), model, threat, _by_lines_from_intervals, _BOUNDS_AT_ONCE
        )


@dataclass(frozen=True)
class Crown(GraphProver):
    """CROWN: linear bounds of the margins and of all values in between.

    Zhang et al., NeurIPS 2018, arXiv:1811.00866.
    """

    name: ClassVar[str] = "crown"
    timeout_s: float = math.inf
    """time limit for one example in seconds, after which interval arithmetic replaces further linear bounds"""
    arithmetic: Arithmetic = "exact"
    """arithmetic of the network: exact or float32"""

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        return _bounder(
            computed(graph, model, self.arithmetic), model, threat, _by_lines, _BOUNDS_AT_ONCE, self.timeout_s
        )
