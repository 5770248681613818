"""Query-based attacks that adapt to a stateful detector: OARS, coarse patterns, and Square with natural queries."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.boundaries import Answer, Example, Walk, asked, follow, least_size
from holdfast.attacks.parts.losses import expect_eps, expect_norm
from holdfast.attacks.parts.random_search import as_image, window, window_share, with_windows
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps
from holdfast.guard.detectors.fingerprints import grid_of
from holdfast.guard.detectors.queries import QuerySettings

_REACH = 0.8  # distance of the first query, as a fraction of the radius; sketches have an error of 9 %
_SAFE = 0.9  # fraction of a limit of the detector that is used, for the same reason
_ROUNDS = 4  # of averaging and clamping, after which averages are within the limit in nearly all cases


@dataclass(frozen=True)
class InformedSquare:
    """Square under Linf with queries that differ from the first one by natural or very small changes."""

    detector: QuerySettings = field(default_factory=QuerySettings)
    """settings of the detector that is attacked"""
    queries: Steps = 1000
    """largest number of queries for each example, rejected ones included; a smaller query budget of the threat model
    takes precedence"""
    p_init: Fraction = 0.05
    """fraction of the pixels that the first windows of Square cover"""
    attempts: Steps = 100
    """number of rejected proposals in a row after which the attack gives up"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        norm = expect_norm(constraint, self, Linf)
        queries = min(self.queries, threat.queries or self.queries)
        return follow(model, batch, norm, self._walk, queries, rng)

    def _walk(self, at: Example) -> Walk:
        shape = at.x.shape
        grid = grid_of(shape, self.detector.cells)
        limit = _SAFE * self.detector.noise * self.detector.radius
        if grid is not None:
            contrast = at.x - at.x.mean()
            size = float(_averaged(contrast, grid).norm())
            share = min(1.0, _REACH * self.detector.radius / max(size, 1e-12))
            limit = max(limit, _SAFE * self.detector.natural * share * size)
            yield at.x - share * contrast
        channels, height, width = as_image(shape)

        def proposed(delta: Tensor) -> Tensor:
            return at.ball(at.x + _quiet(delta.reshape(shape), at.eps, grid, limit))

        trial = best = proposed(at.eps * at.signs(channels, 1, width).expand(-1, height, -1))
        lowest, failures, step = math.inf, 0, 0
        while failures < self.attempts:
            value = yield trial
            failures = failures + 1 if value is None else 0
            if value is not None and value < lowest:
                best, lowest = trial, value
            trial = proposed(self._changed(at, best - at.x, window_share(self.p_init, step, at.limit)))
            step += 1

    def _changed(self, at: Example, delta: Tensor, share: float) -> Tensor:
        """Return the perturbation with one random window set to +eps or -eps in each channel."""
        channels, height, width = as_image(at.x.shape)
        size = window(share, height, width, odd=False)
        draws = at.uniform(1, 2 + channels)
        return with_windows(delta.reshape(channels, height, width), at.eps, draws, *size)


