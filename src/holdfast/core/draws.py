"""Random numbers that are a pure function of the seed, of names, and of the id of the example, so that they do not
depend on the order of computation.

A random number is a pure function of the run's seed, names of places in the program, the example's id and the position.
There is no state, so that the numbers of an example do not depend on batch size, order or sharding.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, for the idea; the mixing function is that of
SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), in wrapping int64.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.types import Ids

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, the step of SplitMix64
_MASK = 0xFFFFFFFFFFFFFFFF


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_MUL1, _MUL2, _STEP = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB), _signed(_GOLDEN)


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place on a new int64 tensor; the masks are needed because `>>` is arithmetic."""
    z ^= (z >> 30) & 0x3FFFFFFFF
    z *= _MUL1
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= _MUL2
    z ^= (z >> 31) & 0x1FFFFFFFF
    return z


def _place_key(key: int, place: int | str) -> int:
    # with the type, so that 1 and "1" are different places
    named = f"{key:016x}/{type(place).__name__}:{place}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """Source of reproducible random numbers, identified by a seed and a path of names. The same path gives the same
    numbers, and `at` extends the path.

    >>> rng = Draws(7)
    >>> ids = torch.tensor([3, 5, 8])
    >>> whole = rng.at("start", 0).uniform(ids, 4)
    >>> bool((rng.at("start", 0).uniform(ids[1:2], 4) == whole[1]).all())
    True
    """

    key: int
    """the run's seed, or the key that `at` derived from it"""

    def at(self, *places: int | str) -> "Draws":
        """Return the source of random numbers whose path is extended by these names or numbers, as in
        `rng.at("restart", 3)`.
        """
        key = self.key
        for place in places:
            key = _place_key(key, place)
        return Draws(key)

    @property
    def seed(self) -> int:
        """Seed for the generator of another library, below 2^31, which every library accepts. With seeds such as
        `seed + 1`, two runs of consecutive seeds would have draws in common.
        """
        return _place_key(self.key, "seed") >> 33

    def bits(self, ids: Ids, *shape: int) -> Tensor:
        """Return 64 random bits for each element of a tensor of shape (n, *shape), one row for each id, as int64."""
        n_each = math.prod(shape)
        rows = _mix_(_mix_(ids * _STEP) + _signed(self.key))
        positions = torch.arange(1, n_each + 1, device=ids.device) * _STEP
        return _mix_(rows[:, None] + positions).view(len(ids), *shape)

    def uniform(self, ids: Ids, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return uniform random numbers in [0, 1) of shape (n, *shape), one row for each id, with the full precision of
        the data type.
        """
        digits = 1 - round(math.log2(torch.finfo(dtype).eps))
        mantissa = (self.bits(ids, *shape) >> (64 - digits)) & ((1 << digits) - 1)
        return mantissa.to(dtype).mul_(2.0**-digits)

    def normal(self, ids: Ids, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal random numbers of shape (n, *shape), one row for each id."""
        u, v = (
            self.at("radius").uniform(ids, *shape, dtype=dtype),
            self.at("angle").uniform(ids, *shape, dtype=dtype),
        )
        return (-2.0 * torch.log1p(-u)).sqrt_() * torch.cos(2.0 * math.pi * v)

    def integers(self, ids: Ids, high: int, *shape: int) -> Tensor:
        """Return uniform random integers in [0, high) of shape (n, *shape), one row for each id, as int64; `high` is at
        most 2**24.
        """
        return (self.uniform(ids, *shape, dtype=torch.float64) * high).long()

    def signs(self, ids: Ids, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return random signs of shape (n, *shape), one row for each id: -1 or +1 with equal probability."""
        return ((self.bits(ids, *shape) >> 63) * 2 + 1).to(dtype)
