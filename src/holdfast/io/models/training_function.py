"""The training function of the user: `fit(x, y, seed) -> module`, from a Python file as `file.py:fit`, or as an object.

An audit of a training procedure calls it, in general several times, and each time gets a new network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.io.functions import FileFunction, function_digest, function_from_file, function_name
from holdfast.io.models.factories import error_text


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
