"""Database `state.sqlite` of a run folder. It contains the lease of the run, and the number of attempts and the time of
each shard.

The hash chain does not contain these values. The database is not needed to resume a run: if it is deleted, it is
recreated from the folder, and only the recorded times are lost. A lease belongs to a process. Because process ids are
reused, start times of processes are compared as well.
"""

import math
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import OTHER_FOLDER, RESUME
from holdfast.runs.store.files import create_private, usable
from holdfast.runs.store.locking import has_foreign_journal


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


NAME = "state.sqlite"
FOREIGN_LEASE_S = 600
"""Seconds for which the lease of a process that cannot be observed, such as one on another host, is respected.

They are counted from the last update of the lease by that process.
"""

_OWN_LEASES: set[Path] = set()
"""Leases of this process. A lease that could not be released because of a full disk is not included."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lease (
    one INTEGER PRIMARY KEY CHECK (one = 1), host TEXT, pid INTEGER, started TEXT, seen REAL);
CREATE TABLE IF NOT EXISTS shards (
    stage TEXT, shard INTEGER, attempts INTEGER DEFAULT 0, cpu_s REAL DEFAULT 0, wall_s REAL DEFAULT 0,
    done INTEGER DEFAULT 0, PRIMARY KEY (stage, shard));
"""


@dataclass(frozen=True)
class ShardTimes:
    """CPU time and wall-clock time in seconds, and number of attempts, of one stage of a run. Attempts that were killed
    are included.
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0
    attempts: int = 0


class Leases:
    """Connection to the database `state.sqlite` of a run folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._owner: Owner | None = None
        for file in self._files():
            if file.is_symlink():  # the target of a link does not belong to the run and must not be written
                file.unlink()
        if has_foreign_journal(self._path):
            journal = self._path.with_name(f"{NAME}-journal")
            with usable(journal):
                journal.unlink()
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise self._refusal(error) from error
            for file in self._files():  # not a database of a run; nothing in it is needed
                file.unlink(missing_ok=True)
            with self._reported():
                self._open()

    def _files(self) -> list[Path]:
        return [self._path.with_name(NAME + suffix) for suffix in ("", "-wal", "-shm")]

    def _open(self) -> None:
        with usable(self._path), suppress(FileExistsError):
            create_private(self._path, b"")  # SQLite gives its other files the mode of this one
        # isolation_level=None, because transactions are begun explicitly below.
        database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            if not _is_ours(database):
                raise sqlite3.DatabaseError(f"{NAME} contains other tables than those of a run")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
        self._database = database

    def _refusal(self, error: Exception) -> TargetError:
        return TargetError(
            f"{str(self._path)!r} cannot be written: {error}. Free some space, and resume",
            RESUME,
            OTHER_FOLDER,
        )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._refusal(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reported():
            # IMMEDIATE takes the write lock at once, so that two processes never read the lease at the same time and
            # both take it.
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):  # after a full disk, SQLite has already rolled back
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def take_lease(self) -> None:
        """Take the lease of the run folder for this process. Raises `UsageError` if it belongs to another running
        process.
        """
        own = Owner.myself()
        with self._transaction():
            row = self._database.execute("SELECT host, pid, started, seen FROM lease").fetchone()
            if row is not None and self._is_held(Owner(*row[:3]), float(row[3]), own):
                raise UsageError(
                    f"{str(self._path.parent)!r} is in use by process {row[1]} on {row[0]}; wait for it or stop it",
                    OTHER_FOLDER,
                )
            self._database.execute(
                "INSERT OR REPLACE INTO lease VALUES (1, ?, ?, ?, ?)",
                (own.host, own.pid, own.started, time.time()),
            )
        self._owner = own
        _OWN_LEASES.add(self._path.resolve())

    @property
    def _owner_columns(self) -> tuple[str, int, str] | tuple[None, None, None]:
        return (None,) * 3 if self._owner is None else astuple(self._owner)

    def _is_held(self, owner: Owner, last_seen: float, own: Owner) -> bool:
        if owner == own:
            return self._path.resolve() in _OWN_LEASES
        if owner.host == own.host and os.name != "nt":  # on Windows, os.kill would end the process
            return owner.alive()
        return time.time() - last_seen < FOREIGN_LEASE_S

    def refuse_lost(self) -> None:
        """Raise `TargetError` if this process has lost the lease, so that two processes never write to one run."""
        with self._reported():
            row = self._database.execute("SELECT host, pid, started FROM lease").fetchone()
        if row is None or Owner(*row) != self._owner:
            owner_text = "" if row is None else f", which process {row[1]} on {row[0]} has now"
            raise TargetError(
                f"this process has lost the lease of {str(self._path.parent)!r}{owner_text}, so it writes no more",
                replace(RESUME, reason="when no other process uses the folder"),
                OTHER_FOLDER,
            )

    def begin(self, stage: str, shard: int) -> None:
        """Record that an attempt to measure a shard begins."""
        with self._transaction():
            self.refuse_lost()
            self._database.execute(
                "INSERT INTO shards (stage, shard, attempts) VALUES (?, ?, 1) "
                "ON CONFLICT DO UPDATE SET attempts = attempts + 1",
                (stage, shard),
            )

    def spend(self, stage: str, shard: int, cpu_s: float, wall_s: float, *, done: bool) -> None:
        """Add CPU and wall-clock time to the recorded time of a shard, and update the time at which this process was
        last active.
        """
        with self._transaction():
            self.refuse_lost()
            self._database.execute(
                "INSERT INTO shards (stage, shard, cpu_s, wall_s, done) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET cpu_s = cpu_s + excluded.cpu_s, wall_s = wall_s + excluded.wall_s, "
                "done = max(done, excluded.done)",
                (stage, shard, cpu_s, wall_s, int(done)),
            )
            self._database.execute(
                "UPDATE lease SET seen = ? WHERE host = ? AND pid = ? AND started = ?",
                (time.time(), *self._owner_columns),
            )

    def reconcile(self, stage: str, shards: Iterable[int]) -> None:
        """Update the database so that exactly the given shards of a stage, whose files are in the folder, are marked as
        finished.
        """
        with self._transaction():
            self._database.execute("UPDATE shards SET done = 0 WHERE stage = ?", (stage,))
            self._database.executemany(
                "INSERT INTO shards (stage, shard, done) VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET done = 1",
                [(stage, shard) for shard in shards],
            )

    def spent(self, stage: str) -> ShardTimes:
        """Return the time and the number of attempts of one stage of the run."""
        with self._reported():
            row = self._database.execute(
                "SELECT coalesce(sum(cpu_s), 0), coalesce(sum(wall_s), 0), coalesce(sum(attempts), 0) "
                "FROM shards WHERE stage = ?",
                (stage,),
            ).fetchone()
        return ShardTimes(float(row[0]), float(row[1]), int(row[2]))

    def close(self, *, release: bool) -> None:
        """Close the database after merging its write-ahead log into the file. The lease is released if `release` is
        true.
        """
        try:
            if release:
                _OWN_LEASES.discard(self._path.resolve())
                self._database.execute(
                    "DELETE FROM lease WHERE host = ? AND pid = ? AND started = ?", self._owner_columns
                )
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:  # a full disk; a lease of a dead process expires, and the log is read later
            pass
        finally:
            self._database.close()


