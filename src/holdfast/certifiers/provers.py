"""Provers by bound propagation: interval bounds, and linear bounds with intervals or substitution in between."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.crown import relaxed, substitute
from holdfast.certifiers.graph import Graph
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.region import Region, region_of
from holdfast.certifiers.tracing import traced
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Labels

_INTERVALS_AT_ONCE, _BOUNDS_AT_ONCE = 256, 8
"""numbers of examples whose bounds are computed together, so that the values fit into the caches"""


def margin_rows(y: Labels, classes: int, dtype: torch.dtype) -> Tensor:
    """Return the coefficients (n, classes - 1, classes) of the margins of the labels over each other class."""
    others = torch.arange(classes - 1, device=y.device)
    others = others + (others >= y[:, None])
    rows = torch.zeros(len(y), classes - 1, classes, dtype=dtype, device=y.device)
    rows.scatter_(2, others[:, :, None], -1.0)
    rows.scatter_(2, y[:, None, None].expand(-1, classes - 1, 1), 1.0)
    return rows


@dataclass(frozen=True, eq=False)
class Bounder:
    """A function that bounds the margins of the examples of a batch over the inputs of a threat model."""

    graph: Graph
    constraint: Constraint
    bounds: Bounds
    method: Callable[[Graph, Region, Tensor], Tensor]
    """function that returns lower bounds (n, k) of linear functions of the logits"""
    at_once: int
    """number of examples whose bounds are computed together"""

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the bounds prove about the examples of a batch."""
        parts = []
        with torch.no_grad():
            for part in batch.split(self.at_once):
                region = region_of(part.x, self.constraint, self.bounds)
                rows = margin_rows(part.y, self.graph.shape_of(self.graph.output)[0], part.x.dtype)
                parts.append(self.method(self.graph, region, rows).amin(1).double())
        bound = torch.cat(parts).nan_to_num(nan=-torch.inf)
        none = Proofs.none(batch)
        return replace(none, certified=bound > 0, bound=bound, work=torch.ones_like(none.work))


def prepared_graph(model: Classifier, sample: Batch) -> Graph:
    """Return the graph of a classifier, in the data type of its inputs."""
    return traced(model, sample.x).to(sample.x.dtype, sample.x.device)


def _by_intervals(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    # the last substitution is that of the margins in the logits, and, if possible, of the last linear operation
    relaxation = relaxed(graph, region, substituted=False)
    low, high = relaxation.bound(graph.output)
    negative = rows.clamp(max=0)
    return ((rows - negative) @ low[:, :, None] + negative @ high[:, :, None])[:, :, 0]


def _by_lines_from_intervals(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    return substitute(relaxed(graph, region, substituted=False), graph.output, rows).lower


def _by_lines(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    return substitute(relaxed(graph, region), graph.output, rows).lower


@dataclass(frozen=True)
class IBP:
    """Interval bound propagation: bounds each value by interval arithmetic.

    Gowal et al., 2018, arXiv:1810.12715. It is the fastest method, and proves little for networks that were not trained
    with it.
    """

    name: ClassVar[str] = "ibp"

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Trace the model."""
        graph = prepared_graph(model, sample)
        return Bounder(graph, threat.constraint, model.bounds, _by_intervals, _INTERVALS_AT_ONCE)


@dataclass(frozen=True)
class CrownIBP:
    """CROWN-IBP: linear bounds of the margins, with intervals as bounds of the values in between.

    Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks", ICLR 2020,
    arXiv:1906.06316.
    """

    name: ClassVar[str] = "crown-ibp"

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Trace the model."""
        graph = prepared_graph(model, sample)
        return Bounder(graph, threat.constraint, model.bounds, _by_lines_from_intervals, _BOUNDS_AT_ONCE)


@dataclass(frozen=True)
class Crown:
    """CROWN: linear bounds of the margins and of all values in between.

    Zhang et al., NeurIPS 2018, arXiv:1811.00866.
    """

    name: ClassVar[str] = "crown"

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Trace the model."""
        graph = prepared_graph(model, sample)
        return Bounder(graph, threat.constraint, model.bounds, _by_lines, _BOUNDS_AT_ONCE)
