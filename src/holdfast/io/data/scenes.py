"""Generated scenes for segmentation and detection: digits and signs on textured backgrounds, with a mask of the classes
of the pixels and a box around each object.

A scene depends only on its position, its split and the seed. Digits of the training split are training images of MNIST,
and those of the test split are test images.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from holdfast.core.errors import NoSplit, UsageError
from holdfast.io.models.models import BUNDLED_FOLDER

CLASSES = ("background", "digit", "circle", "triangle", "square", "cross")
"""Names of the values of a mask. The labels of boxes are the same numbers, from 1."""
SPLITS = {"train": 4_000, "test": 500}
"""Splits of the data set `scenes`, and the number of their scenes."""
SIZE = 64
"""Height and width of the scenes of the data set `scenes`, in pixels."""
MOST_OBJECTS = 4
"""Largest number of objects in a scene."""
_SIZES = (12, 27)
"""Smallest and largest height and width of an object in a scene of 64 x 64 pixels, in pixels."""
_LOWEST_DIGIT = 14
"""Smallest height of a digit, in pixels of a scene of 64 x 64; smaller ones lose their strokes."""
_OVERLAP = 0.15
"""Largest share of the smaller of two bounding boxes that is inside the other, when objects are placed."""
_TRIES = 20
"""Number of positions that are tried for an object before it is left out."""
_CONTRAST = 0.45
"""Smallest sum of the differences of the three channels between an object and the background, from 0 to 3."""
_RIM = 0.28
"""Thickness of the rim of a sign, relative to the distance of its edges from its centre."""
_NORMALS = {
    "triangle": ((0, 1), (0.75**0.5, -0.5), (-(0.75**0.5), -0.5)),
    "square": ((0, 1), (0, -1), (1, 0), (-1, 0)),
}
"""Unit normals of the edges of the signs that are regular polygons."""
_INRADII = {"circle": 1.0, "triangle": 0.5, "square": 0.5**0.5, "cross": 0.36}
"""Distance of the edges of a sign from its centre, relative to its radius; for a cross, half the width of a bar."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Scenes:
    """Images of scenes with their masks and boxes."""

    x: NDArray[np.uint8]
    """images (n, 3, size, size)"""
    masks: NDArray[np.int64]
    """class of each pixel (n, size, size); 0 is the background"""
    boxes: NDArray[np.float32]
    """objects (n, 4, 6): x1, y1, x2, y2 in pixels, label, and 0 for an object that is not a crowd. Rows without an
    object come last, with zeros and the label -1. Boxes include the visible pixels of their objects exactly: x2 and y2
    are the last column and row plus 1.
    """

    def __len__(self) -> int:
        return len(self.x)


def scenes(n: int, seed: int = 0, size: int = SIZE, *, split: str = "test", start: int = 0) -> Scenes:
    """Return `n` scenes of `size` x `size` pixels, from the position `start`. They are the same on every machine.

    Raises `UsageError` if `n` or `start` is negative or `size` is less than 32, and `NoSplit` for an unknown split.
    Takes about a millisecond for each scene of 64 x 64 pixels.
    """
    if n < 0 or start < 0 or size < 32:
        raise UsageError(
            f"n is {n}, start {start} and size {size}; n and start must be 0 or more, and size 32 or more"
        )
    if split not in SPLITS:
        raise NoSplit(f"'scenes' has no split {split!r}; it has {', '.join(SPLITS)}")
    made = Scenes(
        np.zeros((n, 3, size, size), np.uint8),
        np.zeros((n, size, size), np.int64),
        np.zeros((n, MOST_OBJECTS, 6), np.float32),
    )
    made.boxes[:, :, 4] = -1
    for i in range(n):
        rng = np.random.default_rng((seed, list(SPLITS).index(split), start + i))
        made.x[i], made.masks[i], objects = _scene(rng, size, split)
        made.boxes[i, : len(objects)] = objects
    return made


def write_scenes(folder: str | Path, n: int = 200, seed: int = 0, *, split: str = "test") -> None:
    """Write the first `n` scenes of a split as files, as examples of data for segmentation and detection.

    `scenes.npz` has the images `x`, the masks `y` and the names `classes`. The folder `boxes` has the images as `.png`
    files, a `.json` file with the same name for each, such as `{"boxes": [[x1, y1, x2, y2]], "labels": [2]}`, and
    `classes.json` with the names. Files with these names are replaced. Raises the errors of `scenes`.
    """
    made, boxes = scenes(n, seed, split=split), Path(folder) / "boxes"
    boxes.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(Path(folder) / "scenes.npz", x=made.x, y=made.masks, classes=np.array(CLASSES))
    (boxes / "classes.json").write_text(json.dumps(CLASSES), encoding="utf-8")
    for i, (image, objects) in enumerate(zip(made.x, made.boxes, strict=True)):
        Image.fromarray(image.transpose(1, 2, 0)).save(boxes / f"{i:05}.png")
        present = objects[objects[:, 4] >= 0]
        truth = {"boxes": present[:, :4].tolist(), "labels": present[:, 4].astype(int).tolist()}
        (boxes / f"{i:05}.json").write_text(json.dumps(truth), encoding="utf-8")


