"""Branch and bound over boxes of inputs: a box whose targets are not excluded by bounds is divided into two.

For few inputs, as in control, it is much faster than a division by signs of ReLUs, and it applies to every activation.
Wang, Pei, Whitehouse, Yang, Jana, "Formal Security Analysis of Neural Networks using Symbolic Intervals", USENIX
Security 2018, arXiv:1804.10829. Differs: bounds are those of CROWN, and the input that is divided is the one whose
width times its coefficient in the worst bound is largest.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.certifiers.bounds.crown import relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.region import Region
from holdfast.certifiers.branching.branching import OutputProperty
from holdfast.certifiers.vnnlib.problems import Problem
from holdfast.certifiers.vnnlib.subject import JoinedNetworks, Witness

_AT_ONCE = 2048
"""largest number of boxes whose bounds are computed together"""
_VALUES = 2**21
"""largest number of values of the network for all boxes that are computed together"""
_MOST = 2**20
"""largest number of boxes that wait"""
_FINEST = 2.0**-24
"""width of a box, relative to the first one, below which it is not divided"""


@dataclass(eq=False)
class BoxSearch:
    """Branch and bound over boxes for one problem. It can be continued after a time limit."""

    subject: JoinedNetworks
    problem: Problem
    graph: Graph
    """the graph of the subject, in the data type of the bounds"""
    low: Tensor = field(init=False)
    """smallest values (n, d) of the boxes that wait, float64"""
    high: Tensor = field(init=False)
    bound: Tensor = field(init=False)
    """lower bounds (n) of the largest function of the worst target"""
    exhausted: bool = False
    """whether a box could be neither excluded nor divided"""
    work: int = 0
    """number of boxes whose bounds were computed"""

    def __post_init__(self) -> None:
        self.low, self.high = self.problem.low[None], self.problem.high[None]
        self.bound = torch.zeros(1, dtype=torch.float64)
        dtype = _dtype(self.graph)
        self.claims = [target.claim(dtype) for target in self.problem.targets]
        self.dtype = dtype
        values = sum(node.shape.numel() for node in self.graph.nodes)
        self.at_once = max(4, min(_AT_ONCE, _VALUES // values))

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
                low, high = self.low[chosen], self.high[chosen]
                self.low, self.high, self.bound = self.low[rest], self.high[rest], self.bound[rest]
                witness = self._treated(low, high)
                if witness is not None:
                    return witness
                at_once = min(2 * at_once, self.at_once)
        return None

    def _treated(self, low: Tensor, high: Tensor) -> Witness | None:
        """Bound some boxes, and put the halves of those that are not excluded among the boxes that wait."""
        self.work += len(low)
        shape = (len(low), *self.graph.shape)
        region = Region(low.view(shape), high.view(shape), ((low + high) / 2).view(shape)).to(self.dtype)
        rows = torch.cat([claim.rows for claim in self.claims])
        result = substitute(relaxed(self.graph, region), self.graph.output, rows[None])
        bound, row, worst = _worst(result.lower, self.claims)
        left = ~(bound > 0)  # a NaN is not a proof
        if not left.any():
            return None
        low, high, bound, row, worst = low[left], high[left], bound[left], row[left], worst[left]
        slopes = result.coefficients[left].flatten(2)[torch.arange(len(row)), row].double()
        corners = torch.where(slopes > 0, low, high)
        for j in sorted(set(worst.tolist())):
            mine = worst == j
            points = torch.cat((corners[mine], (low[mine] + high[mine]) / 2))
            witness = self.subject.confirmed(points, self.problem, self.problem.targets[j])
            if witness is not None:
                return witness
        self._divide(low, high, bound.double(), slopes)
        return None

    def _divide(self, low: Tensor, high: Tensor, bound: Tensor, slopes: Tensor) -> None:
        whole = (self.problem.high - self.problem.low).clamp(min=torch.finfo(torch.float64).tiny)
        width = high - low
        relative = width / whole
        if bool((relative.amax(1) < _FINEST).any()) or len(self.low) > _MOST:
            self.exhausted = True
            return
        gain = width * slopes.abs()
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
