"""Basis of the discrete cosine transform (DCT)."""

import math

import torch
from torch import Tensor


def cosines(side: int, like: Tensor) -> Tensor:
    """Return the basis (side, side) of the orthonormal DCT-II, one cosine in each row, lowest frequency first."""
    k = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * k[:, None] * (k + 0.5)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves.to(like.device, like.dtype)
