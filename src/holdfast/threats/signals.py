"""Changes of sounds as constraints: balls whose size is relative to the loudness of each clip, and balls of norms in
which only the sound of a clip changes.

A batch of clips is (n, samples), or (n, channels, samples), with values in [-1, 1]. The sound of a clip ends at its
last sample that is not zero in any channel. What follows is padding, which no attack changes (docs/decisions/0057).

Attacks search in coordinates in which every clip has the same radius. Each point that they evaluate is rounded to 16
bits as in a file, so that success is judged on the stored clip.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Lookup, spread
from holdfast.core.constraints import L2, Constraint, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.gradients import instead
from holdfast.core.model import Bounds
from holdfast.core.types import Ids, Inputs, Mask, PerExample
from holdfast.threats.domains import SIGNAL

if TYPE_CHECKING:
    from holdfast.threats.domains import Domain

LEVELS = 32768
"""number of steps of 16-bit samples between 0 and 1"""
_TINY = 1e-12  # prevents divisions by zero
_UNBOUNDED = Bounds(-math.inf, math.inf)


def sound_of(x: Inputs) -> Mask:
    """Return the mask (n, 1, …, samples) of the samples that belong to the sound of each clip: those up to the last one
    that is not zero in any channel. A silent clip has no padding, so that its mask is true everywhere.
    """
    loud = x != 0
    while loud.dim() > 2:
        loud = loud.any(1)
    later = loud.flip(-1).cummax(-1).values.flip(-1) | ~loud.any(-1, keepdim=True)
    return later.view(len(x), *[1] * (x.dim() - 2), x.shape[-1])


def _of_clips(x_adv: Inputs, x: Inputs) -> Inputs:
    """The points `x_adv` with the padding of the clips `x`."""
    return torch.where(sound_of(x), x_adv, x)


class _Clips(Norm):
    """Part of the balls of norms in which only the sound of clips changes."""

    domain: "ClassVar[Domain | None]" = SIGNAL

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the distance of each clip in the norm; infinity if its padding changed."""
        changed = ((x_adv != x) & ~sound_of(x)).flatten(1).any(1)
        return super().distance(x_adv, x).masked_fill(changed, torch.inf)  # type: ignore[safe-super]

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return for each `x_adv` the nearest valid clip in the ball with the padding of `x`."""
        return super().project(_of_clips(x_adv, x), x, bounds)

    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return for each `x_adv` the nearest valid clip within `radius` with the padding of `x`."""
        return super().within(_of_clips(x_adv, x), x, bounds, radius)  # type: ignore[safe-super]

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the direction of length one of steepest increase that is zero in the padding."""
        return super().steepest(gradient * sound_of(x), x, bounds)  # type: ignore[safe-super]

    def changeable(self, x: Inputs) -> Tensor:
        """Return the mask of the samples that belong to the sound of each clip."""
        return sound_of(x)

    def as_stored(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return clips with their samples rounded to 16 bits; see `stored`."""
        return stored(x_adv, x, self, bounds)

    def coordinates(self, batch: Batch, bounds: Bounds) -> "Scaled":
        """Return coordinates in which the ball is smaller by the rounding to 16 bits."""
        return _scaled(batch, bounds, self, self, torch.ones(len(batch)).to(batch.x))


@dataclass(frozen=True)
class LinfOfClips(_Clips, Linf):
    """Constraint that no sample of the sound of a clip changes by more than `eps`."""


