"""Approximations of decision boundaries, and attacks that query a model: lines, walks and estimates of normals."""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.ascent import descend, gradient
from holdfast.attacks.parts.losses import Best, Closest, firmly_broken, leeway, likeliest, margin, margin_loss
from holdfast.attacks.parts.random_search import directions, waves
from holdfast.core.batch import Batch, pick, spread
from holdfast.core.constraints import L0, L1, L2, Linf, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Bounds, Model
from holdfast.core.outputs import refused
from holdfast.core.types import Inputs, Labels, Logits, Mask, PerExample, Rows

DOUBLE_CHECKS = 4
"""number of further queries of a point that breaks a randomised model; the median margin counts"""


class CountedQueries:
    """Model with a number of passes that are left for each example, and the best points of all queries."""

    def __init__(self, model: Model, batch: Batch, constraint: Norm, passes: int) -> None:
        self.model, self.constraint, self.passes_left = model, constraint, passes
        self.best = Best(batch)
        self.randomised = False
        self._batch = batch

    def surviving(self) -> Batch:
        """Return the examples that no query has broken so far."""
        return self._batch.take(self.best.surviving)

    def begin(self) -> Logits:
        """Query the clean inputs twice, which shows whether the model is randomised, and return their logits."""
        first, second = (self.logits(self._batch, self._batch.x) for _ in range(2))
        self.randomised = not torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)
        return second

    def logits(self, batch: Batch, x: Inputs) -> Logits:
        """Return the logits of points `x` of the examples `batch`, from one pass."""
        self.passes_left -= 1
        with torch.no_grad():
            logits = self.model(x, batch.ids)
        self.offer(batch, x, logits)
        return logits

    def offer(self, batch: Batch, x: Inputs, logits: Logits) -> Mask:
        """Count queried points as results where they are in the constraint, and return a mask of the broken ones."""
        inside = allowed(self.constraint, x, batch.x, self.model.bounds)
        margins = margin(logits.detach(), batch)
        broken = inside & ~(margins > 0)
        if self.randomised and broken.any():
            margins = self._checked(batch, x, margins, broken)
        rows = inside.nonzero()[:, 0]
        self.best.offer(batch.take(rows), x.detach()[rows], margins[rows])
        return inside & ~(margins > 0)

    def _checked(self, batch: Batch, x: Inputs, margins: PerExample, broken: Mask) -> PerExample:
        rows = broken.nonzero()[:, 0]
        chosen, points = batch.take(rows), x.detach()[rows]
        self.passes_left -= DOUBLE_CHECKS
        with torch.no_grad():
            again = [margin(self.model(points, chosen.ids), chosen) for _ in range(DOUBLE_CHECKS)]
        margins = margins.clone()
        margins[rows] = torch.stack((margins[rows], *again)).median(0).values
        return margins


Answer = float | None
"""margin of a query, or None if it was rejected"""
Walk = Generator[Tensor, Answer, None]
"""attack on one example: it yields queries (*features) and is sent their answers"""


