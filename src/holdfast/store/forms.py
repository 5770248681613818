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
"""Schema: a function of a value and its path in the document that raises `_Unlike` if the value does not match."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,150}")
_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


class _Unlike(Exception):
    def __init__(self, value: Any, where: str, expected: str) -> None:
        super().__init__(f"{where or 'the document'} is {_SHOWN.repr(value)}; {expected} was expected")


def refuse_form(file: Path, content: Any, form: Form) -> None:
    """Raise `TargetError` if the content of a JSON document does not match its schema.

    The message contains the file, the first field that does not match, and what was expected.
    """
    try:
        form(content, "")
    except _Unlike as error:
        raise TargetError(
            f"{str(file)!r} has another format than that of a run: {error}; restore it from a copy"
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
    _expect(isinstance(value, str), value, where, "text")


def name(value: Any, where: str) -> None:
    """Schema that accepts the name of a stage, which is also a part of the name of its file."""
    _expect(is_name(value), value, where, "a name of letters, digits and the characters _.+=-")


def flag(value: Any, where: str) -> None:
    """Schema that accepts true or false."""
    _expect(isinstance(value, bool), value, where, "true or false")


def whole(value: Any, where: str) -> None:
    """Schema that accepts an integer of at most 63 bits."""
    holds = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    _expect(holds, value, where, "a whole number")


def count(value: Any, where: str) -> None:
    """Schema that accepts a nonnegative integer."""
    whole(value, where)
    _expect(value >= 0, value, where, "a whole number from 0")


def real(value: Any, where: str) -> None:
    """Schema that accepts a number, or one of the strings that represent infinities and NaN in strict JSON."""
    holds = isinstance(value, int | float) and not isinstance(value, bool)
    holds = (holds and abs(value) <= 1e308) or (isinstance(value, str) and value in ("inf", "-inf", "nan"))
    _expect(holds, value, where, "a number")


def one_of(*words: str | int) -> Form:
    """Return a schema that accepts only the given values."""

    def check(value: Any, where: str) -> None:
        known = any(type(value) is type(word) and value == word for word in words)
        _expect(known, value, where, " or ".join(map(repr, words)))

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
        _expect(isinstance(value, list), value, where, "a list")
        for place, each in enumerate(value):
            form(each, f"{where}[{place}]")

    return check


def distinct(form: Form, field: str | None = None) -> Form:
    """Return a schema that accepts a list of distinct entries that match the schema `form`.

    With `field`, the entries of the list are objects, and their values of this field must be distinct.
    """

    def check(value: Any, where: str) -> None:
        list_of(form)(value, where)
        seen = set()
        for each in value if field is None else [item[field] for item in value]:
            _expect(each not in seen, each, f"an entry of {where}", "a name that occurs once")
            seen.add(each)

    return check


def pair(form: Form) -> Form:
    """Return a schema that accepts a list of two entries that match the schema `form`."""

    def check(value: Any, where: str) -> None:
        list_of(form)(value, where)
        _expect(len(value) == 2, value, where, "a list of two")

    return check


def mapped(form: Form) -> Form:
    """Return a schema that accepts a JSON object with any field names, whose values match the schema `form`."""

    def check(value: Any, where: str) -> None:
        _expect(isinstance(value, dict), value, where, "an object")
        for each in value.values():
            form(each, f"a value of {where or 'the document'}")

    return check


def record(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """Return a schema that accepts a JSON object with the given required and optional fields. Further fields are
    allowed and ignored.
    """

    def check(value: Any, where: str) -> None:
        _expect(isinstance(value, dict), value, where, "an object")
        for field, form in (optional or {}).items():
            if field in value:
                form(value[field], _within(where, field))
        for field, form in required.items():
            _expect(field in value, sorted(value), where, f"an object with {field!r}")
            form(value[field], _within(where, field))

    return check


def _within(where: str, field: str) -> str:
    return f"{where}.{field}" if where else field


def _expect(holds: object, value: Any, where: str, expected: str) -> None:
    if not holds:
        raise _Unlike(value, where, expected)
