"""Checkpoints of a SQLite file in WAL mode by a thread of their own, so that transactions seldom wait for the disk.

A checkpoint copies the pages of the write-ahead log into the file and flushes both. SQLite does so in the transaction
that makes the log longer than a limit, which delays the requests of a batch by tenths of a second on a slow disk.
"""

import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path
from threading import RLock

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