class Example:
    """One attacked example: its input `x` (*features), the radius `eps`, the limit of queries, and its random numbers,
    which are different in each call.
    """

    def __init__(self, batch: Batch, row: int, norm: Norm, bounds: Bounds, rng: Draws, limit: int) -> None:
        self.x, self.eps, self.limit = batch.x[row], norm.eps, limit
        self._norm, self._bounds = norm, bounds
        self._rng, self._ids, self._n_draws = rng, batch.ids[row : row + 1], 0

    def ball(self, x: Tensor) -> Tensor:
        """Return the nearest allowed input (*features) to `x`."""
        projected: Tensor = self._norm.project(x[None], self.x[None], self._bounds)[0]
        return projected

    def box(self, x: Tensor) -> Tensor:
        """Return `x` with each value clamped to its valid range."""
        return self._bounds.clamp(x[None])[0]

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform random numbers in [0, 1) of a shape."""
        return self._next().uniform(self._ids, *shape, dtype=self.x.dtype)[0]

    def signs(self, *shape: int) -> Tensor:
        """Return random signs of a shape."""
        return self._next().signs(self._ids, *shape, dtype=self.x.dtype)[0]

    def normal(self) -> Tensor:
        """Return standard normal random numbers (*features)."""
        return self._next().normal(self._ids, *self.x.shape, dtype=self.x.dtype)[0]

    def direction(self, length: float) -> Tensor:
        """Return a random vector (*features) with an L2 norm of `length`."""
        noise = self.normal()
        return noise * (length / max(float(noise.norm()), 1e-12))

    def _next(self) -> Draws:
        self._n_draws += 1
        return self._rng.at("draw", self._n_draws)


def follow(
    model: Model, batch: Batch, norm: Norm, walk: Callable[[Example], Walk], limit: int, rng: Draws
) -> Inputs:
    """Begin a walk for each example, send their queries to the model, one of each example in each call, and return the
    first allowed and accepted input that breaks the model (n, *features), or the clean input.

    A walk ends when it breaks the model, after `limit` queries, or when it gives up. Rejected inputs are those that the
    model marks, as `holdfast.core.outputs.refused` states.
    """
    result = batch.x.clone()
    walks = [walk(Example(batch, row, norm, model.bounds, rng, limit)) for row in range(len(batch))]
    queries = {row: next(walk) for row, walk in enumerate(walks)}
    for _ in range(limit):
        if not queries:
            break
        rows, x = torch.tensor(list(queries)), torch.stack(list(queries.values()))
        queried = batch.take(rows)
        with torch.no_grad():
            logits = model(x, queried.ids)
        rejected = refused(logits)
        margins = margin(logits.masked_fill(rejected[:, None], 0.0), queried)
        broken = ~rejected & ~(margins > 0) & allowed(norm, x, queried.x, model.bounds)
        result[rows[broken]] = x[broken]
        answers = [None if r else m for m, r in zip(margins.tolist(), rejected.tolist(), strict=True)]
        for row, answer, done in zip(rows.tolist(), answers, broken.tolist(), strict=True):
            del queries[row]
            if not done:
                try:
                    queries[row] = walks[row].send(answer)
                except StopIteration:
                    continue
    return result


def asked(x: Tensor) -> Generator[Tensor, Answer, Answer]:
    """Query one input and return the answer."""
    answer = yield x
    return answer


def least_size(
    attempt: Callable[[float], Generator[Tensor, Answer, Answer]],
    low: float,
    high: float,
    halvings: int,
    trials: int,
    rejections: int,
) -> Generator[Tensor, Answer, float]:
    """Search for the smallest size from `low` to `high` at which at most `rejections` of `trials` proposals are
    rejected; return `high` if there is none. The interval of the logarithm of the size is halved `halvings` times.
    """
    for _ in range(halvings):
        middle, n_rejected = (low * high) ** 0.5, 0
        for _ in range(trials):
            answer = yield from attempt(middle)
            n_rejected += answer is None
            if n_rejected > rejections:
                break
        if n_rejected <= rejections:
            high = middle
        else:
            low = middle
    return high


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


_TINY, _HUGE = 1e-30, 1e30
_CLOSE = 1e-5  # share of the distance that may be missing: rounding of sums, far below any overshoot

Flat = Linf | L2 | L1
"""norms that have an exact projection"""


def to_plane(
    points: Tensor, normal: Inputs, height: Tensor, norm: Flat, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """Return the shortest step from each point (k, n, *features) onto a plane with the given normal (n, *features) that
    stays within valid inputs, and the length of the step (k, n).

    `height` (k, n) is the value at each point of the affine function that is zero on the plane. If the plane does not
    intersect the box, the step leads to the corner of the box that is nearest to the plane. The box must be finite.
    """
    low, high = bounds.like(points)
    side = torch.where(height >= 0, -1.0, 1.0).to(normal.dtype)
    direction = normal.sign() * side.view(*height.shape, *[1] * (normal.dim() - 1))
    # arithmetic instead of torch.where, which is ten times slower with an irregular mask
    room = torch.addcmul((high - low) / 2, direction, (high + low) / 2 - points).clamp_min_(0).flatten(2)
    weight = normal.abs().flatten(1)
    # weights of at most 1, so that their products and sums stay within float32
    scale = weight.amax(1).clamp_min(_TINY)
    weight, rise = weight / scale[:, None], height.abs() / scale
    if isinstance(norm, L1):
        size = _one_by_one(weight, room, rise)
    else:
        size = _together(weight, room, rise, weight if isinstance(norm, L2) else None)
    step = size.view_as(points).mul_(direction)
    return step, _length(step.flatten(2), norm)


def _length(step: Tensor, norm: Flat) -> Tensor:
    """Lengths (k, n) of steps (k, n, features)."""
    if isinstance(norm, L2):
        squared: Tensor = torch.linalg.vecdot(step, step)
        return squared.sqrt()
    return torch.maximum(step.amax(2), -step.amin(2)) if isinstance(norm, Linf) else step.abs().sum(2)


def _dual_size(gradient: Inputs, norm: Flat) -> PerExample:
    """Dual norm: largest change of an affine function with this gradient in a step of length one."""
    size = gradient.flatten(1)
    if isinstance(norm, Linf):
        return size.abs().sum(1)
    return size.norm(dim=1) if isinstance(norm, L2) else size.abs().amax(1)


def _together(weight: Tensor, room: Tensor, rise: Tensor, speed: Tensor | None) -> Tensor:
    """Sizes `min(t*speed, room)` whose weighted sum is `rise`, or all of `room` if that is too small; None is speed 1.

    The sum is concave in t, so that Newton's method from below approaches the root from below; the root is exact once
    the linear piece that contains it is reached.
    """
    drive = weight if speed is None else weight * speed
    reached = torch.linalg.vecdot(room, weight) > rise
    t = torch.where(reached, rise / drive.sum(1).clamp_min(_TINY), _HUGE)
    for _ in range(room.shape[-1] + 1):
        moved = t[..., None] if speed is None else t[..., None] * speed
        size = torch.minimum(room, moved)
        short = (rise - torch.linalg.vecdot(size, weight)) * reached
        if not (short > _CLOSE * rise).any():
            break
        still_moving = (room - size).sign_()
        t = t + short.clamp_min(0) / torch.linalg.vecdot(still_moving, drive).clamp_min(_TINY)
    return size


def _one_by_one(weight: Tensor, room: Tensor, rise: Tensor) -> Tensor:
    """Use all the room of the coordinates with the largest weights, and of the next one as much as `rise` requires."""
    ordered, order = weight.sort(dim=1, descending=True)
    order = order.expand_as(room)
    ordered_room = room.gather(-1, order)
    before = F.pad((ordered * ordered_room)[..., :-1].cumsum(-1), (1, 0))
    size = ((rise[..., None] - before) / ordered.clamp_min(_TINY)).clamp_min(0).minimum(ordered_room)
    return torch.zeros_like(room).scatter_(-1, order, size * ordered.sign())


def plane(model: Model, batch: Batch, aim: Labels | None, norm: Flat) -> tuple[PerExample, Inputs, Logits]:
    """Return the linear approximation of a decision boundary at each input: value and gradient of the gap between the
    logits of the label and of the class `aim`. Also returns all logits.

    Without `aim`, the gap is the margin if the batch has targets, otherwise the one whose plane is closest (one
    backward for each class).
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        label_logit = logits.gather(1, batch.y[:, None])
        if aim is None and batch.target is None:
            return *_closest_plane(x, label_logit - logits, batch.y, norm), logits.detach()
        gap = margin(logits, batch) if aim is None else (label_logit - logits.gather(1, aim[:, None]))[:, 0]
        return gap.detach().nan_to_num(), input_gradient(gap, x), logits.detach()


