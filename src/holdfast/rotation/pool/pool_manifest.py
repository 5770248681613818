"""Reads the manifest of a pool, and verifies that the pool matches its ledger."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from holdfast.core.chain import canonical, digest, refuse_no_digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.rotation.pool.ledger import HEAD, LEDGER, LedgerHead, ledger_key, ledger_log
from holdfast.rotation.pool.ledger_state import LedgerState, SetRecord
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.columns import ColumnFile, content_digest
from holdfast.runs.store.encryption import Seal, existing_seal, has_key
from holdfast.runs.store.files import POOL_MANIFEST, content_of, refusal_in_pool, usable
from holdfast.runs.store.folder import document, read_document
from holdfast.runs.store.forms import Name, refuse_form

if TYPE_CHECKING:
    from torch import Tensor

SETS = "sets"
SEALED = ".sealed"
NEW = ".new"
"""Suffix of the name of a file until the ledger entry that makes the file valid is written."""
SCHEMA_VERSION = 2


class _Manifest(TypedDict):
    id: Name
    key: Name
    about: dict[str, Any]


def open_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a pool of the current format. Raises `TargetError` if there is no pool or if it has
    another format.
    """
    if not is_complete(path):
        _refuse_incomplete(path)
        raise TargetError(
            f"{str(path)!r} is not a pool, or its creation was interrupted; create it with holdfast rotate collect "
            f"MODEL DATA --run {shlex.quote(str(path))}, or in Python with Pool.create"
        )
    manifest = read_document(path / POOL_MANIFEST)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} has schema version {version}; this version reads {SCHEMA_VERSION}. Install "
            f"the holdfast that wrote it"
        )
    refuse_form(path / POOL_MANIFEST, manifest, _Manifest)
    return manifest


def is_complete(path: Path) -> bool:
    """Return whether a folder contains a pool whose creation is complete."""
    with usable(path, refusal_in_pool):
        return (path / POOL_MANIFEST).is_file() and _has_entries(path / LEDGER)


def _has_entries(ledger: Path) -> bool:
    if not ledger.is_file():
        return False
    return b"\n" in content_of(ledger, refusal_in_pool)


def refuse_begun(path: Path) -> None:
    """Raise `UsageError` if the folder contains a pool, and `TargetError` if it contains a pool whose creation was
    interrupted.
    """
    if is_complete(path):
        raise UsageError(f"{str(path)!r} contains a pool already; use that pool, or name another folder")
    _refuse_incomplete(path)


def _refuse_incomplete(path: Path) -> None:
    """Raise `TargetError` if the folder contains an incomplete pool that is not just being created."""
    with usable(path, refusal_in_pool):
        has_entries, has_sets = _has_entries(path / LEDGER), any((path / SETS).glob(f"*{SEALED}"))
    # Without the key, because here only the presence of entries matters.
    head = LedgerHead(path / HEAD, None).read()
    for missing, expected in (
        (POOL_MANIFEST, has_entries),
        (LEDGER, has_sets or (head is not None and head.entries > 1)),
    ):
        if expected:
            raise TargetError(
                f"{str(path)!r} contains a pool whose {missing} is missing; restore it from a copy, or name another "
                "folder"
            )


def refuse_other_head(path: Path, expected: str, entry_of: Callable[[str], int | None]) -> None:
    """Raise `TargetError` if no entry of the ledger has the digest `expected`, and `UsageError` if `expected` is not a
    digest.

    An empty `expected` is not checked. `entry_of` returns the number of the entry with a digest, or None.
    """
    refuse_no_digest(expected, f"holdfast rotate head {shlex.quote(str(path))}")
    if expected and entry_of(expected) is None:
        raise TargetError(
            f"no entry of {str(path / LEDGER)!r} has the digest {expected[:16]}… that was expected: the folder is "
            "an older copy, or another pool. Restore the newest copy, and find out how the folder was replaced; "
            "until then no set of this pool is served"
        )


# --- encrypted files


def bound(pool: str, name: str) -> str:
    """Return the name under which a file of a pool is encrypted. It contains the pool's id and format, so files of
    other pools or formats cannot be decrypted.
    """
    return f"{pool}/{SCHEMA_VERSION}/{name}"


