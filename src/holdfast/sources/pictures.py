"""Class folders of images as a data set. Headers are read when it is opened, and images are decoded when they
are read.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from holdfast.core.batch import Batch
from holdfast.core.errors import NoSplit, TargetError, UsageError
from holdfast.sources.arrays import Arrays, selected_rows
from holdfast.sources.class_numbers import lenient_numbers
from holdfast.sources.expected import Expected
from holdfast.sources.files import megabytes, sha256_of_file, similar_name
from holdfast.sources.limited.limits import MEMORY, requested_memory

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF")
"""Formats that are decoded; files of other formats with one of the suffixes are rejected."""
MAX_PIXELS = 64_000_000
"""Largest number of pixels of one image according to its header, checked before decoding."""
_SMALL, _RATIO = 2**30, 200
"""Images that need more than 1 GiB and more than 200 times the size of their files are rejected as a decompression
bomb.
"""
_GREY = ("1", "L", "LA", "I;16", "I", "F")


@dataclass(frozen=True)
class Pictures:
    """A data set of images of one size in class folders."""

    name: str
    paths: tuple[Path, ...]
    y: NDArray[np.int64]
    ids: NDArray[np.int64]
    classes: tuple[str, ...]
    mode: str
    """colour mode of all images, `L` or `RGB`"""
    notes: tuple[str, ...] = ()
    objection: str = ""
    """reason why the class numbers are uncertain, if the data were accepted in spite of it; else empty"""

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the colour mode, the contents of the files, the labels and the ids."""
        digest = hashlib.sha256(self.mode.encode())
        for path in self.paths:
            digest.update(bytes.fromhex(sha256_of_file(path)))  # the files are not loaded as a whole
        digest.update(self.y.tobytes())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()

    def stored(self, start: int, stop: int) -> Arrays:
        """Return the decoded images from `start` to `stop` - 1 as bytes, which take a quarter of the floats."""
        rows = slice(start, stop)
        images = np.stack([_decoded(path, self.mode) for path in self.paths[rows]])
        return Arrays(self.name, images, self.y[rows], self.ids[rows], self.classes, 255.0)

    def read(self, start: int, stop: int) -> Batch:
        """Return the images from `start` to `stop` - 1 as floats in [0, 1], with the channels first."""
        return self.stored(start, stop).read(0, stop - start)


def open_folder(
    folder: Path,
    *,
    split: str | None,
    n: int | None,
    sample: int | None,
    seed: int,
    expected: Expected | None = None,
) -> Pictures:
    """Return the images of a folder, alternating between the classes, so that the first images include all classes.

    A folder without images is a class too. `expected` contains the declared properties of the classes, and the model.
    """
    expected = expected or Expected()
    root = _split_folder(folder, split)
    found = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not found:
        raise TargetError(f"{str(root)!r} holds no class folders; images were expected in {root.name}/CLASS/")
    _refuse_declared(expected, str(root))
    columns = [[(path, name) for path in _images(root / name)] for name in found]
    turns = [entry for row in zip_longest(*columns) for entry in row if entry is not None]
    rows = selected_rows(len(turns), n=n, sample=sample, seed=seed, name=repr(str(root)))
    chosen = [turns[row] for row in rows]
    paths = tuple(path for path, _ in chosen)
    mode, said = _measured(paths)
    notes = (*said, *_nested(root, found))
    empty = [name for name, column in zip(found, columns, strict=True) if not column]
    if empty:
        counted = "1 class folder holds" if len(empty) == 1 else f"{len(empty)} class folders hold"
        notes += (f"{counted} no image ({', '.join(empty[:3])}{' …' if len(empty) > 3 else ''})",)
    unnumbered = Pictures(str(folder), paths, np.zeros(len(paths), np.int64), rows, tuple(found), mode, notes)
    if expected.probe is not None:
        notes += expected.probe.suit(unnumbered.read(0, min(2, len(paths))).x)
    names, objection = lenient_numbers(found, expected, repr(str(root)), "class folders")
    numbers = {name: number for number, name in reversed([*enumerate(names)])}
    y = np.array([numbers[name] for _, name in chosen], dtype=np.int64)
    return replace(unnumbered, y=y, classes=names, notes=notes, objection=objection)


