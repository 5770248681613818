"""Reads data sets in the format of their authors, without pickle, and writes them as `.npz`."""

import gzip
import io
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from holdfast.core.errors import TargetError
from holdfast.sources.arrays import Array
from holdfast.sources.catalogue import Entry
from holdfast.sources.npz import Npz

MAX_BYTES = 2**30
"""maximum number of bytes of an official file after decompression; the largest known file has a fifth of it"""
_CIFAR_ROW = 1 + 3 * 32 * 32


def idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in a gzipped IDX file, the format of MNIST: unsigned bytes in any number of dimensions."""
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_BYTES + 1)
        zeros, kind, n_dims = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{n_dims}I", content[4 : 4 + 4 * n_dims])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise TargetError(f"{str(path)!r} is damaged or truncated: {error}; fetch it again") from error
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims)
    if zeros != 0 or kind != 0x08 or len(values) != np.prod(shape, dtype=np.int64):
        raise TargetError(
            f"{str(path)!r} is no IDX file of bytes with shape {shape}; it holds {len(values)} values"
        )
    return values.reshape(shape)


def mnist_arrays(folder: Path, entry: Entry) -> dict[str, Array]:
    """Return train and test arrays from the four IDX files, in the order of the entry."""
    x_train, y_train, x_test, y_test = (idx(folder / remote.file) for remote in entry.remotes)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def cifar_arrays(archive: Path) -> dict[str, Array]:
    """Return train and test arrays from the binary version: rows of a label byte and three planes of 32 x 32."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    found: dict[str, Array] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile() and member.size <= MAX_BYTES:
                    content = tar.extractfile(member)
                    found[name] = np.frombuffer(b"" if content is None else content.read(), np.uint8)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise TargetError(f"{str(archive)!r} is damaged or truncated: {error}; fetch it again") from error
    missing = [name for name in names if name not in found or len(found[name]) % _CIFAR_ROW]
    if missing:
        raise TargetError(
            f"{str(archive)!r} lacks {', '.join(missing)}; it is not the binary version of CIFAR-10"
        )
    rows = [found[name].reshape(-1, _CIFAR_ROW) for name in names]
    train, test = np.concatenate(rows[:5]), rows[5]
    return {
        f"{what}_{split}": values
        for split, table in (("train", train), ("test", test))
        for what, values in (
            ("x", table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)),
            ("y", table[:, 0]),
        )
    }


def strip_arrays(paths: Mapping[str, tuple[Path, ...]], side: int = 32) -> dict[str, Array]:
    """Return the arrays of each split from archives of image strips with the members `webp`, `offsets` and `y`."""
    arrays: dict[str, Array] = {}
    for split, files in paths.items():
        images, labels = [], []
        for path in files:
            archive = Npz(path)
            blob, offsets = archive.array("webp"), archive.array("offsets").tolist()
            images += [_strip(blob[a:b].tobytes(), path) for a, b in pairwise(offsets)]
            labels.append(archive.array("y"))
        arrays[f"x_{split}"] = np.concatenate(images).reshape(-1, side, side, 3)
        arrays[f"y_{split}"] = np.concatenate(labels)
    return arrays


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the arrays compressed. The file is replaced atomically, so that a reader never sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            np.savez_compressed(file, **plain)  # type: ignore[arg-type] # its stub takes every name for a flag
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _strip(content: bytes, path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{str(path)!r} holds a damaged image strip: {error}") from error
