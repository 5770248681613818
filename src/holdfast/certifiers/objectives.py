"""Linear functions of the outputs of a model that are all positive where an example is correct."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.certifiers.bounds.graph import Graph, Node
from holdfast.certifiers.bounds.operations import Dense
from holdfast.certifiers.protocol import HIGH, LOW, Proofs
from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.types import Labels, Mask
from holdfast.tasks.multilabel import Multilabel
from holdfast.tasks.regression import Regression


class Objective(Protocol):
    """Protocol of the functions whose bounds prove something about an example."""

    def extended(self, graph: Graph) -> Graph:
        """Return the graph of a model with the outputs of which `rows` are coefficients."""

    def rows(self, batch: Batch, outputs: int) -> Tensor:
        """Return the coefficients (n, k, outputs) of the functions."""

    def wrong(self, outputs: Tensor, batch: Batch) -> Mask:
        """Return the mask of the outputs of the model that are wrong."""

    def proofs(self, batch: Batch, lower: Tensor) -> Proofs:
        """Return what lower bounds (n, k) of the functions prove about a batch."""


def margin_rows(y: Labels, classes: int, dtype: torch.dtype) -> Tensor:
    """Return the coefficients (n, classes - 1, classes) of the margins of the labels over each other class."""
    others = torch.arange(classes - 1, device=y.device)
    others = others + (others >= y[:, None])
    rows = torch.zeros(len(y), classes - 1, classes, dtype=dtype, device=y.device)
    rows.scatter_(2, others[:, :, None], -1.0)
    rows.scatter_(2, y[:, None, None].expand(-1, classes - 1, 1), 1.0)
    return rows


def _proved(lower: Tensor) -> Tensor:
    """Lower bounds in double precision, in which NaN proves nothing."""
    return lower.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _proofs(batch: Batch, bound: Tensor, of_task: Mapping[str, Tensor]) -> Proofs:
    none = Proofs.none(batch)
    return replace(none, certified=bound > 0, bound=bound, work=torch.ones_like(none.work), of_task=of_task)


@dataclass(frozen=True)
class Margins:
    """The margins of the label over each other class."""

    def extended(self, graph: Graph) -> Graph:
        """Return the graph unchanged."""
        return graph

    def rows(self, batch: Batch, outputs: int) -> Tensor:
        """Return the coefficients of the margins (n, outputs - 1, outputs)."""
        return margin_rows(batch.y, outputs, batch.x.dtype)

    def wrong(self, outputs: Tensor, batch: Batch) -> Mask:
        """Return the mask of wrong classes."""
        return outputs.argmax(1) != batch.y

    def proofs(self, batch: Batch, lower: Tensor) -> Proofs:
        """Return the smallest margin of each example."""
        return _proofs(batch, _proved(lower).amin(1), {})


@dataclass(frozen=True)
class Tolerance:
    """The distances of the outputs of a regression from both ends of the tolerance around each target.

    Targets differ between examples, so that the functions have constants: they are the coefficients of a further output
    of the graph, which is 1.
    """

    task: Regression

    def extended(self, graph: Graph) -> Graph:
        """Return the graph with a last output of 1."""
        (k,) = graph.shape_of(graph.output)
        weight, bias = torch.eye(k + 1)[:, :k], torch.eye(k + 1)[k]
        node = Node(Dense(weight, bias), (graph.output,), torch.Size([k + 1]))
        return Graph(graph.shape, (*graph.nodes, node))

    def rows(self, batch: Batch, outputs: int) -> Tensor:
        """Return the coefficients (n, 2 k, k + 1) of output minus lower end and upper end minus output of each of k
        numbers.
        """
        signs = torch.eye(outputs - 1, dtype=batch.x.dtype, device=batch.x.device).expand(len(batch), -1, -1)
        return torch.cat((torch.cat((signs, -signs), 1), self._constants(batch)[:, :, None]), 2)

    def _constants(self, batch: Batch) -> Tensor:
        """The constants (n, 2 k) in the data type of the inputs, rounded down."""
        truth, size = self._targets(batch)
        exact = torch.cat((size - truth, size + truth), 1)
        constants = exact.to(batch.x.dtype)
        return torch.where(
            constants.double() > exact,
            constants.nextafter(torch.full_like(constants, -torch.inf)),
            constants,
        )

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.truth is not None
        truth = batch.truth.double()
        return truth, self.task.size(truth)

    def wrong(self, outputs: Tensor, batch: Batch) -> Mask:
        """Return the mask of the examples with an error beyond the tolerance."""
        assert batch.truth is not None
        return ~(self.task.lead(outputs, batch.truth.expand(len(outputs), -1)) > 0)

    def proofs(self, batch: Batch, lower: Tensor) -> Proofs:
        """Return 1 minus the largest error in units of the tolerance, and the intervals of the outputs (n, k)."""
        ends = _proved(lower) - self._constants(batch).double()  # of the output, and of its negative
        ends = ends.nextafter(torch.full_like(ends, -torch.inf))
        low, high = ends.chunk(2, 1)[0], -ends.chunk(2, 1)[1]
        truth, size = self._targets(batch)
        bound = 1 - torch.maximum(high - truth, truth - low).div(size).amax(1)
        return _proofs(batch, bound.nan_to_num(nan=-torch.inf), {LOW: low, HIGH: high})


@dataclass(frozen=True)
class Signs:
    """The logits of the labels that an example has, and the negative logits of the others."""

    task: Multilabel

    def extended(self, graph: Graph) -> Graph:
        """Return the graph unchanged."""
        return graph

    def rows(self, batch: Batch, outputs: int) -> Tensor:
        """Return the coefficients (n, labels, labels): one sign for each label."""
        return torch.diag_embed(self._signs(batch))

    def _signs(self, batch: Batch) -> Tensor:
        assert batch.truth is not None
        return torch.where(batch.truth > 0, 1.0, -1.0).to(batch.x.dtype)

    def wrong(self, outputs: Tensor, batch: Batch) -> Mask:
        """Return the mask of the examples with a wrong label."""
        assert batch.truth is not None
        return ~(self.task.lead(outputs, batch.truth.expand(len(outputs), -1)) > 0)

    def proofs(self, batch: Batch, lower: Tensor) -> Proofs:
        """Return the smallest margin over the labels, and for each logit the end of its interval that counts."""
        lower, has = _proved(lower), self._signs(batch) > 0
        ends = {LOW: torch.where(has, lower, -torch.inf), HIGH: torch.where(has, torch.inf, -lower)}
        return _proofs(batch, lower.amin(1), ends)


def objective_of(model: Classifier) -> Objective:
    """Return the functions of the outputs of a model whose bounds prove something. Raises `UsageError` for a task
    without such functions.
    """
    task = model.task
    if task is None:
        return Margins()
    if isinstance(task, Regression):
        return Tolerance(task)
    if isinstance(task, Multilabel):
        return Signs(task)
    raise UsageError(f"the method proves nothing about a model of {task.name}")