def _refuse_declared(expected: Expected, name: str) -> None:
    """Raise `UsageError` for a declared normalisation or layout, because images are always read in the same way."""
    if expected.normalised is not None:
        raise UsageError(
            f"{name!r} holds images, which are no normalised values; leave --data-normalised out, and give --mean "
            "and --std "
            "if the model takes normalised input"
        )
    if expected.layout not in (None, "chw"):
        raise UsageError(
            f"{name!r} holds images, which are read with the channels first, and --layout is {expected.layout}; "
            "leave it "
            "out"
        )


def _nested(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on folders inside class folders, which are not read."""
    inner = [f"{name}/{entry.name}" for name in names for entry in (root / name).iterdir() if entry.is_dir()]
    if not inner:
        return ()
    shown = ", ".join(sorted(inner)[:3]) + (" …" if len(inner) > 3 else "")
    return (f"folders inside class folders are not read: {shown}",)


def _split_folder(folder: Path, split: str | None) -> Path:
    """Return the sub-folder of a split: the given one, else `test` if it exists, else `folder` itself."""
    splits = [
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name in ("train", "val", "valid", "test")
    ]
    wanted = split or ("test" if "test" in splits else None)
    if wanted is None:
        return folder
    if not (folder / wanted).is_dir():
        raise NoSplit(
            f"{str(folder)!r} has no folder {wanted!r}{similar_name(wanted, splits)}; leave --split out to read it all"
        )
    return folder / wanted


def _images(folder: Path) -> Iterator[Path]:
    return iter(
        sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    )


def _measured(paths: tuple[Path, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the colour mode for all images, and notes. Raises `TargetError` for images of several sizes."""
    first = _header(paths[0])
    modes = {first[1]}
    for path in paths[1:]:
        size, mode = _header(path)
        modes.add(mode)
        if size != first[0]:
            raise TargetError(
                f"images differ in size: {str(paths[0])!r} is {first[0][0]} x {first[0][1]}, {str(path)!r} is "
                f"{size[0]} x {size[1]}; resize them to the size that the model takes"
            )
    _refuse_bomb(paths, first[0][0] * first[0][1] * (1 if modes <= {*_GREY} else 3))
    grey = {mode for mode in modes if mode in _GREY}
    notes: tuple[str, ...] = ()
    if grey and grey != modes:
        notes += ("grey and colour images were mixed; all were read as colour",)
    if any("A" in mode for mode in modes):
        notes += ("transparency was dropped",)
    return ("L" if grey == modes else "RGB"), notes


def _refuse_bomb(paths: tuple[Path, ...], n_bytes: int) -> None:
    """Raise `TargetError` for images that need much more memory than their files.

    `n_bytes` is the size of one decoded image.
    """
    on_disk = sum(path.stat().st_size for path in paths)
    if len(paths) * n_bytes > max(_SMALL, _RATIO * on_disk, requested_memory()):
        raise TargetError(
            f"{str(paths[0].parent.parent)!r} holds {len(paths):,} images of {megabytes(on_disk)}, which take "
            f"{megabytes(len(paths) * n_bytes)} when they are decoded: a bomb rather than data. If they are data, "
            f"raise the limit with {MEMORY}=16GB"
        )


def _header(path: Path) -> tuple[tuple[int, int], str]:
    with _opened(path) as image:
        return image.size, image.mode


def _decoded(path: Path, mode: str) -> NDArray[np.uint8]:
    with _opened(path) as image:
        try:
            # Pillow clips 16-bit grey at 255 in the conversion, so the values are scaled first.
            pixels = (
                np.asarray(image, np.float64) / 257
                if image.mode.startswith("I")
                else np.asarray(image.convert(mode))
            )
        except Exception as error:  # decoders raise errors of many classes
            raise TargetError(
                f"image {str(path)!r} is damaged or truncated: {type(error).__name__}: {error}; replace or remove it"
            ) from error
    pixels = np.rint(pixels).astype(np.uint8) if pixels.dtype != np.uint8 else pixels
    if mode == "RGB" and pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0))


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TargetError(f"image {str(path)!r} is too large to decode: {error}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise TargetError(f"image {str(path)!r} cannot be read as {', '.join(FORMATS)}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise TargetError(
            f"image {str(path)!r} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded: "
            "resize it"
        )
    return image
