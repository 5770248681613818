"""Reads YAML text in configuration files and in values of the option `--set`."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of
from holdfast.io.files import text_of_file

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
