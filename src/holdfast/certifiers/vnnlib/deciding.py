"""Decides a query: `sat` with a confirmed witness, `unsat` by a proof, or neither within the time."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.certifiers.bounds.alpha import optimised, reduced, reducible, sharpen
from holdfast.certifiers.bounds.crown import relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph, Region, Relaxation
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.branching import BranchingResult, OutputProperty, Search, Tree, splittable
from holdfast.certifiers.vnnlib.query import ConstrainedBox, DeclaredNetwork, Query, Variable
from holdfast.core.draws import Draws
from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError
from holdfast.io.onnx.opening import OnnxNetwork


@dataclass(frozen=True, eq=False)
class UnsafeSet:
    """A set of outputs: those at which all of some linear functions are at most zero."""

    rows: Tensor
    """coefficients (k, values) of the functions, float64"""
    constants: Tensor
    """constants (k) of the functions, float64"""
    strict: Tensor
    """mask (k) of the functions that must be negative"""

    def claim(self, dtype: torch.dtype) -> OutputProperty:
        """Return the claim that the set is not reached, as at least one function is positive.

        Constants are rounded down. If the coefficients are integers, the sum of the functions is a further function: if
        it is positive, one of them is, and it may have a positive bound where none of them has one.
        """
        rows, constants = self.rows, self.constants
        if len(rows) > 1 and bool((rows == rows.round()).all()):
            error = 4 * len(rows) * torch.finfo(torch.float64).eps * constants.abs().sum()
            rows = torch.cat((rows, rows.sum(0, keepdim=True)))
            constants = torch.cat((constants, (constants.sum() - error)[None]))
        # twice: the sum of a bound and the constant is rounded, too
        rounded = (constants - 2 * torch.finfo(dtype).eps * constants.abs()).to(dtype)
        return OutputProperty(rows.to(dtype), rounded)

    def exact_in(self, dtype: torch.dtype) -> bool:
        """Return whether the coefficients are numbers of a data type."""
        return bool((self.rows.to(dtype).double() == self.rows).all())

    def reached(self, values: Tensor) -> Tensor:
        """Return the mask of the rows of values (n, values) that are in the set."""
        functions = values @ self.rows.t() + self.constants
        return torch.where(self.strict, functions < 0, functions <= 0).all(1)


@dataclass(frozen=True, eq=False)
class Problem:
    """The question whether an input of a box leads to one of some sets of outputs."""

    low: Tensor
    """smallest values (d) of the inputs, float64"""
    high: Tensor
    """largest values (d) of the inputs, float64"""
    targets: tuple[UnsafeSet, ...]

    @property
    def varying(self) -> int:
        """Number of inputs that are not fixed."""
        return int((self.low < self.high).sum())


def problems_of(query: Query) -> tuple[tuple[Problem, ...], bool]:
    """Return the problems of a query, with one problem for each different box, and whether the values on which its
    constraints depend include the inputs.

    The values are all outputs, followed by all inputs if they are included.
    """
    cases = list(query.alternatives.all())
    with_inputs = any(
        key >= 0 and value
        for case in cases
        for each in case.constraints
        for key, value in each.function.coefficients.items()
    )
    boxes: dict[bytes, tuple[Tensor, list[UnsafeSet]]] = {}
    for case in cases:
        box = torch.tensor(
            [[bounds[i] for i in range(query.inputs)] for bounds in (case.low, case.high)],
            dtype=torch.float64,
        )
        targets = boxes.setdefault(box.numpy().tobytes(), (box, []))[1]
        targets.append(_target(case, query, with_inputs=with_inputs))
    return tuple(Problem(box[0], box[1], tuple(targets)) for box, targets in boxes.values()), with_inputs


def _target(case: ConstrainedBox, query: Query, *, with_inputs: bool) -> UnsafeSet:
    size = query.outputs + (query.inputs if with_inputs else 0)
    rows = torch.zeros(len(case.constraints), size, dtype=torch.float64)
    for row, constraint in zip(rows, case.constraints, strict=True):
        for key, value in constraint.function.coefficients.items():
            row[-1 - key if key < 0 else query.outputs + key] = value
    constants = [constraint.function.constant for constraint in case.constraints]
    strict = [constraint.strict for constraint in case.constraints]
    return UnsafeSet(
        rows, torch.tensor(constants, dtype=torch.float64), torch.tensor(strict, dtype=torch.bool)
    )


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
        graph = traced(module, sample, simple=True).to(torch.float64)
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


_ELEMENTS = 2**22
"""largest number of values of the inputs that are changed at once"""


def falsified(
    subject: JoinedNetworks, problem: Problem, rng: Draws, *, starts: int, steps: int, deadline: float
) -> Witness | None:
    """Return an input of the box that leads to a target, or None if `starts` descents for each target lead to none.

    `deadline` is a value of `time.perf_counter()`. The first start is the middle of the box, the others are random.
    """
    graph = subject.graph.to(torch.float32)
    at_once = max(1, _ELEMENTS // (starts * graph.shape.numel()))
    for first in range(0, len(problem.targets), at_once):
        targets = problem.targets[first : first + at_once]
        ids = torch.arange(first, first + len(targets)).repeat_interleave(starts)
        noise = rng.at("start").uniform(
            ids * starts + torch.arange(starts).repeat(len(targets)), len(problem.low)
        )
        noise[::starts] = 0.5
        low, high = problem.low.float(), problem.high.float()
        width = high - low
        x = low + width * noise
        for step in range(steps + 1):
            x.requires_grad_()
            values = graph(x.reshape(len(x), *graph.shape))
            losses = []
            for j, target in enumerate(targets):
                mine = values[j * starts : (j + 1) * starts]
                witness = _checked(
                    subject, problem, target, x.detach()[j * starts : (j + 1) * starts], mine.detach()
                )
                if witness is not None:
                    return witness
                losses.append(_loss(target, mine))
            if step == steps or time.perf_counter() >= deadline:
                break
            (slope,) = torch.autograd.grad(torch.stack(losses).sum(), x)
            size = 0.25 * (1 + math.cos(math.pi * step / steps)) / 2 + 0.002
            x = torch.minimum(torch.maximum(x.detach() - size * width * slope.sign(), low), high)
        if time.perf_counter() >= deadline:
            return None
    return None


def _loss(target: UnsafeSet, values: Tensor) -> Tensor:
    functions = values @ target.rows.t().to(values) + target.constants.to(values)
    if not functions.shape[1]:
        return values.sum() * 0
    half = len(values) // 2
    return functions[half:].amax(1).sum() + functions[:half].clamp(min=0).sum()


def _checked(
    subject: JoinedNetworks, problem: Problem, target: UnsafeSet, x: Tensor, values: Tensor
) -> Witness | None:
    """A confirmed witness among inputs whose values with 32 bits lead to the target, or nearly."""
    functions = values.double() @ target.rows.t() + target.constants
    near = (functions <= 1e-5 * (1 + functions.abs())).all(1)
    return subject.confirmed(x[near], problem, target) if near.any() else None


_AT_ONCE = 2048
"""largest number of boxes whose bounds are computed together"""
_VALUES = 2**21
"""largest number of values of the network for all boxes that are computed together"""
_MOST = 2**20
"""largest number of boxes that wait"""
_FINEST = 2.0**-24
"""width of a box, relative to the first one, below which it is not divided"""
_SMALL, _CLOSE = 2.0**-24, 1e-5
"""volume of a box, relative to the first one, from which its bounds are computed with 64 bits, if they may be, and
distance of the bound of the box around it from zero, relative to the largest one
"""
_RECORDED = 2**26
"""largest number of coefficients that are kept for the gradients of bounds"""


@dataclass(eq=False)
class BoxSearch:
    """Branch and bound over boxes for one problem. It can be continued after a time limit.

    A box is divided at the input whose width costs the bound most. With few inputs, this cost is the gradient of the
    bound with respect to the ends of the box, through all bounds inside the network. With many, or on a large network,
    for which the gradient takes too much memory, it is that of the last linear bound.
    """

    subject: JoinedNetworks
    problem: Problem
    graphs: Sequence[Graph]
    """the graph of the subject, in the data types of the bounds: the last one for boxes that are small or nearly
    excluded, and the first for the others
    """
    low: Tensor = field(init=False)
    """smallest values (n, d) of the boxes that wait, float64"""
    high: Tensor = field(init=False)
    bound: Tensor = field(init=False)
    """lower bounds (n) of the largest function of the worst target"""
    largest: float = 0.0
    """largest magnitude of a negative bound"""
    exhausted: bool = False
    """whether a box could be neither excluded nor divided"""
    work: int = 0
    """number of boxes whose bounds were computed"""

    def __post_init__(self) -> None:
        self.low, self.high = self.problem.low[None], self.problem.high[None]
        self.bound = torch.zeros(1, dtype=torch.float64)
        self._whole, graph = self.problem.high - self.problem.low, self.graphs[0]
        self._free = self._whole > 0
        values = sum(node.shape.numel() for node in graph.nodes)
        self.at_once = max(4, min(_AT_ONCE, _VALUES // values))
        sizes = [graph.shape_of(i).numel() for i in range(graph.output + 1)]
        kept = 4 * sum(sizes[index] * sum(sizes[: index + 1]) for index in graph.bounded)
        self.few = self.problem.varying <= _MANY and kept <= _RECORDED
        if self.few:
            self.at_once = max(1, min(self.at_once, _RECORDED // max(1, kept)))

    @property
    def finished(self) -> bool:
        """Whether no box waits: the targets are excluded, unless the search is exhausted."""
        return not len(self.low)

    def search(self, deadline: float) -> Witness | None:
        """Continue until no box waits, a witness is found, the search is exhausted, or until the deadline.

        `deadline` is a value of `time.perf_counter()`.
        """
        at_once = min(16, self.at_once)
        with torch.no_grad():
            while len(self.low) and not self.exhausted and time.perf_counter() < deadline:
                order = self.bound.argsort(stable=True)
                chosen, rest = order[:at_once], order[at_once:]
                low, high, parent = self.low[chosen], self.high[chosen], self.bound[chosen]
                self.low, self.high, self.bound = self.low[rest], self.high[rest], self.bound[rest]
                small = ((high - low) / self._whole)[:, self._free].prod(1) < _SMALL
                exact = small | (parent >= -_CLOSE * self.largest)
                self.largest = max(self.largest, -float(parent.min()))
                for part, graph in ((~exact, self.graphs[0]), (exact, self.graphs[-1])):
                    witness = self._treated(low[part], high[part], graph) if part.any() else None
                    if witness is not None:
                        return witness
                at_once = min(2 * at_once, self.at_once)
        return None

    def _treated(self, low: Tensor, high: Tensor, graph: Graph) -> Witness | None:
        """Bound some boxes, and put the halves of those that are not excluded among the boxes that wait."""
        self.work += len(low)
        shape, dtype = (len(low), *graph.shape), _dtype(graph)
        region = Region(low.view(shape), high.view(shape), ((low + high) / 2).view(shape)).to(dtype)
        claims = [target.claim(dtype) for target in self.problem.targets]
        rows = torch.cat([claim.rows for claim in claims])
        ends = [end.clone().requires_grad_(self.few) for end in region.box]
        with torch.set_grad_enabled(self.few):
            relaxation = relaxed(graph, Region(ends[0], ends[1], region.centre))
            result = substitute(relaxation, graph.output, rows[None])
            bound, row, worst = _worst(result.lower, claims)
            left = ~(bound > 0)  # a NaN is not a proof
            if not left.any():
                return None
            costs = result.coefficients.detach().flatten(2)[torch.arange(len(row)), row].double()
            slopes = costs[left]
            if bound.requires_grad:
                finite = bound[bound.isfinite()].sum()
                of_low, of_high = torch.autograd.grad(finite, ends, materialize_grads=True)
                costs = (of_low - of_high).flatten(1).double().nan_to_num(0.0, 0.0, 0.0)
        low, high, bound, worst = low[left], high[left], bound.detach()[left], worst[left]
        corners = torch.where(slopes > 0, low, high)
        for j in sorted(set(worst.tolist())):
            mine = worst == j
            points = torch.cat((corners[mine], (low[mine] + high[mine]) / 2))
            witness = self.subject.confirmed(points, self.problem, self.problem.targets[j])
            if witness is not None:
                return witness
        self._divide(low, high, bound.double(), costs[left])
        return None

    def _divide(self, low: Tensor, high: Tensor, bound: Tensor, costs: Tensor) -> None:
        width = high - low
        relative = width / self._whole.clamp(min=torch.finfo(torch.float64).tiny)
        if bool((relative.amax(1) < _FINEST).any()) or len(self.low) > _MOST:
            self.exhausted = True
            return
        gain = width * costs.abs()
        score = gain + 1e-3 * relative * gain.amax(1, keepdim=True) + 1e-30 * relative
        score = torch.where(relative < _FINEST, -1.0, score)
        dimension = score.argmax(1, keepdim=True)
        middle = ((low + high) / 2).gather(1, dimension)
        self.low = torch.cat((self.low, low, low.scatter(1, dimension, middle)))
        self.high = torch.cat((self.high, high.scatter(1, dimension, middle), high))
        self.bound = torch.cat((self.bound, bound, bound))


def _dtype(graph: Graph) -> torch.dtype:
    for node in graph.nodes:
        for value in vars(node.operation).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
    return torch.float64


def _worst(lower: Tensor, claims: list[OutputProperty]) -> tuple[Tensor, Tensor, Tensor]:
    """For each box the smallest bound (n) of all claims, the row (n) of the function with this bound, and the claim."""
    bounds, rows, start = [], [], 0
    for claim in claims:
        size = len(claim.rows)
        best = (lower[:, start : start + size] + claim.constants).max(1)
        bounds.append(best.values)
        rows.append(best.indices + start)
        start += size
    worst = torch.stack(bounds, 1).nan_to_num(nan=-torch.inf).min(1)
    row = torch.stack(rows, 1).gather(1, worst.indices[:, None])[:, 0]
    return worst.values, row, worst.indices


Answer = Literal["sat", "unsat", "unknown", "timed-out"]

ELEMENT_TYPES = {"real": None, "float32": "float32", "float64": "float64"}
"""element types that a query may declare, with the data type that the network must have for it"""
_FEW, _MANY = 6, 20
"""numbers of inputs up to which boxes are divided before signs of ReLUs, and up to which both are divided in turn"""
_FOR_BOXES = 0.8
"""part of the time for boxes if there are few inputs, for which signs are rarely faster"""
_FIRST, _AGAIN = 0.3, 0.1
"""parts of the time that is left for the first proofs, and for a search by descent from more starts after them"""
_STARTS = 128
"""number of these starts, for all targets together"""
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
    provers = [Prover(subject, problem, single=single) for problem in problems]
    share = 0.2 * max(0.0, deadline - time.perf_counter()) / len(problems)
    for prover in provers:
        for starts, steps in ((4, 20), (16, 60)):
            until = min(deadline, time.perf_counter() + share)
            witness = falsified(subject, prover.problem, rng, starts=starts, steps=steps, deadline=until)
            if witness is not None:
                return Verdict("sat", witness)
            if starts == 4 and prover.quick():
                break
    return _proved(provers, rng, deadline)


_Method = Callable[[float], Witness | None]
"""function that searches until a deadline, and returns a witness if it finds one"""


def _proved(provers: Sequence["Prover"], rng: Draws, deadline: float) -> Verdict:
    """Run the provers and the search for witnesses in turns, each for a part of the time that is left."""
    left = [prover for prover in provers if not prover.finished]
    runs: list[_Method] = [prover.run for prover in left]
    again: list[_Method] = [partial(prover.searched, rng) for prover in left]
    for part, searches in ((_FIRST, runs), (_AGAIN, again), (0.5, runs), (1.0, runs)):
        for i, search in enumerate(searches):
            now = time.perf_counter()
            witness = search(now + part * (deadline - now) / (len(searches) - i))
            if witness is not None:
                return Verdict("sat", witness)
    if all(prover.excluded for prover in provers):
        return Verdict("unsat")
    return Verdict("timed-out" if time.perf_counter() >= deadline else "unknown")


@dataclass(eq=False)
class Prover:
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
    trees: dict[int, tuple[int, Tree | None]] = field(default_factory=dict)
    """for each target the index of the graph of its search over signs, and the search once it has begun"""

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
        # those that are proved soonest first, which leave most of their time to the others
        self.left = sorted((j for j, bound in enumerate(best) if not bound > 0), key=lambda j: -best[j])
        self.excluded = not self.left
        return self.excluded

    def run(self, deadline: float) -> Witness | None:
        """Continue the proof until the deadline. Return a witness if one was found."""
        if self.finished:
            return None
        for method, until in self._methods(deadline):
            witness = method(until)
            if witness is not None or self.excluded:
                return witness
        by_signs = self.signs_ended or not splittable(self.subject.graph)
        self.hopeless = by_signs and self.boxes is not None and self.boxes.exhausted
        return None

    def searched(self, rng: Draws, deadline: float) -> Witness | None:
        """Search for a witness again, from more starts, until the deadline."""
        targets = tuple(self.problem.targets[j] for j in self.left)
        if self.finished:
            return None
        problem = Problem(self.problem.low, self.problem.high, targets)
        starts = max(32, _STARTS // len(targets))
        return falsified(self.subject, problem, rng, starts=starts, steps=100, deadline=deadline)

    def _methods(self, deadline: float) -> Iterator[tuple[_Method, float]]:
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
            self.boxes = BoxSearch(self.subject, problem, self.graphs)
        witness = self.boxes.search(deadline)
        self.excluded = self.boxes.finished and not self.boxes.exhausted and witness is None
        return witness

    def _by_signs(self, deadline: float) -> Witness | None:
        while self.left and not self.signs_ended and time.perf_counter() < deadline:
            waiting = list(self.left)
            for i, j in enumerate(waiting):
                now = time.perf_counter()
                bound, stopped = self._decided(j, now + (deadline - now) / (len(waiting) - i))
                if self.witness is not None:
                    return self.witness
                if bound > 0:
                    self.left.remove(j)
                elif not stopped:
                    self.signs_ended = True
        self.excluded = not self.left
        return None

    def _decided(self, j: int, deadline: float) -> tuple[float, bool]:
        """The bound of a target by branch and bound over signs, which is continued, and whether the time limit ended
        it. A search that ends without a decision is followed by one with the next graph.
        """
        with torch.no_grad():
            while True:
                number, tree = self.trees.get(j, (0, None))
                decision = self._begun(j, number) if tree is None else tree.continued(deadline)
                if isinstance(decision, Tree):
                    self.trees[j] = number, decision
                elif decision.bound > 0 or decision.stopped or self.witness is not None:
                    return decision.bound, decision.stopped
                elif number + 1 == len(self.graphs):
                    return decision.bound, False
                else:
                    self.trees[j] = number + 1, None

    def _begun(self, j: int, number: int) -> BranchingResult | Tree:
        """The search for a target on one of the graphs, or its result if no division is needed."""
        graph, target = self.graphs[number], self.problem.targets[j]
        relaxation = self._sharpened(graph)
        claim = target.claim(relaxation.region.low.dtype)
        first = optimised(relaxation, relaxation.graph.output, claim.rows[None], steps=_STEPS)
        bound = float((first.lower + claim.constants).amax())
        if bound > 0:
            return BranchingResult(bound, 1, stopped=False)
        violated = partial(self._violated, graph=graph, target=target)
        return Tree(relaxation, claim, Search(), first, violated)

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