def _scene(rng: np.random.Generator, size: int, split: str) -> tuple[Array, Array, list[list[float]]]:
    """Return the image of a scene, its mask and its objects.

    Only sums, products, quotients and square roots are computed, whose results are the same on every processor.
    """
    canvas = _background(rng, size)
    owner, placed = np.zeros((size, size), np.int64), list[tuple[int, int, int, int]]()
    labels = list[int]()
    for _ in range(int(rng.integers(1, MOST_OBJECTS + 1))):
        label = int(rng.integers(1, len(CLASSES)))
        cover, rim = _digit(rng, size, split) if label == 1 else _sign(rng, CLASSES[label], size)
        height, width = cover.shape
        place = _place(rng, height, width, size, placed)
        if place is None:
            continue
        placed.append(place)
        labels.append(label)
        region = np.s_[:, place[1] : place[3], place[0] : place[2]]
        fill, edge = _colour(rng, canvas[region]), _colour(rng, canvas[region])
        paint = fill + (edge - fill) * rim
        canvas[region] += (paint - canvas[region]) * cover
        owner[region[1:]] = np.where(cover > 0.5, len(labels), owner[region[1:]])
    canvas += (rng.random((3, size, size)) - 0.5) * rng.uniform(0.02, 0.25)
    objects, mask = list[list[float]](), np.zeros_like(owner)
    for number, label in enumerate(labels, 1):
        rows, columns = np.nonzero(owner == number)
        mask[rows, columns] = label
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        objects.append([*map(float, edges), label, 0])
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), mask, objects


def _background(rng: np.random.Generator, size: int) -> Array:
    """Return a gradient between two colours with stripes and blocks of noise (3, size, size)."""
    rows, columns = np.mgrid[:size, :size] / size
    across, stripes = ((rows * c + columns * s) for s, c in (_direction(rng), _direction(rng)))
    first, second = rng.random((2, 3, 1, 1))
    shade = first + (second - first) * ((across + 1) / 2)
    position = stripes * rng.uniform(3, 12)
    wave = np.abs(position - np.floor(position) - 0.5) * 2
    blocks = rng.random((3, -(-size // 8), -(-size // 8))).repeat(8, 1).repeat(8, 2)[:, :size, :size]
    light, rough = rng.uniform(0, 0.35, 2)
    textured: Array = shade + (wave - 0.5) * light + (blocks - 0.5) * rough
    return textured.clip(0, 1)


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    """Return the coordinates of a random point of the unit circle."""
    u, v = rng.uniform(-1, 1, 2)
    length = (u * u + v * v) ** 0.5 or 1.0
    return u / length, v / length


def _colour(rng: np.random.Generator, region: Array) -> Array:
    """Return a random colour (3, 1, 1) that differs from the mean colour of a region (3, h, w)."""
    mean = region.mean((1, 2), keepdims=True)
    while True:
        colour: Array = rng.random((3, 1, 1))
        if np.abs(colour - mean).sum() >= _CONTRAST:
            return colour


def _place(
    rng: np.random.Generator, height: int, width: int, size: int, placed: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """Return the edges x1, y1, x2, y2 of a random place that hardly overlaps with others, or None."""
    for _ in range(_TRIES):
        x, y = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        for x1, y1, x2, y2 in placed:
            common = max(0, min(x + width, x2) - max(x, x1)) * max(0, min(y + height, y2) - max(y, y1))
            if common > _OVERLAP * min(width * height, (x2 - x1) * (y2 - y1)):
                break
        else:
            return x, y, x + width, y + height
    return None


def _extent(rng: np.random.Generator, size: int) -> int:
    low, high = (side * size // SIZE for side in _SIZES)
    return int(rng.integers(low, high + 1))


def _sign(rng: np.random.Generator, name: str, size: int) -> tuple[Array, Array]:
    """Return for each pixel of a sign, turned by a small angle, the share that it covers and the share of its rim."""
    extent = _extent(rng, size)
    rows, columns = np.mgrid[:extent, :extent] - (extent - 1) / 2
    tilt = rng.uniform(-0.3, 0.3)
    cos, sin = (1 - tilt * tilt) / (1 + tilt * tilt), 2 * tilt / (1 + tilt * tilt)
    x, y = columns * cos - rows * sin, columns * sin + rows * cos
    radius = extent / 2
    inradius = radius * _INRADII[name]
    if name == "circle":
        away = np.sqrt(x * x + y * y) - radius
    elif name == "cross":
        bars = (np.maximum(np.abs(a) - radius, np.abs(b) - inradius) for a, b in ((x, y), (y, x)))
        away = np.minimum(*bars)
    else:
        away = np.max([x * a + y * b for a, b in _NORMALS[name]], 0) - inradius
    return (0.5 - away).clip(0, 1), (0.5 + away + _RIM * inradius).clip(0, 1)


def _digit(rng: np.random.Generator, size: int, split: str) -> tuple[Array, Array]:
    """Return for each pixel of a digit the share that it covers, and zeros."""
    images = _digits(split)
    image = images[rng.integers(len(images))] / 255
    rows, columns = (np.nonzero(image.max(axis) > 0.5)[0] for axis in (1, 0))
    image = np.pad(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    height = max(_extent(rng, size), _LOWEST_DIGIT * size // SIZE)
    width = min(height, max(4, round(height * image.shape[1] / image.shape[0])))
    return (_resized(image, height, width) * 1.4).clip(0, 1), np.zeros(1)


def _resized(image: Array, height: int, width: int) -> Array:
    """Return an image (h, w) in another size, by bilinear interpolation."""
    for axis, length in enumerate((height, width)):
        places = (np.arange(length) + 0.5) * image.shape[axis] / length - 0.5
        places = places.clip(0, image.shape[axis] - 1)
        lower = places.astype(np.int64)
        upper = np.minimum(lower + 1, image.shape[axis] - 1)
        share = np.expand_dims(places - lower, 1 - axis)
        image = image.take(lower, axis) * (1 - share) + image.take(upper, axis) * share
    return image


@cache
def _digits(split: str) -> NDArray[np.uint8]:
    """Return the bundled images of digits of a split."""
    with np.load(BUNDLED_FOLDER / "mnist-mini.npz", allow_pickle=False) as file:
        images: NDArray[np.uint8] = file[f"x_{split}"]
        return images
