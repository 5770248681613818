"""Writes reports to files, in the format that the suffix of the file name states. The module does not import torch."""

import contextlib
import tempfile
from collections.abc import Iterator
from io import StringIO, TextIOWrapper
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, TextIO

from holdfast.core.catalogue import BUNDLED, load, names
from holdfast.core.errors import TargetError, UsageError
from holdfast.io import files

if TYPE_CHECKING:
    from holdfast.reports.tree import Report

_RUN = "run.json"
"""file that identifies the folder of a run"""


def check_destination(path: Path) -> None:
    """Check before a run that a report can be written to a path.

    Raises `UsageError` for an unknown suffix, and `TargetError` if the file cannot be written.
    """
    suffix = _suffix(path)
    if suffix not in BUNDLED["reports"]:  # a package that cannot be imported ends no finished run
        load("reports", suffix, FunctionType)
    refuse_unwritable(path, f"a report is a file, as in {path / 'report.html'}")


def refuse_unwritable(path: Path, advice: str = "give the path of a file") -> None:
    """Raise `TargetError` if no file can be created or replaced at a path. `advice` is for the path of a folder."""
    if path.is_dir():
        raise TargetError(f"{path} is a folder; {advice}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise TargetError(f"{path} cannot be written: {folder} is a file, not a folder; choose another place")
    try:  # tested by writing, since to root every folder seems writable
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"no file can be created in {folder} ({error.strerror or error})"
        raise TargetError(f"{path} cannot be written: {reason}; choose another place") from error


def write(report: "Report", path: Path) -> Path:
    """Write a report to a file, atomically, in the format that the suffix of the path states, and return the path.
    Missing folders are created.
    """
    render = load("reports", _suffix(path), FunctionType)
    with explained(path), replacing(path) as file:
        render(report, file)
    return path


def rendered(report: "Report", suffix: str) -> str:
    """Return a report as text in the format of a file suffix, such as `.md`."""
    file = StringIO()
    load("reports", suffix, FunctionType)(report, file)
    return file.getvalue()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert an `OSError` to a `TargetError` with advice."""
    try:
        yield
    except OSError as error:
        raise TargetError(
            f"{path} cannot be written: {error.strerror or error}; free some space or choose another place with -o"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Context manager that opens a text file, which replaces the file at `path` when it is complete. After an error,
    `path` is unchanged.
    """
    # beside the examples of a run it stays private
    with files.replacing(path, private=(path.parent / _RUN).exists()) as file:
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.detach()


def _suffix(path: Path) -> str:
    """The suffix of the path. Raises `UsageError` if no format has it."""
    suffix, suffixes = path.suffix.lower(), names("reports")
    if suffix not in suffixes:
        has = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UsageError(
            f"-o {path} has {has}; expected one of {' '.join(suffixes)}, or - for JSON on stdout"
        )
    return suffix
