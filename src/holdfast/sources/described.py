"""Checks the description of a network in a file with weights.

Each entry has one type and range of values, because the file may be untrusted.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any

from holdfast.core.errors import TargetError

MOST_CLASSES = 1_000_000
_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _are_bounds(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2 and value[0] < value[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_CLASSES


def _are_whole(value: Any) -> bool:
    return isinstance(value, dict) and all(type(each) is int for each in value.values())


def _are_names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return texts and 1 <= len(value) <= MOST_CLASSES


_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda value: isinstance(value, str), "the name of an architecture"),
    "arguments": (_are_whole, "names with whole numbers"),
    "bounds": (_are_bounds, "two numbers, the smaller first,"),
    "mean": (_are_numbers, "a list of numbers"),
    "std": (lambda value: _are_numbers(value) and min(value) > 0, "a list of positive numbers"),
    "classes": (_is_count, f"a whole number from 1 to {MOST_CLASSES:,}"),
    "class_names": (_are_names, f"a list of at most {MOST_CLASSES:,} texts"),
    "output": (lambda value: value in ("logit", "probability"), "logit or probability"),
    "layout": (lambda value: value in ("chw", "hwc", "asis"), "chw, hwc or asis"),
}


def refuse_description(path: Path, said: Mapping[str, Any]) -> None:
    """Raise `TargetError` for the first known entry whose value has another type or range.

    Entries that are not known are ignored.
    """
    for key, (fits, expected) in _FORMS.items():
        value = said.get(key)
        if value is not None and not fits(value):
            raise TargetError(
                f"{str(path)!r} says that {key} is {_SHOWN.repr(value)}; {expected} was expected. Write the file "
                "again, or give the network as --arch file.py:factory and leave the metadata out"
            )
