"""Opens estimators in `.skops` files, and inspects them for anything that reads or writes files."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from reprlib import Repr
from typing import Any

import numpy as np

from holdfast.core.errors import TRUST_CODE, TargetError, UsageError, importing
from holdfast.core.names import kind_of
from holdfast.io.models.estimators import Adapted, Predictor, adapted_estimator
from holdfast.io.models.trees import open_booster, open_lightgbm
from holdfast.io.models.weights import check_archive, read_once
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.sandbox_main import Limits

_VALUES = (type(None), bool, int, float, complex, str, bytes, bytearray, slice, range)
_GENERATORS = (np.random.RandomState, np.random.Generator)
_TYPES = (bool, int, float, str, object)
"""Types outside of numpy that an estimator may name, as the type of its results."""
_OPTIMISERS = tuple(
    f"sklearn.neural_network._stochastic_optimizers.{name}" for name in ("AdamOptimizer", "SGDOptimizer")
)
"""types in every fitted multi-layer perceptron that skops does not trust, and which have numbers and arrays only"""
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
        f"{str(path)!r} contains {place or 'an estimator'} = {_short(value)}, {reason}; {remedy}", TRUST_CODE
    )


_SHOWN = 5
_SAVED_BY = "save it with skops.io.dump(estimator, file), without compression"


LIMITS = Limits(copies=8, spare_bytes=2**30)
"""Limits of the process that first loads an estimator."""


def open_skops(path: Path, *, trust_code: bool) -> tuple[Any, str, tuple[str, ...]]:
    """Return the estimator in a `.skops` file, the SHA-256 of the file, and notes for the report.

    If `trust_code` is False, the estimator is first loaded in a separate process and called with two rows, and types
    that skops does not trust raise `UsageError`. Raises `TargetError` for a damaged file.
    """
    content = read_once(path, "model")
    if not trust_code:
        with read_under_limits("estimators", path, LIMITS, content=content):
            pass  # loaded here after the separate process succeeded
    estimator, notes = loaded_estimator(path, content, trust_code=trust_code)
    return estimator, hashlib.sha256(content).hexdigest(), notes


def loaded_estimator(path: Path, content: bytes, *, trust_code: bool) -> tuple[Any, tuple[str, ...]]:
    """Return the estimator in the content of a `.skops` file, and notes for the report. Raises the same errors as
    `open_skops`.
    """
    sio = importing("skops.io", f"{str(path)!r} is a .skops file, and skops is missing", "sklearn")
    # Checked before skops reads it, because a small archive can need any amount of memory.
    check_archive(path, content, saved_by=_SAVED_BY)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        try:
            unknown = sio.get_untrusted_types(data=content)
        except MemoryError:
            raise
        except Exception as error:  # skops raises any error, such as KeyError, for an untrusted file
            raise _damaged(path, error) from error
        untrusted = [name for name in unknown if name not in _OPTIMISERS]
        if untrusted and not trust_code:
            boosted = any(warning.startswith("xgboost.") for warning in untrusted)
            raise UsageError(
                f"{str(path)!r} contains {_listed(untrusted)}, which skops does not trust, because loading them "
                "may run code"
                + (
                    "; save models of XGBoost with their method save_model, as .json or .ubj"
                    if boosted
                    else ""
                ),
                TRUST_CODE,
            )
        try:
            estimator = sio.loads(content, trusted=unknown)
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise _damaged(path, error) from error
    if not trust_code:
        refuse_access(path, estimator)
    return estimator, tuple(dict.fromkeys(str(warning.message).split("\n")[0] for warning in recorded))


def _listed(types: list[str]) -> str:
    more = f" and {len(types) - _SHOWN} more" if len(types) > _SHOWN else ""
    return f"the types {', '.join(types[:_SHOWN])}{more}" if len(types) > 1 else f"the type {types[0]}"


def _damaged(path: Path, error: Exception) -> TargetError:
    # Shortened, because the text may come from an untrusted file.
    first_line = (str(error).splitlines() or [""])[0][:200]
    return TargetError(
        f"{str(path)!r} is not an estimator that skops can open: {type(error).__name__}: {first_line}; {_SAVED_BY}"
    )


_FACTORY = "load it in a factory of yours, and give that as file.py:factory"
_SKLEARN = f"save a scikit-learn estimator with skops.io.dump, as .skops, and give that; or {_FACTORY}"
_KERAS = "load it with keras.models.load_model in a factory of yours, and give that as file.py:factory"
_RUN_CODE = {".pkl": _SKLEARN, ".pickle": _SKLEARN, ".joblib": _SKLEARN, ".keras": _KERAS, ".h5": _KERAS}
"""Suffixes of files that may run code when they are loaded, with advice for each."""
ESTIMATOR_SUFFIXES = (".skops", ".json", ".ubj", ".txt", *_RUN_CODE)
"""Suffixes of files that contain an estimator or a Keras model."""


def open_estimator(path: Path, *, trust_code: bool) -> tuple[Adapted, str, tuple[str, ...]]:
    """Return the estimator in a `.skops` file wrapped as a model, the SHA-256 of the file, and notes for the report.

    Raises `UsageError` if a required package is missing or the file needs `trust_code`, and `TargetError` for a damaged
    file and for an object that is not a classifier.
    """
    if path.suffix in (".json", ".ubj"):
        return (*open_booster(path), ())
    if path.suffix == ".txt":
        return (*open_lightgbm(path), ())
    if path.suffix in _RUN_CODE:
        if not path.exists():
            raise TargetError(f"model {str(path)!r} does not exist")
        raise UsageError(
            f"{str(path)!r} may run code when it is loaded and is not opened: {_RUN_CODE[path.suffix]}"
        )
    estimator, digest, notes = open_skops(path, trust_code=trust_code)
    if not isinstance(estimator, Predictor):
        raise TargetError(
            f"{str(path)!r} contains {kind_of(estimator)}; an estimator with the method predict was expected"
        )
    return adapted_estimator(estimator, parallel=trust_code), digest, notes
