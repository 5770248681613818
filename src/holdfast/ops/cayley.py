"""Layers that keep every length: orthogonal matrices and convolutions by Cayley's transform.

Trockman & Kolter, "Orthogonalizing Convolutional Layers with the Cayley Transform", ICLR 2021, arXiv:2104.07167.
Differs from the paper: the inverse is taken in double precision, for certificates count every rounding; and there is no
scale that is learned beside the matrix.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix (…, m, n) with orthonormal columns, or rows where those are fewer, of any matrix; zeros give a unit one.

    The inverse exists always, and is at most one: it is that of the unit matrix plus a skew and a non-negative one.
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
    """A linear layer whose matrix is orthogonal, or half of one where the widths differ."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) of (n, features)."""
        return F.linear(x, orthogonal(self.weight), self.bias)


class CayleyConv2d(nn.Module):
    """A convolution, around the edges of the image, that is orthogonal at each of its frequencies."""

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, width, height, width of the image) of (n, channels, …)."""
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
