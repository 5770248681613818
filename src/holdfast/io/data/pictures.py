"""Data sets of images in one folder per class. The headers of the files are read when the data set is opened, and each
image is decoded when it is read.
"""

import csv
import hashlib
import io
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.errors import HoldfastError, NoSplit, TargetError, UsageError, data_argument
from holdfast.core.names import by_stripped, note_on_spaces
from holdfast.io.data.arrays import BITS, Arrays, Choice, first_rows_note
from holdfast.io.data.labels import lenient_numbers
from holdfast.io.data.layouts import GREY_NOTE, DeclaredData
from holdfast.io.files import NORMALISED_DATA, existing, megabytes, opened, sha256_of_file, similar_name
from holdfast.io.models.weights import RAISE_LIMIT, read_once
from holdfast.io.sandbox.calling import too_slow
from holdfast.io.sandbox.sandbox_main import MEMORY, cpu_seconds, requested_memory

if TYPE_CHECKING:
    from holdfast.io.data.labels import Groups

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF")
"""Formats that are decoded; files of other formats with one of the suffixes are rejected."""
MAX_PIXELS = 64_000_000
"""Largest number of pixels of one image according to its header, checked before decoding."""
MAX_BYTES = 2**30
"""Largest number of bytes of the file of one image; 64 million pixels of plain numbers take 0.8 GB."""
_MOST_EXIF = 2
"""Largest number of Exif segments of a JPEG file. Pillow joins them, in quadratic time, and its older versions take
quadratic memory for the result.
"""
_BLOCK = 8192
"""Number of bytes that a decoder is given at a time; before each block the CPU time is compared with its limit. A block
may contain hundreds of scans of a progressive JPEG image, each of which passes over the whole image.
"""
_SMALL, _RATIO = 2**30, 200
"""Images that need more than 1 GiB and more than 200 times the size of their files are rejected as a decompression
bomb.
"""
_GREY = ("1", "L", "LA", "I;16", "I", "F")


@dataclass(frozen=True)
class Pictures:
    """A data set of images of one size in folders, one folder for each class."""

    name: str
    paths: tuple[Path, ...]
    y: NDArray[np.int64]
    ids: NDArray[np.int64]
    classes: tuple[str, ...]
    mode: str
    """colour mode of all images, `L` or `RGB`"""
    size: tuple[int, int]
    """width and height of all images"""
    notes: tuple[str, ...] = ()
    objection: HoldfastError | None = None
    """reason why the class numbers are uncertain, if the data were accepted in spite of it"""
    groups: "Groups | None" = None
    """group of each example, if it was given in Python"""
    truth: NDArray[np.generic] | None = None
    """what outputs are compared with, (N, *truth), if the task is not one of classes; else None"""

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 in hex of each file."""
        return tuple(map(sha256_of_file, self.paths))  # the files are not loaded as a whole

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the colour mode, the contents of the image files, the labels and the ids."""
        digest = hashlib.sha256(self.mode.encode())
        for file_digest in self.digests:
            digest.update(bytes.fromhex(file_digest))
        digest.update((self.y if self.truth is None else self.truth).tobytes())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()

    def stored(self, start: int, stop: int) -> Arrays:
        """Return the decoded images from `start` to `stop` - 1 as bytes, which take a quarter of the floats.

        Raises `TargetError` for an image that cannot be decoded, and for a file that changed after it was opened.
        """
        rows = slice(start, stop)
        images = np.stack([self._decoded(row) for row in range(len(self))[rows]])
        truth = None if self.truth is None else self.truth[rows]
        return Arrays(self.name, images, self.y[rows], self.ids[rows], self.classes, 255.0, truth=truth)

    def read(self, start: int, stop: int) -> Batch:
        """Return the images from `start` to `stop` - 1 as floats in [0, 1], with the channels first.

        Raises `TargetError` for an image that cannot be decoded, and for a file that changed after it was opened.
        """
        return self.stored(start, stop).read(0, stop - start)

    def _decoded(self, row: int) -> NDArray[np.uint8]:
        """Return an image (channels, height, width). Its file is read once: the bytes of the digest are decoded."""
        path = self.paths[row]
        content = read_once(path, "image", max_bytes=MAX_BYTES)
        if hashlib.sha256(content).hexdigest() != self.digests[row]:
            raise _changed(path)
        with _opened(path, io.BytesIO(content)) as image:
            if image.size != self.size:
                raise _changed(path)
            return _pixels(path, image, self.mode)


