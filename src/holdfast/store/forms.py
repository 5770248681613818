"""Schemas of JSON documents. Each document is validated before its fields are used, because a run folder may be
untrusted.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

from holdfast.core.errors import TargetError

Form = Callable[[Any, str], None]
"""Schema: a function of a value and its path in the document that raises `_Mismatch` if the value does not match."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,150}")
_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


class _Mismatch(Exception):
    def __init__(self, value: Any, where: str, expected: str) -> None:
        super().__init__(f"{where or 'the document'} is {_SHOWN.repr(value)}; {expected} was expected")


def refuse_form(file: Path, content: Any, form: Form) -> None:
    """Raise `TargetError` if the content of a JSON document does not match its schema.

    The message contains the file, the first field that does not match, and what was expected.
    """
    try:
        form(content, "")
    except _Mismatch as error:
        raise TargetError(
            f"{str(file)!r} has another format than this version writes: {error}; restore it from a copy"
        ) from None


def is_name(value: object) -> bool:
    """Return whether a value is a valid file name within a run: letters, digits and a few other characters, but no path
    separators.
    """
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def anything(value: Any, where: str) -> None:
    """Schema that accepts any value, for fields that are only displayed."""


def text(value: Any, where: str) -> None:
    """Schema that accepts a string."""
    require(isinstance(value, str), value, where, "text")


def name(value: Any, where: str) -> None:
    """Schema that accepts the name of a stage, which is also a part of the name of its file."""
    require(is_name(value), value, where, "a name of letters, digits and the characters _.+=-")


def flag(value: Any, where: str) -> None:
    """Schema that accepts true or false."""
    require(isinstance(value, bool), value, where, "true or false")


def whole(value: Any, where: str) -> None:
    """Schema that accepts an integer of at most 63 bits."""
    is_valid = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    require(is_valid, value, where, "a whole number")


def count(value: Any, where: str) -> None:
    """Schema that accepts a nonnegative integer."""
    whole(value, where)
    require(value >= 0, value, where, "a whole number from 0")


def real(value: Any, where: str) -> None:
    """Schema that accepts a number, or one of the strings that represent infinities and NaN in strict JSON."""
    is_valid = isinstance(value, int | float) and not isinstance(value, bool)
    is_valid = (is_valid and abs(value) <= 1e308) or (
        isinstance(value, str) and value in ("inf", "-inf", "nan")
    )
    require(is_valid, value, where, "a number")


def one_of(*allowed: str | int) -> Form:
    """Return a schema that accepts only the given values."""

    def check(value: Any, where: str) -> None:
        is_allowed = any(type(value) is type(word) and value == word for word in allowed)
        require(is_allowed, value, where, " or ".join(map(repr, allowed)))

    return check


def maybe(form: Form) -> Form:
    """Return a schema that accepts null and every value that the schema `form` accepts."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            form(value, where)

    return check


def list_of(form: Form) -> Form:
    """Return a schema that accepts a list whose entries match the schema `form`."""

    def check(value: Any, where: str) -> None:
        require(isinstance(value, list), value, where, "a list")
        for index, entry in enumerate(value):
            form(entry, f"{where}[{index}]")

    return check


def distinct(form: Form, field: str | None = None) -> Form:
    """Return a schema that accepts a list of distinct entries that match the schema `form`.

    With `field`, the entries of the list are objects, and their values of this field must be distinct.
    """

    def check(value: Any, where: str) -> None:
        list_of(form)(value, where)
        earlier = set()
        for entry in value if field is None else [item[field] for item in value]:
            require(entry not in earlier, entry, f"an entry of {where}", "a name that occurs once")
            earlier.add(entry)

    return check


def pair(form: Form) -> Form:
    """Return a schema that accepts a list of two entries that match the schema `form`."""

    def check(value: Any, where: str) -> None:
        list_of(form)(value, where)
        require(len(value) == 2, value, where, "a list of two")

    return check


def entries(*each: Form) -> Form:
    """Return a schema that accepts a list whose entries match the schemas `each` in their order."""

    def check(value: Any, where: str) -> None:
        list_of(anything)(value, where)
        require(len(value) == len(each), value, where, f"a list of {len(each)}")
        for index, (form, entry) in enumerate(zip(each, value, strict=True)):
            form(entry, f"{where}[{index}]")

    return check


def mapped(form: Form) -> Form:
    """Return a schema that accepts a JSON object with any field names, whose values match the schema `form`."""

    def check(value: Any, where: str) -> None:
        require(isinstance(value, dict), value, where, "an object")
        for entry in value.values():
            form(entry, f"a value of {where or 'the document'}")

    return check


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """Return a schema that accepts a JSON object with the given required and optional fields. Further fields are
    allowed and ignored.
    """

    def check(value: Any, where: str) -> None:
        require(isinstance(value, dict), value, where, "an object")
        for field, form in (optional or {}).items():
            if field in value:
                form(value[field], _path_of_field(where, field))
        for field, form in required.items():
            require(field in value, sorted(value), where, f"an object with {field!r}")
            form(value[field], _path_of_field(where, field))

    return check


def _path_of_field(where: str, field: str) -> str:
    return f"{where}.{field}" if where else field


def require(is_valid: object, value: Any, where: str, expected: str) -> None:
    """Refuse a value that a schema does not accept."""
    if not is_valid:
        raise _Mismatch(value, where, expected)
