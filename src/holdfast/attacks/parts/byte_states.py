"""Changed files: the states of a search for one file, and the states that the search tries next."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from holdfast.threats.byte_changes import ByteChanges

_SAMPLES = 14  # candidates of a step by gradients that are drawn at random
_RESIZED = 0.1  # share of the moves of a block of new bytes that give it another length
SIGNATURES: Final = (
    b"%PDF-1.7\n", b"%%EOF\n", b"PK\x03\x04\x14\0\0\0", b"PK\x05\x06\0\0\0\0", b"MZ\x90\0\x03\0\0\0", b"PE\0\0\x4c\x01",
    b"\x7fELF\x02\x01\x01\0", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82", b"GIF89a", b"\xff\xd8\xff\xe0\0\x10JFIF",
    b"BM6\0\x0c\0", b"RIFF\x24\0\0\0WAVEfmt ", b"ID3\x03\0", b"OggS\0\x02", b"fLaC\0\0\0\x22", b"\x1f\x8b\x08\0",
    b"BZh91AY&SY", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07\0", b"\xfd7zXZ\0", b"ustar\0" + b"00", b"\xca\xfe\xba\xbe",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"SQLite format 3\0", b"{\\rtf1\\ansi", b"<!DOCTYPE html>\n<html>",
    b"</html>\n", b'<?xml version="1.0"?>\n', b"<svg xmlns=", b'{"a": [1, 2]}\n', b"#!/bin/sh\n",
    b"#!/usr/bin/python\nimport os\n", b"<?php echo 1;", b"#include <stdio.h>\nint main()",
    b"function f() { return 1; }\n", b"SELECT * FROM t;\n", b"a,b,c\n1,2,3\n",
    b"From: a@b.c\nSubject: d\n", b"---\na: 1\n", b"\0", b"\xff", b" ", b"\n",
)  # fmt: skip
"""Beginnings and ends of common formats of files."""


@dataclass(frozen=True)
class State:
    """A changed file."""

    changed: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """new values of bytes, by offset in the unchanged file"""
    appended: bytes = b""
    place: int = 0
    """offset in the unchanged file before which bytes are inserted"""
    inserted: bytes = b""

    @property
    def parts(self) -> Mapping[str, Any]:
        """The fields of the changes that the state has."""
        fields = {
            "changed": self.changed,
            "appended": self.appended,
            "place": self.place,
            "inserted": self.inserted,
        }
        return {name: value for name, value in fields.items() if value or (name == "place" and self.inserted)}

    @property
    def kind(self) -> tuple[str, ...]:
        """Which kinds of changes the state has."""
        return tuple(self.parts)


@dataclass(frozen=True, eq=False)
class Gains:
    """First-order gains of the bytes of a changed file that may have other values."""

    offsets: NDArray[np.int64]
    """offsets in the changed file"""
    values: NDArray[np.int64]
    """best allowed value of each"""
    gains: NDArray[np.float64]
    """by how much it lowers the margin"""
    undone: Mapping[int, float]
    """by how much the value of the unchanged file lowers the margin, by offset in that file"""


class ChangedFile:
    """One file with the changes that a constraint allows, and a generator of random numbers."""

    def __init__(self, content: bytes, changes: ByteChanges, rng: np.random.Generator) -> None:
        self.unchanged, self.changes, self._rng = content, changes, rng
        self.places = changes.places(content)
        self._file = np.frombuffer(content, np.uint8)

    def fault(self, content: bytes) -> str:
        """Return why the reader of the format of the file does not open a changed content; empty if it does."""
        return self.changes.unopened(content, self.unchanged, self.places)

    def written(self, state: State) -> bytes:
        """Return the content of a file in a state."""
        file = self._file.copy()
        if state.changed:
            file[list(state.changed)] = list(state.changed.values())
        content = file.tobytes()
        return content[: state.place] + state.inserted + content[state.place :] + state.appended

    def signed(self, signature: bytes) -> Iterator[State]:
        """Yield the states with one signature. Values that the rules forbid are left out."""
        allowed = bytes(value for value in signature if value in self.places.values)
        if not allowed:
            return
        if self.places.append:
            # the last one ends with the file
            yield State(appended=_repeated(allowed[::-1], self.changes.append)[::-1])
        if len(self.places.insert):
            block = _repeated(allowed, self.changes.insert)
            for place in dict.fromkeys(self.places.insert[[0, -1]].tolist()):
                yield State(place=place, inserted=block)
        change, n = self.places.change, min(len(allowed), self.changes.change, len(self.places.change))
        if n:
            for offsets, values in ((change[:n], allowed[:n]), (change[-n:], allowed[-n:])):
                yield State(changed=dict(zip(offsets.tolist(), values, strict=True)))

    def movable(self, state: State) -> NDArray[np.bool_]:
        """Return for each byte of a changed file whether it may have other values."""
        old = np.zeros(len(self._file), bool)
        old[self.places.change] = True
        inserted, appended = (np.ones(len(block), bool) for block in (state.inserted, state.appended))
        return np.concatenate((old[: state.place], inserted, old[state.place :], appended))

    def gains(self, state: State, offsets: NDArray[np.int64], slopes: NDArray[np.float64]) -> "Gains | None":
        """Return the first-order gains of bytes of a changed file, given their offsets and the first-order changes of
        the margin, (n, 256); None without bytes.
        """
        if not len(offsets):
            return None
        n, end = len(self._file), state.place + len(state.inserted)
        original = np.where(offsets < end, offsets, offsets - len(state.inserted))
        forbidden = np.full(256, np.inf)
        forbidden[self.places.values] = 0
        costs = slopes + forbidden
        undone = -slopes[np.arange(len(slopes)), self._file[original.clip(0, n - 1)]]
        undone_at = dict(zip(original.tolist(), undone.tolist(), strict=True))
        return Gains(offsets, costs.argmin(1), -costs.min(1), undone_at)

    def filled(self, state: State) -> State:
        """Return the state with all bytes that may be appended or inserted, so that they have gradients."""
        filler = int(self.places.values[0])
        if self.places.append and not state.appended:
            state = replace(state, appended=bytes([filler]) * self.changes.append)
        if len(self.places.insert) and not state.inserted:
            place = int(self.places.insert[len(self.places.insert) // 2])
            state = replace(state, place=place, inserted=bytes([filler]) * self.changes.insert)
        return state

    def stepped(self, state: State, gains: "Gains", idle: int) -> Iterator[State]:
        """Yield states in which the bytes with the largest gains have their best values: 1, 2, 4, … of them, and random
        ones among those. After steps without a lower margin the random ones are fewer.
        """
        order = np.argsort(-gains.gains, kind="stable")
        order = order[gains.gains[order] > 0]
        size = 1
        while size < 2 * len(order):
            yield self._exchanged(state, gains, order[:size])
            size *= 2
        most = min(len(order), self.changes.change + self.changes.growth) >> idle
        for _ in range(_SAMPLES if len(order) else 0):
            size = int(self._rng.integers(1, max(most, 1) + 1))
            pool = order[: 4 * size]
            yield self._exchanged(state, gains, self._rng.choice(pool, min(size, len(pool)), replace=False))

    def _exchanged(self, state: State, gains: "Gains", picked: NDArray[np.int64]) -> State:
        """Return a state with the best values of the picked bytes. If too many bytes of the file are changed, those
        that lower the margin most remain.
        """
        n, start, end = len(self._file), state.place, state.place + len(state.inserted)
        inserted, appended = bytearray(state.inserted), bytearray(state.appended)
        changed = dict(state.changed)
        # undoing a change costs what it gained
        worth = {offset: -gains.undone.get(offset, 0.0) for offset in changed}
        for at in picked.tolist():
            offset, value = int(gains.offsets[at]), int(gains.values[at])
            original = offset - (len(inserted) if offset >= end else 0)
            if start <= offset < end:
                inserted[offset - start] = value
            elif original >= n:
                appended[original - n] = value
            else:
                changed[original] = value
                worth[original] = worth.get(original, 0.0) + float(gains.gains[at])
        changed = {offset: value for offset, value in changed.items() if value != self._file[offset]}
        kept = sorted(changed, key=lambda offset: -worth[offset])[: self.changes.change]
        changed = {offset: changed[offset] for offset in kept}
        return replace(state, changed=changed, appended=bytes(appended), inserted=bytes(inserted))

    def moved(self, state: State, share: float) -> State:
        """Return a state with other bytes in a share of one of the kinds of changes, drawn at random."""
        possible = (
            (self._moved_bytes, len(self.places.change) > 0),
            (self._moved_end, self.places.append),
            (self._moved_insertion, len(self.places.insert) > 0),
        )
        moves = [move for move, is_possible in possible if is_possible]
        return moves[self._rng.integers(len(moves))](state, share)

    def _moved_end(self, state: State, share: float) -> State:
        return replace(state, appended=self._rewritten(state.appended, self.changes.append, share))

    def _moved_insertion(self, state: State, share: float) -> State:
        moves = not state.inserted or self._rng.random() < share
        place = int(self._rng.choice(self.places.insert)) if moves else state.place
        block = self._rewritten(state.inserted, self.changes.insert, share)
        return replace(state, place=place, inserted=block)

    def _moved_bytes(self, state: State, share: float) -> State:
        rng = self._rng
        most = min(self.changes.change, len(self.places.change))
        n = max(1, round(share * most))
        kept = [*state.changed.items()]
        rng.shuffle(kept)
        changed = dict(kept[: max(0, most - n)])
        places = self.places.change
        if rng.random() < 0.5:  # neighbouring bytes
            first = rng.integers(len(places))
            offsets = places[first : first + n]
        else:
            offsets = rng.choice(places, n, replace=False)
        values = np.frombuffer(self._drawn(len(offsets)), np.uint8)
        changed |= dict(zip(offsets.tolist(), values.tolist(), strict=True))
        return replace(state, changed={k: v for k, v in changed.items() if v != self._file[k]})

    def _rewritten(self, block: bytes, most: int, share: float) -> bytes:
        """Return a block of new bytes, at most `most`, in which a run has other values, or which has another length."""
        if not block:
            return self._drawn(most)
        if most > 1 and self._rng.random() < _RESIZED:
            return (block + self._drawn(most))[: self._rng.integers(1, most + 1)]
        n = max(1, round(share * len(block)))
        start = int(self._rng.integers(len(block) - n + 1))
        return block[:start] + self._drawn(n) + block[start + n :]

    def _drawn(self, n: int) -> bytes:
        """Return `n` allowed bytes: of a signature, of another part of the file, or random ones."""
        kind = self._rng.integers(3)
        if kind == 0:
            drawn = _repeated(SIGNATURES[self._rng.integers(len(SIGNATURES))], n)
        elif kind == 1:
            start = int(self._rng.integers(len(self._file)))
            drawn = _repeated(self._file[start : start + n].tobytes(), n)
        else:
            return bytes(self._rng.choice(self.places.values, n))
        values = np.frombuffer(drawn, np.uint8)
        allowed = np.isin(values, self.places.values)
        return bytes(np.where(allowed, values, self._rng.choice(self.places.values, n)))


def _repeated(block: bytes, n: int) -> bytes:
    """Return a block repeated to `n` bytes."""
    return (block * (n // len(block) + 1))[:n]
