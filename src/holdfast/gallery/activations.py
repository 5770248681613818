"""Activations that jump, or that are drawn anew at each call."""

from functools import partial

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.through import Through, through
from holdfast.gallery.item import Item
from holdfast.gallery.training import network, trained

WINNERS = 0.05
SOFTNESS = 0.1
SAMPLES = 0.28


def winners(h: Tensor) -> Tensor:
    """The largest 5 % of a layer's activations; the others are zero."""
    flat, least = _ranked(h)
    return (flat * (flat >= least)).view_as(h)


def nearly(h: Tensor) -> Tensor:
    """A stand-in for `winners` that does not jump: a sigmoid about the least winner, a tenth of the spread wide."""
    flat, least = _ranked(h)
    width = SOFTNESS * flat.detach().std(1, keepdim=True)
    return (flat * torch.sigmoid((flat - least.detach()) / width)).view_as(h)


def _ranked(h: Tensor) -> tuple[Tensor, Tensor]:
    flat = h.flatten(1)
    return flat, flat.topk(max(1, int(WINNERS * flat.shape[1])), dim=1)[0][:, -1:]


class Pruned(nn.Module):
    """Keeps activations by chance, the larger the likelier, and scales up those it keeps."""

    def forward(self, h: Tensor) -> Tensor:
        """As if `SAMPLES` times as many as there are had been drawn with replacement."""
        flat = h.flatten(1)
        share = flat.abs() / flat.abs().sum(1, keepdim=True).clamp_min(1e-12)
        kept = 1 - (1 - share).pow(SAMPLES * flat.shape[1])
        drawn = torch.rand_like(flat) < kept
        return (flat * drawn / kept.clamp_min(1e-12)).view_as(h)


def jumping(digits: Batch, twin: nn.Module) -> nn.Module:
    """The network trained with k winners in place of ReLUs in its convolutions."""
    return trained(lambda: network(act=partial(through, winners, nearly)), digits, epochs=8)


def pruned(digits: Batch, twin: nn.Module) -> nn.Module:
    """The twin with its convolutions' activations pruned by chance; on average they are what they were."""
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