def unsealed(seal: Seal, manifest: Mapping[str, Any], file: Path, name: str) -> ColumnFile:
    """Return the decrypted content of a file of a pool."""
    data = seal.open(content_of(file, refusal_in_pool), bound(manifest["id"], name), file)
    return column_files.decode(data, str(file))


def opened_set(seal: Seal, manifest: Mapping[str, Any], file: Path, member: SetRecord) -> ColumnFile:
    """Return the decrypted parameters of a set. Raises `TargetError` if they are not those of its ledger entry."""
    content = unsealed(seal, manifest, file, f"{SETS}/{member.name}")
    if content_digest(content.columns) != member.digest:
        raise TargetError(f"{str(file)!r} is not the set that the ledger recorded; restore it from a copy")
    return content


def refuse_other_manifest(path: Path, manifest: Mapping[str, Any], recorded: str | None) -> None:
    """Raise `TargetError` if the ledger of a pool recorded another manifest, by its digest."""
    if recorded != digest(document(manifest)):
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} is not what the ledger recorded; restore it from a copy"
        )


def refuse_other_files(path: Path, members: Mapping[str, SetRecord]) -> None:
    """Raise `TargetError` for a file of a set without a ledger entry, and for a missing set that serves, waits, or is
    stolen.
    """
    for file in sorted((path / SETS).glob(f"*{SEALED}")):
        if file.stem not in members:
            raise TargetError(
                f"{str(file)!r} is in no entry of {str(path / LEDGER)!r}, which was shortened; restore that from a "
                "copy, or remove the set if it was added by hand. Until then no set of this pool is served"
            )
    for member in members.values():
        if member.needed and not (file := set_file(path, member.name)).exists():
            raise TargetError(
                f"{str(file)!r} is missing, but the ledger lists the set as {member.status}; restore it from a copy"
            )


def set_file(path: Path, name: str) -> Path:
    """Return the file of a set, which ends in `NEW` if a process was killed after it wrote the ledger entry."""
    file = path / SETS / f"{name}{SEALED}"
    new = file.with_name(file.name + NEW)
    return new if new.exists() and not file.exists() else file


# --- validation of new sets


def refuse_unserialisable(about: Mapping[str, Any]) -> None:
    """Raise `UsageError` if the metadata of a pool or of a parameter set cannot be represented as JSON."""
    try:
        canonical(about)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the metadata of the set cannot be stored: {error}; expected text, finite numbers, lists and mappings "
            "of them"
        ) from error


def refuse_no_set(weights: "Mapping[str, Tensor]") -> None:
    """Raise `UsageError` unless the tensors of a parameter set are a state dict with at least one tensor and without
    NaN.
    """
    from torch import Tensor

    if not weights:
        raise UsageError("the set contains no parameters; give the state dict of a network")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} of the set is {kind_of(value)}; a tensor was expected")
        if bool(value.isnan().any()):
            raise UsageError(
                f"{name} of the set contains NaN or infinite values: its training diverged; leave the set out"
            )


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
    refuse_other_manifest(path, manifest, state.manifest)
    refuse_other_head(path, expect_head, log.entry_of)
    refuse_other_files(path, state.members)
    n_opened = 0 if seal is None else _opened(path, state, seal, manifest)
    members = tuple((member.name, member.status) for member in state.members.values())
    return VerifiedPool(log.head, log.entries, n_opened, key is not None, members)


def _opened(path: Path, state: LedgerState, seal: Seal, manifest: Mapping[str, Any]) -> int:
    """Decrypt all files of a pool, and return the number of its sets."""
    files = [(set_file(path, member.name), member) for member in state.members.values() if not member.deleted]
    existing = [(file, member) for file, member in files if file.exists()]
    for file, member in existing:
        opened_set(seal, manifest, file, member)
    for file in sorted(path.glob(f"*{SEALED}")):  # of the pool as a whole, such as its canary inputs
        unsealed(seal, manifest, file, file.stem)
    return len(existing)
