"""Append-only logs that are hash chains: each record contains the digest of the record before it."""

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from holdfast.core.chain import GENESIS, Link, canonical
from holdfast.core.errors import TargetError
from holdfast.io.files import open_regular, refuse_irregular
from holdfast.runs.store.files import (
    append,
    refusal,
    usable,
)

Take = Callable[[Link, int], None]
"""receives a record and its number, before the record becomes a part of the log, and may refuse it"""
_FIELDS = frozenset(("content", "digest", "previous"))
_AUTHENTICATION = frozenset(("counter", "mac"))
_LINE_BYTES = 1 << 26
"""Largest number of bytes of a record: that of a request with 400,000 inputs. A longer line is not read into memory."""


class Head(NamedTuple):
    """The number and the digest of the last record of a log.

    A copy of it that is stored elsewhere identifies the log up to that record: an older copy of the whole folder does
    not contain the record.
    """

    entries: int
    """number of the record, from 1; 0 for an empty log"""
    digest: str
    """digest of the record in the chain, 64 hex digits"""


BEGINNING = Head(0, GENESIS)


class HeadFile(Protocol):
    """A file beside a log with the head of the log, so that records missing at the end are detected."""

    def read(self) -> Head | None:
        """Return the stored head, or None if there is no file."""

    def write(self, head: Head) -> None:
        """Replace the stored head. Raises `OSError`."""

    def refuse_shortened(self, head: Head | None, links: Sequence[Link]) -> None:
        """Raise `TargetError` if records are missing at the end of a log, according to the stored head."""


class RecordFault(Exception):
    """Why a record is invalid, as the predicate of a sentence about it."""


@dataclass(frozen=True)
class LogForm:
    """The form of the records of a log, and how messages describe the log."""

    check: Callable[[Any], object]
    """raises a `ValueError`, `KeyError` or `TypeError` for the content of an invalid record"""
    noun: str = "record"
    way_out: str = "restore it from a copy"
    refused: Callable[[Path, OSError], TargetError] = refusal
    """returns the error for a file that cannot be read or written"""
    authenticated: bool = False
    key: bytes | None = field(default=None, repr=False)
    """key of an authenticated log; without it, only the chain and the numbers are verified"""

    def lines(self, texts: Iterable[bytes], last: Head = BEGINNING) -> tuple[bytes, Head]:
        """Return the records with these canonical texts as lines that follow the record `last`, and the head after
        them.
        """
        parts, number, digest = [], last.entries, last.digest
        for text in texts:
            number, previous = number + 1, digest.encode()
            digest = hashlib.sha256(b'{"content":%b,"previous":"%b"}' % (text, previous)).hexdigest()
            own = digest.encode()
            if self.authenticated:
                mac = self._mac_of(number, text, previous).encode()
                line = b'{"content":%b,"counter":%d,"digest":"%b","mac":"%b","previous":"%b"}\n'
                parts.append(line % (text, number, own, mac, previous))
            else:
                parts.append(b'{"content":%b,"digest":"%b","previous":"%b"}\n' % (text, own, previous))
        return b"".join(parts), Head(number, digest)

    def verified(self, line: bytes, last: Head) -> Link:
        """Return the record in the line that follows the record `last`. Raises `RecordFault` for an invalid record.

        The line must be the canonical text of an object with the fields of the form: digests are those of parsed
        contents, so that a line with a repeated key would otherwise state two contents.
        """
        number, fields = last.entries + 1, _FIELDS | (_AUTHENTICATION if self.authenticated else frozenset())
        try:
            record = json.loads(line)
            has_fields = record.keys() == fields
            has_authentication = not self.authenticated or record.keys() >= _AUTHENTICATION
            self.check(record["content"])
            link = Link(record["previous"], record["content"])
            intact = has_fields and link.digest == record["digest"] and canonical(record) + b"\n" == line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RecordFault("was changed after it was written") from None
        if not has_authentication:
            raise RecordFault("has no authentication, which this format requires")
        if not intact:
            raise RecordFault("was changed after it was written")
        if link.previous != last.digest:
            raise RecordFault("does not contain the digest of the one before it")
        if self.authenticated:
            self._refuse_other_place(link, number, record)
        return link

    def _refuse_other_place(self, link: Link, number: int, record: Mapping[str, Any]) -> None:
        # `type(...) is int`, because True equals 1.
        if record["counter"] != number or type(record["counter"]) is not int:
            raise RecordFault(
                f"has the counter {record['counter']!r}; {number} was expected: records were removed, added or moved"
            )
        text, previous = canonical(link.content), link.previous.encode()
        if self.key is not None and not equal(record["mac"], self._mac_of(number, text, previous)):
            raise RecordFault(
                "was not written with the pool's key: its HMAC is wrong, so it was changed, or copied from another "
                "ledger"
            )

    def _mac_of(self, number: int, text: bytes, previous: bytes) -> str:
        assert self.key is not None, "records are added with the key only"
        message = b'{"content":%b,"counter":%d,"kind":"entry","previous":"%b"}' % (text, number, previous)
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()


def equal(actual: object, expected: str) -> bool:
    """Return whether an HMAC is the expected one. The time of the comparison reveals nothing about that."""
    return isinstance(actual, str) and hmac.compare_digest(
        actual.encode("utf-8", "replace"), expected.encode()
    )


