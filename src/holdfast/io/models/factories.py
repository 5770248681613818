"""Calls the function of the user that builds a model, which is specified as `file.py:factory`, with the arguments in
`model_args`.
"""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.core.remedies import Placeholder, model_argument
from holdfast.io.files import content_of_file, refusing, sha256_of_file, similar_name
from holdfast.io.models.adapting import accepted, refuse_generator, takes_no_input
from holdfast.io.models.estimators import Predictor
from holdfast.io.models.object_digest import LOADED

CODE: dict[str, tuple[str, bytes]] = {}
"""Path and content of each code file that was imported from bytes, by the name of its module."""
_LISTED = 8
"""Largest number of functions of a file that a message lists."""
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Model = nn.Module | Callable[..., Any] | Predictor
"""Types of models that a factory may return and that the Python functions accept."""


@dataclass(frozen=True)
class Built:
    """A model that a factory function returned, with digests of the files that contain its code and of the files in its
    arguments.
    """

    net: Model
    files: dict[str, str]


def names_code(address: str) -> bool:
    """Return whether the address of a model has the syntax `file.py:factory`."""
    return ".py:" in address


def refuse_without_factory(address: str) -> None:
    """Raise `UsageError` for the address of a Python file without the name of a function, such as `net.py`.

    The message names functions and classes of the file, which is not run.
    """
    if not address.endswith(".py"):
        return
    names = _factories(content_of_file(Path(address), "code file"))
    shown = f"; it defines {', '.join(names)}" if names else ""
    raise UsageError(
        f"{address!r} names no function that returns the model{shown}: give {address}:{names[0] if names else 'make'}"
        + ("" if names else ", and define it, as in def make(): return net")
    )


def _factories(code: bytes) -> list[str]:
    """Return the names of functions and classes in the code of a file, first those that can be called without
    arguments.
    """
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    functions.sort(key=lambda node: len(node.args.posonlyargs + node.args.args) > len(node.args.defaults))
    classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    return [*(each.name for each in functions), *(each.name for each in classes)][:_LISTED]


def build_from_file(address: str, arguments: Mapping[str, str]) -> Built:
    """Import the Python file of an address `file.py:factory`, call its factory function, and return the model that the
    function builds.
    """
    file_name, _, factory_name = address.rpartition(":")
    path = Path(file_name)
    # Read once: the digest in the evidence is that of the code that runs, even if the file is changed meanwhile.
    content = content_of_file(path, "code file")
    with importable(path.parent):
        module = module_of_user(path, content)
        factory = _factory(module, factory_name, path)
        return call_factory(factory, arguments, address, {file_name: hashlib.sha256(content).hexdigest()})


def call_factory(
    factory: Callable[..., object], arguments: Mapping[str, str], address: str, files: Mapping[str, str]
) -> Built:
    """Call a factory function with arguments converted to the types of its annotations, and return the model that it
    builds.

    Raises `TargetError` if the factory raises an error or does not return a model. `files` are digests of its code.
    """
    converted = converted_arguments(factory, arguments, address)
    try:
        net = factory(**converted)
    except (Exception, SystemExit) as error:  # the user's code may raise anything; its message is shown
        strings = [name for name, value in converted.items() if isinstance(value, str)]
        hint = (
            f" ({', '.join(strings)} was passed as text; annotate it as int or float to get a number)"
            if strings
            else ""
        )
        hint_text = hint if isinstance(error, TypeError) else ""
        raise TargetError(f"{address} raised {error_text(error, files)}{hint_text}") from error
    refuse_generator(net, f"{address} returned")
    if isinstance(net, type) or not accepted(net) or takes_no_input(net):
        if inspect.iscoroutine(net):
            net.close()
        raise TargetError(
            f"{address} returned {_described(net)}; a torch.nn.Module or a function from inputs to logits, or an "
            "estimator, was expected. Return the network itself, with its weights loaded and in eval mode"
        )
    argument_files = {text: sha256_of_file(Path(text)) for text in arguments.values() if _is_file(text)}
    return Built(typing.cast(Model, net), {**files, **argument_files})


