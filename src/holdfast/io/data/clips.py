"""Data sets of clips: `.wav` and `.flac` files in one folder per class, and arrays whose sampling rate is declared.

A set has one sampling rate and one number of channels. Clips are padded with zeros at the end to the longest one.
"""

import io
import re
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import gcd
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.core.chain import digest
from holdfast.core.errors import TargetError, UsageError, data_argument
from holdfast.core.model import Bounds
from holdfast.io.data import dicom, pictures
from holdfast.io.data.arrays import FULL_SCALE, Array, Arrays, Choice, from_numpy
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.files import existing, megabytes, replacing
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.clips import SAMPLES
from holdfast.io.sandbox.sandbox_main import MEMORY, Limits, requested_memory

SUFFIXES = (".wav", ".flac")
LIMITS = Limits(copies=16, spare_bytes=2**31)
"""Limits of the process that decodes all files of a set; FLAC takes a few times less than its samples as floats."""
MAX_BYTES = 4 * 2**30
"""Largest size of the padded clips of a set in bytes."""
SIGNAL_BOUNDS = Bounds(-1.0, 1.0)
"""Valid range of the samples of a clip."""
_CLIPPED = 3
"""Number of successive samples at full scale from which a clip counts as clipped; a single peak may be there."""


def suffix_of_files(folder: Path) -> str:
    """Return the suffix of a clip or an image in the class folders of a folder, or in those of its splits, in lower
    case; empty if there is none.
    """
    first = next(_clips_in(folder, (*SUFFIXES, *pictures.SUFFIXES, *dicom.SUFFIXES)), None)
    return "" if first is None else first.suffix.lower()


