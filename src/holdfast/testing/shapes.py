"""Run-time checks for tests that tensors have the shapes in the annotations of functions.

`checked(f)` wraps a function. `watching("holdfast.attacks.parts")` wraps all public functions of packages for the
duration of a test, and `unchecked()` suspends the checks. A name in a shape has one size within a call: `n` is the same
for `x` and for `y`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from holdfast.core.types import Shape

F = TypeVar("F", bound=Callable[..., Any])


class _Checks:
    """State of all checks of this process."""

    suspended: ClassVar[bool] = False


def fits(value: Tensor, shape: Shape, sizes: dict[str, tuple[int, ...]]) -> bool:
    """Return whether a tensor matches an annotated shape and kind. `sizes` contains the sizes of the dimension names so
    far, to which new names are added.
    """
    if shape.kind == "float" and not value.is_floating_point():
        return False
    if shape.kind == "bool" and value.dtype != torch.bool:
        return False
    if shape.kind == "int" and value.dtype not in {torch.int64, torch.int32}:
        return False
    names, lengths = shape.dims.split(), tuple(value.shape)
    starred = [name for name in names if name.startswith("*")]
    if len(lengths) < len(names) - len(starred) or (not starred and len(lengths) != len(names)):
        return False
    position = 0
    for name in names:
        width = len(lengths) - len(names) + 1 if name.startswith("*") else 1
        axes = lengths[position : position + width]
        position += len(axes)
        if sizes.setdefault(name, axes) != axes:
            return False
    return True


def checked(function: F) -> F:
    """Return a function that also checks its tensors: it raises `TypeError` if an argument or the result does not have
    the annotated shape.
    """
    try:
        hints = _shapes(get_type_hints(function, include_extras=True))
    except NameError:  # of a type that is imported for type checkers only
        return function
    if not hints:
        return function
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())
    positions = [
        (position if p.kind in positional else sys.maxsize, p.name)
        for position, p in enumerate(parameters)
        if p.name in hints
    ]
    promised = "return" in hints
    # Shapes and types that passed before are not checked again, because most calls of a test repeat a few of them.
    passed: dict[tuple[_Seen, ...], tuple[dict[str, tuple[int, ...]], set[_Seen]]] = {}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _Checks.suspended:
            return function(*args, **kwargs)
        n = len(args)
        values = [args[position] if position < n else kwargs.get(name) for position, name in positions]
        key = tuple([(value.dtype, value.shape) if isinstance(value, Tensor) else None for value in values])
        previous = passed.get(key)
        if previous is None:
            sizes: dict[str, tuple[int, ...]] = {}
            for (_, name), value in zip(positions, values, strict=True):
                _expect(function, name, value, hints, sizes)
            previous = passed[key] = sizes, set()
        result = function(*args, **kwargs)
        if promised and isinstance(result, Tensor):
            result_shape = result.dtype, result.shape
            if result_shape not in previous[1]:
                _expect(function, "return", result, hints, dict(previous[0]))
                previous[1].add(result_shape)
        return result

    return call  # type: ignore[return-value]


_Seen = tuple[torch.dtype, torch.Size] | None
"""Properties that a check of shapes depends on; None for values other than tensors."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Context manager that suspends all checks, where shapes that were checked before are used again in many calls."""
    before, _Checks.suspended = _Checks.suspended, True
    try:
        yield
    finally:
        _Checks.suspended = before


@contextmanager
def watching(*packages: str) -> Iterator[None]:
    """Context manager inside which all public functions and methods of `packages` check the shapes of their tensors,
    also where they were imported.
    """
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("holdfast.")}
    undo: list[tuple[Any, str, Any]] = []
    wrapped: dict[Any, Any] = {}
    for name, module in loaded.items():
        if not name.startswith(packages):
            continue
        for public, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != name or public.startswith("_"):
                continue
            if inspect.isfunction(value):
                wrapped[value] = checked(value)
            elif inspect.isclass(value):
                methods = [(m, f) for m, f in vars(value).items() if inspect.isfunction(f) and _is_public(m)]
                undo += [(value, method, function) for method, function in methods]
                for method, function in methods:
                    setattr(value, method, checked(function))
    for module in loaded.values():
        for public, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in wrapped:
                undo.append((module, public, value))
                setattr(module, public, wrapped[value])
    try:
        yield
    finally:
        for owner, public, value in undo:
            setattr(owner, public, value)


def _is_public(method: str) -> bool:
    return method == "__call__" or not method.startswith("_")


def _shapes(hints: Mapping[str, Any]) -> dict[str, Shape]:
    shapes = {}
    for name, hint in hints.items():
        options = [hint, *get_args(hint)] if get_origin(hint) is not Annotated else [hint]
        for option in options:
            marks = get_args(option)[1:] if get_origin(option) is Annotated else ()
            for shape in (mark for mark in marks if isinstance(mark, Shape)):
                shapes[name] = shape
    return shapes


def _expect(
    function: Callable[..., Any],
    name: str,
    value: object,
    hints: Mapping[str, Shape],
    sizes: dict[str, tuple[int, ...]],
) -> None:
    shape = hints.get(name)
    if shape is None or not isinstance(value, Tensor) or fits(value, shape, sizes):
        return
    raise TypeError(
        f"{function.__qualname__}: {name} is {value.dtype} of shape {tuple(value.shape)}; "
        f"expected {shape.kind} of shape ({shape.dims}) with {sizes}"
    )
