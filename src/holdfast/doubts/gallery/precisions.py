"""Masked models whose layers compute in very low precision: rounding has no useful gradient."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.doubts.gallery.item import Item
from holdfast.doubts.gallery.small_networks import digit_network, trained_on_digits

NIBBLE = 7  # largest integer of 4 bits with a sign
SLOPE = 3.0  # so that the twin of the binarised network is about as accurate as the network itself


class MixedPrecision(nn.Module):
    """Copy of the undefended network: its convolutions compute in integers of 4 bits, its first linear layer in floats
    of 8 bits, and its last layer in single precision.

    Weights and activations have one scale for each tensor, and the activations of each example their own.
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        h = x
        for conv in (self.net[0], self.net[2]):
            assert isinstance(conv, nn.Conv2d)
            products = F.conv2d(
                _nibbles(h), _nibbles(conv.weight, whole=True), None, conv.stride, conv.padding
            )
            h = F.relu(products + cast("Tensor", conv.bias)[:, None, None])
        dense = cast("nn.Linear", self.net[5])
        h = F.relu(F.linear(_eighth(h.flatten(1)), _eighth(dense.weight), dense.bias))
        return cast("Tensor", self.net[7](h))


def _nibbles(values: Tensor, *, whole: bool = False) -> Tensor:
    """Return the values after a conversion to integers of 4 bits and back, with a scale for each example or for all."""
    largest = values.abs().amax() if whole else values.abs().amax((1, 2, 3), keepdim=True)
    scale = largest.clamp_min(1e-12) / NIBBLE
    return (values / scale).round().to(torch.int8).to(values.dtype) * scale.detach()


def _eighth(values: Tensor) -> Tensor:
    """Return the values after a conversion to floating point with 3 bits of mantissa and back."""
    return values.detach().to(torch.float8_e4m3fn).to(values.dtype)


class Binarised(nn.Module):
    """Activation function that returns the sign, and in training passes the gradient of a clipped identity."""

    def forward(self, h: Tensor) -> Tensor:
        """Return 1 where the input `h` is at least 0, and -1 elsewhere."""
        signs = torch.where(h >= 0, 1.0, -1.0).to(h.dtype)
        if self.training:
            clipped = h.clamp(-1, 1)
            return clipped + (signs - clipped).detach()
        return signs


class Steep(nn.Module):
    """Activation function that approximates the sign: the hyperbolic tangent of its input times `SLOPE`."""

    def forward(self, h: Tensor) -> Tensor:
        """Return the approximate signs of the input `h`."""
        return (SLOPE * h).tanh()


def mixed(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the undefended network `twin` with layers of different precision."""
    return MixedPrecision(cast("nn.Sequential", twin)).eval()


def binarised(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network that is trained with binary activations after its convolutions."""
    return trained_on_digits(lambda: digit_network(act=Binarised), digits)


def _smooth(model: nn.Module) -> nn.Module:
    layers = cast("nn.Sequential", model)
    return nn.Sequential(*(Steep() if isinstance(layer, Binarised) else layer for layer in layers)).eval()


ITEMS = (
    Item(
        "mixed-precision",
        "Sen et al., EMPIR: ensembles of mixed precision deep networks for increased robustness against adversarial"
        " attacks, ICLR 2020, arXiv:2004.10162",
        mixed,
    ),
    Item(
        "binarised",
        "Galloway et al., Attacking binarized neural networks, ICLR 2018, arXiv:1711.00449",
        binarised,
        eps=0.075,
        twin=_smooth,
    ),
)
