"""Branch and bound over the inputs of activations, and the provers that optimise their bounds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.certifiers.bounds.alpha import (
    Cuts,
    Optimised,
    optimised,
    reduced,
    reducible,
    sharpen,
    solved_leaf,
    started,
)
from holdfast.certifiers.bounds.crown import (
    NO_CHOICES,
    Choices,
    lowest,
    only_relu,
    refine,
    relaxed,
    substitute,
)
from holdfast.certifiers.bounds.graph import Graph, Relaxation, region_of
from holdfast.certifiers.bounds.operations import (
    Activation,
    Interval,
    Linear,
    Lines,
    Planes,
    Product,
    ReLU,
)
from holdfast.certifiers.objectives import Objective, objective_of
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.provers import GraphProver, computed
from holdfast.core.batch import Batch
from holdfast.core.catalogue import Arithmetic
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import exactly

_DEEP = 4
"""one of so many subproblems is chosen by its number of assumed signs, the others by their bounds"""
_DESCENT_ROUNDS, _DESCENT_STARTS = 8, 16
"""the search for a counterexample by descent is repeated after so many divisions, from so many inputs"""
_BELOW = 1e-3
"""weight of inputs of ReLUs whose lower line is used in the choice of the next division: on MNIST networks, tests of
all inputs chose none of them"""
_NARROW = 1e-4
"""width of an interval, relative to its values, below which it is not divided"""
_LEAF_STEPS = 200
"""number of steps of the optimisation of a subproblem in which all signs are known"""
_DESCENT_STEPS = 40
"""number of steps of the search for a counterexample by descent"""


@dataclass(frozen=True)
class OutputProperty:
    """The claim that at least one of some linear functions of the outputs of a network is positive."""

    rows: Tensor
    """coefficients (k, outputs) of the functions"""
    constants: Tensor
    """constants (k) of the functions"""

    def values(self, outputs: Tensor) -> Tensor:
        """Return the largest value of the functions for each row of outputs (n, outputs)."""
        return (outputs @ self.rows.t() + self.constants).amax(1)


@dataclass(frozen=True)
class Search:
    """Settings of branch and bound."""

    steps: int = 8
    """number of steps of the optimisation of each subproblem"""
    candidates: int = 8
    """number of inputs of activations that are tested before one is chosen for a division"""
    at_once: int = 32
    """largest number of subproblems that are divided together"""
    tightened: int = 128
    """largest number of unknown inputs of a nonlinear operation whose bounds are computed again for each subproblem"""


@dataclass(frozen=True)
class BranchingResult:
    """Result of branch and bound for one claim."""

    bound: float
    """proved lower bound of the largest of the functions, over the region"""
    work: int
    """number of subproblems"""
    stopped: bool
    """whether the time limit ended the search"""
    witness: Tensor | None = None
    """an input of the region at which none of the functions is positive, if one was found"""


@dataclass(frozen=True)
class _Problems:
    """Subproblems of one example, as rows of tensors."""

    cuts: Mapping[int, Cuts]
    """the assumed bounds of the inputs of nonlinear operations, by index"""
    bounds: Mapping[int, Interval]
    """bounds (d, *shape) of the inputs of nonlinear operations, by index"""
    bound: Tensor
    """largest lower bound (d) of the functions; infinity where the assumed signs contradict each other"""
    choices: Choices

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, rows: Tensor) -> "_Problems":
        return _Problems(
            {i: Cuts(cut.low[rows], cut.high[rows]) for i, cut in self.cuts.items()},
            {i: (low[rows], high[rows]) for i, (low, high) in self.bounds.items()},
            self.bound[rows],
            self.choices.mapped(lambda each: each[rows]),
        )

    @staticmethod
    def joined(parts: "list[_Problems]") -> "_Problems":
        first = parts[0]
        if len(parts) == 1:
            return first
        return _Problems(
            {
                i: Cuts(
                    torch.cat([part.cuts[i].low for part in parts]),
                    torch.cat([part.cuts[i].high for part in parts]),
                )
                for i in first.cuts
            },
            {
                i: (
                    torch.cat([part.bounds[i][0] for part in parts]),
                    torch.cat([part.bounds[i][1] for part in parts]),
                )
                for i in first.bounds
            },
            torch.cat([part.bound for part in parts]),
            Choices.joined([part.choices for part in parts]),
        )


def _next(problems: _Problems, count: int) -> tuple[Tensor, Tensor]:
    """The indices of the subproblems that are divided next, and of the others.

    Most are those with the smallest bounds. The others have the most assumed bounds, because subproblems in which all
    signs are known are solved exactly, so that counterexamples are found even while the smallest bound stays the same.
    """
    by_bound = problems.bound.argsort(stable=True)
    first = count - count // _DEEP
    rest = by_bound[first:]
    depth = sum((cut.low.int() + cut.high.int()).flatten(1).sum(1) for cut in problems.cuts.values())
    assert isinstance(depth, Tensor)
    rest = rest[depth[rest].argsort(stable=True, descending=True)]
    return torch.cat((by_bound[:first], rest[: count - first])), rest[count - first :]


def splittable(graph: Graph) -> bool:
    """Return whether the network has activations or products whose inputs can be divided into subproblems."""
    return bool(divisible(graph))


def divisible(graph: Graph) -> dict[int, list[int]]:
    """The activations and products on each value whose bounds can be divided, by the index of the value. The input of
    the network is not divided.
    """
    users: dict[int, list[int]] = {}
    for i in graph.nonlinear:
        for index in set(graph.node(i).inputs) - {0}:
            if isinstance(graph.node(i).operation, Activation | Product):
                users.setdefault(index, []).append(i)
    return users


def _piecewise_linear(graph: Graph) -> bool:
    """Whether a network is linear where the signs of the inputs of its ReLUs are known."""
    return all(isinstance(graph.node(i).operation, ReLU) for i in graph.nonlinear)


@dataclass(eq=False)
class Tree:
    """Branch and bound for one claim about one example, from the relaxation of the example. It can be continued after a
    time limit.
    """

    root: Relaxation
    claim: OutputProperty
    search: Search
    first: InitVar[Optimised]
    """bounds (1, k) of the functions of the claim for the whole region"""
    violated: Callable[[Tensor], Tensor]
    """function that returns for inputs (n, *shape) the mask of those at which the claim is false on the model"""
    work: int = 1
    rounds: int = 0
    divisible: dict[int, list[int]] = field(init=False)
    """the activations and products on each value that is divided, by the index of the value"""
    problems: _Problems = field(init=False)
    """subproblems that are not proved"""
    solved: float = float("inf")
    """smallest bound of the subproblems that are proved"""
    at_once: int = 4
    """number of subproblems that are divided next"""
    deadline: float = float("inf")
    """value of `time.perf_counter()` at which the search ends"""

    def __post_init__(self, first: Optimised) -> None:
        graph = self.root.graph
        self.divisible = divisible(graph)

        bound = (first.lower + self.claim.constants).amax(1)
        self.problems = _Problems(
            {
                i: Cuts(*torch.zeros(2, 1, *graph.shape_of(i), dtype=torch.bool, device=bound.device))
                for i in self.divisible
            },
            {index: self.root.bound(index) for index in graph.bounded},
            bound,
            self._filled(first.choices),
        )

    def continued(self, deadline: float) -> BranchingResult:
        """Return whether the claim holds, or what is known at a deadline, a value of `time.perf_counter()`."""
        self.deadline = deadline
        while len(self.problems):
            least = float(self.problems.bound.min())
            if time.perf_counter() >= deadline:
                return BranchingResult(min(self.solved, least), self.work, stopped=True)
            chosen, rest = (self.problems.take(rows) for rows in _next(self.problems, self.at_once))
            children, witness, final = self._divided(chosen)
            if witness is not None or final:  # final: a subproblem without unknown signs is not proved
                return BranchingResult(least, self.work, stopped=False, witness=witness)
            proved = children.bound > 0
            if proved.any():
                self.solved = min(self.solved, float(children.bound[proved].min()))
            self.problems = _Problems.joined([rest, children.take((~proved).nonzero()[:, 0])])
            self.at_once = min(2 * self.at_once, self.search.at_once)
        return BranchingResult(self.solved, self.work, stopped=False)

    def _filled(self, choices: Choices) -> Choices:
        """Choices for all activations, and for the multipliers of all values that are divided."""
        return started(self.root, self.root.graph.output, self._functions(1), choices, self.divisible)

    def _relaxation(self, problems: _Problems) -> Relaxation:
        d, root = len(problems), self.root
        # with tighter bounds those of linear operations and of ReLUs are smaller; slopes of others may be larger
        errors = {
            i: root.error_of(i).expand(d, -1)
            for i, node in enumerate(root.graph.nodes, 1)
            if isinstance(node.operation, Linear | ReLU)
        }
        region = root.region.of(torch.zeros(d, dtype=torch.long, device=problems.bound.device))
        return Relaxation(root.graph, region, dict(problems.bounds), errors=errors)

    def _functions(self, d: int) -> Tensor:
        return self.claim.rows[None].expand(d, -1, -1)

    def _divided(self, problems: _Problems) -> tuple[_Problems, Tensor | None, bool]:
        """The children of subproblems with their bounds, a counterexample if one was found, and whether one of the
        subproblems cannot be divided.
        """
        relaxation, d = self._relaxation(problems), len(problems)
        output = relaxation.graph.output
        result = substitute(
            relaxation, output, self._functions(d), problems.choices, rounded=False, passed=True
        )
        best = (result.lower + self.claim.constants).argmax(1)
        rows = torch.arange(d, device=best.device)
        corners = relaxation.region.minimiser(result.coefficients)[rows, best]
        wrong = self.violated(corners)
        if wrong.any():
            return problems, corners[wrong][0], False
        self.rounds += 1
        if self.rounds % _DESCENT_ROUNDS == 1:
            witness = self._descended(corners[:_DESCENT_STARTS])
            if witness is not None:
                return problems, witness, False
        scores = torch.cat(
            [
                self._scores(
                    relaxation, index, {i: result.passed[i][rows, best] for i in users if i in result.passed}
                )
                for index, users in self.divisible.items()
            ],
            1,
        )
        leaves = (scores.amax(1) < 0).nonzero()[:, 0]
        if len(leaves):
            solved, witness = self._solved(problems.take(leaves))
            if witness is None and bool((solved.bound <= 0).any()):
                witness = self._descended(corners[leaves])
                solved = self._bounded(solved, steps=_LEAF_STEPS)
            if witness is not None:
                return problems, witness, False
            if bool((solved.bound <= 0).any()):
                return problems, None, True
            # leaves that are proved now take no part in the division
            others = (scores.amax(1) >= 0).nonzero()[:, 0]
            if not len(others):
                return solved, None, False
            children, witness, final = self._divided(problems.take(others))
            return _Problems.joined([solved, children]), witness, final
        split = self._chosen(problems, scores)
        children = _Problems.joined([self._halved(problems, split, upper=upper) for upper in (True, False)])
        return self._bounded(self._tightened(children, split.repeat(2))), None, False

    def _solved(self, leaves: _Problems) -> tuple[_Problems, Tensor | None]:
        """Leaves with the bounds of linear programs, if their region is a box, and a counterexample or None."""
        if self.root.region.norm is not None or not _piecewise_linear(self.root.graph):
            return leaves, None
        bound = leaves.bound.clone()
        for row in (bound <= 0).nonzero()[:, 0].tolist():
            leaf = leaves.take(torch.tensor([row], device=bound.device))
            exact = solved_leaf(self._relaxation(leaf), leaf.cuts, self.claim.rows, self.claim.constants)
            bound[row] = max(float(bound[row]), exact.bound)
            if bound[row] <= 0 and bool(self.violated(exact.point).any()):
                return leaves, exact.point[0]
        return replace(leaves, bound=bound), None

    def _scores(self, relaxation: Relaxation, index: int, passed: Mapping[int, Tensor]) -> Tensor:
        """Estimates (d, values) of how much a division at each element of a value improves the bound; -1 where nothing
        is to be divided. `passed` are the coefficients (d, *shape) at the operations on the value.

        Where the coefficient is negative, the upper line of a ReLU is used, whose offset is lost. The slopes of lower
        lines are optimised, so that a sign improves little there. For other activations it is the distance of the line
        that is used from the function, in the middle of the interval, and for products that of the planes.
        """
        low, high = relaxation.bound(index)
        middle = (low + high) / 2
        wide = high - low > _NARROW * (1 + middle.abs())
        total = torch.full_like(low, -1.0)
        for i, a in passed.items():
            node, lines, divided = relaxation.graph.node(i), relaxation.lines_of(i), wide
            if isinstance(node.operation, ReLU):
                divided = (low < 0) & (high > 0)
                gap = -low * high / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
                score = torch.where(a < 0, -a, _BELOW * a) * gap
            elif isinstance(node.operation, Product):
                assert isinstance(lines, Planes)
                score = torch.zeros_like(low)
                for j, gaps in zip(node.inputs, node.operation.gaps(a.abs(), lines), strict=True):
                    score = score + gaps if j == index else score
            else:
                assert isinstance(lines, Lines)
                assert isinstance(node.operation, Activation)
                value = node.operation(middle)
                upper = lines.upper_slope * middle + lines.upper_offset - value
                lower = value - lines.lower_slope * middle - lines.lower_offset
                score = torch.where(a < 0, -a * upper, a * lower).nan_to_num(0.0)
            total = torch.where(divided, total.clamp(min=0) + score, total)
        return total.flatten(1)

    def _chosen(self, problems: _Problems, scores: Tensor) -> Tensor:
        """For each subproblem the index of the input that is divided: of the candidates with the highest scores, the
        one whose children have the largest bounds.
        """
        count = min(self.search.candidates, scores.shape[1])
        best = scores.topk(count, 1)
        outcomes = []
        for c in range(count):
            split = best.indices[:, c]
            sides = [
                self._plain_bound(self._halved(problems, split, upper=upper)).clamp(max=0.0)
                for upper in (True, False)
            ]
            outcome = sides[0] + sides[1]
            outcomes.append(torch.where(best.values[:, c] > 0, outcome, -torch.inf))
        return best.indices.gather(1, torch.stack(outcomes, 1).argmax(1, keepdim=True))[:, 0]

    def _plain_bound(self, problems: _Problems) -> Tensor:
        relaxation = self._relaxation(problems)
        functions = self._functions(len(problems))
        lower = substitute(
            relaxation, relaxation.graph.output, functions, problems.choices, rounded=False
        ).lower
        return torch.maximum((lower + self.claim.constants).amax(1), problems.bound)

    def _halved(self, problems: _Problems, split: Tensor, *, upper: bool) -> _Problems:
        """The upper or the lower parts of the subproblems, which are divided at one element of a value each. `split`
        are indices of the joined elements of all values that can be divided.

        A value of unknown sign is divided at zero if only ReLUs use it, otherwise in the middle.
        """
        cuts, bounds = dict(problems.cuts), dict(problems.bounds)
        for index, rows, places in self._places(split):
            low, high = (each.clone() for each in bounds[index])
            at = (low.flatten(1)[rows, places] + high.flatten(1)[rows, places]) / 2
            if only_relu(self.root.graph, index):
                at = torch.zeros_like(at)
            side = low if upper else high
            side.flatten(1)[rows, places] = at
            bounds[index] = (low, high)
            assumed = Cuts(cuts[index].low.clone(), cuts[index].high.clone())
            (assumed.low if upper else assumed.high).flatten(1)[rows, places] = True
            cuts[index] = assumed
        return replace(problems, cuts=cuts, bounds=bounds)

    def _places(self, split: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each value that is divided its index, and the rows and places of the divided elements."""
        start = 0
        for index in self.divisible:
            size = self.root.graph.shape_of(index).numel()
            rows = ((split >= start) & (split < start + size)).nonzero()[:, 0]
            if len(rows):
                yield index, rows, split[rows] - start
            start += size

    def _tightened(self, problems: _Problems, split: Tensor) -> _Problems:
        """The subproblems with bounds of all values after the divided inputs that make use of the assumed bound."""
        bounds, bound = dict(problems.bounds), problems.bound.clone()
        divided = torch.zeros_like(split)
        for i, rows, _ in self._places(split):
            divided[rows] = i
        graph = self.root.graph
        for index in graph.bounded:
            rows = (divided < index).nonzero()[:, 0]
            if index == 0 or not len(rows) or not self._cheap(index):
                continue
            part = replace(problems, bounds=bounds).take(rows)
            relaxation = self._relaxation(part)
            refine(relaxation, index, self.deadline)
            low, high = relaxation.bound(index)
            # no input has the assumed bounds if a lower bound exceeds an upper one
            bound[rows] = torch.where((low > high).flatten(1).any(1), torch.inf, bound[rows])
            new = [each.clone() for each in bounds[index]]
            new[0][rows], new[1][rows] = torch.minimum(low, high), high
            bounds[index] = (new[0], new[1])
        return replace(problems, bounds=bounds, bound=bound)

    def _cheap(self, index: int) -> bool:
        """Whether bounds of a value cost about as little as those of a subproblem."""
        low, high = self.root.bound(index)
        unknown = (low < 0) & (high > 0) if only_relu(self.root.graph, index) else low < high
        return int(unknown.sum()) <= self.search.tightened

    def _descended(self, x: Tensor) -> Tensor | None:
        """An input at which the claim is false, searched by gradient descent from the inputs `x` (d, *shape)."""
        region = self.root.region.of(torch.zeros(len(x), dtype=torch.long, device=x.device))
        width = region.high - region.low
        for step in range(_DESCENT_STEPS):
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                values = self.claim.values(self.root.graph(point))
                (slope,) = torch.autograd.grad(values.sum(), point)
            x = point.detach() - slope.sign() * width * (0.25 * (1 - step / _DESCENT_STEPS))
            x = torch.maximum(torch.minimum(x, region.high), region.low)
            if bool((values <= 0).any()) or step == _DESCENT_STEPS - 1:
                wrong = self.violated(x)
                if wrong.any():
                    return x[wrong][0]
        return None

    def _bounded(self, problems: _Problems, steps: int | None = None) -> _Problems:
        relaxation, d = self._relaxation(problems), len(problems)
        self.work += d
        result = optimised(
            relaxation,
            relaxation.graph.output,
            self._functions(d),
            steps=self.search.steps if steps is None else steps,
            start=problems.choices,
            cuts=problems.cuts,
        )
        bound = torch.maximum((result.lower + self.claim.constants).amax(1), problems.bound)
        return replace(problems, bound=bound, choices=problems.choices.updated(result.choices))


