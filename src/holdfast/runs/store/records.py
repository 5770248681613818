"""Reads and writes hash chains, with one record per line of a file, and JSON documents. The chain of a run is
`chain.jsonl`.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holdfast.core.chain import GENESIS, Link, broken_at, canonical
from holdfast.core.errors import TargetError
from holdfast.core.names import kind_of
from holdfast.core.remedies import RESUME
from holdfast.runs.store.files import MANIFEST, append, content_of, usable
from holdfast.runs.store.forms import is_name

CHAIN = "chain.jsonl"
FIELDS = frozenset(("content", "digest", "previous"))
"""fields of a record of a hash chain"""
COLUMNS = ".safetensors"
"""Suffix of the names of column files and of files with weights."""


class Chain:
    """The hash chain of a run: its records, oldest first, and the file that stores them."""

    def __init__(self, path: Path, links: list[Link]) -> None:
        self._path, self._links = path, links

    @property
    def links(self) -> tuple[Link, ...]:
        """All records of the hash chain, oldest first."""
        return tuple(self._links)

    @property
    def head(self) -> str:
        """Digest of the last record of the chain. It identifies the whole run."""
        return self._links[-1].digest if self._links else GENESIS

    def last(self, kind: str, name: str = "") -> Mapping[str, Any] | None:
        """Return the content of the newest record of the chain with a kind and a name, or None if there is none."""
        for link in reversed(self._links):
            if link.content["kind"] == kind and link.content.get("name", "") == name:
                return link.content
        return None

    def add(self, content: Mapping[str, Any]) -> None:
        """Append a record to the hash chain and to the file that stores the chain."""
        link = Link(self.head, content)
        with usable(self._path):
            append(self._path, line_of(link))
        self._links.append(link)


def read_chain(folder: Path, *, repair: bool) -> Chain:
    """Return the hash chain of the run in a folder. If `repair` is true, an incomplete last line, which may remain
    after a kill, is removed.

    Raises `TargetError` with the first invalid record.
    """
    path = folder / CHAIN
    data = content_of(path) if os.path.lexists(path) else b""
    with usable(path):
        complete_lines = data[: data.rfind(b"\n") + 1]
        if repair and len(complete_lines) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(complete_lines))
            data = complete_lines
    if len(complete_lines) < len(data):
        raise TargetError(f"the last record of {str(path)!r} is truncated; resuming removes it", RESUME)
    return Chain(path, read_links(path, complete_lines, _refuse_outside))


def record_lines(lines: bytes) -> list[bytes]:
    """Return the complete lines of the file of a chain, each without the line feed at its end."""
    return lines.split(b"\n")[:-1]


def line_of(link: Link) -> bytes:
    """Return a record of a hash chain as a line of its file."""
    return canonical({"previous": link.previous, "content": link.content, "digest": link.digest}) + b"\n"


def read_links(
    path: Path,
    lines: bytes,
    check: Callable[[Mapping[str, Any]], None],
    *,
    previous: str = GENESIS,
    first: int = 1,
    fields: frozenset[str] = FIELDS,
    noun: str = "record",
    way_out: str = "restore it from a copy",
) -> list[Link]:
    """Return the records of a hash chain from the complete lines of its file, after verification.

    The first record must have the number `first`, and `previous` is the digest of the record before it. Each line must
    be the canonical text of an object with these `fields`: digests are those of parsed contents, so that a line with a
    repeated key would otherwise state two contents. `check` raises a `ValueError`, `KeyError` or `TypeError` for
    invalid content. Raises `TargetError` with the first invalid record.
    """
    links = []
    for number, line in enumerate(record_lines(lines), first):
        try:
            record = json.loads(line)
            link = Link(record["previous"], record["content"])
            check(link.content)
            is_valid = link.digest == record["digest"] and isinstance(link.content["kind"], str)
            is_valid = is_valid and record.keys() == fields and canonical(record) == line
        except (ValueError, KeyError, TypeError, RecursionError):
            is_valid = False
        if not is_valid:
            raise TargetError(f"{noun} {number} of {str(path)!r} was changed after it was written; {way_out}")
        links.append(link)
    # Each record matches its own digest by now; this checks that none was removed, added or moved.
    position = broken_at(links, previous)
    if position is not None:
        raise TargetError(
            f"{noun} {first + position} of {str(path)!r} does not contain the digest of the one before it; {way_out}"
        )
    return links


def _refuse_outside(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a record of a file outside the run folder or with a wrong name; runs may be untrusted."""
    kind, stage = content["kind"], content.get("name", "")
    of_stage = kind == "stage"
    has_valid_names = is_name(kind) and (is_name(stage) if of_stage else stage == "")
    files = [MANIFEST] if kind == "run" else [f"{stage if of_stage else kind}{COLUMNS}"]
    files += [] if of_stage or kind == "run" else [f"{kind}.json"]
    if not has_valid_names or content["file"] not in files or not isinstance(content["digest"], str):
        raise ValueError(content["file"])
    reached, splits = content.get("reached"), content.get("splits", [])
    if not isinstance(reached, int | None) or not isinstance(splits, list):
        raise ValueError(reached)


def document(content: object) -> bytes:
    """Return JSON content as the bytes of a sorted and indented document. Equal content gives equal bytes."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_document(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file. Raises `TargetError` if it is not a JSON object."""
    return parsed(path, content_of(path))


def parsed(path: Path, data: bytes) -> dict[str, Any]:
    """Return the JSON object that the bytes of a file contain. Raises `TargetError` for any other content, for an
    object with a repeated key, and for infinities and NaN, which strict JSON cannot contain.
    """
    try:
        content = json.loads(
            data, object_pairs_hook=_without_repeats, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{str(path)!r} is not valid JSON: {error}; restore it from a copy") from error
    if not isinstance(content, dict):
        raise TargetError(f"{str(path)!r} contains {kind_of(content)}; an object was expected")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:60]} is not finite")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated[:60]!r} is repeated")
    return content
