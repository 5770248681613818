"""Starts the limited process that reads one file under limits of memory and time, and returns its result."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.errors import (
    CarriesCode,
    FreeSizes,
    HoldfastError,
    NoSplit,
    TargetError,
    UsageError,
    failure_from_json,
)
from holdfast.io.files import megabytes
from holdfast.io.sandbox import sandbox_main

_ERRORS = {each.__name__: each for each in (TargetError, UsageError, FreeSizes, NoSplit, CarriesCode)}
_PACKAGE = Path(__file__).resolve().parents[2]
_START = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
package, folder, *path = sys.argv[1:]
sys.path += [each for each in path if each not in sys.path]
spec = spec_from_file_location("holdfast", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["holdfast"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["holdfast"])
from {sandbox_main.answers_of.__module__} import main
main(folder)
"""
"""Program that imports the same package as this process, and libraries from the same folders."""
# One thread: each has a stack and an arena, which count as memory. The allocators of arrow and glibc reserve far more
# than they use.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "PYTHONSAFEPATH": "1",
}


_OUT_OF_TIME = -signal.SIGXCPU if hasattr(signal, "SIGXCPU") else None
"""Exit code of a process that reached its limit of CPU time; None on systems without such a limit."""


@dataclass
class _Here:
    """Setting of this process: whether it is itself under limits, as in fuzzing, so that no other process is
    started.
    """

    limited: bool = False


HERE = _Here()


@contextmanager
def read_under_limits(
    parser: str,
    path: Path,
    limits: sandbox_main.Limits,
    *,
    content: bytes | None = None,
    n_bytes_beside: int = 0,
    **request: Any,
) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """Context manager that runs a parser in a limited process. It yields the result, and a temporary folder with the
    files that the parser wrote.

    `parser` is the name of a module of this package. Its function `read(path, content, folder, **request)` is called in
    a separate process. If `content` is given, it is the content of the file, and the file is not opened again.
    `n_bytes_beside` is the size of other files that the parser reads as well.

    Raises the error of the parser if it is an error of Holdfast, and `TargetError` if the process failed in another way
    or reached a limit.
    """
    with tempfile.TemporaryDirectory(prefix="holdfast-") as name:
        folder = Path(name)
        full_request = {"parser": parser, "path": str(path), "content": content is not None, **request}
        n_bytes = n_bytes_beside + (path.stat().st_size if content is None else len(content))
        if HERE.limited:
            answer = sandbox_main.answers_of(full_request, content, folder)
        else:
            memory, seconds = limits.memory(n_bytes), sandbox_main.cpu_seconds()
            full_request |= {"memory": memory, "seconds": seconds}
            (folder / sandbox_main.REQUEST).write_text(json.dumps(full_request))
            answer = _run(folder, content, path, memory, seconds)
        if "error" in answer:
            raise _error(answer, path, limits.memory(n_bytes))
        yield answer, folder


def _run(folder: Path, content: bytes | None, path: Path, memory: int, seconds: int) -> Mapping[str, Any]:
    command = [sys.executable, "-P", "-c", _START, str(_PACKAGE), str(folder), *_import_path()]
    environment = {**os.environ, **_ENVIRONMENT}
    try:
        done = subprocess.run(
            command,
            input=content or b"",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=sandbox_main.WALL_FACTOR * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise too_slow(path, f"{sandbox_main.WALL_FACTOR * seconds} s") from error
    if done.returncode == _OUT_OF_TIME:
        raise too_slow(path, f"{seconds} s of CPU time")
    last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1][:200]
    if done.returncode == sandbox_main.NO_SPACE:
        raise TargetError(
            f"there is no space left in {str(folder.parent)!r}; free some, or set TMPDIR to another folder"
        )
    if done.returncode == sandbox_main.NOT_STARTED:
        raise HoldfastError(f"the process that reads {str(path)!r} did not start: {last}; please report it")
    try:
        answer: Mapping[str, Any] = json.loads((folder / sandbox_main.ANSWER).read_bytes())
    except (OSError, ValueError):
        raise TargetError(
            f"{str(path)!r} could not be read: the process that reads it under a limit of {megabytes(memory)} ended "
            f"with status {done.returncode} ({last}); it is damaged, or asks for more memory. If you trust "
            f"it, raise the limit with {sandbox_main.MEMORY}=16GB"
        ) from None
    return answer


def _import_path() -> list[str]:
    """Return the import path of this process, without the current folder."""
    current_folder = Path.cwd()
    return [entry for entry in sys.path if entry and Path(entry).resolve() != current_folder]


def _error(answer: Mapping[str, Any], path: Path, memory: int) -> HoldfastError:
    if answer["error"] == MemoryError.__name__:
        return TargetError(
            f"{str(path)!r} asks for far more memory than its size: more than the {megabytes(memory)} that reading it "
            f"may take. If you trust it, raise the limit with {sandbox_main.MEMORY}=16GB"
        )
    return failure_from_json(answer, _ERRORS)


def too_slow(path: Path, limit: str) -> TargetError:
    """Return the error for a file that took longer to read than the limit, such as "60 s of CPU time"."""
    return TargetError(
        f"{str(path)!r} took more than {limit} to read and was given up. If you trust it, raise the limit of CPU time "
        f"with {sandbox_main.SECONDS}=600"
    )
