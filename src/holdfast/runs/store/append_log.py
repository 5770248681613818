"""Append-only logs, such as the chain of a run, and locks between processes, such as the lease of a run folder."""

import hashlib
import hmac
import json
import os
import socket
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from pydantic import Field
from typing_extensions import TypedDict

from holdfast.core.chain import GENESIS, Link, canonical
from holdfast.core.errors import OTHER_FOLDER, RESUME, InUse, TargetError, UsageError
from holdfast.io.files import open_regular, refuse_irregular
from holdfast.runs.store.columns import Count, FormFault, Name, conforming
from holdfast.runs.store.files import (
    PRIVATE,
    append,
    content_of,
    create_private,
    refusal,
    usable,
    write_atomically,
)

if TYPE_CHECKING:
    from holdfast.core.evidence import Seconds


WAIT_S = 60.0
"""Seconds for which a process waits for the lock of another one; operations under such a lock are much shorter."""


_MAGIC = bytes.fromhex("d9d505f920a163d7")
"""last bytes of a rollback journal that names a super-journal (SQLite, "Database File Format", section 3)"""


def has_foreign_journal(path: Path) -> bool:
    """Return whether SQLite could delete another file when it opens this one.

    It rolls back the transaction in a journal, and deletes the super-journal that the journal names, whatever file that
    is. Only a transaction of several files has one, and so no file of this package.
    """
    journal = path.with_name(f"{path.name}-journal")
    try:
        with os.fdopen(open_regular(journal), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_MAGIC)))
            return file.read() == _MAGIC
    except FileNotFoundError:
        return False
    except TargetError:
        return True


def _refuse_other(path: Path, status: os.stat_result) -> None:
    """Raise `TargetError` for a link, which SQLite would follow, and for a file that is no lock."""
    refuse_irregular(path, status)
    if status.st_size:
        raise TargetError(f"{str(path)!r} is not the empty file of a lock; remove it")


@contextmanager
def locked(path: Path, wait_s: float = WAIT_S, *, in_use: str = "") -> Iterator[None]:
    """Context manager that locks a file for all other processes and threads.

    If another process has the lock for longer than `wait_s` seconds and `in_use` is given, raises `InUse` with that
    text. The file is an empty SQLite database, because its locks work on every system and between threads of one
    process. POSIX locks would be lost when any thread closes the file.
    """
    try:
        new = not os.path.lexists(path)
        if not new:
            _refuse_other(path, path.lstat())
        database = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
        try:
            if new:
                path.chmod(PRIVATE)
            database.execute("BEGIN IMMEDIATE")
        except BaseException:
            database.close()
            raise
    except (sqlite3.Error, OSError) as error:
        busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
        if in_use and busy:
            raise InUse(in_use) from error
        advice = (
            "wait for the process that uses it"
            if busy
            else "check the free space of its disk and its permissions"
        )
        raise TargetError(f"{str(path)!r} cannot be locked: {error}; {advice}") from error
    with closing(database):  # closing ends the transaction, which wrote nothing
        yield


# --- leases


LEASE, LOCK, TIMES = "lease.json", "lease.lock", "times.jsonl"
OF_LEASE = frozenset((LEASE, LOCK, f"{LOCK}-journal", TIMES))
"""names of the files of this module in a run folder; a kill may leave the journal of the lock"""
FOREIGN_LEASE_S = 600
"""Seconds for which the lease of a process that cannot be observed, such as one on another host, is respected.

They are counted from the last update of the lease by that process.
"""

_OWN_LEASES: set[Path] = set()
"""Folders of which this process has the lease."""


@dataclass(frozen=True)
class Owner:
    """A process on a host, which can be the owner of the lease of a run folder.

    `started` is the start time of the process, which distinguishes it from a later process with the same id; empty if
    unknown.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def myself(cls) -> "Owner":
        """Return the current process as a possible owner of a lease."""
        return cls(socket.gethostname(), os.getpid(), start_time(os.getpid()) or "")

    def alive(self) -> bool:
        """Return whether the process that owns the lease is running. The result is valid only for processes on this
        host.
        """
        try:
            os.kill(self.pid, 0)  # sends no signal, and fails if there is no such process
        except (ProcessLookupError, OverflowError):  # a number that no process can have may be in a file
            return False
        except PermissionError:  # it runs, under another user
            return True
        # The number may have been given to another process, which started at another time.
        start = start_time(self.pid)
        return start is not None and (not self.started or start == self.started)


def start_time(pid: int) -> str | None:
    """Return the boot id of the machine and the start time of a process in clock ticks, as text. It is None if no such
    process runs, and empty if unknown.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return ""
    try:
        # the name is in parentheses; after it, the state is the first field and the start the 20th
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A zombie (Z) or dead process (X) has ended, although its number is still in use.
    return None if fields[0] in "ZX" else f"{boot.read_text().strip()}:{fields[19]}"


