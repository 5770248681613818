"""Downloads data sets from their official mirrors, or imports them from a local folder.

Files in the original formats of the data sets are read without pickle, and written as `.npz`.
"""

import gzip
import hashlib
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.data.arrays import Array
from holdfast.io.data.npz import Npz
from holdfast.io.data.pictures import decoded
from holdfast.io.data_catalogue import CATALOGUE, Entry, RemoteFile, data_folder, entry_of
from holdfast.io.files import megabytes, opened, refusing, replacing

MAX_BYTES = 2**30
"""Largest number of bytes of an official file after decompression; the largest known file has a fifth of it."""
_MOST_IMAGES = 100_000
"""Largest number of images of an archive with strips; the largest known one has a half of it."""
_CIFAR_ROW = 1 + 3 * 32 * 32  # bytes of a label and an image


def idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in a gzipped IDX file, the format of MNIST: unsigned bytes in any number of dimensions."""
    damage = (OSError, EOFError, zlib.error, struct.error)
    with refusing(f"{str(path)!r} is damaged or truncated", damage, "fetch it again"):
        with opened(path, "data file") as packed, gzip.GzipFile(fileobj=packed) as file:
            content = file.read(MAX_BYTES + 1)
        zeros, kind, n_dims = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{n_dims}I", content[4 : 4 + 4 * n_dims])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims)
    if zeros != 0 or kind != 0x08 or len(values) != np.prod(shape, dtype=np.int64):
        raise TargetError(
            f"{str(path)!r} is not an IDX file of bytes with shape {shape}, but has {len(values)} values; download it "
            "again"
        )
    return values.reshape(shape)


def mnist_arrays(folder: Path, entry: Entry) -> dict[str, Array]:
    """Return the training and test arrays of MNIST from its four IDX files in `folder`, by name, such as `x_train`."""
    x_train, y_train, x_test, y_test = (idx(folder / remote.file) for remote in entry.remotes)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def cifar_arrays(archive: Path) -> dict[str, Array]:
    """Return the training and test arrays of CIFAR-10 from its binary version, by name, such as `x_train`.

    A row of this version consists of a label byte and three planes of 32 x 32 bytes.
    """
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    contents: dict[str, Array] = {}
    damage = (tarfile.TarError, OSError, EOFError, zlib.error)
    with (
        refusing(f"{str(archive)!r} is damaged or truncated", damage, "fetch it again"),
        opened(archive, "data file") as packed,
        tarfile.open(fileobj=packed, mode="r:gz") as tar,
    ):
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name in names and member.isfile() and member.size <= MAX_BYTES:
                content = tar.extractfile(member)
                contents[name] = np.frombuffer(b"" if content is None else content.read(), np.uint8)
    missing = [name for name in names if name not in contents or len(contents[name]) % _CIFAR_ROW]
    if missing:
        raise TargetError(
            f"{str(archive)!r} does not contain {', '.join(missing)}, so it is not the binary version of CIFAR-10; "
            "download it again"
        )
    rows = [contents[name].reshape(-1, _CIFAR_ROW) for name in names]
    train, test = np.concatenate(rows[:5]), rows[5]
    return {
        f"{name_of_array}_{split}": values
        for split, table in (("train", train), ("test", test))
        for name_of_array, values in (
            ("x", table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)),
            ("y", table[:, 0]),
        )
    }


def strip_arrays(paths: Mapping[str, tuple[Path, ...]], side: int = 32) -> dict[str, Array]:
    """Return the images and labels of each split of a data set from archives in which images are stored as long strips.

    Each archive has the members `webp`, `offsets` and `y`. `paths` contains the archives of each split, and `side` is
    the height and width of an image.
    """
    arrays: dict[str, Array] = {}
    for split, files in paths.items():
        images, labels = [], []
        for path in files:
            archive = Npz(path)
            blob, offsets, y = (archive.array(name) for name in ("webp", "offsets", "y"))
            if any(
                values.ndim != 1 or values.dtype.kind not in "iu" for values in (blob, offsets, y)
            ) or not (
                len(y) <= _MOST_IMAGES
                and len(blob) == blob.nbytes
                and (np.diff(offsets.astype(float)) >= 0).all()
            ):
                raise _no_strips(path, "its arrays have other types or sizes")
            left = len(y)
            for a, b in pairwise(offsets.tolist()):
                strip = _strip(blob[a:b].tobytes(), path, side)
                left -= len(strip)
                if (
                    left < 0
                ):  # before further strips, which may take much more memory than the file, are decoded
                    break
                images.append(strip)
            if left:
                raise _no_strips(path, f"it has {len(y):,} labels and another number of images")
            labels.append(y)
        arrays[f"x_{split}"] = np.concatenate(images)
        arrays[f"y_{split}"] = np.concatenate(labels)
    return arrays


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the arrays to a compressed `.npz` file. The file is replaced atomically, so that no reader gets an
    incomplete file.
    """
    with replacing(path) as file:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        np.savez_compressed(file, **contiguous)  # type: ignore[arg-type] # its stub takes every name for a flag


