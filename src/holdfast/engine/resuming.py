"""Commands that repeat a run or resume a stopped one."""

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from holdfast.core.errors import QueriesSpent, TargetLost, TargetRefused
from holdfast.store.folder import stored_manifest


def way_out(command: str, run: Path, *, max_queries: int | None = None) -> str:
    """A sentence on how to resume a stopped run; without a command line, with the arguments of the Python function.

    `max_queries` replaces the limit on the rows that a server is sent.
    """
    more = f" and holdfast.open_model(…, max_queries={max_queries})" if max_queries else ""
    again = f"run={str(run)!r}, resume=True{more}"
    if command:
        limit = [] if max_queries is None else ["--max-queries", str(max_queries)]
        command = repeatable(command if max_queries is None else without(command, "--max-queries"))
        again = f"{command} {shlex.join([*limit, '--run', str(run), '--resume'])}"
    return f"finished steps are stored; resume with: {again}"


class _WayOut(Protocol):
    """A sentence on how to resume with another limit on the rows that a server is sent."""

    def __call__(self, *, max_queries: int) -> str: ...


@contextmanager
def resumable(again: str, with_more: _WayOut) -> Iterator[None]:
    """Add how to resume to an error of a lost server, of a refused input, or of a spent limit of rows.

    For a spent limit, the command has twice the limit.
    """
    try:
        yield
    except QueriesSpent as error:
        raise QueriesSpent(f"{error}; {with_more(max_queries=2 * error.limit)}", error.limit) from error
    except (TargetLost, TargetRefused) as error:
        raise type(error)(f"{error}; {again}") from error


@contextmanager
def lent() -> Iterator[Path]:
    """Yield a temporary folder for a run. It is deleted at the end, and kept on an error if the run can be resumed."""
    place = Path(tempfile.mkdtemp(prefix="holdfast-"))
    run = place / "run"
    try:
        yield run
    except BaseException as error:
        if stored_manifest(run) is None:
            shutil.rmtree(place)
        elif str(run) not in str(error):
            error.add_note(way_out("", run))
        raise
    shutil.rmtree(place)


def repeatable(command: str) -> str:
    """A command line without `--run DIR` and `--resume`, which do not change the results."""
    words = _words(without(command, "--run"))
    return shlex.join(word for word in words if word != "--resume")


def _words(command: str) -> list[str]:
    """The words of a command line; if it cannot be split, as in an altered file, one word."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def without(command: str, option: str) -> str:
    """A command line without an option and its value."""
    words, kept = iter(_words(command)), []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return shlex.join(kept)
