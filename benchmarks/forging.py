"""Forged findings of stored audits: one field of `finding.json` is changed, and all public digests are computed again,
so that the chain is consistent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from holdfast.audits.audit import FINDING, judged, open_audit
from holdfast.core.errors import HoldfastError, TargetError
from holdfast.io.files import canonical, digest
from holdfast.runs.store.append_log import GENESIS, Link
from holdfast.runs.store.folder import CHAIN, document

Place = tuple[str | int, ...]


def leaves(content: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield the place and the value of each field that contains no others."""
    if isinstance(content, dict | list) and content:
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for name, item in items:
            yield from leaves(item, (*place, name))
    else:
        yield place, content


def changed(value: Any) -> Any:
    """Return another value of the same type."""
    verdicts = {"flagged": "not flagged", "not flagged": "flagged", "unclear": "not flagged"}
    if isinstance(value, str):
        return verdicts.get(value, f"{value} not")
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 0.01 * abs(value) + 0.001
    return ["forged"] if isinstance(value, list) else {"forged": 1}


def forged(finding: Mapping[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """Return a copy of a finding with another value at a place."""
    content: Any = deepcopy(dict(finding))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return content  # type: ignore[no-any-return]


def rechain(folder: Path) -> None:
    """Compute the digests of the files of a run and its chain again."""
    previous, lines = GENESIS, []
    for text in (folder / CHAIN).read_text(encoding="utf-8").splitlines():
        content = json.loads(text)["content"]
        link = Link(previous, content | {"digest": digest((folder / content["file"]).read_bytes())})
        record = {"previous": link.previous, "content": link.content, "digest": link.digest}
        lines.append(canonical(record) + b"\n")
        previous = link.digest
    (folder / CHAIN).write_bytes(b"".join(lines))


def with_document(folder: Path, name: str, content: Any, copy: Path) -> Path:
    """Return a copy of a run with another content of a document, and a consistent chain."""
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(document(content))
    rechain(copy)
    return copy


def is_accepted(folder: Path, finding: Mapping[str, Any], copy: Path) -> bool:
    """Return whether a copy of an audit with another finding is opened. Its gates are judged on that finding."""
    decided = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    kind = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]["kind"]
    with_document(folder, f"{FINDING}.json", finding, copy)
    try:
        gates = judged(kind, finding, [gate["gate"] for gate in decided["gates"]])
        (copy / "verdict.json").write_bytes(document(decided | {"gates": gates}))
        rechain(copy)
    except (HoldfastError, KeyError, TypeError, ValueError):  # gates that cannot be judged on what was forged
        pass
    try:
        open_audit(copy)
    except TargetError as error:
        if "does not follow from its columns" not in error.message:
            raise
        return False
    finally:
        shutil.rmtree(copy)
    return True


def accepted_fields(folder: Path, n: int, copy: Path) -> list[Place]:
    """Return those of `n` fields of the finding of an audit, spread over all of them, that are accepted if changed."""
    open_audit(folder)  # it is accepted unchanged
    finding = json.loads((folder / f"{FINDING}.json").read_text(encoding="utf-8"))
    fields = sorted(leaves(finding), key=lambda field: field[0] != ("verdict",))
    by_key: dict[str | int, list[tuple[Place, Any]]] = {}
    for place, value in fields:
        by_key.setdefault(place[0], []).append((place, value))
    chosen = [each[k] for k in range(len(fields)) for each in by_key.values() if k < len(each)][:n]
    return [
        place for place, value in chosen if is_accepted(folder, forged(finding, place, changed(value)), copy)
    ]
