"""Main program of a limited process, which reads one file under limits of memory and time."""

import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError, UsageError, failure_to_json
from holdfast.io.files import reading

MEMORY = "HOLDFAST_READ_MEMORY"
"""Name of the environment variable that raises the memory limit for one file, with values such as `16GB`."""
SECONDS = "HOLDFAST_READ_SECONDS"
"""Name of the environment variable that sets the limit of CPU time for one file, in seconds."""
CPU_SECONDS = 60
WALL_FACTOR = 5
"""Ratio of the limits of wall-clock time and CPU time. It is large because a machine may be busy, or its disk slow."""
_DAY = 86_400  # largest limit of time in seconds
_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Limits:
    """Memory limit of a process that reads a file, in addition to the memory that it uses before the file is read."""

    copies: int
    """multiple of the file size in the memory limit"""
    spare_bytes: int
    """number of bytes that are added to that multiple"""

    def memory(self, n_bytes: int) -> int:
        """Return the memory limit in bytes for reading a file of `n_bytes`. It is `HOLDFAST_READ_MEMORY` or more."""
        return max(self.copies * n_bytes + self.spare_bytes, requested_memory())


def requested_memory() -> int:
    """Return the memory limit in the environment variable `HOLDFAST_READ_MEMORY` in bytes, or 0 if it is not set.

    Raises `UsageError` for an invalid size.
    """
    text = os.environ.get(MEMORY, "")
    match = re.fullmatch(r"(\d{1,7})\s*(MB|GB)", text.strip().upper()) if text else None
    if text and match is None:
        raise UsageError(f"{MEMORY} is {text!r}; a size of at most 7 digits was expected, as 16GB or 800MB")
    return 0 if match is None else int(match[1]) * _UNITS[match[2]]


def cpu_seconds() -> int:
    """Return the limit of CPU time in `HOLDFAST_READ_SECONDS` in seconds, or 60 if it is not set. Raises `UsageError`
    for an invalid number.
    """
    text = os.environ.get(SECONDS, "").strip()
    if text and not (re.fullmatch(r"\d{1,5}", text) and 1 <= int(text) <= _DAY):
        raise UsageError(f"{SECONDS} is {text!r}; a whole number from 1 to {_DAY} was expected, as 600")
    return int(text) if text else CPU_SECONDS


def apply(memory: int, seconds: int) -> None:
    """Limit the memory and the CPU time of this process, in addition to what it has already used, and the sizes of
    written files and core dumps.

    Windows has no such limits; there only the checks of each parser before its allocations apply.
    """
    try:
        import resource
    except ImportError:
        return
    mapped = Path("/proc/self/statm")
    in_use = int(mapped.read_text().split()[0]) * resource.getpagesize() if mapped.exists() else 2**31
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    memory_kind = resource.RLIMIT_AS if mapped.exists() else resource.RLIMIT_DATA
    _set(memory_kind, in_use + memory)
    _set(resource.RLIMIT_CPU, spent + seconds, grace=5)  # SIGXCPU first, which gives the reason, then SIGKILL
    _set(resource.RLIMIT_FSIZE, memory)
    _set(resource.RLIMIT_CORE, 0)


def _set(resource_kind: int, amount: int, grace: int = 0) -> None:
    """Set a soft limit, and a hard limit that the process cannot raise. Existing lower limits are preserved."""
    import resource

    hard = resource.getrlimit(resource_kind)[1]
    soft, hard_limit = (
        amount_wanted if hard == resource.RLIM_INFINITY else min(amount_wanted, hard)
        for amount_wanted in (amount, amount + grace)
    )
    resource.setrlimit(resource_kind, (soft, hard_limit))


NO_SPACE, NOT_STARTED = 28, 70
"""Exit codes: the disk for temporary files is full, and a library or the package cannot be imported."""
REQUEST, ANSWER = "request.json", "answer.json"
"""Names of the documents in the folder that both processes use."""
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_PACKAGE = __name__.rpartition(".")[0]
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad allocation",
    "std::bad_alloc",
    "Failed to allocate memory",
    "Failed to serialize proto",
)
"""Messages of libraries about failed allocations in errors other than `MemoryError`."""


def main(name: str) -> None:
    """Read the file that the request in the folder `name` refers to, and write the result of the parser into the
    folder.
    """
    folder = Path(name)
    try:
        request = json.loads((folder / REQUEST).read_text())
        parser = import_module(f"{_PACKAGE}.{request['parser']}")
        content = sys.stdin.buffer.read() if request["content"] else None
        getattr(parser, "prepare", lambda: None)()  # imports, which would count against the file
        apply(request.pop("memory"), request.pop("seconds"))
    except Exception as error:  # noqa: BLE001 - no fault of the file
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(NOT_STARTED)
    try:
        answer = answers_of(request, content, folder)
        (folder / ANSWER).write_text(json.dumps(answer))
    except OSError as error:
        if error.errno in _FULL:
            sys.exit(NO_SPACE)
        raise


def is_out_of_memory(cause: BaseException | None) -> bool:
    """Return whether an error was raised because memory could not be allocated."""
    too_large = isinstance(cause, OSError) and cause.errno == errno.EFBIG  # the limit of written files
    return too_large or isinstance(cause, MemoryError) or any(text in str(cause) for text in _NO_MEMORY)


def answers_of(request: Mapping[str, Any], content: bytes | None, folder: Path) -> Mapping[str, Any]:
    """Run the parser that a request names. Return its result, or its error as JSON."""
    read = import_module(f"{_PACKAGE}.{request['parser']}").read
    path = Path(request["path"])
    arguments = {key: value for key, value in request.items() if key not in ("parser", "path", "content")}
    try:
        with reading(path):
            result: Mapping[str, Any] = read(path, content, folder, **arguments)
    except HoldfastError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise cause from None
        if is_out_of_memory(cause):
            return {"error": MemoryError.__name__}
        return failure_to_json(error)
    return result
