"""The description of a model with masked gradients in the gallery, and the training of small networks on a few thousand
digits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch

BATCH = 100
Loss = Callable[[nn.Module, Batch], Tensor]
"""Type of a training loss: a function of a network and a batch of digits."""


def digit_network(channels: int = 1, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return an untrained convolutional network for images of 28 x 28 pixels, with two convolutions and two linear
    layers.

    `channels` is the number of input channels, and `act` builds the activation after each convolution.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        act(),
        nn.Conv2d(16, 32, 4, 2, 1),
        act(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def training_loss(net: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the network `net` on a batch."""
    return F.cross_entropy(net(batch.x), batch.y)


def trained_on_digits(
    build: Callable[[], nn.Module],
    digits: Batch,
    loss: Loss = training_loss,
    *,
    epochs: int = 6,
    lr: float = 4e-3,
    seed: int = 0,
) -> nn.Module:
    """Train a new network on digits with the optimiser Adam, and return it frozen and in eval mode. The function
    `build` creates the network.

    The state of torch's random number generators is restored.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        net = build().train()
        steps = epochs * -(-len(digits) // BATCH)
        adam = torch.optim.Adam(net.parameters(), lr)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, lr, steps)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(digits)), BATCH):
                adam.zero_grad()
                loss(net, digits.take(rows)).backward()  # type: ignore[no-untyped-call]
                adam.step()
                cycle.step()
    return net.eval().requires_grad_(False)


def undefended(digits: Batch) -> nn.Module:
    """Return a network without a defence that is trained on digits, with which each model with masked gradients is
    compared.
    """
    return trained_on_digits(digit_network, digits)


EPS = 0.15
"""Smallest Linf radius, in steps of 0.025, at which at most 5 % of 500 digits are robust on the undefended twin."""


@dataclass(frozen=True)
class Item:
    """A model with masked gradients: its name, its paper, and the function that builds it.

    Its twin is the undefended network of `small_networks`, unless it has its own. The masked model contains the weights
    of its twin, or is a network that is trained in a similar way.
    """

    name: str
    source: str
    """the paper that proposed the defence, or that showed how it masks gradients"""
    build: Callable[[Batch, nn.Module], nn.Module]
    """function that builds the masked model from training digits and the undefended twin"""
    eps: float = EPS
    """smallest Linf radius, in steps of 0.025, at which at most 5 % of 500 digits are robust on the twin"""
    twin: Callable[[nn.Module], nn.Module] | None = None
    """function that returns the twin, with the weights of a built model; None if it is the undefended network"""
