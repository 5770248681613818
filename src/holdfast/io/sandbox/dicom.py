"""Decodes grey images in DICOM files by pydicom, in a limited process."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.core.errors import HoldfastError, TargetError, importing
from holdfast.io.files import opened

PIXELS = "pixels"
"""Name of the file with the pixels of all images, one image after the other, as little-endian integers of 16 bits."""
GREY = ("MONOCHROME1", "MONOCHROME2")
_MOST_BITS = 16


def read(path: Path, content: bytes | None, folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """Write the pixels of the files into the folder, and return the numbers of rows, columns and bits of each.

    Pixels are from 0 to 2^bits - 1, and larger ones are brighter: signed values are shifted, and those of MONOCHROME1
    inverted. Rescaling and windows are not applied. Raises `TargetError` that names one of the files which is no grey
    image of one frame, or cannot be decoded.
    """
    assert content is None, "DICOM images are read from their files"
    pydicom = importing("pydicom", f"{files[0]!r} is a DICOM file, which the package pydicom reads", "dicom")
    images = []
    with (folder / PIXELS).open("wb") as output:
        for name in files:
            with opened(Path(name), "DICOM file") as file:
                try:
                    image = pydicom.dcmread(file)
                except pydicom.errors.InvalidDicomError as error:
                    raise TargetError(
                        f"{name!r} is no DICOM file; replace it, or remove it from the folder"
                    ) from error
                except Exception as error:  # as parsers do
                    raise _undecodable(name, error) from error
                try:
                    _refuse_other_kinds(name, image)
                    bits, signed = int(image.BitsStored), bool(image.PixelRepresentation)
                    values, inverted = image.pixel_array, image.PhotometricInterpretation == GREY[0]
                except HoldfastError:
                    raise
                except Exception as error:  # decoders raise errors of many classes
                    raise _undecodable(name, error) from error
            if not 1 <= bits <= _MOST_BITS:
                raise TargetError(f"{name!r} has pixels of {bits} bits; at most {_MOST_BITS} were expected")
            highest = 2**bits - 1
            # other bits may belong to overlays; the sign of a number in two's complement is its highest bit
            levels = (values.astype(np.int64) & highest) ^ (2 ** (bits - 1) if signed else 0)
            output.write((highest - levels if inverted else levels).astype("<u2").tobytes())
            images.append((*values.shape, bits))
    return {"images": images}


def _refuse_other_kinds(name: str, image: Any) -> None:
    """Raise `TargetError` for a DICOM file without one grey image."""
    if "PixelData" not in image:
        raise TargetError(f"{name!r} has no image of whole numbers; remove it from the folder")
    kind, frames = str(image.get("PhotometricInterpretation", "")), int(image.get("NumberOfFrames") or 1)
    if kind not in GREY or image.get("SamplesPerPixel", 1) != 1:
        raise TargetError(
            f"the PhotometricInterpretation of {name!r} is {kind[:20]!r}; one grey channel was expected "
            f"({' or '.join(GREY)}): convert colours to PNG"
        )
    if image.HighBit != image.BitsStored - 1:
        raise TargetError(
            f"{name!r} stores its pixels of {image.BitsStored} bits up to bit {image.HighBit}; HighBit "
            f"{image.BitsStored - 1} was expected: write it again"
        )
    if frames != 1:
        raise TargetError(f"{name!r} has {frames} frames; one was expected: write each frame into a file")


def _undecodable(name: str, error: Exception) -> TargetError:
    return TargetError(
        f"{name!r} cannot be decoded by pydicom: {error}; if it is compressed, decompress it, and otherwise write it "
        "again"
    )


def prepare() -> None:
    """Import the library that reads DICOM files, before the memory of the process is limited."""
    with suppress(ImportError):  # reported when the files are read
        import pydicom.pixels  # noqa: F401
