"""Rules of a threat on files, from a JSON file."""

import json
import re
from pathlib import Path
from types import NoneType
from typing import Any

from holdfast.core.errors import TargetError
from holdfast.core.names import did_you_mean, kind_of
from holdfast.io.files import content_of_file, refuse_address, refusing
from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.file_formats import FORMATS

_MOST_BYTES, _MOST_RULES, _MOST_PLACES = 1_000_000, 1000, 10_000
_EXAMPLE = (
    '[{"starts": "PK", "format": "zip"}, {"change": [[0, 64], [-16, -8]], "append": true, "values": "[ -~]"}]'
)
_PATTERNS = ("starts", "change", "insert", "values")
_KEYS = ("starts", "format", "change", "insert", "append", "values")


def byte_changes(*, change: int = 0, append: int = 0, insert: int = 0, file: str = "") -> ByteChanges:
    """Return the constraint with these limits and the rules of the file.

    Raises `UsageError` if no change is allowed, and `TargetError` for a file that is not as expected.
    """
    if not file:
        return ByteChanges(change, append, insert)
    refuse_address(file, "the file of rules is", "bytes:change=16,file=rules.json")
    content = json.dumps({"rules": _rules(Path(file))}, sort_keys=True, separators=(",", ":"))
    return ByteChanges(change, append, insert, file, content)


def _rules(path: Path) -> list[dict[str, Any]]:
    """Return the rules of the file after checks of their keys and types."""
    content = content_of_file(
        path, "file of rules", most=_MOST_BYTES, advice="give patterns in place of offsets"
    )
    # UnicodeDecodeError and JSONDecodeError are among these errors
    with refusing(f"{str(path)!r} is not JSON", (ValueError, RecursionError), f"{_EXAMPLE} was expected"):
        rules = json.loads(content)
    rules = [rules] if isinstance(rules, dict) else rules
    if not isinstance(rules, list) or not 0 < len(rules) <= _MOST_RULES:
        given = f"{len(rules):,} rules" if isinstance(rules, list) else kind_of(rules)
        raise TargetError(
            f"{str(path)!r} contains {given}; a list of 1 to {_MOST_RULES:,} rules such as {_EXAMPLE} was expected"
        )
    for number, rule in enumerate(rules):
        _refuse_invalid(rule, f"rule {number} of {str(path)!r}")
    return rules


def _refuse_invalid(rule: object, name: str) -> None:
    if not isinstance(rule, dict):
        raise TargetError(f"{name} is {kind_of(rule)}; an object such as {_EXAMPLE[1:-1]} was expected")
    unknown = next((key for key in rule if key not in _KEYS), None)
    if unknown is not None:
        raise TargetError(f"{name} has the key {unknown!r}{did_you_mean(unknown, _KEYS)}")
    known = ", ".join(FORMATS)
    if "format" in rule and rule["format"] not in [*FORMATS]:  # a list, since the value may be one
        raise TargetError(f"the format of {name} is {rule['format']!r:.80}; one of {known} was expected")
    if "format" in rule and {"change", "insert", "append"} & rule.keys():
        raise TargetError(
            f"{name} has a format, which states the places, and places of its own; leave out one of them"
        )
    if not {"format", "change", "insert", "append"} & rule.keys():
        raise TargetError(
            f"{name} allows no place; give any of change, insert, append and format ({known}), as in {_EXAMPLE}"
        )
    if not isinstance(rule.get("append", False), bool):
        raise TargetError(f"append in {name} is {rule['append']!r:.80}; true or false was expected")
    for key in _PATTERNS:
        if isinstance(rule.get(key), str):
            _refuse_pattern(rule[key], f"{key} in {name}")
        elif key in rule:
            _refuse_places(key, rule[key], f"{key} in {name}")
    if isinstance(rule.get("values"), str) and not any(
        re.fullmatch(rule["values"].encode("latin-1"), bytes((value,)), re.DOTALL) for value in range(256)
    ):
        raise TargetError(
            f"values in {name} is {rule['values']!r:.80}, which matches no byte; give [ -~] or another class"
        )


def _refuse_pattern(pattern: str, name: str) -> None:
    """Raise `TargetError` unless a text is a regular expression on bytes."""
    fault, advice = (
        f"{name} is {pattern!r:.80}, which is no regular expression on bytes",
        "write bytes as \\xHH",
    )
    with refusing(fault, (re.error, UnicodeEncodeError), advice):
        re.compile(pattern.encode("latin-1"))


def _refuse_places(key: str, places: object, name: str) -> None:
    """Raise `TargetError` unless places are pairs of offsets, or offsets for `insert`."""
    expected = "[[0, 64], [-16, -8]]" if key == "change" else "[0, -4]"
    pairs = key == "change"

    def fits(place: object) -> bool:
        if not pairs:
            return type(place) is int
        return (
            isinstance(place, list)
            and len(place) == 2
            and type(place[0]) is int
            and type(place[1]) in (int, NoneType)
        )

    if key in ("starts", "values") or not isinstance(places, list) or not all(map(fits, places)):
        offsets = "" if key in ("starts", "values") else f"offsets such as {expected}, or "
        raise TargetError(f"{name} is {places!r:.80}; {offsets}a regular expression was expected")
    no_byte = next((pair for pair in places if pairs and _is_empty(*pair)), None)
    if no_byte is not None:
        raise TargetError(
            f"{name} has the pair {no_byte}, which contains no byte; the second is the offset after the last byte, and "
            "null is the end of the file, as in [-4, null]"
        )
    if len(places) > _MOST_PLACES:
        raise TargetError(
            f"{name} has {len(places):,} offsets; at most {_MOST_PLACES:,} were expected: give a pattern"
        )


def _is_empty(start: int, stop: int | None) -> bool:
    """Return whether a pair of offsets contains no byte of any file."""
    return stop is not None and (stop == 0 or (stop <= start and (start < 0 or stop > 0)))