def _closest_plane(x: Inputs, gaps: Logits, y: Labels, norm: Flat) -> tuple[PerExample, Inputs]:
    height, normal = torch.zeros_like(gaps[:, 0]), torch.zeros_like(x)
    nearest = torch.full_like(height, torch.inf)
    for number, gap in enumerate(gaps.unbind(1)):
        grad = input_gradient(gap, x, retain=True)
        value = gap.detach().nan_to_num()
        distance = (value.abs() / _dual_size(grad, norm).clamp_min(1e-12)).masked_fill(y == number, torch.inf)
        closer = distance < nearest
        height, nearest = torch.where(closer, value, height), torch.where(closer, distance, nearest)
        normal = torch.where(spread(closer, x), grad, normal)
    return height, normal


def rivals_of(logits: Logits, batch: Batch, k: int) -> Tensor:
    """Return for each example the classes that an attack tries to reach, int64 (n, k): the target class if there is
    one, else the `k` wrong classes with the largest logits.
    """
    if batch.target is not None:
        return batch.target[:, None]
    return likeliest(logits, batch.y, k)


def across(
    norm: Norm,
    bounds: Bounds,
    batch: Batch,
    x: Inputs,
    grads: Sequence[Inputs],
    margins: Tensor,
    overshoot: float,
) -> Inputs:
    """Return each point `x` moved just beyond the nearest of several linearised decision boundaries, which are given by
    gradients and logit gaps. It is unchanged if there are none.
    """
    if not grads:
        return x
    best, shift = torch.full_like(margins[:, 0], torch.inf), torch.zeros_like(x)
    beyond = overshoot * norm.distance(x, batch.x)
    for grad, gap in zip(grads, margins.unbind(1), strict=True):
        direction = norm.steepest(grad, x, bounds)
        distance = gap / (grad * direction).flatten(1).sum(1).clamp_min(1e-30)
        nearer, length = distance < best, (1 + overshoot) * distance + beyond
        best = torch.where(nearer, distance, best)
        shift = torch.where(spread(nearer, x), spread(length, x) * direction, shift)
    return bounds.clamp(x + shift)


