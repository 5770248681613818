"""Gradients without access to those of the model: from scores, and from small networks trained on its answers."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.losses import Best, Closest, firmly_broken, margin
from holdfast.attacks.parts.random_search import signs
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import Constraint, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits, PerExample, Rows

_MINIBATCH = 128
_RATE = 2e-3
_RECENT = 0.5
"""share of a minibatch that is drawn from the newest points, along the path of the attack"""
_NEWEST = 0.25
"""share of the stored points that are the newest ones"""
_CONFIDENCE = 4.0
"""difference of the two largest logits after scaling, as in the loss `scaled_cross_entropy`"""
_MOST_STORED = 40_000_000
"""largest number of stored input values, 160 MB in float32"""
_WIDTH = 128
"""width of the hidden layers"""
_DENSE = 4000
"""largest number of values of an image for which all layers are dense"""
_PATCHES = 16
"""number of patches along the shorter side of a larger image"""


def network_for(shape: Sequence[int], classes: int) -> nn.Module:
    """Return an untrained network for inputs (n, *shape).

    Large images (channels, height, width) and long sequences (channels, length) pass a convolution of patches first,
    which bounds the number of weights; other inputs pass dense layers alone, which are many times faster and were not
    worse on digits.
    """
    first: list[nn.Module] = []
    if len(shape) in (2, 3) and math.prod(shape) > _DENSE:
        convolution = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        side = max(2, math.ceil(min(shape[1:]) / _PATCHES))
        first = [convolution(shape[0], _WIDTH // 4, side, side), nn.ReLU()]
    return nn.Sequential(
        *first, nn.Flatten(),
        nn.LazyLinear(_WIDTH), nn.ReLU(),
        nn.Linear(_WIDTH, _WIDTH), nn.ReLU(),
        nn.Linear(_WIDTH, classes),
    )  # fmt: skip


class SmallNetwork:
    """Network that learns the answers of a model. As a `Model` it has the logits of the network.

    Its weights, and the order of the points in training, are determined by `rng`.
    """

    def __init__(self, like: Inputs, classes: int, bounds: Bounds, rng: Draws) -> None:
        self.bounds, self._rng, self._classes = bounds, rng, classes
        self._mean = like.mean()
        self._scale = like.std(unbiased=False).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.key >> 1)  # of the CPU alone, which is restored
            net = network_for(like.shape[1:], classes)
            net(torch.zeros(1, *like.shape[1:]))  # gives the lazy layer its size
        self.net = net.to(like).requires_grad_(False)
        self._adam: torch.optim.Adam | None = None
        self._x: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._trainings = 0

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the network."""
        logits: Logits = self.net((x - self._mean) / self._scale)
        return logits

    def add(self, x: Inputs, logits: Logits) -> None:
        """Store queried points and their answers. Those that are not finite are left out."""
        finite = logits.isfinite().all(1) & x.flatten(1).isfinite().all(1)
        self._x.append(x.detach()[finite])
        self._answers.append(logits.detach()[finite])
        while len(self._x) > 1 and sum(part.numel() for part in self._x) > _MOST_STORED:
            del self._x[0], self._answers[0]

    def train(self, steps: int) -> None:
        """Take `steps` steps of Adam on the stored points. Later calls continue with more points."""
        x, answers = torch.cat(self._x), torch.cat(self._answers)
        if not len(x):
            return
        targets = soft_targets(answers)
        draw = torch.Generator().manual_seed(self._rng.at("training", self._trainings).key >> 1)
        self._trainings += 1
        self.net.requires_grad_(True)
        adam = self._adam = self._adam or torch.optim.Adam(self.net.parameters(), _RATE)
        newest, recent = int((1 - _NEWEST) * len(x)), int(_RECENT * _MINIBATCH)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.cat(
                    (
                        torch.randint(newest, len(x), (recent,), generator=draw),
                        torch.randint(len(x), (_MINIBATCH - recent,), generator=draw),
                    )
                ).to(x.device)
                adam.zero_grad()
                F.cross_entropy(self(x[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
                adam.step()
        adam.zero_grad()
        self.net.requires_grad_(False)


def soft_targets(answers: Logits) -> Tensor:
    """Return class probabilities (n, classes) to learn from answers of a model, whose logits may have any scale.

    Half of the weight is on the predicted class, so that answers with two values, such as labels, stay decided.
    """
    top = answers.topk(2, dim=1).values
    gaps = top[:, 0] - top[:, 1]
    usual = gaps[gaps > 0].median() if bool((gaps > 0).any()) else gaps.new_ones(())
    chances = (answers * (_CONFIDENCE / usual.clamp_min(1e-12))).softmax(1)
    decided = F.one_hot(answers.argmax(1), answers.shape[1]).to(chances.dtype)
    return (chances + decided) / 2


_ROWS = 512
"""largest number of rows of a forward pass, unless one pair for each example needs more"""

Noise = Callable[[Draws, Ids, Inputs], Inputs]
"""function `noise(rng, ids, like)` that returns a random direction for each example"""


class Steering(Protocol):
    """Protocol of an optimiser for gradient estimates: it is called with the estimate of each step and returns the
    direction of the step.
    """

    def __call__(self, gradient: Inputs) -> Inputs:
        """Update with an estimate and return the direction of the next step."""

    def take(self, rows: Rows) -> None:
        """Restrict the state of the optimiser to the given rows of the batch, because the other examples are no longer
        attacked.
        """


def gaussian(rng: Draws, ids: Ids, like: Inputs) -> Inputs:
    """Return standard normal random numbers in the shape of `like`, made in pairs from 64 random bits by the Box-Muller
    transform.
    """
    n = like[0].numel()
    random_bits = rng.bits(ids, -(-n // 2))
    # 24 bits, the precision of float32
    u, v = (((random_bits >> shift) & 0xFFFFFF).to(like.dtype) * 2.0**-24 for shift in (0, 32))
    length, angle = (-2 * torch.log1p(-u)).sqrt_(), 2 * math.pi * v  # u may be 0, but never 1
    return torch.cat((length * angle.cos(), length * angle.sin()), dim=1)[:, :n].view_as(like)


def rademacher(rng: Draws, ids: Ids, like: Inputs) -> Inputs:
    """Return random signs in the shape of `like`, each made from one random bit."""
    return signs(rng, ids, *like.shape[1:], dtype=like.dtype)


def estimated_slope(
    model: Model, batch: Batch, x: Inputs, constraint: Constraint, best: Best, noise: Noise,
    *, pairs: int, size: float, rng: Draws,
) -> Inputs:  # fmt: skip
    """Estimate the direction in which the margin falls fastest at `x` from the scores at pairs of opposite points
    around it. The result is minus the gradient, up to a factor.

    It uses `pairs` pairs of points at the distance `size` on either side, which are clamped to the box; differences are
    taken along the line between both points. Cost: two forwards for each pair.
    """
    total, n_pairs = torch.zeros_like(x), max(1, _ROWS // (2 * len(batch)))
    for first in range(0, pairs, n_pairs):
        points = []
        for pair in range(first, min(first + n_pairs, pairs)):
            step = size * noise(rng.at("pair", pair), batch.ids, x)
            points += [model.bounds.clamp(x + step), model.bounds.clamp(x - step)]
        margins = look(model, batch, points, constraint, best)
        for k in range(0, len(points), 2):
            # a margin of NaN or infinity shows no direction
            decrease = (margins[k + 1] - margins[k]).nan_to_num(0.0, 0.0, 0.0)
            total += spread(decrease, x) * (points[k] - points[k + 1])
    return total


def look(
    model: Model, batch: Batch, points: list[Inputs], constraint: Constraint, best: Best
) -> list[PerExample]:
    """Query the model at several points of each example and return their margins. Points that break the model inside
    the constraint are recorded in `best`.
    """
    n = len(points)
    repeated = Batch(torch.cat(points), batch.y.repeat(n), batch.ids.repeat(n), _repeated(batch.target, n))
    all_margins = margin(model(repeated.x, repeated.ids), repeated).view(n, -1).unbind()
    for x, margins in zip(points, all_margins, strict=True):
        rows = (~(margins > 0)).nonzero()[:, 0]
        if len(rows):
            rows = rows[allowed(constraint, x[rows], batch.x[rows], model.bounds)]
            best.offer(batch.take(rows), x[rows], margins[rows])
    return list(all_margins)


def climb(
    model: Model, batch: Batch, constraint: Constraint, noise: Noise, steering: Steering,
    *, queries: int, pairs: int, size: float, reach: float, rng: Draws,
) -> Inputs:  # fmt: skip
    """Lower the margin by gradient descent with estimated gradients, starting from the clean inputs, and return the
    best point of each example.

    Step sizes follow a cosine over a path of `reach` times eps. Cost: at most `queries` forwards, one to evaluate each
    point and two for each pair; the last step uses the remaining queries.
    """
    best, remaining, x = Best(batch), batch, batch.x
    steps = list(_pairs(queries, pairs))
    for step, n_pairs in enumerate([*steps, 0]):  # the last round only evaluates the end point
        best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
        if n_pairs:
            grad = estimated_slope(
                model,
                remaining,
                x,
                constraint,
                best,
                noise,
                pairs=n_pairs,
                size=size,
                rng=rng.at("step", step),
            )
        surviving = (best.margin[best.rows(remaining)] > 0).nonzero()[:, 0]
        if not len(surviving) or not n_pairs:
            break
        if len(surviving) < len(remaining):
            remaining, x, grad = remaining.take(surviving), x[surviving], grad[surviving]
            steering.take(surviving)
        length = reach * constraint.eps / len(steps) * cosine(step, len(steps))
        direction = constraint.steepest(steering(grad), x, model.bounds)
        x = constraint.project(x + length * direction, remaining.x, model.bounds)
    return best.x


def _pairs(queries: int, pairs: int) -> Iterator[int]:
    """Yield the number of pairs of each step; each step's end costs one query, and so does the start."""
    queries_left = queries - 1
    while queries_left >= 3:
        n = min(pairs, (queries_left - 1) // 2)
        yield n
        queries_left -= 2 * n + 1


def coordinate_slopes(
    model: Model, batch: Batch, x: Inputs, at: Tensor, norm: Norm, closest: Closest, h: float
) -> Tensor:  # fmt: skip
    """Estimate the derivatives (n, k) of the margin at `x` with respect to the coordinates `at`, by finite differences
    with the step `h`.

    Points that break the model are offered to `closest`. Cost: two forwards for each coordinate.
    """
    slopes, n = [], torch.arange(len(batch), device=x.device)
    for coordinates in at.split(max(1, _ROWS // (2 * len(batch))), dim=1):  # type: ignore[no-untyped-call]
        k = coordinates.shape[1]
        step = x.new_zeros(*coordinates.shape, x[0].numel()).scatter_(2, coordinates[..., None], h)
        rows = n.repeat_interleave(2 * k)
        shifts = torch.cat((step, -step), 1).view(-1, *x.shape[1:])
        repeated, queried = batch.take(rows), model.bounds.clamp(x[rows] + shifts)
        logits = model(queried, repeated.ids)
        points = queried.view(len(n), 2 * k, *x.shape[1:])
        distances = torch.where(
            firmly_broken(logits, repeated), norm.distance(queried, repeated.x), torch.inf
        )
        nearest, index = distances.view(-1, 2 * k).min(1)
        closest.offer(batch, points[n, index], nearest, nearest < torch.inf)
        x_plus, x_minus = points.flatten(2).gather(2, coordinates.repeat(1, 2)[..., None])[..., 0].chunk(2, 1)
        high, low = margin(logits, repeated).view(-1, 2 * k).chunk(2, 1)
        # at a side of the box one point does not move; in a box without width neither does
        slopes.append(((high - low) / (x_plus - x_minus).clamp_min(h / 2)).nan_to_num(0.0, 0.0, 0.0))
    return torch.cat(slopes, 1)


def _repeated(target: Tensor | None, n: int) -> Tensor | None:
    return None if target is None else target.repeat(n)
