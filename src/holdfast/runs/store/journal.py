"""A journal of a server's answers in the folder of a run. When the run is resumed, these inputs are not sent again.

The first line of the file contains the number of bytes of all records. A record consists of its length, a digest over
it and all records before, a line of JSON and, for an answer, the digests of the inputs and the values. If the process
is killed, at most one incomplete record follows the counted bytes; it is ignored.
"""

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain as chain_of
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.core.errors import TargetError
from holdfast.core.meter import LOOK, Purpose
from holdfast.core.outputs import REFUSED
from holdfast.io.remote.http_client import KEY_BYTES, Sent, add_record, purpose_record
from holdfast.runs.store.columns import Count, refuse_form
from holdfast.runs.store.files import PART, SERVED, opened_private, usable, write_atomically

NAME = "answers.journal"
"""Name of the journal file in a run folder."""
_MAGIC = b"holdfast answers 1 "
_HEAD = len(_MAGIC) + 20 + 1  # 20 digits hold any 64-bit number, so the first line is replaced in place
_PREFIX = 4 + KEY_BYTES  # length of a record, and the digest
_SYNCED_S = 1.0
"""Seconds between two flushes to the disk, so that a power failure loses few answers."""
_LARGEST = 1 << 30
"""largest size of a record in bytes; a larger length is invalid"""
Place = tuple[str, int]
"""Name of a stage, and index of a shard."""


class _Totals(TypedDict, total=False):
    sent: Count
    requests: Count
    refused: Count
    failed_rows: Count
    too_many: Count
    rows: dict[str, Count]
    rejected: dict[str, Count]
    failed: dict[str, Count]
    most: Count | None


