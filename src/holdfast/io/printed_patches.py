"""Patches that can be printed: reads a table of colours and an image of a shape into the constraint of a patch."""

import csv
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.files import opened, refuse_address, refusing, text_of_file
from holdfast.threats.transformations import Patch

_MOST_COLOURS = 4096
"""Largest number of colours of a table, which is stored with each run."""
_TABLE = "a table of colours has a line `red,green,blue` for each colour, with numbers from 0 to 255"
_INKS = np.array([
    (255, 255, 255), (0, 174, 239), (236, 0, 140), (46, 49, 146),
    (255, 242, 0), (0, 166, 81), (237, 28, 36), (54, 54, 57),
])  # fmt: skip
"""sRGB of paper, cyan, magenta, blue (cyan and magenta), yellow, green, red, and all three inks, each fully covering
coated paper (SWOP)"""
_BLACK = (35, 31, 32)
_COVERAGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def patch_threat(
    *,
    height: int,
    width: int,
    at: str = "anywhere",
    jitter: int = 0,
    within: str = "",
    printable: str = "",
    shape: str = "",
) -> Patch:
    """Return the constraint of a patch with these limits and the content of the files that they name.

    Raises `UsageError` for a shape of another size or without pixels, and `TargetError` for a file that is not as
    expected.
    """
    content: dict[str, object] = {}
    if printable:
        colours = default_colours() if printable == "default" else _colours(_path(printable, "printable"))
        content |= {"colours": colours.tolist(), "low": [0.0], "high": [255.0]}
    if shape:
        rows = _RULES[shape](height, width) if shape in _RULES else _drawn(shape, height, width)
        if not rows.any():
            advice = (
                "a larger patch, such as 5x5"
                if shape in _RULES
                else "an image with white pixels, which are those that may change"
            )
            raise UsageError(f"the shape {shape} has no pixel in a patch of {height}x{width}; give {advice}")
        content["shape"] = rows.astype(int).tolist()
    text = json.dumps(content) if content else ""
    return Patch(height, width, at, jitter, within, printable, shape, text)


def default_colours() -> NDArray[np.float64]:
    """Return sRGB colours (k, 3), from 0 to 255, that four-colour printing on coated paper can produce: those of a grid
    of coverages with cyan, magenta, yellow and black ink.

    The Neugebauer equations (1937) give the mean reflectance over overlapping dots of ink. Here it is that of sRGB
    values made linear, of published conversions of the solid inks; the colours of a given printer differ, so measure
    them for a claim about it.
    """
    primaries = _linear(np.vstack([_INKS, _BLACK]))
    cyan, magenta, yellow, black = np.meshgrid(*[_COVERAGES] * 4, indexing="ij")
    weights = [
        (cyan if k & 1 else 1 - cyan)
        * (magenta if k & 2 else 1 - magenta)
        * (yellow if k & 4 else 1 - yellow)
        for k in _BITS
    ]
    share = np.stack([*((1 - black) * weight for weight in weights), black], -1).reshape(-1, 9)
    mixed = share @ primaries
    encoded = np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055)
    return np.unique((255 * encoded).round(), axis=0)


_BITS = range(8)
"""places in `_INKS`, whose bits state which of cyan, magenta and yellow are printed"""


def _linear(colours: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return sRGB from 0 to 255 as linear values from 0 to 1."""
    values = colours / 255
    linear: NDArray[np.float64] = np.where(
        values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
    )
    return linear


def _path(text: str, name: str) -> Path:
    file = text.removeprefix("@")
    refuse_address(file, f"{name} is", f"{name}=@file")
    return Path(file)


def _colours(path: Path) -> NDArray[np.float64]:
    """The colours of a table (k, 3)."""
    rows = [row for row in csv.reader(text_of_file(path, "table of colours").splitlines()) if row]
    if rows and not rows[0][0].strip().lstrip("-").replace(".", "", 1).isdigit():
        rows = rows[1:]  # the names of the columns
    if not 0 < len(rows) <= _MOST_COLOURS:
        raise TargetError(
            f"{str(path)!r} has {len(rows):,} colours; 1 to {_MOST_COLOURS:,} were expected: {_TABLE}"
        )
    for row in rows:
        with refusing(f"{str(path)!r} has the line {','.join(row)!r:.60}", (ValueError,), _TABLE):
            numbers = [float(cell) for cell in row]
        if len(numbers) != 3 or not all(0 <= number <= 255 for number in numbers):
            raise TargetError(f"{str(path)!r} has the line {','.join(row)!r:.60}; {_TABLE}")
    return np.array(rows, float)


def _circle(height: int, width: int) -> NDArray[np.bool_]:
    """The pixels whose centres are inside the largest ellipse of the rectangle."""
    down, right = (np.arange(size) - (size - 1) / 2 for size in (height, width))
    inside: NDArray[np.bool_] = (2 * down / height)[:, None] ** 2 + (2 * right / width)[None] ** 2 <= 1
    return inside


def _bars(height: int, width: int) -> NDArray[np.bool_]:
    """Two horizontal bars, each a fifth of the height, as the stickers of Eykholt et al. (CVPR 2018)."""
    place = (np.arange(height) + 0.5) / height
    bars = ((place > 0.2) & (place < 0.4)) | ((place > 0.6) & (place < 0.8))
    return np.repeat(bars[:, None], width, 1)


_RULES = {"circle": _circle, "bars": _bars}


def _drawn(shape: str, height: int, width: int) -> NDArray[np.bool_]:
    """The light pixels of an image, which has the size of the patch."""
    path = _path(shape, "shape")
    with (
        opened(path, "image of a shape") as file,
        refusing(
            f"{str(path)!r} is no image",
            (OSError, ValueError, Image.DecompressionBombError),
            "a black and white PNG was expected",
        ),
        Image.open(file) as image,
    ):
        if image.size != (width, height):
            raise UsageError(
                f"{str(path)!r} has {image.size[1]}x{image.size[0]} pixels, and the patch {height}x{width}; give an "
                "image of the size of the patch, whose white pixels may change"
            )
        light: NDArray[np.bool_] = np.asarray(image.convert("L")) >= 128
        return light
