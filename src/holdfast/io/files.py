"""Checks and computes digests of files that the user specifies."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.spelling import most_similar, suggestion

_SHOWN = 200
"""Largest number of characters of a reason in an error message."""
_NAMES, _NAME = 50, 100
"""Largest number of names, and of characters of a name, in an error message."""


def existing(path: Path, what: str) -> Path:
    """Return the path of a file or folder if it exists. Otherwise raise `TargetError`; `what` describes the path in the
    message.
    """
    if not path.exists():
        raise TargetError(f"{what} {str(path)!r} does not exist{_way_out(path)}")
    return path


def refuse_address(file: str, what: str, example: str) -> None:
    """Raise `UsageError` if the name of a file is an address in a network."""
    if "://" in file:
        raise UsageError(
            f"{what} {file!r}, an address; download the file, and give its path, as in {example}"
        )


def readable_file(path: Path, what: str) -> Path:
    """Return the path if it is a readable file that is not empty.

    Otherwise raise `TargetError`, whose message describes the file as `what`.
    """
    if existing(path, what).is_dir():
        raise TargetError(f"{what} {str(path)!r} is a folder; a file was expected")
    if not path.is_file():
        raise TargetError(
            f"{what} {str(path)!r} is not a regular file, but a device, a pipe or a socket; copy its content to a file"
        )
    if not os.access(path, os.R_OK):
        raise TargetError(f"{what} {str(path)!r} cannot be read by this user; check its permissions")
    if path.stat().st_size == 0:
        raise TargetError(f"{what} {str(path)!r} is empty (0 bytes); write or download it again")
    return path


@contextmanager
def reading(address: object) -> Iterator[None]:
    """Context manager that converts every error of a parser to a `TargetError` that names the file at `address` and the
    reason.
    """
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise TargetError(
            f"{str(address)!r} cannot be read ({reason}); it is damaged, or its format is not that of its suffix: "
            "write or download it again"
        ) from error


def reason_of(error: Exception) -> str:
    """Return the message of an error of a parser in one line of at most 200 characters."""
    return " ".join(str(error).split())[:_SHOWN]


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the content of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def similar_name(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an error message, ` (did you mean 'x'?)`, with the most similar of the `known` names, or
    "" if none is similar.
    """
    offered = suggestion(name, known)
    return f" ({offered})" if offered else ""


def similar_file(path: Path) -> str:
    """Return a suggestion for an error message, ` (did you mean 'x'?)`, with the path of the file or folder beside a
    missing one that has the most similar name, or "" if there is none.
    """
    try:
        name = most_similar(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:  # no folder, or one that can be entered but not listed: there is no name to suggest
        return ""
    return "" if name is None else f" (did you mean {str(path.with_name(name))!r}?)"


def names_of(names: Sequence[str]) -> str:
    """Return the first fifty names that a file contains, separated by commas, or "nothing" if there are none."""
    shown = ", ".join(name[:_NAME] for name in names[:_NAMES]) or "nothing"
    return shown + (" …" if len(names) > _NAMES else "")


def megabytes(n_bytes: int) -> str:
    """Return a size in bytes as a string in megabytes, such as "200 MB" or "0.2 MB"."""
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes >= 10_000_000 else f"{n_bytes / 1e6:.2g} MB"


def _way_out(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and neither does its folder {str(path.parent)!r}; check the path"
    folder_text = f" in the folder {str(path.parent.absolute())!r}; check the path"
    return similar_file(path) or folder_text
