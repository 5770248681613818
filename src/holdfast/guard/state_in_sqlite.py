"""State of the query detector and of rates in a SQLite file, for several processes of one machine."""

import itertools
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from struct import pack
from threading import RLock
from time import monotonic, sleep
from typing import Any

import numpy as np

from holdfast.core.errors import TargetError
from holdfast.guard.detectors.fingerprints import Hashes
from holdfast.guard.detectors.queries import (
    BUCKET,
    Account,
    Fail,
    Health,
    QueryCluster,
    StateLimits,
    StateView,
    SteadyClock,
    Wanted,
)
from holdfast.guard.state_in_memory import (
    Charge,
    Grant,
    Reachability,
    TokenBucket,
    sketch_bytes,
    sketches_from,
    spent,
)
from holdfast.io.files import open_regular
from holdfast.runs.store.files import PRIVATE
from holdfast.runs.store.leases import has_foreign_journal

AT_LAST = 32_000
"""pages of the log (128 MB) from which a transaction makes the checkpoint itself, if the thread cannot"""

_BUSY_MS = 50
"""milliseconds for which transactions of this process may wait for a checkpoint by another process"""


class Checkpoints:
    """Thread that makes checkpoints of a file when they are due. It begins with the first one. `writing` is the lock of
    the transactions of this process.
    """

    def __init__(self, path: Path, writing: RLock, wait_s: float) -> None:
        self._address, self._writing, self._wait_s = path.absolute().as_uri() + "?mode=rw", writing, wait_s
        self._due, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    def due(self) -> None:
        """Make a checkpoint soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()
        self._due.set()

    def close(self) -> None:
        """End the thread after a last checkpoint, if one was ever due."""
        self._closed = True
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()  # before `_closed` is read, because `close` sets it first
            closed = self._closed
            with suppress(sqlite3.Error):  # of a file that cannot be used, which the next transaction reports
                self._checkpoint()
            if closed:
                return

    def _checkpoint(self) -> None:
        # a connection for each, because the file may have been replaced
        with closing(sqlite3.connect(self._address, uri=True, timeout=self._wait_s)) as db:
            db.execute("PRAGMA synchronous = NORMAL")
            for _ in range(2):  # transactions go on meanwhile, so that the second one is shorter
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            # what is left is short; the log is then written from its beginning again, unless another process is busy
            db.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
            with self._writing:
                db.execute("PRAGMA wal_checkpoint(RESTART)")


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

    def add(self, hashes: Sequence[int], row: int) -> None:
        """Add the hashes of a row."""
        recent = self._recent
        for each in hashes:
            if recent.setdefault(each, row) != row:
                self._further.setdefault(each, []).append(row)
        self._n_recent += len(hashes)
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
        further = [(each, row) for each, rows in self._further.items() for row in rows]
        hashes = np.array([*self._recent, *(each for each, _ in further)], np.int64)
        rows = np.array([*self._recent.values(), *(row for _, row in further)], np.int64)
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


_FORMAT = 2
_RETRY_S = 0.5  # between two attempts to use a file that was lost
Counts = tuple[int, int, int, int]
"""numbers of clusters, answers and accounts, and the last sequence number"""
_Pairs = tuple[HashIndex, Sequence[int], int]
"""an index, the hashes that are to be added to it, and the number of their row"""

_GAIN = 200  # new rows of one process after which it drops old ones
_AGAIN_S = 0.02  # between two attempts to open a file that another process creates
_LONGEST_LOG = 16 * 2**20  # bytes of the write-ahead log from which a process makes a checkpoint
_HASH = 8  # bytes of a stored hash
_STALE = 1000  # pairs of an index, beyond twice those of the stored rows, from which dropped rows are removed
_ROWS = 64  # most rows of one statement
_PARAMETERS = 5000  # in one statement; SQLite allows 32,766
_NUMBER = (int, float)
_BALANCE, _CLUSTER = (_NUMBER, _NUMBER, int, _NUMBER), (bytes, _NUMBER, int, _NUMBER)
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS state (
    id INTEGER PRIMARY KEY CHECK (id = 1), wall REAL, steady REAL, clusters INTEGER, answers INTEGER, accounts INTEGER,
    sequence INTEGER);
CREATE TABLE IF NOT EXISTS clusters (
    sequence INTEGER PRIMARY KEY, leader BLOB, hashes BLOB, mass REAL, members INTEGER, seen REAL);
CREATE INDEX IF NOT EXISTS clusters_seen ON clusters (seen);
CREATE TABLE IF NOT EXISTS answers (sequence INTEGER PRIMARY KEY, digest INTEGER, seen REAL);
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, queries REAL, mass REAL, seen REAL);
CREATE INDEX IF NOT EXISTS accounts_seen ON accounts (seen);
CREATE TABLE IF NOT EXISTS balances (name TEXT PRIMARY KEY, tokens REAL, seen REAL, used INTEGER, began REAL);
CREATE INDEX IF NOT EXISTS balances_seen ON balances (seen);
PRAGMA user_version = {_FORMAT};
"""


