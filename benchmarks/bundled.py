"""Trains the bundled networks and generators, and cuts the bundled data set: what `make bundled` runs.

    python -m benchmarks.bundled FOLDER      FOLDER holds the whole MNIST as mnist.npz; scenes need none

The hardened network is what `holdfast.harden` makes; the undefended one comes from the plain loop of `by_hand.py`, for
most records stand on it. The test images judge, for the cards, and choose nothing.
"""

import argparse
import hashlib
import io
import json
import os
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import holdfast
from benchmarks import by_hand
from benchmarks.bundled_generators import GENERATORS, write_generator
from benchmarks.bundled_scenes import NETWORKS, write_network
from benchmarks.by_hand import ARCHITECTURE, MEAN, STD
from holdfast.io.models.architectures import ARCHITECTURES
from holdfast.io.models.weights import written
from holdfast.recipes import ATTA
from holdfast.recipes.training.fit import Training
from holdfast.verbs.opening.recipes import settings_of

BUNDLED = Path(__file__).parents[1] / "src" / "holdfast" / "bundled"
UNDEFENDED, HARDENED = "mnist-cnn", "mnist-cnn-hardened"
SEED, THREAT, N = 0, "linf:0.3", 1_000
RECIPE = ATTA(steps=4, step=0.25, clean=0.0, training=Training(epochs=20, overshoot=1.2))


@dataclass(frozen=True)
class Trained:
    """A network, and what its card says of how it was made."""

    name: str
    kind: str
    net: nn.Module
    settings: dict[str, Any]
    chosen: str
    cpu_s: float


def images(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float().div_(255)[:, None]


def undefended(x: Tensor, y: Tensor) -> Trained:
    """Trained in the ordinary way, by a plain loop."""
    start = time.process_time()
    net = by_hand.train(by_hand.STANDARD, x, y)
    spent = time.process_time() - start
    chosen = f"the last {by_hand.N_VALIDATION:,} chose the checkpoint"
    return Trained(
        UNDEFENDED, "trained in the ordinary way, undefended", net, asdict(by_hand.STANDARD), chosen, spent
    )


def hardened(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> Trained:
    """Made by `holdfast.harden` from the weights of the seed."""
    torch.manual_seed(SEED)
    found = holdfast.harden(
        ARCHITECTURES[ARCHITECTURE](), test, THREAT, RECIPE, fit=(x, y), n=N, suite="quick",
        mean=[MEAN], std=[STD], seed=SEED, device="cpu",
    )  # fmt: skip
    card, net = found.card, found.model.net
    assert isinstance(net, nn.Module)
    chosen = f"a thousand of them, held out, chose epoch {card['chosen']['epoch']} of {card['epochs']}"
    settings = {"threat": THREAT, "seed": SEED, "recipe": card["recipe"], **settings_of(RECIPE)}
    return Trained(HARDENED, "hardened by `holdfast.harden`", net, settings, chosen, card["cost"]["cpu_s"])


def write_weights(made: Trained, data: str) -> Path:
    described = {
        "architecture": ARCHITECTURE,
        "arguments": {},
        "bounds": [0.0, 1.0],
        "classes": 10,
        "mean": [MEAN],
        "std": [STD],
        "training": digest(made.settings, data),
    }
    path = BUNDLED / f"{made.name}.safetensors"
    path.write_bytes(written(made.net, described))
    return path


def digest(settings: dict[str, Any], data: str) -> str:
    """SHA-256 of the settings and of the training data's own digest."""
    return hashlib.sha256(json.dumps({**settings, "data": data}, sort_keys=True).encode()).hexdigest()


def write_card(made: Trained, path: Path, test: tuple[Tensor, Tensor]) -> None:
    """Data, settings, result: everything measured here, on the test images."""
    left = "\n".join(
        f"| robust accuracy under `fast`, {threat}, first {N:,} | {robust(path, test, threat):.4f} |"
        for threat in ("linf:0.1", "linf:0.2", "linf:0.3")
    )
    settings = "\n".join(f"    {line}" for line in json.dumps(made.settings, indent=2).splitlines())
    text = f"""# {made.name}

A small digit classifier, {made.kind}. Bundled for demonstration and tests, not for production.

| | |
| --- | --- |
| architecture | `{ARCHITECTURE}`, {sum(p.numel() for p in made.net.parameters()):,} parameters |
| input | 1 x 28 x 28, values in [0, 1]; mean {MEAN} and std {STD} are applied inside |
| data | MNIST training images; {made.chosen} |
| command | `make bundled`, seed {SEED} (one seed), {made.cpu_s:.0f} s of CPU time on one thread |
| versions | torch {torch.__version__.split("+")[0]}, numpy {np.__version__} |
| clean accuracy, all {len(test[0]):,} test images | {by_hand.accuracy(made.net, *test):.4f} |
{left}

Settings:

{settings}

Licence: Apache-2.0. Trained on MNIST by Yann LeCun, Corinna Cortes and Christopher J. C. Burges (CC BY-SA 3.0).
"""
    (BUNDLED / f"{made.name}.md").write_text(text, encoding="utf-8")


def robust(path: Path, test: tuple[Tensor, Tensor], threat: str) -> float:
    """What `fast` leaves of the first test images."""
    found = holdfast.assess(path, test, threat, "fast", n=N, doubts=False, device="cpu")
    return float(found.metrics["robust_accuracy"].value)


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
    choices = ["data", UNDEFENDED, HARDENED, *GENERATORS, *NETWORKS]
    parser.add_argument("--only", choices=choices, help="make one of them")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation
    if args.only not in NETWORKS:
        make_of_mnist(args.folder, args.only)
    for name in NETWORKS:
        if args.only in (None, name):
            write_network(name, BUNDLED)


def make_of_mnist(folder: Path, only: str | None) -> None:
    """Cut the data set, and train the classifiers and generators, or the one that is named."""
    with np.load(folder / "mnist.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    data = hashlib.sha256(arrays["x_train"].tobytes() + arrays["y_train"].tobytes()).hexdigest()
    if only in (None, "data"):
        write_mini(arrays)
    (x, y), test = (
        (images(arrays[f"x_{split}"]), torch.from_numpy(arrays[f"y_{split}"]).long())
        for split in ("train", "test")
    )
    for name, train in ((UNDEFENDED, undefended), (HARDENED, partial(hardened, test=test))):
        if only in (None, name):
            made = train(x, y)
            write_card(made, write_weights(made, data), test)
    for name in GENERATORS:
        if only in (None, name):
            write_generator(name, BUNDLED / "generators", (x, y))


if __name__ == "__main__":
    main()
