"""Checks JSON documents against their models: annotated types, such as typed dictionaries, which pydantic validates.

Each document is validated before its fields are used, because a run folder may be untrusted. Fields that a typed
dictionary does not have are allowed and ignored.
"""

import re
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from holdfast.core.errors import TargetError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,150}")
_DESCRIBED = 1000
"""largest number of faults of a document that are described, which takes much more memory than the document"""
_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


def refuse_form(file: Path, content: Any, model: Hashable) -> None:
    """Raise `TargetError` if the content of a JSON document does not match its model."""
    validated(file, content, model)


class FormFault(ValueError):
    """Content that does not match its model. The message contains the first field that does not match, and what was
    expected.
    """


def validated(file: Path, content: Any, model: Hashable) -> Any:
    """Return the content of a JSON document as a value of its model. Raises `TargetError` if it does not match; the
    message contains the file, the first field that does not match, and what was expected.
    """
    try:
        return conforming(content, model)
    except FormFault as fault:
        raise TargetError(
            f"{str(file)!r} has another format than this version writes: {fault}; restore it from a copy, or repeat "
            "the run if an earlier version wrote it"
        ) from None


def conforming(content: Any, model: Hashable) -> Any:
    """Return content of JSON as a value of its model. Raises `FormFault` if it does not match."""
    try:
        return _adapter(model).validate_python(content)
    except ValidationError as error:
        n = error.error_count()
        raise FormFault(
            _fault(error.errors(include_url=False)[0])
            if n <= _DESCRIBED
            else f"{n:,} fields have other types"
        ) from None


@lru_cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _fault(error: ErrorDetails) -> str:
    """The path of a field, its value, and what was expected, as text of limited length."""
    place, value, expected = list(error["loc"]), error["input"], error["msg"].removeprefix("Input should be ")
    if error["type"] == "missing":
        absent = place.pop()
        value, expected = (
            (value, "a longer list")
            if isinstance(value, list)
            else (sorted(value), f"an object with {absent!r}")
        )
    if error["type"] == "too_long":
        expected = "a shorter list"
    if error["type"] == "dict_type":
        expected = "an object"
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{_SHOWN.repr(part)[1:-1]}" for part in place)
    return f"{path.removeprefix('.') or 'the document'} is {_SHOWN.repr(value)}; {expected} was expected"


def required(is_valid: Callable[[Any], object], expected: str) -> AfterValidator:
    """Return a validator that refuses the values for which `is_valid` returns False. `expected` describes the others
    in the message.
    """

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise PydanticCustomError("form", "{expected}", {"expected": expected})
        return value

    return AfterValidator(check)


def is_name(value: object) -> bool:
    """Return whether a value is a valid file name within a run: letters, digits and a few other characters, but no path
    separators.
    """
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e308


Name = Annotated[str, required(is_name, "a name of letters, digits and the characters _.+=-")]
"""name of a stage, which is also a part of the name of its file"""
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict(), Field(gt=-(2**63), lt=2**63)]
"""integer of at most 63 bits"""
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Real = Annotated[Any, required(lambda value: _finite(value) or value in ("inf", "-inf", "nan"), "a number")]
"""number, or one of the strings that represent infinities and NaN in strict JSON"""


def distinct(field: str | None = None) -> AfterValidator:
    """Return a validator of lists that refuses equal entries, or entries with equal values of a field."""
    return required(
        lambda entries: len({each if field is None else each[field] for each in entries}) == len(entries),
        "a list of distinct names",
    )
