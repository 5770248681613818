"""Masked models that answer with the labels of stored training examples."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.doubts.gallery.item import Item

NEIGHBOURS = 5  # odd, so that two classes rarely have equally many
CLASSES = 10


class Memory(nn.Module):
    """Model that finds the nearest stored feature vectors, and returns the share of their labels."""

    def __init__(self, body: nn.Module, stored: Batch, neighbours: int) -> None:
        super().__init__()
        self.body, self.neighbours = body, neighbours
        with torch.no_grad():
            self.register_buffer("keys", body(stored.x))
        self.register_buffer("labels", stored.y)
        self.keys: Tensor
        self.labels: Tensor

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the share of the nearest stored examples that has each class."""
        nearest = torch.cdist(self.body(x), self.keys).topk(self.neighbours, largest=False)[1]
        return F.one_hot(self.labels[nearest], CLASSES).to(x.dtype).mean(1)


def features(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a model that compares the activations of the last hidden layer of `twin` with those of all digits."""
    return Memory(cast("nn.Sequential", twin)[:-1], digits, NEIGHBOURS).eval()


def nearest(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a model that answers with the label of the nearest digit, compared after the convolutions of `twin`."""
    return Memory(cast("nn.Sequential", twin)[:5], digits, 1).eval()


ITEMS = (
    Item(
        "memory",
        "Papernot & McDaniel, Deep k-nearest neighbors, 2018, arXiv:1803.04765",
        features,
    ),
    Item(
        "nearest-example",
        "Sitawarin & Wagner, On the robustness of deep k-nearest neighbors, DLS 2019, arXiv:1903.08333",
        nearest,
    ),
)
