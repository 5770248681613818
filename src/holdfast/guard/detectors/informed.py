"""Square with queries that the query detector (`queries.py`) takes for natural: a test of the detector by an attacker
who knows it, except for its key.

The detector compares each query with the first one of its cluster, after averaging over cells. The attack therefore
sends a version of the image with lower contrast first, and then only inputs that differ from the image little after
averaging. To the detector they look like the image at another contrast. Square Attack is Andriushchenko et al., ECCV
2020, arXiv:1912.00049, here with proposals whose averages are reduced.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.norms import expect_eps, expect_norm
from holdfast.attacks.parts.squares import as_image, window, window_share, with_windows
from holdfast.attacks.parts.walks import Example, Walk, follow
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Steps
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
