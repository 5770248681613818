"""`state.sqlite`: who works on a run, how often each shard was tried, and how long it took.

It holds what the hash chain must not: times, hosts and attempts. Nothing in it is needed to go on: deleted, it is made
anew from the folder, and only the time that was spent is forgotten.
"""

import math
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from holdfast.core.errors import TargetError, UsageError
from holdfast.store.processes import Owner

NAME = "state.sqlite"
FOREIGN_LEASE_S = 600
"""A lease whose process cannot be seen, as on another host, is honoured this long after its last sign of life."""

_HERE: set[Path] = set()
"""Leases that this process holds: one that a full disk kept it from giving back is not among them."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lease (
    one INTEGER PRIMARY KEY CHECK (one = 1), host TEXT, pid INTEGER, started TEXT, seen REAL);
CREATE TABLE IF NOT EXISTS shards (
    stage TEXT, shard INTEGER, attempts INTEGER DEFAULT 0, cpu_s REAL DEFAULT 0, wall_s REAL DEFAULT 0,
    done INTEGER DEFAULT 0, PRIMARY KEY (stage, shard));
CREATE TABLE IF NOT EXISTS tasks (
    stage TEXT, shard INTEGER, until REAL, state TEXT, worker INTEGER, rows INTEGER DEFAULT 0,
    PRIMARY KEY (stage, shard));
"""


TaskState = Literal["due", "taken", "done", "late"]


@dataclass(frozen=True)
class Task:
    """A shard that workers share out among them; `late` is one that time did not allow."""

    stage: str
    shard: int
    until: float
    """seconds since the epoch after which nothing is asked of the model any more"""
    state: TaskState
    worker: int | None
    """its process, once it is taken"""
    rows: int
    """examples of it that are finished"""


