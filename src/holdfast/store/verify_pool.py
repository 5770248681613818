"""Verifies that a pool matches its ledger, with or without its key. Changes nothing."""

from dataclasses import dataclass
from pathlib import Path

from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.store import columns as column_files
from holdfast.store.authentic import HEAD, LedgerKey, read_entries, read_head, refuse_shortened
from holdfast.store.columns import content_digest
from holdfast.store.encryption import Seal, found_seal, has_key
from holdfast.store.files import POOL_MANIFEST, refusal_in_pool, usable
from holdfast.store.ledger import NAME as LEDGER
from holdfast.store.ledger import refuse_out_of_order
from holdfast.store.ledger_state import LedgerState, well_formed
from holdfast.store.manifest import NEW, SEALED, SETS, open_manifest, refuse_other_head, unsealed
from holdfast.store.records import document


@dataclass(frozen=True)
class VerifiedPool:
    """The result of the verification of a valid pool."""

    head: str
    """digest of the last entry of the ledger"""
    entries: int
    sets: int
    """number of sets that were decrypted and match the ledger; 0 without the key"""
    authenticated: bool
    """whether the key was available; without it, the chain may have been recomputed by anyone"""


def verify_pool(path: Path, *, expect_head: str = "") -> VerifiedPool:
    """Verify the ledger of a pool, and with its key every entry and set. Raises `TargetError` with the first fault.

    `expect_head` is an earlier head of the ledger; the ledger must contain it.
    """
    manifest = open_manifest(path)
    seal = found_seal(path) if has_key(path) else None
    if seal is not None:
        seal.refuse_other(manifest["key"], path / POOL_MANIFEST)
    key = None if seal is None else LedgerKey.of(seal, manifest["id"])
    file, head_file = (_newest(path / name) for name in (LEDGER, HEAD))
    head = read_head(head_file, key)  # read before the entries, since another process may add some
    with usable(file, refusal_in_pool):
        data = file.read_bytes()
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
    refuse_other_head(path, expect_head, lambda one: digests.index(one) + 1 if one in digests else None)
    opened = _refuse_files(path, state, seal, manifest)
    return VerifiedPool(digests[-1], len(digests), opened, key is not None)


def _newest(file: Path) -> Path:
    """The file of a killed migration that was not renamed yet, if it exists, else the file itself."""
    new = file.with_name(file.name + NEW)
    return new if new.exists() else file


def _refuse_files(path: Path, state: LedgerState, seal: Seal | None, manifest: dict[str, object]) -> int:
    """Raise `TargetError` for a set without an entry, a missing required set, or one that differs from its entry."""
    opened = 0
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
        with usable(file, refusal_in_pool):
            data = file.read_bytes()
        plain = unsealed(seal, manifest, data, f"{SETS}/{member.name}", file)
        if content_digest(column_files.decode(plain, str(file)).columns) != member.digest:
            raise TargetError(
                f"{str(file)!r} is not the set that the ledger recorded; restore it from a copy"
            )
        opened += 1
    return opened
