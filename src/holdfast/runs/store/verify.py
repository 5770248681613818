"""Verifies that a run folder matches its hash chain, and that a pool matches its ledger, with or without the key of the
pool.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.catalogue import names
from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.core.remedies import RESUME
from holdfast.rotation.pool.authentic import HEAD, LedgerKey, read_entries, read_head, refuse_shortened
from holdfast.rotation.pool.ledger import NAME as LEDGER
from holdfast.rotation.pool.ledger import refuse_out_of_order
from holdfast.rotation.pool.ledger_state import LedgerState, well_formed
from holdfast.rotation.pool.pool_manifest import NEW, SEALED, SETS, open_manifest, refuse_other_head, unsealed
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import content_digest
from holdfast.runs.store.encryption import Seal, existing_seal, has_key
from holdfast.runs.store.files import (
    CHECKPOINTS,
    MANIFEST,
    PART,
    POOL_MANIFEST,
    SERVED,
    content_of,
    refusal_in_pool,
)
from holdfast.runs.store.folder import ABOUT, SPLITS, read_manifest, read_splits
from holdfast.runs.store.journal import NAME as ANSWERS
from holdfast.runs.store.leases import NAME as STATE
from holdfast.runs.store.records import CHAIN, Chain, document, read_chain, read_document


@dataclass(frozen=True)
class VerifiedPool:
    """The result of the verification of a pool in which no fault was found."""

    head: str
    """digest of the last entry of the ledger"""
    entries: int
    sets: int
    """number of sets that were decrypted and match the ledger; 0 without the key"""
    authenticated: bool
    """whether the key was available; without it, the chain may have been recomputed by anyone with
    access to the folder"""


def verify_pool(path: Path, *, expect_head: str = "") -> VerifiedPool:
    """Verify the ledger of a pool. If the key of the pool is available, the authentication of every entry and every
    parameter set is verified as well.

    Raises `TargetError` with the first fault. `expect_head` is an earlier head of the ledger, which the ledger must
    contain.
    """
    manifest = open_manifest(path)
    seal = existing_seal(path) if has_key(path) else None
    if seal is not None:
        seal.refuse_other(manifest["key"], path / POOL_MANIFEST)
    key = None if seal is None else LedgerKey.of(seal, manifest["id"])
    file, head_file = path / LEDGER, path / HEAD
    head = read_head(head_file, key)  # read before the entries, since another process may add some
    data = content_of(file, refusal_in_pool)
    links = read_entries(file, data[: data.rfind(b"\n") + 1], well_formed, key)
    digests = [link.digest for link in links]
    refuse_shortened(file, head, digests)
    state = LedgerState()
    for number, link in enumerate(links, 1):
        refuse_out_of_order(state, link, number, file)
        state.take(link.content)
    if state.manifest != digest(document(manifest)):
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
        )
    refuse_other_head(
        path,
        expect_head,
        lambda entry_digest: digests.index(entry_digest) + 1 if entry_digest in digests else None,
    )
    opened = _refuse_files(path, state, seal, manifest)
    return VerifiedPool(digests[-1], len(digests), opened, key is not None)


def _refuse_files(path: Path, state: LedgerState, seal: Seal | None, manifest: dict[str, object]) -> int:
    """Raise `TargetError` for a set without an entry, a missing required set, one that differs from its entry, and
    another encrypted file that is not one of the pool. Return the number of sets that were decrypted.
    """
    n_opened = 0
    for file in sorted((path / SETS).glob(f"*{SEALED}")):
        if file.stem not in state.members:
            raise TargetError(
                f"{str(file)!r} is in no entry of {LEDGER}, which was shortened; restore that from a copy"
            )
    for member in state.members.values():
        file = path / SETS / f"{member.name}{SEALED}"
        if not file.exists() and file.with_name(file.name + NEW).exists():
            file = file.with_name(file.name + NEW)
        if not file.exists():
            if member.needed:
                raise TargetError(
                    f"{str(file)!r} is missing, but the ledger lists the set as {member.status}; restore it from "
                    "a copy"
                )
            continue
        if seal is None or member.deleted:
            continue
        data = content_of(file, refusal_in_pool)
        content = unsealed(seal, manifest, data, f"{SETS}/{member.name}", file)
        if content_digest(column_files.decode(content, str(file)).columns) != member.digest:
            raise TargetError(
                f"{str(file)!r} is not the set that the ledger recorded; restore it from a copy"
            )
        n_opened += 1
    if seal is not None:
        for file in sorted(path.glob(f"*{SEALED}")):  # of the pool as a whole, such as its canary inputs
            content = unsealed(seal, manifest, content_of(file, refusal_in_pool), file.stem, file)
            column_files.decode(content, str(file))
    return n_opened


_BESIDE = frozenset(
    (CHAIN, ABOUT, SPLITS, SERVED, ANSWERS, STATE, f"{STATE}-wal", f"{STATE}-shm", "report.json", "curve.svg")
)
"""Files of a run that are not in its chain: times, hosts, attempts, and files for resuming it."""
_EVIDENCE = re.compile(
    r".+\.safetensors|(run|doubts|verdict|adaptive|nodes|rotation|before|after|checked(-\d+)?|training|card)\.json",
    re.IGNORECASE,
)
"""Names of files that readers interpret as evidence."""
_MOST_NOTES = 20


@dataclass(frozen=True)
class Verified:
    """The result of the verification of a run folder in which no fault was found."""

    head: str
    """digest of the last record; a copy of it that is stored elsewhere distinguishes this run from any other"""
    records: int
    files: int
    complete: bool
    """whether the verdict is recorded, so that the run is finished"""
    notes: tuple[str, ...] = ()
    """notes on files of the folder that are neither in the chain nor known otherwise"""


def verify(path: Path) -> Verified:
    """Verify the hash chain of a run folder and the digests of all its files. Raises `TargetError` with the first fault
    that is found.

    Files outside the chain (times, hosts, attempts, reports) are not verified. A file that is in no record is refused
    if its name is that of evidence; otherwise the notes mention it.
    """
    outer = _verified(path)
    inner = [_verified_within(path, folder, outer) for folder in _runs_within(path)]
    notes = [*outer.notes, *(note for verified in inner for note in verified.notes)]
    n_unlisted = len(notes) - _MOST_NOTES
    more = [f"{n_unlisted} more files are in no record of the chain"] if n_unlisted > 0 else []
    return Verified(outer.head, outer.records, outer.files, outer.complete, tuple(notes[:_MOST_NOTES] + more))


def _verified(path: Path) -> Verified:
    """Verify one folder, without the runs inside it."""
    read_manifest(path)
    chain = read_chain(path, repair=False)
    if not chain.links or chain.links[0].content.get("file") != MANIFEST:
        raise TargetError(
            f"the chain of {str(path)!r} does not begin with {MANIFEST}; restore it from a copy"
        )
    newest = {str(link.content["file"]): link.content for link in chain.links}
    # A second record could replace the manifest after the measurements.
    if newest[MANIFEST] != chain.links[0].content:
        raise TargetError(f"the chain of {str(path)!r} contains {MANIFEST} twice; restore it from a copy")
    for name, recorded in newest.items():
        _check_file(path / name, recorded)
    _check_splits(path, chain)
    _check_inner_runs(path, newest)
    complete = chain.last("verdict") is not None
    notes = tuple(f"{str(file)!r} is in no record of the chain" for file in _strays(path, newest))
    return Verified(chain.head, len(chain.links), len(newest), complete, notes)


def _check_file(file: Path, recorded: Any) -> None:
    if not file.is_file():
        raise TargetError(f"{str(file)!r} is missing, but the chain records it; restore it from a copy")
    data = content_of(file)
    if digest(data) != recorded["digest"]:
        raise TargetError(
            f"{str(file)!r} was changed: its SHA-256 is {digest(data)[:16]}…, the chain recorded "
            f"{str(recorded['digest'])[:16]}…; restore it from a copy"
        )
    if recorded["kind"] == "stage":
        column_files.decode(data, str(file))


def _check_splits(path: Path, chain: Chain) -> None:
    """Verify that the file of splits matches the splits of complete stages in the chain."""
    splits = read_splits(path)
    for link in chain.links:
        if link.content["kind"] != "stage":
            continue
        stage = link.content["name"]
        if [split for split in splits if split["stage"] == stage] != link.content.get("splits", []):
            raise TargetError(
                f"{str(path / SPLITS)!r} was changed: the chain has other splits for {stage}; restore it"
            )


def _check_inner_runs(path: Path, recorded: Mapping[str, Any]) -> None:
    """Verify that the folder of an inner run exists if a document names its chain."""
    for name in recorded:
        within = path / Path(name).stem
        if name.endswith(".json") and "chain" in read_document(path / name) and not within.is_dir():
            raise TargetError(
                f"{str(within)!r} is missing, but {name!r} contains its chain; restore it from a copy"
            )


def _strays(path: Path, recorded: Mapping[str, Any]) -> Iterator[Path]:
    """Yield files that are neither in the chain nor known. Raises `TargetError` for those named like evidence."""
    for file in sorted(path.iterdir()):
        expected = file.name in recorded or file.name in _BESIDE or _is_rest(file)
        if file.is_dir() and not file.is_symlink():
            yield from _strays_of_folder(file)
        elif _EVIDENCE.fullmatch(file.name) and file.name not in recorded:
            raise TargetError(
                f"{str(file)!r} is in no record of the chain; remove it, or restore the chain. If the run was "
                "stopped while it wrote this file, resume it",
                RESUME,
            )
        elif not expected:
            yield file


def _is_rest(file: Path) -> bool:
    """Whether a file is a report, or an incomplete file that a kill left."""
    return file.suffix.lower() in {*names("reports")} - {".json"} or (
        file.name.startswith(".") and file.name.endswith(PART)
    )


def _strays_of_folder(folder: Path) -> Iterator[Path]:
    """Yield files of an incomplete stage that are not shards; shards verify themselves."""
    if folder.name.startswith(CHECKPOINTS) or (folder / MANIFEST).is_file():
        return  # checkpoints are not evidence, and inner runs are verified separately
    for file in sorted(folder.iterdir()):
        if file.suffix == column_files.SUFFIX:
            column_files.read(file)
        elif not _is_rest(file):
            yield file


def _runs_within(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and (entry / MANIFEST).is_file())


def _verified_within(path: Path, folder: Path, outer: Verified) -> Verified:
    """Verify an inner run, and that it is the one in the outer chain."""
    if folder.is_symlink():
        raise TargetError(
            f"{str(folder)!r} is a link to another folder; put the folder of the run itself there"
        )
    verified, name = _verified(folder), f"{folder.name}.json"
    recorded = read_chain(path, repair=False).last(folder.name)
    if recorded is not None and read_document(path / name).get("chain") != verified.head:
        raise TargetError(
            f"{str(folder)!r} is not the run whose chain is recorded in {name!r}; restore it from a copy"
        )
    if recorded is None and outer.complete:
        raise TargetError(
            f"{str(folder)!r} is a run that is in no record of the chain of {str(path)!r}; move it to another place"
        )
    for nested in _runs_within(folder):
        raise TargetError(f"{str(nested)!r} is a run inside a run inside a run; move it to another place")
    return verified
