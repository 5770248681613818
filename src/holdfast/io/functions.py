"""Functions of the user, such as one that returns an optimiser or trains a model: from a Python file or an object."""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.io.files import content_of_file, similar_name
from holdfast.io.models.factories import error_text, importable, module_of_user
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


@dataclass(frozen=True)
class TrainingFunction:
    """A function that trains a network, which is identified by its name and a digest of its code."""

    name: str
    """address of the function without the folder, as in `net.py:fit`, or its qualified name"""
    digest: str
    """SHA-256 in hex of its file, or of its code if it was given as an object"""
    function: Callable[..., Any]

    def __call__(self, x: Inputs, y: Labels, seed: int) -> nn.Module:
        """Return the network in eval mode that the function trains on the examples.

        PyTorch's random numbers are seeded with `seed` during the call, and their former state is restored after it.
        Raises `TargetError` if the function raises an exception or does not return a `torch.nn.Module`.
        """
        devices = [x.device] if x.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.manual_seed(seed)
                net = self.function(x, y, seed)
        except HoldfastError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything; its message is shown
            raise TargetError(f"{self.name} raised {error_text(error, _files(self.function))}") from error
        if not isinstance(net, nn.Module):
            raise TargetError(
                f"{self.name} returned {kind_of(net)}; expected the trained network, a torch.nn.Module"
            )
        return net.eval()


def open_training(train: object) -> TrainingFunction:
    """Return the training function at an address `file.py:name`, or one that is given as an object.

    The file is imported. Raises `UsageError` if `train` is no such address and no function, or if the file has no
    function with that name, and `TargetError` if the code of the file raises an exception.
    """
    if isinstance(train, str):
        if ".py:" not in train:
            raise UsageError(
                f"train is {train!r}; expected a function in a Python file, as in net.py:fit, or a folder that harden "
                "wrote"
            )
        train = function_from_file(train)
    elif not callable(train) or isinstance(train, nn.Module | type):
        what = f"the class {train.__name__}" if isinstance(train, type) else kind_of(train)
        raise UsageError(
            f"train is {what}; expected a function fit(x, y, seed) that returns the trained network"
        )
    return TrainingFunction(function_name(train), function_digest(train), train)


def refuse_other_classes(name: str, logits: Logits, classes: int) -> None:
    """Raise `TargetError` if a network that the training function `name` returned gives another number of logits."""
    if logits.shape[1] != classes:
        raise TargetError(
            f"the network that {name} returned gives {logits.shape[1]} logits for each input; expected {classes}, one "
            "for each class"
        )


def _files(function: Callable[..., Any]) -> list[str]:
    """Return the path of the file in which a function is defined; it is empty for a callable object."""
    called = function.function if isinstance(function, FileFunction) else function
    return [called.__code__.co_filename] if isinstance(called, FunctionType) else []
