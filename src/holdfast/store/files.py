"""Writing so that a kill, a power cut or a full disk at any moment leaves the old file or the new one, never half."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.core.errors import TargetError

PART = ".part"
"""How the name of a file ends while it is being written; whoever owns the folder may delete such files."""

MANIFEST = "run.json"
POOL_MANIFEST = "pool.json"
"""What every run folder holds."""
PRIVATE = 0o600
"""The mode of a secret: a file that only its owner may read."""
_OPEN = 0o666
"""The mode of any other file, less what the umask takes away."""

SERVED = "served.journal"
"""The file in a run folder that says what was sent to a server; as times are, it is no part of the chain."""
CHECKPOINTS = "checkpoints"
"""Begins the name of a folder that a training goes on from."""


def refuse_no_run(*folders: Path) -> None:
    """Raise `TargetError` for a folder that holds no run."""
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise TargetError(
                f"{str(folder)!r} is no run folder, for it has no {MANIFEST}; list them with holdfast runs"
            )


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


def refusal_in_pool(path: Path, error: OSError) -> str:
    """Why a file of a pool of weights cannot be used, and what to do about it."""
    shown = repr(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {shown} could not be written. Free some space and try again; the pool is as it was"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{shown} may not be used ({error.strerror}); work on the pool as the user who began it, who alone may "
            f"read and write its files"
        )
    return f"{shown} cannot be used: {error.strerror or error}; check the path and the disk, or restore it from a copy"


def content_of(path: Path) -> bytes:
    """The bytes of a file in a run folder, which may come from a stranger: a link or a device is not opened."""
    with usable(path):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise TargetError(
                f"{str(path)!r} is a link, a folder or a device, and a run keeps plain files; put the file itself there"
            )
        return path.read_bytes()


@contextmanager
def usable(path: Path, message: Callable[[Path, OSError], str] = refusal) -> Iterator[None]:
    """Turns an error of the operating system into one that names the path and the way out."""
    try:
        yield
    except OSError as error:
        raise TargetError(message(path, error)) from error


def write_atomically(path: Path, content: bytes, mode: int = _OPEN) -> None:
    """Write a whole file, on the disk when this returns. Raises `OSError`; the old content then still stands.

    With a `mode` of its own, as `PRIVATE`, the file has it before it holds a byte, whatever the old one had.
    """
    part = path.with_name(f".{path.name}{PART}")
    try:
        _write(part, content, os.O_TRUNC, mode)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def create_private(path: Path, content: bytes) -> None:
    """Write a new file for its owner alone, on the disk when this returns.

    Raises `FileExistsError` where the name is taken, also by a link, which is not followed.
    """
    try:
        _write(path, content, os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), PRIVATE)
    except FileExistsError:
        raise
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def append(path: Path, content: bytes, mode: int = _OPEN) -> None:
    """Add to the end of a file, on the disk when this returns; a torn end is the reader's to drop.

    With a `mode` of its own, as `PRIVATE`, the file has it before it holds a byte more.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        _write(path, content, os.O_APPEND, mode)
    except BaseException:
        with suppress(OSError):
            os.truncate(path, before)
        raise
    if not before:
        flush_folder(path.parent)


@contextmanager
def private() -> Iterator[None]:
    """Within it, files and folders that are made are for their owner alone; in all threads, so not for long."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


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


def _write(path: Path, content: bytes, flag: int, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flag | getattr(os, "O_BINARY", 0), mode)
    try:
        if mode != _OPEN:  # the file may have been there, and open to others
            os.chmod(handle if os.chmod in os.supports_fd else path, mode)  # noqa: PTH101 - not what has the name by now
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
