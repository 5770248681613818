"""Keyed fingerprints of inputs."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import UsageError

Floats = NDArray[np.float32]
Hashes = NDArray[np.int64]

SHORTEST_KEY = 16
"""bytes; shorter keys could be guessed"""
_DIMS = 64  # of a sketch: its distances have a relative standard deviation of 1 / sqrt(2 * 64), which is 9 %
_WIDE = (torch.float64, torch.int64, torch.int32)  # data types with values that float32 rounds
_LEAST_SIDE = 8  # pixels; in smaller images, gradients say little about motion
_RUN = 3  # symbols; two random files of 1 MB have 6 % of their runs in common, and an edit of a symbol changes three
# of the hash SplitMix64: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014
_MIXING = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_RUNS = 1 << 14  # largest number of runs of an input that are compared, which bounds the cost


class Stream:
    """Numbers from SHAKE-256 of a key and a label. They cannot be predicted without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.blake2b(key, digest_size=32, person=b"holdfast-query").digest()

    def bits(self, label: str, n: int) -> NDArray[np.uint64]:
        """Return `n` uniform 64-bit numbers for a label."""
        stream = hashlib.shake_256(self._key + label.encode()).digest(8 * n)
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64)

    def uniform(self, label: str, n: int) -> NDArray[np.float64]:
        """Return `n` uniform numbers in (0, 1) for a label."""
        return ((self.bits(label, n) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, label: str, *shape: int) -> Floats:
        """Return standard normal numbers of a shape for a label, by the Box-Muller transform."""
        n = math.prod(shape)
        radius = np.sqrt(-2 * np.log(self.uniform(f"{label}/radius", n)))
        angle = 2 * np.pi * self.uniform(f"{label}/angle", n)
        numbers: Floats = (radius * np.cos(angle)).reshape(shape).astype(np.float32)
        return numbers


def grid_of(shape: Sequence[int], cells: int) -> tuple[int, int] | None:
    """Return the rows and columns of the grid over whose cells images of a shape (channels, height, width) are
    averaged, with at most `cells` cells in all channels together; None for inputs of other shapes.
    """
    if len(shape) != 3 or min(shape[1:]) < _LEAST_SIDE:
        return None
    side = max(1, math.isqrt(cells // shape[0]))
    return min(side, shape[1]), min(side, shape[2])


def n_features_of(shape: Sequence[int], cells: int) -> int:
    """Return the number of values of an input of a shape after it is averaged over at most `cells` cells."""
    grid = grid_of(shape, cells)
    return math.prod(shape) if grid is None else shape[0] * math.prod(grid)


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of a batch of n inputs."""

    sketches: Floats
    """(n, 64); the distance of two rows approximates that of the low-pass inputs"""
    hashes: Hashes
    """(n, tables); inputs that are near each other have at least one of them in common with high probability"""
    digests: Sequence[int]
    """(n) 64-bit keyed digests; equal for equal values, in whichever data type they are, and only for these"""


class Fingerprinter:
    """Computes the fingerprints of inputs of one shape.

    Images (channels, height, width) are averaged over cells of a grid first, with at most `cells` cells in all channels
    together. The average of a cell hardly changes under small changes of single pixels, while different images
    differ in many cells. Inputs of other shapes are projected as they are.

    If `shape` is None, inputs are rows of symbols of any length, which end with zeros: files and texts. The sketch of a
    row is the sum of a random sign vector for each different run of three symbols, divided by the root of their number;
    of more than 16,384 runs, those with the smallest keyed hashes count. The squared distance of two sketches
    approximates 2 (1 - s), where s is the number of common runs over the geometric mean of both numbers of runs. Runs
    are those of Broder, "On the resemblance and containment of documents", SEQUENCES 1997, and sketches those of
    Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002, without the rounding.
    """

    def __init__(
        self, key: bytes, shape: Sequence[int] | None, *, cells: int, tables: int, width: int, bucket: float
    ) -> None:
        if len(key) < SHORTEST_KEY:
            raise UsageError(
                f"the key of the query detector has {len(key)} bytes; expected at least {SHORTEST_KEY} random bytes, "
                "such as secrets.token_bytes(32)"
            )
        self.shape = None if shape is None else tuple(shape)
        self._grid = None if shape is None else grid_of(shape, cells)
        self.image = self._grid is not None
        stream = Stream(key)
        if shape is None:
            self._run_multipliers = stream.bits("runs", _RUN) | np.uint64(1)
        else:
            n_features = n_features_of(shape, cells)
            if n_features < 1:
                raise UsageError(f"inputs of shape {self.shape} are empty; expected at least one value")
            self._projection = stream.normal("sketch", n_features, _DIMS) / np.float32(math.sqrt(_DIMS))
        self._tables, self._width = tables, width
        self._planes = stream.normal("planes", _DIMS, tables * width) / np.float32(bucket)
        self._offsets = stream.uniform("offsets", tables * width).astype(np.float32)
        # odd multipliers of a hash of several integers, modulo 2^64
        self._multipliers = (stream.bits("mix", tables * width) | np.uint64(1)).reshape(tables, width)
        if self.shape is not None and self.image:
            _, height, width = self.shape
            self._rows, self._columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
            channels = torch.eye(self.shape[0])[:, :, None, None].expand(-1, -1, height, width)
            self._brightness = self.sketch(channels).T
        self._digest_key = stream.bits("digest", 4).tobytes()

    def __call__(self, x: Tensor, sent: Tensor | None = None) -> Fingerprints:
        """Return the fingerprints of inputs `x` (n, *shape). `sent` are the inputs as the client sent them, of which
        the digests are computed, if `x` was rounded or scaled.
        """
        sketches = self.sketch(x)
        cells = np.floor(sketches @ self._planes + self._offsets).astype(np.int64).view(np.uint64)
        mixed = cells.reshape(len(x), self._tables, self._width) * self._multipliers
        hashes = mixed.sum(axis=2, dtype=np.uint64)
        hashes ^= hashes >> np.uint64(29)
        return Fingerprints(sketches, hashes.view(np.int64), self._digests(x if sent is None else sent))

    def sketch(self, x: Tensor) -> Floats:
        """Return the sketches (n, 64) of inputs `x` (n, *shape)."""
        if self.shape is None:
            return np.stack([self._sketch_of_symbols(row) for row in x.detach().cpu().numpy()])
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"inputs have the shape {tuple(x.shape[1:])}; expected {self.shape}")
        projected: Floats = self._features(x.detach().to("cpu", torch.float32)) @ self._projection
        return projected

    def _sketch_of_symbols(self, row: Floats) -> Floats:
        """Sketch (64) of a row of symbols. Zeros at both ends are part of its first and last runs."""
        symbols = np.pad(_without_padding(row), _RUN - 1).astype(np.uint64)
        n = len(symbols) - _RUN + 1
        runs = sum(symbols[k : k + n] * each for k, each in enumerate(self._run_multipliers))
        # the smallest hashes are those of the same runs in similar inputs; np.unique takes ten times as long
        ordered = np.sort(runs)
        mixed = ordered[np.diff(ordered, prepend=~ordered[:1]) != 0][:_RUNS]
        for shift, factor in _MIXING:  # bits of a product depend on lower bits only
            mixed = (mixed ^ (mixed >> shift)) * factor
        mixed ^= mixed >> np.uint64(31)
        ones = np.unpackbits(mixed[:, None].view(np.uint8), axis=1).sum(axis=0, dtype=np.int64)
        sketch: Floats = ((2 * ones - len(mixed)) / math.sqrt(_DIMS * len(mixed))).astype(np.float32)
        return sketch

    def _features(self, x: Tensor) -> Floats:
        """Low-pass inputs (n, features), as 32-bit floats; values that are not finite count as zero."""
        features = x if self._grid is None else F.adaptive_avg_pool2d(x, self._grid)
        flat: Floats = features.flatten(1).numpy()
        if not np.isfinite(flat.sum()):
            flat = np.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
        return flat

    def _digests(self, x: Tensor) -> list[int]:
        rows = _exact(x.detach().cpu())
        rows = map(_without_padding, rows) if self.shape is None else rows
        return [
            int.from_bytes(
                hashlib.blake2b(row.data, digest_size=8, key=self._digest_key).digest(), "little", signed=True
            )
            for row in rows
        ]

    def natural(self, x: Tensor) -> Floats:
        """Return the sketches (64, k) of changes that natural causes make to one image (1, channels, height, width):
        horizontal and vertical motion, zoom, contrast, brightness of each channel, and blur. k is 0 for other inputs.
        """
        if not self.image:
            return np.zeros((_DIMS, 0), np.float32)
        x = x.detach().to("cpu", torch.float32)
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        left, right = padded[:, :, 1:-1, :-2], padded[:, :, 1:-1, 2:]
        above, below = padded[:, :, :-2, 1:-1], padded[:, :, 2:, 1:-1]
        zoom = self._rows * (below - above) / 2 + self._columns * (right - left) / 2
        same, left, right, above, below, zoom = self.sketch(torch.cat((x, left, right, above, below, zoom)))
        # second differences are the next term of a motion's Taylor series, and the first of a blur
        changes = (right - left, below - above, zoom, same, left + right - 2 * same, above + below - 2 * same)
        return np.concatenate((np.stack(changes, axis=1), self._brightness), axis=1)


def _without_padding(row: NDArray[Any]) -> NDArray[Any]:
    """Return a row of symbols without the zeros at its end."""
    return row[: np.flatnonzero(row).max(initial=-1) + 1]


def _exact(x: Tensor) -> Iterable[NDArray[Any]]:
    """Return each input in float32 if that represents its values exactly, and otherwise in its own data type."""
    rounded = np.ascontiguousarray(x.to(torch.float32).numpy())
    if x.dtype not in _WIDE:
        return rounded
    given = np.ascontiguousarray(x.numpy())
    with np.errstate(invalid="ignore"):  # float32 rounds the largest int64 to a value beyond its range
        same = (rounded.astype(given.dtype) == given).reshape(len(given), -1).all(1)
    return [narrow if equal else wide for narrow, wide, equal in zip(rounded, given, same, strict=True)]


def unexplained(difference: Floats, natural: Floats) -> float:
    """Return the length of the part of a difference of sketches (64) that is no linear combination of the natural
    changes (64, k).
    """
    if not natural.shape[1]:
        return float(np.linalg.norm(difference))
    # a small ridge, because the changes of a uniform image are zero or parallel
    gram = natural.T @ natural
    gram[np.diag_indices_from(gram)] += 1e-5 * np.trace(gram) / len(gram) + 1e-12
    weights = np.linalg.solve(gram, natural.T @ difference)
    return float(np.linalg.norm(difference - natural @ weights))
