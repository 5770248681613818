"""Writes files atomically, and refuses files that another user could have changed."""

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from holdfast.core.errors import OTHER_FOLDER, RESUME, TargetError
from holdfast.io.files import NO_WAITING, open_regular

PART = ".part"
"""Suffix of the names of files while they are written. Such files may be deleted by the owner of the folder."""

MANIFEST = "run.json"
POOL_MANIFEST = "pool.json"
"""File that identifies the folder of a pool, as `MANIFEST` identifies that of a run."""
AUDIT_MARK = "audit.json"
"""File that identifies the folder of the audit chains of a server."""
PRIVATE = 0o600
"""Mode of the files of a run, a pool or a server, which may contain examples or secrets: only their owner may read
them."""
BY_UMASK = 0o666
"""Mode of a file that a user names for a result, such as a report or a model, before the umask."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

CLIPS = "clips"
"""Folder of the saved adversarial clips of a run, and kind of the document with their digests."""
SERVED = "served.journal"
"""File in a run folder with the number of rows and requests sent to a server. Like times, it is not
part of the chain."""
CHECKPOINTS = "checkpoints"
"""Prefix of the names of folders with checkpoints."""


def refuse_no_run(*folders: Path) -> None:
    """Raise `TargetError` if one of the folders contains no run."""
    for folder in folders:
        if not folder.exists():
            raise TargetError(f"there is no folder {str(folder)!r}; list run folders with holdfast runs")
        if not (folder / MANIFEST).is_file():
            raise TargetError(
                f"{str(folder)!r} is not a run folder, because it contains no {MANIFEST}; list run folders with "
                "holdfast runs"
            )


def refusal(path: Path, error: OSError) -> TargetError:
    """Return the error for a path of a run that cannot be read or written."""
    shown = repr(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetError(
            f"the disk is full: {shown} could not be written. Free some space and resume; completed work is kept",
            RESUME,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TargetError(
            f"{shown} cannot be written ({error.strerror}); a folder with write permission was expected",
            OTHER_FOLDER,
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return TargetError(
            f"{shown} cannot be created as a folder, because a file is in its path", OTHER_FOLDER
        )
    return TargetError(f"{shown} cannot be used: {error.strerror or error}; check the disk", OTHER_FOLDER)


def refusal_in_pool(path: Path, error: OSError) -> TargetError:
    """Return the error for a file of a pool that cannot be read or written."""
    shown = repr(str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetError(
            f"the disk is full: {shown} could not be written. Free some space and try again; the pool is unchanged"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TargetError(
            f"{shown} cannot be used ({error.strerror}); only the user who created the pool can read and write its "
            "files"
        )
    return TargetError(
        f"{shown} cannot be used: {error.strerror or error}; check the path and the disk, or restore it from a copy"
    )


def content_of(
    path: Path, refused: Callable[[Path, OSError], TargetError] = refusal, *, follow: bool = False
) -> bytes:
    """Return the bytes of a regular file; see `open_regular`.

    Raises `TargetError`, and for an `OSError` the error that `refused` returns.
    """
    with usable(path, refused), os.fdopen(open_regular(path, follow=follow), "rb") as file:
        return file.read()


@contextmanager
def usable(path: Path, refused: Callable[[Path, OSError], TargetError] = refusal) -> Iterator[None]:
    """Context manager that converts an `OSError` to a `TargetError`, whose message contains the path and advice."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


def make_private(folder: Path) -> None:
    """Create a folder that only its owner can access, and the folders above it. An existing folder keeps its mode."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def mode_of(path: Path) -> int:
    """Return the mode of a file, which a new version of it keeps; `BY_UMASK` if there is none."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else BY_UMASK