@dataclass(frozen=True)
class ClassFolders:
    """The selected files of a folder with one subfolder for each class."""

    root: Path
    """folder of the split"""
    paths: tuple[Path, ...]
    rows: NDArray[np.int64]
    """positions of the files among all files of the split"""
    labels: tuple[str, ...]
    """class folder of each file of the split"""
    names: tuple[str, ...]
    """names of the class folders"""
    notes: tuple[str, ...]
    """notes for the report on folders that are not read, and on empty ones"""

    def numbered(
        self, expected: DeclaredData, n: int | None
    ) -> tuple[NDArray[np.int64], tuple[str, ...], HoldfastError | None, tuple[str, ...]]:
        """Return the class number of each selected file, the class names in the order of their numbers, the reason why
        the numbers are uncertain if there is one, and notes. `n` is the requested number of examples.
        """
        labels = np.array(self.labels)
        notes = first_rows_note(labels, labels[self.rows], n)
        read_as = by_stripped(self.names, expected.class_names or ())
        where = repr(str(self.root))
        names, objection = lenient_numbers(sorted({*read_as.values()}), expected, where, "class folders")
        # Reversed, so that of two equal names the first one counts.
        numbers = {name: number for number, name in reversed([*enumerate(names)])}
        y = np.array([numbers[read_as[self.labels[row]]] for row in self.rows], dtype=np.int64)
        return y, names, objection, (*notes, *note_on_spaces(where, read_as))


def class_folders(
    folder: Path, choice: Choice, suffixes: tuple[str, ...] | None, what: str, *, follow_links: bool
) -> ClassFolders:
    """Return the files with one of the suffixes in the subfolders of a folder; None for all files that are not hidden.
    Files of different classes alternate, so that the first ones include all classes.

    A subfolder without such files is a class too. `what` names one of the files in messages, as in "image". Raises
    `TargetError` if there are no files, and for a link that leads out of the folder, without `follow_links`.
    """
    root = split_folder(folder, choice.split)
    names = _subfolders(root)
    if not follow_links:
        refuse_leaving([root, *(root / name for name in names)], folder)
    if not names:
        raise TargetError(
            f"{str(root)!r} holds no class folders; {what}s were expected in {root.name}/CLASS/"
            + (
                "; its file labels.csv is read with the setting task=multilabel"
                if (root / "labels.csv").is_file()
                else ""
            )
        )
    columns = [[(path, name) for path in with_suffix(root / name, suffixes)] for name in names]
    if not follow_links:
        refuse_leaving((path for column in columns for path, _ in column), folder)
    entries = [entry for row in zip_longest(*columns) for entry in row if entry is not None]
    if not entries:
        advice = "" if suffixes is None else "; a threat such as bytes:change=16 reads files of any format"
        raise TargetError(f"the class folders of {str(root)!r} hold no {what}s{advice}")
    rows = choice.rows(len(entries), repr(str(root)))
    notes = _nested(root, names)
    empty = [name for name, column in zip(names, columns, strict=True) if not column]
    if empty:
        counted = "1 class folder holds" if len(empty) == 1 else f"{len(empty)} class folders hold"
        notes += (f"{counted} no {what} ({', '.join(empty[:3])}{' …' if len(empty) > 3 else ''})",)
    labels = tuple(name for _, name in entries)
    return ClassFolders(root, tuple(entries[row][0] for row in rows), rows, labels, tuple(names), notes)


def _subfolders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def open_folder(
    folder: Path, choice: Choice, expected: DeclaredData | None = None, *, follow_links: bool = False
) -> Pictures:
    """Return a data set of the images in a folder with one subfolder for each class; see `class_folders`.

    `expected` contains the declared properties of the classes, and the model.
    """
    expected = expected or DeclaredData()
    files = class_folders(folder, choice, SUFFIXES, "image", follow_links=follow_links)
    _refuse_declared(expected, str(files.root))
    paths = files.paths
    on_disk = sum(existing(path, "image").stat().st_size for path in paths)
    mode, size, mode_notes = _measured(paths, repr(str(folder)), on_disk, size_and_mode)
    notes = (*mode_notes, *files.notes)
    unnumbered = Pictures(
        str(folder), paths, np.zeros(len(paths), np.int64), files.rows, files.names, mode, size, notes
    )
    if expected.probe is not None:
        first = unnumbered.read(0, min(2, len(paths))).x
        if mode == "RGB" and bool((first == first[:, :1]).all()) and expected.probe.needs_grey(first):
            unnumbered, first = replace(unnumbered, mode="L"), first[:, :1]
            notes += (GREY_NOTE,)
        notes += expected.probe.suit(first)
    y, names, objection, more = files.numbered(expected, choice.n)
    return replace(unnumbered, y=y, classes=names, notes=(*notes, *more), objection=objection)


