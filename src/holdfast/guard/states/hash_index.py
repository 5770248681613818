"""An index in memory from 64-bit hashes to the numbers of the rows of a file that have them.

Hashes are random, so that an index in the file would change another page for each hash of a row, which was most of the
cost of a query. The file has its rows in the order of their arrival instead, and each process keeps this index of them,
with 24 to 32 bytes for each hash.
"""

from collections.abc import Iterable

import numpy as np

from holdfast.guard.detectors.fingerprints import Hashes

_RECENT = 1 << 15
"""number of the newest pairs, which are in a dictionary, from which they are merged into the sorted arrays; this takes
40 ms with 1.6 million pairs"""

_MARKS = 8
"""least number of marks for each pair, of which few are then set by chance"""


class HashIndex:
    """Pairs of a hash and a row. A hash may have several rows, and a row several hashes."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.zeros(0, np.int64)  # sorted
        self._rows: Hashes = np.zeros(0, np.int64)
        self._marks = np.zeros(1, np.bool_)  # by the last bits of a hash, whether one is in the arrays
        self._recent: dict[int, list[int]] = {}
        self._n_recent = 0

    def __len__(self) -> int:
        return len(self._hashes) + self._n_recent

    def add(self, hashes: Iterable[int], row: int) -> None:
        """Add the hashes of a row."""
        for each in hashes:
            self._recent.setdefault(each, []).append(row)
            self._n_recent += 1
        if self._n_recent > _RECENT:
            self._merge()

    def add_many(self, hashes: Hashes, rows: Hashes) -> None:
        """Add pairs of hashes (n) and rows (n)."""
        if len(hashes) > _RECENT:
            self._insert(hashes, rows)
            return
        for each, row in zip(hashes.tolist(), rows.tolist(), strict=True):
            self.add((each,), row)

    def rows(self, hashes: Hashes) -> dict[int, list[int]]:
        """Return the rows of each hash that has any, in the order in which they were added."""
        found: dict[int, list[int]] = {}
        # a search in the sorted array reads memory at 17 places for each hash, and nearly all hashes are not in it
        marked = hashes[self._marks[hashes & len(self._marks) - 1]]
        places = self._hashes.searchsorted(marked)
        for each in marked[self._hashes.take(places, mode="clip") == marked] if len(marked) else ():
            found[int(each)] = self._rows[slice(*self._range(each))].tolist()
        for each in self._recent.keys() & hashes.tolist():
            found[each] = [*found.get(each, ()), *self._recent[each]]
        return found

    def discard(self, each: int, row: int) -> None:
        """Remove a pair, if it is in the index."""
        if row in self._recent.get(each, ()):
            self._recent[each].remove(row)
            self._n_recent -= 1
            return
        first, last = self._range(each)
        places = first + (self._rows[first:last] == row).nonzero()[0]
        self._hashes, self._rows = np.delete(self._hashes, places), np.delete(self._rows, places)

    def keep(self, rows: Hashes) -> None:
        """Remove all pairs with other rows than these."""
        self._merge()
        kept = np.isin(self._rows, rows)
        self._replace(self._hashes[kept], self._rows[kept])

    def _range(self, each: int) -> tuple[int, int]:
        return int(self._hashes.searchsorted(each)), int(self._hashes.searchsorted(each, "right"))

    def _merge(self) -> None:
        counts = [len(rows) for rows in self._recent.values()]
        hashes = np.fromiter(self._recent, np.int64, len(counts)).repeat(counts)
        self._insert(hashes, np.array([row for rows in self._recent.values() for row in rows], np.int64))
        self._recent, self._n_recent = {}, 0

    def _insert(self, hashes: Hashes, rows: Hashes) -> None:
        order = hashes.argsort(kind="stable")
        places = self._hashes.searchsorted(hashes[order], "right")
        self._replace(
            np.insert(self._hashes, places, hashes[order]), np.insert(self._rows, places, rows[order])
        )

    def _replace(self, hashes: Hashes, rows: Hashes) -> None:
        self._hashes, self._rows = hashes, rows
        self._marks = np.zeros(1 << (_MARKS * len(hashes)).bit_length(), np.bool_)
        self._marks[hashes & len(self._marks) - 1] = True
