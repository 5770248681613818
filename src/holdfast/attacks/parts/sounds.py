"""Sounds: random transformations of clips as by loudspeaker, room, microphone and telephone, and a random search whose
changes are short tones.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.attacks.parts.images import Transformed, around
from holdfast.core.batch import Batch, pick, spread
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Inputs, Mask
from holdfast.threats.signals import sound_of

_DECAY = math.log(1e3)  # the amplitude falls by 60 dB in the reverberation time
_REVERBERATION_S = (0.1, 0.5)  # reverberation times of furnished rooms
_DIRECT_DB = (0.0, 12.0)  # energy of the direct sound relative to that of the reflections
_FIRST_S = 0.002  # delay of the first reflection, for a difference of 0.7 m


class OverTheAir(Transformed):
    """Network that transforms each clip at random before it calls a classifier, with the limits `shift_s` (seconds),
    `room`, `low_hz`, `high_hz` and `gain_db`.

    A clip is shifted in time, filled with zeros; convolved with the impulse response of a synthetic room; filtered to
    a band; and multiplied by a gain. A response is a direct sound and noise that decays exponentially, after J. A.
    Moorer, "About this reverberation business", Computer Music Journal 3 (2), 1979. `room` scales the amplitude of its
    reflections. The edges of the band are drawn between the ends of the spectrum and the limits (Butterworth, second
    order). `sampling_rate` in Hz is set when the data are opened.
    """

    sampling_rate: int | None = None

    def suit(self, sampling_rate: int | None) -> None:
        """Set the sampling rate in Hz. Raises `UsageError` if it is None, because it is unknown."""
        if sampling_rate is None:
            raise UsageError(
                f"the transformation {', '.join(self.limits)} is in seconds and Hz, and the sampling rate of the data "
                "is unknown",
                Remedy("sampling_rate", Placeholder("HZ")),
            )
        self.sampling_rate = sampling_rate

    def view(self, x: Inputs, n: int) -> Inputs:
        """Return the clips behind `n` random transformations, one for each clip or 1 for all of them."""
        if self.sampling_rate is None:  # while the layout of the data is determined
            return x
        return self.model.bounds.clamp(over_the_air(x, n, self.limits, self.sampling_rate))


def over_the_air(x: Inputs, n: int, limits: Mapping[str, float], rate: int) -> Inputs:
    """Return the clips behind `n` random transformations (see `OverTheAir`), one for each clip or 1 for all of them.
    `rate` is their sampling rate in Hz, and random numbers are those of torch's generator.
    """
    heard, like = x, x.new_empty(())
    if "shift_s" in limits:
        heard = _shifted(heard, _between(n, -1, 1, like) * limits["shift_s"] * rate)
    if limits.keys() & {"room", "low_hz"}:
        tail = int(_REVERBERATION_S[1] * rate) if "room" in limits else 0
        size = 1 << (x.shape[-1] + tail - 1).bit_length()
        response = torch.ones(n, 1, device=x.device, dtype=x.dtype)
        if "room" in limits:
            room = torch.fft.rfft(_room(n, tail, rate, limits["room"], like), size)
            response = response * room
        if "low_hz" in limits:
            response = response * _band(n, size, rate, limits, like)
        response = response.view(n, *[1] * (x.dim() - 2), -1)
        heard = torch.fft.irfft(torch.fft.rfft(heard, size) * response, size)[..., : x.shape[-1]]
    if "gain_db" in limits:
        gain = 10 ** (_between(n, -1, 1, like) * limits["gain_db"] / 20)
        heard = heard * gain.view(n, *[1] * (x.dim() - 1))
    return heard


def heard_through(model: Classifier, limits: Mapping[str, float]) -> Classifier:
    """Return a classifier that transforms clips at random before it calls `model`, with the same bounds, classes and
    access.
    """
    return around(model, OverTheAir(model, limits))


def _between(n: int, low: float, high: float, like: Tensor) -> Tensor:
    return low + (high - low) * torch.rand(n, device=like.device, dtype=like.dtype)


def _shifted(x: Inputs, samples: Tensor) -> Inputs:
    """Clips that begin later by a number of samples, or earlier if it is negative."""
    source = torch.arange(x.shape[-1], device=x.device) - samples.round().long()[:, None]
    inside = (source >= 0) & (source < x.shape[-1])
    rows = [1] * (x.dim() - 2)
    index = source.clamp(0, x.shape[-1] - 1).view(len(samples), *rows, -1).expand_as(x)
    return x.gather(-1, index) * inside.view(len(samples), *rows, -1)


def _room(n: int, tail: int, rate: int, amount: float, like: Tensor) -> Tensor:
    """Impulse responses of random rooms (n, tail)."""
    seconds = torch.arange(tail, device=like.device, dtype=like.dtype) / rate
    noise = torch.randn(n, tail, device=like.device, dtype=like.dtype)
    decaying = noise * torch.exp(-_DECAY * seconds / _between(n, *_REVERBERATION_S, like)[:, None])
    reflections = decaying * (seconds >= _FIRST_S)
    reflections = reflections / torch.linalg.vector_norm(reflections, dim=1, keepdim=True)
    response = amount * reflections * 10 ** (-_between(n, *_DIRECT_DB, like)[:, None] / 20)
    return torch.cat((torch.ones_like(response[:, :1]), response[:, 1:]), dim=1)


def _band(n: int, size: int, rate: int, limits: Mapping[str, float], like: Tensor) -> Tensor:
    """Gains of random band-passes at each frequency of a real transform of `size` samples (n, size // 2 + 1)."""
    frequency = torch.fft.rfftfreq(size, 1 / rate, device=like.device, dtype=like.dtype)
    low = _between(n, 0, limits["low_hz"], like)[:, None]
    high = _between(n, min(limits["high_hz"], rate / 2), rate / 2, like)[:, None]
    damped: Tensor = (1 + (low / frequency.clamp_min(1e-3)) ** 4) * (1 + (frequency / high) ** 4)
    return damped.rsqrt()


_SHORTEST, _LONGEST = 256, 2048  # samples of a tone, for the windows of the spectrograms of speech models


class Tones:
    """Random search on clips under L2 and Linf. In each step, a tone with a random place, length, frequency and phase
    is added to the change, which keeps the size of the ball.

    Our own: the random search of Square Attack (arXiv:1912.00049) with cosines under Hann windows in place of windows
    of constant samples, because models of sound compute short-time spectra. The share of the window in the schedule
    of Square Attack becomes the share of energy of a tone, as half its square root.
    """

    def __init__(self, batch: Batch, norm: Linf | L2, bounds: Bounds) -> None:
        self._ids, self._clean, self._norm, self._bounds = batch.ids, batch.x, norm, bounds
        self._channels = math.prod(batch.x.shape[1:-1])
        sound = sound_of(batch.x)
        self._sound = sound.expand(*sound.shape[:-1], batch.x.shape[-1])
        self._time = torch.arange(batch.x.shape[-1], device=batch.x.device, dtype=batch.x.dtype)
        self.per_step = 4 + self._channels
        self.x = batch.x

    def start(self, rng: Draws) -> Inputs:
        """Return the starting points: the sum of twenty tones, as large as the ball allows."""
        draws = rng.uniform(self._ids, _FIRST_TONES, self.per_step)
        total = torch.stack([self._tone(draws[:, k]) for k in range(_FIRST_TONES)]).sum(0)
        self.x = self._grown(total)
        return self.x

    def plan(self, draws: Tensor, shares: Sequence[float]) -> None:
        """Prepare a block of steps: the random numbers of the tones (n, steps, per_step), and their energies."""
        self._draws, self._energies = draws, [math.sqrt(share) / 2 for share in shares]

    def propose(self, step: int) -> Inputs:
        """Return the best points so far with another tone added."""
        energy, tone = self._energies[step], self._tone(self._draws[:, step])
        change = self.x - self._clean
        if isinstance(self._norm, L2):
            change = math.sqrt(1 - energy) * change + math.sqrt(energy) * self._norm.eps * tone
        else:
            change = change + 2 * math.sqrt(energy) * self._norm.eps * tone
        self._candidate = self._grown(change)
        return self._candidate

    def keep(self, better: Mask) -> None:
        """Make the last tried point the best point of each example for which `better` is true."""
        self.x = pick(better, self._candidate, self.x)

    def take(self, rows: Mask) -> None:
        """Restrict the state to the examples of the mask `rows`, because the others are no longer attacked."""
        self._ids, self._clean, self.x = self._ids[rows], self._clean[rows], self.x[rows]
        self._sound, self._draws = self._sound[rows], self._draws[rows]

    def _grown(self, change: Tensor) -> Inputs:
        """The points with a change that is, under L2, as long as the ball allows."""
        if isinstance(self._norm, L2):
            length = torch.linalg.vector_norm(change.flatten(1), dim=1).clamp_min(1e-12)
            change = change * spread(self._norm.eps * (1 - 1e-6) / length, change)
        return self._norm.project(self._clean + change, self._clean, self._bounds)

    def _tone(self, draws: Tensor) -> Tensor:
        """Tones of length one in the norm from uniform random numbers (n, per_step)."""
        place, width, pitch, phase = draws[:, :4, None].unbind(1)
        samples = self._sound.flatten(1).sum(1, keepdim=True)
        reach = (_SHORTEST * (_LONGEST / _SHORTEST) ** width).minimum(samples)
        away = (self._time - place * samples) / reach
        window = torch.where(away.abs() < 0.5, torch.cos(math.pi * away) ** 2, 0.0)
        tone = window * torch.cos(math.pi * pitch * self._time + 2 * math.pi * phase)
        signs = 1 - 2 * (draws[:, 4:] < 0.5).to(tone)
        inside = self._sound.reshape(len(tone), 1, -1)
        tones = (tone[:, None] * inside * signs[:, :, None]).view_as(self._clean)
        unit = tones.flatten(1).norm(dim=1) if isinstance(self._norm, L2) else tones.flatten(1).abs().amax(1)
        return tones / spread(unit.clamp_min(1e-12), tones)


_FIRST_TONES = 20
