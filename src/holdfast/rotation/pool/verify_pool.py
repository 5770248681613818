"""Verifies that a pool matches its ledger, with or without the key of the pool."""

from dataclasses import dataclass
from pathlib import Path

from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.rotation.pool.ledger import LEDGER, ledger_key, ledger_log
from holdfast.rotation.pool.ledger_state import LedgerState
from holdfast.rotation.pool.pool_manifest import NEW, SEALED, SETS, open_manifest, refuse_other_head, unsealed
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import content_digest
from holdfast.runs.store.encryption import Seal, existing_seal, has_key
from holdfast.runs.store.files import (
    POOL_MANIFEST,
    content_of,
    refusal_in_pool,
)
from holdfast.runs.store.records import document


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
    members: tuple[tuple[str, str], ...] = ()
    """name and status of each set, as the ledger lists them"""


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
    key = None if seal is None else ledger_key(seal, manifest["id"])
    state = LedgerState()
    log = ledger_log(path, key, state)
    log.read()
    if state.manifest != digest(document(manifest)):
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
        )
    refuse_other_head(path, expect_head, log.entry_of)
    opened = _refuse_files(path, state, seal, manifest)
    members = tuple((member.name, member.status) for member in state.members.values())
    return VerifiedPool(log.head, log.entries, opened, key is not None, members)


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
