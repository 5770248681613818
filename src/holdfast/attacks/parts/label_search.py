"""Shared parts of label-based attacks: query limits for each example, starting points, and the search for the decision
boundary.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from holdfast.attacks.parts.closest import Closest, firmly_broken
from holdfast.attacks.parts.directions import waves
from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows

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

    An example is open while it has queries left and no broken point within a finite eps. `starts` are points, each of
    the shape of the inputs, from which the search begins.
    """

    def __init__(
        self, model: Model, batch: Batch, norm: Norm, queries: int, starts: Sequence[Inputs] = ()
    ) -> None:
        self._model, self._norm, self._given = model, norm, starts
        self._sufficient = norm.eps if norm.eps < math.inf else 0.0
        self._n_left = torch.full_like(batch.ids, queries)
        self.batch, self.bounds = batch, model.bounds
        self.closest = Closest(batch)

    def result(self) -> Inputs:
        """Return the result of the attack: the closest broken point of each example inside the ball, or its clean input
        if there is none.
        """
        return self._norm.project(self.closest.x, self.batch.x, self.bounds)

    def _start(self, rng: Draws) -> None:
        """Query the clean inputs, then search for starting points: the nearest of ten, or else the first that breaks.

        The given starts are tried before. The search continues as long as there are queries; an example that no start
        breaks stays unchanged.
        """
        self.ask(self.batch, self.batch.x)
        for points in self._given:
            subset = self.batch.take(self.open(self.batch))
            self.improve(subset, points[self.closest.rows(subset)], share=_RIVAL)
        for k, points in enumerate(_starts(self.batch, self.bounds.like(self.batch.x), rng)):
            subset = self.batch.take(self.open(self.batch) & ((k < _STARTS) | ~self.closest.found))
            if not len(subset):
                return
            self.improve(subset, points[self.closest.rows(subset)], share=_RIVAL)

    def open(self, subset: Batch) -> Mask:
        """Return a mask of those examples of `subset` that the attack continues with: they have queries left and are
        not yet broken within a finite eps.
        """
        rows = self.closest.rows(subset)
        return (self._n_left[rows] > 0) & (self.closest.distance[rows] > self._sufficient)

    def n_left(self, subset: Batch) -> Tensor:
        """Return the number of remaining queries of each example of `subset`, int64 (n)."""
        return self._n_left[self.closest.rows(subset)]

    def steps(self, rng: Draws) -> Iterator[tuple[int, Batch]]:
        """Search for starting points, then yield for each step its number and the examples that have a broken point and
        are still attacked. The attack ends when there are none.
        """
        self._start(rng.at("start"))
        for step in count():
            subset = self.batch.take(self.closest.found & self.open(self.batch))
            if not len(subset):
                return
            yield step, subset

    def closest_points(self, subset: Batch) -> tuple[Inputs, PerExample]:
        """Return the closest broken points so far of the examples of `subset`, and their distances from the clean
        inputs.
        """
        rows = self.closest.rows(subset)
        return self.closest.x.index_select(0, rows), self.closest.distance[rows]

    def ask(self, subset: Batch, x: Inputs, mask: Mask | None = None) -> Mask:
        """Query the model once at each point of `x`, and return a mask of the points that break it.

        Only open examples are queried, and only those of the mask `mask` if it is given; the result for all others is
        False.
        """
        queried = self.open(subset) if mask is None else mask & self.open(subset)
        broken, _ = self.ask_many(subset, x[:, None], queried.long())
        return broken[:, 0]

    def ask_many(self, subset: Batch, x: Tensor, n_points: Tensor) -> tuple[Mask, Mask]:
        """Query the model at several points of each example, the first `n_points` (n) of `x` (n, k, *features). Returns
        masks (n, k) of the points that break it and of the queried points.

        For an example with fewer queries left than `n_points`, fewer points are queried.
        """
        n, k = x.shape[:2]
        n_points = n_points.minimum(self.n_left(subset)) * self.open(subset)
        queried = torch.arange(k, device=x.device) < n_points[:, None]
        self._n_left[self.closest.rows(subset)] -= queried.sum(1)
        points, broken = x.flatten(0, 1), torch.zeros_like(queried).flatten()
        positions = queried.flatten().nonzero()[:, 0]
        if len(positions):
            queries = _queries(
                subset,
                positions // k,
                # no copy if all are queried
                points if len(positions) == len(points) else points.index_select(0, positions),
            )
            broken[positions] = firmly_broken(self._logits(queries), queries)
        away, hits = x.new_full((n * k,), torch.inf), broken.nonzero()[:, 0]
        away[hits] = self._norm.distance(points.index_select(0, hits), subset.x.index_select(0, hits // k))
        distance, nearest = away.view(n, k).min(1)
        chosen = points.index_select(0, nearest + k * torch.arange(n, device=x.device))
        self.closest.offer(subset, chosen, distance, distance < torch.inf)
        return broken.view(n, k), queried

    def _logits(self, queries: Batch) -> Logits:
        """Logits of a batch; on a CPU in parts of few rows, because large batches do not fit the caches."""
        rows = _ROWS if queries.x.device.type == "cpu" else len(queries)
        return torch.cat([self._model(part.x, part.ids) for part in queries.split(rows)])

    def improve(self, subset: Batch, points: Inputs, *, share: float = _NEARER) -> Mask:
        """Search for a closer broken point in the direction of each of the `points`: query it at a fraction `share` of
        the closest distance so far and, if it breaks the model, search for the boundary.

        Points of examples without a known distance are queried unchanged. The search starts from the points that break
        the model; for others, the cost is one query. Returns whether each point breaks the model.
        """
        broken, radius = self.nearer(subset, points, share=share)
        self.search(subset, points, radius * broken)
        return broken

    def nearer(self, subset: Batch, points: Inputs, *, share: float = _NEARER) -> tuple[Mask, PerExample]:
        """Move each of the `points` to the fraction `share` of the closest distance so far, query it, and return a mask
        of the points that break the model and their distances.
        """
        distance = self.closest.distance[self.closest.rows(subset)]
        radius = (share * distance).minimum(self._norm.distance(points, subset.x))
        return self.ask(subset, self._within(subset, points, radius)), radius

    def _within(self, subset: Batch, points: Inputs, radius: PerExample) -> Inputs:
        """The `points`, moved towards the clean inputs until they are within `radius`."""
        return self._norm.within(points, subset.x, self.bounds, radius)

    def search(self, subset: Batch, points: Inputs, radius: PerExample) -> None:
        """Find the decision boundary of a model on the line from each clean input towards its point in `points`. At the
        distance `radius` from the clean input, the line is known to be beyond the boundary.

        The step inwards is doubled until a point does not break the model, and a bisection follows. Examples with a
        radius of 0 are omitted.
        """
        high, low, stride = radius, torch.zeros_like(radius), _STRIDE * radius
        while True:
            rows = ((high - low > _PRECISION * high) & self.open(subset)).nonzero()[:, 0]
            if not len(rows):
                return
            if len(rows) < len(subset):
                subset, points = subset.take(rows), points.index_select(0, rows)
                high, low, stride = high[rows], low[rows], stride[rows]
            # at least half the radius, because the doubled stride soon exceeds it
            probe = torch.where(low > 0, (low + high) / 2, torch.maximum(high - stride, high / 2))
            broken = self.ask(subset, self._within(subset, points, probe))
            high, low = torch.where(broken, probe, high), torch.where(broken, low, probe)
            stride = 2 * stride


def _queries(subset: Batch, rows: Rows, x: Inputs) -> Batch:
    """A batch of the inputs `x`, each with the label, id and target of its row in `subset`."""
    return Batch(x, subset.y[rows], subset.ids[rows], None if subset.target is None else subset.target[rows])


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
