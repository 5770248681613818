"""A small problem that a small network learns in a second: which of four blobs an image is."""

import torch
from torch import nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Task

THREAT = ThreatModel(Linf(0.1))


def network(seed: int = 0, *, norm: bool = False) -> Classifier:
    """Two convolutions and two linear layers; with or without batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        between = [nn.BatchNorm2d(6)] if norm else []
        layers = [
            nn.Conv2d(1, 6, 3, 2, 1), *between, nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4),
        ]  # fmt: skip
        return Classifier(nn.Sequential(*layers), classes=4).eval()


def examples(seed: int = 0, n: int = 512) -> Batch:
    """Images of 8 x 8 with a bright blob in one of four corners, among noise."""
    rng, ids = Draws(seed), torch.arange(n)
    y = rng.at("y").integers(ids, 4)
    x = 0.5 * rng.at("x").uniform(ids, 1, 8, 8)
    for corner in range(4):
        down, right = 4 * (corner // 2), 4 * (corner % 2)
        x[y == corner, :, down + 1 : down + 3, right + 1 : right + 3] += 0.25
    return Batch(x, y, ids)


def accuracy(model: Classifier, data: Batch) -> float:
    """Share that is right."""
    with torch.no_grad():
        return (model(data.x).argmax(1) == data.y).float().mean().item()


def task(*, norm: bool = False, robust: bool = False, epochs: int = 12) -> Task:
    """Training as every set of the problem has it."""
    kind = SingleStep if robust else Standard
    recipe = kind(training=Training(epochs=epochs, batch=32, lr=0.01, averaging="none"))
    return Task(network(norm=norm), examples(), THREAT, recipe, recipe, "own")
