"""Writing a report: its suffix says which. Importing this module brings neither torch nor a renderer."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from holdfast.core.errors import TargetError, UsageError

if TYPE_CHECKING:
    from holdfast.core.evidence import Columns

Summary = Mapping[str, Any]


def _html(summary: Summary, _: "Columns", file: TextIO) -> None:
    from holdfast.reports.html import page

    file.write(page(summary))


def _json(summary: Summary, _: "Columns", file: TextIO) -> None:
    from holdfast.reports.summary import to_json

    file.write(to_json(summary))


def _junit(summary: Summary, _: "Columns", file: TextIO) -> None:
    from holdfast.reports.junit import document

    file.write(document(summary))


def _sarif(summary: Summary, _: "Columns", file: TextIO) -> None:
    from holdfast.reports.sarif import document

    file.write(document(summary))


def _markdown(summary: Summary, _: "Columns", file: TextIO) -> None:
    from holdfast.reports.markdown import document

    file.write(document(summary))


def _csv(summary: Summary, columns: "Columns", file: TextIO) -> None:
    from holdfast.reports.table import write_rows

    write_rows(summary, columns, file)


WRITERS: Mapping[str, Callable[[Summary, "Columns", TextIO], None]] = {
    ".html": _html,
    ".json": _json,
    ".xml": _junit,
    ".sarif": _sarif,
    ".md": _markdown,
    ".csv": _csv,
}
"""What each suffix brings."""


EXHIBIT_SUFFIXES = (".json",)
"""What the gallery can be written as."""
COMPARISON_SUFFIXES = (".html", ".json", ".md")
"""What a comparison can be written as."""


def check(path: Path, suffixes: Collection[str] = WRITERS.keys()) -> None:
    """Refuse what cannot be written before anything runs: `UsageError` for the suffix, `TargetError` for the place."""
    _known(path, suffixes)
    if path.is_dir():
        raise TargetError(f"{path} is a folder; a report is a file, as in {path / 'report.html'}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise TargetError(f"{path} cannot be written: {folder} is a file and no folder; choose another place")
    try:  # tried and not asked for: to root every folder seems writable, those of the kernel too
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        said = f"{folder} takes no file ({error.strerror or error})"
        raise TargetError(f"{path} cannot be written: {said}; choose another place") from error


def write(summary: Summary, columns: "Columns", path: Path) -> None:
    """Write the report that the suffix asks for, whole or not at all; folders are made where they are missing."""
    writer = WRITERS[_known(path, WRITERS)]
    with _explained(path), replacing(path) as file:
        writer(summary, columns, file)


def write_comparison(content: Summary, path: Path) -> None:
    """Write what `comparison` found, in the same way."""
    from holdfast.reports import comparison

    render = {".html": comparison.page, ".json": comparison.to_json, ".md": comparison.markdown}
    suffix = _known(path, COMPARISON_SUFFIXES)
    with _explained(path), replacing(path) as file:
        file.write(render[suffix](content))


def write_exhibits(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the gallery, measured, in the same way."""
    from holdfast.reports.exhibits import exhibits_to_json

    with _explained(path), replacing(path) as file:
        file.write(exhibits_to_json(found))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system refuses into an error that says the way out."""
    try:
        yield
    except OSError as error:
        raise TargetError(
            f"{path} cannot be written: {error.strerror or error}; free some space or choose another place with -o"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` once it is complete; on any failure nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some file systems have no modes; the file is good all the same
            Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The mask of this process, read the only way there is."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _known(path: Path, suffixes: Collection[str]) -> str:
    """The suffix of the path, if it is one of those."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        has = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UsageError(
            f"-o {path} has {has}; expected one of {' '.join(suffixes)}, or - for JSON on stdout"
        )
    return suffix
