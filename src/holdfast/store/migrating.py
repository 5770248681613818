"""Converts a pool of an earlier version of Holdfast, whose ledger was not authenticated, to the current format.

The older ledger is a public hash chain: with write access to the folder, entries could be removed and the chain
recomputed. The conversion authenticates the entries that exist; it cannot detect whether entries were removed before.
If it is killed, the pool has either the older format or the current one: the manifest is written last, and then the new
files are renamed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.chain import GENESIS, Link, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.store import columns as column_files
from holdfast.store.authentic import HEAD, WAY_OUT, Head, LedgerKey, authenticated_line, write_head
from holdfast.store.encryption import Seal, existing_seal
from holdfast.store.files import POOL_MANIFEST, PRIVATE, content_of, refusal_in_pool, usable, write_atomically
from holdfast.store.ledger import LOCK, refuse_out_of_order, utc_now
from holdfast.store.ledger import NAME as LEDGER
from holdfast.store.ledger_state import LedgerState, well_formed
from holdfast.store.locking import locked
from holdfast.store.manifest import (
    NEW,
    OLD_VERSION,
    SCHEMA_VERSION,
    SEALED,
    SETS,
    any_manifest,
    bound,
    name_new_files,
    old_bound,
    open_manifest,
)
from holdfast.store.records import document, read_links, record_lines

OLD_LEDGER = "ledger-1.jsonl"
"""Name of the file with the older ledger, which is not changed."""


@dataclass(frozen=True)
class Migrated:
    """The result of the conversion of a pool of an older format."""

    entries: int
    """number of entries of the older ledger, which were not authenticated"""
    old_head: str
    """digest of the last entry of the older ledger, as printed by an earlier version"""
    head: str
    """head of the new ledger"""
    exposed: tuple[str, ...]
    """names of the sets that the older ledger lists as stolen"""
    unjudged: tuple[str, ...]
    """names of the admitted sets that wait to serve and must be judged again before that"""


def migrate(path: Path) -> Migrated:
    """Convert a pool of the older format to the current format, and return a summary of the conversion.

    Raises `UsageError` for a pool of the current format, and `TargetError` for any other folder.
    """
    manifest = any_manifest(path)
    if manifest.get("schema_version") == SCHEMA_VERSION:
        raise UsageError(f"{str(path)!r} has schema version {SCHEMA_VERSION} already; nothing was changed")
    if manifest.get("schema_version") != OLD_VERSION:
        open_manifest(path)
    seal = existing_seal(path)
    seal.refuse_other(manifest["key"], path / POOL_MANIFEST)
    with locked(path / LOCK):
        _refuse_downgraded(path, manifest, seal)
        links = _old_links(path, manifest)
        state, entries = _converted(path, manifest, seal, links)
        _refuse_strays(path, state)
        last = links[-1].digest
        new = {**manifest, "schema_version": SCHEMA_VERSION}
        new["migrated"] = {"schema_version": OLD_VERSION, "entries": len(links), "head": last}
        entries[0]["manifest"] = digest(document(new))
        entries.append({"kind": "migrated", "at": utc_now(), "entries": len(links), "head": last})
        head = _write(path, entries, new, LedgerKey.of(seal, manifest["id"]))
    exposed = tuple(exposure.name for exposure in state.exposed)
    return Migrated(len(links), last, head, exposed, state.unjudged)


def _refuse_downgraded(path: Path, manifest: Mapping[str, Any], seal: Seal) -> None:
    """Raise `TargetError` if files of the current format exist, so that the ledger must have been exchanged."""
    new_files = [path / HEAD] if (path / HEAD).exists() else []
    with usable(path, refusal_in_pool):
        entries = _objects(content_of(path / LEDGER, refusal_in_pool))
        new_files += [path / LEDGER] if any("mac" in entry for entry in entries) else []
        for file in (*sorted(path.glob(f"*{SEALED}")), *sorted((path / SETS).glob(f"*{SEALED}"))):
            if _can_open(seal, file, bound(manifest["id"], _name_in_pool(path, file))):
                new_files.append(file)
    if new_files:
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} has schema version {OLD_VERSION}, but {str(new_files[0])!r} has version "
            f"{SCHEMA_VERSION}: the manifest or the ledger was replaced by one without authentication. Restore "
            "both from a copy; nothing was converted"
        )


def _objects(lines: bytes) -> list[dict[str, Any]]:
    records = []
    for line in record_lines(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # reported when the chain is read
        if isinstance(record, dict):
            records.append(record)
    return records


def _name_in_pool(path: Path, file: Path) -> str:
    """The name of an encrypted file within its pool."""
    return file.relative_to(path).as_posix().removesuffix(SEALED)


def _can_open(seal: Seal, file: Path, name: str) -> bool:
    try:
        seal.open(content_of(file, refusal_in_pool), name, file)
    except TargetError:
        return False
    return True


def _old_links(path: Path, manifest: Mapping[str, Any]) -> list[Link]:
    """The entries of the older ledger, after verification of its chain; an incomplete last line is dropped."""
    file = path / LEDGER
    data = content_of(file, refusal_in_pool)
    complete_lines = data[: data.rfind(b"\n") + 1]
    links = read_links(file, complete_lines, _check_old_entry, noun="entry", way_out=WAY_OUT)
    if links[0].content.get("manifest") != digest(document(manifest)):
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
        )
    return links


def _check_old_entry(content: Mapping[str, Any]) -> None:
    well_formed(_with_missing_fields(content))


def _with_missing_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """An older entry with missing fields set to the values that require the most judging.

    Reasons are not interpreted: every theft counts as reported, and no set as judged against any other.
    """
    defaults: dict[str, dict[str, Any]] = {
        "candidate": {"role": "service"},
        "admitted": {"against": []},
        "exposed": {"automatic": False},
        "serving": {"unjudged": True},
    }
    return {**content, **defaults.get(content["kind"], {})}


def _converted(
    path: Path, manifest: Mapping[str, Any], seal: Seal, links: list[Link]
) -> tuple[LedgerState, list[dict[str, Any]]]:
    """The state after the entries, and the entries with all fields of the current format."""
    state, entries = LedgerState(), []
    for number, link in enumerate(links, 1):
        entry = _with_missing_fields(link.content)
        if entry["kind"] == "candidate" and _is_base(path, manifest, seal, entry["set"]):
            entry["role"] = "base"
        if entry["kind"] == "serving":
            entry["unjudged"] = entry["set"] in state.unjudged
        refuse_out_of_order(state, Link(link.previous, entry), number, path / LEDGER)
        state.take(entry)
        entries.append(entry)
    return state, entries


def _is_base(path: Path, manifest: Mapping[str, Any], seal: Seal, name: str) -> bool:
    """Whether the metadata of a set mark it as a base; false if its file is missing."""
    file = path / SETS / f"{name}{SEALED}"
    with usable(file, refusal_in_pool):
        for candidate in (file, file.with_name(file.name + NEW)):
            if candidate.exists():
                content = seal.open(
                    content_of(candidate, refusal_in_pool),
                    old_bound(manifest["id"], f"{SETS}/{name}"),
                    candidate,
                )
                return column_files.decode(content, str(candidate)).about.get("base") is True
    return False


def _refuse_strays(path: Path, state: LedgerState) -> None:
    """Raise `TargetError` for a set without an entry: the older ledger was truncated."""
    for file in sorted((path / SETS).glob(f"*{SEALED}")):
        if file.stem not in state.members:
            raise TargetError(
                f"{str(file)!r} is in no entry of {str(path / LEDGER)!r}, which was shortened; restore that from a "
                f"copy. Nothing was converted"
            )


def _write(path: Path, entries: list[dict[str, Any]], manifest: Mapping[str, Any], key: LedgerKey) -> str:
    """Write the ledger and its head under temporary names, then the manifest, which makes them valid.

    Returns the digest of the last entry.
    """
    lines, previous = b"", GENESIS
    for number, entry in enumerate(entries, 1):
        link = Link(previous, entry)
        lines, previous = lines + authenticated_line(link, number, key), link.digest
    with usable(path, refusal_in_pool):
        write_atomically(path / OLD_LEDGER, content_of(path / LEDGER, refusal_in_pool), PRIVATE)
        write_atomically(path / f"{LEDGER}{NEW}", lines, PRIVATE)
        write_head(path / f"{HEAD}{NEW}", Head(len(entries), previous), key)
        # From here on the new ledger is valid; if the process is killed before the renaming, the next one completes
        # it.
        write_atomically(path / POOL_MANIFEST, document(manifest), PRIVATE)
        name_new_files(path)
    return previous
