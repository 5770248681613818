"""Refuses files that another user could have changed or replaced."""

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from holdfast.core.errors import TargetError
from holdfast.runs.store.files import usable

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
