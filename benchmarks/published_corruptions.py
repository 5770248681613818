"""What the published code makes of one picture: the numbers that the tests of common corruptions compare with.

    python -m benchmarks.published_corruptions CHECKOUT > benchmarks/references/corruptions.json

CHECKOUT is a clone of github.com/hendrycks/robustness (8190fe3). It asks for numpy, scipy, scikit-image, opencv,
Pillow, Wand with ImageMagick, and this package; the numbers are from 2.4, 1.17, 0.26, 5.0, 13.0 and 0.7 with 6.9. Where
the code draws, it is given this package's draws, but for shot and impulse noise, which keep theirs (impulse noise has
no seed, so that its numbers move a little); frost is left out, for it needs photographs. With 1.26, 1.11, 0.19, 4.10
and 10.4 the numbers are the same to 1e-5, but for the elastic transform (0.0016: OpenCV then warped in fixed point).
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.corruptions import EXTRA, STANDARD
from holdfast.corruptions.constants import LARGE, SMALL

SIZES = {32: ("make_cifar_c.py", SMALL), 224: ("make_imagenet_c.py", LARGE)}
"""Sides of the picture, with the file and the constants for each"""
IDS = torch.tensor([7])
OWN_DRAWS = ("shot_noise", "impulse_noise")
"""corruptions that are compared in distribution alone"""
_BEGIN, _END = "# /////////////// Distortion Helpers", "# /////////////// End Distortions"


def picture(size: int) -> Tensor:
    """Waves, a bright disk and a dark bar in three colours of 256 levels, (1, 3, size, size) in [0, 1]."""
    line = torch.arange(size, dtype=torch.float64) / size
    row, column = line[:, None], line
    planes = [0.5 + 0.3 * torch.sin(6.0 * row + k) * torch.cos(5.0 * column - k) for k in range(3)]
    image = torch.stack(planes)
    disk = (row - 0.35) ** 2 + (column - 0.6) ** 2 < 0.04
    image[:, disk] += torch.tensor([0.25, 0.15, -0.1], dtype=torch.float64)[:, None]
    image[:, ((row > 0.7) & (row < 0.78)).expand(size, size)] *= 0.2
    return ((255 * image.clamp(0, 1)).round() / 255)[None]


def places(size: int) -> Tensor:
    """Twelve positions of the flattened picture."""
    return (torch.arange(12) * 8191 + 5) % (3 * size * size)


def draws(name: str) -> Draws:
    """Where a corruption of `picture` draws."""
    return Draws(0).at("corruption", name)


def _spread(x: Tensor) -> Any:
    return x[0].movedim(0, -1).numpy()


def _plasma(rng: Draws, size: int) -> Iterator[Any]:
    side = 1 << (size - 1).bit_length()
    step = side
    while step >= 2:
        for place in ("middle", "across", "down"):
            yield rng.at(place, step).uniform(IDS, side // step, side // step, dtype=torch.float64)[0].numpy()
        step //= 2


def _moves(rng: Draws, size: int, reach: int, rounds: int) -> Iterator[Any]:
    for turn in range(rounds):
        shift = rng.at("round", turn).integers(IDS, 2 * reach, 2, size * size)[0] - reach
        for row in range(size - reach, reach, -1):
            for column in range(size - reach, reach, -1):
                yield shift[:, row * size + column].numpy()


def _replayed(name: str, size: int, constants: tuple[float, ...]) -> Iterator[Any]:
    """The package's draws in the order in which the published code asks: standard normal, on [0, 1), or integers."""
    rng, wide = draws(name), torch.float64
    if name in ("gaussian_noise", "speckle_noise"):
        yield _spread(rng.normal(IDS, 3, size, size, dtype=wide))
    elif name == "glass_blur":
        yield from _moves(rng, size, int(constants[1]), int(constants[2]))
    elif name == "motion_blur":
        yield float(rng.at("angle").uniform(IDS, dtype=wide))
    elif name == "snow":
        yield rng.at("flakes").normal(IDS, size, size, dtype=wide)[0].numpy()
        yield float(rng.at("angle").uniform(IDS, dtype=wide))
    elif name == "fog":
        yield from _plasma(rng, size)
    elif name == "elastic_transform":
        yield rng.at("corners").uniform(IDS, 3, 2, dtype=wide)[0].numpy()
        yield rng.at("right").uniform(IDS, size, size, dtype=wide)[0].numpy()
        yield rng.at("down").uniform(IDS, size, size, dtype=wide)[0].numpy()
    elif name == "spatter":
        yield rng.normal(IDS, size, size, dtype=wide)[0].numpy()


def _opened(path: Path) -> dict[str, Any]:
    """The functions of a published file, without what reads and writes data sets, where old names are gone."""
    import numpy as np
    from PIL import Image

    text = path.read_text()
    body = text[text.index(_BEGIN) : text.index(_END)]
    space: dict[str, Any] = {"np": np, "Image": Image}
    exec(compile(body, str(path), "exec"), space)
    smooth = space["gaussian"]

    def gaussian(*args: Any, multichannel: bool = False, **settings: Any) -> Any:
        return smooth(*args, channel_axis=-1 if multichannel else None, **settings)

    vars(np).update(float_=np.float64, fromstring=np.frombuffer)
    space["gaussian"] = gaussian
    return space


def _told(
    published: Callable[..., Any], name: str, size: int, severity: int, constants: tuple[float, ...]
) -> Any:
    """The published picture, in [0, 1]."""
    import numpy as np
    from PIL import Image

    queue = _replayed(name, size, constants)
    image = Image.fromarray((255 * _spread(picture(size))).round().astype(np.uint8))
    kept = np.random.normal, np.random.uniform, np.random.randint
    np.random.seed(0)  # noqa: NPY002 (it is what the published code draws from)
    if name not in OWN_DRAWS:
        np.random.normal = lambda loc=0.0, scale=1.0, size=None: loc + scale * next(queue)
        np.random.uniform = lambda low=0.0, high=1.0, size=None: low + (high - low) * next(queue)
        np.random.randint = lambda low, high, size=None: next(queue)
    try:
        found = np.asarray(published(image, severity), dtype=np.float64) / 255
    finally:
        np.random.normal, np.random.uniform, np.random.randint = kept
    if next(queue, None) is not None:
        raise RuntimeError(f"{name} drew less than was laid out")
    return found


def main(checkout: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Mean, standard deviation of the change and twelve values, by size, corruption and severity."""
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for size, (file, constants) in SIZES.items():
        functions = _opened(checkout / "ImageNet-C" / "create_c" / file)
        rows = tables.setdefault(str(size), {})
        for name in (*STANDARD, *EXTRA):
            if name == "frost":
                continue
            for severity, c in enumerate(constants[name], 1):
                found = torch.from_numpy(_told(functions[name], name, size, severity, c)).movedim(-1, 0)[None]
                change = found - picture(size)
                row = {"mean": round(float(found.mean()), 5), "change": round(float(change.std()), 5)}
                values = found.flatten()[places(size)].tolist()
                if name not in OWN_DRAWS:
                    row["values"] = [round(value, 4) for value in values]
                rows.setdefault(name, []).append(row)
    return tables


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout, indent=None, separators=(",", ":"))
