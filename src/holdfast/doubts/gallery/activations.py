"""Models with masked gradients whose activation functions are discontinuous or random."""

from functools import partial

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.gradients import Through, through
from holdfast.doubts.gallery.item import Item
from holdfast.doubts.gallery.small_networks import digit_network, trained_on_digits

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


ITEMS = (
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
