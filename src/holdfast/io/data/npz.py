"""Reads `.npz` archives one array after another, without pickle, and never decompresses more bytes than the headers
declare.
"""

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from lzma import LZMAError
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from holdfast.core.errors import NoSplit, TargetError, UsageError
from holdfast.core.remedies import Placeholder, data_argument
from holdfast.io.files import megabytes, names_of, opened, reason_of, refusing, similar_name
from holdfast.io.limited.limited_main import MEMORY, requested_memory

MAX_BYTES = 16 * 2**30
"""Largest total size in bytes of the arrays of one archive after decompression."""
_SMALL, _RATIO = 2**30, 200
"""An archive that would need more than 1 GiB and more than 200 times its size is rejected as a decompression bomb."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, ValueError, OSError, NotImplementedError)


class Npz:
    """An `.npz` archive whose list of arrays was read and checked."""

    def __init__(self, path: Path, what: str = "data file") -> None:
        self.path, self._what = path, what
        advice = "download it again, or write it with numpy.savez"
        with (
            refusing(f"{str(path)!r} is not an .npz archive, or is damaged or truncated", _DAMAGE, advice),
            opened(path, what) as file,
            zipfile.ZipFile(file) as archive,
        ):
            n_bytes = os.fstat(file.fileno()).st_size
            members = [
                (member.filename.removesuffix(".npy"), member.file_size) for member in archive.infolist()
            ]
        self._sizes = dict(members)
        if len(self._sizes) < len(members):
            repeated = next(name for name, n in Counter(name for name, _ in members).items() if n > 1)
            raise TargetError(
                f"{str(path)!r} contains two arrays named {repeated[:100]!r}; one was expected: write it again with "
                "numpy.savez"
            )
        total = sum(self._sizes.values())
        limit = max(MAX_BYTES, requested_memory())
        if total > limit:
            raise TargetError(
                f"{str(path)!r} would have {megabytes(total)} after decompression; at most {megabytes(limit)} is read. "
                f"If you trust it, raise the limit with {MEMORY}=32GB"
            )
        if total > max(_SMALL, _RATIO * n_bytes, requested_memory()):
            raise TargetError(
                f"{str(path)!r} has {megabytes(n_bytes)}, and would have {megabytes(total)} after "
                "decompression, as a decompression bomb has. If it contains data, save it with numpy.savez instead of "
                f"savez_compressed, or raise the limit with {MEMORY}=16GB"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays in the archive."""
        return tuple(self._sizes)

    def rows(self, name: str) -> int:
        """Return the length of the first axis of an array in the archive, which is read from the array's header. It is
        0 for a scalar.
        """
        shape, *_ = self._read(name, 0)
        return shape[0] if shape else 0

    def array(self, name: str, *, stop: int | None = None) -> NDArray[Any]:
        """Return an array of the archive or its first `stop` rows. Only these rows are decompressed."""
        shape, fortran, dtype, content = self._read(name, stop)
        if fortran:
            return np.frombuffer(content, dtype).reshape(shape[::-1]).T.copy()[:stop]
        rows = shape if stop is None or not shape else (min(stop, shape[0]), *shape[1:])
        return np.frombuffer(content, dtype).reshape(rows).copy()

    def _read(self, name: str, stop: int | None) -> tuple[tuple[int, ...], bool, np.dtype[Any], bytes]:
        try:
            with (
                opened(self.path, self._what) as packed,
                zipfile.ZipFile(packed) as archive,
                archive.open(f"{name}.npy") as file,
            ):
                shape, fortran, dtype = _header(file)
                if dtype.hasobject:
                    raise TargetError(
                        f"{name} in {str(self.path)!r} contains pickled objects, which are never opened; save numbers"
                    )
                # prod of Python integers, which cannot overflow as those of numpy can for a shape from an untrusted
                # header.
                size, start = dtype.itemsize * prod(shape), file.tell()
                if min(shape, default=0) < 0 or (shape and shape[0] and not size):
                    raise ValueError(f"{name} has the shape {shape} of {dtype}, whose rows are empty")
                # The header and the archive must declare the same size; otherwise one of them was altered.
                if start + size != self._sizes[name]:
                    raise ValueError(
                        f"{name} declares {megabytes(size)}, but has {megabytes(self._sizes[name] - start)}"
                    )
                if stop is not None and shape and not fortran:
                    size = dtype.itemsize * prod((min(stop, shape[0]), *shape[1:]))
                # At most the declared number of bytes is decompressed, whatever the archive contains.
                content = file.read(size)
                if len(content) != size:
                    raise ValueError(f"{name} ends early")
        except KeyError:
            raise TargetError(
                f"{str(self.path)!r} has no array {name!r}; it has {names_of(self.names)}"
            ) from None
        except _DAMAGE as error:
            raise TargetError(
                f"{str(self.path)!r} is damaged or truncated: {reason_of(error)}; download or write it again"
            ) from error
        return shape, fortran, dtype, content


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version == (2, 0):
        return npy.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the .npy format is unknown")


