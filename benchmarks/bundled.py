"""Trains the bundled networks and cuts the bundled data set: what `make bundled` runs.

    python benchmarks/bundled.py FOLDER      FOLDER holds the whole MNIST as mnist.npz

The hardened network is trained on projected-gradient examples (Madry et al., "Towards Deep Learning Models Resistant
to Adversarial Attacks", ICLR 2018, arXiv:1706.06083) that are kept from epoch to epoch and improved by a few steps each
time (Zheng et al., "Efficient Adversarial Training With Transferable Adversarial Examples", CVPR 2020,
arXiv:1912.11969). The budget grows over the first epochs, the weights are averaged, and the checkpoint is the best on
5,000 images held out of the training data; the test images are read once, for the card.
"""

import argparse
import hashlib
import io
import json
import os
import time
import zipfile
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.sources.architectures import ARCHITECTURES

BUNDLED = Path(__file__).parents[1] / "src" / "holdfast" / "bundled"
MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images
N_VALIDATION = 5_000
N_ATTACKED = 1_000


@dataclass(frozen=True)
class Training:
    """How one network was made; its digest goes into the weights."""

    name: str
    eps: float
    """Linf budget of the training examples; 0 is ordinary training"""
    steps: int
    """gradient steps on each kept example in each epoch"""
    step_size: float
    epochs: int
    warmup: int
    """epochs over which eps grows from 0"""
    refresh: int
    """epochs after which the kept examples start again from noise"""
    lr: float
    weight_decay: float
    shift: int
    """random translation of the clean images, in pixels"""
    clean_weight: float
    """weight of the loss on clean images beside that on attacked ones"""
    average: float = 0.999
    """decay of the running average of the weights"""
    batch: int = 128
    seed: int = 0
    architecture: str = "mnist-cnn"


STANDARD = Training(
    name="mnist-cnn", eps=0.0, steps=0, step_size=0.0, epochs=15, warmup=0, refresh=1, lr=3e-3, weight_decay=1e-4,
    shift=2, clean_weight=0.0,
)  # fmt: skip
HARDENED = Training(
    name="mnist-cnn-hardened", eps=0.3, steps=2, step_size=0.1, epochs=30, warmup=8, refresh=10, lr=3e-3,
    weight_decay=1e-4, shift=0, clean_weight=0.25,
)  # fmt: skip


