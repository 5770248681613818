"""How a run is repeated, and how one goes on that was stopped."""

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.core.errors import TargetLost, TargetRefused
from holdfast.store.folder import planned


def way_out(command: str, run: Path) -> str:
    """How to go on with a run that was stopped; without a command line, by the arguments of Python."""
    again = f"run={str(run)!r}, resume=True"
    if command:
        again = f"{repeatable(command)} {shlex.join(['--run', str(run), '--resume'])}"
    return f"what was finished is kept, go on with: {again}"


@contextmanager
def resumable(way_out: str) -> Iterator[None]:
    """Says how to go on where the target was lost on the way, or refused an input."""
    try:
        yield
    except (TargetLost, TargetRefused) as error:
        raise type(error)(f"{error}; {way_out}") from error


@contextmanager
def lent() -> Iterator[Path]:
    """A folder for a run that nobody asked to keep: gone when it is done, and there to go on with if it is not."""
    place = Path(tempfile.mkdtemp(prefix="holdfast-"))
    run = place / "run"
    try:
        yield run
    except BaseException as error:
        if planned(run) is None:
            shutil.rmtree(place)
        elif str(run) not in str(error):
            error.add_note(way_out("", run))
        raise
    shutil.rmtree(place)


def repeatable(command: str) -> str:
    """A command line without `--run DIR` and `--resume`, which say where and not what."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word == "--run":
            next(words, None)
        elif word != "--resume" and not word.startswith("--run="):
            kept.append(word)
    return shlex.join(kept)