@dataclass(frozen=True)
class AlphaCrown(GraphProver):
    """Alpha-CROWN: CROWN with optimised slopes of activations and planes of products.

    Xu et al., ICLR 2021, arXiv:2011.13824.
    """

    name: ClassVar[str] = "alpha-crown"
    timeout_s: float = 60.0
    """time limit for one example in seconds"""
    steps: int = 20
    """number of steps of the optimisation"""
    arithmetic: Arithmetic = "exact"
    """arithmetic of the network: exact or float32"""

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        graph = computed(graph, model, self.arithmetic)
        return _Searching(objective_of(model), graph, model, threat, self.steps, None, self.timeout_s)


@dataclass(frozen=True)
class BranchAndBound(GraphProver):
    """Branch and bound with Lagrange multipliers (beta-CROWN), until a time limit for each example.

    Wang et al., NeurIPS 2021, arXiv:2103.06624. It proves the claim or returns a counterexample if it has enough time;
    at functions other than ReLUs, subproblems halve the interval of an input.
    """

    name: ClassVar[str] = "branch-and-bound"
    timeout_s: float = 60.0
    """time limit for one example in seconds"""
    steps: int = 20
    """number of steps of the optimisation before the first division"""
    search: Search = Search()
    arithmetic: Arithmetic = "exact"
    """arithmetic of the network: exact or float32"""

    def on(self, graph: Graph, model: Classifier, threat: ThreatModel) -> ReadyProver:
        """Prepare the prover for a model with a known graph."""
        graph = computed(graph, model, self.arithmetic)
        return _Searching(objective_of(model), graph, model, threat, self.steps, self.search, self.timeout_s)