@dataclass(frozen=True)
class ShardTimes:
    """CPU time and wall-clock time in seconds, and number of attempts, of one stage of a run. Attempts that were killed
    are included.
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0
    attempts: int = 0


_Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Line(TypedDict):
    stage: Name
    attempts: Count
    cpu_s: _Time
    wall_s: _Time


class _Owner(TypedDict):
    host: str
    pid: int
    started: str


class Lease:
    """The lease of a run folder, for which this process is the only one that writes to the folder."""

    def __init__(self, folder: Path, owner: Owner, times: int) -> None:
        self._folder, self._owner, self._times = folder, owner, times

    def refuse_lost(self) -> None:
        """Raise `TargetError` if this process has lost the lease, so that two processes never write to one run."""
        owner = _owner_of(self._folder)
        if owner != self._owner:
            owner_text = "" if owner is None else f", which process {owner.pid} on {owner.host} has now"
            raise TargetError(
                f"this process has lost the lease of {str(self._folder)!r}{owner_text}, so it writes no more",
                replace(RESUME, reason="when no other process uses the folder"),
                OTHER_FOLDER,
            )

    def begin(self, stage: str, shard: int) -> None:
        """Record that an attempt to measure a shard begins."""
        self._add(stage, shard, ShardTimes(attempts=1))

    def spend(self, stage: str, shard: int, seconds: "Seconds") -> None:
        """Add CPU and wall-clock time to the recorded time of a shard, and update the time at which this process was
        last active.
        """
        self._add(stage, shard, ShardTimes(seconds.cpu, seconds.wall))
        with usable(self._folder / LEASE):
            os.utime(self._folder / LEASE)

    def _add(self, stage: str, shard: int, times: ShardTimes) -> None:
        self.refuse_lost()
        line = canonical({"stage": stage, "shard": shard, **vars(times)})
        with usable(self._folder / TIMES):
            # begins with a line feed, because a kill or a full disk may have left an incomplete line
            os.write(self._times, b"\n" + line)


@contextmanager
def leased(folder: Path) -> Iterator[Lease]:
    """Context manager in which this process has the lease of a run folder. Raises `UsageError` if another running
    process has it.
    """
    place, own = folder.resolve(), Owner.myself()
    for file in (folder / name for name in OF_LEASE):
        if file.is_symlink():  # the target of a link does not belong to the run and must not be written
            file.unlink()
    with locked(folder / LOCK):
        owner = _owner_of(folder)
        if owner is not None and _is_held(folder, owner, own):
            raise UsageError(
                f"{str(folder)!r} is in use by process {owner.pid} on {owner.host}; wait for it or stop it",
                OTHER_FOLDER,
            )
        with usable(folder / LEASE):
            write_atomically(folder / LEASE, canonical(vars(own)))
    _OWN_LEASES.add(place)
    times = None
    try:
        with usable(folder / TIMES):
            with suppress(FileExistsError):
                create_private(folder / TIMES, b"")
            times = open_regular(folder / TIMES, os.O_WRONLY | os.O_APPEND)
        yield Lease(folder, own, times)
    finally:
        if times is not None:
            os.close(times)
        _OWN_LEASES.discard(place)
        # The lease of a process that has ended is not respected, so that it may remain on a full disk.
        with suppress(TargetError, OSError), locked(folder / LOCK):
            if _owner_of(folder) == own:
                (folder / LEASE).unlink()


def _owner_of(folder: Path) -> Owner | None:
    """The process with the lease of a folder; None if there is none, or if the file is not that of a lease."""
    try:
        return Owner(**conforming(json.loads(content_of(folder / LEASE)), _Owner))
    except (TargetError, FormFault, ValueError, TypeError, RecursionError):
        return None


def _is_held(folder: Path, owner: Owner, own: Owner) -> bool:
    if owner == own:
        return folder.resolve() in _OWN_LEASES
    if owner.host == own.host and os.name != "nt":  # on Windows, os.kill would end the process
        return owner.alive()
    return time.time() - (folder / LEASE).stat().st_mtime < FOREIGN_LEASE_S


def spent_in(folder: Path) -> dict[str, ShardTimes]:
    """Return the time and the number of attempts of each stage of a run, by stage. No lease is needed.

    The file may be untrusted: lines that are incomplete or have another form are ignored.
    """
    try:
        lines = content_of(folder / TIMES).splitlines()
    except TargetError:
        return {}  # times are optional; the evidence does not depend on them
    times: defaultdict[str, ShardTimes] = defaultdict(ShardTimes)
    for line in lines:
        with suppress(FormFault, ValueError, RecursionError):
            content = conforming(json.loads(line), _Line)
            sofar = times[content["stage"]]
            times[content["stage"]] = ShardTimes(
                sofar.cpu_s + content["cpu_s"],
                sofar.wall_s + content["wall_s"],
                sofar.attempts + content["attempts"],
            )
    return dict(times)


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
