"""Opens and checks files, replaces them, and computes their digests."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from holdfast.core.errors import (
    HoldfastError,
    Placeholder,
    Remedy,
    TargetError,
    UsageError,
    data_argument,
    model_argument,
)
from holdfast.core.names import most_similar, suggestion

MOST_TEXT = 16 * 2**20
"""Largest number of bytes of a text file that is read as a whole, such as class names, bounds or a card."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
"""Flags with which opening a pipe or a terminal neither waits nor changes the terminal of the process."""
_SHOWN = 200
"""Largest number of characters of a reason in an error message."""
_NAMES, _NAME = 50, 100
"""Largest number of names, and of characters of a name, in an error message."""


def existing(path: Path, what: str) -> Path:
    """Return the path of a file or folder if it exists. Otherwise raise `TargetError`; `what` describes the path in the
    message.
    """
    if not os.path.exists(path):  # noqa: PTH110 - the method raises an error for a name that is too long
        if os.path.islink(path):  # noqa: PTH114
            raise TargetError(
                f"{what} {str(path)!r} is a link to {str(path.readlink())!r}, which does not exist; correct the link"
            )
        raise TargetError(f"{what} {str(path)!r} does not exist{_way_out(path)}")
    return path


def refuse_address(file: str, what: str, example: str) -> None:
    """Raise `UsageError` if the name of a file is an address in a network."""
    if "://" in file:
        raise UsageError(
            f"{what} {file!r}, an address; download the file, and give its path, as in {example}"
        )


def open_regular(
    path: Path,
    flags: int = os.O_RDONLY,
    *,
    follow: bool = False,
    refuse: "Callable[[Path, os.stat_result], None] | None" = None,
) -> int:
    """Open a regular file, and return its descriptor. It does not wait for a pipe, and follows a link only with
    `follow`.

    Raises `TargetError` for anything else than a regular file, by `refuse_irregular` or by `refuse`, and `OSError`.
    """
    refuse = refuse or refuse_irregular
    # Before it is opened, because opening a device may change its state, and after that, as it may have been replaced.
    refuse(path, path.stat() if follow else path.lstat())
    handle = os.open(path, flags | NO_WAITING | (0 if follow else _NO_LINK))
    try:
        refuse(path, os.fstat(handle))
    except TargetError:
        os.close(handle)
        raise
    return handle


def refuse_irregular(path: Path, status: os.stat_result) -> None:
    """Raise `TargetError` if a status is not that of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise TargetError(
            f"{str(path)!r} is a link, a folder or a device; a regular file was expected: put the file itself there"
        )


def opened(
    path: Path,
    what: str,
    *,
    most: int | None = None,
    may_be_empty: bool = False,
    advice: str = "remove what is not needed",
) -> BufferedReader:
    """Open a file for reading. Every file that the user, a configuration or another file names is opened by this
    function.

    The file is opened once, without waiting, and its type and size are those of the opened file, so that an exchange of
    the file in the meantime has no effect. Raises `TargetError`, whose message describes the file as `what`, for a
    missing or empty file, a folder, a pipe, a device, and a file of more than `most` bytes, with `advice`.
    """
    existing(path, what)

    def refuse(path: Path, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise TargetError(f"{what} {str(path)!r} is a folder; a file was expected")
        if not stat.S_ISREG(status.st_mode):
            raise TargetError(
                f"{what} {str(path)!r} is not a regular file, but a device, a pipe or a socket; copy its content to a "
                "file"
            )

    try:
        handle = open_regular(path, follow=True, refuse=refuse)
    except OSError as error:
        raise TargetError(
            f"{what} {str(path)!r} cannot be read by this user ({error.strerror or error}); check its permissions"
        ) from error
    n_bytes = os.fstat(handle).st_size
    if not n_bytes and not may_be_empty:
        os.close(handle)
        raise TargetError(f"{what} {str(path)!r} is empty (0 bytes); write or download it again")
    if most is not None and n_bytes > most:
        os.close(handle)
        raise TargetError(
            f"{what} {str(path)!r} has {megabytes(n_bytes)}; at most {megabytes(most)} is read: {advice}"
        )
    return os.fdopen(handle, "rb")


def readable_file(path: Path, what: str) -> Path:
    """Return the path if `opened` can open the file, for files that another process reads. Raises its errors."""
    with opened(path, what):
        return path


def content_of_file(
    path: Path, what: str, *, most: int | None = None, advice: str = "remove what is not needed"
) -> bytes:
    """Return the bytes of a file; see `opened`."""
    with opened(path, what, most=most, advice=advice) as file:
        return file.read()


def text_of_file(path: Path, what: str, *, most: int = MOST_TEXT, may_be_empty: bool = False) -> str:
    """Return the text of a file in UTF-8, without a byte order mark; see `opened`. Raises `TargetError` for a file that
    contains other bytes.
    """
    with opened(path, what, most=most, may_be_empty=may_be_empty) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TargetError(
            f"{what} {str(path)!r} is no text in UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8"
        ) from error


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


@contextmanager
def refusing(
    fault: str, kinds: type[Exception] | tuple[type[Exception], ...], advice: str = ""
) -> Iterator[None]:
    """Context manager that converts errors of some kinds to a `TargetError` with the fault, the reason and advice.

    The fault is a clause about the file, such as "'a.onnx' is no valid ONNX model".
    """
    try:
        yield
    except kinds as error:
        raise TargetError(f"{fault}: {reason_of(error)}{advice and f'; {advice}'}") from error


def reason_of(error: Exception) -> str:
    """Return the message of an error of a parser in one line of at most 200 characters."""
    return " ".join(str(error).split())[:_SHOWN]


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Context manager that opens a file for writing, which replaces the file at `path` when it is complete. After an
    error, `path` is unchanged. Missing folders are created. A `private` file can be read by its owner only.

    Raises `OSError`, and `TargetError` if a pipe or a device is at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # replacing a folder is an error of the system
            raise TargetError(
                f"{str(path)!r} is not a regular file, but a device, a pipe or a socket, which is not replaced; choose "
                "another name"
            )
    # in the same folder, since only a move inside one file system is atomic; a long name would exceed its limit
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            # before the move, so that a crash leaves the old file or the complete new one
            os.fsync(file.fileno())
        if not private:
            with suppress(OSError):  # some file systems have no modes
                Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the content of a file, in hex."""
    with opened(path, "file", may_be_empty=True) as file:
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
    if not os.path.isdir(path.parent):  # noqa: PTH112
        return f", and neither does its folder {str(path.parent)!r}; check the path"
    folder_text = f" in the folder {str(path.parent.absolute())!r}; check the path"
    return similar_file(path) or folder_text


LAYOUT = data_argument("layout", Placeholder("LAYOUT", "LAYOUT"), reason="(chw, hwc or asis)")
"""declaration of the axes of stored arrays"""
ARCHITECTURE = model_argument("arch", Placeholder("file.py:factory", "'file.py:factory'"))
"""the network of a file that contains weights only, as a function in the user's code"""
NORMALISED_DATA = Remedy("data_normalised")
"""removal of a declared normalisation of the data"""
OWN_FUNCTION = "write a function that returns scores (n, classes) into scores.py, and give scores.py:make"
"""advice for models that are no classifiers of numbers, which lines of code follow"""
