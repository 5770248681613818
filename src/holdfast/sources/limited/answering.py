"""The main program of the process that reads one file under limits."""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError
from holdfast.sources.files import reading
from holdfast.sources.limited import limits

REQUEST, ANSWER = "request.json", "answer.json"
"""documents in the folder that both processes share"""
_PACKAGE = __name__.rpartition(".")[0]
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad allocation",
    "std::bad_alloc",
    "Failed to allocate memory",
)
"""messages of libraries about failed allocations in errors other than `MemoryError`"""


def main(name: str) -> None:
    """Read the file of the request in a folder, and write the answer into the folder."""
    folder = Path(name)
    request = json.loads((folder / REQUEST).read_text())
    parser = import_module(f"{_PACKAGE}.{request['parser']}")
    content = sys.stdin.buffer.read() if request["content"] else None
    getattr(parser, "prepare", lambda: None)()  # imports, whose memory and time do not count against the file
    limits.apply(request.pop("memory"), request.pop("seconds"))
    answer = answered(request, content, folder)
    (folder / ANSWER).write_text(json.dumps(answer))


def is_out_of_memory(cause: BaseException | None) -> bool:
    """Whether a library raised the error because an allocation failed."""
    return isinstance(cause, MemoryError) or any(each in str(cause) for each in _NO_MEMORY)


def answered(request: Mapping[str, Any], content: bytes | None, folder: Path) -> Mapping[str, Any]:
    """Return the result of the parser, or the class and the message of its error."""
    read = import_module(f"{_PACKAGE}.{request['parser']}").read
    path = Path(request["path"])
    named = {key: value for key, value in request.items() if key not in ("parser", "path", "content")}
    try:
        with reading(path):
            found: Mapping[str, Any] = read(path, content, folder, **named)
    except HoldfastError as error:
        cause = error.__cause__
        if is_out_of_memory(cause):
            return {"error": MemoryError.__name__, "message": ""}
        return {"error": type(error).__name__, "message": str(error)}
    return found