class Journal(Sent):
    """Stores the answers of a model server during a run, so that a stopped run can be resumed without sending the same
    inputs again.

    Answers are written to `path` after a call of `attach`, because the folder of a run may be created later. With
    `resume`, stored answers are reused, each once; raises `TargetError` if they were altered. With `keep`, answers are
    never deleted. All methods are thread-safe.
    """

    keeps = True

    def __init__(self, limit: int | None, path: Path, *, resume: bool = False, keep: bool = False) -> None:
        super().__init__(limit)
        self.path, self._keep = path, keep
        self._file: BinaryIO | None = None
        self._pending: list[tuple[Place | None, bytes]] = []
        """records from before `attach`, with their places"""
        self._chain, self._end, self._synced = b"", 0, 0.0
        self._positions: defaultdict[Place, list[tuple[int, int]]] = defaultdict(list)
        """offset and length of the records of answers"""
        self._earlier: BinaryIO | None = None
        """the file of earlier attempts"""
        self._answers_by_place: dict[Place, dict[bytes, deque[tuple[int, int, str]]]] = {}
        """for each input, its stored answers: offset, number of values, number of classes, and type"""
        existing = next(
            (candidate for candidate in (path, path.with_name(SERVED)) if candidate.is_file()), None
        )
        if resume and existing is not None:
            if existing.is_symlink():
                raise _altered(existing, "is a link", "a run folder contains no links")
            try:
                with usable(existing):
                    self._load(existing)
            except TargetError:
                self.close()
                raise
            # the file may be untrusted
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                self.close()
                raise _altered(existing, "was changed", f"a record has another format ({error})") from error
        self.earlier = self.totals.sent

    def attach(self) -> None:
        """Start to write the server's answers to the journal file. Its folder must exist, and no other process may use
        the file.
        """
        if self._file is not None:
            return
        pending, self._pending = self._pending, []
        with usable(self.path):
            if not self._end:
                write_atomically(self.path, _head(0))
                self._end = _HEAD
            elif not self.path.is_file():
                write_atomically(self.path, self.path.with_name(SERVED).read_bytes())
            self._file = self.path.open("r+b", buffering=0)
            self._file.truncate(self._end)
        for place, record in pending:
            self._append(place, record)

    def answered(self, purpose: Purpose, values: Tensor, keys: Sequence[bytes]) -> None:
        """Store the server's answers to some inputs in the journal.

        `values` contains one row for each input, and `keys` the digest of each input.
        """
        content: dict[str, Any] = {"t": "answer", **purpose_record(purpose), "n": len(values)}
        if values.is_floating_point():
            single_precision = values.float()
            is_exact = torch.equal(single_precision.double().nan_to_num(), values.double().nan_to_num())
            array = (single_precision if is_exact else values.double()).numpy()
        else:
            content["classes"] = values.shape[1]
            array = values.argmax(1, keepdim=True).numpy().astype(np.int32)
        self._note(
            content | {"type": array.dtype.str, "width": array.shape[1]}, b"".join(keys), array.tobytes()
        )

    def recalled(self, purpose: Purpose, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Return for each input its next stored answer in the same stage and shard, or None if the input must be sent
        to the server.

        The answers are those of earlier attempts. If the server refused an input, the answer is a row of one value that
        marks the refusal.
        """
        answers = self._answers_by_place.get((purpose.stage, purpose.shard))
        if not answers:
            return [None] * len(keys)
        return [self._values(answers[key].popleft()) if answers.get(key) else None for key in keys]

    def done(self, stage: str, shard: int | None = None) -> None:
        """Delete the stored answers of a finished shard, or of a finished stage if `shard` is None. Nothing is deleted
        if `keep` was set.
        """
        if self._keep:
            return
        with self._lock:
            for place in [
                stored_place
                for stored_place in self._positions
                if stored_place[0] == stage and shard in (None, stored_place[1])
            ]:
                self._positions.pop(place)
                self._answers_by_place.pop(place, None)
            if self._file is not None:
                self._compact(self.path, list(self._positions))

    def close(self) -> None:
        """Close the journal file. A resumed run can continue it."""
        with self._lock:
            for file in (self._file, self._earlier):
                if file is not None:
                    file.close()
            self._file = self._earlier = None

    def finish(self) -> None:
        """Write the final journal file of a finished run. It contains the totals, and the server's answers from the
        inspection of the model before the run.

        All other answers are deleted, unless `keep` was set.
        """
        with self._lock:
            if self._file is None:
                return
            final_path = self.path.with_name(SERVED)
            self._compact(final_path, [place for place in self._positions if place[0] == LOOK])
            self.close()
            if not self._keep:
                with usable(self.path):
                    self.path.unlink(missing_ok=True)

    def _values(self, position: tuple[int, int, str]) -> Tensor:
        offset, width, kind = position
        if not width:
            return torch.tensor([REFUSED])
        assert self._earlier is not None
        classes, _, type_ = kind.rpartition(":")
        self._earlier.seek(offset)
        array = np.frombuffer(self._earlier.read(width * np.dtype(type_).itemsize), type_)
        values = torch.from_numpy(array.copy())
        if classes:
            return torch.nn.functional.one_hot(values[0].long(), int(classes))
        return values.double()

    def _note(self, content: Mapping[str, Any], *parts: bytes) -> None:
        record = b"".join((json.dumps(content, separators=(",", ":")).encode(), b"\n", *parts))
        place = _place_of(content)
        with self._lock:
            add_record(self.totals, content)
            if self._file is not None:
                self._append(place, record)
            else:
                self._pending.append((place, record))

    def _append(self, place: Place | None, record: bytes) -> None:
        assert self._file is not None
        chain = _next(self._chain, record)
        with usable(self.path):
            self._file.seek(self._end)
            # The record is written before the counter in the header; after a kill in between it is not counted, and
            # ignored.
            _write(self._file, _framed(record, chain))
            self._chain = chain
            if place is not None:
                self._positions[place].append((self._end + _PREFIX, len(record)))
            self._end += _PREFIX + len(record)
            self._file.seek(0)
            _write(self._file, _head(self._end - _HEAD))
            if time.monotonic() - self._synced > _SYNCED_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def _compact(self, path: Path, places: Sequence[Place]) -> None:
        """Write a file with the answers of some places followed by the totals, and continue in it."""
        assert self._file is not None
        new_file, chain, end = path.with_name(f".{path.name}{PART}"), b"", _HEAD
        positions = defaultdict[Place, list[tuple[int, int]]](list)
        totals = json.dumps({"t": "totals", **vars(self.totals)}).encode() + b"\n"
        with usable(self.path):
            with opened_private(new_file) as file:
                file.write(_head(0))
                for place, record in chain_of(self._records(places), [(None, totals)]):
                    chain = _next(chain, record)
                    file.write(_framed(record, chain))
                    if place is not None:
                        positions[place].append((end + _PREFIX, len(record)))
                    end += _PREFIX + len(record)
                file.seek(0)
                file.write(_head(end - _HEAD))
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            new_file.replace(path)
            self._file = path.open("r+b", buffering=0)
        self._positions, self._chain, self._end = positions, chain, end

    def _records(self, places: Sequence[Place]) -> Iterator[tuple[Place | None, bytes]]:
        """The records of the answers of some places, each with its place."""
        assert self._file is not None
        for place in places:
            for offset, length in self._positions[place]:
                self._file.seek(offset)
                yield place, self._file.read(length)

    def _load(self, path: Path) -> None:
        """Read the records of earlier attempts."""
        self._earlier = file = path.open("rb")
        counted = _n_counted_bytes(file.read(_HEAD), path)
        self._end = _HEAD
        while record := self._read(file, counted, path):
            start, self._end = self._end + _PREFIX, self._end + _PREFIX + len(record)
            line = record.index(b"\n") + 1
            content = json.loads(record[:line])
            place = _place_of(content)
            if content["t"] == "totals":
                refuse_form(path, content, _Totals)
            add_record(self.totals, content)
            if place is not None:
                self._positions[place].append((start, len(record)))
                for key, at in _answers(content, record, start, line):
                    self._answers_by_place.setdefault(place, {}).setdefault(key, deque()).append(at)

    def _read(self, file: BinaryIO, counted: int, path: Path) -> bytes | None:
        """The next record; None at the end, or if an incomplete record follows the counted ones."""
        is_counted = self._end - _HEAD < counted
        prefix = file.read(_PREFIX)
        length = int.from_bytes(prefix[:4], "little")
        record = file.read(length) if len(prefix) == _PREFIX and length < _LARGEST else b""
        if len(record) == length and record and _next(self._chain, record) == prefix[4:]:
            self._chain = prefix[4:]
            return record
        if not is_counted:
            return None
        if len(prefix) < _PREFIX or len(record) < length < _LARGEST:
            raise _altered(
                path,
                "was truncated",
                f"it contains fewer than the {counted:,} bytes of answers that its header records",
            )
        raise _altered(
            path, "was changed", f"the record at byte {self._end:,} differs from the one that was written"
        )


def _write(file: BinaryIO, content: bytes) -> None:
    """Write all bytes: an unbuffered file may write only a part of them."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _head(size: int) -> bytes:
    return _MAGIC + b"%020d\n" % size


def _n_counted_bytes(head: bytes, path: Path) -> int:
    if len(head) == _HEAD and head.startswith(_MAGIC) and head[len(_MAGIC) : -1].isdigit():
        return int(head[len(_MAGIC) :])
    raise _altered(path, "was changed", "it has no valid header")


def _framed(record: bytes, chain: bytes) -> bytes:
    return len(record).to_bytes(4, "little") + chain + record


def _place_of(content: Mapping[str, Any]) -> Place | None:
    """The place of an answer; None for other records."""
    return (content["stage"], content["shard"]) if "stage" in content else None


def _next(chain: bytes, record: bytes) -> bytes:
    return blake2b(chain + record, digest_size=KEY_BYTES).digest()


def _answers(
    content: Mapping[str, Any], record: bytes, start: int, line: int
) -> Iterator[tuple[bytes, tuple[int, int, str]]]:
    """The inputs of a record, with the positions of their answers."""
    if content["t"] == "rejected":
        yield record[line : line + KEY_BYTES], (0, 0, "")
        return
    n, width = content["n"], content["width"]
    first_offset, size = start + line + n * KEY_BYTES, width * np.dtype(content["type"]).itemsize
    if not 0 <= n * size <= len(record) - line - n * KEY_BYTES:
        raise ValueError(f"it contains fewer than {n} answers")
    kind = f"{content.get('classes', '')}:{content['type']}"
    for k in range(n):
        yield (
            record[line + k * KEY_BYTES : line + (k + 1) * KEY_BYTES],
            (first_offset + k * size, width, kind),
        )


def _altered(path: Path, fault: str, reason: str) -> TargetError:
    return TargetError(
        f"{str(path)!r} {fault}: {reason}; restore it from a copy, or remove it; then its rows are sent again, and "
        "those sent before are not counted"
    )