def converted_arguments(
    factory: Callable[..., object], arguments: Mapping[str, str], address: str
) -> dict[str, object]:
    """Return the arguments of a factory function, converted from strings to the types of its annotations. Without
    annotation they remain strings.

    Raises `UsageError` for an unknown or missing argument, and for a value that cannot be converted.
    """
    with refusing(f"the signature of {address} cannot be read", (NameError, TypeError, ValueError)):
        parameters = inspect.signature(factory, eval_str=True).parameters
    by_name = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in by_name and not takes_any:
            shown = ", ".join(by_name) or "no arguments"
            raise UsageError(
                f"{address} has no argument {name!r}{similar_name(name, by_name)}; its arguments are: {shown}"
            )
    missing = [n for n, p in by_name.items() if p.default is p.empty and n not in arguments]
    if missing:
        name = address.rpartition(":")[2]
        values = Placeholder(
            ",".join(f"{each}=VALUE" for each in missing),
            f"{{{', '.join(f'{each!r}: VALUE' for each in missing)}}}",
        )
        raise UsageError(
            f"{address} needs {', '.join(missing)}. If {name} is the model itself, give a function that returns it: "
            f"def make(): return {name}",
            model_argument("model_args", values),
        )
    return {
        name: _convert(text, by_name[name].annotation if name in by_name else str, name, address)
        for name, text in arguments.items()
    }


def _convert(text: str, annotation: object, name: str, address: str) -> object:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if text.lower() == "none" and len(options) < len(typing.get_args(annotation)):
            return None
        annotation = options[0]
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if annotation is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise UsageError(f"the argument {name} of {address} is {text!r}; true or false was expected")
    if annotation in (int, float):
        try:
            return int(text) if annotation is int else float(text)
        except ValueError:
            kind = "an int" if annotation is int else "a float"
            raise UsageError(f"the argument {name} of {address} is {text!r}; {kind} was expected") from None
    if annotation is Path:
        return Path(text)
    if annotation in (str, object, typing.Any, inspect.Parameter.empty):
        return text
    raise UsageError(
        f"{address} declares {name} as {annotation}; arguments of model_args must be str, int, float, bool or Path"
    )


def module_of_user(path: Path, content: bytes) -> types.ModuleType:
    """Return the module of a file, compiled from the bytes `content` that were already read."""
    return imported_from(
        path, content, f"{LOADED}{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    )


def imported_from(path: Path, content: bytes, name: str) -> types.ModuleType:
    """Return a module with a given name, compiled from the bytes `content` of the file `path`, which is not read again.

    Raises `TargetError` with the reason if the code raises an exception.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        raise TargetError(f"code file {str(path)!r} cannot be imported; a file ending in .py was expected")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    CODE[name] = str(path), content
    try:
        code = spec.loader.source_to_code(content, str(path))
        exec(code, vars(module))  # noqa: S102 - the user named the file; the loader would read it once more
    except (Exception, SystemExit) as error:
        del sys.modules[name], CODE[name]
        raise TargetError(f"importing {str(path)!r} raised {error_text(error, [str(path)])}") from error
    return module


def error_text(error: BaseException, files: Iterable[str]) -> str:
    """Return a description of an exception: its type, the line in the user's file or its folder, and its message."""
    folders = {Path(name).resolve().parent for name in files}
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve().parent in folders:
        return f"{type(error).__name__} in line {error.lineno} of {Path(error.filename).name}: {error.msg}"
    lines = [
        f" in line {frame.lineno} of {Path(frame.filename).name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().parent in folders
    ]
    message = f": {error}" if str(error) else ""
    return f"{type(error).__name__}{lines[-1] if lines else ''}{message}"


def _factory(module: types.ModuleType, name: str, path: Path) -> Callable[..., object]:
    value = vars(module).get(name)
    if value is None:
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        defined = [
            n
            for n in callables
            if isinstance(vars(module)[n], nn.Module)
            or getattr(vars(module)[n], "__module__", None) == module.__name__
        ]
        suggestion = similar_name(name, callables) or (
            f"; it defines {', '.join(defined[:8])}" if defined else ""
        )
        raise UsageError(f"{str(path)!r} has no factory {name!r}{suggestion}")
    if not isinstance(value, type) and (
        isinstance(value, nn.Module) or (not callable(value) and isinstance(value, Predictor))
    ):
        return lambda: value  # the name is the network or the estimator itself
    if not callable(value):
        raise UsageError(
            f"{name} in {str(path)!r} is {_described(value)}; a network or a function that returns one was expected"
        )
    return typing.cast(Callable[..., object], value)


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Context manager in which a Python file in the folder can import other files of the folder.

    The folder is last on the path, so that its files do not replace other modules.
    """
    entry = str(folder.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # text that cannot be a path (too long, a NUL) names no file
        return False


def _described(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and not isinstance(value, nn.Module):
        return "a function that accepts no inputs"
    return kind_of(value)
