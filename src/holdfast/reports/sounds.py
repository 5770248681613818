"""Clips for reports: spectrograms of the clean and the changed clip and of their difference, and both to play."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, pad

from holdfast.io.data.clips import wav_content
from holdfast.reports import tree
from holdfast.threats.signals import sound_of

LONGEST_S = 2.0
"""Longest part of a clip that a report contains, in seconds."""
_MOST_BYTES = 128 * 1024
"""Largest part of a clip that a report contains, in bytes: 12 examples of two clips then take 4 MB."""
_SIDE = 128
"""Numbers of rows (frequencies) and of columns (times) of a spectrogram."""
_WINDOW_S = 0.032
"""Length of the window of a spectrogram, usual for speech."""
_RANGE = 80.0
"""Range of the colours of a spectrogram in decibels. That of 16 bits is 96."""
_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours from quiet to loud, of even differences in lightness: the colour map inferno, at five places."""


def signal_example(x: Tensor, x_adv: Tensor, sampling_rate: int | None) -> dict[str, Any]:
    """Return a broken clip for the JSON of a report: the spectrograms, in one scale, and both clips as `.wav` files,
    cut after `LONGEST_S`.

    Padding is left out. There are no files if the sampling rate is unknown.
    """
    names = ("clean", "perturbed", "difference")
    pictures = spectrograms((x, x_adv, x_adv - x), x, sampling_rate)
    n = _sounding(x)
    sounds = [
        None if sampling_rate is None else _url(each[..., : _played(x, sampling_rate)], sampling_rate)
        for each in (x, x_adv)
    ]
    return {
        "kind": "signal",
        **dict(zip(names, pictures, strict=True)),
        "snr_db": snr(x, x_adv),
        "seconds": None if sampling_rate is None else n / sampling_rate,
        "played_s": None if sampling_rate is None else _played(x, sampling_rate) / sampling_rate,
        "clean_sound": sounds[0],
        "perturbed_sound": sounds[1],
    }


def _sounding(x: Tensor) -> int:
    """Return the number of samples of a clip without its padding."""
    return int(sound_of(x[None])[0].reshape(-1, x.shape[-1]).any(0).nonzero().max()) + 1


def _played(x: Tensor, sampling_rate: int) -> int:
    """Return the number of samples of a clip that a report contains."""
    channels = 1 if x.dim() == 1 else x.shape[0]
    return min(_sounding(x), int(LONGEST_S * sampling_rate), _MOST_BYTES // (2 * channels))


def spectrograms(clips: Sequence[Tensor], x: Tensor, sampling_rate: int | None) -> list[str]:
    """Return the spectrograms of clips as data URLs of PNGs, without the padding of the clip `x`. Their colours have
    one scale, whose upper end is the loudest point of all.
    """
    powers = [_power(each[..., : _sounding(x)], sampling_rate) for each in clips]
    loudest = max(float(power.max()) for power in powers)
    return [_picture(power, loudest) for power in powers]


def heard(
    clips: Sequence[Tensor], captions: Sequence[str], x: Tensor, sampling_rate: int | None
) -> tuple[tree.Sound, ...]:
    """Return the first part of each clip as a sound with its caption; none if the sampling rate is unknown."""
    if sampling_rate is None:
        return ()
    n = _played(x, sampling_rate)
    part = "" if n == _sounding(x) else f", first {n / sampling_rate:.2g} s"
    return tuple(
        tree.Sound(_url(clip[..., :n], sampling_rate), f"{caption}{part}", f"Play {caption}")
        for clip, caption in zip(clips, captions, strict=True)
    )


def snr(x: Tensor, x_adv: Tensor) -> float | None:
    """Return the signal-to-noise ratio of a changed clip in decibels; None if nothing changed, or the clip is
    silent.
    """
    signal, noise = (float(each.double().norm()) for each in (x, x_adv - x))
    return 20 * math.log10(signal / noise) if signal and noise else None


def shown_signal(example: Mapping[str, Any]) -> list[tree.Block]:
    """Return the blocks of a report that show an example of `signal_example`."""
    at, labels = example["id"], (example["clean_prediction"], example["adversarial_prediction"])
    size = "" if example["snr_db"] is None else f"; the change is {example['snr_db']:.1f} dB below the clip"
    blocks: list[tree.Block] = [
        tree.Paragraph(f"{labels[0]} becomes {labels[1]}{size}", "notebook"),
        tree.Pictures(
            [
                tree.Picture(example[name], name, f"Spectrogram of {what} {at}", value)
                for name, what, value in (
                    ("clean", "the clean clip", str(labels[0])),
                    ("perturbed", "the perturbed clip", str(labels[1])),
                    ("difference", "the difference of both clips", "same scale"),
                )
            ],
            columns=3,
            depth="notebook",
        ),
    ]
    if example["clean_sound"] is not None:
        part = "" if example["played_s"] >= example["seconds"] else f", first {example['played_s']:.2g} s"
        sounds = [
            tree.Sound(example[f"{name}_sound"], f"{name}{part}", f"Play the {name} clip {at}")
            for name in ("clean", "perturbed")
        ]
        blocks.append(tree.Sounds(sounds))
    return blocks


def _power(x: Tensor, sampling_rate: int | None) -> Tensor:
    """Return the power (frequencies, times) of the mean of the channels in short windows, in `_SIDE` rows."""
    samples = x.float().nan_to_num().reshape(-1, x.shape[-1]).mean(0)
    window = 2 * _SIDE if sampling_rate is None else 2 ** round(math.log2(_WINDOW_S * sampling_rate))
    window = max(window, 2 * _SIDE)
    samples = pad(samples, (0, max(0, window + 1 - len(samples))))
    hop = max(1, len(samples) // _SIDE)
    frames = torch.stft(samples, window, hop, window=torch.hann_window(window), return_complex=True)
    power = frames.abs().square()[1:]  # without the mean
    return adaptive_avg_pool1d(adaptive_avg_pool1d(power[None], _SIDE).mT, _SIDE).mT[0]


def _picture(power: Tensor, loudest: float) -> str:
    """Return a spectrogram as the data URL of a PNG, with high frequencies at the top."""
    from PIL import Image

    decibels = 10 * torch.log10((power / (loudest or 1.0)).clamp_min(1e-30))
    levels = ((1 + decibels / _RANGE).clamp(0, 1) * 255).round().to(torch.uint8).flip(0).numpy()
    places = np.linspace(0, 255, len(_COLOURS))
    palette = np.stack([np.interp(np.arange(256), places, colour) for colour in zip(*_COLOURS, strict=True)])
    image = Image.fromarray(levels)
    image.putpalette(palette.T.round().astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _url(x: Tensor, sampling_rate: int) -> str:
    return "data:audio/wav;base64," + base64.b64encode(wav_content(x, sampling_rate)).decode()