def arrays_of_split(
    archive: Npz, split: str | None, name: str, *, needs_labels: bool = True
) -> tuple[str, str | None]:
    """Return the names of the arrays in an `.npz` archive that contain the inputs and the labels of a split: `x_SPLIT`
    and `y_SPLIT`.

    If `split` is None, they are those of `test` if it exists, else `x` and `y`. `name` is the name of the archive in
    error messages. Unless `needs_labels` is True, the second name is None if there are no labels.
    """
    pairs: Mapping[str, tuple[str, str]] = {
        name.removeprefix("x_"): (name, f"y_{name.removeprefix('x_')}")
        for name in archive.names
        if name.startswith("x_")
    }
    if split is None and "test" not in pairs and "x" in archive.names:
        x, y = "x", "y"
    elif (split or "test") in pairs:
        x, y = pairs[split or "test"]
    else:
        raise _no_split(archive, split, pairs, name)
    if y not in archive.names and not needs_labels:
        return x, None
    if y not in archive.names:
        others = tuple(other for other in archive.names if other != x)
        if not others:
            raise TargetError(
                f"{name!r} has the inputs {x}, and no other array; save the labels in it as {y}"
            )
        labels = data_argument("y", Placeholder("NAME"))
        raise TargetError(
            f"{name!r} has the inputs {x}, and no labels {y}; its other arrays are {names_of(others)}",
            data_argument("x", x, also=(labels,), reason="with the name of the labels"),
        )
    return x, y


def named_arrays(
    archive: Npz, x: str | None, y: str | None, split: str | None, name: str, *, needs_labels: bool = True
) -> tuple[str, str | None]:
    """Check that an `.npz` archive contains the arrays that the user names for the inputs and the labels. Return these
    two names.

    The arrays are a single set without splits, so a `split` raises `NoSplit`. Unless `needs_labels` is True, the labels
    may be left out.
    """
    holds = names_of(archive.names)
    if not x or (not y and needs_labels):
        option, missing = (f"x is {x}", "y") if x else (f"y is {y}", "x")
        raise UsageError(
            f"{option}, which is one of two arrays of {name!r}; it has {holds}",
            data_argument(missing, Placeholder("NAME"), reason="for the other array"),
        )
    for argument, array in (("x", x), ("y", y)):
        if array and array not in archive.names:
            raise UsageError(f"{argument} is {array}, but {name!r} has no such array; it has {holds}")
    if split is not None:
        raise NoSplit(
            f"the arrays {x} and {y} are one set of examples in {name!r}, which has no split {split!r}",
            data_argument("split"),
        )
    return x, y or None


def _no_split(
    archive: Npz, split: str | None, pairs: Mapping[str, object], name: str
) -> TargetError | NoSplit:
    if split is not None and pairs:
        suggestion = similar_name(split, pairs)
        return NoSplit(f"{name!r} has no split {split!r}{suggestion}; it has {names_of(tuple(pairs))}")
    holds = names_of(archive.names)
    if split is not None and "x" in archive.names:
        return NoSplit(
            f"{name!r} contains {holds}, but no split {split!r}; save x_{split} and y_{split} in it",
            data_argument("split"),
        )
    return TargetError(
        f"{name!r} has neither x_test, y_test nor x, y; it has {holds}",
        data_argument(
            "x",
            Placeholder("NAME"),
            also=(data_argument("y", Placeholder("NAME")),),
            reason="with the names of the arrays",
        ),
    )