def open_pictures(
    name: str,
    paths: Sequence[Path],
    truth: NDArray[np.generic],
    names: tuple[str, ...],
    choice: Choice,
    expected: DeclaredData,
    *,
    follow_links: bool = False,
) -> Pictures:
    """Return a data set of images with the truth of a task other than classes, (n, *truth), and the names of its
    classes or labels. Raises `TargetError` for images of several sizes, and for a link that leads out of the folder of
    the first.
    """
    rows = choice.rows(len(paths), repr(name))
    chosen = tuple(paths[row] for row in rows)
    if not follow_links:
        refuse_leaving(chosen, chosen[0].parent)
    _refuse_declared(expected, name)
    on_disk = sum(existing(path, "image").stat().st_size for path in chosen)
    mode, size, notes = _measured(chosen, repr(name), on_disk, size_and_mode)
    zeros = np.zeros(len(rows), np.int64)
    data = Pictures(name, chosen, zeros, rows, names, mode, size, notes, truth=truth[rows])
    if expected.probe is not None:
        data = replace(data, notes=(*data.notes, *expected.probe.suit(data.read(0, min(2, len(data))).x)))
    return data


def open_tagged(
    folder: Path, choice: Choice, expected: DeclaredData, *, follow_links: bool = False
) -> Pictures:
    """Return the images of a folder with several labels, which its file `labels.csv` states: a column with the names of
    the files, and one of 0 and 1 for each label.

    Raises `UsageError` without this file, and `TargetError` for other contents.
    """
    root = split_folder(folder, choice.split)
    table = root / "labels.csv"
    if not table.is_file():
        raise UsageError(
            f"{str(root)!r} has no file labels.csv, which states the labels of its images; write a column with the "
            "names of the files, and one of 0 and 1 for each label"
        )
    with opened(table, "labels") as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
        header, *lines = csv.reader(text)
    for number, line in enumerate(lines, 2):
        if len(line) != len(header) or not set(line[1:]) <= {"0", "1"} or len(header) < 2:
            raise TargetError(
                f"line {number} of {str(table)!r} is {','.join(line)[:100]!r}; the name of a file and "
                f"{len(header) - 1} times 0 or 1 were expected, as the first line states"
            )
    if not lines:
        raise TargetError(f"{str(table)!r} lists no image; at least one line after the first was expected")
    truth = np.array([[int(cell) for cell in line[1:]] for line in lines], np.int64)
    paths = [
        image_inside(root, line[0], f"line {number} of {str(table)!r}")
        for number, line in enumerate(lines, 2)
    ]
    return open_pictures(
        str(folder), paths, truth, tuple(header[1:]), choice, expected, follow_links=follow_links
    )


def holds_samples(folder: Path) -> bool:
    """Return whether a folder contains images, and not in class folders."""
    return folder.is_dir() and next(with_suffix(folder, SUFFIXES), None) is not None


def open_samples(folder: Path, *, follow_links: bool = False) -> Pictures:
    """Return the images of a folder without class folders, without labels, in the order of their names. Numbers in
    names are compared as numbers, so that 10.png follows 9.png. A link that leads out of the folder is refused without
    `follow_links`.
    """

    def place(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), "") if part.isdigit() else (0, part) for part in parts]

    paths = tuple(sorted(with_suffix(folder, SUFFIXES), key=place))
    if not follow_links:
        refuse_leaving(paths, folder)
    on_disk = sum(existing(path, "image").stat().st_size for path in paths)
    mode, size, notes = _measured(paths, repr(str(folder)), on_disk, size_and_mode)
    y = np.full(len(paths), UNLABELLED, np.int64)
    return Pictures(str(folder), paths, y, np.arange(len(paths)), (), mode, size, notes)


def _refuse_declared(expected: DeclaredData, name: str) -> None:
    """Raise `UsageError` for a declared normalisation or layout, because images are always read in the same way."""
    if expected.normalised is not None:
        raise UsageError(
            f"{name!r} contains images, which are not normalised; mean and std are for a model that needs normalised "
            "inputs",
            NORMALISED_DATA,
        )
    if expected.bits is not None:
        raise UsageError(
            f"{name!r} contains images, which state their own bits, and bits is {expected.bits}", BITS
        )
    if expected.layout not in (None, "chw"):
        raise UsageError(
            f"{name!r} contains images, which are read with the channels first, and the layout is {expected.layout}",
            data_argument("layout"),
        )


