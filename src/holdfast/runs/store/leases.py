"""Locks between processes, and the lease of a run folder with the time that each attempt took."""

import json
import os
import socket
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from typing_extensions import TypedDict

from holdfast.core.chain import canonical
from holdfast.core.errors import OTHER_FOLDER, RESUME, InUse, TargetError, UsageError
from holdfast.io.files import open_regular, refuse_irregular
from holdfast.runs.store.columns import Count, FormFault, Name, conforming
from holdfast.runs.store.files import (
    PRIVATE,
    content_of,
    create_private,
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
