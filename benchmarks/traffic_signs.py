"""Train the traffic-sign network: a small CNN on the German traffic signs at 32 x 32, for patches and what cameras do.

    python -m benchmarks.traffic_signs        # half a CPU minute; writes benchmarks/cache/traffic_signs.safetensors

It is right for about 89 % of the test split, whose tracks are not those of the train split. `build` is its
architecture, for a command line that begins with `PYTHONPATH=.`: `--arch benchmarks/traffic_signs.py:build`.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.networks import CACHE, images

CLASSES, LR, BATCH = 43, 2e-3, 128
FILE = CACHE / "traffic_signs.safetensors"


def build() -> nn.Sequential:
    """Three convolutions with batch norm and pooling, and a linear layer."""
    return cnn((3, 32, 64, 96), side=4, classes=CLASSES)


def cnn(channels: tuple[int, ...], *, side: int, classes: int) -> nn.Sequential:
    """A convolution with batch norm and pooling for each pair of channels, and a linear layer on `side` x `side`."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels[-1] * side**2, classes))


def train(epochs: int = 6, seed: int = 0) -> nn.Sequential:
    """The trained network, in eval mode; the same on the same machine for the same seed."""
    return fitted(build, *signs("train"), lr=LR, batch=BATCH, epochs=epochs, seed=seed)


def fitted(
    build: Callable[[], nn.Sequential], x: Tensor, y: Tensor, *, lr: float, batch: int, epochs: int, seed: int
) -> nn.Sequential:
    """A network after training by Adam, whose learning rate falls to 0 over the second half; in eval mode."""
    torch.manual_seed(seed)
    net = build().train()
    adam = torch.optim.Adam(net.parameters(), lr)
    per_epoch = len(x) // batch
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(x))
        adam.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / (epochs * per_epoch)))
        pick = order[step % per_epoch * batch :][:batch]
        adam.zero_grad()
        F.cross_entropy(net(x[pick]), y[pick]).backward()
        adam.step()
    return net.eval()


def signs(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split and their classes."""
    return images("gtsrb32", 10_000, split=split)


def trained() -> nn.Sequential:
    """The network from the cache, trained first where it is not there."""
    return cached(FILE, build, train)


def cached(
    file: Path, build: Callable[[], nn.Sequential], train: Callable[[], nn.Sequential]
) -> nn.Sequential:
    """A network with the weights of a file, which is written first where it is not there; in eval mode."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(train().state_dict(), file)
    net = build()
    net.load_state_dict(load_file(file))
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    net, (x, y) = trained(), signs("test")
    with torch.no_grad():
        print(f"clean accuracy {(net(x).argmax(1) == y).float().mean():.4f}")


if __name__ == "__main__":
    main()
