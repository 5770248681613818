"""The discrete cosine transform."""

import math

import torch
from torch import Tensor


def cosines(side: int, like: Tensor) -> Tensor:
    """The waves of the orthonormal DCT-II of `side` values, one a row, the slowest first: (side, side)."""
    k = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * k[:, None] * (k + 0.5)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves.to(like.device, like.dtype)