def _strip(content: bytes, path: Path, side: int) -> NDArray[np.uint8]:
    """Return the images (n, side, side, 3) of a strip, which is decoded with the limits of other images."""
    pixels = decoded((content,), (0,), str(path))[0][0]
    if pixels.shape[0] != 3 or pixels[0].size % side**2:
        raise _no_strips(path, f"a strip has the shape {pixels.shape}")
    images: NDArray[np.uint8] = pixels.transpose(1, 2, 0).reshape(-1, side, side, 3)
    return images


def _no_strips(path: Path, reason: str) -> TargetError:
    return TargetError(
        f"{str(path)!r} does not contain strips of images with labels: {reason}; get the file again"
    )


TIMEOUT_S = 60  # seconds without data after which a download fails
_CHUNK = 1 << 20  # bytes between two reports of progress
Progress = Callable[[str, int, int], None]
"""Type of a callback. Its arguments are the file name, the bytes received so far, and their total (0 if it is
unknown).
"""


def _silent(file: str, done: int, total: int) -> None:
    """Do nothing. This is the default callback."""


@dataclass(frozen=True)
class Imported:
    """A data set that was imported from a folder, and the names of the files from which it was read."""

    name: str
    path: Path
    files: tuple[str, ...]


def fetch(name: str, *, progress: Progress = _silent) -> Path:
    """Download a data set from its official mirror, check it, and write it as an `.npz` file. Return the path of the
    file.

    An existing file is not downloaded again. Raises `UsageError` for an unknown name, or if there is no mirror, and
    `TargetError` if the download fails.
    """
    entry = entry_of(name)
    target = data_folder() / entry.file
    if target.exists():
        return target
    if not entry.remotes:
        raise UsageError(
            f"{name} has no official mirror that can be downloaded; get the file yourself, and use holdfast data "
            "import FOLDER"
        )
    folder = data_folder() / "downloads" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for remote in entry.remotes:
            download(remote, folder / remote.file, progress=progress)
        write_npz(
            target,
            mnist_arrays(folder, entry)
            if entry.form == "idx"
            else cifar_arrays(folder / entry.remotes[0].file),
        )
        shutil.rmtree(folder)
    except OSError as error:
        raise _unwritable(error) from error
    return target


def download(remote: RemoteFile, target: Path, *, progress: Progress = _silent) -> None:
    """Download a file of a data set to the path `target`, and continue an interrupted download.

    Raises `TargetError` if the download fails or its checksum is wrong; then `target` is not written.
    """
    if target.exists() and _md5(target) == remote.md5:
        return
    partial = target.with_name(f"{target.name}.part")
    _receive(remote, partial, progress)
    # The file gets its name only after this check, so an incomplete or altered download is never used.
    if _md5(partial) != remote.md5:
        md5 = _md5(partial)
        size = partial.stat().st_size
        partial.unlink()
        raise TargetError(
            f"{remote.url} gave {megabytes(size)} with md5 {md5}; {remote.md5} was expected. The file was deleted; "
            "try again later, or get it yourself and use holdfast data import FOLDER"
        )
    partial.replace(target)


