"""Canaries, which are examples that are easy to recognise if they were trained on, and guesses which of them were
included. Each is included with probability 1/2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Labels, Mask, PerExample

CanaryKind = Literal["mislabelled", "random"]
"""`mislabelled`: examples of the data with a wrong label. `random`: uniform noise with a random label"""


@dataclass(frozen=True)
class Canaries:
    """Canaries with what the seed decided about them, and the examples without them."""

    x: Inputs
    y: Labels
    """wrong or random labels"""
    included: Mask
    """whether the network is trained on a canary"""
    rest: Batch
    """examples on which the network is always trained"""

    @property
    def training(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the training: the other examples, and the included canaries at the end."""
        x, y = self.x[self.included], self.y[self.included]
        return torch.cat((self.rest.x, x)), torch.cat((self.rest.y, y))


def planted(data: Batch, classes: int, bounds: Bounds, *, n: int, kind: CanaryKind, rng: Draws) -> Canaries:
    """Return `n` canaries, whose inclusion is decided by the seed.

    Mislabelled canaries are taken out of the data, so that they are in the training with the wrong label or not at all.
    """
    rows = torch.arange(n, device=data.ids.device)
    if kind == "mislabelled":
        order = rng.at("canaries").bits(data.ids).argsort()
        source, rest = data.take(order[:n]), data.take(order[n:].sort().values)
        x, shift = source.x, 1 + rng.at("labels").integers(rows, classes - 1)
        y = (source.y + shift) % classes
    else:
        low, high = bounds.like(data.x)
        noise = rng.at("inputs").uniform(rows, *data.example_shape).to(data.x.dtype)
        x, rest = low + (high - low) * noise, data
        y = rng.at("labels").integers(rows, classes)
    included = rng.at("included").bits(rows) < 0
    return Canaries(x, y, included, rest)


def right_guesses(losses: PerExample, included: Mask, guesses: int) -> int:
    """Return how many of `guesses` guesses are right: one half, rounded down, guesses that the canaries with the
    smallest losses were included, and the rest that those with the largest losses were not.

    The number of guesses is fixed before the losses are known, as the bound requires. Equal losses are ordered by the
    position, which does not depend on the inclusion.
    """
    order = losses.double().argsort(stable=True)
    yes = guesses // 2
    no = guesses - yes
    return int(included[order[:yes]].sum() + (~included[order[len(order) - no :]]).sum())
