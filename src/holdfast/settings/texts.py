"""Reads YAML text and CSV files of labels, words the errors of validation, and names the consent that a file cannot
give.
"""

import csv
import io
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from holdfast.core.errors import UsageError
from holdfast.core.names import by_stripped, did_you_mean, kind_of
from holdfast.io.files import text_of_file

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "names with values, as in {name: value}",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_LENGTHS = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}


_SHOWN = 200
"""number of characters of a value that a message shows"""


def place(error: ValidationError) -> str:
    """Return the path of the first invalid setting in a validation error, such as `attacks.0.steps`."""
    return ".".join(str(part) for part in error.errors()[0]["loc"])


def complaint(error: ValidationError) -> str:
    """Return a description of the first invalid setting in a validation error, such as `is 0; expected at least 1`."""
    details = error.errors()[0]
    text = repr(details["input"])
    return f"is {text if len(text) <= _SHOWN else f'{text[:_SHOWN]} …'}{_expected(error)}"


def _expected(error: ValidationError) -> str:
    details = error.errors()[0]
    kind, limits = details["type"], details.get("ctx", {})
    if kind in _LIMITS:
        phrase, key = _LIMITS[kind]
        return f"; expected {phrase} {limits[key]:g}"
    if kind in _LENGTHS:
        phrase, key = _LENGTHS[kind]
        return f"; expected {phrase} {limits[key]} {'entry' if limits[key] == 1 else 'entries'}"
    if kind == "literal_error":
        allowed = str(limits["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        return (
            f"; expected {allowed[0]}" if len(allowed) == 1 else did_you_mean(str(details["input"]), allowed)
        )
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return "; there is no such key"
    name = kind.partition("_")[0]
    if name in _KINDS:
        return f"; expected {_KINDS[name]}{_as_list(details['input']) if _KINDS[name] == 'a list' else ''}"
    return f"; {details['msg'][0].lower()}{details['msg'][1:]}"


def _as_list(value: object) -> str:
    """Numbers that were given without brackets, as a list."""
    parts = str(value).split(",")
    try:
        for part in parts:
            float(part)
    except ValueError:
        return ""
    return f", as in [{', '.join(part.strip() for part in parts)}]"


MAX_CHARACTERS = 1 << 18
"""largest number of characters of a text; PyYAML needs about 20 microseconds and 400 bytes of
memory for each character"""
_BYTES = 4
"""largest number of bytes of a character in UTF-8"""
_MOST = 2**63
"""limit of whole numbers; one with very many digits cannot be printed"""


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of YAML text. Raises `UsageError`, with the position, if it is invalid."""
    if len(text) > MAX_CHARACTERS:
        raise UsageError(
            f"{where} has more than {MAX_CHARACTERS:,} characters, the most that is read; remove what is not a setting"
        )
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except UsageError as error:
        raise error.reworded(f"{where}: {error.message}") from error
    except (
        Exception
    ) as error:  # a value that does not match its tag, such as !!bool maybe, raises various errors
        message = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{where} is not valid YAML: {message}; write KEY: VALUE, with text in quotes"
        ) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses repeated keys and aliases.

    A few hundred bytes of aliases can describe more values than fit in memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1
            raise UsageError(
                f"*{event.anchor} is an alias (line {line}), and aliases are not read; write the value itself"
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) >= _MOST:
            line = node.start_mark.line + 1
            raise UsageError(
                f"{node.value:.20} … is too large for a whole number (line {line}); give one of at most 64 bits"
            )
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:bool":  # the key `on` is a boolean in YAML 1.1
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise UsageError(
                    f"{key!r} is not a valid key (line {key_node.start_mark.line + 1}); expected text, as in model:"
                )
            if key in keys:
                raise UsageError(f"{key!r} is given twice (line {key_node.start_mark.line + 1}); keep one")
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file, which must be a mapping.

    Raises `TargetError` if the file cannot be read, and `UsageError` if it is not a mapping.
    """
    text = text_of_file(path, "configuration", most=_BYTES * MAX_CHARACTERS, may_be_empty=True)
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} contains {kind_of(content)}; expected keys such as model: and data:")
    return content


