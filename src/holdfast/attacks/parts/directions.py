"""Random search directions for attacks. For images, half of the energy of a direction is in low frequencies.

Changes of low frequency cross the boundaries of most networks at a smaller length (Guo et al., "Low Frequency
Adversarial Perturbation", UAI 2019, arXiv:1809.08758), but not of all networks; the other half is therefore white
noise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.per_example import spread
from holdfast.core.types import Ids, Inputs


def directions(rng: Draws, ids: Ids, k: int, shape: torch.Size, share: float, dtype: torch.dtype) -> Tensor:
    """Return `k` random search directions of length about one for each example, as (n, k, *shape).

    For images, half of the energy is in the lowest fraction `share` of the frequencies along height and width, and half
    is white noise.
    """
    noise = signs(rng.at("noise"), ids, k, *shape, dtype=dtype)
    if len(shape) != 3 or share >= 1:
        return noise.div_(math.sqrt(shape.numel()))
    return _mixed(noise, rng.at("waves"), ids, share, math.sqrt(0.5))


def waves(rng: Draws, ids: Ids, k: int, shape: torch.Size, share: float, dtype: torch.dtype) -> Tensor:
    """Return `k` random search directions of length one for each example, as (n, k, *shape), which contain only low
    frequencies of an image.

    `share` is the fraction of the frequencies that are used. The directions are sums of orthonormal DCT-II cosines with
    random signs. For inputs that are not images they consist of signs only.
    """
    if len(shape) != 3:
        return signs(rng, ids, k, *shape, dtype=dtype).div_(math.sqrt(shape.numel()))
    nothing = torch.zeros(len(ids), k, *shape, dtype=dtype, device=ids.device)
    return _mixed(nothing, rng, ids, share, 1.0)


def _mixed(noise: Tensor, rng: Draws, ids: Ids, share: float, weight: float) -> Tensor:
    """Signs (n, k, *shape), overwritten in place, plus low-frequency waves, both of length `weight`."""
    _, k, channels, height, width = noise.shape
    rows, columns = (_waves(size, share, ids.device, noise.dtype) for size in (height, width))
    amplitudes = signs(rng, ids, k, channels, len(rows), len(columns), dtype=noise.dtype)
    noise_scale, wave_scale = (weight / math.sqrt(values[0, 0].numel()) for values in (noise, amplitudes))
    flat, half_product = noise.flatten(0, 2), (amplitudes @ columns).flatten(0, 2)
    return flat.baddbmm_(
        rows.T.expand(len(flat), -1, -1), half_product, beta=noise_scale, alpha=wave_scale
    ).view_as(noise)


def ray_and_orthogonal(
    batch: Batch, x: Inputs, bounds: Bounds, rng: Draws, *, share: float
) -> tuple[Inputs, Inputs]:
    """Return for each example the direction from its clean input to `x`, and a random direction orthogonal to it, both
    of length one.
    """
    ray = L2().steepest(x - batch.x, x, bounds)
    random = directions(rng, batch.ids, 1, x.shape[1:], share, x.dtype)[:, 0]
    beside = random - spread((random * ray).flatten(1).sum(1), x) * ray
    return ray, L2().steepest(beside, x, bounds)


def signs(rng: Draws, ids: Ids, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return random signs of shape (n, *shape), -1 or +1 with equal probability, each made from one random bit.

    It is many times faster than `Draws.signs`.
    """
    size = math.prod(shape)
    random_bytes = rng.bits(ids, -(-size // 64)).view(torch.uint8)
    positions = torch.arange(8, device=ids.device)
    # one lookup for each byte gives eight signs
    table = ((torch.arange(256, device=ids.device)[:, None] >> positions & 1) * 2 - 1).to(dtype)
    return F.embedding(random_bytes.int(), table).flatten(1)[:, :size].reshape(len(ids), *shape)


def _waves(size: int, share: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Lowest-frequency cosines of the orthonormal DCT-II, one in each row."""
    frequency = torch.arange(max(1, round(share * size)), device=device, dtype=dtype)[:, None]
    position = torch.arange(size, device=device, dtype=dtype) + 0.5
    waves = torch.cos(math.pi / size * frequency * position) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves
