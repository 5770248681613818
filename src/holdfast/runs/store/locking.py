"""A file lock between processes and threads, which is released when its process ends, even if it is killed."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from holdfast.core.errors import InUse, TargetError
from holdfast.io.files import open_regular, refuse_irregular
from holdfast.runs.store.files import PRIVATE

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
