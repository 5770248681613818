"""Train the X-ray network: a small CNN on PneumoniaMNIST (28 x 28, grey), for robustness by class.

    python -m benchmarks.chest_xrays        # about a CPU minute; writes benchmarks/cache/chest_xrays.safetensors

`make` returns the trained network, for a command line that begins with `PYTHONPATH=.`:
`holdfast assess benchmarks/chest_xrays.py:make pneumoniamnist.npz --groups label`.
"""

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.networks import CACHE, images

CLASSES, LR, BATCH = ("normal", "pneumonia"), 1e-3, 64
FILE = CACHE / "chest_xrays.safetensors"


def build() -> nn.Sequential:
    """Three convolutions with batch norm and pooling, and a linear layer."""
    layers: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 3 * 3, len(CLASSES)))


def train(epochs: int = 6, seed: int = 0) -> nn.Sequential:
    """The trained network, in eval mode; the same on the same machine for the same seed."""
    torch.manual_seed(seed)
    x, y = xrays("train")
    net = build().train()
    adam = torch.optim.Adam(net.parameters(), LR)
    per_epoch = len(x) // BATCH
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(x))
        adam.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - step / (epochs * per_epoch)))
        pick = order[step % per_epoch * BATCH :][:BATCH]
        adam.zero_grad()
        F.cross_entropy(net(x[pick]), y[pick]).backward()
        adam.step()
    return net.eval()


def xrays(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split and their classes."""
    return images("pneumoniamnist", 10_000, split=split)


def make() -> nn.Sequential:
    """The network from the cache, trained first where it is not there."""
    if not FILE.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(train().state_dict(), FILE)
    net = build()
    net.load_state_dict(load_file(FILE))
    return net.eval()


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