@dataclass(frozen=True, eq=False)
class _Claims:
    """What is proved about the functions of an objective for an example, such as its margins."""

    rows: Tensor
    """coefficients (1, k, outputs) of the functions"""
    proved: Tensor
    """lower bounds (k) of the functions, float64"""
    choices: Choices
    """the choices of the last optimisation, of the functions `chosen`"""
    stopped: bool
    """whether a deadline ended the computation of bounds"""
    work: int = 1
    chosen: Sequence[int] = ()
    undefined: Mapping[int, str] = field(default_factory=dict)
    """`undefined` of the proofs"""

    @property
    def open(self) -> list[int]:
        """Indices of the functions that are not proved to be positive."""
        return (~(self.proved > 0)).nonzero()[:, 0].tolist()

    def bounded(self, row: int) -> Optimised:
        """The bound of one function, with the choices of the last optimisation."""
        place = list(self.chosen).index(row)
        return Optimised(self.proved[row : row + 1][None].to(self.rows), self.choices.of_function(place))

    def decided(self, row: int, decision: BranchingResult) -> "_Claims":
        """The claims after branch and bound for one of them."""
        proved = self.proved.clone()
        proved[row] = max(float(proved[row]), decision.bound)
        return replace(
            self, proved=proved, work=self.work + decision.work, stopped=self.stopped or decision.stopped
        )

    def proofs(self, one: Batch, objective: Objective) -> Proofs:
        """The proofs of the example without a counterexample."""
        proofs = objective.proofs(one, self.proved[None])
        return replace(
            proofs,
            work=torch.full_like(proofs.work, self.work),
            stopped=torch.full_like(proofs.stopped, self.stopped),
            undefined=self.undefined,
        )


