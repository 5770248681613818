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
        self._recent: dict[int, int] = {}  # of numbers, which the garbage collector does not visit
        self._further: dict[int, list[int]] = {}  # rows of a hash of `_recent` after the first one
        self._n_recent = 0
        self._dropped: dict[int, set[int]] = {}  # rows by hash, which are left out until the next merge
        self._n_dropped = 0

    def __len__(self) -> int:
        return len(self._hashes) + self._n_recent

    def add(self, hashes: Iterable[int], row: int) -> None:
        """Add the hashes of a row."""
        for each in hashes:
            if self._recent.setdefault(each, row) != row:
                self._further.setdefault(each, []).append(row)
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
            found[each] = [*found.get(each, ()), self._recent[each], *self._further.get(each, ())]
        for each in found.keys() & self._dropped.keys():
            found[each] = [row for row in found[each] if row not in self._dropped[each]]
            if not found[each]:
                del found[each]
        return found

    def discard(self, each: int, row: int) -> None:
        """Remove a pair, if it is in the index. It is not added again."""
        self._dropped.setdefault(each, set()).add(row)
        self._n_dropped += 1
        if self._n_dropped > _RECENT:
            self._merge()

    def keep(self, rows: Hashes) -> None:
        """Remove all pairs with other rows than these."""
        self._merge()
        kept = np.isin(self._rows, rows)
        self._replace(self._hashes[kept], self._rows[kept])

    def _range(self, each: int) -> tuple[int, int]:
        return int(self._hashes.searchsorted(each)), int(self._hashes.searchsorted(each, "right"))

    def _merge(self) -> None:
        pairs = [
            *self._recent.items(),
            *((each, row) for each, rows in self._further.items() for row in rows),
        ]
        hashes, rows = np.array(pairs, np.int64).reshape(-1, 2).T
        self._recent, self._further, self._n_recent = {}, {}, 0
        self._insert(hashes, rows)
        if self._dropped:
            self._remove_dropped()

    def _remove_dropped(self) -> None:
        places = [
            place
            for each, dropped in self._dropped.items()
            for place, row in enumerate(self._rows[slice(*self._range(each))].tolist(), self._range(each)[0])
            if row in dropped
        ]
        self._dropped, self._n_dropped = {}, 0
        self._hashes, self._rows = np.delete(self._hashes, places), np.delete(self._rows, places)

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