def normalised(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of images in [0, 1]."""
    return net((x - MEAN) / STD)


def images(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float().div_(255)[:, None]


def climb(
    net: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, eps: float, step_size: float, steps: int
) -> Tensor:
    """Signed steps up the cross-entropy, inside the ball and the box."""
    low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
    x_adv = torch.minimum(torch.maximum(x_adv, low), high)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(normalised(net, x_adv), y), x_adv)
        x_adv = torch.minimum(torch.maximum(x_adv.detach() + step_size * gradient.sign(), low), high)
    return x_adv


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(
            torch.cat([normalised(net, part).argmax(1) for part in x.split(500)]).eq(y).float().mean()
        )


def robust_accuracy(
    net: nn.Module, x: Tensor, y: Tensor, eps: float, *, steps: int, restarts: int, seed: int
) -> float:
    """Share still right at the last point of every restart; the budget is walked 2.5 times."""
    rng, standing = torch.Generator().manual_seed(seed), torch.ones(len(x), dtype=torch.bool)
    for _ in range(restarts):
        for rows in torch.arange(len(x)).split(500):
            start = x[rows] + eps * (2 * torch.rand(x[rows].shape, generator=rng) - 1)
            x_adv = climb(net, x[rows], y[rows], start, eps, 2.5 * eps / steps, steps)
            with torch.no_grad():
                standing[rows] &= normalised(net, x_adv).argmax(1) == y[rows]
    return float(standing.float().mean())


def shifted(x: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Each image moved by up to `pixels` either way, black moving in."""
    if not pixels:
        return x
    side, n = x.shape[-1], len(x)
    padded = F.pad(x, (pixels,) * 4)[:, 0]
    down, right = (
        torch.randint(2 * pixels + 1, (n, 1), generator=rng) + torch.arange(side) for _ in range(2)
    )
    return padded[torch.arange(n)[:, None, None], down[:, :, None], right[:, None, :]][:, None]


def train(how: Training, x: Tensor, y: Tensor) -> nn.Module:
    """The averaged network of the epoch that is best on the held-out images."""
    torch.manual_seed(how.seed)
    rng = torch.Generator().manual_seed(how.seed)
    x, x_val, y, y_val = x[:-N_VALIDATION], x[-N_VALIDATION:], y[:-N_VALIDATION], y[-N_VALIDATION:]
    net = ARCHITECTURES[how.architecture]()
    averaged, best, best_score = deepcopy(net), deepcopy(net), -1.0
    optimizer = torch.optim.AdamW(net.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    n_batches = len(x) // how.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=how.epochs * n_batches)
    kept = torch.zeros_like(x) if how.steps else x[:0]
    for epoch in range(how.epochs):
        eps = how.eps * min(1.0, (epoch + 1) / how.warmup) if how.warmup else how.eps
        if how.steps and epoch % how.refresh == 0:
            kept.uniform_(-eps, eps, generator=rng)
        for rows in torch.randperm(len(x), generator=rng)[: n_batches * how.batch].split(how.batch):
            clean, labels = shifted(x[rows], how.shift, rng), y[rows]
            x_adv = (
                climb(net, clean, labels, clean + kept[rows], eps, how.step_size, how.steps)
                if how.steps
                else clean
            )
            if how.steps:
                kept[rows] = x_adv - clean
            loss = F.cross_entropy(normalised(net, x_adv), labels)
            if how.clean_weight:
                loss = loss + how.clean_weight * F.cross_entropy(normalised(net, clean), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, new in zip(averaged.parameters(), net.parameters(), strict=True):
                    mean.lerp_(new, 1 - how.average)
        if epoch + 1 < how.epochs // 2 and how.steps:
            continue
        score = (
            robust_accuracy(averaged, x_val[:1000], y_val[:1000], how.eps, steps=20, restarts=1, seed=1)
            if how.steps
            else accuracy(averaged, x_val, y_val)
        )
        print(
            f"{how.name}: epoch {epoch + 1}/{how.epochs}, eps {eps:.3f}, validation {score:.4f}", flush=True
        )
        if score > best_score:
            best, best_score = deepcopy(averaged), score
    return best.eval()


def digest(how: Training, data: str) -> str:
    """SHA-256 of the settings and of the training data's own digest."""
    text = json.dumps({**asdict(how), "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_weights(net: nn.Module, how: Training, data: str) -> None:
    described = {
        "architecture": how.architecture,
        "arguments": {},
        "bounds": [0.0, 1.0],
        "classes": 10,
        "mean": [MEAN],
        "std": [STD],
        "training": digest(how, data),
    }
    metadata = {"holdfast": json.dumps(described, sort_keys=True)}
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    (BUNDLED / f"{how.name}.safetensors").write_bytes(save(tensors, metadata))


def write_card(net: nn.Module, how: Training, x: Tensor, y: Tensor, cpu_s: float) -> None:
    """Data, settings, result: everything measured here, on the test images."""
    attacked = [
        f"| robust accuracy under PGD-100 with 5 restarts, linf {eps}, first {N_ATTACKED:,} | "
        f"{robust_accuracy(net, x[:N_ATTACKED], y[:N_ATTACKED], eps, steps=100, restarts=5, seed=2):.4f} |"
        for eps in (0.1, 0.2, 0.3)
    ]
    settings = "\n".join(f"    {name}: {value}" for name, value in asdict(how).items())
    kind = "hardened by adversarial training" if how.steps else "trained in the ordinary way, undefended"
    text = f"""# {how.name}

A small digit classifier, {kind}. Bundled for demonstration and tests, not for production.

| | |
| --- | --- |
| architecture | `{how.architecture}`, {sum(p.numel() for p in net.parameters()):,} parameters |
| input | 1 x 28 x 28, values in [0, 1]; mean {MEAN} and std {STD} are applied inside |
| data | MNIST training images 0 to {59_999 - N_VALIDATION:,}; the last {N_VALIDATION:,} chose the checkpoint |
| command | `make bundled`, seed {how.seed} (one seed), {cpu_s:.0f} s of CPU time on one thread |
| versions | torch {torch.__version__.split("+")[0]}, numpy {np.__version__} |
| clean accuracy, all {len(x):,} test images | {accuracy(net, x, y):.4f} |
{chr(10).join(attacked)}

PGD here is the script's own, and flatters; quote what `holdfast assess {how.name} mnist --threat linf:0.2` says.

Settings:

{settings}

Licence: Apache-2.0. Trained on MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges (CC BY-SA 3.0).
"""
    (BUNDLED / f"{how.name}.md").write_text(text, encoding="utf-8")


def write_mini(arrays: dict[str, np.ndarray]) -> None:
    """The first 5,000 training and 1,000 test images as an .npz whose bytes depend on nothing else."""
    kept = {name: arrays[name][: 5_000 if "train" in name else 1_000] for name in sorted(arrays)}
    with zipfile.ZipFile(BUNDLED / "mnist-mini.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, array in kept.items():
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(array.astype(np.uint8)), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("HOLDFAST_DATA", "~/.cache/holdfast/data")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(default).expanduser(), help="holds mnist.npz"
    )
    parser.add_argument(
        "--only", choices=["data", STANDARD.name, HARDENED.name], help="make one of the three"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    source = args.folder / "mnist.npz"
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    data = hashlib.sha256(arrays["x_train"].tobytes() + arrays["y_train"].tobytes()).hexdigest()
    if args.only in (None, "data"):
        write_mini(arrays)
    x_train, x_test = images(arrays["x_train"]), images(arrays["x_test"])
    y_train, y_test = (torch.from_numpy(arrays[name]).long() for name in ("y_train", "y_test"))
    for how in (STANDARD, HARDENED):
        if args.only in (None, how.name):
            start = time.process_time()
            net = train(how, x_train, y_train)
            cpu_s = time.process_time() - start
            write_weights(net, how, data)
            write_card(net, how, x_test, y_test, cpu_s)


if __name__ == "__main__":
    main()
