"""Layers that never stretch a change in Euclidean length, and the radius that a network of them certifies.

AOL: Prach & Lampert, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks", ECCV 2022,
arXiv:2208.03160. SLL: Araujo et al., "A Unified Algebraic Perspective on Lipschitz Neural Networks", ICLR 2023,
arXiv:2303.03169. MaxMin: Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", ICML 2019,
arXiv:1811.05381. Differs from the papers: AOL rescales inputs or outputs, whichever are fewer, so that a layer that
narrows can be orthogonal too; both add a little to what they divide by, which only shrinks, where the first SLL runs
with another guard fell to chance (Prach et al., "1-Lipschitz Layers Compared", CVPR 2024, arXiv:2311.16833).

Convolutions keep the size of the image and see zeros around it: what is shown for the unbounded plane holds for a part
of it, since cutting and filling with zeros stretch nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.model import Classifier
from holdfast.core.types import Logits, PerExample
from holdfast.ops.closest import leeway
from holdfast.ops.number_format import exactly

_GUARD = 1e-6  # added to what is divided by: a row of zeros stays one, with a finite gradient
_REACH = 8.0  # of the logarithms of SLL's weights, whose ratios then stay within float32
_SLACK = 1e-4  # share of a radius: a hundred layers, each as much as 1e-6 beyond one by rounding


def overlaps(kernel: Tensor) -> Tensor:
    """For each two output channels of an odd kernel (out, in, k, k), the summed sizes of their products at all shifts.

    The sums of its rows, as a diagonal, are at least the convolution times its transpose, whatever the image's size;
    so are those of the matrix with its columns times any positive numbers and its rows divided by them.
    """
    with exactly(kernel):
        sums: Tensor = F.conv2d(kernel, kernel, padding=kernel.shape[2] - 1).abs().sum((2, 3))
    return sums


def almost_orthogonal(kernel: Tensor) -> Tensor:
    """The kernel rescaled, input by input or output by output, so that its convolution has a norm of at most one."""
    if kernel.shape[0] <= kernel.shape[1]:
        return kernel * torch.rsqrt(overlaps(kernel).sum(1) + _GUARD).view(-1, 1, 1, 1)
    return kernel * torch.rsqrt(overlaps(kernel.transpose(0, 1)).sum(1) + _GUARD).view(1, -1, 1, 1)


class AOLConv2d(nn.Module):
    """A convolution with an odd kernel, rescaled to stretch nothing."""

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.dirac_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, width, height, width of the image) of (n, channels, …)."""
        return F.conv2d(x, almost_orthogonal(self.weight), self.bias, padding=self.weight.shape[2] // 2)


class AOLLinear(nn.Module):
    """A linear layer, rescaled to stretch nothing."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) of (n, features)."""
        kernel = almost_orthogonal(self.weight[:, :, None, None])
        return F.linear(x, kernel[:, :, 0, 0], self.bias)


class SLLConv2d(nn.Module):
    """The input less what a hidden layer makes of it, with the weights of the hidden layer on the way in and out."""

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the same shape."""
        kernel, half = self.weight, self.weight.shape[2] // 2
        q = self.scale.clamp(-_REACH, _REACH).exp()
        with exactly(kernel):
            heights = overlaps(kernel) @ q / q + _GUARD
        hidden = F.relu(F.conv2d(x, kernel, self.bias, padding=half))
        back = F.conv_transpose2d(hidden / heights.view(1, -1, 1, 1), kernel, padding=half)
        return x - 2 * back


class MaxMin(nn.Module):
    """The larger and the smaller of each pair of channels, which keeps the length of every gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; an odd channel stays as it is."""
        half = x.shape[1] // 2
        one, other, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        return torch.cat((torch.maximum(one, other), torch.minimum(one, other), rest), 1)


class Widened(nn.Module):
    """Channels of zeros added up to a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, …) of (n, at most width, …)."""
        return F.pad(x, (0, 0, 0, 0, 0, self.width - x.shape[1]))


def input_constant(model: Classifier) -> float:
    """By how much the preprocessing of a classifier stretches at most: one over its smallest std."""
    return 1.0 if model.std is None else 1.0 / float(model.std.min())


def certified_radius(logits: Logits, *, constant: float = 1.0) -> PerExample:
    """The Euclidean distance within which no input gets another prediction, rounded down; 0 for a tie.

    `constant` bounds by how much the logits stretch: one for a network of these layers, times the `input_constant` of
    its classifier. No two logits come closer by more than that times the square root of two, for one that moves.
    """
    first, second = logits.double().topk(2, dim=1).values.unbind(1)
    apart = first - second - 2 * leeway(logits).double()  # rounding of the logits themselves
    radius = (apart * (1 - _SLACK) / (math.sqrt(2) * constant)).clamp_min(0)
    rounded = radius.to(logits.dtype)
    beyond = rounded.double() > radius
    return torch.where(beyond, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
