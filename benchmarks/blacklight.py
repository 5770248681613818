"""Blacklight, a detector of near-duplicate queries by hashes of windows, with which ours is compared.

Li et al., "Blacklight: Scalable Defense for Neural Networks against Query-Based Black-Box Attacks", USENIX Security
2022, arXiv:2006.14042.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from holdfast.guard.detectors.fingerprints import Stream


@dataclass(frozen=True)
class BlacklightSettings:
    """Settings of Blacklight. The defaults are those of the paper for CIFAR-10."""

    window: int = 20
    """number of neighbouring values in a window"""
    quantum: float = 50 / 255
    """size of the intervals of the quantisation"""
    hashes: int = 50
    """number of hashes of a fingerprint"""
    threshold: int = 25
    """number of common hashes from which a query is suspicious"""


class Blacklight:
    """Detector of near-duplicate queries in the memory of one process, for inputs of one shape in [0, 1]."""

    def __init__(self, key: bytes, shape: Sequence[int], settings: BlacklightSettings | None = None) -> None:
        self.settings = settings or BlacklightSettings()
        stream, n_values = Stream(key), int(np.prod(shape))
        self._shifts = stream.uniform("blacklight/shift", n_values)
        self._multipliers = stream.bits("blacklight/hash", self.settings.window) | np.uint64(1)
        self._queries: dict[int, list[int]] = defaultdict(list)
        self._n_queries = 0

    def score(self, x: Tensor) -> NDArray[np.float64]:
        """Return for each input `x` (n, *shape) the largest number of hashes that it has in common with an earlier
        query (n), and store its fingerprint.
        """
        return np.array([self._scored(row) for row in x.detach().flatten(1).cpu().numpy()], np.float64)

    def fingerprint(self, values: NDArray[np.float32]) -> list[int]:
        """Return the largest different hashes of the windows of an input (values)."""
        levels = (self._shifts + values) % 1.0 / self.settings.quantum
        quantised = np.rint(levels).astype(np.uint64) + np.uint64(1)
        n_windows = max(1, len(quantised) - self.settings.window + 1)
        mixed = np.zeros(n_windows, np.uint64)
        for offset, multiplier in enumerate(self._multipliers[: len(quantised)]):
            mixed += quantised[offset : offset + n_windows] * multiplier
        mixed ^= mixed >> np.uint64(31)
        mixed *= self._multipliers[0]
        mixed ^= mixed >> np.uint64(29)
        largest: list[int] = np.unique(mixed)[-self.settings.hashes :].tolist()
        return largest

    def _scored(self, values: NDArray[np.float32]) -> int:
        hashes = self.fingerprint(values)
        earlier = [number for each in hashes for number in self._queries.get(each, ())]
        for each in hashes:
            self._queries[each].append(self._n_queries)
        self._n_queries += 1
        return int(np.unique(earlier, return_counts=True)[1].max()) if earlier else 0
