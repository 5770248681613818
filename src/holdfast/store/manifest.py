"""What makes a folder a pool: its manifest and its format, and the files that it may hold."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from re import fullmatch
from typing import Any

from torch import Tensor

from holdfast.core.chain import canonical
from holdfast.core.errors import TargetError, UsageError
from holdfast.store import forms
from holdfast.store.authentic import HEAD, read_head
from holdfast.store.files import POOL_MANIFEST, flush_folder, refusal_in_pool, usable
from holdfast.store.forms import refuse_form
from holdfast.store.ledger import LOCK
from holdfast.store.ledger import NAME as LEDGER
from holdfast.store.locking import locked
from holdfast.store.records import read_document
from holdfast.store.sealing import Seal

SETS = "sets"
SEALED = ".sealed"
NEW = ".new"
"""How the name of a file ends until the entry that makes it valid is written."""
SCHEMA_VERSION = 2
OLD_VERSION = 1
"""The format whose ledger was not authenticated."""
_FORM = forms.record({"id": forms.name, "key": forms.name, "about": forms.record({})})


def open_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a pool of this format; `TargetError` where there is none, or one of another format."""
    found = any_manifest(path)
    version = found.get("schema_version")
    if version == OLD_VERSION:
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} has schema version {OLD_VERSION}, whose ledger is not authenticated: "
            f"entries can be removed from it without the key, so nothing of it is served. Convert it with holdfast "
            f"rotate migrate {shlex.quote(str(path))}"
        )
    if version != SCHEMA_VERSION:
        raise TargetError(
            f"{str(path / POOL_MANIFEST)!r} has schema version {version}; this version reads {SCHEMA_VERSION}. Install "
            f"the holdfast that wrote it"
        )
    refuse_form(path / POOL_MANIFEST, found, _FORM)
    return found


def any_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a pool of whatever format."""
    if not stands(path):
        _refuse_part(path)
        raise TargetError(
            f"{str(path)!r} is no pool, or was never begun to the end; begin it with holdfast rotate collect MODEL "
            f"DATA --run {shlex.quote(str(path))}, or in Python with Pool.begun"
        )
    return read_document(path / POOL_MANIFEST)


def stands(path: Path) -> bool:
    """Whether a pool was begun in a folder, to the end."""
    with usable(path, refusal_in_pool):
        return (path / POOL_MANIFEST).is_file() and _has_entries(path / LEDGER)


def _has_entries(ledger: Path) -> bool:
    if not ledger.is_file():
        return False
    with ledger.open("rb") as file:
        return file.readline().endswith(b"\n")


def refuse_begun(path: Path) -> None:
    """`UsageError` where a pool stands already."""
    if stands(path):
        raise UsageError(f"{str(path)!r} holds a pool already; go on with it, or name another folder")
    _refuse_part(path)


def _refuse_part(path: Path) -> None:
    """`TargetError` where there is a part of a pool that was not just being begun."""
    with usable(path, refusal_in_pool):
        entered, sealed = _has_entries(path / LEDGER), any((path / SETS).glob(f"*{SEALED}"))
    head = read_head(path / HEAD, None)
    for lost, known in (
        (POOL_MANIFEST, entered),
        (LEDGER, sealed or (head is not None and head.entries > 1)),
    ):
        if known:
            raise TargetError(
                f"{str(path)!r} holds a pool whose {lost} is gone; restore it from a copy, or name another folder"
            )


def refuse_other_head(path: Path, expected: str, entry_of: Callable[[str], int | None]) -> None:
    """`TargetError` where no entry has the expected digest, `UsageError` for what is no digest; "" expects none."""
    if not expected:
        return
    if not fullmatch("[0-9a-f]{64}", expected):
        raise UsageError(
            f"--expect-head {expected!r} is no head of a ledger: 64 hex digits were expected, as printed by holdfast "
            f"rotate head {shlex.quote(str(path))}"
        )
    if entry_of(expected) is None:
        raise TargetError(
            f"no entry of {str(path / LEDGER)!r} has the digest {expected[:16]}… that was expected: the folder is an "
            f"older copy, or another pool. Restore the newest copy, and find out how the folder was replaced; until "
            f"then nothing of it is served"
        )


# --- sealed files


def bound(pool: str, name: str) -> str:
    """The name that a file is sealed under: neither pools that share a key nor formats can exchange theirs."""
    return f"{pool}/{SCHEMA_VERSION}/{name}"


def old_bound(pool: str, name: str) -> str:
    """The name under which the older format sealed a file."""
    return f"{pool}/{name}"


def unsealed(seal: Seal, manifest: Mapping[str, Any], data: bytes, name: str, path: Path) -> bytes:
    """The content of a file of a pool; one that was migrated also has files that the older format sealed."""
    try:
        return seal.open(data, bound(manifest["id"], name), path)
    except TargetError:
        if "migrated" not in manifest:
            raise
        return seal.open(data, old_bound(manifest["id"], name), path)


def end_migration(path: Path) -> None:
    """Give the files of a migration whose manifest was written their names, where a kill prevented it."""
    if any(each.exists() for each in _new_files(path)):
        with locked(path / LOCK), usable(path, refusal_in_pool):
            name_new_files(path)


def name_new_files(path: Path) -> None:
    """Put a converted ledger and its head in the place of the older ledger; the caller has locked the pool."""
    for each in _new_files(path):
        if each.exists():
            each.replace(each.with_name(each.name.removesuffix(NEW)))
    flush_folder(path)


def _new_files(path: Path) -> list[Path]:
    return [path / f"{name}{NEW}" for name in (HEAD, LEDGER)]


# --- what is taken in


def refuse_unsaid(about: Mapping[str, Any]) -> None:
    """`UsageError` for what JSON cannot say."""
    try:
        canonical(about)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"what is said of it cannot be kept: {error}; expected text, finite numbers, lists and mappings of them"
        ) from error


def refuse_no_set(weights: Mapping[str, Tensor]) -> None:
    """`UsageError` for what is no state dict with numbers in it."""
    if not weights:
        raise UsageError("the set holds no parameters; give the state dict of a network")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} of the set is a {type(value).__name__}; a tensor was expected")
        if bool(value.isnan().any()):
            raise UsageError(
                f"{name} of the set holds values that are no numbers: its training diverged; leave it out"
            )
