"""Provers that optimise their bounds: alpha-CROWN, and branch and bound with counterexamples."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.bounds.alpha import Optimised, optimised, sharpen
from holdfast.certifiers.bounds.crown import NO_CHOICES, Choices, relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph, Relaxation, region_of
from holdfast.certifiers.bounds.reduction import reduced, reducible
from holdfast.certifiers.branching.branching import BranchingResult, OutputProperty, Search, Tree, splittable
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.provers import GraphProver, margin_rows
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import exactly


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
class _Claims:
    """What is proved about the margins of an example."""

    rows: Tensor
    """coefficients (1, k, classes) of the margins"""
    proved: Tensor
    """lower bounds (k) of the margins, float64"""
    choices: Choices
    """the choices of the last optimisation, of the margins `chosen`"""
    stopped: bool
    """whether a deadline ended the computation of bounds"""
    work: int = 1
    chosen: Sequence[int] = ()

    @property
    def open(self) -> list[int]:
        """Indices of the margins that are not proved to be positive."""
        return (~(self.proved > 0)).nonzero()[:, 0].tolist()

    def bounded(self, row: int) -> Optimised:
        """The bound of one margin, with the choices of the last optimisation."""
        place = list(self.chosen).index(row)
        slopes, multipliers = (
            {i: each[:, place : place + 1] for i, each in values.items()}
            for values in (self.choices.slopes, self.choices.multipliers)
        )
        return Optimised(self.proved[row : row + 1][None].to(self.rows), Choices(slopes, multipliers))

    def decided(self, row: int, decision: BranchingResult) -> "_Claims":
        """The claims after branch and bound for one of them."""
        proved = self.proved.clone()
        proved[row] = max(float(proved[row]), decision.bound)
        return replace(
            self, proved=proved, work=self.work + decision.work, stopped=self.stopped or decision.stopped
        )

    def proofs(self, one: Batch) -> Proofs:
        """The proofs of the example without a counterexample."""
        none, bound = Proofs.none(one), self.proved.amin()[None].nan_to_num(nan=-torch.inf)
        return replace(
            none,
            certified=bound > 0,
            bound=bound,
            work=none.work + self.work,
            stopped=torch.full_like(none.stopped, self.stopped),
        )


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
            claims, relaxation = self._first(self.graph, one, deadline)
            if one.x.dtype != torch.float32 or not claims.open or claims.stopped:
                return self._continued(claims, relaxation, one, deadline)
            work = claims.work
            if not reducible(relaxation):
                proofs = self._continued(claims, relaxation, one, deadline)
                undecided = not (proofs.certified | proofs.broken | proofs.stopped).any()
                if not undecided or not self.search:
                    return proofs
                work = int(proofs.work)
            # rounding errors may be as large as the bound, and on a small network double precision costs little
            double = one.at(one.x.double())
            proofs = self._continued(
                *self._first(self.graph.to(torch.float64), double, deadline), double, deadline
            )
            return replace(proofs, x_adv=proofs.x_adv.to(one.x.dtype), work=proofs.work + work)

    def _first(self, graph: Graph, one: Batch, deadline: float) -> tuple["_Claims", Relaxation]:
        """The margins of an example with their bounds by CROWN, and the relaxation."""
        region = region_of(one.x, self.threat.constraint, self.model.bounds)
        relaxation = relaxed(graph, region, deadline=deadline)
        rows = margin_rows(one.y, graph.shape_of(graph.output)[0], one.x.dtype)
        lower = substitute(relaxation, graph.output, rows).lower[0]
        return _Claims(rows, lower.double(), NO_CHOICES, relaxation.stopped), relaxation

    def _continued(self, claims: "_Claims", relaxation: Relaxation, one: Batch, deadline: float) -> Proofs:
        """The result of optimised bounds, and of branch and bound, for the margins that are not proved."""
        if not claims.open:
            return claims.proofs(one)
        small = not claims.stopped and reducible(relaxation)
        if small:
            relaxation = reduced(relaxation)
        if small or self.search:
            claims = self._optimised(relaxation, claims)
        if claims.open and (small or not self.search):
            claims = self._optimised(relaxation, self._sharpened(relaxation, claims, deadline))
        if claims.open and self.search and splittable(relaxation.graph):
            return self._searched(relaxation, claims, one, deadline)
        return claims.proofs(one)

    def _sharpened(self, relaxation: Relaxation, claims: "_Claims", deadline: float) -> "_Claims":
        in_time = sharpen(relaxation, self.steps, deadline)
        return replace(claims, stopped=claims.stopped or not in_time)

    def _optimised(self, relaxation: Relaxation, claims: "_Claims") -> "_Claims":
        """The claims with optimised bounds of those that are not proved."""
        output, chosen = relaxation.graph.output, claims.open
        result = optimised(relaxation, output, claims.rows[:, chosen], steps=self.steps)
        proved = claims.proved.clone()
        proved[chosen] = torch.maximum(proved[chosen], result.lower[0].double())
        return replace(claims, proved=proved, work=claims.work + 1, chosen=chosen, choices=result.choices)

    def _searched(self, relaxation: Relaxation, claims: "_Claims", one: Batch, deadline: float) -> Proofs:
        """The result of branch and bound for the claims that are not proved, until one is refuted."""

        def violated(x: Tensor) -> Tensor:
            return self._wrong(self._inside(x, one), one)

        for row in sorted(claims.open, key=lambda row: float(claims.proved[row])):
            claim = OutputProperty(claims.rows[0, row : row + 1], claims.rows.new_zeros(1))
            tree = Tree(relaxation, claim, self.search or Search(), deadline, violated)
            decision = tree.decide(claims.bounded(row))
            claims = claims.decided(row, decision)
            if decision.witness is not None:
                x_adv = self._inside(decision.witness[None], one)
                if self._wrong(x_adv, one).all():
                    proofs = claims.proofs(one)
                    return replace(proofs, x_adv=x_adv, broken=torch.ones_like(proofs.broken))
            if decision.bound <= 0:
                break
        return claims.proofs(one)

    def _inside(self, x: Tensor, one: Batch) -> Tensor:
        inside: Tensor = self.threat.constraint.project(x, one.x.expand_as(x), self.model.bounds)
        return inside

    def _wrong(self, x: Tensor, one: Batch) -> Tensor:
        parameter = next(self.model.parameters(), None)
        dtype = x.dtype if parameter is None else parameter.dtype
        wrong: Tensor = self.model(x.to(dtype)).argmax(1) != one.y
        return wrong
