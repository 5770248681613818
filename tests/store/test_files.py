"""Writing: whole or not at all, whatever fails."""

import errno
import os
import sys
from pathlib import Path

import pytest

from disk import failing
from holdfast.core.errors import TargetError
from holdfast.runs.store.files import (
    BY_UMASK,
    append,
    clear_parts,
    mode_of,
    refusal_in_pool,
    usable,
    write_atomically,
)


@pytest.mark.parametrize("at", range(1, 7))
def test_a_failed_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch, at):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        failing(patch, at, ("open", "write", "fsync", "replace"))
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == (b"old" if at <= 4 else b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_partial_write_is_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    write_atomically(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch, at):
    path = tmp_path / "file"
    append(path, b"one\n")
    with monkeypatch.context() as patch:
        failing(patch, at, ("open", "write", "fsync", "replace"))
        with pytest.raises(OSError, match="No space"):
            append(path, b"two\n")
    assert path.read_bytes() == b"one\n"
    append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
@pytest.mark.parametrize("write", [write_atomically, append])
def test_a_secret_is_its_owners_alone_from_its_first_byte_on(tmp_path, monkeypatch, write):
    secret, plain, seen = tmp_path / "secret", tmp_path / "plain", []
    secret.write_bytes(b"old")
    secret.chmod(0o644)
    (tmp_path / ".secret.part").write_bytes(b"left by a kill")
    (tmp_path / ".secret.part").chmod(0o666)
    real = os.write

    def watched(handle, data):
        seen.append(os.fstat(handle).st_mode & 0o777)
        return real(handle, data)

    monkeypatch.setattr(os, "write", watched)
    write(secret, b"new")
    assert seen == [0o600] and secret.stat().st_mode & 0o777 == 0o600
    umask = os.umask(0o022)
    try:
        write_atomically(plain, b"new", BY_UMASK)
    finally:
        os.umask(umask)
    assert plain.stat().st_mode & 0o777 == 0o644
    plain.chmod(0o640)
    write_atomically(plain, b"newer", mode_of(plain))
    assert plain.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "code, says",
    [
        (errno.ENOSPC, "the disk is full: '/some/pool' .*; the pool is unchanged"),
        (errno.EACCES, "'/some/pool' cannot be used .*only the user who created"),
        (errno.EIO, "'/some/pool' cannot be used: Input/output error; .*restore it from a copy"),
    ],
)
def test_an_error_of_the_system_in_a_pool_names_no_flag_of_a_run(code, says):
    with pytest.raises(TargetError, match=says) as caught, usable(Path("/some/pool"), refusal_in_pool):
        raise OSError(code, os.strerror(code))
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    "code, says",
    [
        (
            errno.ENOSPC,
            "the disk is full: '/some/place' could not be written. Free some space and resume; .*; give resume=True",
        ),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "cannot be written .*; a folder with write permission was expected; give run=DIR"),
        (errno.EACCES, "cannot be written"),
        (errno.ENOTDIR, "a file is in its path"),
        (errno.EIO, "cannot be used: Input/output error; check the disk"),
    ],
)
def test_an_error_of_the_system_names_the_path_and_the_way_out(tmp_path, code, says):
    def refused():
        raise OSError(code, os.strerror(code))

    with pytest.raises(TargetError, match=says) as caught, usable(Path("/some/place")):
        refused()
    assert caught.value.exit_code == 3


def test_unfinished_files_are_cleared(tmp_path):
    (tmp_path / ".a.safetensors.part").write_text("half")
    (tmp_path / "b.part").write_text("mine")
    clear_parts(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.part"]
