"""Reads `.npz` archives one array after the other, and reads and writes the trigger of a backdoor in them."""

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
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import NoSplit, Placeholder, TargetError, UsageError, data_argument
from holdfast.io.files import (
    megabytes,
    names_of,
    opened,
    reason_of,
    refuse_address,
    refusing,
    replacing,
    similar_name,
)
from holdfast.io.sandbox.sandbox_main import MEMORY, requested_memory
from holdfast.threats.triggers import Stamped, Trigger, trigger_text

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
        shape = self.shape(name)
        return shape[0] if shape else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array in the archive, which is read from the array's header."""
        shape, *_ = self._read(name, 0)
        return shape

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


MOST_VALUES = 1 << 20
"""Largest number of values of a pattern, because the trigger is stored with each run: more than an image of 3x512x512
has."""
_MOST_CLASSES = 10**6


def read_trigger(path: str | Path) -> Trigger:
    """Return the trigger in a file. Raises `TargetError` if it contains none."""
    name, archive = repr(str(path)), Npz(Path(path), "trigger file")
    pattern, mask = (_values(archive, array, name) for array in ("pattern", "mask"))
    shape = tuple(pattern.shape)
    if not shape or not 0 < pattern.numel() <= MOST_VALUES:
        raise TargetError(
            f"pattern in {name} has the shape {shape}; the shape of one input was expected, with at most "
            f"{MOST_VALUES:,} values"
        )
    if tuple(mask.shape) not in (shape, (1, *shape[1:])):
        raise TargetError(
            f"mask in {name} has the shape {tuple(mask.shape)}; expected that of pattern, {shape}, or with a first "
            "axis of size 1"
        )
    if mask.min() < 0 or mask.max() > 1:
        raise TargetError(
            f"mask in {name} ranges from {float(mask.min()):.4g} to {float(mask.max()):.4g}; expected shares from 0 to "
            "1"
        )
    shift = _values(archive, "shift", name) if "shift" in archive.names else None
    if shift is not None and tuple(shift.shape) != shape:
        raise TargetError(
            f"shift in {name} has the shape {tuple(shift.shape)}; that of pattern, {shape}, was expected"
        )
    if not mask.any() and (shift is None or not shift.any()):
        raise TargetError(
            f"mask and shift in {name} are 0 everywhere, so that the trigger changes nothing; write a trigger with "
            "values above 0"
        )
    return Trigger(mask, pattern, _target(archive, name), shift, _ends(archive, name))


def write_trigger(path: str | Path, trigger: Trigger) -> None:
    """Write a trigger to a file that `read_trigger` reads. Raises `TargetError` if it cannot be written."""
    arrays = {"mask": trigger.mask, "pattern": trigger.pattern, "shift": trigger.shift}
    present = {
        name: values.detach().cpu().numpy().astype(np.float32)
        for name, values in arrays.items()
        if values is not None
    }
    target: dict[str, Any] = {} if trigger.target is None else {"target": np.int64(trigger.target)}
    if trigger.ends is not None:
        target |= dict(zip(("low", "high"), map(np.float64, trigger.ends), strict=True))
    try:
        with replacing(Path(path)) as file:  # savez would append another suffix to a name
            np.savez(file, allow_pickle=False, **present, **target)
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror or error}") from error


def trigger_threat(*, file: str) -> Stamped:
    """Return the constraint that inputs get the trigger of a file. Raises `UsageError` or `TargetError` for a file that
    contains none.
    """
    refuse_address(file, "the trigger is", "trigger:drill.trigger.npz")
    return Stamped(file, trigger_text(read_trigger(file)))


def _values(archive: Npz, array: str, name: str) -> Tensor:
    """Return an array of finite numbers of the archive as 32-bit floats."""
    values = archive.array(array)
    if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
        raise TargetError(
            f"{array} in {name} contains {values.dtype}{' with NaN or infinity' if values.dtype.kind == 'f' else ''}; "
            "finite numbers were expected"
        )
    return torch.from_numpy(values.astype(np.float32))


def _ends(archive: Npz, name: str) -> tuple[float, float] | None:
    """Return the lowest and the highest valid value of the archive; None without them."""
    present = [key for key in ("low", "high") if key in archive.names]
    if not present:
        return None
    if len(present) == 1:
        raise TargetError(
            f"{name} has the array {present[0]}; both low and high, or none of them, were expected"
        )
    values = [_values(archive, key, name) for key in ("low", "high")]
    if any(each.numel() != 1 for each in values) or float(values[0]) >= float(values[1]):
        raise TargetError(f"low and high in {name} are not one number each, the first below the second")
    return float(values[0]), float(values[1])


def _target(archive: Npz, name: str) -> int | None:
    """Return the target class of the archive; None without one."""
    if "target" not in archive.names:
        return None
    target = archive.array("target")
    if target.size != 1 or target.dtype.kind not in "iu" or not 0 <= int(target.reshape(())) < _MOST_CLASSES:
        raise TargetError(
            f"target in {name} is an array {target.dtype} of shape {target.shape}; the number of one class was "
            "expected, 0 or more"
        )
    return int(target.reshape(()))
