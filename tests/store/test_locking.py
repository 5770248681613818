"""Files of SQLite from elsewhere: a journal beside one of them deletes no other file."""

import os
import sqlite3
import struct
from contextlib import closing, suppress

import pytest

from holdfast.core.errors import TargetError
from holdfast.guard.state_in_sqlite import SQLiteState
from holdfast.runs.store.leases import locked

MAGIC = bytes.fromhex("d9d505f920a163d7")


def hot_journal(path, victim):
    """A database with a journal whose transaction is rolled back when it is opened; the victim is its super-journal."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE x (y)")
    name = str(victim).encode()
    head = MAGIC + struct.pack(">IIIII", 0, 0, 1, 512, 4096)
    tail = struct.pack(">II", len(name), sum(name)) + MAGIC
    journal = head.ljust(512, b"\0") + struct.pack(">I", 2**30 // 4096 + 1) + name + tail
    path.with_name(f"{path.name}-journal").write_bytes(journal)


def lock(path):
    with locked(path):
        pass


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("x.lock", lock),
        ("guard.sqlite", SQLiteState),
        ("control", lambda path: closing(sqlite3.connect(path)).thing.execute("SELECT * FROM x")),
    ],
)
def test_a_journal_does_not_delete_another_file(tmp_path, name, opened):
    victim = tmp_path / "victim"
    victim.write_text("x")
    (tmp_path / "folder").mkdir()
    hot_journal(tmp_path / "folder" / name, victim)
    with suppress(TargetError, sqlite3.DatabaseError):
        opened(tmp_path / "folder" / name)
    assert victim.exists() == (name != "control")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.with_name("x"))])
def test_a_lock_is_a_regular_file(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(TargetError, match="a regular file was expected"):
        lock(tmp_path / "lock")
    assert not (tmp_path / "x").exists()
