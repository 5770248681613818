"""OARS (oracle-guided adaptive rejection sampling): query-based attacks on models with a stateful defence, which learn
from rejected queries how different their proposals must be.

Feng, Hooda, Mangaokar, Fawaz, Jha & Prakash, "Stateful Defenses for Machine Learning Models Are Not Yet Secure Against
Black-box Attacks", CCS 2023, arXiv:2303.06280. The base attacks are Square, NES and HopSkipJump. Before each of them,
a binary search finds the smallest proposals of which few are rejected; during it, a rejected proposal is drawn again.
Differs from the paper: windows and step sizes are those of the paper's attacks with the margin as loss; targets are
supported for Square and NES; sizes are searched on a logarithmic scale; Square keeps what it finds during the search;
NES goes on from a point whose query was rejected.

The model marks a rejected input with the outputs of `holdfast.core.outputs.REFUSED`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks.parts.norms import expect_eps, expect_norm
from holdfast.attacks.parts.squares import as_image, window, window_share, with_windows
from holdfast.attacks.parts.walks import Answer, Example, Walk, asked, follow, least_size
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps

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