def _averaged(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """The averages of an image over the cells of a grid, or other inputs as they are."""
    return x if grid is None else F.adaptive_avg_pool2d(x[None], grid)[0]


def _quiet(delta: Tensor, eps: float, grid: tuple[int, int] | None, limit: float) -> Tensor:
    """The perturbation with smaller averages over cells, whose L2 norm is at most `limit`, inside the Linf ball."""
    for _ in range(_ROUNDS):
        averages = _averaged(delta, grid)
        size = float(averages.norm())
        if size <= limit:
            return delta
        excess = (1 - limit / size) * averages
        if grid is not None:
            excess = F.interpolate(excess[None], size=delta.shape[1:], mode="nearest")[0]
        delta = torch.clamp(delta - excess, -eps, eps)
    size = float(_averaged(delta, grid).norm())
    return delta * min(1.0, limit / max(size, 1e-12))


_RIDGE = 1.0  # in numbers of patterns, so that weights are small while there are fewer patterns than blocks
_STYLES = ((1.0, False), (3.0, False), (1.0, True), (3.0, True))
"""Sizes of the patterns of a fit in multiples of eps, and whether they are confined, in the order in which an adaptive
attack tries them."""
_SURROUNDINGS = 5  # pixels; side of the squares around the content to which patterns are confined
_CONTENT = (
    0.1  # difference from the median from which a value is content, as a fraction of the range of the image
)
_EITHER = 0.5  # probability of the sign of each of two parents


@dataclass(frozen=True)
class CoarsePatterns:
    """Changes the blocks of a grid by eps or -eps, and finds the signs that lower the margin under Linf."""

    search: Literal["fit", "population"] = "fit"
    """how signs are chosen: by a linear fit of the margins, or by a genetic search"""
    adaptive: bool = False
    """whether size and place of the patterns change while most of them are rejected"""
    blocks: Steps = 7
    """number of blocks in each row and column of the grid, for each channel"""
    queries: Steps = 1000
    """largest number of queries for each example, rejected ones included; a smaller query budget of the threat model
    takes precedence"""
    every: Steps = 10
    """number of patterns between two trials of the fitted signs; size of a population"""
    mutation: Fraction = 0.05
    """fraction of the signs of a new member of a population that are drawn again"""
    attempts: Steps = 100
    """number of rejected queries in a row after which the attack gives up"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        norm = expect_norm(constraint, self, Linf)
        queries = min(self.queries, threat.queries or self.queries)
        walk = {"fit": self._fit, "population": self._population}[self.search]
        return follow(model, batch, norm, walk, queries, rng)

    def _fit(self, at: Example) -> Walk:
        style, failures, fit = 0, 0, _Fit()
        while failures < self.attempts:
            size, confined = _STYLES[style]
            signs = at.signs(self.every, *self._grid(at))
            values: list[Answer] = []
            for change in self._patterns(at, signs, confined=confined):
                values.append((yield at.box(at.x + size * change)))
                failures = failures + 1 if values[-1] is None else 0
            fit.add(size * signs, values)
            style = self._next(style, values.count(None))
            if fit.patterns:
                trial = -fit.weights().sign().reshape(signs[:1].shape)
                value = yield at.ball(at.x + self._patterns(at, trial, confined=confined)[0])
                failures = failures + 1 if value is None else 0

    def _population(self, at: Example) -> Walk:
        style, failures = 0, 0
        members: list[tuple[float, Tensor]] = []
        while failures < self.attempts:
            children = self._children(at, [signs for _, signs in members])
            values: list[Answer] = []
            for change in self._patterns(at, children, confined=_STYLES[style][1]):
                values.append((yield at.ball(at.x + change)))
                failures = failures + 1 if values[-1] is None else 0
            style = self._next(style, values.count(None))
            members += [
                (value, child) for value, child in zip(values, children, strict=True) if value is not None
            ]
            members = sorted(members, key=lambda member: member[0])[: self.every]

    def _children(self, at: Example, members: Sequence[Tensor]) -> Tensor:
        """Return the signs (every, channels, rows, columns) of the next patterns: mixtures of two members, preferably
        of the first ones, with a few new signs; or new signs, until there are enough members.
        """
        grid = self._grid(at)
        fresh, draws = at.signs(self.every, *grid), at.uniform(self.every, 3, *grid)
        if len(members) < self.every:
            return fresh
        parents = (len(members) * draws[:, 0].flatten(1)[:, [0, -1]] ** 2).long()
        first, second = torch.stack(list(members))[parents].unbind(1)
        inherited = torch.where(draws[:, 1] < _EITHER, first, second)
        return torch.where(draws[:, 2] < self.mutation, fresh, inherited)

    def _next(self, style: int, rejected: int) -> int:
        """The style of the next patterns after some of the last ones were rejected."""
        return (style + 1) % len(_STYLES) if self.adaptive and 2 * rejected > self.every else style

    def _grid(self, at: Example) -> tuple[int, int, int]:
        """Return channels, rows and columns of the blocks."""
        channels, height, width = as_image(at.x.shape)
        return channels, min(self.blocks, height), min(self.blocks, width)

    def _patterns(self, at: Example, signs: Tensor, *, confined: bool) -> Tensor:
        """The changes (n, *features) of an image with these signs (n, channels, rows, columns) of its blocks, of the
        size eps.
        """
        channels, height, width = as_image(at.x.shape)
        patterns = at.eps * F.interpolate(signs, size=(height, width), mode="nearest")
        if confined:
            image = at.x.reshape(channels, height, width)
            content = (image - image.median()).abs() > _CONTENT * (image.max() - image.min())
            patterns = patterns * F.max_pool2d(content.to(at.x.dtype), _SURROUNDINGS, 1, _SURROUNDINGS // 2)
        return patterns.reshape(-1, *at.x.shape)


@dataclass
class _Fit:
    """The ridge regression of margins on the blocks of patterns, in multiples of eps, from their sums."""

    patterns: int = 0
    products: Tensor = field(default_factory=lambda: torch.zeros(()))
    """sum of the outer products (d + 1, d + 1) of patterns, with a constant as the last number"""
    targets: Tensor = field(default_factory=lambda: torch.zeros(()))
    """sum of the patterns (d + 1), each multiplied by its margin"""

    def add(self, patterns: Tensor, values: Sequence[Answer]) -> None:
        """Add patterns (n, ...) and their margins (n), except rejected ones."""
        known = [row for row, value in enumerate(values) if value is not None]
        if known:
            rows = patterns[known].flatten(1)
            rows = torch.cat((rows, rows.new_ones(len(known), 1)), 1)
            self.patterns += len(known)
            self.products = self.products + rows.T @ rows
            self.targets = self.targets + rows.new_tensor([values[row] for row in known]) @ rows

    def weights(self) -> Tensor:
        """Return the weights (d) of the patterns."""
        ridge = _RIDGE * torch.eye(len(self.targets), dtype=self.targets.dtype)
        ridge[-1, -1] = 0  # of the constant
        solution: Tensor = torch.linalg.solve(self.products + ridge, self.targets)
        return solution[:-1]


Base = Literal["square", "nes", "hop_skip_jump"]
Try = Callable[[float], Generator[Tensor, Answer, Answer]]

_PRECISION = 0.01  # of the position of the decision boundary on a line, as a fraction of its length


@dataclass(frozen=True)
class OARS:
    """Adapts the proposals of Square, NES or HopSkipJump to a defence that rejects similar queries."""

    base: Base = "square"
    """attack whose proposals are adapted: `square` and `nes` under Linf, `hop_skip_jump` under L2"""
    queries: Steps = 5000
    """largest number of queries for each example, rejected ones included; a smaller query budget of the threat model
    takes precedence"""
    p_init: Fraction = 0.05
    """fraction of the pixels that the first windows of Square cover"""
    pairs: Steps = 25
    """number of accepted pairs of points for a gradient of NES; HopSkipJump uses as many points"""
    trials: Steps = 10
    """number of proposals that are queried for one size in a binary search"""
    rejected: Fraction = 0.1
    """largest fraction of these that may be rejected"""
    halvings: Steps = 6
    """number of steps of a binary search"""
    attempts: Steps = 300
    """number of rejected proposals in a row after which the attack gives up"""
    step: Positive = 1.0
    """length of a step of NES, in multiples of eps; the binary search may enlarge it"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        norm = expect_norm(constraint, self, L2 if self.base == "hop_skip_jump" else Linf)
        queries = min(self.queries, threat.queries or self.queries)
        walk = {"square": self._square, "nes": self._nes, "hop_skip_jump": self._jumps}[self.base]
        return follow(model, batch, norm, walk, queries, rng)

    def _square(self, at: Example) -> Walk:
        channels, height, width = as_image(at.x.shape)
        stripes = at.signs(channels, 1, width).expand(-1, height, -1).reshape(at.x.shape)
        best, lowest = at.ball(at.x + at.eps * stripes), float("inf")

        def changed(squares: float, share: float, least: float = 1) -> Tensor:
            rows, columns = window(share, height, width, odd=False)
            rows, columns = min(max(rows, round(least)), height), min(max(columns, round(least)), width)
            draws = at.uniform(round(squares), 2 + channels)
            delta = (best - at.x).reshape(channels, height, width)
            delta = with_windows(delta, at.eps, draws, rows, columns)
            return at.ball(at.x + delta.reshape(at.x.shape))

        def tried(proposal: Tensor) -> Generator[Tensor, Answer, Answer]:
            nonlocal best, lowest
            value = yield proposal
            if value is not None and value < lowest:
                best, lowest = proposal, value
            return value

        yield from tried(best)
        squares = yield from self._least(lambda n: tried(changed(n, self.p_init)), 1.0, 100.0)
        side = float(min(height, width))
        least = yield from self._least(lambda side: tried(changed(squares, 0.0, side)), 1.0, side)
        failures, step = 0, 0
        while failures < self.attempts:
            value = yield from tried(changed(squares, window_share(self.p_init, step, at.limit), least))
            failures, step = failures + 1 if value is None else 0, step + 1

    def _nes(self, at: Example) -> Walk:
        x = at.ball(at.x + at.eps * (2 * at.uniform(*at.x.shape) - 1))
        sigma = yield from self._least(lambda size: asked(at.box(x + size * at.normal())), 1e-3, 0.5)
        step = yield from self._least(
            lambda size: asked(at.ball(x + size * at.signs(*at.x.shape))), self.step * at.eps, 2 * at.eps
        )
        total, failures = torch.zeros_like(x), 0
        while failures < self.attempts:
            slope, pairs = torch.zeros_like(x), 0
            while pairs < self.pairs and failures < self.attempts:
                noise = sigma * at.normal()
                up = yield at.box(x + noise)
                down = None if up is None else (yield at.box(x - noise))
                if up is None or down is None:
                    failures += 1
                    continue
                slope, pairs, failures = slope + (down - up) * noise, pairs + 1, 0
            total = 0.9 * total + slope
            x = at.ball(x + step * total.sign())
            failures = (
                failures + 1 if (yield x) is None else 0
            )  # a step is taken also if its margin is unknown

    def _jumps(self, at: Example) -> Walk:
        start, failures = at.uniform(*at.x.shape), 0
        while failures < self.attempts:
            value = yield start
            if value is not None and value <= 0:
                break
            start, failures = at.uniform(*at.x.shape), failures + 1
        x = yield from _boundary(at, start)
        size = yield from self._least(
            lambda length: asked(at.box(x + at.direction(length))), 0.05, float((x - at.x).norm())
        )
        turn = 0
        while failures < self.attempts:
            turn = turn + 1
            votes: list[Tensor] = []
            sides: list[float] = []
            while len(votes) < self.pairs * turn**0.5 and failures < self.attempts:
                noise = at.direction(min(size, float((x - at.x).norm())))
                value = yield at.box(x + noise)
                failures = failures + 1 if value is None else 0
                if value is not None:
                    votes.append(noise)
                    sides.append(1.0 if value <= 0 else -1.0)
            if not votes:
                break
            signs = torch.tensor(sides)
            signs = signs - signs.mean() if len(set(sides)) > 1 else signs
            normal = (signs.view(-1, *[1] * at.x.dim()) * torch.stack(votes)).sum(0)
            length = float((x - at.x).norm()) / turn**0.5
            while failures < self.attempts and length > 1e-3:
                moved = at.box(x + length * normal / max(float(normal.norm()), 1e-12))
                value = yield moved
                failures = failures + 1 if value is None else 0
                if value is None:
                    break
                if value <= 0:
                    x = yield from _boundary(at, moved)
                    break
                length /= 2

    def _least(self, attempt: Try, low: float, high: float) -> Generator[Tensor, Answer, float]:
        """Search for the smallest size whose proposals are rarely rejected; `high` if there is none."""
        return least_size(attempt, low, high, self.halvings, self.trials, round(self.rejected * self.trials))


def _boundary(at: Example, broken: Tensor) -> Generator[Tensor, Answer, Tensor]:
    """Bisect the line from a broken point to the clean input; a rejected query ends the search."""
    low, high = 0.0, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        value = yield at.x + middle * (broken - at.x)
        if value is None:
            break
        low, high = (low, middle) if value <= 0 else (middle, high)
    return at.x + high * (broken - at.x)
