"""Models with masked gradients that transform images before the network, so that gradients are zero,
noisy or random.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import through
from holdfast.corruptions.images import jpeg_compression
from holdfast.doubts.gallery.item import Item, digit_network, trained_on_digits

BITS = 4  # of 8; a small perturbation changes few of the 16 levels
QUALITY = 75  # the usual default of JPEG encoders
CODE = 16  # levels of the thermometer code
SMALLEST = 26  # smallest side of a resized digit, of 28 pixels
RIPPLE, PERIOD = 0.004, 0.001  # amplitude of a grey level, and a period far below usual steps of attacks
DESCENTS, WEIGHT, STEP = 6, 0.02, 0.2  # of the total-variation denoiser


class Rounded(nn.Module):
    """Layer that rounds pixels to `bits` bits. Images from files have 8 bits, so the default value does not change
    them.
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.levels = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the images `x`, in which each pixel is rounded to the nearest of the possible levels."""
        rounded: Tensor = (x * self.levels).round() / self.levels
        return rounded


class Compressed(nn.Module):
    """Layer that compresses images as JPEG and decompresses them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the images `x` after JPEG compression and decompression."""
        rows = torch.arange(len(x), device=x.device)
        return jpeg_compression(x, (QUALITY,), rows, Draws(0))


class Thermometer(nn.Module):
    """Layer that encodes each pixel as a thermometer code: a vector with a one for each level that the pixel exceeds,
    and zeros otherwise.

    Its input has one channel, and its output `CODE` channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the thermometer code of each pixel of the images `x`, which consists of zeros and ones."""
        return (x > _levels(x)).to(x.dtype)


def thermometer_slope(x: Tensor) -> Tensor:
    """Return the differentiable approximation of the thermometer code of pixels by Athalye et al.

    It is the amount by which a pixel exceeds each level, clamped to 0 and 1.
    """
    return (x - _levels(x)).clamp(0, 1)


def _levels(x: Tensor) -> Tensor:
    return (torch.arange(CODE, device=x.device, dtype=x.dtype) / CODE).view(1, -1, 1, 1)


class Shattered(nn.Module):
    """Layer that adds an invisible but very steep ripple to images, so that the sign of the gradient is practically
    random.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the images `x` with the ripple added."""
        return x + RIPPLE * torch.sin(2 * math.pi / PERIOD * x)


class Resized(nn.Module):
    """Layer that shrinks images to a random size and pads them at a random position.

    The result is rounded to 256 levels, as in image libraries.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the images `x`, shrunk and padded. Size and position are random in each call, but the same for all
        images of a batch.
        """
        side = x.shape[-1]
        small = int(torch.randint(SMALLEST, side + 1, ()))
        room = side - small
        left, top = int(torch.randint(room + 1, ())), int(torch.randint(room + 1, ()))
        shrunk = F.interpolate(x, size=(small, small), mode="bilinear", align_corners=False)
        return (255 * F.pad(shrunk, (left, room - left, top, room - top))).round() / 255


class Denoised(nn.Module):
    """Layer that denoises images by a few steps of gradient descent on the squared distance to the input plus the total
    variation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the denoised images, without a gradient with respect to the input."""
        noisy, z = x.detach(), x.detach()
        for _ in range(DESCENTS):
            z = z.detach().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(0.5 * (z - noisy).square().sum() + WEIGHT * _variation(z), z)
            z = z.detach() - STEP * grad
        return z.clamp(0, 1)


def _variation(x: Tensor) -> Tensor:
    down, right = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    # the constants keep the gradient of the square root finite where neighbouring pixels are equal
    return (down.square() + 1e-3).sqrt().sum() + (right.square() + 1e-3).sqrt().sum()


def coded(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network that is trained on digits whose pixels are encoded as thermometer codes."""
    return trained_on_digits(
        lambda: nn.Sequential(through(Thermometer(), thermometer_slope), digit_network(CODE)), digits
    )


_ATHALYE = "Athalye et al., Obfuscated gradients give a false sense of security, ICML 2018, arXiv:1802.00420"
_GUO = "Guo et al., Countering adversarial images using input transformations, ICLR 2018, arXiv:1711.00117"

ITEMS = (
    Item("zero-gradient", _ATHALYE, lambda digits, twin: nn.Sequential(Rounded(), twin)),
    Item(
        "bit-depth",
        "Xu et al., Feature squeezing: detecting adversarial examples, NDSS 2018, arXiv:1704.01155",
        lambda digits, twin: nn.Sequential(Rounded(BITS), twin),
    ),
    Item("jpeg", _GUO, lambda digits, twin: nn.Sequential(Compressed(), twin)),
    Item(
        "thermometer",
        "Buckman et al., Thermometer encoding: one hot way to resist adversarial examples, ICLR 2018",
        coded,
    ),
    Item("shattered", _ATHALYE, lambda digits, twin: nn.Sequential(Shattered(), twin)),
    Item(
        "resize-and-pad",
        "Xie et al., Mitigating adversarial effects through randomization, ICLR 2018, arXiv:1711.01991",
        lambda digits, twin: nn.Sequential(Resized(), twin),
    ),
    Item("total-variation", _GUO, lambda digits, twin: nn.Sequential(Denoised(), twin)),
)