def write_atomically(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a file atomically and flush it to the disk. Raises `OSError`; the file then has its old content.

    The mode is set before the file contains data, and replaces that of the old file. `BY_UMASK` is for files that a
    user names for a result.
    """
    part = path.with_name(f".{path.name}{PART}")
    try:
        _write(part, content, os.O_TRUNC, mode)
        # The rename is atomic, and the content was flushed before; otherwise a power failure could leave an empty
        # file.
        part.replace(path)
    except BaseException:
        # An error of the removal would hide the first one, such as a full disk.
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def create_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read, and flush it to the disk.

    Raises `FileExistsError` if a file or link of this name exists.
    """
    try:
        _write(path, content, os.O_EXCL, PRIVATE)
    except FileExistsError:  # it is another file, which must not be deleted below
        raise
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Append bytes to a file and flush it to the disk. After a kill, the appended part may be incomplete, and readers
    must ignore it.

    Only its owner may read the file, whatever its mode was before.
    """
    old_size = path.stat().st_size if path.exists() else 0
    try:
        _write(path, content, os.O_APPEND, PRIVATE)
    except BaseException:  # also for Ctrl-C: readers would see an incomplete last part until the next append
        with suppress(OSError):
            os.truncate(path, old_size)
        raise
    if not old_size:
        flush_folder(path.parent)


def opened_private(path: Path) -> BinaryIO:
    """Open an empty file for writing that only its owner may read."""
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK | NO_WAITING, PRIVATE), "wb"
    )


def flush_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to the disk, if the operating system supports it."""
    if os.name == "nt":  # folders cannot be opened on Windows; its file system keeps a journal of names
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_parts(folder: Path) -> None:
    """Delete the incomplete temporary files in a folder that remain after a process was interrupted."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def _write(path: Path, content: bytes, flag: int, mode: int) -> None:
    # A link or a pipe of this name may be in the folder of someone else.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flag | _NO_LINK | NO_WAITING, mode)
    try:
        if mode != BY_UMASK:  # the file may have existed with another mode
            os.chmod(handle if os.chmod in os.supports_fd else path, mode)  # noqa: PTH101 - not what has the name by now
        view = memoryview(content)
        while view:
            # os.write may write only a part, for example more than 2 GiB or on a full disk.
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


_MOST_LINKS = 40
"""number of links in a path, as in Linux"""
_ROOT = 0


def refuse_shared(path: Path) -> None:
    """Raise `TargetError` if another user could change or replace a file or a folder, or if it is neither.

    That is so if the file, its folder, or another folder or link on the way to it belongs to another user than that of
    this process or root, or may be written to by others. A group whose only member is the owner counts as the owner. In
    a folder with the sticky bit, such as /tmp, others may add files, but not replace those of the user: it may be on
    the way, but not contain the file.
    """
    if os.name == "nt":  # whose permissions are no modes
        return
    with usable(path, _unreadable):
        places = list(_visited(path.absolute()))
        target, kind = places[-1][0], places[-1][1].st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise TargetError(f"{str(path)!r} is a pipe or a device; a regular file or a folder was expected")
        for place, status in places:
            if status.st_uid not in (_ROOT, os.geteuid()):
                raise TargetError(
                    f"{str(place)!r}{_way_to(place, path)} belongs to the user {status.st_uid}, who could replace it; "
                    f"files of the user {os.geteuid()} or of root were expected: use a copy that belongs to you"
                )
            if stat.S_ISLNK(status.st_mode) or not _others_write(place, status):
                continue
            sticky = stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)
            if not sticky or place in (target, target.parent):
                raise TargetError(
                    f"{str(place)!r}{_way_to(place, path)} has the mode {stat.S_IMODE(status.st_mode):04o}, so that "
                    "other users could change or replace files; move the file to a folder of your own, or remove the "
                    f"permission: chmod go-w {shlex.quote(str(place))}"
                )


def _unreadable(path: Path, error: OSError) -> TargetError:
    return TargetError(f"{str(path)!r} cannot be read ({error.strerror or error}); check the path")


def _way_to(place: Path, path: Path) -> str:
    return "" if place == path else f", which is in the path of {str(path)!r},"


def _visited(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each folder and link on the way to a file, and last the file itself, with its status."""
    links, place, waiting = 0, Path(path.anchor), list(reversed(path.parts[1:]))
    yield place, place.lstat()
    while waiting:
        name = waiting.pop()
        place = place.parent if name == ".." else place / name
        status = place.lstat()
        yield place, status
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(f"more than {_MOST_LINKS} links")
            aim = place.readlink()
            waiting += reversed(aim.parts[1:] if aim.is_absolute() else aim.parts)
            place = Path(aim.anchor) if aim.is_absolute() else place.parent


def _others_write(place: Path, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    # with an access control list, the permissions of the group are those of all users in the list together
    return bool(status.st_mode & stat.S_IWGRP) and (
        _has_list(place) or not _is_private(status.st_gid, status.st_uid)
    )


def _has_list(place: Path) -> bool:
    if not hasattr(os, "listxattr"):
        return False
    with suppress(OSError):  # of a file system without attributes
        return "system.posix_acl_access" in os.listxattr(place)
    return False


def _is_private(group: int, user: int) -> bool:
    """Whether a group is that of one user: it has the user's name, is the primary group of this user alone, and has no
    other member.
    """
    import grp
    import pwd

    try:
        entry, owner = grp.getgrgid(group), pwd.getpwuid(user)
    except KeyError:
        return False
    # the members of a group do not include the users whose primary group it is
    members = {*entry.gr_mem, *(each.pw_name for each in pwd.getpwall() if each.pw_gid == group)}
    return entry.gr_name == owner.pw_name and group == owner.pw_gid and members <= {owner.pw_name}
