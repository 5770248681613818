"""The hash chain of a run on disk: `chain.jsonl`, one record a line, and the JSON documents beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.core.chain import GENESIS, Link, broken_at, canonical
from holdfast.core.errors import TargetError
from holdfast.store.files import append, usable

CHAIN = "chain.jsonl"


class Chain:
    """The records of a run, oldest first."""

    def __init__(self, path: Path, links: list[Link]) -> None:
        self._path, self._links = path, links

    @property
    def links(self) -> tuple[Link, ...]:
        """All records."""
        return tuple(self._links)

    @property
    def head(self) -> str:
        """The digest of the last record: it stands for the whole run."""
        return self._links[-1].digest if self._links else GENESIS

    def last(self, kind: str, name: str = "") -> Mapping[str, Any] | None:
        """Content of the newest record of a kind and name."""
        for link in reversed(self._links):
            if link.content["kind"] == kind and link.content.get("name", "") == name:
                return link.content
        return None

    def add(self, content: Mapping[str, Any]) -> None:
        """Append a record."""
        link = Link(self.head, content)
        line = canonical({"previous": link.previous, "content": link.content, "digest": link.digest}) + b"\n"
        with usable(self._path):
            append(self._path, line)
        self._links.append(link)


def read_chain(folder: Path, *, mend: bool) -> Chain:
    """The chain of a run folder; `mend` drops a last line that a kill cut short.

    Raises `TargetError` naming the first record that does not hold.
    """
    path = folder / CHAIN
    with usable(path):
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if mend and len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
            data = whole
    if len(whole) < len(data):
        raise TargetError(
            f"the last record of {str(path)!r} was cut short; go on with --resume, which drops it"
        )
    links = [_link(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]
    position = broken_at(links)
    if position is not None:
        raise TargetError(
            f"record {position + 1} of {str(path)!r} does not follow from the one before it; restore it from a copy"
        )
    return Chain(path, links)


def _link(path: Path, number: int, line: bytes) -> Link:
    try:
        record = json.loads(line)
        link = Link(record["previous"], record["content"])
        named = str(
            link.content["file"]
        )  # a run may come from elsewhere: its records name files of its own folder
        plain = named == Path(named).name != ".."
        holds = plain and link.digest == record["digest"] and isinstance(link.content["kind"], str)
    except (ValueError, KeyError, TypeError):
        holds = False
    if not holds:
        raise TargetError(
            f"record {number} of {str(path)!r} was changed after it was written; restore it from a copy"
        )
    return link


def document(content: object) -> bytes:
    """A JSON document for people and machines: sorted, indented, the same content the same bytes."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_document(path: Path) -> dict[str, Any]:
    """A JSON document with an object at the top."""
    with usable(path):
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise TargetError(f"{str(path)!r} is no JSON: {error}; restore it from a copy") from error
    if not isinstance(content, dict):
        raise TargetError(f"{str(path)!r} holds a {type(content).__name__}; an object was expected")
    return content
