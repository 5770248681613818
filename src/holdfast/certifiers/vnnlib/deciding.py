"""Decides a query: `sat` with a confirmed witness, `unsat` by a proof, or neither within the time."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from holdfast.certifiers.bounds.alpha import optimised, sharpen
from holdfast.certifiers.bounds.crown import relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.reduction import reduced, reducible
from holdfast.certifiers.bounds.region import Region
from holdfast.certifiers.bounds.relaxation import Relaxation
from holdfast.certifiers.branching.branching import Search, Tree, splittable
from holdfast.certifiers.vnnlib.boxes import BoxSearch
from holdfast.certifiers.vnnlib.falsifying import falsified
from holdfast.certifiers.vnnlib.problems import Problem, UnsafeSet, problems_of
from holdfast.certifiers.vnnlib.query import DeclaredNetwork, Query, Variable
from holdfast.certifiers.vnnlib.subject import JoinedNetworks, Witness
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.io.onnx.networks import OnnxNetwork

Answer = Literal["sat", "unsat", "unknown", "timed-out"]

ELEMENT_TYPES = {"real": None, "float32": "float32", "float64": "float64"}
"""element types that a query may declare, with the data type that the network must have for it"""
_FEW, _MANY = 6, 20
"""numbers of inputs up to which boxes are divided before signs of ReLUs, and up to which both are divided in turn"""
_FOR_BOXES = 0.8
"""part of the time for boxes if there are few inputs, for which signs are rarely faster"""
_STEPS = 20
"""steps of the optimisation of bounds before the first division"""
_MOST_SHARPENED = 1500
"""number of inputs of ReLUs of unknown sign up to which the bounds of all of them are optimised, in a few seconds"""


@dataclass(frozen=True)
class Verdict:
    """The answer to a query."""

    answer: Answer
    witness: Witness | None = None


def decide(
    query: Query, networks: Mapping[str, OnnxNetwork], *, deadline: float, rng: Draws | None = None
) -> Verdict:
    """Return the answer to a query about networks, by their declared names.

    `deadline` is a value of `time.perf_counter()`. Raises `UsageError` or `TargetError` if a network does not fit its
    declaration, or has an operation without sound bounds.
    """
    rng = rng or Draws(0)
    used = [_fitting(declared, networks) for declared in query.networks]
    problems, with_inputs = problems_of(query)
    if not problems:
        return Verdict("unsat")
    subject = JoinedNetworks.of(used, problems[0], with_inputs=with_inputs)
    single = any(
        variable.element_type == "float32" for net in query.networks for variable in (net.input, net.output)
    )
    provers = [_Prover(subject, problem, single=single) for problem in problems]
    share = 0.2 * max(0.0, deadline - time.perf_counter()) / len(problems)
    for prover in provers:
        for starts, steps in ((4, 20), (16, 60)):
            until = min(deadline, time.perf_counter() + share)
            witness = falsified(subject, prover.problem, rng, starts=starts, steps=steps, deadline=until)
            if witness is not None:
                return Verdict("sat", witness)
            if starts == 4 and prover.quick():
                break
    return _proved(provers, deadline)


def _proved(provers: Sequence["_Prover"], deadline: float) -> Verdict:
    """Run each prover for its share of the time, and then those that have not finished for the rest."""
    open_provers = [prover for prover in provers if not prover.finished]
    for last in (False, True):
        for i, prover in enumerate(open_provers):
            now = time.perf_counter()
            until = deadline if last else now + (deadline - now) / (2 * (len(open_provers) - i))
            witness = prover.run(deadline if len(open_provers) == 1 else until)
            if witness is not None:
                return Verdict("sat", witness)
        open_provers = [prover for prover in open_provers if not prover.finished]
    if all(prover.excluded for prover in provers):
        return Verdict("unsat")
    return Verdict("timed-out" if time.perf_counter() >= deadline else "unknown")


@dataclass(eq=False)
class _Prover:
    """The proof of one problem, which can be continued after a time limit."""

    subject: JoinedNetworks
    problem: Problem
    single: bool
    """whether the proof must hold for a computation with 32 bits"""
    left: list[int] = field(init=False)
    """indices of the targets that are not excluded"""
    boxes: BoxSearch | None = None
    excluded: bool = False
    hopeless: bool = False
    """whether no method can continue"""
    signs_ended: bool = False
    """whether a subproblem with known signs could not be decided, so that further time does not help"""
    sharpened: dict[int, Relaxation] = field(default_factory=dict)
    """relaxations with optimised bounds, by the index of the graph"""

    def __post_init__(self) -> None:
        self.left = list(range(len(self.problem.targets)))
        exact = all(target.exact_in(torch.float32) for target in self.problem.targets)
        self.graph32 = self.subject.graph.to(torch.float32)
        narrow = all(self.subject.narrow)
        # a network of 64 bits has other constants with 32 bits
        self.graphs = [self.graph32] if self.single else [self.subject.graph]
        if not self.single and exact and narrow:
            self.graphs.insert(0, self.graph32)
        self.witness: Witness | None = None

    @property
    def finished(self) -> bool:
        """Whether the problem is decided, or no method can continue."""
        return self.excluded or self.hopeless

    def quick(self) -> bool:
        """Exclude targets by the bounds of CROWN, and return whether all are excluded."""
        with torch.no_grad():
            relaxation = self._relaxation(self.graphs[0])
            claims = [target.claim(relaxation.region.low.dtype) for target in self.problem.targets]
            rows = torch.cat([claim.rows for claim in claims])
            lower = substitute(relaxation, relaxation.graph.output, rows[None]).lower[0]
            parts = torch.split(lower, [len(claim.rows) for claim in claims])
            best = [float((part + claim.constants).amax()) for part, claim in zip(parts, claims, strict=True)]
        self.left = sorted((j for j, bound in enumerate(best) if not bound > 0), key=lambda j: best[j])
        self.excluded = not self.left
        return self.excluded

    def run(self, deadline: float) -> Witness | None:
        """Continue the proof until the deadline. Return a witness if one was found."""
        for method, until in self._methods(deadline):
            witness = method(until)
            if witness is not None or self.excluded:
                return witness
        by_signs = self.signs_ended or not splittable(self.subject.graph)
        self.hopeless = by_signs and self.boxes is not None and self.boxes.exhausted
        return None

    def _methods(self, deadline: float) -> Iterator[tuple[Callable[[float], Witness | None], float]]:
        """The methods in turn, each with the end of its time."""
        varying = self.problem.varying
        if not splittable(self.subject.graph):
            yield self._by_boxes, deadline
        elif varying > _MANY:
            yield self._by_signs, deadline
            yield self._by_boxes, deadline
        else:
            methods = (
                (self._by_boxes, self._by_signs) if varying <= _FEW else (self._by_signs, self._by_boxes)
            )
            now = time.perf_counter()
            yield methods[0], now + (deadline - now) * (_FOR_BOXES if varying <= _FEW else 0.5)
            yield methods[1], deadline
            yield methods[0], deadline  # for the rest of the time, if the second one ended early

    def _by_boxes(self, deadline: float) -> Witness | None:
        if self.boxes is None:
            targets = tuple(self.problem.targets[j] for j in self.left)
            problem = Problem(self.problem.low, self.problem.high, targets)
            self.boxes = BoxSearch(self.subject, problem, self.graphs[-1])
        witness = self.boxes.search(deadline)
        self.excluded = self.boxes.finished and not self.boxes.exhausted and witness is None
        return witness

    def _by_signs(self, deadline: float) -> Witness | None:
        waiting = [] if self.signs_ended else list(self.left)
        for i, j in enumerate(waiting):
            now = time.perf_counter()
            until = now + (deadline - now) / (len(waiting) - i)
            target = self.problem.targets[j]
            for graph in self.graphs:
                bound, stopped = self._decided(graph, target, until)
                if self.witness is not None:
                    return self.witness
                if bound > 0 or stopped:
                    break
            if bound > 0:
                self.left.remove(j)
            elif not stopped:
                self.signs_ended = True
        self.excluded = not self.left
        return None

    def _decided(self, graph: Graph, target: UnsafeSet, deadline: float) -> tuple[float, bool]:
        """The bound of a target by branch and bound over signs, and whether the time limit ended it."""
        with torch.no_grad():
            relaxation = self._sharpened(graph)
            claim = target.claim(relaxation.region.low.dtype)
            output = relaxation.graph.output
            first = optimised(relaxation, output, claim.rows[None], steps=_STEPS)
            bound = float((first.lower + claim.constants).amax())
            if bound > 0:
                return bound, False

            def violated(x: Tensor) -> Tensor:
                return self._violated(x, graph, target)

            decision = Tree(relaxation, claim, Search(), deadline, violated).decide(first)
        return decision.bound, decision.stopped

    def _violated(self, x: Tensor, graph: Graph, target: UnsafeSet) -> Tensor:
        functions = graph(x).double() @ target.rows.t() + target.constants
        near = (functions <= 1e-5 * (1 + functions.abs())).all(1)
        confirmed = torch.zeros_like(near)
        for i in near.nonzero()[:, 0].tolist():
            witness = self.subject.confirmed(x[i].reshape(1, -1), self.problem, target)
            if witness is not None:
                self.witness = witness
                confirmed[i] = True
                break
        return confirmed

    def _sharpened(self, graph: Graph) -> Relaxation:
        """The relaxation for all targets and subproblems, with optimised bounds if the network is small enough."""
        index = self.graphs.index(graph)
        if index not in self.sharpened:
            relaxation = self._relaxation(graph)
            if reducible(relaxation):
                relaxation = reduced(relaxation)
            graph = relaxation.graph
            bounds = [relaxation.bound(i) for i in graph.bounded]
            if sum(int(((low < 0) & (high > 0)).sum()) for low, high in bounds) <= _MOST_SHARPENED:
                sharpen(relaxation, _STEPS)
            self.sharpened[index] = relaxation
        return self.sharpened[index]

    def _relaxation(self, graph: Graph) -> Relaxation:
        shape = (1, *graph.shape)
        low, high = self.problem.low.view(shape), self.problem.high.view(shape)
        dtype = torch.float32 if graph is self.graph32 else torch.float64
        return relaxed(graph, Region(low, high, (low + high) / 2).to(dtype))


def _fitting(declared: DeclaredNetwork, networks: Mapping[str, OnnxNetwork]) -> OnnxNetwork:
    """The network of a declaration. Raises an error if its shapes or element types are others."""
    name = declared.equal_to or declared.name
    if name not in networks:
        raise UsageError(
            f"the query declares the network {name!r}, for which no file is given",
            Remedy("networks", Placeholder(f"{name}=FILE", f"{{{name!r}: FILE}}"), "--network"),
        )
    network = networks[name]
    for variable, shape, what in (
        (declared.input, network.input_shape, "input"),
        (declared.output, network.output_shape, "output"),
    ):
        flat = len(variable.shape) == 1
        fits = _without_ones(variable.shape) == _without_ones(shape)
        if not fits and not (flat and variable.size == int(torch.Size(shape).numel())):
            raise TargetError(
                f"the query declares the {what} {variable.name} with the shape {list(variable.shape)}, but the network "
                f"has {list(shape)}; give the network for which the query was written"
            )
        _refuse_type(variable, network.dtype.name)
    return network


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _refuse_type(variable: Variable, dtype: str) -> None:
    if variable.element_type not in ELEMENT_TYPES:
        raise UsageError(
            f"the query declares {variable.name} with the element type {variable.element_type}, for which no sound "
            "proofs are known; declare it as real to ask about real numbers"
        )
    expected = ELEMENT_TYPES[variable.element_type]
    if expected is not None and expected != dtype:
        raise TargetError(
            f"the query declares {variable.name} with the element type {expected}, but the network computes in "
            f"{dtype}; declare it as real, or give another network"
        )
