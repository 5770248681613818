"""Main program of a limited process, which reads one file under limits of memory and time."""

import errno
import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError, failure_to_json
from holdfast.io.files import reading
from holdfast.io.limited import limits

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
        limits.apply(request.pop("memory"), request.pop("seconds"))
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
