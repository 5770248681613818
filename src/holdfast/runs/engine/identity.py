"""Identity of a run: the digest of the code that determines its results, the versions of software, the hardware, and
the command that resumes the run.
"""

import hashlib
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

import holdfast
from holdfast.core.errors import FunctionRaised, QueriesSpent, TargetLost, TargetRefused
from holdfast.runs.store.folder import stored_manifest

DECIDING = (
    "attacks",
    "audits",
    "certifiers",
    "core",
    "corruptions",
    "doubts",
    "guard/detectors",
    "guard/query_rule.py",
    "guard/rules.py",
    "io",
    "recipes",
    "rotation",
    "runs/assess",
    "runs/engine",
    "runs/harden",
    "runs/harness",
    "runs/documents",
    "statistics",
    "tasks",
    "threats",
)
"""Subpackages and modules whose code can change a measured number."""
NOT_DECIDING = ("gates", "metrics", "reports")
"""Subpackages that a run imports, but that only summarise its measurements. `runs/store` only stores them.

A run can be resumed after a change of this code.
"""


@cache
def code_digest() -> str:
    """Return the SHA-256, in hex, of the code that determines measured numbers and of the versions of
    torch and numpy.
    """
    sha = hashlib.sha256(f"torch {torch.__version__} numpy {np.__version__}\n".encode())
    package = Path(holdfast.__file__).parent
    for name in DECIDING:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else (place,):
            content = path.read_bytes()
            # with the length, so that no two trees of files give the same bytes
            sha.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Holdfast, Python, torch and numpy, by name, for the manifest of a run."""
    return {
        "holdfast": holdfast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def hardware(device: torch.device, processes: int = 1) -> str:
    """Return one line of text that describes the processor and the accelerator of this machine and the number of
    processes of a run. It does not contain the host name.
    """
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.machine()}"
    if device.type == "cpu":
        description = f"{cores}, no accelerator"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        description = f"{name}; {cores}"
    return f"{description}; {processes} processes" if processes > 1 else description


def node_properties(device: str) -> dict[str, str]:
    """Return the properties of this process on which the last bits of a measurement may depend, by name.

    The device is left out if its name is empty, or if this process has no such device.
    """
    known = {
        "torch build": str(torch.__version__),
        "code": code_digest(),
        "threads": str(torch.get_num_threads()),
    }
    if not device or (device != "cpu" and not torch.cuda.is_available()):
        return known
    if device != "cpu":
        return {**known, "device": torch.cuda.get_device_name(torch.device(device))}
    return {**known, "device": f"{device} with {torch.backends.cpu.get_cpu_capability()}"}


def way_out(command: str, run: Path, *, max_queries: int | None = None) -> str:
    """Return the end of an error message, which states how to resume a stopped run.

    It contains the command line `command` or, if that is empty, the arguments of the Python function. `max_queries` is
    a new limit on the rows that are sent to a server.
    """
    more = f" and holdfast.open_model(…, max_queries={max_queries})" if max_queries else ""
    again = f"run={str(run)!r}, resume=True{more}"
    if command:
        limit = [] if max_queries is None else ["--max-queries", str(max_queries)]
        again = resumed(command if max_queries is None else without(command, "--max-queries"), run, *limit)
    return f"finished steps are stored; resume with: {again}"


def resumed(command: str, run: Path, *options: str) -> str:
    """Return the command line of a run with which the run in a folder is resumed, with further options."""
    return f"{_in_other_folder(command)} {shlex.join([*options, '--run', str(run), '--resume'])}"


class _WayOut(Protocol):
    """A sentence on how to resume with another limit on the rows that a server is sent."""

    def __call__(self, *, max_queries: int) -> str: ...


@contextmanager
def resumable(again: str, with_more: _WayOut) -> Iterator[None]:
    """Context manager that adds to errors from a model behind a server a sentence on how to resume the run.

    These are the errors for a lost server, for a refused input, and for a spent limit on the rows. For a spent limit,
    the command sets twice the limit.
    """
    try:
        yield
    except QueriesSpent as error:
        spent = error.ended(with_more(max_queries=2 * error.limit))
        spent.limit = error.limit
        raise spent from error
    except (TargetLost, TargetRefused) as error:
        raise error.ended(again) from error


@contextmanager
def temporary_run_folder() -> Iterator[Path]:
    """Context manager that yields a temporary folder for a run, and deletes the folder at the end of the context.

    After an error, the folder is kept if the run can be resumed.
    """
    place = Path(tempfile.mkdtemp(prefix="holdfast-"))
    run = place / "run"
    try:
        yield run
    except BaseException as error:
        # without a manifest, there is nothing to resume
        if stored_manifest(run) is None:
            shutil.rmtree(place)
        elif str(run) not in str(error):
            unless = (
                " unless the function raises the exception again" if isinstance(error, FunctionRaised) else ""
            )
            error.add_note(f"{way_out('', run)}{unless}")
        raise
    shutil.rmtree(place)


def repeatable(command: str) -> str:
    """Return the command line with which the results of a run can be measured again: that of the run without `--run`,
    `--resume` and `--log`. They do not change results, and refer to the folder and the file that this run has written.
    """
    return without(_in_other_folder(command), "--log")


def _in_other_folder(command: str) -> str:
    """Return the command line of a run without the options `--run DIR` and `--resume`."""
    arguments = _arguments(without(command, "--run"))
    return shlex.join(argument for argument in arguments if argument != "--resume")


def _arguments(command: str) -> list[str]:
    """The words of a command line; if it cannot be split, as in an altered file, one word."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def without(command: str, option: str) -> str:
    """Return a command line from which one option and its value were removed."""
    arguments, remaining = iter(_arguments(command)), []
    for argument in arguments:
        if argument == option:
            next(arguments, None)
        elif not argument.startswith(f"{option}="):
            remaining.append(argument)
    return shlex.join(remaining)
