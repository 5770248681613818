"""Shared parts of label-based attacks: query limits for each example, starting points, and the search for the decision
boundary.
"""

import math
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows
from holdfast.ops.closest import Closest, firmly_broken
from holdfast.ops.directions import waves

_ROWS = (
    128  # half or twice as many are as fast on four networks of 28 to 32 pixels a side; far more are slower
)
_STARTS = 10  # number of starts that are compared, about the number of queries that one boundary search takes
_SLOW = 0.15  # share of the frequencies that the low-frequency starts consist of
_RIVAL = 0.9  # share of the known distance at which a new start must break the model to replace the old
_NEARER = 0.999  # the same for a step, so that the gain is worth the queries of the search
_PRECISION = 0.005  # share of the radius at which the boundary search ends; 0.02 ends 10 % farther away
_STRIDE = 0.02  # first inward step of the search as a share of the radius; doubled until the model is correct


class Decisions:
    """State of a label-based attack on a batch: the remaining queries and the closest broken point of each example.

    An example is open while it has queries left and no broken point within a finite eps.
    """

    def __init__(self, model: Model, batch: Batch, norm: Norm, queries: int) -> None:
        self._model, self._norm = model, norm
        self._enough = norm.eps if norm.eps < math.inf else 0.0
        self._left = torch.full_like(batch.ids, queries)
        self.batch, self.bounds = batch, model.bounds
        self.closest = Closest(batch)

    def found(self) -> Inputs:
        """Return the result of the attack: the closest broken point of each example inside the ball, or its clean input
        if there is none.
        """
        return self._norm.project(self.closest.x, self.batch.x, self.bounds)

    def _start(self, rng: Draws) -> None:
        """Query the clean inputs, then search for starting points: the nearest of ten, or else the first that breaks.

        The search continues as long as there are queries; an example that no start breaks stays unchanged.
        """
        self.ask(self.batch, self.batch.x)
        for k, points in enumerate(_starts(self.batch, self.bounds.like(self.batch.x), rng)):
            some = self.batch.take(self.open(self.batch) & ((k < _STARTS) | ~self.closest.found))
            if not len(some):
                return
            self.improve(some, points[self.closest.rows(some)], share=_RIVAL)

    def open(self, some: Batch) -> Mask:
        """Return a mask of those examples of `some` that the attack continues with: they have queries left and are not
        yet broken within a finite eps.
        """
        rows = self.closest.rows(some)
        return (self._left[rows] > 0) & (self.closest.distance[rows] > self._enough)

    def left(self, some: Batch) -> Tensor:
        """Return the number of remaining queries of each example of `some`, int64 (n)."""
        return self._left[self.closest.rows(some)]

    def steps(self, rng: Draws) -> Iterator[tuple[int, Batch]]:
        """Search for starting points, then yield for each step its number and the examples that have a broken point and
        are still attacked. The attack ends when there are none.
        """
        self._start(rng.at("start"))
        for step in count():
            some = self.batch.take(self.closest.found & self.open(self.batch))
            if not len(some):
                return
            yield step, some

    def known(self, some: Batch) -> tuple[Inputs, PerExample]:
        """Return the closest broken points so far of the examples of `some`, and their distances from the clean
        inputs.
        """
        rows = self.closest.rows(some)
        return self.closest.x.index_select(0, rows), self.closest.distance[rows]

    def ask(self, some: Batch, x: Inputs, who: Mask | None = None) -> Mask:
        """Query the model once at each point of `x`, and return a mask of the points that break it.

        Only open examples are queried, and only those of the mask `who` if it is given; the result for all others is
        False.
        """
        asked = self.open(some) if who is None else who & self.open(some)
        broken, _ = self.ask_many(some, x[:, None], asked.long())
        return broken[:, 0]

    def ask_many(self, some: Batch, x: Tensor, wanted: Tensor) -> tuple[Mask, Mask]:
        """Query the model at several points of each example, the first `wanted` (n) of `x` (n, k, *features). Returns
        masks (n, k) of the points that break it and of the queried points.

        For an example with fewer queries left than `wanted`, fewer points are queried.
        """
        n, k = x.shape[:2]
        wanted = wanted.minimum(self.left(some)) * self.open(some)
        asked = torch.arange(k, device=x.device) < wanted[:, None]
        self._left[self.closest.rows(some)] -= asked.sum(1)
        points, broken = x.flatten(0, 1), torch.zeros_like(asked).flatten()
        at = asked.flatten().nonzero()[:, 0]
        if len(at):
            few = _of(some, at // k, points if len(at) == len(points) else points.index_select(0, at))
            broken[at] = firmly_broken(self._answers(few), few)
        away, hits = x.new_full((n * k,), torch.inf), broken.nonzero()[:, 0]
        away[hits] = self._norm.distance(points.index_select(0, hits), some.x.index_select(0, hits // k))
        distance, nearest = away.view(n, k).min(1)
        chosen = points.index_select(0, nearest + k * torch.arange(n, device=x.device))
        self.closest.offer(some, chosen, distance, distance < torch.inf)
        return broken.view(n, k), asked

    def _answers(self, few: Batch) -> Logits:
        """Logits of a batch; on a CPU in parts of few rows, because large batches do not fit the caches."""
        rows = _ROWS if few.x.device.type == "cpu" else len(few)
        return torch.cat([self._model(part.x, part.ids) for part in few.split(rows)])

    def improve(self, some: Batch, far: Inputs, *, share: float = _NEARER) -> Mask:
        """Search for a closer broken point in the direction of each point `far`: query it at a fraction `share` of the
        closest distance so far and, if it breaks the model, search for the boundary.

        Points of examples without a known distance are queried unchanged. The search starts from the points that break
        the model; for others, the cost is one query. Returns whether each point breaks the model.
        """
        broken, radius = self.nearer(some, far, share=share)
        self.search(some, far, radius * broken)
        return broken

    def nearer(self, some: Batch, far: Inputs, *, share: float = _NEARER) -> tuple[Mask, PerExample]:
        """Move each point `far` to the fraction `share` of the closest distance so far, query it, and return a mask of
        the points that break the model and their distances.
        """
        known = self.closest.distance[self.closest.rows(some)]
        radius = (share * known).minimum(self._norm.distance(far, some.x))
        return self.ask(some, self._drawn_in(some, far, radius)), radius

    def _drawn_in(self, some: Batch, far: Inputs, radius: PerExample) -> Inputs:
        """The points `far`, moved towards the clean inputs until they are within `radius`."""
        return self._norm.within(far, some.x, self.bounds, radius)

    def search(self, some: Batch, far: Inputs, radius: PerExample) -> None:
        """Search for the decision boundary on the lines from the clean inputs towards the points `far`. The points at
        the distance `radius` are known to break the model.

        The step inwards is doubled until a point does not break the model, and a bisection follows. Examples with a
        radius of 0 are omitted.
        """
        high, low, stride = radius, torch.zeros_like(radius), _STRIDE * radius
        while True:
            left = ((high - low > _PRECISION * high) & self.open(some)).nonzero()[:, 0]
            if not len(left):
                return
            if len(left) < len(some):
                some, far = some.take(left), far.index_select(0, left)
                high, low, stride = high[left], low[left], stride[left]
            probe = torch.where(low > 0, (low + high) / 2, torch.maximum(high - stride, high / 2))
            broken = self.ask(some, self._drawn_in(some, far, probe))
            high, low = torch.where(broken, probe, high), torch.where(broken, low, probe)
            stride = 2 * stride


def _of(some: Batch, rows: Rows, x: Inputs) -> Batch:
    """A batch of the inputs `x`, each with the label, id and target of its row in `some`."""
    return Batch(x, some.y[rows], some.ids[rows], None if some.target is None else some.target[rows])


def _starts(batch: Batch, box: tuple[Tensor, Tensor], rng: Draws) -> Iterator[Inputs]:
    """Yield grey, inverted inputs, black, white; then endlessly uniform noise, box corners and low-frequency noise."""
    low, high = (side.expand_as(batch.x) for side in box)
    yield from ((low + high) / 2, low + high - batch.x, low, high)
    shape, dtype = batch.x.shape[1:], batch.x.dtype
    for k in count():
        noise = rng.at(k).uniform(batch.ids, *shape, dtype=dtype)
        yield low + noise * (high - low)
        yield low + noise.round() * (high - low)
        slow = waves(rng.at(k), batch.ids, 1, shape, _SLOW, dtype)[:, 0] * math.sqrt(shape.numel())
        yield low + ((1 + slow) / 2).clamp(0, 1) * (high - low)