class LogReader:
    """Iterator over the records of an open log that follow the record `last`, which verifies each record first.

    Raises `TargetError` for the first invalid record.
    """

    def __init__(self, file: IO[bytes], path: Path, form: LogForm, last: Head = BEGINNING) -> None:
        self._file, self._path, self._form = file, path, form
        self.last = last
        """the last record that was read"""
        self.size, self.rest = 0, b""
        """number of bytes of the records, and the incomplete last line, once all records are read"""

    def __iter__(self) -> Iterator[Link]:
        while (line := self._file.readline(_LINE_BYTES)).endswith(b"\n"):
            try:
                link = self._form.verified(line, self.last)
            except RecordFault as fault:
                raise self._refusal(fault) from None
            self.last, self.size = Head(self.last.entries + 1, link.digest), self.size + len(line)
            yield link
        self.rest = line
        if len(line) == _LINE_BYTES:
            raise self._refusal(f"is longer than {_LINE_BYTES:,} bytes")

    def _refusal(self, fault: object) -> TargetError:
        form, number = self._form, self.last.entries + 1
        return TargetError(f"{form.noun} {number} of {str(self._path)!r} {fault}; {form.way_out}")


class AppendLog:
    """The records of a log, oldest first, and the file that stores them.

    `take` receives each record and its number, and `head_file` stores the head of the log. If several processes add
    records, each must have a lock while it calls `repair` and `add`.
    """

    def __init__(
        self,
        path: Path,
        form: LogForm,
        take: Take = lambda link, number: None,
        head_file: HeadFile | None = None,
    ) -> None:
        self.path, self._form, self._take, self._head_file = path, form, take, head_file
        self._links: list[Link] = []
        self._size = 0
        self._stored: Head | None = None
        """the head in its file"""

    @property
    def links(self) -> tuple[Link, ...]:
        """All records of the hash chain, oldest first."""
        return tuple(self._links)

    @property
    def entries(self) -> int:
        """Number of records."""
        return len(self._links)

    @property
    def head(self) -> str:
        """Digest of the last record. It identifies the whole log."""
        return self._links[-1].digest if self._links else GENESIS

    @property
    def end(self) -> Head:
        """The number and the digest of the last record."""
        return Head(self.entries, self.head)

    def entry_of(self, digest: str) -> int | None:
        """Return the number, counted from 1, of the record with a digest, or None if there is no such record."""
        return next((number for number, link in enumerate(self._links, 1) if link.digest == digest), None)

    def last(self, kind: str, name: str = "") -> Mapping[str, Any] | None:
        """Return the content of the newest record with a kind and a name, or None if there is none."""
        for link in reversed(self._links):
            if link.content["kind"] == kind and link.content.get("name", "") == name:
                return link.content
        return None

    def has_changed(self) -> bool:
        """Return whether the size of the file differs from that of the records. Raises `TargetError` for anything else
        than a regular file.
        """
        return self._length() != self._size

    def read(self) -> int:
        """Verify and take the records that were added since the last call. Return the number of bytes of the incomplete
        last line.
        """
        length = self._length()
        if length < self._size:
            raise TargetError(
                f"{self._form.noun} {self.entries} of {str(self.path)!r} or an earlier one was removed or changed "
                f"after it was read; {self._form.way_out}"
            )
        if length == self._size:
            return 0
        # read before the records, because another process may add some
        self._stored = None if self._head_file is None else self._head_file.read()
        with usable(self.path, self._form.refused), os.fdopen(open_regular(self.path), "rb") as file:
            file.seek(self._size)
            reader = LogReader(file, self.path, self._form, self.end)
            found = [(link, self._size + reader.size) for link in reader]
        if self._head_file is not None:
            self._head_file.refuse_shortened(self._stored, [*self._links, *(link for link, _ in found)])
        for link, size in found:
            self._add(link, size)
        return len(reader.rest)

    def repair(self) -> None:
        """Take the records that were added, remove the incomplete last line, which may remain after a kill, and write
        the head if the kill prevented it.
        """
        if self.read():
            with usable(self.path, self._form.refused):
                os.truncate(self.path, self._size)
        if self._head_file is not None and self._stored is not None and self._stored.entries < self.entries:
            with suppress(OSError):
                self._head_file.write(self.end)
                self._stored = self.end

    def add(self, content: Mapping[str, Any]) -> None:
        """Append a record to the file and flush it to the disk. After an error the file has its old content."""
        line, head = self._form.lines([canonical(content)], self.end)
        with usable(self.path, self._form.refused):
            self._write(line, head)
        self._add(Link(self.head, content), self._size + len(line))

    def _write(self, line: bytes, head: Head) -> None:
        """Write a record and then the head. A kill in between leaves a log longer than its head, which is allowed.

        For the first record, the head is written first, so that a log with records always has a head.
        """
        if self._head_file is not None and head.entries == 1:
            self._head_file.write(head)
        append(self.path, line)
        if self._head_file is not None and head.entries > 1:
            try:
                self._head_file.write(head)
            except BaseException:
                # After an error the record must not be in the log, because the caller reports that nothing was added.
                with suppress(OSError):
                    os.truncate(self.path, self._size)
                raise
        self._stored = head

    def _add(self, link: Link, size: int) -> None:
        self._take(link, self.entries + 1)
        self._links.append(link)
        self._size = size

    def _length(self) -> int:
        with usable(self.path, self._form.refused):
            try:
                status = self.path.lstat()
            except FileNotFoundError:
                return 0
        refuse_irregular(self.path, status)
        return status.st_size
