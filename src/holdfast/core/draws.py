"""Counter-based random draws.

A draw is a pure function of (run seed, named places, example id, position): nothing counts up, so a subset of a
batch draws what it would have drawn inside the whole, whatever the batch size, order or sharding.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, for the idea; the mixing function is that of
SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), in wrapping int64.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.types import Ids

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_MUL1, _MUL2, _STEP = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB), _signed(_GOLDEN)


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place on a fresh int64 tensor; `>>` is arithmetic, hence the masks."""
    z ^= (z >> 30) & 0x3FFFFFFFF
    z *= _MUL1
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= _MUL2
    z ^= (z >> 31) & 0x1FFFFFFFF
    return z


def _place_key(key: int, place: int | str) -> int:
    named = f"{key:016x}/{type(place).__name__}:{place}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """A place to draw from. `at` names a place below it; the same place always gives the same draws.

    >>> rng = Draws(7)
    >>> ids = torch.tensor([3, 5, 8])
    >>> whole = rng.at("start", 0).uniform(ids, 4)
    >>> bool((rng.at("start", 0).uniform(ids[1:2], 4) == whole[1]).all())
    True
    """

    key: int
    """the run's seed, or what `at` made of it"""

    def at(self, *places: int | str) -> "Draws":
        """The draws of a named place, such as `rng.at("restart", 3)` or `rng.at(restart, step)`."""
        key = self.key
        for place in places:
            key = _place_key(key, place)
        return Draws(key)

    def bits(self, ids: Ids, *shape: int) -> Tensor:
        """64 random bits for each of `shape` positions of each example, as int64 (n, *shape)."""
        n_each = math.prod(shape)
        rows = _mix_(_mix_(ids * _STEP) + _signed(self.key))
        positions = torch.arange(1, n_each + 1, device=ids.device) * _STEP
        return _mix_(rows[:, None] + positions).view(len(ids), *shape)

    def uniform(self, ids: Ids, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform on [0, 1), with as many random bits as the type's significand holds."""
        digits = 1 - round(math.log2(torch.finfo(dtype).eps))
        mantissa = (self.bits(ids, *shape) >> (64 - digits)) & ((1 << digits) - 1)
        return mantissa.to(dtype).mul_(2.0**-digits)

    def normal(self, ids: Ids, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, by Box and Muller's transform of two uniforms."""
        u, v = (
            self.at("radius").uniform(ids, *shape, dtype=dtype),
            self.at("angle").uniform(ids, *shape, dtype=dtype),
        )
        return (-2.0 * torch.log1p(-u)).sqrt_() * torch.cos(2.0 * math.pi * v)

    def integers(self, ids: Ids, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), int64; `high` is at most 2**24."""
        return (self.uniform(ids, *shape, dtype=torch.float64) * high).long()

    def signs(self, ids: Ids, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """-1 or +1 with equal chance."""
        return ((self.bits(ids, *shape) >> 63) * 2 + 1).to(dtype)
