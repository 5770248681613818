"""Writing so that a kill, a power cut or a full disk at any moment leaves the old file or the new one, never half."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.core.errors import TargetError

PART = ".part"
"""How the name of a file ends while it is being written; whoever owns the folder may delete such files."""

MANIFEST = "run.json"
"""What every run folder holds."""
CHECKPOINTS = "checkpoints"
"""Begins the name of a folder that a training goes on from."""


def refuse_no_run(*folders: Path) -> None:
    """Raise `TargetError` for a folder that holds no run."""
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise TargetError(
                f"{str(folder)!r} is no run folder, for it has no {MANIFEST}; list them with holdfast runs"
            )


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names the path and the way out."""
    try:
        yield
    except OSError as error:
        raise TargetError(refusal(path, error)) from error


def refusal(path: Path, error: OSError) -> str:
    """Why a path cannot be used, and what to do about it."""
    shown = repr(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {shown} could not be written. Free some space and go on with --resume; "
            f"nothing that was finished is lost"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{shown} may not be written ({error.strerror}); name a folder of your own with --run DIR"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{shown} cannot be a folder, for a file is in the way; name another with --run DIR"
    return f"{shown} cannot be used: {error.strerror or error}; check the disk, or name another folder with --run DIR"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file, on the disk when this returns. Raises `OSError`; the old content then still stands."""
    part = path.with_name(f".{path.name}{PART}")
    try:
        _write(part, content, os.O_TRUNC)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, on the disk when this returns; a torn end is the reader's to drop."""
    before = path.stat().st_size if path.exists() else 0
    try:
        _write(path, content, os.O_APPEND)
    except BaseException:
        with suppress(OSError):
            os.truncate(path, before)
        raise
    if not before:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can do that."""
    if os.name == "nt":  # folders cannot be opened there; the file system journals names itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_parts(folder: Path) -> None:
    """Delete what an interrupted writer left unfinished."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def _write(path: Path, content: bytes, flag: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flag | getattr(os, "O_BINARY", 0), 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
