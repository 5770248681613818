"""Masked models that replace patches of the input, or vectors of features, by the nearest entry of a codebook, or
answer with the labels of stored examples.
"""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.doubts.gallery.item import Item, digit_network, trained_on_digits

PATCH, PATCHES = 4, 64  # side of a patch, which divides 28, and number of entries
VECTORS = 64  # entries of the codebook of features
CHANNELS = 32  # of the second convolution
SAMPLE, ROUNDS = 20_000, 10  # patches that k-means uses, and its rounds
COMMITMENT = 0.25  # weight of the loss that keeps features near their entry, as in van den Oord et al.
WEIGHT = 10.0  # weight of the distances in the loss, so that the network is also right without the codebook


class PatchCodebook(nn.Module):
    """Layer that replaces each patch of an image by the nearest entry of a codebook."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__()
        self.register_buffer("entries", entries)
        self.entries: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the images that the nearest entries form, computed in NumPy and so without a gradient."""
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).detach().cpu().numpy()
        entries = self.entries.cpu().numpy()
        # the square of the patch itself is the same for all entries
        scores = np.square(entries).sum(1) - 2 * patches @ entries.T
        nearest = torch.from_numpy(entries[scores.argmin(-1)]).to(x)
        return F.fold(nearest.transpose(1, 2), x.shape[-2:], PATCH, stride=PATCH)


class FeatureCodebook(nn.Module):
    """Layer that replaces the feature vector at each position by the nearest entry of a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(VECTORS, CHANNELS) / CHANNELS**0.5)
        self.distance = torch.zeros(())  # of the last batch in training, for the loss

    def forward(self, h: Tensor) -> Tensor:
        """Return the features `h` of each position as the nearest entry, without a gradient to `h` in eval mode."""
        vectors = h.permute(0, 2, 3, 1)
        nearest = torch.cdist(vectors.flatten(0, 2).detach(), self.entries).argmin(1)
        entries = self.entries[nearest].view_as(vectors)
        if self.training:
            pulled, kept = (entries - vectors.detach()).square(), (entries.detach() - vectors).square()
            self.distance = pulled.mean() + COMMITMENT * kept.mean()
            entries = vectors + (entries - vectors).detach()
        return entries.permute(0, 3, 1, 2)


def k_means(points: Tensor, entries: int, rounds: int = ROUNDS, seed: int = 0) -> Tensor:
    """Return the centres of Lloyd's algorithm, which starts from random points; an empty cluster keeps its centre."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    centres = points[order[:entries]]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        counts = nearest.bincount(minlength=entries)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def patches(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return the undefended network `twin` behind a codebook of the patches of the digits, found by k-means."""
    all_patches = F.unfold(digits.x, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    order = torch.randperm(len(all_patches), generator=torch.Generator().manual_seed(0))
    return nn.Sequential(PatchCodebook(k_means(all_patches[order[:SAMPLE]], PATCHES)), twin).eval()


def features(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network that is trained with a codebook of features after its convolutions."""

    def build() -> nn.Module:
        layers = list(digit_network())
        return nn.Sequential(*layers[:4], FeatureCodebook(), *layers[4:])

    def quantised(net: nn.Module, batch: Batch) -> Tensor:
        loss = F.cross_entropy(net(batch.x), batch.y)
        return loss + WEIGHT * cast("FeatureCodebook", cast("nn.Sequential", net)[4]).distance

    net = trained_on_digits(build, digits, quantised, epochs=10)
    # the graph of the last batch cannot be copied to another process
    cast("FeatureCodebook", cast("nn.Sequential", net)[4]).distance = torch.zeros(())
    return net


def _without_codebook(model: nn.Module) -> nn.Module:
    layers = list(cast("nn.Sequential", model))
    return nn.Sequential(*layers[:4], *layers[5:]).eval()


CODEBOOKS = (
    Item(
        "patch-codebook",
        "Moosavi-Dezfooli et al., Divide, denoise, and defend against adversarial attacks, 2018, arXiv:1802.06806",
        patches,
    ),
    Item(
        "feature-codebook",
        "van den Oord et al., Neural discrete representation learning, NeurIPS 2017, arXiv:1711.00937",
        features,
        eps=0.125,
        twin=_without_codebook,
    ),
)


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


def stored_features(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a model that compares the activations of the last hidden layer of `twin` with those of all digits."""
    return Memory(cast("nn.Sequential", twin)[:-1], digits, NEIGHBOURS).eval()


def nearest(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a model that answers with the label of the nearest digit, compared after the convolutions of `twin`."""
    return Memory(cast("nn.Sequential", twin)[:5], digits, 1).eval()


MEMORIES = (
    Item(
        "memory",
        "Papernot & McDaniel, Deep k-nearest neighbors, 2018, arXiv:1803.04765",
        stored_features,
    ),
    Item(
        "nearest-example",
        "Sitawarin & Wagner, On the robustness of deep k-nearest neighbors, DLS 2019, arXiv:1903.08333",
        nearest,
    ),
)
