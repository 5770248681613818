"""Provers that optimise their bounds: alpha-CROWN, and branch and bound with counterexamples."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.alpha import optimised, sharpen
from holdfast.certifiers.branching import BranchingResult, OutputProperty, Search, Tree, splittable
from holdfast.certifiers.crown import relaxed, substitute
from holdfast.certifiers.graph import Graph
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.provers import GraphProver, margin_rows
from holdfast.certifiers.region import region_of
from holdfast.certifiers.relaxation import Relaxation
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.number_format import exactly


@dataclass(frozen=True)
class AlphaCrown(GraphProver):
    """Alpha-CROWN: CROWN with optimised slopes of the lower bounds of ReLUs.

    Xu et al., ICLR 2021, arXiv:2011.13824.
    """

    name: ClassVar[str] = "alpha-crown"
    timeout_s: float = 60.0
    """time limit for one example in seconds"""
    steps: int = 20
    """number of steps of the optimisation"""

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        return _Searching(graph, model, threat, self.steps, None, self.timeout_s)


@dataclass(frozen=True)
class BranchAndBound(GraphProver):
    """Branch and bound with Lagrange multipliers (beta-CROWN), until a time limit for each example.

    Wang et al., NeurIPS 2021, arXiv:2103.06624. It proves the claim or returns a counterexample if it has enough time;
    for networks without ReLU it is alpha-CROWN.
    """

    name: ClassVar[str] = "branch-and-bound"
    timeout_s: float = 60.0
    """time limit for one example in seconds"""
    steps: int = 20
    """number of steps of the optimisation before the first division"""
    search: Search = Search()

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        return _Searching(graph, model, threat, self.steps, self.search, self.timeout_s)


@dataclass(frozen=True, eq=False)
class _Searching:
    """A prover that treats examples one after another."""

    graph: Graph
    model: Classifier
    threat: ThreatModel
    steps: int
    search: Search | None
    """settings of branch and bound; None for alpha-CROWN alone"""
    timeout_s: float

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the optimised bounds prove about the examples of a batch, with counterexamples."""
        rows = torch.arange(len(batch), device=batch.ids.device)
        parts = [self._example(batch.take(rows[k : k + 1])) for k in range(len(batch))]
        return Proofs.joined([Proofs.none(batch.take(rows[:0])), *parts])

    def _example(self, one: Batch) -> Proofs:
        deadline = time.perf_counter() + self.timeout_s
        with torch.no_grad(), exactly(one.x):
            proofs = self._in(self.graph, one, deadline)
            undecided = not (proofs.certified | proofs.broken | proofs.stopped).any()
            if undecided and self.search and one.x.dtype == torch.float32:
                # what is not decided although every sign is known may be a matter of rounding
                doubled = self._in(self.graph.to(torch.float64), one.at(one.x.double()), deadline)
                proofs = replace(
                    doubled, x_adv=doubled.x_adv.to(one.x.dtype), work=doubled.work + proofs.work
                )
        return proofs

    def _in(self, graph: Graph, one: Batch, deadline: float) -> Proofs:
        constraint, bounds = self.threat.constraint, self.model.bounds
        relaxation = relaxed(graph, region_of(one.x, constraint, bounds), deadline=deadline)
        rows = margin_rows(one.y, graph.shape_of(graph.output)[0], one.x.dtype)
        first = substitute(relaxation, graph.output, rows).lower[0]
        proved, none = first.double(), Proofs.none(one)
        open_rows = (first <= 0).nonzero()[:, 0]
        work, stopped = 1, relaxation.stopped
        if len(open_rows) and not self.search:
            stopped = not sharpen(relaxation, self.steps, deadline) or stopped
        for row in open_rows[first[open_rows].argsort()].tolist():
            claim = OutputProperty(rows[0, row : row + 1], rows.new_zeros(1))
            decision = self._decided(relaxation, claim, one, deadline)
            work, stopped = work + decision.work, stopped or decision.stopped
            proved[row] = max(float(proved[row]), decision.bound)
            if decision.witness is not None:
                x_adv = constraint.project(decision.witness[None], one.x, bounds)
                if self._wrong(x_adv, one).all():
                    broken = torch.ones_like(none.broken)
                    return replace(
                        none, work=none.work + work, x_adv=x_adv, broken=broken, bound=proved.amin()[None]
                    )
            if decision.bound <= 0:
                break
        bound = proved.amin()[None]
        return replace(
            none,
            certified=bound > 0,
            bound=bound,
            work=none.work + work,
            stopped=torch.full_like(none.stopped, stopped),
        )

    def _decided(
        self, relaxation: Relaxation, claim: OutputProperty, one: Batch, deadline: float
    ) -> BranchingResult:
        output = relaxation.graph.output
        best = optimised(relaxation, output, claim.rows[None], steps=self.steps)
        bound = float((best.lower + claim.constants).amax())
        if bound > 0 or not self.search or not splittable(relaxation.graph):
            return BranchingResult(bound, 1, stopped=False)

        def violated(x: Tensor) -> Tensor:
            return self._wrong(self.threat.constraint.project(x, one.x.expand_as(x), self.model.bounds), one)

        return Tree(relaxation, claim, self.search, deadline, violated).decide(best)

    def _wrong(self, x: Tensor, one: Batch) -> Tensor:
        parameter = next(self.model.parameters(), None)
        dtype = x.dtype if parameter is None else parameter.dtype
        wrong: Tensor = self.model(x.to(dtype)).argmax(1) != one.y
        return wrong
