"""A lock between processes and threads: whoever dies lets go of it at once."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from holdfast.core.errors import InUse, TargetError
from holdfast.store.files import PRIVATE

WAIT_S = 60.0
"""How long to wait for another; what is done under a lock that is waited for takes far less."""


@contextmanager
def locked(path: Path, wait_s: float = WAIT_S, *, in_use: str = "") -> Iterator[None]:
    """Nobody else is inside this lock meanwhile; where another stays in it, `InUse` says what is given, if anything.

    The file is an SQLite database that stays empty: its locks hold on every system, and between the threads of one
    process too, where those of the system itself are lost when any of them closes the file.
    """
    try:
        new = not path.exists()
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
            f"{str(path)!r} cannot be locked: {error}; wait for the process that works there, or see who may write it"
        ) from error
    with closing(database):  # which ends the transaction, in which nothing was written
        yield
