"""Bandits: a score-based attack that maintains a running estimate of the gradient and improves it with two queries in
each step.

Ilyas, Engstrom & Madry, "Prior convictions: black-box adversarial attacks with bandits and priors", ICLR 2019,
arXiv:1807.07978. The estimate is carried over from step to step (time prior) and is constant within a tile (data
prior). Differs from the paper: it uses the margin instead of the cross-entropy; differences are divided by their
running mean, so that no rate depends on the logits' scale; and every tenth point is evaluated with an additional query.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.losses import Best, expect_eps, expect_norm, length
from holdfast.attacks.parts.random_search import as_image
from holdfast.attacks.parts.substitutes import gaussian, look
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Rows, Steps

_EVALUATE_EVERY = 10  # steps between evaluations of the point itself


@dataclass(frozen=True)
class Bandits:
    """Estimates the gradient from finite differences of the scores with a bandit prior."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    step_size: Positive = 0.1
    """length of one step in multiples of eps"""
    exploration: Positive = 1.0
    """length of the random part of a query; the estimate is at most 1 in each tile under Linf, and unbounded
    under L2"""
    rate: Positive = 0.1
    """learning rate of the gradient estimate, which is updated after each pair of queries"""
    fd_eta: Positive = 0.1
    """Euclidean distance of queried points from the current one, in widths of the box"""
    tile: Steps = 2
    """side of the tiles of an image in pixels; other inputs have no tiles"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm, best = expect_norm(expect_eps(threat.constraint, self), self, Linf, L2), Best(batch)
        if len(batch):
            with torch.no_grad():
                self._climb(model, batch, norm, best, min(self.queries, threat.queries or self.queries), rng)
        return best.x

    def _climb(
        self, model: Model, remaining: Batch, norm: Norm, best: Best, queries: int, rng: Draws
    ) -> None:
        x, estimate = remaining.x, _Estimate(remaining, norm, self)
        step, distance = 0, self.fd_eta * model.bounds.width
        while queries:
            # with fewer than three queries, a pair would leave none to evaluate its result
            evaluated = step % _EVALUATE_EVERY == 0 or queries < 3
            if evaluated:
                look(model, remaining, [x], norm, best)
            queries -= evaluated
            if queries < 2:
                return
            plus, minus = (
                model.bounds.clamp(x + distance * direction)
                for direction in estimate.sides(rng.at("step", step))
            )
            margin_plus, margin_minus = look(model, remaining, [plus, minus], norm, best)
            queries -= 2
            estimate.update(margin_minus - margin_plus)
            surviving = (best.margin[best.rows(remaining)] > 0).nonzero()[:, 0]
            if not len(surviving):
                return
            if len(surviving) < len(remaining):
                remaining, x = remaining.take(surviving), x[surviving]
                estimate.take(surviving)
            climb = norm.steepest(estimate.gradient, x, model.bounds)
            x = norm.project(x + self.step_size * norm.eps * climb, remaining.x, model.bounds)
            step += 1


class _Estimate:
    """The gradient estimate of each example, one number for each tile; under Linf as log odds, which bounds it by 1."""

    def __init__(self, batch: Batch, norm: Norm, attack: Bandits) -> None:
        self._attack, self._odds, self._shape = attack, isinstance(norm, Linf), batch.x.shape[1:]
        self._image = channels, height, width = as_image(self._shape)
        self._side = attack.tile if len(self._shape) >= 3 else 1
        self._ids = batch.ids
        self._tiles = batch.x.new_zeros(
            len(batch), channels, -(-height // self._side), -(-width // self._side)
        )
        self._mean, self._n_updates = batch.x.new_zeros(len(batch)), 0

    @property
    def gradient(self) -> Inputs:
        """Current estimate of the gradient of each example, in the shape of the inputs."""
        return self._spread(self._prior)

    def sides(self, rng: Draws) -> tuple[Inputs, Inputs]:
        """Return the two search directions of a step for each example, of length one: the gradient estimate plus and
        minus a random vector.
        """
        self._noise = gaussian(rng, self._ids, self._tiles) / self._tiles[0].numel() ** 0.5
        random = self._attack.exploration * self._noise
        return self._unit(self._prior + random), self._unit(self._prior - random)

    def update(self, difference: torch.Tensor) -> None:
        """Update the gradient estimate of each example from the margins at its two queried points, whose difference is
        `difference`.
        """
        difference = difference.nan_to_num(0.0, 0.0, 0.0)
        self._n_updates += 1
        self._mean = self._mean + (difference.abs() - self._mean) / min(self._n_updates, 10)
        size = difference / self._mean.clamp_min(torch.finfo(difference.dtype).tiny)
        self._tiles = self._tiles + self._attack.rate * spread(size, self._tiles) * self._noise

    def take(self, rows: Rows) -> None:
        """Restrict the gradient estimates to the examples at the positions `rows`, because the others are no longer
        attacked.
        """
        self._ids, self._tiles, self._mean = self._ids[rows], self._tiles[rows], self._mean[rows]

    @property
    def _prior(self) -> torch.Tensor:
        return self._tiles.tanh() if self._odds else self._tiles

    def _unit(self, tiles: torch.Tensor) -> Inputs:
        full = self._spread(tiles)
        return full / spread(length(full).clamp_min(torch.finfo(full.dtype).tiny), full)

    def _spread(self, tiles: torch.Tensor) -> Inputs:
        _, height, width = self._image
        full = tiles.repeat_interleave(self._side, 2).repeat_interleave(self._side, 3)
        return full[:, :, :height, :width].reshape(-1, *self._shape)
