"""Layers that preserve Euclidean length: orthogonal matrices and convolutions by the Cayley transform.

Trockman & Kolter, "Orthogonalizing Convolutional Layers with the Cayley Transform", ICLR 2021, arXiv:2104.07167.
Differs from the paper: the inverse is computed in double precision, because certificates must account for every
rounding; and no scale is learned beside the matrix.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix with orthonormal columns (rows if m < n) for a matrix (…, m, n); a zero matrix gives the
    identity.

    The inverse always exists and its norm is at most one: the matrix is the sum of the identity, a skew-symmetric and a
    positive semi-definite matrix.
    """
    m, n = matrix.shape[-2:]
    if m < n:
        return orthogonal(matrix.mH).mH
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    square, rest = wide[..., :n, :], wide[..., n:, :]
    unit = torch.eye(n, dtype=wide.dtype, device=wide.device)
    skew = square - square.mH + rest.mH @ rest
    inverse = torch.linalg.inv(unit + skew)
    return torch.cat(((unit - skew) @ inverse, -2 * rest @ inverse), -2).to(matrix.dtype)


class CayleyLinear(nn.Module):
    """A linear layer whose matrix has orthonormal rows or columns; it is orthogonal if the widths are equal."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, width) for inputs (n, features)."""
        return F.linear(x, orthogonal(self.weight), self.bias)


class CayleyConv2d(nn.Module):
    """A convolution with circular padding whose matrix at each frequency has orthonormal rows or columns."""

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps (n, width, h, w) for inputs (n, channels, h, w)."""
        size = x.shape[2:]
        half = self.weight.shape[2] // 2
        if min(size) <= 2 * half:
            x = F.pad(x, (half, half, half, half))  # smaller than the kernel
        whole = x.shape[2:]
        waves = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)))
        placed = F.pad(
            self.weight.to(torch.float64), (0, whole[1] - 2 * half - 1, 0, whole[0] - 2 * half - 1)
        )
        kernels = torch.fft.rfft2(torch.roll(placed, (-half, -half), (2, 3))).conj()
        turned = orthogonal(kernels.permute(2, 3, 0, 1)).to(waves.dtype)
        moved = torch.einsum("hwoi,nihw->nohw", turned, waves)
        back: Tensor = torch.fft.irfft2(moved, s=whole).to(x.dtype) + self.bias.view(1, -1, 1, 1)
        first = half if whole != size else 0
        return back[:, :, first : first + size[0], first : first + size[1]]
