"""Gaussian noise for randomised smoothing, as a pure function of the seed, the id of an example and the draw number.

Box & Muller, "A note on the generation of random normal deviates", Annals of Mathematical Statistics 29, 1958. Each 64
random bits give two normal numbers. The uniform number under the logarithm is at least 2**-33, so that the noise has no
value beyond 6.76 standard deviations; the probability of one is 1.4e-11.
"""

import math

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs

MOST_DRAWS = 1 << 31
"""number of draws of one example up to which no two draws of a run share their random bits"""

_HALF = 0xFFFFFFFF
_SCALE = 2.0**-32
_ROUNDED = 1 - 1e-9  # factor of a radius, by which it is rounded down


def numbered_noise(rng: Draws, ids: Ids, numbers: Ids, like: Tensor) -> Inputs:
    """Return standard normal noise of shape (n, *features), whose row i is draw `numbers[i]` of the example `ids[i]`.

    `ids` and `numbers` have the shape (n,), and `like` has the shape (any, *features). A row depends on the seed, its
    id and its number only, and not on the other rows.
    """
    features = like.shape[1:]
    dtype = torch.promote_types(like.dtype, torch.float32)
    size = math.prod(features)
    bits = rng.bits(ids * MOST_DRAWS + numbers, (size + 1) // 2)
    # the bits are shifted and masked, because `>>` of a negative int64 keeps the sign
    radius = ((bits >> 32) & _HALF).to(dtype).add_(0.5).mul_(_SCALE).log_().mul_(-2.0).sqrt_()
    angle = (bits & _HALF).to(dtype).mul_(2 * math.pi * _SCALE)
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :size]
    return normal.reshape(-1, *features).to(like.dtype)


def radius_of(misses: float, sigma: float) -> float:
    """Return the certified radius sigma Φ⁻¹(1 - misses), rounded down, if other classes than the label have at most the
    probability `misses` together. It is 0 if they have a half or more.
    """
    from scipy.special import ndtri

    return 0.0 if misses >= 0.5 else -_ROUNDED * sigma * float(ndtri(misses))
