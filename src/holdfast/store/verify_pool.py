"""Whether a pool of parameter sets still is what its ledger says, with its key or without. Nothing is changed."""

from dataclasses import dataclass
from pathlib import Path

from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.store import columns as column_files
from holdfast.store.authentic import HEAD, LedgerKey, read_entries, read_head, refuse_shortened
from holdfast.store.columns import content_digest
from holdfast.store.files import POOL_MANIFEST, refusal_in_pool, usable
from holdfast.store.ledger import NAME as LEDGER
from holdfast.store.ledger import refuse_out_of_order
from holdfast.store.manifest import NEW, SEALED, SETS, open_manifest, refuse_other_head, unsealed
from holdfast.store.records import document
from holdfast.store.sealing import Seal, found_seal, has_key
from holdfast.store.standing import Standing, well_formed


@dataclass(frozen=True)
class VerifiedPool:
    """A pool whose ledger holds."""

    head: str
    """digest of the last entry"""
    entries: int
    sets: int
    """files of sets that were opened and are what the ledger recorded; 0 without the key"""
    authenticated: bool
    """whether the key was there: without it the chain may have been computed again by anyone"""


def verify_pool(path: Path, *, expect_head: str = "") -> VerifiedPool:
    """Check the ledger of a pool, and with its key every entry and every set; `TargetError` for the first fault.

    With `expect_head`, the head of the ledger at some time, also that the ledger contains it.
    """
    manifest = open_manifest(path)
    seal = found_seal(path) if has_key(path) else None
    if seal is not None:
        seal.refuse_other(manifest["key"], path / POOL_MANIFEST)
    key = None if seal is None else LedgerKey.of(seal, manifest["id"])
    file, head_file = (_newest(path / name) for name in (LEDGER, HEAD))
    head = read_head(head_file, key)  # before the entries, to which another process may add
    with usable(file, refusal_in_pool):
        data = file.read_bytes()
    links = read_entries(file, data[: data.rfind(b"\n") + 1], well_formed, key)
    digests = [link.digest for link in links]
    refuse_shortened(file, head, digests)
    standing = Standing()
    for number, link in enumerate(links, 1):
        refuse_out_of_order(standing, link, number, file)
        standing.take(link.content)
    if standing.manifest != digest(document(manifest)):
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
        )
    refuse_other_head(path, expect_head, lambda one: digests.index(one) + 1 if one in digests else None)
    opened = _refuse_files(path, standing, seal, manifest)
    return VerifiedPool(digests[-1], len(digests), opened, key is not None)


def _newest(file: Path) -> Path:
    """The file of a migration that was killed before it gave it its name, where there is one."""
    new = file.with_name(file.name + NEW)
    return new if new.exists() else file


def _refuse_files(path: Path, standing: Standing, seal: Seal | None, manifest: dict[str, object]) -> int:
    """`TargetError` for a file of a set that is in no entry, is needed and gone, or is not what was recorded."""
    opened = 0
    for file in sorted((path / SETS).glob(f"*{SEALED}")):
        if file.stem not in standing.members:
            raise TargetError(
                f"{str(file)!r} is in no entry of {LEDGER}, which was shortened; restore that from a copy"
            )
    for member in standing.members.values():
        file = path / SETS / f"{member.name}{SEALED}"
        if not file.exists() and file.with_name(file.name + NEW).exists():
            file = file.with_name(file.name + NEW)
        if not file.exists():
            if member.needed:
                raise TargetError(
                    f"{str(file)!r} is gone, though the ledger has it as {member.standing}; restore it from a copy"
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