def planes(model: Model, batch: Batch, x: Inputs, rivals: Tensor) -> tuple[Tensor, list[Inputs]]:
    """Return linear approximations of the decision boundaries at `x`: the absolute gap between the logit of each class
    in `rivals` and the leading logit (n, rivals), and the gradients of these gaps.

    The list of gradients is empty if the logits have none.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        gaps = logits.gather(1, rivals) - _leading(logits, batch)[:, None]
    margins = gaps.detach().abs() + leeway(logits.detach())[:, None]
    single_gaps = gaps.unbind(1) if logits.requires_grad else ()
    return margins, [input_gradient(gap, x, retain=True) for gap in single_gaps]


def _leading(logits: Logits, batch: Batch) -> PerExample:
    """The logit that a rival must exceed: that of the label, or with a target the largest other one."""
    if batch.target is None:
        return logits.gather(1, batch.y[:, None])[:, 0]
    return logits.scatter(1, batch.target[:, None], -torch.inf).amax(1)


_POINTS = 512  # points of one batch, so that they fit the caches
_RESERVE = 10  # queries that an estimate leaves for the step after it


def normal(
    decisions: Decisions, batch: Batch, x: Inputs, radius: PerExample, draws: int, rng: Draws, *, share: float
) -> Inputs:
    """Estimate the normal of the decision boundary at `x`, a direction of length one towards broken points, from the
    labels of random points. It is zero if no queries are left.

    It is computed from up to `draws` points at the distance `radius`, in small batches.
    """
    n_points = (decisions.n_left(batch) - _RESERVE).clamp(0, draws)
    sums, counts = x.new_zeros(len(batch), 2, x[0].numel()), x.new_zeros(len(batch), 2)
    for first in range(0, int(n_points.max()), _POINTS):
        k = min(_POINTS, int(n_points.max()) - first)
        pieces = (v.split(_POINTS // k) for v in (x[:, None], radius, n_points - first, sums, counts))  # type: ignore[no-untyped-call]
        for piece, point, distance, n_piece, total, counted in zip(
            batch.split(_POINTS // k), *pieces, strict=True
        ):
            u = directions(rng.at(first), piece.ids, k, x.shape[1:], share, x.dtype)
            points = torch.addcmul(point, spread(distance, u), u, out=u)  # in place to avoid allocation
            broken, queried = decisions.ask_many(piece, decisions.bounds.clamp(points, out=points), n_piece)
            signs = torch.stack(((2 * broken.long() - 1) * queried, queried), 1).to(x.dtype)
            total += signs @ (points - point).flatten(2)
            counted += signs.sum(2)
    mean = counts[:, 0] / counts[:, 1].clamp_min(1)
    # if all labels are equal, subtracting their mean would leave nothing
    towards = sums[:, 0] - torch.where(mean.abs() < 1, mean, 0)[:, None] * sums[:, 1]
    return L2().steepest(towards.view_as(x), x, decisions.bounds)


_FORWARDS = 10  # forward passes of the search on the segment to the clean input
_REACH = 5.0  # path length of the descent inside the ball, in multiples of eps
_FIRST = 15 / 16  # first probe of the bisection: a good attack ends within a few percent of the boundary

Shrink = Callable[[PerExample], Inputs]
"""function that returns the points within a given distance of the clean inputs that are most likely to be broken"""


def to_boundary(model: Model, batch: Batch, x_adv: Inputs, norm: Norm, refine: int = 0) -> Inputs:
    """Move the attacked inputs `x_adv` towards the clean inputs as far as they still break the model, and project the
    results onto the ball of `norm`.

    A point moves only to one that breaks the model by more than rounding. Under L0, changes are undone instead, the
    least useful first. Cost: at most ten forwards (under L0, the first with a backward) of the examples that differ
    from the clean ones.

    With `refine` and a finite eps no point is moved towards the clean input: points outside the ball are projected onto
    it, and `refine` gradient steps and a forward then lower their margin inside the ball.
    """
    if refine and norm.eps < math.inf:
        return _refined(model, batch, x_adv, norm, refine)
    changed = (norm.distance(x_adv, batch.x) > 0).nonzero()[:, 0]
    result = x_adv.clone()
    if len(changed):
        subset, points = batch.take(changed), x_adv[changed]
        if isinstance(norm, L0):
            result[changed] = _fewest_changes(model, subset, points, norm)
        else:  # shrink the ball around the clean input
            shrunk = partial(norm.within, points, subset.x, model.bounds)
            result[changed] = _bisected(model, subset, points, norm, shrunk, _FORWARDS)
    return norm.project(result, batch.x, model.bounds)


def _refined(model: Model, batch: Batch, x_adv: Inputs, norm: Norm, steps: int) -> Inputs:
    """Project `x_adv` onto the ball, and lower the margin of the points that were outside it by gradient steps."""
    outside = (norm.distance(x_adv, batch.x) > norm.eps).nonzero()[:, 0]
    result = norm.project(x_adv, batch.x, model.bounds)
    if len(outside):
        subset = batch.take(outside)
        result[outside], _ = descend(model, subset, result[outside], norm, steps=steps, reach=_REACH)
    return result


def _fewest_changes(model: Model, batch: Batch, points: Inputs, norm: L0) -> Inputs:
    """Undo changes in the order of their gradients, least useful first; move the remaining ones to the box's sides."""
    result = points.clone()
    grad, logits = gradient(model, batch.at(points), margin_loss)
    firm = firmly_broken(logits, batch)
    remaining, x, grad = batch.take(firm), points[firm], grad[firm]
    if not len(remaining):
        return result
    low, high = model.bounds.like(x)
    pushed = torch.where(x == remaining.x, x, torch.where(grad > 0, high, torch.where(grad < 0, low, x)))
    with torch.no_grad():
        better = firmly_broken(model(pushed, remaining.ids), remaining)
    x = pick(better, pushed, x)
    gain = torch.where(x == remaining.x, -torch.inf, grad * (x - remaining.x))
    result[firm] = _bisected(
        model,
        remaining,
        x,
        norm,
        lambda radius: torch.where(norm.largest(gain, radius), x, remaining.x),
        _FORWARDS - 2,  # the gradient and the pushed points took two
    )
    return result


def _bisected(
    model: Model, batch: Batch, points: Inputs, norm: Norm, shrink: Shrink, forwards: int
) -> Inputs:
    """The closest of `forwards` points of a bisection that breaks the model; `points` if none does."""
    closest, high = Closest(batch), norm.distance(points, batch.x)
    closest.offer(batch, points, high, high >= 0)
    low, probe = torch.zeros_like(high), _FIRST * high
    with torch.no_grad():
        for _ in range(forwards if len(batch) else 0):
            x = shrink(probe)
            broken, distance = firmly_broken(model(x, batch.ids), batch), norm.distance(x, batch.x)
            closest.offer(batch, x, distance, broken)
            high, low = torch.where(broken, distance, high), torch.where(broken, low, probe)
            probe = (low + high) / 2
    return closest.x
