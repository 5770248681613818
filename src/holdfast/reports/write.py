"""Writes reports to files, in the format that the suffix of the file name states. The module does not import torch."""

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TextIO

from holdfast.core.catalogue import BUNDLED, load, names
from holdfast.core.errors import TargetError, UsageError
from holdfast.io import files

if TYPE_CHECKING:
    from holdfast.core.evidence import Columns

Summary = Mapping[str, Any]

_RUN = "run.json"
"""file that identifies the folder of a run"""
TABLE = ".csv"
"""File suffix of the table with one row for each example."""
EXHIBIT_SUFFIXES = (".json",)
"""File suffixes that are allowed for the measurements of the gallery."""
COMPARISON_SUFFIXES = (".html", ".json", ".md")
"""File suffixes that are allowed for a comparison."""
MONITORING_SUFFIXES = (".html", ".json", ".md")
"""File suffixes that are allowed for the report of a monitored stream."""
EXPLANATION_SUFFIXES = (".html", ".json")
"""Suffixes of the formats in which explanations are written."""
ANNEX_SUFFIXES = (".html", ".json", ".md")
"""File suffixes that are allowed for the annex of a standard."""
AUDIT_SUFFIXES = (".html", ".json", ".md", ".xml")
"""File suffixes that are allowed for the report of an audit."""


def check_destination(path: Path, suffixes: Collection[str] | None = None) -> None:
    """Check before a run that a file can be written to a path. Without `suffixes` it is a report.

    Raises `UsageError` for an unknown suffix, and `TargetError` if the file cannot be written.
    """
    suffix = _suffix(path, names("reports") if suffixes is None else suffixes)
    if (
        suffixes is None and suffix not in BUNDLED["reports"]
    ):  # a package that cannot be imported ends no finished run
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


def write(summary: Summary, columns: "Columns", path: Path) -> None:
    """Write the report of a run to a file, atomically, in the format that the suffix of the path states. Missing
    folders are created.
    """
    suffix = _suffix(path, names("reports"))
    render = load("reports", suffix, FunctionType)
    with explained(path), replacing(path) as file:
        if suffix == TABLE:  # is written row by row, since it may be large
            render(summary, columns, file)
        else:
            file.write(render(summary))


def write_comparison(content: Summary, path: Path) -> None:
    """Write the comparison of two runs to a file, atomically, in the format that the suffix of the path states."""
    from holdfast.reports import comparison

    render = {
        ".html": comparison.comparison_page,
        ".json": comparison.comparison_to_json,
        ".md": comparison.markdown,
    }
    _write_rendered(content, path, render)


def write_monitoring(content: Summary, path: Path) -> None:
    """Write the report of a monitored stream to a file, atomically, in the format that the suffix of the path
    states.
    """
    from holdfast.reports import monitoring

    render = {
        ".html": monitoring.monitoring_page,
        ".json": monitoring.monitoring_to_json,
        ".md": monitoring.monitoring_markdown,
    }
    _write_rendered(content, path, render)


def write_audit(content: Summary, path: Path) -> None:
    """Write the report of an audit to a file, atomically, in the format that the suffix of the path states."""
    from holdfast.reports import audit

    render = {
        ".html": audit.audit_page,
        ".json": audit.audit_to_json,
        ".md": audit.audit_markdown,
        ".xml": audit.audit_junit,
    }
    _write_rendered(content, path, render)


def write_annex(content: Summary, path: Path) -> None:
    """Write the annex of a standard to a file, atomically, in the format that the suffix of the path states."""
    from holdfast.reports import annex

    render = {".html": annex.annex_page, ".json": annex.annex_to_json, ".md": annex.annex_markdown}
    _write_rendered(content, path, render)


def _write_rendered(content: Summary, path: Path, render: Mapping[str, Callable[[Summary], str]]) -> None:
    suffix = _suffix(path, render)
    with explained(path), replacing(path) as file:
        file.write(render[suffix](content))


def write_exhibits(measured: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the results for the bundled models with masked gradients to a JSON file, atomically."""
    from holdfast.reports.exhibits import exhibits_to_json

    with explained(path), replacing(path) as file:
        file.write(exhibits_to_json(measured))


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


def _suffix(path: Path, suffixes: Collection[str]) -> str:
    """The suffix of the path. Raises `UsageError` if it is not one of `suffixes`."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        has = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UsageError(
            f"-o {path} has {has}; expected one of {' '.join(suffixes)}, or - for JSON on stdout"
        )
    return suffix