@dataclass(frozen=True)
class Spent:
    """Seconds of one stage over all attempts, those that were killed included."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    attempts: int = 0


class Leases:
    """The open database of one run folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._owner: Owner | None = None
        for file in self._files():
            if file.is_symlink():  # what it leads to is not of this run, and would be written
                file.unlink()
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise TargetError(self._refusal(error)) from error
            for file in self._files():  # no database of a run: nothing in it was needed
                file.unlink(missing_ok=True)
            with self._reported():
                self._open()

    def _files(self) -> list[Path]:
        return [self._path.with_name(NAME + suffix) for suffix in ("", "-wal", "-shm")]

    def _open(self) -> None:
        database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            if not _is_ours(database):
                raise sqlite3.DatabaseError(f"{NAME} holds other tables than those of a run")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.executescript(_SCHEMA)
        except BaseException:
            database.close()
            raise
        self._database = database

    def _refusal(self, error: Exception) -> str:
        return (
            f"{str(self._path)!r} cannot be written: {error}. Free some space or name another folder with --run DIR; "
            f"go on with --resume"
        )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TargetError(self._refusal(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reported():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):  # sqlite has rolled back by itself where the disk is full
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def take_lease(self) -> None:
        """Own the folder; `UsageError` if a living process does."""
        me = Owner.myself()
        with self._transaction():
            row = self._database.execute("SELECT host, pid, started, seen FROM lease").fetchone()
            if row is not None and self._is_held(Owner(*row[:3]), float(row[3]), me):
                raise UsageError(
                    f"{str(self._path.parent)!r} is in use by process {row[1]} on {row[0]}; wait for it or stop it, "
                    f"or name another folder with --run DIR"
                )
            self._database.execute(
                "INSERT OR REPLACE INTO lease VALUES (1, ?, ?, ?, ?)",
                (me.host, me.pid, me.started, time.time()),
            )
        self._owner = me
        _HERE.add(self._path.resolve())

    def serve(self, owner: Owner) -> None:
        """Work under the lease that another process of this machine holds, for as long as it does."""
        self._owner = owner
        self.refuse_lost()

    @property
    def owner(self) -> Owner | None:
        """The process under whose lease this one works."""
        return self._owner

    @property
    def _me(self) -> tuple[str, int, str] | tuple[None, None, None]:
        return (None,) * 3 if self._owner is None else astuple(self._owner)

    def _is_held(self, owner: Owner, seen: float, me: Owner) -> bool:
        if owner == me:
            return self._path.resolve() in _HERE
        if owner.host == me.host and os.name != "nt":  # there, asking a process whether it lives would end it
            return owner.alive()
        return time.time() - seen < FOREIGN_LEASE_S

    def refuse_lost(self) -> None:
        """Raise `TargetError` where the lease is gone or another's, so that two processes never write one run."""
        with self._reported():
            row = self._database.execute("SELECT host, pid, started FROM lease").fetchone()
        if row is None or Owner(*row) != self._owner:
            whose = "nobody" if row is None else f"process {row[1]} on {row[0]}"
            raise TargetError(
                f"{str(self._path.parent)!r} is held by {whose} and no longer by this process, which writes nothing "
                f"more; go on with --resume when no other process works on it, or name another folder with --run DIR"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of the run writes to the index meanwhile."""
        with self._transaction():
            self.refuse_lost()
            yield

    def begin(self, stage: str, shard: int) -> None:
        """Count an attempt at a shard."""
        with self._transaction():
            self.refuse_lost()
            self._database.execute(
                "INSERT INTO shards (stage, shard, attempts) VALUES (?, ?, 1) "
                "ON CONFLICT DO UPDATE SET attempts = attempts + 1",
                (stage, shard),
            )

    def spend(self, stage: str, shard: int, cpu_s: float, wall_s: float, *, done: bool) -> None:
        """Add to the time of a shard, and give a sign of life."""
        with self._transaction():
            self.refuse_lost()
            self._database.execute(
                "UPDATE shards SET cpu_s = cpu_s + ?, wall_s = wall_s + ?, done = max(done, ?) "
                "WHERE stage = ? AND shard = ?",
                (cpu_s, wall_s, int(done), stage, shard),
            )
            self._database.execute(
                "UPDATE lease SET seen = ? WHERE host = ? AND pid = ? AND started = ?",
                (time.time(), *self._me),
            )

    def reconcile(self, stage: str, shards: Iterable[int]) -> None:
        """Make the index of one stage say what lies in the folder."""
        with self._transaction():
            self._database.execute("UPDATE shards SET done = 0 WHERE stage = ?", (stage,))
            self._database.executemany(
                "INSERT INTO shards (stage, shard, done) VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET done = 1",
                [(stage, shard) for shard in shards],
            )

    def post(self, stage: str, shards: Iterable[int], until: float) -> None:
        """Offer shards to the workers, in place of what was offered before; their time is booked from now on."""
        offered = [(stage, shard) for shard in shards]
        with self._transaction():
            self._database.execute("DELETE FROM tasks")
            self._database.executemany(
                "INSERT INTO tasks (stage, shard, until, state) VALUES (?, ?, ?, 'due')",
                [(*each, until) for each in offered],
            )
            self._database.executemany("INSERT OR IGNORE INTO shards (stage, shard) VALUES (?, ?)", offered)

    def claim(self, worker: int) -> Task | None:
        """The first shard that nobody has, now this worker's; None if there is none."""
        with self._transaction():
            self.refuse_lost()
            row = self._database.execute(
                "UPDATE tasks SET state = 'taken', worker = ?, rows = 0 WHERE (stage, shard) IN "
                "(SELECT stage, shard FROM tasks WHERE state = 'due' ORDER BY shard LIMIT 1) "
                "RETURNING stage, shard, until, state, worker, rows",
                (worker,),
            ).fetchone()
        return None if row is None else Task(*row)

    def tell(self, task: Task, *, rows: int = 0, state: TaskState = "taken") -> None:
        """How far a worker has come with what it took."""
        with self._transaction():
            self._database.execute(
                "UPDATE tasks SET rows = rows + ?, state = ? WHERE stage = ? AND shard = ? AND worker = ?",
                (rows, state, task.stage, task.shard, task.worker),
            )

    def tasks(self) -> tuple[Task, ...]:
        """What was offered, and how far each has come."""
        with self._reported():
            rows = self._database.execute(
                "SELECT stage, shard, until, state, worker, rows FROM tasks"
            ).fetchall()
        return tuple(Task(*row) for row in rows)

    def give_up(self, worker: int) -> None:
        """Offer what a dead worker had taken again."""
        with self._transaction():
            self._database.execute(
                "UPDATE tasks SET state = 'due', worker = NULL WHERE worker = ? AND state = 'taken'",
                (worker,),
            )

    def withdraw(self) -> None:
        """Offer nothing more; what is taken is let finish."""
        with self._transaction():
            self._database.execute("UPDATE tasks SET state = 'late' WHERE state = 'due'")

    def spent(self, stage: str) -> Spent:
        """Time and attempts of one stage."""
        with self._reported():
            row = self._database.execute(
                "SELECT coalesce(sum(cpu_s), 0), coalesce(sum(wall_s), 0), coalesce(sum(attempts), 0) "
                "FROM shards WHERE stage = ?",
                (stage,),
            ).fetchone()
        return Spent(float(row[0]), float(row[1]), int(row[2]))

    def close(self, *, release: bool) -> None:
        """Give the lease back if it is ours, and leave one tidy file."""
        try:
            if release:
                _HERE.discard(self._path.resolve())
                self._database.execute(
                    "DELETE FROM lease WHERE host = ? AND pid = ? AND started = ?", self._me
                )
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (
            sqlite3.Error
        ):  # a full disk: the lease of a dead process is free anyway, and the log is read back
            pass
        finally:
            self._database.close()


def _is_ours(database: sqlite3.Connection) -> bool:
    """Whether a database has no tables but those of a run, and neither views nor triggers, which run what they hold.

    Only its schema is read, before any table is.
    """
    database.execute("PRAGMA trusted_schema=OFF")
    found = database.execute(
        "SELECT type, name, sql, rootpage FROM sqlite_master WHERE type != 'index' OR sql NOT NULL LIMIT 99"
    ).fetchall()
    tables = {
        name: " ".join(f"CREATE TABLE {name} {columns}".split())
        for name, columns in re.findall(r"CREATE TABLE IF NOT EXISTS (\w+) (\(.*?\));\n", _SCHEMA, re.DOTALL)
    }
    return all(
        kind == "table" and root and tables.get(name) == " ".join(str(sql).split())
        for kind, name, sql, root in found
    )


def spent_in(folder: Path) -> dict[str, Spent]:
    """Time and attempts by stage, for readers who hold no lease; empty where nothing is known.

    The file may come from a stranger: one with other tables than those of a run, or with other values, says nothing.
    """
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        # a reader of a live log needs its shared memory; one of a file at rest must leave nothing beside it
        at_rest = not path.with_name(f"{NAME}-wal").exists()
        mode = "immutable=1" if at_rest else "mode=ro"
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)) as database:
            if not _is_ours(database):
                return {}
            rows = database.execute(
                "SELECT stage, sum(cpu_s), sum(wall_s), sum(attempts) FROM shards GROUP BY stage"
            )
            found = {str(stage): Spent(float(cpu), float(wall), int(n)) for stage, cpu, wall, n in rows}
    except (sqlite3.Error, ValueError, TypeError, OverflowError):
        return {}  # times are told where they are known; the evidence stands without them
    return found if all(_is_plausible(spent) for spent in found.values()) else {}


def _is_plausible(spent: Spent) -> bool:
    return all(math.isfinite(value) and value >= 0 for value in astuple(spent))
