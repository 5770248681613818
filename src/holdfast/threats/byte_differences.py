"""Differences between an unchanged and a changed file, as a list of edits."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from holdfast.threats.byte_changes import ByteChanges


@dataclass(frozen=True)
class Edit:
    """Bytes of an unchanged file that were replaced by others."""

    offset: int
    """offset of the first of them in the unchanged file; its length for appended bytes"""
    before: bytes
    """the bytes of the unchanged file; empty for inserted and appended bytes"""
    after: bytes
    """the bytes of the changed file"""

    def singles(self) -> Iterator["Edit"]:
        """Return the edit as edits of one byte each."""
        for i in range(max(len(self.before), len(self.after))):
            before = self.before[i : i + 1]
            yield Edit(self.offset + (i if self.before else 0), before, self.after[i : i + 1])


def edits_of(changes: ByteChanges, new: bytes, old: bytes) -> tuple[Edit, ...]:
    """Return the edits that change the file `old` into `new`, in the order of their offsets. Neighbouring bytes are one
    edit.

    Of all places of an insertion that the constraint allows, the one with the fewest other changes is chosen.
    """
    n, extra = len(old), len(new) - len(old)
    inserted, start = _insertion(changes, new, old, extra) if extra > 0 else (0, 0)
    moved = new[:start] + new[start + inserted : n + inserted]
    differ = np.frombuffer(old[: len(moved)], np.uint8) != np.frombuffer(moved, np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differ, [False])).astype(np.int8)))
    edits = [
        Edit(first, old[first:stop], moved[first:stop])
        for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]
    if inserted:
        edits.append(Edit(start, b"", new[start : start + inserted]))
    if len(new) - inserted != n:
        edits.append(Edit(len(moved), old[len(moved) :], new[n + inserted :]))
    return tuple(sorted(edits, key=lambda edit: (edit.offset, len(edit.before) > 0)))


def _insertion(changes: ByteChanges, new: bytes, old: bytes, extra: int) -> tuple[int, int]:
    """Return the number of inserted bytes and their offset, with which the fewest other bytes have changed."""
    n, starts = len(old), changes.places(old).insert
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    best = (n + 1, 0, 0)
    for inserted in range(max(0, extra - changes.append), min(extra, changes.insert) + 1):
        differ, shifted = (
            np.concatenate(([0], np.cumsum(before != after[shift : shift + n]))) for shift in (0, inserted)
        )
        places = starts if inserted else np.zeros(1, np.int64)
        counts = differ[places] + shifted[n] - shifted[places]
        if len(counts):
            place = int(counts.argmin())
            best = min(best, (int(counts[place]), inserted, int(places[place])))
    return best[1:]


def applied(edits: Iterable[Edit], old: bytes) -> bytes:
    """Return a file after edits, which are in the order of their offsets and do not overlap."""
    new, at = bytearray(), 0
    for edit in edits:
        new += old[at : edit.offset] + edit.after
        at = edit.offset + len(edit.before)
    return bytes(new) + old[at:]


def hexadecimal(content: bytes, most: int = 16) -> str:
    """Return bytes as hexadecimal numbers, of which at most `most` are written.

    >>> hexadecimal(b"%PDF"), hexadecimal(bytes(40), 4)
    ('25 50 44 46', '00 00 00 00 …')
    """
    return content[:most].hex(" ") + (" …" if len(content) > most else "")


def characters(content: bytes, most: int = 16) -> str:
    r"""Return bytes as characters of ASCII, with a dot in place of others, of which at most `most` are written.

    >>> characters(b"%PDF-1.7\n"), characters(b"%PDF-1.7", 4)
    ('%PDF-1.7.', '%PDF …')
    """
    shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in content[:most])
    return shown + (" …" if len(content) > most else "")
