"""Calls functions of the user, which create networks or train them, and opens model files that run code."""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import io
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from holdfast.core.errors import HoldfastError, Placeholder, TargetError, UsageError, model_argument
from holdfast.core.names import kind_of
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.io.files import OWN_FUNCTION, content_of_file, refusing, sha256_of_file, similar_name
from holdfast.io.models.adapting import LOADED, accepted, digest_of_object, refuse_generator, takes_no_input
from holdfast.io.models.estimators import Predictor
from holdfast.io.models.weights import Weights, check_archive, is_script
from holdfast.io.sandbox.weights import NESTINGS, state_dict

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


def build_function(address: str, arguments: Mapping[str, str]) -> tuple[Callable[[], Any], str]:
    """Return the function at an address `file.py:make`, whose arguments are fixed, and a digest of its file and of the
    files in its arguments. Errors of its code are raised as `TargetError` when it is called.
    """
    found = function_from_file(address)
    converted = converted_arguments(found.function, arguments, address)
    files = {text: sha256_of_file(Path(text)) for text in arguments.values() if _is_file(text)}

    def make() -> Any:
        try:
            with importable(Path(address.rpartition(":")[0]).parent):
                return found.function(**converted)
        except (Exception, SystemExit) as error:  # the user's code may raise anything; its message is shown
            raise TargetError(
                f"{address} raised {error_text(error, [address.rpartition(':')[0]])}"
            ) from error

    parts = "\n".join([found.digest, *sorted(files.values()), *map(str, sorted(arguments.items()))])
    return make, hashlib.sha256(parts.encode()).hexdigest()


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


def open_trusted(path: Path, content: bytes) -> tuple[nn.Module | Weights, str, str]:
    """Load the `content` of a trusted model file, which runs its code. Return the model, its format and its SHA-256.

    The result is a module, or weights if the file has no module. Raises `TargetError` if it cannot be loaded.
    """
    check_archive(path, content, trust_code=True)
    script = is_script(content)
    content_or_module = _loaded(path, io.BytesIO(content), script=script)
    if isinstance(content_or_module, Mapping):
        content_or_module = next(
            (
                content_or_module[name]
                for name in NESTINGS
                if isinstance(content_or_module.get(name), nn.Module)
            ),
            content_or_module,
        )
    if not isinstance(content_or_module, nn.Module):
        try:
            content_or_module = Weights(
                *(kind(part) for kind, part in zip((dict, tuple), state_dict(content_or_module), strict=True))
            )
        except TypeError as error:
            raise TargetError(f"{str(path)!r} {error}, or a torch.nn.Module") from error
    if script:
        _refuse_several_inputs(path, content_or_module)
    return content_or_module, "torchscript" if script else "pickle", hashlib.sha256(content).hexdigest()


def _refuse_several_inputs(path: Path, net: Any) -> None:
    """Raise `TargetError` for a script that needs further arguments than its inputs, such as a state or a rate."""
    schema = getattr(net.forward, "schema", None)  # a script may have no method `forward`
    named = [] if schema is None else schema.arguments[1:]
    arguments = [each for each in named if not each.has_default_value()]
    if len(arguments) > 1:
        zeros = ", ".join(
            "torch.zeros(len(x))" if str(each.type) == "Tensor" else "0" for each in arguments[1:]
        )
        raise TargetError(
            f"{str(path)!r} is called with {', '.join(each.name for each in arguments)}; one batch of inputs was "
            f"expected: {OWN_FUNCTION}, here with zeros in place of your values"
        ).with_code(
            "import torch",
            f"net = torch.jit.load({str(path)!r}).eval()",
            f"def make(): return lambda x: net(x, {zeros})",
        )


def _loaded(path: Path, content: io.BytesIO, *, script: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated, and classes may have changed
            if script:
                return torch.jit.load(content, map_location="cpu")  # type: ignore[no-untyped-call]
            with importable(path.parent):
                return torch.load(content, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise TargetError(
            f"{str(path)!r} needs a class that cannot be imported here: {error}. Put the file that defines it beside "
            "the model, or give a factory that loads the model, as file.py:factory"
        ) from error
    except Exception as error:  # the code in the file may raise anything
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise TargetError(
            f"{str(path)!r} could not be loaded by torch {torch.__version__}: {type(error).__name__}: {first_line}"
        ) from error


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
