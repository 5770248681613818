"""Decodes `.wav` and `.flac` files by soundfile, in a limited process."""

from collections.abc import Sequence
from contextlib import suppress
from io import SEEK_CUR, SEEK_END
from pathlib import Path
from typing import IO, Any, Literal

from holdfast.core.errors import TargetError, importing
from holdfast.io.files import opened

SAMPLES = "samples"
"""Name of the file with the samples of all clips, one after the other, with the channels of a sample beside each
other."""
_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")
NO_SIZE = 0x7FFFF000
"""Smallest size of samples that programs write into the header of a WAV file whose size is not known yet."""
_IN_16_BITS = ("PCM_16", "PCM_S8", "PCM_U8")
"""Encodings whose samples have at most 16 bits."""


def read(
    path: Path, content: bytes | None, folder: Path, files: Sequence[str], others: Sequence[str]
) -> dict[str, Any]:
    """Write the samples of the files into the folder, and return the sampling rate, the number of channels, the number
    of samples and the type of each, int16 or float32; of other files, rate and number of samples alone. Raises
    `TargetError` that names one of the files which has no samples or cannot be decoded.
    """
    assert content is None, "clips are read from their files"
    soundfile = importing("soundfile", f"{files[0]!r} is a clip, which the package soundfile reads", "audio")
    clips = []
    with (folder / SAMPLES).open("wb") as output:
        for name in files:
            with opened(Path(name), "clip") as file:
                try:
                    with soundfile.SoundFile(file) as sound:
                        kind = "int16" if sound.subtype in _IN_16_BITS else "float32"
                        n, channels, rate, format_name = (
                            sound.frames,
                            sound.channels,
                            sound.samplerate,
                            sound.format,
                        )
                        # of other formats nothing is decoded
                        samples = sound.read(n, kind, always_2d=True) if format_name in _FORMATS else None
                    stated, present = _sample_bytes(file)
                except soundfile.LibsndfileError as error:
                    raise TargetError(
                        f"clip {name!r} cannot be read as WAV or FLAC: {error.error_string} Write it again, as PCM of "
                        "16 bits"
                    ) from error
            if samples is None:
                raise TargetError(
                    f"clip {name!r} has the format {format_name}; WAV or FLAC was expected: convert it"
                )
            if len(samples) != n or not n:
                raise TargetError(
                    f"clip {name!r} has {len(samples):,} samples, and {n or 'at least 1'} was expected; it is empty or "
                    "truncated: write it again, or remove it"
                )
            if present < stated:
                raise TargetError(
                    f"clip {name!r} is truncated: it has {present:,} bytes of samples, and its header states "
                    f"{stated:,}; write it again, or remove it"
                )
            output.write(samples.tobytes())
            clips.append((rate, channels, n, kind))
    headers = []
    for name in others:
        # a file that is not used may be damaged
        with suppress(TargetError, soundfile.LibsndfileError), opened(Path(name), "clip") as file:
            header = soundfile.info(file)
            headers.append((header.samplerate, header.frames))
    return {"clips": clips, "others": headers}


def _sample_bytes(file: IO[bytes]) -> tuple[int, int]:
    """Return the number of bytes of samples that the header of a WAV file states, and the number that the file has.
    Both are 0 for other formats, and for files that were written to a pipe, whose headers state no size.
    """
    file.seek(0)
    orders: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"RIFX": "big"}
    order = orders.get(file.read(4))
    file.seek(12)
    while order is not None and len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], order)
        if head[:4] == b"data":
            start = file.tell()
            return (size, file.seek(0, SEEK_END) - start) if size < NO_SIZE else (0, 0)
        file.seek(size + size % 2, SEEK_CUR)
    return 0, 0


def prepare() -> None:
    """Import the library that reads clips, before the memory of the process is limited."""
    with suppress(ImportError):  # reported when the files are read
        import soundfile  # noqa: F401