def _clips_in(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[Path]:
    """Yield the files with one of the suffixes in the class folders of a folder and of its splits, in any order."""
    files = chain(folder.glob("*/*"), folder.glob("*/*/*"))
    return (path for path in files if path.suffix.lower() in suffixes)


def open_clips(
    folder: Path,
    choice: Choice,
    expected: DeclaredData,
    *,
    sampling_rate: int | None = None,
    follow_links: bool = False,
) -> Arrays:
    """Return a data set of the clips in a folder with one subfolder for each class; see `class_folders`.

    The inputs are (N, samples) of one channel, else (N, channels, samples), with values from -1 to 1. They are as long
    as the longest clip of all splits, and of the first data of the run, so that the selection of examples does not
    change the inputs. Clips with another rate than `sampling_rate` are resampled to it.

    Raises `TargetError` that names a file: for clips of several rates, if no rate is given, for several numbers of
    channels, for samples that are not finite numbers from -1 to 1, and for clips that the model does not accept.
    """
    files = pictures.class_folders(folder, choice, SUFFIXES, "clip", follow_links=follow_links)
    on_disk = sum(existing(path, "clip").stat().st_size for path in files.paths)
    names = tuple(map(str, files.paths))
    others = tuple(sorted({str(path) for path in _clips_in(folder)} - {*names}))
    with read_under_limits(
        "clips", files.root, LIMITS, n_bytes_beside=on_disk, files=names, others=others
    ) as (read, at):
        rates, channels, lengths, kinds = zip(*read["clips"], strict=True)
        _refuse_mixed(names, channels, "number of channels", "{:,}", "convert them to mono")
        if sampling_rate is None:
            _refuse_mixed(names, rates, "sampling rate", "{:,} Hz", "", (rates[0],))
            _refuse_other_rate(names[0], rates[0], expected)
        rate = sampling_rate or rates[0]
        clips = _samples(at / SAMPLES, channels[0], lengths, kinds)
    for name, clip in zip(names, clips, strict=True):
        _refuse_values(name, clip)
    clips = [_resampled(clip, old, rate) for clip, old in zip(clips, rates, strict=True)]
    first = 0 if expected.first is None else expected.first.samples
    x = _padded(clips, names, max([first, *(-(-n * rate // old) for old, n in read["others"])]))
    if expected.probe is None:
        expected = replace(expected, bounds=SIGNAL_BOUNDS)
    longest = names[max(range(len(clips)), key=lambda place: clips[place].shape[1])]
    refuse_misfit(x, expected, longest, rate, of_files=True)
    y, classes, objection, notes = files.numbered(expected, choice.n)
    changed = sum(old != rate for old in rates)
    if changed:
        notes += (
            f"{changed:,} of {len(clips):,} clips {'was' if changed == 1 else 'were'} resampled to {rate:,} Hz",
        )
    seconds = [clip.shape[1] / rate for clip in clips]
    ends = (
        f"{min(seconds):.3g} to {max(seconds):.3g} s"
        if min(seconds) < max(seconds)
        else f"{seconds[0]:.3g} s"
    )
    whole = x.shape[-1] / rate
    padded = f", padded with zeros to {whole:.3g} s" if min(seconds) < whole else ""
    notes += (f"{len(clips):,} clips of {ends} at {rate:,} Hz{padded}", *files.notes)
    data = from_numpy(
        str(folder),
        x,
        y,
        files.rows,
        expected,
        layout="asis" if x.ndim == 3 else None,
        class_names=classes,
        notes=(*notes, *_notes_on_values(x, lambda row: repr(names[row]))),
    )
    return replace(data, objection=objection, text_labels=True, sampling_rate=rate)


def with_rate(data: Arrays, sampling_rate: int | None) -> Arrays:
    """Return arrays of clips with the declared sampling rate, and notes on their samples for the report; the data set
    itself if no rate is declared, or the files state it.
    """
    if sampling_rate is None or data.sampling_rate is not None:
        return data
    seconds = data.x.shape[-1] / sampling_rate
    notes = (
        f"{len(data):,} clips of {seconds:.3g} s at {sampling_rate:,} Hz, as declared",
        *_notes_on_values(data.x, lambda row: f"row {data.ids[row]}"),
    )
    return replace(data, sampling_rate=sampling_rate, notes=(*data.notes, *notes))


def _samples(
    path: Path, channels: int, lengths: Sequence[int], kinds: Sequence[str]
) -> list[NDArray[np.generic]]:
    """Return the samples (channels, length) of each clip: int16 if no clip has more bits, else float32 from -1 to 1."""
    clips: list[NDArray[np.generic]] = []
    with path.open("rb") as file:
        for n, kind in zip(lengths, kinds, strict=True):
            values = np.fromfile(file, kind, n * channels).reshape(n, channels).T
            clips.append(values if len({*kinds}) == 1 else _floats(values))
    return clips


def _floats(samples: Array) -> Array:
    return samples.astype(np.float32) / np.float32(FULL_SCALE) if samples.dtype == np.int16 else samples


def _resampled(clip: Array, rate: int, wanted: int) -> Array:
    """Return a clip (channels, length) at another sampling rate, by a polyphase filter that removes what is above both
    Nyquist frequencies. Peaks that the filter raises above full scale are cut there, as in a file.
    """
    if rate == wanted:
        return clip
    from scipy.signal import resample_poly  # late: it takes long to import

    factor = gcd(rate, wanted)
    values = resample_poly(_floats(clip).astype(np.float64), wanted // factor, rate // factor, axis=1)
    inside: Array = values.clip(-1, 1).astype(np.float32)
    return inside


def _padded(clips: Sequence[Array], names: Sequence[str], least: int) -> Array:
    """Return all clips in one array, with zeros at the end of those shorter than the longest one or `least`."""
    lengths = [clip.shape[1] for clip in clips]
    place = max(range(len(clips)), key=lengths.__getitem__)
    n = max(least, lengths[place])
    kind = clips[0].dtype if len({clip.dtype for clip in clips}) == 1 else np.dtype(np.float32)
    n_bytes = len(clips) * len(clips[0]) * n * kind.itemsize
    if n_bytes > max(MAX_BYTES, requested_memory()):
        raise TargetError(
            f"{len(clips):,} clips padded to {n:,} samples, the length of the longest clip of all splits, take "
            f"{megabytes(n_bytes)}; at most {megabytes(MAX_BYTES)} is read: cut or remove long clips, as "
            f"{names[place]!r} is, or raise the limit with {MEMORY}=16GB",
            data_argument("sample", 100),
        )
    x = np.zeros((len(clips), len(clips[0]), n), kind)
    for row, clip in zip(x, clips, strict=True):
        row[:, : clip.shape[1]] = clip if clip.dtype == kind else _floats(clip)
    return x[:, 0] if x.shape[1] == 1 else x


def _refuse_mixed(
    names: Sequence[str],
    values: Sequence[int],
    what: str,
    form: str,
    advice: str,
    remedy: tuple[int, ...] = (),
) -> None:
    """Raise `TargetError` for the first clip with another value than the first clip has."""
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise TargetError(
                f"clips differ in their {what}: {names[0]!r} has {form.format(values[0])}, {name!r} "
                f"{form.format(value)}; one value was expected{advice and f': {advice}'}",
                *(data_argument("sampling_rate", each, reason="to resample them") for each in remedy),
            )


def _refuse_other_rate(name: str, rate: int, expected: DeclaredData) -> None:
    """Raise `TargetError` if the first data of the run have another sampling rate."""
    first = expected.first
    if first is not None and first.sampling_rate not in (None, rate):
        raise TargetError(
            f"clip {name!r} has {rate:,} Hz, and {first.name} has {first.sampling_rate:,} Hz; one sampling rate was "
            "expected",
            data_argument("sampling_rate", first.sampling_rate, reason="to resample them"),
        )


def _refuse_values(name: str, clip: Array) -> None:
    """Raise `TargetError` for a sample that is no finite number from -1 to 1."""
    if clip.dtype == np.int16:
        return
    wrong = ~(np.abs(clip) <= 1).all(0)  # NaN is not comparable
    if wrong.any():
        place = int(wrong.argmax())
        values = clip[:, place]
        value = values[~(np.abs(values) <= 1)][0]
        advice = (
            "divide the clip by its largest value" if np.isfinite(value) else "repair the clip, or remove it"
        )
        raise TargetError(
            f"clip {name!r} has {value:.6g} at sample {place:,}; numbers from -1 to 1 were expected: {advice}"
        )


def refuse_misfit(x: Array, expected: DeclaredData, name: str, rate: int, *, of_files: bool) -> None:
    """Raise `TargetError` if the model accepts clips neither as they are nor with an axis for one channel.

    `name` is that of the longest clip (`of_files`), or of the file with the array of clips, whose channels may be last.
    """
    probe = expected.probe
    if probe is None or probe.model.remote or x.ndim not in (2, 3):
        return
    few = torch.from_numpy(np.array(_floats(x[[0, min(1, len(x) - 1)]])))
    last = few.transpose(1, -1)

    def accepted(*inputs: torch.Tensor) -> bool:
        return any(probe.outputs(each, whole=whole) is not None for whole in (True, False) for each in inputs)

    if accepted(few) or ((x.ndim == 2 or not of_files) and accepted(few[:, None], last)):
        return
    reason = "" if probe.refused is None else probe.refused.message
    for axis in (1, 2)[: 1 if of_files else 2]:
        if x.ndim == 3 and accepted(few.mean(axis), few.mean(axis)[:, None]):
            what, advice = (
                (f"clip {name!r} has", "convert the clips to mono")
                if of_files
                else (f"the clips in {name!r} have", f"store the mean of the channels, x.mean(axis={axis})")
            )
            raise TargetError(
                f"{what} {x.shape[axis]} channels, and the model accepts one; {advice}, or average the channels at the "
                f"beginning of the model, as in x.mean({axis})"
            )
    n = x.shape[-1] if of_files or x.ndim == 2 else max(x.shape[1:])
    place = f", the length of the longest, {name!r}" if of_files else f", as in {name!r}"
    raise TargetError(
        f"the model does not accept clips of {n:,} samples ({n / rate:.3g} s at {rate:,} Hz){place}: {reason}; clips "
        "of the length and the sampling rate of its training were expected"
    )


def _notes_on_values(x: Array, name_of: Callable[[int], str]) -> tuple[str, ...]:
    """Return notes on clips without sound, and on clipped ones. `name_of` returns the name of a row."""
    highest = FULL_SCALE - 1 if x.dtype == np.int16 else (FULL_SCALE - 1) / FULL_SCALE
    full = (x >= highest) | (x <= -highest)
    successive = full[..., : x.shape[-1] - _CLIPPED + 1].copy()
    for shift in range(1, _CLIPPED):
        successive &= full[..., shift : shift + successive.shape[-1]]
    silent, clipped = (~x.reshape(len(x), -1).any(1), successive.reshape(len(x), -1).any(1))
    counted = (
        (
            silent,
            ("has", "have"),
            "no sound",
            "; silence has no signal-to-noise ratio, and threats relative to the clip exclude it",
        ),
        (clipped, ("is", "are"), f"clipped ({_CLIPPED} or more successive samples at full scale)", ""),
    )
    return tuple(
        f"{rows.sum():,} of {len(x):,} clips {verbs[int(rows.sum() > 1)]} {what}, first "
        f"{name_of(int(rows.argmax()))}{consequence}"
        for rows, verbs, what, consequence in counted
        if rows.any()
    )


def refuse_rate(address: str, sampling_rate: int | None) -> None:
    """Raise `UsageError` for a sampling rate that is declared for a folder without clips."""
    if sampling_rate is not None:
        raise UsageError(
            f"{address!r} has no clips, and sampling_rate is {sampling_rate}", data_argument("sampling_rate")
        )


def wav_content(x: torch.Tensor, sampling_rate: int) -> bytes:
    """Return a clip (samples), or (channels, samples), with values from -1 to 1 as the content of a `.wav` file of 16
    bits.
    """
    levels = (x.detach().cpu().double() * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1)
    samples = (levels[None] if x.dim() == 1 else levels).T.contiguous().numpy().astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(samples.shape[1])
        output.setsampwidth(2)
        output.setframerate(sampling_rate)
        output.writeframes(samples.tobytes())
    return file.getvalue()


def write_clips(
    folder: Path, x: torch.Tensor, y: Sequence[int], ids: Sequence[int], classes: Sequence[str], rate: int
) -> dict[str, str]:
    """Write clips with the labels `y` as `.wav` files of 16 bits into one folder for each class, which `open_clips`
    reads. They keep their padding, on which the outputs of a model may depend. Return the SHA-256 of each file by its
    path in the folder.

    A class whose name is no name of a folder gets its number. Raises `TargetError` if a file cannot be written.
    """
    named = all(re.fullmatch(r"\w[\w .-]{0,99}", name) for name in classes)
    folders = [folder / (name if named else str(place)) for place, name in enumerate(classes)]
    digests = {}
    try:
        for each in folders:
            each.mkdir(parents=True, exist_ok=True)
        for clip, label, example in zip(x, y, ids, strict=True):
            path, content = folders[label] / f"{example}.wav", wav_content(clip, rate)
            with replacing(path) as file:
                file.write(content)
            digests[path.relative_to(folder).as_posix()] = digest(content)
    except OSError as error:
        raise TargetError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error
    return digests