def put_setting(content: dict[str, Any], path: str, value: Any) -> None:
    """Set a value in a nested dictionary of settings at a dotted path, such as `attacks.0.steps`."""
    *parents, last_key = path.split(".")
    place: Any = content
    for key in parents:
        try:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        except (IndexError, ValueError, AttributeError):
            raise UsageError(f"--set {path}: there is no entry {key!r}") from None
    if isinstance(place, list) and last_key in map(str, range(len(place))):
        place[int(last_key)] = value
    elif isinstance(place, dict):
        place[last_key] = value
    else:
        raise UsageError(f"--set {path}: {last_key!r} is not an entry of {kind_of(place)}")


CONSENT: Mapping[str, tuple[str, str]] = {
    "trust_code": (
        "allow code to run. Remove it; if you trust the files, add --trust-code to the command line",
        "holdfast.open_model(…, trust_code=True)",
    ),
    "trust_network": (
        "trust a network. Remove it; if you trust every machine of it, add --trust-network to the command line",
        "on=holdfast.Ray(…, trust_network=True)",
    ),
    "follow_links": (
        "follow links. Remove it; if you want to read what they lead to, add --follow-links to the command line",
        "holdfast.open_data(…, follow_links=True)",
    ),
    "ship": (
        "send files to other machines. Remove it; add --ship PATH to the command line",
        "on=holdfast.Ray(…, ship=[…])",
    ),
}
"""Keys that no configuration file may contain, because only a person may give these permissions.

The values are the end of an error message, with the option to use instead, and the equivalent in Python.
"""


def refuse_consent(keys: Collection[str], where: str) -> None:
    """Raise `UsageError` if a configuration file or a `--set` contains a consent of the user, whatever its value."""
    for key, (act, in_python) in CONSENT.items():
        if key in keys:
            raise UsageError(
                f"{where} contains {key}, which is not a key of a configuration: only a person may {act}, or in Python "
                f"give {in_python}"
            )


_DIGITS = 18
"""Largest number of digits of a whole number, which then has 64 bits."""
_MOST_BYTES = 2**27
"""Largest size of the file: two million labels, each with the id of a request."""


def read_labels(path: Path, class_names: Sequence[str]) -> dict[tuple[str, int], int]:
    """Return the class of each input, by the request and the position of the input in it.

    The columns are `request`, `label` (a number, or the name of a class) and `row`, which is 0 if it is absent. Raises
    `UsageError` for an invalid file, and `TargetError` for one that cannot be read.
    """
    try:
        reader = csv.DictReader(
            io.StringIO(text_of_file(path, "file of labels", most=_MOST_BYTES), newline=""),
            restval="",
        )
        columns = set(reader.fieldnames or ())
        rows = list(reader)
    except csv.Error as error:
        raise UsageError(f"the labels {str(path)!r} cannot be read: {error}; give a CSV file") from error
    if not {"request", "label"} <= columns:
        raise UsageError(
            f"{path}: the columns are {', '.join(sorted(columns)) or 'none'}; request and label were expected, and row "
            "for requests of several inputs"
        )
    known = {}
    for line, row in enumerate(rows, 2):
        key = row["request"], _number(row.get("row") or "0", f"{path}: row in line {line}")
        if key in known:
            raise UsageError(f"{path}: line {line} repeats a label of the request {key[0]!r}; give each once")
        known[key] = _label(row["label"], class_names, f"{path}: label in line {line}")
    return known


def _label(text: str, class_names: Sequence[str], where: str) -> int:
    name = by_stripped([text], class_names)[text]
    if name in class_names:
        return class_names.index(name)
    return _number(text, where)


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise UsageError(f"{where} is {text!r}; a whole number of at most {_DIGITS} digits was expected")
    return int(text)