def _is_ours(database: sqlite3.Connection) -> bool:
    """Whether a database has only the tables of a run, and no views or triggers, which could execute statements.

    Only its schema is read, before any table.
    """
    # The database may come from an untrusted folder; its schema must not call functions with side effects.
    database.execute("PRAGMA trusted_schema=OFF")
    entries = database.execute(
        "SELECT type, name, sql, rootpage FROM sqlite_master WHERE type != 'index' OR sql NOT NULL LIMIT 99"
    ).fetchall()
    tables = {
        name: " ".join(f"CREATE TABLE {name} {columns}".split())
        for name, columns in re.findall(r"CREATE TABLE IF NOT EXISTS (\w+) (\(.*?\));\n", _SCHEMA, re.DOTALL)
    }
    return all(
        kind == "table" and root and tables.get(name) == " ".join(str(sql).split())
        for kind, name, sql, root in entries
    )


def spent_in(folder: Path) -> dict[str, ShardTimes]:
    """Return the time and the number of attempts of each stage of a run, by stage. No lease is needed. The result is
    empty if they are unknown.

    The file may be untrusted: a database with other tables or implausible values is ignored.
    """
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        # reading an active log needs shared memory; reading a file at rest must not create files
        at_rest = not path.with_name(f"{NAME}-wal").exists()
        mode = "immutable=1" if at_rest else "mode=ro"
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)) as database:
            if not _is_ours(database):
                return {}
            rows = database.execute(
                "SELECT stage, sum(cpu_s), sum(wall_s), sum(attempts) FROM shards GROUP BY stage"
            )
            times = {str(stage): ShardTimes(float(cpu), float(wall), int(n)) for stage, cpu, wall, n in rows}
    except (sqlite3.Error, ValueError, TypeError, OverflowError):
        return {}  # times are optional; the evidence does not depend on them
    return times if all(_is_plausible(spent) for spent in times.values()) else {}


def _is_plausible(spent: ShardTimes) -> bool:
    return all(math.isfinite(value) and value >= 0 for value in astuple(spent))