class SQLiteState:
    """State in a SQLite file, which any number of processes of one machine open at the same time.

    `wait_s` is how long a transaction waits for those of other processes. Raises `TargetError` if the file cannot be
    opened; later errors are reported, and handled as `fail` states.
    """

    def __init__(
        self, path: Path, limits: StateLimits | None = None, *, fail: Fail = "closed", wait_s: float = 2.0
    ) -> None:
        self.path, self.limits, self.fail = path, limits or StateLimits(), fail
        self._wait_s, self._lock, self._clock = wait_s, RLock(), SteadyClock()
        self._files = tuple(f"{path}{suffix}" for suffix in ("", "-wal", "-shm"))
        self._reach, self._gained = Reachability(f"state in {path}", fail, _RETRY_S), 0
        self._checkpoints, self._closed = Checkpoints(path, self._lock, wait_s), False
        try:
            self._db = self._opened()
        except (sqlite3.Error, OSError) as error:
            raise TargetError(
                f"the state {path} cannot be opened ({error}); expected a file in a writable folder of a local disk"
            ) from error

    @property
    def health(self) -> Health:
        """Whether the file can be used, and how often it could not."""
        return self._reach.health

    def exchange(self, wanted: Wanted, now: float, decide: Callable[[StateView], None]) -> bool:
        """Read, decide and store in one transaction, like `QueryState.exchange`."""

        def work(db: sqlite3.Connection) -> None:
            time, counts = self._begun(db, now)
            self._follow(db, counts[3])
            self._forget(db, counts, wanted.hashes.shape[1])
            view = self._view(db, wanted, time)
            decide(view)
            stored[:] = self._store(db, view, counts[3])
            self._finish(db, view, now, counts)

        stored: list[_Pairs] = []
        with self._lock:
            if not self._run(work):
                return False
            for index, hashes, self._known in stored:
                index.add(hashes, self._known)
        return True

    def spend(self, charges: Sequence[Charge], now: float) -> list[Grant]:
        """Answer charges in one transaction, like `SharedState.spend`."""
        grants: list[Grant] = []

        def work(db: sqlite3.Connection) -> None:
            time, counts = self._begun(db, now)
            for charge in charges:
                row = db.execute(
                    "SELECT tokens, seen, used, began FROM balances WHERE name = ?", (charge.principal,)
                ).fetchone()
                old = TokenBucket(*_typed(row, *_BALANCE)) if row else None
                grant, new = spent(charge, old, time)
                db.execute(
                    "INSERT OR REPLACE INTO balances VALUES (?, ?, ?, ?, ?)",
                    (charge.principal, new.tokens, new.seen, new.used, new.began),
                )
                grants.append(grant)
            _save(db, now, time, counts)

        if not self._run(work):
            return [Grant(granted=self.fail == "open", reason="lost", lost=True) for _ in charges]
        return grants

    def close(self) -> None:
        """Close the file. The last process that does so removes the files beside it. Later batches are refused."""
        self._checkpoints.close()
        with self._lock:
            self._closed = True
            self._db.close()

    def _opened(self) -> sqlite3.Connection:
        """Open the file. If several processes create it at the same time, SQLite does not wait, but fails at once."""
        until = monotonic() + self._wait_s
        while True:
            try:
                return self._connected()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() >= until:
                    raise
            sleep(_AGAIN_S)

    def _connected(self) -> sqlite3.Connection:
        # readable by this user only, before SQLite creates it and the files beside it with the same mode
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, PRIVATE))
        handle = open_regular(self.path, os.O_RDWR)  # no link, which may be replaced to change another file
        try:
            identity = _identity(os.fstat(handle))
        finally:
            os.close(handle)
        if has_foreign_journal(self.path):
            raise TargetError(f"the journal beside the state {self.path} is not one of this state; remove it")
        self._pid = os.getpid()
        db = sqlite3.connect(
            self.path,
            timeout=self._wait_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=4 * _ROWS,  # those of `_insert` for each number of rows, and the others
        )
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA cache_size = -32000")  # KiB
            db.execute(f"PRAGMA wal_autocheckpoint = {AT_LAST}")
            db.execute("PRAGMA journal_size_limit = 0")  # the log is shortened when it begins again
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise TargetError(
                    f"the state {self.path} has the format {version}; expected {_FORMAT}. Delete the file to start a "
                    "new state"
                )
            if version == 0:
                db.executescript(_SCHEMA)
            # of the file that was opened first: if another one is there by now, it differs
            self._identities = (identity, *map(_identity, self._statuses()[1:]))
            self._size = 0
            self._clusters, self._answers, self._known = HashIndex(), HashIndex(), 0
            with _transaction(db, "DEFERRED"):  # now, because it takes a second if the state is full
                row = db.execute("SELECT sequence FROM state").fetchone()
                self._follow(db, 0 if row is None else _typed(row, int)[0])
        except BaseException:
            db.close()
            raise
        return db

    def _run(self, work: Callable[[sqlite3.Connection], None]) -> bool:
        with self._lock:
            if self._closed or self._reach.waiting:
                return False
            try:
                if self._pid != os.getpid():  # a connection must not be used after a fork
                    self._db = self._opened()
                    self._checkpoints = Checkpoints(self.path, self._lock, self._wait_s)
                log_size = self._refuse_replaced()
                with _transaction(self._db) as db:
                    work(db)
            except (sqlite3.Error, OSError, TargetError) as error:
                self._reach.lost(error)
                self._reopen()
                return False
            self._reach.reached()
            if log_size >= _LONGEST_LOG:
                self._checkpoints.due()
            return True

    def _statuses(self) -> list[os.stat_result]:
        return [os.stat(file) for file in self._files]  # noqa: PTH116 - takes half the time

    def _refuse_replaced(self) -> int:
        """Return the size of the write-ahead log. Raises `OSError` if the files at the path are not those of the
        connection, or were shortened. SQLite itself would continue to use files that were removed, of which other
        processes and the next server know nothing.
        """
        try:
            statuses = self._statuses()
            size = statuses[0].st_size
            replaced = tuple(map(_identity, statuses)) != self._identities or size < self._size
        except FileNotFoundError:
            size, replaced = 0, True
        if replaced:
            if self._reach.health.reachable:
                self._reach.emptied()
            raise OSError("the file, or the log beside it, was removed or replaced")
        self._size = size
        return statuses[1].st_size

    def _reopen(self) -> None:
        """Open the file again, because a connection to a file that was removed or damaged stays unusable."""
        self._db.close()  # first, because the last connection to a file removes the files beside it
        with suppress(sqlite3.Error, OSError, TargetError):  # the next attempt reports it
            self._db = self._opened()

    def _begun(self, db: sqlite3.Connection, now: float) -> tuple[float, Counts]:
        """Time and counts of the state."""
        row = db.execute("SELECT wall, steady, clusters, answers, accounts, sequence FROM state").fetchone()
        if row is None:
            return self._clock.at(now, None), (0, 0, 0, 0)
        wall, steady, *counts = _typed(row, _NUMBER, _NUMBER, int, int, int, int)
        return self._clock.at(now, (wall, steady)), (counts[0], counts[1], counts[2], counts[3])

    def _follow(self, db: sqlite3.Connection, last: int) -> None:
        """Add the rows that other processes have stored, up to the sequence number `last`, to the indices."""
        if last <= self._known:
            return
        after = "WHERE sequence > ? ORDER BY sequence"
        rows = db.execute(f"SELECT sequence, hashes FROM clusters {after}", (self._known,)).fetchall()  # noqa: S608
        sizes = [len(hashes) // _HASH for _, hashes in (_typed(row, int, bytes) for row in rows)]
        hashes = np.frombuffer(b"".join(hashes for _, hashes in rows), "<i8", sum(sizes))
        self._clusters.add_many(hashes, np.array([row for row, _ in rows], np.int64).repeat(sizes))
        rows = db.execute(f"SELECT digest, sequence FROM answers {after}", (self._known,)).fetchall()  # noqa: S608
        pairs = np.array([_typed(row, int, int) for row in rows], np.int64).reshape(-1, 2)
        self._answers.add_many(pairs[:, 0], pairs[:, 1])
        self._known = last

    def _forget(self, db: sqlite3.Connection, counts: Counts, tables: int) -> None:
        """Remove rows that were dropped from the indices once they are more than the others. A cluster has at most
        `tables` hashes.
        """
        if len(self._clusters) > 2 * tables * counts[0] + _STALE:
            self._clusters.keep(_sequences(db, "clusters"))
        if len(self._answers) > 2 * counts[1] + _STALE:
            self._answers.keep(_sequences(db, "answers"))

    def _view(self, db: sqlite3.Connection, wanted: Wanted, now: float) -> StateView:
        buckets = self._clusters.rows(wanted.hashes.ravel())
        stored = {
            key: _typed(cluster, *_CLUSTER)
            for key, *cluster in _rows(
                db,
                "SELECT sequence, leader, mass, members, seen FROM clusters WHERE sequence IN",
                {key for bucket in buckets.values() for key in bucket},
            )
        }
        leaders = sketches_from([leader for leader, *_ in stored.values()])
        clusters = {
            key: QueryCluster(key, leader, mass, members, seen)
            for (key, (_, mass, members, seen)), leader in zip(stored.items(), leaders, strict=True)
        }
        for each, bucket in buckets.items():
            if len(bucket) > BUCKET:  # to which several processes added
                kept = sorted((key for key in bucket if key in clusters), key=lambda key: clusters[key].seen)
                buckets[each] = kept[-BUCKET:]
                for key in set(bucket).difference(buckets[each]):
                    self._clusters.discard(each, key)
        answered = set(self._answers.rows(np.array(wanted.digests, np.int64)))
        accounts = {
            name: Account(*_typed(account, _NUMBER, _NUMBER, _NUMBER))
            for name, *account in _rows(
                db, "SELECT name, queries, mass, seen FROM accounts WHERE name IN", wanted.principals
            )
        }
        return StateView(now, self.limits.half_life_s, clusters, buckets, answered, accounts)

    def _store(self, db: sqlite3.Connection, view: StateView, last: int) -> list[_Pairs]:
        """Store clusters and answers with the sequence numbers after `last`, and return what is to be added to the
        indices.
        """
        dropped, added, stored = set(view.dropped), [], list[_Pairs]()
        for sequence, (key, hashes) in enumerate(view.added.items(), last + 1):
            cluster = view.clusters[key]
            kept = [each for each in hashes if (each, key) not in dropped] if dropped else hashes
            content = sketch_bytes(cluster.leader), pack(f"<{len(kept)}q", *kept)
            added.append((sequence, *content, cluster.mass, cluster.members, cluster.seen))
            stored.append((self._clusters, kept, sequence))
        _insert(db, "INSERT INTO clusters", added)
        answers = [(k, each, view.now) for k, each in enumerate(view.answers, last + len(added) + 1)]
        _insert(db, "INSERT INTO answers", answers)
        stored += [(self._answers, (each,), k) for k, each, _ in answers]
        for each, key in view.dropped:
            self._clusters.discard(each, key)
        if touched := [view.clusters[key] for key in view.touched.keys() - view.added.keys()]:
            db.executemany(
                "UPDATE clusters SET mass = ?, members = ?, seen = ? WHERE sequence = ?",
                [
                    (min(each.mass, self.limits.heaviest), each.members, view.now, each.key)
                    for each in touched
                ],
            )
        return stored

    def _finish(self, db: sqlite3.Connection, view: StateView, now: float, counts: Counts) -> None:
        """Store the accounts, drop what is too old or too much, and store the clock and the counts."""
        n_accounts = counts[2]
        for name in view.charged:
            account = view.accounts[name]
            row = (account.queries, account.mass, account.seen, name)
            if not db.execute(
                "UPDATE accounts SET queries = ?, mass = ?, seen = ? WHERE name = ?", row
            ).rowcount:
                db.execute("INSERT INTO accounts VALUES (?, ?, ?, ?)", (name, *row[:3]))
                n_accounts += 1
        n_rows = len(view.added) + len(view.answers)
        counts = counts[0] + len(view.added), counts[1] + len(view.answers), n_accounts, counts[3] + n_rows
        gained = n_rows + len(view.charged)
        self._gained += gained
        if self._gained >= _GAIN:
            counts, self._gained = self._dropped(db, view.now, counts), 0
        _save(db, now, view.now, counts)

    def _dropped(self, db: sqlite3.Connection, now: float, counts: Counts) -> Counts:
        """Drop what is too old or too much, and return the numbers of what is left. Several times as much is dropped as
        was gained, so that a shrunken limit is reached without a long transaction.
        """
        oldest, most = now - self.limits.lifetime_s, 4 * self._gained
        _drop(db, "balances", oldest, 0, most)
        return (
            counts[0] - _drop(db, "clusters", oldest, counts[0] - self.limits.clusters, most),
            counts[1] - _drop(db, "answers", oldest, counts[1] - self.limits.digests, most, by="rowid"),
            counts[2] - _drop(db, "accounts", oldest, counts[2] - self.limits.accounts, most),
            counts[3],
        )


def _typed(row: Sequence[Any], *kinds: type | tuple[type, ...]) -> Sequence[Any]:
    """Return a row whose values are of the given types. SQLite stores values of any type in any column."""
    if not all(map(isinstance, row, kinds)):
        raise sqlite3.DataError("the file contains values of other types than those of a state")
    return row


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
    db.execute(f"BEGIN {kind}")  # a deferred one that writes later could fail, because another process wrote
    try:
        yield db
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _rows(db: sqlite3.Connection, query: str, values: Iterable[object]) -> Iterator[tuple[Any, ...]]:
    """Rows of a query that ends with IN, over any number of values."""
    every = list(values)
    for start in range(0, len(every), _PARAMETERS):
        part = every[start : start + _PARAMETERS]
        # all at once: a cursor that an error leaves open could be closed after its connection
        yield from db.execute(f"{query} ({','.join('?' * len(part))})", part).fetchall()


def _insert(db: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Insert rows, many with each statement.

    SQLite releases the interpreter lock in each step of a statement, and a thread that computes a model may keep it
    then. `executemany` takes one step for each row.
    """
    for first in range(0, len(rows), _ROWS):
        part = rows[first : first + _ROWS]
        values = ",".join([f"({','.join('?' * len(part[0]))})"] * len(part))
        db.execute(f"{statement} VALUES {values}", list(itertools.chain(*part)))


def _sequences(db: sqlite3.Connection, table: str) -> Hashes:
    """Sequence numbers of the rows of a table."""
    return np.array(db.execute(f"SELECT sequence FROM {table}").fetchall(), np.int64).ravel()  # noqa: S608


def _drop(db: sqlite3.Connection, table: str, oldest: float, excess: int, most: int, by: str = "seen") -> int:
    """Delete rows that are too old, or `excess` rows beyond the limit, at most `most`; returns their number. `by` is an
    indexed column in whose order the oldest rows are the first.
    """
    limit = min(max(excess, 1), most)
    return db.execute(
        f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} ORDER BY {by} LIMIT ?) AND (? OR seen < ?)",  # noqa: S608
        (limit, excess > 0, oldest),
    ).rowcount


def _save(db: sqlite3.Connection, wall: float, steady: float, counts: Counts) -> None:
    db.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?, ?, ?)", (wall, steady, *counts))
