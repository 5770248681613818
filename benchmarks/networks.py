"""The networks and images that the measurements use.

Files come from the folders named by `HOLDFAST_MODELS` and `HOLDFAST_DATA` (by default `../shared/models`
and `../shared/data` beside the repository), from the package's bundle, from `references/`, or from `single_step.py`.
Nothing here imports holdfast, so that a peer's environment can use it as it is.
"""

import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.absent import Absent

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / "cache"
REFERENCES = ROOT / "benchmarks" / "references"
BUNDLED = ROOT / "src" / "holdfast" / "bundled"


def folder(variable: str, beside: str) -> Path:
    """The folder that an environment variable names, or its usual place beside the repository."""
    return Path(os.environ.get(variable) or ROOT.parent / "shared" / beside)


@dataclass(frozen=True)
class Network:
    """A network in eval mode on images in [0, 1], and the hash of the file that it came from."""

    name: str
    data: str
    module: nn.Module
    sha256: str


def two_conv_two_fc(channels: int = 1, side: int = 28, hidden: int = 100) -> nn.Sequential:
    """The small MNIST network of Wong et al. 2020 (and, with 3 x 32 x 32 inputs, its CIFAR twin)."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def _shared(name: str, file: str) -> tuple[nn.Module, Path]:
    models = folder("HOLDFAST_MODELS", "models")
    path, builders = models / file, models / "architectures.py"
    if not path.is_file() or not builders.is_file():
        raise Absent(f"{file} and architectures.py are not at hand; HOLDFAST_MODELS names their folder")
    spec = importlib.util.spec_from_file_location("shared_architectures", builders)
    assert spec is not None and spec.loader is not None
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    module: nn.Module = getattr(architectures, name)(path)
    return module, path


def _single_step() -> tuple[nn.Module, Path]:
    from safetensors.torch import load_file

    path = CACHE / "single_step.safetensors"
    if not path.is_file():
        raise Absent(f"{path.name} is not trained yet; run `python -m benchmarks.single_step`")
    module = two_conv_two_fc()
    module.load_state_dict(load_file(path))
    return module, path


def _of_ours(path: Path) -> tuple[nn.Module, Path]:
    try:
        from holdfast.io.models.models import open_model
    except ImportError as e:
        raise Absent(f"{path.name} needs holdfast importable ({e})") from e
    return open_model(str(path)).model, path


SOURCES: dict[str, tuple[str, Callable[[], tuple[nn.Module, Path]]]] = {
    "mnist_cnn_a_adv": ("mnist", lambda: _shared("mnist_cnn_a_adv", "mnist_cnn_a_adv.model")),
    "cifar_cnn_a_adv": ("cifar10", lambda: _shared("cifar_cnn_a_adv", "cifar_cnn_a_adv.model")),
    "cifar_resnet20": ("cifar10", lambda: _shared("cifar_resnet20", "cifar_resnet20.th")),
    "mnist_trades_smallcnn": ("mnist", lambda: _shared("mnist_trades_smallcnn", "mnist_trades_smallcnn.pt")),
    "mnist_kw01": ("mnist", lambda: _shared("mnist_kw01", "mnist_kw01.pth")),
    "mnist_badnet": ("mnist", lambda: _shared("mnist_badnet", "mnist_badnet.pth")),
    "single_step": ("mnist", _single_step),
    "mnist-cnn": ("mnist", lambda: _of_ours(BUNDLED / "mnist-cnn.safetensors")),
    "mnist-cnn-hardened": ("mnist", lambda: _of_ours(BUNDLED / "mnist-cnn-hardened.safetensors")),
    "hardened-by-hand": ("mnist", lambda: _of_ours(REFERENCES / "hardened-by-hand.safetensors")),
}


def network(name: str) -> Network:
    """The named network, frozen only in eval mode: peers get the weights as a user would hand them over."""
    data, source = SOURCES[name]
    module, path = source()
    return Network(name, data, module.eval(), hashlib.sha256(path.read_bytes()).hexdigest())


def images(data: str, n: int, split: str = "test", first: int = 0) -> tuple[Tensor, Tensor]:
    """Images `first` to `first + n` of a split in source order, as float32 N x C x H x W in [0, 1]."""
    at = folder("HOLDFAST_DATA", "data")
    if data == "cifar10":
        pixels, labels = _cifar10(at, split, first + n)
    else:
        file = at / f"{data}.npz"
        if not file.is_file():
            raise Absent(f"{file.name} is not in {at}; set HOLDFAST_DATA to its folder")
        with np.load(file, allow_pickle=False) as z:
            pixels, labels = z[f"x_{split}"], z[f"y_{split}"]
    x = torch.from_numpy(pixels[first : first + n].copy()).float().div_(255)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(labels[first : first + n].astype(np.int64))


def present(
    settings: Iterable[tuple[Any, ...]], n: int, notes: list[str]
) -> Iterator[tuple[Network, Tensor, Tensor, *tuple[Any, ...]]]:
    """Of each setting (a network's name and more): the network, its first `n` images, their labels, and the rest.

    A setting whose network or images are absent is left out, and the notes say why.
    """
    for name, *rest in settings:
        try:
            net = network(name)
            x, y = images(net.data, n)
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        yield net, x, y, *rest


def _cifar10(at: Path, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of CIFAR-10, from `cifar10.npz` or from lossless WebP strips of 500 images."""
    whole = at / "cifar10.npz"
    if whole.is_file():
        with np.load(whole, allow_pickle=False) as z:
            return z[f"x_{split}"][:n], z[f"y_{split}"][:n]
    from PIL import Image

    parts = ["cifar10_test.npz"] if split == "test" else ["cifar10_train0.npz", "cifar10_train1.npz"]
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for part in parts:
        if not (at / part).is_file():
            raise Absent(f"{part} is not in {at}; set HOLDFAST_DATA to its folder")
        with np.load(at / part, allow_pickle=False) as z:
            blob, cuts, y = z["webp"], z["offsets"], z["y"]
        labels.append(y)
        for a, b in pairwise(cuts):
            if 500 * len(pixels) < n:
                pixels.append(np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes())).convert("RGB")))
    return np.concatenate(pixels).reshape(-1, 32, 32, 3)[:n], np.concatenate(labels)[:n]
