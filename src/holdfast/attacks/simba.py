"""SimBA (simple black-box attack): a score-based attack that tries a step along each direction of an orthonormal basis
in turn.

Guo, Gardner, You, Wilson & Weinberger, "Simple black-box adversarial attacks", ICML 2019, arXiv:1905.07121. Differs
from the paper: it lowers the margin and not the label's probability; each step is projected onto ball and box, and a
step without a change costs no query; cosines are used from low to high frequencies in eighths.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import Best, expect_eps, expect_norm, margin
from holdfast.attacks.parts.random_search import as_image
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, Positive, Steps
from holdfast.corruptions.images import cosines

_SKIPS = 8  # directions that are skipped for one query if neither sign moves the point
_RINGS = 8  # the paper's low frequencies are the first eighth of each side

Basis = Literal["pixels", "cosines"]


@dataclass(frozen=True)
class SimBA:
    """Adds or subtracts one direction of an orthonormal basis at a time, and keeps each step that lowers the margin."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    basis: Basis = "pixels"
    """basis of the directions: single values (`pixels`), or cosines over each channel, low frequencies first
    (`cosines`)"""
    step_size: Positive = 0.2
    """step size in multiples of eps; under Linf with `pixels`, a value moves from one side of the cube to the other"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm, best = expect_norm(expect_eps(threat.constraint, self), self, Linf, L2), Best(batch)
        queries = min(self.queries, threat.queries or self.queries)
        remaining, walk = batch, _Walk(batch, norm, self, model.bounds, queries, rng)
        lowest, x = torch.full_like(best.margin, torch.inf), batch.x
        with torch.no_grad():
            for query in range(queries if len(batch) else 0):
                margins = margin(model(x, remaining.ids), remaining)
                lower = ~(margins >= lowest)
                walk.update(x, lower, first=not query)
                lowest = torch.where(lower, margins, lowest)
                if not float(lowest.min()) > 0:  # also true if one of them is NaN
                    best.offer(remaining, walk.x, lowest)
                    surviving = lowest > 0
                    remaining, lowest = remaining.take(surviving), lowest[surviving]
                    if not len(remaining):
                        return best.x
                    walk.take(surviving)
                x = walk.propose()
        best.offer(remaining, walk.x, lowest)
        return best.x


class _Walk:
    """The best point of each example, and the direction of the basis and the sign to try next."""

    def __init__(
        self, batch: Batch, norm: Norm, attack: SimBA, bounds: Bounds, queries: int, rng: Draws
    ) -> None:
        self.x, self._clean, self._norm, self._bounds = batch.x, batch.x, norm, bounds
        self._image = channels, height, width = as_image(batch.x.shape[1:])
        waves = attack.basis == "cosines"
        basis = cosines if waves else _values
        rows, columns = (basis(side, batch.x) for side in (height, width))
        if isinstance(norm, Linf):
            rows, columns = (side / side.abs().amax(1, keepdim=True) for side in (rows, columns))
        self._rows, self._columns = rows, columns
        priority = rng.at("order").uniform(batch.ids, channels * height * width)
        if waves:
            down, across = (
                torch.arange(side, device=priority.device) * _RINGS // side for side in (height, width)
            )
            priority = priority + torch.maximum(down[:, None], across).flatten().repeat(channels)
        self._order = priority.argsort(1)[:, :queries].clone()
        self._at, self._sign = torch.zeros_like(batch.ids), torch.ones_like(batch.x.flatten(1)[:, 0])
        self._length = norm.eps * (2 if isinstance(norm, Linf) and not waves else attack.step_size)

    def propose(self) -> Inputs:
        """Return the next point to query for each example: its best point so far, moved along the current direction of
        the basis.
        """
        x = self._candidate()
        for _ in range(_SKIPS):
            unchanged = (x == self.x).flatten(1).all(1)
            if not unchanged.any():
                break
            self._advance(unchanged)
            x = self._candidate()
        return x

    def update(self, x: Inputs, lower: Mask, *, first: bool) -> None:
        """Accept the queried points that lower the margin, and continue with the opposite sign of the direction or with
        the next direction.
        """
        if first:
            return
        self.x = torch.where(spread(lower, x), x, self.x)
        self._sign = torch.where(lower, -1, self._sign)  # the other sign need not be tried
        self._advance(torch.ones_like(lower))

    def take(self, rows: Mask) -> None:
        """Restrict the state of the search to the examples of the mask `rows`, because the others are no longer
        attacked.
        """
        self.x, self._clean = self.x[rows], self._clean[rows]
        self._order, self._at, self._sign = self._order[rows], self._at[rows], self._sign[rows]

    def _advance(self, rows: Mask) -> None:
        """Go from plus to minus, from minus to the next direction, and from the last direction to the first."""
        self._at = torch.where(rows & (self._sign < 0), (self._at + 1) % self._order.shape[1], self._at)
        self._sign = torch.where(rows, -self._sign, self._sign)

    def _candidate(self) -> Inputs:
        _, height, width = self._image
        at = self._order.gather(1, self._at[:, None])[:, 0]
        channel, row, column = at // (height * width), at // width % height, at % width
        wave = (
            (self._length * self._sign)[:, None, None]
            * self._rows[row][:, :, None]
            * self._columns[column][:, None]
        )
        step = torch.zeros(len(at), *self._image, dtype=wave.dtype, device=wave.device)
        step[torch.arange(len(at)), channel] = wave
        return self._norm.project(self.x + step.view_as(self.x), self._clean, self._bounds)


def _values(side: int, like: Tensor) -> Tensor:
    return torch.eye(side, dtype=like.dtype, device=like.device)
