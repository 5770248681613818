"""The normal of a decision boundary from answers alone: random directions, weighed by what the model says beyond each.

The estimate is that of HopSkipJump (Chen et al., arXiv:1904.02144), with the mean answer taken off; its directions of
low frequency are those of GeoDA (Rahmati et al., arXiv:2003.06468).
"""

import math

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.rows import spread
from holdfast.core.types import Ids, Inputs, PerExample
from holdfast.ops.decisions import ROWS, Decisions

_RESERVE = 10  # queries that an estimate leaves for the step that follows it
_WAVES = 8  # waves a side that always take part: of fewer a small image could not be made


def directions(rng: Draws, ids: Ids, k: int, shape: torch.Size, share: float, dtype: torch.dtype) -> Tensor:
    """`k` random directions of length one for each example (n, k, *shape), made of signs.

    Of images only the lowest `share` of the frequencies along height and width take part (DCT-II, orthonormal).
    """
    if len(shape) != 3 or share >= 1:
        return _signs(rng, ids, k, *shape, dtype=dtype) / math.sqrt(shape.numel())
    rows, columns = (_waves(size, share, ids.device, dtype) for size in shape[1:])
    signs = _signs(rng, ids, k, shape[0], len(rows), len(columns), dtype=dtype)
    return rows.T @ (signs @ columns) / math.sqrt(signs[0, 0].numel())


def across(some: Batch, x: Inputs, bounds: Bounds, rng: Draws, *, share: float) -> tuple[Inputs, Inputs]:
    """The direction from each clean input to `x`, and a random one at a right angle to it; both of length one."""
    ray = L2().steepest(x - some.x, x, bounds)
    drawn = directions(rng, some.ids, 1, x.shape[1:], share, x.dtype)[:, 0]
    beside = drawn - spread((drawn * ray).flatten(1).sum(1), x) * ray
    return ray, L2().steepest(beside, x, bounds)


def normal(
    decisions: Decisions, some: Batch, x: Inputs, radius: PerExample, draws: int, rng: Draws, *, share: float
) -> Inputs:
    """The direction, of length one, in which the model gives in around `x`; zero where nothing can be asked.

    From `draws` points at a distance of `radius`, a few examples at a time, so that the points stay in the caches.
    """
    total = torch.zeros_like(x)
    wanted = (decisions.left(some) - _RESERVE).clamp(0, draws)
    for part in torch.arange(len(some), device=x.device).split(max(1, ROWS // draws)):
        few, at = some.take(part), x[part, None]
        u = directions(rng, few.ids, draws, x.shape[1:], share, x.dtype)
        points = decisions.bounds.clamp(at + spread(radius[part], u) * u)
        broken, asked = decisions.ask_many(few, points, wanted[part])
        answers = (2 * broken.to(x.dtype) - 1) * asked
        mean = answers.sum(1, keepdim=True) / asked.sum(1, keepdim=True).clamp_min(1)
        weights = torch.where(mean.abs() < 1, (answers - mean) * asked, answers)
        total[part] = torch.einsum("nk,nkf->nf", weights, (points - at).flatten(2)).view_as(at[:, 0])
    return L2().steepest(total, x, decisions.bounds)


def _signs(rng: Draws, ids: Ids, *shape: int, dtype: torch.dtype) -> Tensor:
    """-1 or +1 with equal chance (n, *shape), from every bit of a word: many times as quick as `Draws.signs`."""
    size = math.prod(shape)
    octets = rng.bits(ids, -(-size // 64)).view(torch.uint8)
    places = torch.arange(8, device=ids.device)
    table = ((torch.arange(256, device=ids.device)[:, None] >> places & 1) * 2 - 1).to(dtype)
    return table[octets.long()].flatten(1)[:, :size].reshape(len(ids), *shape)


def _waves(size: int, share: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The slowest waves of the orthonormal DCT-II, one a row."""
    wave = torch.arange(min(size, max(_WAVES, round(share * size))), device=device, dtype=dtype)[:, None]
    place = torch.arange(size, device=device, dtype=dtype) + 0.5
    waves = torch.cos(math.pi / size * wave * place) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves
