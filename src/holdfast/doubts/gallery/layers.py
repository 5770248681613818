"""Models with masked gradients whose layers have no useful gradient: activation functions that are discontinuous or
random, very low precision, and a saturated softmax.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.gradients import Through, through
from holdfast.doubts.gallery.item import Item, digit_network, trained_on_digits

WINNERS = 0.05  # share of the activations that remain
SOFTNESS = 0.1  # width of the sigmoid, as a share of the standard deviation of the activations
SAMPLES = 0.28  # number of samples as a share of the number of activations


def winners(h: Tensor) -> Tensor:
    """Apply the k-winners-take-all activation: keep the largest 5 % of the activations of each example, and set the
    others to zero.
    """
    flat, least = _ranked(h)
    return (flat * (flat >= least)).view_as(h)


def nearly(h: Tensor) -> Tensor:
    """Return a continuous approximation of the k-winners-take-all activation, whose gradients are useful for an attack.

    Each activation is multiplied by a sigmoid that is centred at the smallest unchanged value. The width of the sigmoid
    is a tenth of the standard deviation of the activations.
    """
    flat, least = _ranked(h)
    width = SOFTNESS * flat.detach().std(1, keepdim=True)
    return (flat * torch.sigmoid((flat - least.detach()) / width)).view_as(h)


def _ranked(h: Tensor) -> tuple[Tensor, Tensor]:
    flat = h.flatten(1)
    return flat, flat.topk(max(1, int(WINNERS * flat.shape[1])), dim=1)[0][:, -1:]


class Pruned(nn.Module):
    """Layer that sets random activations to zero and scales up the others, so that the expected value of each
    activation does not change.

    The probability that an activation remains increases with its absolute value.
    """

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations `h`, of which random ones are set to zero and the others are scaled up.

        The probabilities are those of `SAMPLES` times the number of activations, sampled with replacement.
        """
        flat = h.flatten(1)
        share = flat.abs() / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)
        keep_probability = 1 - (1 - share).pow(SAMPLES * flat.shape[1])
        mask = torch.rand_like(flat) < keep_probability
        return (flat * mask / keep_probability.clamp_min(1e-12)).view_as(h)


def jumping(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network trained on digits with the discontinuous activation k-winners-take-all instead of ReLU after its
    convolutions.
    """
    return trained_on_digits(lambda: digit_network(act=partial(through, winners, nearly)), digits, epochs=8)


def pruned(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a copy of the undefended network `twin` in which activations of the convolutions are randomly set to zero.

    The remaining activations are scaled, so that their expected values do not change.
    """
    layers: list[nn.Module] = []
    for place, layer in enumerate(twin.children()):
        layers.append(layer)
        if place in (1, 3):
            layers.append(Through(Pruned()))
    return nn.Sequential(*layers)


ACTIVATIONS = (
    Item(
        "k-winners",
        "Xiao et al., Enhancing adversarial defense by k-winners-take-all, ICLR 2020, arXiv:1905.10510",
        jumping,
    ),
    Item(
        "stochastic-pruning",
        "Dhillon et al., Stochastic activation pruning for robust adversarial defense, ICLR 2018, arXiv:1803.01442",
        pruned,
    ),
)


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
    """Return a network trained on digits whose activations are the signs 1 and -1, so that its gradient is zero.

    `twin` is not used; it is an argument of the same function of other items of the gallery.
    """
    return trained_on_digits(lambda: digit_network(act=Binarised), digits)


def _smooth(model: nn.Module) -> nn.Module:
    layers = cast("nn.Sequential", model)
    return nn.Sequential(*(Steep() if isinstance(layer, Binarised) else layer for layer in layers)).eval()


PRECISIONS = (
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


TEMPERATURE = 100.0  # the logits grow by about this factor, so that the softmax at temperature 1 saturates
SHARPNESS = 30.0  # factor of the logits, for which the softmax saturates in float32


class Times(nn.Module):
    """Layer that multiplies its input by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the input `x` multiplied by the constant `factor`."""
        return self.factor * x


def distilled(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network that was trained on the outputs of a teacher network (defensive distillation), both with a
    softmax at temperature 100.

    The result is used without the temperature, so that its logits are large.
    """

    def hot(net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch.x) / TEMPERATURE, batch.y)

    teacher = trained_on_digits(digit_network, digits, hot, epochs=10, lr=2e-2)

    def taught(net: nn.Module, batch: Batch) -> Tensor:
        soft = (teacher(batch.x) / TEMPERATURE).softmax(1)
        return F.cross_entropy(net(batch.x) / TEMPERATURE, soft)

    return trained_on_digits(digit_network, digits, taught, epochs=10, lr=2e-2, seed=1)


def saturated(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the undefended network `twin` followed by such a sharp softmax that most probabilities are exactly 0 or 1
    in float32.
    """
    return nn.Sequential(twin, Times(SHARPNESS), nn.Softmax(1))


LOGIT_MASKS = (
    Item(
        "distillation",
        "Papernot et al., Distillation as a defense to adversarial perturbations, S&P 2016, arXiv:1511.04508",
        distilled,
    ),
    Item(
        "saturated-softmax",
        "Carlini & Wagner, Defensive distillation is not robust to adversarial examples, 2016, arXiv:1607.04311",
        saturated,
    ),
)
