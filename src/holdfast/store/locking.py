"""A file lock between processes and threads, which is released when its process ends, even if it is killed."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from holdfast.core.errors import InUse, TargetError
from holdfast.store.files import PRIVATE, refuse_irregular

WAIT_S = 60.0
"""Seconds for which a process waits for the lock of another one; operations under such a lock are much shorter."""


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
            refuse_irregular(path, path.lstat())  # SQLite would follow a link
        database = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
        try:
            if new:
                path.chmod(PRIVATE)
            database.execute("BEGIN IMMEDIATE")
        except BaseException:
            database.close()
            raise
    except (sqlite3.Error, OSError) as error:
        if in_use and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise InUse(in_use) from error
        raise TargetError(
            f"{str(path)!r} cannot be locked: {error}; wait for the process that uses it, or check "
            "its permissions and the free space"
        ) from error
    with closing(database):  # closing ends the transaction, which wrote nothing
        yield
