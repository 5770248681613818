"""Data sets of grey images in DICOM files (`.dcm`), in one folder per class."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from holdfast.core.errors import TargetError, UsageError, data_argument
from holdfast.io.data import pictures
from holdfast.io.data.arrays import BITS, Arrays, Choice, from_numpy
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.files import existing, megabytes
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.dicom import PIXELS
from holdfast.io.sandbox.sandbox_main import MEMORY, Limits, requested_memory

SUFFIXES = (".dcm",)
LIMITS = Limits(copies=16, spare_bytes=2**31)
"""Limits of the process that decodes all files of a set. Few of them are compressed."""
MAX_BYTES = 4 * 2**30
"""Largest size of the pixels of a set in bytes."""


def open_dicom(folder: Path, choice: Choice, expected: DeclaredData, *, follow_links: bool = False) -> Arrays:
    """Return a data set of the images in the DICOM files of a folder with one subfolder for each class; see
    `class_folders`.

    The inputs are (N, 1, rows, columns), from 0 to 1: the stored values divided by the largest of their number of bits
    (BitsStored). Those of MONOCHROME1 are inverted. Rescaling and windows of the files are not applied.

    Raises `TargetError` that names a file: for images of several sizes or numbers of bits, in colour or of several
    frames.
    """
    if expected.bits is not None:
        raise UsageError(
            f"bits is {expected.bits}, and the DICOM files of {str(folder)!r} state their own bits", BITS
        )
    files = pictures.class_folders(folder, choice, SUFFIXES, "DICOM file", follow_links=follow_links)
    names = tuple(map(str, files.paths))
    on_disk = sum(existing(path, "DICOM file").stat().st_size for path in files.paths)
    with read_under_limits("dicom", files.root, LIMITS, n_bytes_beside=on_disk, files=names) as (read, at):
        _refuse_mixed(names, read["images"])
        rows, columns, bits = read["images"][0]
        n_bytes = (at / PIXELS).stat().st_size
        if n_bytes > max(MAX_BYTES, requested_memory()):
            raise TargetError(
                f"{str(files.root)!r} holds {len(names):,} images of {rows} x {columns} pixels, which take "
                f"{megabytes(n_bytes)}; at most {megabytes(MAX_BYTES)} is read. Raise the limit with {MEMORY}=16GB",
                data_argument("sample", 100),
            )
        x = np.fromfile(at / PIXELS, "<u2").reshape(-1, 1, rows, columns)
    y, classes, objection, notes = files.numbered(expected, choice.n)
    note = f"the pixels of the DICOM files have {bits} bits, and were divided by {2**bits - 1}; no window was applied"
    data = from_numpy(
        str(folder),
        x,
        y,
        files.rows,
        replace(expected, bits=bits),
        layout="chw",
        class_names=classes,
        notes=(note, *files.notes, *notes),
    )
    return replace(data, objection=objection, text_labels=True)


def _refuse_mixed(names: Sequence[str], images: Sequence[Sequence[int]]) -> None:
    """Raise `TargetError` for the first image with another size or another number of bits than the first one."""
    (rows, columns, bits), first = images[0], names[0]
    for name, (other_rows, other_columns, other_bits) in zip(names, images, strict=True):
        if (other_rows, other_columns) != (rows, columns):
            raise TargetError(
                f"images differ in size: {first!r} is {columns} x {rows}, {name!r} is {other_columns} x {other_rows}; "
                "resize them to the size that the model takes"
            )
        if other_bits != bits:
            raise TargetError(
                f"images differ in the bits of a pixel: {first!r} has {bits} bits, {name!r} has {other_bits}; write "
                "them with one number of bits"
            )