def _nested(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on folders inside class folders, which are not read."""
    nested = [f"{name}/{entry.name}" for name in names for entry in (root / name).iterdir() if entry.is_dir()]
    if not nested:
        return ()
    shown = ", ".join(sorted(nested)[:3]) + (" …" if len(nested) > 3 else "")
    return (f"folders inside class folders are not read: {shown}",)


def split_folder(folder: Path, split: str | None) -> Path:
    """Return the sub-folder of a split: the given one, else `test` if it exists, else `folder` itself."""
    splits = [
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name in ("train", "val", "valid", "test")
    ]
    name = split or ("test" if "test" in splits else None)
    if name is None:
        return folder
    if not (folder / name).is_dir():
        raise NoSplit(
            f"{str(folder)!r} has no folder {name!r}{similar_name(name, splits)}",
            data_argument("split", reason="to read the whole folder"),
        )
    return folder / name


def with_suffix(folder: Path, suffixes: tuple[str, ...] | None) -> Iterator[Path]:
    """Return the entries of a folder with one of the suffixes, in the order of their names; None for all entries that
    are not hidden. Those that are no regular files are refused when they are opened.
    """

    def fits(path: Path) -> bool:
        return not path.name.startswith(".") if suffixes is None else path.suffix.lower() in suffixes

    return iter(sorted(path for path in folder.iterdir() if fits(path) and not path.is_dir()))


def refuse_leaving(paths: Iterable[Path], folder: Path) -> None:
    """Raise `TargetError` for a link that leads out of the folder of the data, which may itself be a link."""
    inside = Path(os.path.realpath(folder))
    for path in paths:
        if path.is_symlink() and not (target := Path(os.path.realpath(path))).is_relative_to(inside):
            raise TargetError(
                f"{str(path)!r} is a link to {str(target)!r}, which is outside of the folder {str(folder)!r}; copy it "
                "into the folder",
                data_argument("follow_links", value=True, reason="to read it"),
            )


def decoded(
    contents: Sequence[bytes], rows: Sequence[int], name: str
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return images (n, channels, height, width) from the contents of their files, which are the given rows of the
    source `name`, and notes for the report.

    The formats and the limits are those of files in folders. Raises `TargetError` for images of several sizes, and for
    one that cannot be decoded.
    """
    images = {Path(f"row {row} of {name}"): content for row, content in zip(rows, contents, strict=True)}

    def header(place: Path) -> tuple[tuple[int, int], str]:
        with _opened(place, io.BytesIO(images[place])) as image:
            return image.size, image.mode

    mode, _, notes = _measured(tuple(images), name, sum(map(len, contents)), header)
    pixels = []
    for place, content in images.items():
        with _opened(place, io.BytesIO(content)) as image:
            pixels.append(_pixels(place, image, mode))
    return np.stack(pixels), notes


def _measured(
    paths: tuple[Path, ...], name: str, n_bytes: int, header: Callable[[Path], tuple[tuple[int, int], str]]
) -> tuple[str, tuple[int, int], tuple[str, ...]]:
    """Return the colour mode and the size of all images, and notes. Raises `TargetError` for images of several
    sizes.

    `header` returns the size and the Pillow mode of an image, and `n_bytes` is the size of all files.
    """
    first = header(paths[0])
    modes = {first[1]}
    for path in paths[1:]:
        size, mode = header(path)
        modes.add(mode)
        if size != first[0]:
            raise TargetError(
                f"images differ in size: {str(paths[0])!r} is {first[0][0]} x {first[0][1]}, {str(path)!r} is "
                f"{size[0]} x {size[1]}; resize them to the size that the model takes"
            )
    channels = 1 if modes <= {*_GREY} else 3
    _refuse_bomb(name, len(paths), n_bytes, first[0][0] * first[0][1] * channels)
    grey = {mode for mode in modes if mode in _GREY}
    notes: tuple[str, ...] = ()
    if grey and grey != modes:
        notes += ("grey and colour images were mixed; all were read as colour",)
    if any("A" in mode for mode in modes):
        notes += ("transparency was dropped",)
    return ("L" if grey == modes else "RGB"), first[0], notes


def _refuse_bomb(name: str, n: int, on_disk: int, n_bytes: int) -> None:
    """Raise `TargetError` for `n` images that need much more memory than their files, which have `on_disk` bytes.

    `n_bytes` is the size of one decoded image.
    """
    if n * n_bytes > max(_SMALL, _RATIO * on_disk, requested_memory()):
        raise TargetError(
            f"{name} holds {n:,} images of {megabytes(on_disk)}, which take {megabytes(n * n_bytes)} when they are "
            f"decoded: a bomb rather than data. If they are data, raise the limit with {MEMORY}=16GB"
        )


def image_inside(folder: Path, name: object, where: str) -> Path:
    """Return the path of an image of a folder. `where` names the place of the name in a file, for a message. Raises
    `TargetError` for a missing image, and for a name that is not that of a file inside of the folder.
    """
    parts = PurePath(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or ".." in parts or PurePath(*parts).is_absolute():
        raise TargetError(
            f"{where} names the image {name!r}; the name of a file inside of {str(folder)!r} was expected"
        )
    return existing(folder.joinpath(*parts), f"the image of {where},")


def size_and_mode(path: Path) -> tuple[tuple[int, int], str]:
    """Return the width and height of an image, and its mode in Pillow, from the header of its file. Raises
    `TargetError` for a file that is no image.
    """
    limit = max(MAX_BYTES, requested_memory())
    with opened(path, "image", most=limit, advice=RAISE_LIMIT) as file, _opened(path, file) as image:
        return image.size, image.mode


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels (channels, height, width) of an image that Pillow has opened."""
    return _pixels(Path("an image in memory"), image, "L" if image.mode in _GREY else "RGB")


def _changed(path: Path) -> TargetError:
    return TargetError(
        f"image {str(path)!r} changed after it was opened; the file that was checked was expected: start again"
    )


def _pixels(path: Path, image: Image.Image, mode: str) -> NDArray[np.uint8]:
    try:
        if mode == "L" and image.mode not in _GREY:
            image = _grey(path, image)
        # Pillow clips 16-bit grey at 255 in the conversion, so the values are scaled first.
        pixels = (
            np.asarray(image, np.float64) / 257
            if image.mode.startswith("I")
            else np.asarray(image.convert(mode))
        )
    except HoldfastError:
        raise
    except Exception as error:  # decoders raise errors of many classes
        raise TargetError(
            f"image {str(path)!r} is damaged or truncated: {type(error).__name__}: {error}; replace or remove it"
        ) from error
    pixels = np.rint(pixels).astype(np.uint8) if pixels.dtype != np.uint8 else pixels
    if mode == "RGB" and pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0))


def _grey(path: Path, image: Image.Image) -> Image.Image:
    """Return one channel of a colour image with equal channels."""
    red, green, blue = image.convert("RGB").split()
    if red.tobytes() != green.tobytes() or red.tobytes() != blue.tobytes():
        raise TargetError(
            f"image {str(path)!r} is in colour, and the network takes grey images, as the first ones are; convert it "
            "as those of the training were converted"
        )
    return red


@contextmanager
def _opened(path: Path, file: io.BufferedReader | io.BytesIO) -> Iterator[Image.Image]:
    """Context manager that yields the image in a file whose header was read. Its pixels are decoded on demand."""
    with _Timed(path, file) as timed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about each wrong entry of the metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(timed, formats=FORMATS)
        except HoldfastError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise TargetError(f"image {str(path)!r} is too large to decode: {error}") from error
        except Exception as error:  # as decoders do
            reason = str(error) or type(error).__name__
            raise TargetError(
                f"image {str(path)!r} cannot be read as {', '.join(FORMATS)}: {reason}"
            ) from error
        if image.width * image.height > MAX_PIXELS:
            raise TargetError(
                f"image {str(path)!r} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded: "
                "resize it"
            )
        image.decodermaxblock = _BLOCK
        yield image


class _Timed(io.BufferedReader):
    """The stream of an image file. It raises `TargetError` if a read begins after the limit of CPU time for one file.

    Decoders read little at a time, so that a separate process, which costs more than an ordinary image, is not needed.
    """

    def __init__(self, path: Path, file: io.BufferedReader | io.BytesIO) -> None:
        super().__init__(file)
        self._path, self._n_exif, self._seconds = path, 0, cpu_seconds()
        self._cpu = time.thread_time()
        self._due = time.monotonic() + self._seconds

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes. Raises `TargetError` after the limit of time, and for a third Exif segment."""
        # the clock is faster to read than the CPU time, which is at most the same
        if time.monotonic() > self._due and time.thread_time() - self._cpu > self._seconds:
            raise too_slow(self._path, f"{self._seconds} s of CPU time")
        content = super().read(size)
        if content.startswith(b"Exif\0\0"):
            self._n_exif += 1
            if self._n_exif > _MOST_EXIF:
                raise TargetError(
                    f"image {str(self._path)!r} has more than {_MOST_EXIF} segments of Exif metadata; 1 was expected: "
                    "remove its metadata, or save it again"
                )
        return content