@dataclass(frozen=True)
class L2OfClips(_Clips, L2):
    """Constraint that the Euclidean length of the change of the sound of a clip is at most `eps`."""

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return a random point of the ball around the sound of each clip, whose padding does not change."""
        drawn = super().sample(batch, _UNBOUNDED, rng)
        noise = L2.sample(L2(self.eps), batch, _UNBOUNDED, rng) - batch.x
        heard = drawn - batch.x
        louder = _length(noise) / _length(heard).clamp_min(_TINY)  # without what fell on the padding
        return self.project(batch.x + heard * spread(louder, heard), batch.x, bounds)


def _length(x: Inputs) -> PerExample:
    length: PerExample = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return length


def on_clips(constraint: Constraint) -> Constraint:
    """Return the constraint on inputs that are clips. Under `linf` and `l2` their padding then does not change, and
    they are rounded to 16 bits; other constraints are returned unchanged.
    """
    if type(constraint) is Linf:
        return LinfOfClips(constraint.eps)
    return L2OfClips(constraint.eps) if type(constraint) is L2 else constraint


@dataclass(frozen=True)
class Relative(Norm):
    """Base class of the balls whose radius is `eps` times the size of each clip in a norm.

    As text the size is in decibels: `40dB` is an eps of 0.01, and a larger number of decibels a weaker attacker.
    """

    in_input_units: ClassVar[bool] = False
    in_decibels: ClassVar[bool] = True
    domain: "ClassVar[Domain | None]" = SIGNAL
    norm: ClassVar[Norm]
    """norm in which the clip and its change are measured"""

    def loudness(self, x: Inputs) -> PerExample:
        """Return the size of each clip in the norm (n); 0 for silence."""
        return self.norm.distance(x, torch.zeros_like(x))

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the size of each change as a multiple of the size of the clip; infinity for a change of silence or of
        padding.
        """
        change = self.norm.distance(x_adv, x)
        return torch.where(change == 0, change, change / self.loudness(x))

    def within(self, x_adv: Inputs, x: Inputs, bounds: Bounds, radius: PerExample) -> Inputs:
        """Return for each `x_adv` the nearest valid clip whose change is at most `radius` times the size of `x`."""
        return self.norm.within(x_adv, x, bounds, radius * self.loudness(x))

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the direction of steepest increase, as large as the clip."""
        return self.norm.steepest(gradient, x, bounds) * spread(self.loudness(x), x)

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return a random point of the ball around each clip."""
        size = spread(self.loudness(batch.x).clamp_min(_TINY), batch.x)
        unit = batch.at(batch.x / size)
        drawn = self.norm.resized(self.eps).sample(unit, _UNBOUNDED, rng)
        return self.project(batch.x + size * (drawn - unit.x), batch.x, bounds)

    def as_stored(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return clips with their samples rounded to 16 bits; see `stored`."""
        return stored(x_adv, x, self, bounds)

    def coordinates(self, batch: Batch, bounds: Bounds) -> "Scaled":
        """Return coordinates in which all clips have the same radius, smaller by the rounding to 16 bits."""
        return _scaled(batch, bounds, self, self.norm.resized(self.eps), self.loudness(batch.x))


@dataclass(frozen=True)
class SNR(Relative):
    """Constraint that the power of the change, relative to that of the clip, is at most -20 log10(`eps`) decibels below
    it: the signal-to-noise ratio, with the sound of the clip as the signal.
    """

    name: ClassVar[str] = "snr"
    norm: ClassVar[Norm] = L2OfClips()


@dataclass(frozen=True)
class Peak(Relative):
    """Constraint that the largest change of a sample is at most `eps` times the largest sample of the clip.

    In decibels it is the loudness of Carlini & Wagner, "Audio adversarial examples: targeted attacks on
    speech-to-text", SPW 2018, arXiv:1801.01944, with the sign changed.
    """

    name: ClassVar[str] = "peak"
    norm: ClassVar[Norm] = LinfOfClips()


@dataclass(frozen=True)
class Scaled:
    """Coordinates of clips in which attacks search: values divided by one number for each clip."""

    clean: Batch
    bounds_of_clips: Bounds
    limit: Norm
    """constraint on the stored clips"""
    constraint: Norm
    """ball in the coordinates"""
    scale: PerExample
    """number by which the coordinates of each clip are multiplied (n); 0 if rounding leaves no room for a change"""
    _lookup: Lookup = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lookup", Lookup(self.clean.ids))

    @cached_property
    def batch(self) -> Batch:
        """The clips in the coordinates."""
        return self.clean.at(self.clean.x / spread(self._divisor, self.clean.x))

    @cached_property
    def bounds(self) -> Bounds:
        """Range that contains the valid values of every clip in the coordinates. Clips outside their own are
        clamped.
        """
        low, high = self.bounds_of_clips.like(self.clean.x)
        least = float(self._divisor.min()) if len(self.clean) else 1.0
        return Bounds(float(low.min()) / least, float(high.max()) / least)

    @property
    def _divisor(self) -> PerExample:
        return torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale))

    @cached_property
    def _free(self) -> Mask:
        return sound_of(self.clean.x) & spread(self.scale > 0, self.clean.x)

    def inputs(self, points: Inputs, ids: Ids | None = None) -> Inputs:
        """Return the clips at points of the coordinates, rounded to 16 bits. `ids` are the ids of the rows, by default
        all of the batch in order. Rounding has the gradient of the identity.
        """
        rows = slice(None) if ids is None else self._lookup.rows(ids)
        clean = self.clean.x[rows]
        moved = self.bounds_of_clips.clamp(points * spread(self._divisor[rows], points))
        moved = torch.where(self._free[rows], moved, clean)
        return instead(stored(moved.detach(), clean, self.limit, self.bounds_of_clips), moved)

    def points(self, x: Inputs) -> Inputs:
        """Return the points of one clip `x` for each clip of the batch. Clips outside the constraint are projected."""
        near = self.limit.project(x, self.clean.x, self.bounds_of_clips)
        return near / spread(self._divisor, near)


def stored(x_adv: Inputs, x: Inputs, constraint: Norm, bounds: Bounds) -> Inputs:
    """Return the clips `x_adv` with each sample rounded to the nearest level of 16 bits. If this moves a clip out of
    the constraint around `x`, its samples are rounded towards those of `x`.
    """
    levels = x_adv * LEVELS
    nearest = torch.where(x_adv == x, x, bounds.clamp(_samples(levels.round())))
    outside = constraint.distance(nearest, x) > constraint.eps
    outside &= constraint.distance(x_adv, x) <= constraint.eps * (
        1 + 1e-5
    )  # else the search is outside as well
    if not outside.any():
        return nearest
    up = x_adv > x
    shorter = _samples(torch.where(up, levels.floor(), levels.ceil()))
    crossed = torch.where(up, shorter < x, shorter > x)  # no level lies between the two values
    return torch.where(spread(outside, x), torch.where(crossed, x, shorter), nearest)


def _samples(levels: Tensor) -> Tensor:
    return levels.clamp(-LEVELS, LEVELS - 1) / LEVELS


def _scaled(batch: Batch, bounds: Bounds, limit: Norm, ball: Norm, size: PerExample) -> Scaled:
    """Coordinates in which the radius of every clip is that of `ball`, and in the clips this times `size`, smaller by
    the rounding.
    """
    if math.isinf(limit.eps):
        return Scaled(batch, bounds, limit, ball, size)
    radius, step = limit.eps * size.double(), 1 / LEVELS
    if ball.bounds_each_value:
        reduced = (radius / step * (1 + 1e-6)).floor() * step
    else:
        # independent rounding errors add up to a variance of step²/12 for each sample, and change the length by 0.3
        # steps (standard deviation)
        values = sound_of(batch.x).expand_as(batch.x).flatten(1).sum(1)
        reduced = (radius**2 - values * step**2 / 12).clamp_min(0).sqrt() - 2 * step
    return Scaled(batch, bounds, limit, ball, (reduced.clamp_min(0) / (limit.eps or 1.0)).to(size.dtype))
