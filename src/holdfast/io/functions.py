"""Functions of the user, such as one that returns an optimiser: from a Python file, as in `file.py:name`, or as Python
objects. They are identified by a name and a digest.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of
from holdfast.io.files import content_of_file, similar_name
from holdfast.io.models.factories import importable, module_of_user
from holdfast.io.models.object_digest import digest_of_object


@dataclass(frozen=True)
class FileFunction:
    """A function from a Python file, which is imported once."""

    address: str
    """name of the file, without its folder, and of the function, as in `optim.py:make`"""
    digest: str
    """SHA-256 of the file, in hex"""
    function: Callable[..., Any]
    module: str
    """name of the module of the file"""

    def __call__(self, *arguments: object) -> Any:
        """Return the result of the function."""
        return self.function(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the function by its name, because pickle refuses one whose file was imported again later."""
        return _of_module, (self.address, self.digest, self.module)


def _of_module(address: str, digest: str, module: str) -> FileFunction:
    function = getattr(importlib.import_module(module), address.rpartition(":")[2])
    return FileFunction(address, digest, function, module)


def function_from_file(address: str) -> FileFunction:
    """Import the Python file of an address `file.py:name`, and return its function with that name.

    Raises `UsageError` if the file has no such function, and `TargetError` if its code raises an exception.
    """
    file_name, _, name = address.rpartition(":")
    path = Path(file_name)
    content = content_of_file(path, "code file")  # read once: the digest is that of the code that runs
    with importable(path.parent):
        module = module_of_user(path, content)
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in vars(module):
        raise UsageError(f"{str(path)!r} has no function {name!r}{similar_name(name, names)}")
    function = vars(module)[name]
    if not callable(function):
        raise UsageError(f"{name} in {str(path)!r} is {kind_of(function)}; a function was expected")
    return FileFunction(f"{path.name}:{name}", hashlib.sha256(content).hexdigest(), function, module.__name__)


def function_name(function: Callable[..., Any]) -> str:
    """Return the address of a function from a file, or the qualified name of another function or of its class."""
    if isinstance(function, FileFunction):
        return function.address
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def function_digest(function: Callable[..., Any]) -> str:
    """Return the SHA-256 in hex of the file of a function, or of the code of a function that is given as an object."""
    return function.digest if isinstance(function, FileFunction) else digest_of_object(function)