def import_folder(folder: Path) -> tuple[Imported, ...]:
    """Import every data set of the catalogue whose files a folder contains. Return a description of each imported data
    set.

    Existing files in the data folder are replaced. Raises `TargetError` if the folder contains no known data set.
    """
    if not folder.is_dir():
        raise TargetError(
            f"{str(folder)!r} is not a folder; a folder with {', '.join(_importable())} was expected"
        )
    if folder.resolve() == data_folder().resolve():
        raise UsageError(f"{str(folder)!r} is the data folder itself; give the folder from which to import")
    files_by_name = {name: files for name, entry in CATALOGUE.items() if (files := _files(folder, entry))}
    if not files_by_name:
        expected = ", ".join(_importable())
        raise TargetError(
            f"{str(folder)!r} contains no known data set; one of the files {expected} was expected"
        )
    try:
        data_folder().mkdir(parents=True, exist_ok=True)
        for name, files in files_by_name.items():
            _import_files(folder, CATALOGUE[name], files)
    except OSError as error:
        raise _unwritable(error) from error
    return tuple(
        Imported(name, data_folder() / CATALOGUE[name].file, files) for name, files in files_by_name.items()
    )


def _importable() -> list[str]:
    return [file for entry in CATALOGUE.values() for file in (entry.parts or (entry.file,))]


def _files(folder: Path, entry: Entry) -> tuple[str, ...]:
    """Return the names of the files of a data set in a folder, in the first complete format; empty if none is
    complete.
    """
    for form in ((entry.file,), entry.parts):
        if form and all((folder / file).is_file() for file in form):
            return form
    # MNIST and Fashion-MNIST publish files with equal names, which only the checksums distinguish.
    official = [(folder / remote.file, remote.md5) for remote in entry.remotes]
    if official and all(path.is_file() and _md5(path) == md5 for path, md5 in official):
        return tuple(path.name for path, _ in official)
    return ()


def _import_files(folder: Path, entry: Entry, files: tuple[str, ...]) -> None:
    target = data_folder() / entry.file
    if files == (entry.file,):
        if target.suffix == ".npz":
            Npz(folder / entry.file)  # a damaged file does not replace a complete one
        with opened(folder / entry.file, "data file") as source, replacing(target) as file:
            shutil.copyfileobj(source, file)
    elif files == entry.parts:
        splits = {split: tuple(folder / f for f in files if f"_{split}" in f) for split in ("train", "test")}
        write_npz(target, strip_arrays(splits))
    elif entry.form == "idx":
        write_npz(target, mnist_arrays(folder, entry))
    else:
        write_npz(target, cifar_arrays(folder / files[0]))


def _receive(remote: RemoteFile, partial: Path, progress: Progress) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={done}-"} if done else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 - addresses of the catalogue
            if done and answer.status != 206:  # the server sends the whole file
                done = 0
            total = done + int(answer.headers.get("Content-Length") or 0)
            with partial.open("ab" if done else "wb") as file:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    progress(remote.file, done, total)
            if done < total:
                raise ConnectionError(f"the transfer ended after {megabytes(done)} of {megabytes(total)}")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file is complete; the checksum decides
            return
        raise TargetError(f"{remote.url} answered {error.code} {error.reason}; try again later") from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise TargetError(
            f"{remote.url} cannot be reached ({reason}); the received part is kept, and the next attempt continues "
            "from it. Without a network use holdfast data import FOLDER"
        ) from error


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unwritable(error: OSError) -> TargetError:
    return TargetError(
        f"the data folder {str(data_folder())!r} cannot be written: {error}; set HOLDFAST_DATA to another folder"
    )
