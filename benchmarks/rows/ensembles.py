"""An ensemble of three adversarially trained networks, and a mix of one of them with an accurate network: CIFAR-10."""

import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.networks import images
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells
from benchmarks.rows.cifar_hardening import MEAN, STD
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.architectures import ResidualBlock
from holdfast.recipes import SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe

WHAT = "CIFAR-10, Linf 8/255: an ensemble of three small adversarially trained networks, and a mix with an accurate one"
ROW, EPS, TRAINED, FITTED = "ensembles", 8 / 255, 48_000, 1_000
WIDTH = 16
HOW = Training(epochs=6, optimizer="sgd", lr=0.1, augment="crop-flip", layout="channels-last")
NETWORKS: dict[str, tuple[int, Recipe]] = {
    "robust-0": (0, SingleStep(training=HOW)),
    "robust-1": (1, SingleStep(training=HOW)),
    "robust-2": (2, SingleStep(training=HOW)),
    "accurate": (3, Standard(training=HOW)),
}
"""Seed and recipe of each network."""


def network() -> nn.Module:
    """A residual network whose first layer halves the image, so that three minutes suffice for six epochs."""
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, 2, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        ResidualBlock(WIDTH, WIDTH, 1),
        ResidualBlock(WIDTH, 2 * WIDTH, 2),
        ResidualBlock(2 * WIDTH, 4 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, 10),
    )


def _weights(name: str) -> Path:
    return RUNS / ROW / f"{name}.safetensors"


@cache
def _training() -> Batch:
    x, y = images("cifar10", TRAINED, split="train")
    return Batch(x, y, torch.arange(len(x)))


def _trained(name: str) -> Cells:
    """Train a network, and keep its weights in the cache."""
    seed, recipe = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    model = Classifier(net, mean=MEAN, std=STD, classes=10)
    data = _training()
    begun = time.process_time()
    *_, last = recipe(model, data, ThreatModel(Linf(EPS)), rng=Draws(seed).at("training"))
    spent = time.process_time() - begun
    last.put_into(model)
    _weights(name).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, _weights(name))
    return {"cpu_s": round(spent, 1), "parameters": sum(p.numel() for p in model.parameters())}


def trained(name: str) -> Cells:
    """What the training of a network took; its weights are in the cache afterwards."""
    if not _weights(name).is_file():
        (RUNS / ROW).mkdir(parents=True, exist_ok=True)
    return part(ROW, name, lambda: _trained(name))["measured"]  # type: ignore[no-any-return]


def reopened(name: str) -> Classifier:
    """A trained network."""
    net = network()
    net.load_state_dict(load_file(_weights(name)))
    return Classifier(net, mean=MEAN, std=STD, classes=10).eval()