@dataclass(frozen=True, eq=False)
class _Searching:
    """A prover that treats examples one after another."""

    objective: Objective
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
        """The functions of an example with their bounds by CROWN, and the relaxation."""
        region = region_of(one.x, self.threat.constraint, self.model.bounds)
        relaxation = relaxed(graph, region, deadline=deadline)
        rows = self.objective.rows(one, graph.shape_of(graph.output)[0])
        lower = lowest(relaxation, rows)[0]
        undefined = relaxation.undefined(one.ids)
        claims = _Claims(rows, lower.double(), NO_CHOICES, relaxation.stopped, undefined=undefined)
        return claims, relaxation

    def _continued(self, claims: "_Claims", relaxation: Relaxation, one: Batch, deadline: float) -> Proofs:
        """The result of optimised bounds, and of branch and bound, for the functions that are not proved."""
        if not claims.open:
            return claims.proofs(one, self.objective)
        small = not claims.stopped and reducible(relaxation)
        if small:
            relaxation = reduced(relaxation)
        if small or self.search:
            claims = self._optimised(relaxation, claims)
        if claims.open and (small or not self.search):
            claims = self._optimised(relaxation, self._sharpened(relaxation, claims, deadline))
        if claims.open and self.search and splittable(relaxation.graph):
            return self._searched(relaxation, claims, one, deadline)
        return claims.proofs(one, self.objective)

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
            tree = Tree(relaxation, claim, self.search or Search(), claims.bounded(row), violated)
            decision = tree.continued(deadline)
            claims = claims.decided(row, decision)
            if decision.witness is not None:
                x_adv = self._inside(decision.witness[None], one)
                if self._wrong(x_adv, one).all():
                    proofs = claims.proofs(one, self.objective)
                    return replace(proofs, x_adv=x_adv, broken=torch.ones_like(proofs.broken))
            if decision.bound <= 0:
                break
        return claims.proofs(one, self.objective)

    def _inside(self, x: Tensor, one: Batch) -> Tensor:
        inside: Tensor = self.threat.constraint.project(x, one.x.expand_as(x), self.model.bounds)
        return inside

    def _wrong(self, x: Tensor, one: Batch) -> Tensor:
        parameter = next(self.model.parameters(), None)
        dtype = x.dtype if parameter is None else parameter.dtype
        return self.objective.wrong(self.model(x.to(dtype)), one)
