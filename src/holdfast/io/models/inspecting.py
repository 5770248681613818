"""Inspects an estimator from an untrusted file for anything with which its predictions read or write files.

All types of such a file are trusted by skops, but values of these types can open files: a vectorizer with
`input="filename"` reads the files that it is given, and the argument `out` of a function of numpy returns any values in
place of results. The list of what is allowed is closed: other objects and all functions are refused.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from reprlib import Repr
from typing import Any

import numpy as np

from holdfast.core.errors import UsageError
from holdfast.core.remedies import TRUST_CODE

_VALUES = (type(None), bool, int, float, complex, str, bytes, bytearray, slice, range)
_GENERATORS = (np.random.RandomState, np.random.Generator)
_TYPES = (bool, int, float, str, object)
"""Types outside of numpy that an estimator may name, as the type of its results."""
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60
_FUNCTION = (
    "save the estimator without it; functions of one array of numpy and scipy.special are allowed as func of a "
    "FunctionTransformer without kw_args"
)
_ONLY: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "input": (
        ("content",),
        "which reads files when the estimator predicts",
        'save the estimator with input="content"',
    ),
    "memory": ((None,), "which stores results in files", "save it after set_params(memory=None)"),
}
"""The allowed values of attributes by which estimators of scikit-learn read or write files, with the reason and the
remedy."""


def refuse_access(path: Path, estimator: object) -> None:
    """Raise `UsageError` for the first object in an estimator that could read or write files, run other code than that
    of scikit-learn, or is of an unknown type.

    The objects are traversed as for pickling: attributes, containers and nested estimators. No method of an estimator
    is called except `__reduce__` of compiled classes.
    """
    # The second list keeps temporary objects alive, since the number of an object identifies it only while it exists.
    waiting, kept, seen = [("", estimator)], [], set[int]()
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, np.ufunc):
            raise _refused(path, place, value, "which is a function", _FUNCTION)
        if type(value) in _VALUES or id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        waiting += _inner(path, place, value)


def _inner(path: Path, place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects in an object, each with its place in the estimator. Raises `UsageError` for an object that is
    not allowed.
    """
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        yield from ((f"{place}[{k}]", each) for k, each in enumerate(value))
    elif issubclass(kind, dict):
        yield from ((f"{place}[{_short(key)}]", each) for key, each in value.items())
        yield from ((f"a key of {place or 'the estimator'}", key) for key in value)
        if isinstance(value, defaultdict):
            yield f"{place}.default_factory", value.default_factory
    elif kind in (np.ndarray, np.ma.MaskedArray):
        if value.dtype.hasobject:
            yield from ((f"{place}[{k}]", each) for k, each in enumerate(np.ma.getdata(value).flat))
    elif isinstance(value, np.generic | np.dtype) or kind in _GENERATORS:
        return
    elif isinstance(value, type):
        if value not in _TYPES and not issubclass(value, np.generic):
            raise _refused(path, place, value, "which is not a type of numbers or text", _FUNCTION)
    elif kind.__module__.startswith("scipy.sparse."):
        yield from vars(value).items()
    elif kind.__module__.partition(".")[0] == "sklearn":
        yield from _of_sklearn(path, place, value)
    else:
        described = (
            "which may run any code"
            if callable(value)
            else f"of the type {kind.__qualname__}, which is not known"
        )
        raise _refused(path, place, value, described, _FUNCTION)


def _of_sklearn(path: Path, place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object of scikit-learn. Raises `UsageError` for one with access to files."""
    try:
        attributes = dict(vars(value))
    except TypeError:  # an object of a compiled class has no attributes in Python
        _, arguments, *state = value.__reduce__()
        values = [each for each in arguments if not isinstance(each, type)]  # without the class itself
        yield f"{place}.__reduce__()", [values, state]
        return
    for attribute, (allowed, reason, remedy) in _ONLY.items():
        given = attributes.get(attribute, allowed[0])
        if type(given) not in map(type, allowed) or given not in allowed:
            raise _refused(path, _joined(place, attribute), given, reason, remedy)
    if type(value).__name__ == "FunctionTransformer":
        for function, arguments in (("func", "kw_args"), ("inverse_func", "inv_kw_args")):
            given = attributes.get(arguments)
            if type(given) not in (type(None), dict) or given:
                text = "whose arguments may be places for the results of the function"
                raise _refused(path, _joined(place, arguments), given, text, _FUNCTION)
            if _is_elementwise(attributes.get(function)):
                del attributes[function]
    yield from ((_joined(place, str(attribute)), each) for attribute, each in attributes.items())


def _is_elementwise(function: object) -> bool:
    """Whether a function is one of numpy or scipy of one array, without side effects: it computes each value alone."""
    return isinstance(function, np.ufunc) and (function.nin, function.nout) == (1, 1)


def _joined(place: str, attribute: str) -> str:
    return f"{place}.{attribute}" if place else attribute


def _short(value: object) -> str:
    """Return a value as text, and an object that is no plain value as its type, whose text the file could determine."""
    if isinstance(value, type | np.ufunc):
        return value.__name__
    return _REPR.repr(value) if type(value) in _VALUES else f"<{type(value).__qualname__}>"


def _refused(path: Path, place: str, value: object, reason: str, remedy: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} contains {place or 'an estimator'} = {_short(value)}, {reason}; {remedy}",
        TRUST_CODE,
    )
