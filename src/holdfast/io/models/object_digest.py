"""Computes the digest of a network or a function that is given as a Python object from its weights, plain attributes
and compiled code.

The digest covers the compiled code, because this is what runs, even if the source is missing or was edited. It differs
between versions of Python. Objects that a function refers to through closures, defaults and globals are included if
they are networks, functions, tensors or plain values. Lists and other containers, in which functions may record
results, are not included.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_REFERENCED = (FunctionType, MethodType, partial, nn.Module, type)
_LIBRARIES = frozenset(
    {"torch", "numpy", "keras", "sklearn", "xgboost", "lightgbm", "transformers", *sys.stdlib_module_names}
)
"""Packages whose code is identified by name. A run stores their versions, and can be resumed only with the
same ones.
"""
LOADED = "holdfast_user_"
"""Prefix of the names of modules that are loaded from files of the user. The rest is a digest of the path."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def digest_of_object(net: nn.Module | Callable[..., Any]) -> str:
    """Return the SHA-256 in hex of a network or a function that is given as a Python object.

    It is equal for the same object in other processes, with another number of threads and on other devices.
    """
    sha, objects = hashlib.sha256(), _ObjectList([net])
    for value in objects.objects:  # the list grows during the loop
        for part in _contents(value, objects):
            sha.update(f"{len(part)} ".encode() + part)
    return sha.hexdigest()


class _ObjectList:
    """A list of the objects to digest, in the order of their discovery. Each object occurs once."""

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects
        self.places = {id(value): place for place, value in enumerate(objects)}

    def reference(self, value: Any) -> bytes:
        """Return the index of an object in the list of objects to digest, as bytes. A new object is appended to the
        list first.
        """
        if id(value) not in self.places:
            self.places[id(value)] = len(self.objects)
            self.objects.append(value)
        return f"entry {self.places[id(value)]}".encode()


def _parts(value: Any, objects: _ObjectList) -> Iterator[bytes]:
    """Yield the bytes of a value.

    For a function, a class or a network they are a reference, and its content is digested later.
    """
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, tuple | frozenset):
        inner = [b" ".join(_parts(entry, objects)) for entry in value]
        yield from sorted(inner) if isinstance(value, frozenset) else inner
    elif isinstance(value, Tensor):
        yield from _tensor(value)
    elif isinstance(value, CodeType):
        yield from _code(value, objects)
    elif isinstance(value, BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, _REFERENCED):
        yield objects.reference(value)


def _contents(value: Any, objects: _ObjectList) -> Iterator[bytes]:
    if isinstance(value, FunctionType):
        yield from _function(value, objects)
    elif isinstance(value, MethodType):
        yield objects.reference(value.__func__)
        yield objects.reference(value.__self__)
    elif isinstance(value, partial):
        yield objects.reference(value.func)
        yield from _parts((value.args, tuple(sorted(value.keywords.items()))), objects)
    elif isinstance(value, nn.Module):
        yield from _module(value, objects)
    elif isinstance(value, type):
        yield from _class(value, objects)
    else:
        yield objects.reference(type(value))
        yield from _attributes(value, objects)


def _tensor(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _code(code: CodeType, objects: _ObjectList) -> Iterator[bytes]:
    yield code.co_code
    yield " ".join((*code.co_names, "|", *code.co_freevars)).encode()
    yield from _parts(code.co_consts, objects)


def _function(function: FunctionType, objects: _ObjectList) -> Iterator[bytes]:
    yield function.__qualname__.encode()
    if _is_library(function.__module__):
        return
    yield from _code(function.__code__, objects)
    yield from _parts(function.__defaults__ or (), objects)
    yield from _parts(tuple(sorted((function.__kwdefaults__ or {}).items())), objects)
    for name, value in _references(function):
        yield name.encode()
        yield from _parts(value, objects)


def _references(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that a function refers to: closures, globals, and attributes of modules of
    the user.
    """
    names = sorted(name for name in _names(function.__code__) if not name.startswith("__"))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, _cell_content(cell)
    for name in names:
        value = function.__globals__.get(name)
        yield name, value
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            yield from ((inner, vars(value).get(inner)) for inner in names)


def _names(code: CodeType) -> set[str]:
    """Return the names that a function and its inner functions look up."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _cell_content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _module(net: nn.Module, objects: _ObjectList) -> Iterator[bytes]:
    yield str(net).encode()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        yield name.encode()
        yield from _tensor(tensor)
    for name, module in net.named_modules():
        yield name.encode()
        yield objects.reference(type(module))
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            yield str(module.code).encode()
        else:
            yield from _attributes(module, objects)


def _attributes(holder: Any, objects: _ObjectList) -> Iterator[bytes]:
    """Yield the bytes of the public attributes and hooks, which affect the computation.

    The mode (train or eval) is left out, because the run sets it.
    """
    for name, value in sorted(getattr(holder, "__dict__", {}).items()):
        if name in _HOOKS:
            yield from _parts(tuple(value.values()), objects)
        elif not name.startswith("_") and name != "training":
            yield name.encode()
            yield from _parts(value, objects)


def _class(cls: type, objects: _ObjectList) -> Iterator[bytes]:
    """Yield the bytes of the methods and settings of a class, and references to its base classes."""
    yield f"{'' if cls.__module__.startswith(LOADED) else cls.__module__}.{cls.__qualname__}".encode()
    if _is_library(cls.__module__):
        return
    yield b" ".join(objects.reference(base) for base in cls.__bases__)
    for name, value in sorted(vars(cls).items()):
        inner = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(inner, FunctionType) or not name.startswith("_"):
            yield name.encode()
            yield from _parts(inner, objects)


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
