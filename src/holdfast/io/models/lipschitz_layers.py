"""Layers whose Lipschitz constant is one in Euclidean distance, and the radius within which a network of such layers is
certified.

AOL: Prach & Lampert, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks", ECCV 2022,
arXiv:2208.03160. SLL: Araujo et al., "A Unified Algebraic Perspective on Lipschitz Neural Networks", ICLR 2023,
arXiv:2303.03169. MaxMin: Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", ICML 2019,
arXiv:1811.05381. Cayley: Trockman & Kolter, "Orthogonalizing Convolutional Layers with the Cayley Transform", ICLR
2021, arXiv:2104.07167. Differs from the papers: AOL rescales inputs or outputs, whichever are fewer, so that a layer
with fewer outputs than inputs can be orthogonal too; both add a small constant to their divisors, which only shrinks
the outputs; the inverse of the Cayley transform is computed in double precision, because certificates must account for
every rounding, and no scale is learned beside its matrix. The first SLL runs, with another constant, had chance
accuracy (Prach et al., "1-Lipschitz Layers Compared", CVPR 2024, arXiv:2311.16833).

Convolutions preserve the size of the image and pad with zeros. Bounds for the unbounded plane hold for the image too,
since neither cropping nor padding with zeros increases a distance.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attacks.parts.closest import leeway
from holdfast.core.model import Classifier
from holdfast.core.number_format import exactly
from holdfast.core.types import Logits, PerExample

_GUARD = 1e-6  # added to divisors, so that a row of zeros stays zero and has a finite gradient
_REACH = 8.0  # limit of the logarithms of SLL's weights, so that their ratios stay within float32
_SLACK = 1e-4  # relative reduction of a radius: a hundred layers with gains of up to 1 + 1e-6


def overlaps(kernel: Tensor) -> Tensor:
    """Return for each pair of output channels of a convolution kernel (out, in, k, k) the sum of the absolute
    correlations between their filters, over all shifts.

    `k` must be odd. The diagonal matrix of the row sums is an upper bound of the convolution times its transpose, for
    every image size. The same holds for the matrix with its columns multiplied by positive numbers and its rows divided
    by them.
    """
    with exactly(kernel):
        sums: Tensor = F.conv2d(kernel, kernel, padding=kernel.shape[2] - 1).abs().sum((2, 3))
    return sums


def almost_orthogonal(kernel: Tensor) -> Tensor:
    """Return a convolution kernel, rescaled by input or output channel so that the Lipschitz constant of its
    convolution is at most one.
    """
    if kernel.shape[0] <= kernel.shape[1]:
        return kernel * torch.rsqrt(overlaps(kernel).sum(1) + _GUARD).view(-1, 1, 1, 1)
    return kernel * torch.rsqrt(overlaps(kernel.transpose(0, 1)).sum(1) + _GUARD).view(1, -1, 1, 1)


class AOLConv2d(nn.Module):
    """Convolution with an odd kernel size that is rescaled to a Lipschitz constant of at most one (AOL,
    almost-orthogonal layer).
    """

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.dirac_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps (n, width, h, w) for inputs (n, channels, h, w)."""
        return F.conv2d(x, almost_orthogonal(self.weight), self.bias, padding=self.weight.shape[2] // 2)


class AOLLinear(nn.Module):
    """Linear layer that is rescaled to a Lipschitz constant of at most one (AOL, almost-orthogonal layer)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, width) for inputs (n, features)."""
        kernel = almost_orthogonal(self.weight[:, :, None, None])
        return F.linear(x, kernel[:, :, 0, 0], self.bias)


class SLLConv2d(nn.Module):
    """Residual convolution with a Lipschitz constant of at most one (SLL, SDP-based Lipschitz layer): the input minus
    the output of a hidden layer whose two matrices share weights.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    @property
    def ratios(self) -> Tensor:
        """Weights (width) of the hidden units, of which only the ratios matter."""
        return self.scale.clamp(-_REACH, _REACH).exp()

    def heights(self) -> Tensor:
        """Return the divisors (width) of the hidden units, with which the Lipschitz constant is at most one."""
        q = self.ratios
        with exactly(self.weight):
            return overlaps(self.weight) @ q / q + _GUARD

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps for inputs (n, channels, h, w), in the same shape."""
        kernel, half = self.weight, self.weight.shape[2] // 2
        heights = self.heights()
        hidden = F.relu(F.conv2d(x, kernel, self.bias, padding=half))
        output = F.conv_transpose2d(hidden / heights.view(1, -1, 1, 1), kernel, padding=half)
        return x - 2 * output


class MaxMin(nn.Module):
    """Activation that replaces each pair of channels by their maximum and minimum, which preserves the norm of
    gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maximum and the minimum of each pair of channels, in the shape of the input. A channel without a
        partner is unchanged.
        """
        half = x.shape[1] // 2
        first, second, unpaired = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        return torch.cat((torch.maximum(first, second), torch.minimum(first, second), unpaired), 1)


class Widened(nn.Module):
    """Layer that adds channels of zeros up to a given number of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with channels of zeros added, in shape (n, width, …)."""
        return F.pad(x, (0, 0, 0, 0, 0, self.width - x.shape[1]))


def input_constant(model: Classifier) -> float:
    """Return the Lipschitz constant of the input normalisation of a classifier, which is one divided by its smallest
    standard deviation.
    """
    return 1.0 if model.std is None else 1.0 / float(model.std.min())


def certified_radius(logits: Logits, *, constant: float = 1.0) -> PerExample:
    """Return for each input the certified Euclidean radius within which the prediction cannot change, rounded down. It
    is 0 for a tie between classes.

    `constant` is a Lipschitz constant of the logits: one for a network of these layers, times the `input_constant` of
    its classifier. The difference of two logits then has the Lipschitz constant `sqrt(2) * constant`.
    """
    first, second = logits.double().topk(2, dim=1).values.unbind(1)
    lead = first - second - 2 * leeway(logits).double()  # rounding of the logits themselves
    radius = (lead * (1 - _SLACK) / (math.sqrt(2) * constant)).clamp_min(0)
    rounded = radius.to(logits.dtype)
    too_large = rounded.double() > radius
    return torch.where(too_large, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def orthogonal(matrix: Tensor) -> Tensor:
    """Convert matrices (…, m, n) to matrices of the same shape with orthonormal columns, or rows if m < n. A zero
    matrix gives the identity.

    The inverse always exists and its norm is at most one: the matrix is the sum of the identity, a skew-symmetric and a
    positive semi-definite matrix.
    """
    m, n = matrix.shape[-2:]
    if m < n:
        return orthogonal(matrix.mH).mH
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    square, below = precise[..., :n, :], precise[..., n:, :]
    unit = torch.eye(n, dtype=precise.dtype, device=precise.device)
    skew = square - square.mH + below.mH @ below
    inverse = torch.linalg.inv(unit + skew)
    return torch.cat(((unit - skew) @ inverse, -2 * below @ inverse), -2).to(matrix.dtype)


class CayleyLinear(nn.Module):
    """Linear layer with a Lipschitz constant of one: its matrix has orthonormal rows or columns, and is orthogonal if
    the numbers of inputs and outputs are equal.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, width) for inputs (n, features)."""
        return F.linear(x, orthogonal(self.weight), self.bias)


class CayleyConv2d(nn.Module):
    """Convolution with circular padding and a Lipschitz constant of one: its matrix at each frequency has orthonormal
    rows or columns.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def matrices(self, size: torch.Size) -> Tensor:
        """Return the matrices (h, w // 2 + 1, width, channels) at the frequencies of images of a size (h, w) that is at
        least that of the kernel. Their rows or columns are orthonormal.
        """
        half = self.weight.shape[2] // 2
        placed = F.pad(self.weight.to(torch.float64), (0, size[1] - 2 * half - 1, 0, size[0] - 2 * half - 1))
        kernels = torch.fft.rfft2(torch.roll(placed, (-half, -half), (2, 3))).conj()
        return orthogonal(kernels.permute(2, 3, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps (n, width, h, w) for inputs (n, channels, h, w)."""
        size = x.shape[2:]
        half = self.weight.shape[2] // 2
        if min(size) <= 2 * half:
            x = F.pad(x, (half, half, half, half))  # smaller than the kernel
        padded_size = x.shape[2:]
        waves = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)))
        unitary = self.matrices(padded_size).to(waves.dtype)
        products = torch.einsum("hwoi,nihw->nohw", unitary, waves)
        maps: Tensor = torch.fft.irfft2(products, s=padded_size).to(x.dtype) + self.bias.view(1, -1, 1, 1)
        first = half if padded_size != size else 0
        return maps[:, :, first : first + size[0], first : first + size[1]]
