"""Train the X-ray network: a small CNN on PneumoniaMNIST (28 x 28, grey), for robustness by class.

    python -m benchmarks.chest_xrays        # 10 CPU seconds; writes benchmarks/cache/chest_xrays.safetensors

`make` returns the trained network, for a command line that begins with `PYTHONPATH=.`:
`holdfast assess benchmarks/chest_xrays.py:make pneumoniamnist.npz --groups label`.
"""

import argparse

import torch
from torch import Tensor, nn

from benchmarks.networks import CACHE, images
from benchmarks.traffic_signs import cached, cnn, fitted

CLASSES, LR, BATCH = ("normal", "pneumonia"), 1e-3, 64
FILE = CACHE / "chest_xrays.safetensors"


def build() -> nn.Sequential:
    """Three convolutions with batch norm and pooling, and a linear layer."""
    return cnn((1, 16, 32, 64), side=3, classes=len(CLASSES))


def train(epochs: int = 6, seed: int = 0) -> nn.Sequential:
    """The trained network, in eval mode; the same on the same machine for the same seed."""
    return fitted(build, *xrays("train"), lr=LR, batch=BATCH, epochs=epochs, seed=seed)


def xrays(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split and their classes."""
    return images("pneumoniamnist", 10_000, split=split)


def make() -> nn.Sequential:
    """The network from the cache, trained first where it is not there."""
    return cached(FILE, build, train)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    net, (x, y) = make(), xrays("test")
    with torch.no_grad():
        print(f"clean accuracy {(net(x).argmax(1) == y).float().mean():.4f}")


if __name__ == "__main__":
    main()
