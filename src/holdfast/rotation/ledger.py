"""The ledger of a pool, which records what happens to each parameter set, and the manifest of a pool."""

import hashlib
import hmac
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypedDict

from holdfast.core.chain import Link, canonical, digest, refuse_malformed_head
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.rotation.ledger_state import (
    Exposure,
    LedgerState,
    Role,
    Serving,
    SetRecord,
    State,
    Term,
    well_formed,
)
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.append_log import AppendLog, Head, LogForm, equal
from holdfast.runs.store.columns import ColumnFile, Name, content_digest, refuse_form
from holdfast.runs.store.encryption import Seal, existing_seal, has_key
from holdfast.runs.store.files import (
    POOL_MANIFEST,
    PRIVATE,
    content_of,
    refusal_in_pool,
    usable,
    write_atomically,
)
from holdfast.runs.store.folder import document, read_document
from holdfast.runs.store.leases import locked

if TYPE_CHECKING:
    from torch import Tensor


LEDGER, HEAD, LOCK = "ledger.jsonl", "ledger.head", "ledger.lock"
WAY_OUT = "restore it from a copy; until then no set of this pool is served"
_PURPOSE = "pool ledger, schema 2"
T = TypeVar("T")


def utc_now() -> str:
    """Return the current time in UTC, with a resolution of seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Ledger:
    """The ledger of the pool in a folder. Its properties include entries that other processes add.

    Raises `UsageError` for an entry that is not allowed in the current state, and `TargetError` for a broken chain.
    """

    def __init__(self, folder: Path, key: bytes, now: Callable[[], str] = utc_now) -> None:
        self.path, self._now = folder / LEDGER, now
        self._thread_lock, self._has_lock = RLock(), False
        self._state = LedgerState()
        self._log = ledger_log(folder, key, self._state)

    @classmethod
    def create(cls, folder: Path, key: bytes, manifest: str, now: Callable[[], str] = utc_now) -> "Ledger":
        """Create the ledger of a new pool, whose manifest has the digest `manifest`. The caller must have locked the
        pool.
        """
        ledger = cls(folder, key, now)
        with ledger._thread_lock:
            ledger._has_lock = True
            try:
                ledger._drop_incomplete()
                ledger._log.repair()
                ledger._add("begun", manifest=manifest)
            finally:
                ledger._has_lock = False
        return ledger

    def _drop_incomplete(self) -> None:
        """Empty a ledger with an incomplete first entry only, whose head is of a pool that was never created."""
        with usable(self.path, refusal_in_pool):
            if self.path.exists() and b"\n" not in content_of(self.path, refusal_in_pool):
                os.truncate(self.path, 0)

    # --- views

    @property
    def head(self) -> str:
        """Digest of the last ledger entry, which depends on all earlier entries."""
        return self._view(lambda _: self._log.head)

    @property
    def entries(self) -> int:
        """Number of entries in the ledger."""
        return self._view(lambda _: self._log.entries)

    def entry_of(self, head: str) -> int | None:
        """Return the number, counted from 1, of the ledger entry with the digest `head`, or None if there is no such
        entry.
        """
        return self._view(lambda _: self._log.entry_of(head))

    @property
    def manifest(self) -> str | None:
        """Digest of the manifest of the pool, or None if the ledger belongs to no pool."""
        return self._view(lambda state: state.manifest)

    @property
    def members(self) -> tuple[SetRecord, ...]:
        """All parameter sets of the pool, in the order in which they were added."""
        return self._view(lambda state: tuple(state.members.values()))

    @property
    def states(self) -> dict[str, State]:
        """State of each parameter set of the pool, such as candidate, admitted or serving, by the name of the set."""
        return {member.name: member.state for member in self.members}

    @property
    def serving(self) -> Serving | None:
        """The serving set of the pool. It is None if no set has served yet, or if the last one was retired without a
        successor.
        """
        return self._view(lambda state: state.serving)

    @property
    def terms(self) -> tuple[Term, ...]:
        """All periods in which a parameter set served, oldest first. The current period is the last one."""
        return self._view(lambda state: state.terms)

    @property
    def ahead(self) -> tuple[str, ...]:
        """Names of the admitted sets that wait to serve and are not stolen, in the order of their admission."""
        return self._view(lambda state: state.ahead)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Names of the admitted sets that did not serve yet and were not judged against all stolen sets."""
        return self._view(lambda state: state.unjudged)

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Names of the bases of candidates, admitted sets and the serving set that are neither listed as stolen nor
        deleted.
        """
        return self._view(lambda state: state.unlisted)

    def exposed(self) -> tuple[Exposure, ...]:
        """Return the stolen sets in the order in which they were listed as stolen, with the reasons."""
        return self._view(lambda state: state.exposed)

    def member(self, name: str) -> SetRecord:
        """Return the ledger's record of a parameter set. Raises `UsageError`, with similar names, if there is no set of
        this name.
        """
        return self._view(lambda state: state.member(name))

    # --- entries

    def candidate(
        self, name: str, digest: str, bases: Sequence[str] = (), why: str = "", *, role: Role = "service"
    ) -> None:
        """Add a parameter set to the ledger as a candidate, with its role and its bases. The bases must be in the
        ledger.
        """
        self._add("candidate", set=name, digest=digest, bases=list(bases), role=role, why=why)

    def admit(self, name: str, why: str = "", *, canary: str = "", against: Sequence[str] = ()) -> None:
        """Record that a candidate is admitted, or that an admitted set was assessed again and remains admitted.

        `canary` is the fingerprint of the answers of the set to known inputs, which is verified when the set is loaded.
        `against` are the stolen sets against which it was judged; it may serve only as long as there are no others.
        """
        self._add("admitted", set=name, why=why, canary=canary, against=list(against))

    def refuse(self, name: str, why: str) -> None:
        """Record that a candidate, or an admitted set that waits to serve, is refused."""
        self._add("refused", set=name, why=why)

    def serve(self, name: str, why: str = "", *, unjudged: bool = False) -> Serving:
        """Record in a single entry that an admitted set becomes the serving set, and that the previous serving set is
        retired.

        With `unjudged`, the set may be one that was not judged against all stolen sets; the entry records this.
        """
        with self.alone():
            previous = self._state.serving
            retires = [] if previous is None else [previous.name]
            is_unjudged = unjudged and name in self._state.unjudged
            epoch = self._state.epoch + 1
            self._add("serving", set=name, epoch=epoch, retires=retires, unjudged=is_unjudged, why=why)
            return Serving(name, self._state.epoch, self._state.members[name].since)

    def retire(self, name: str, why: str = "") -> None:
        """Record that an admitted set or the serving set is retired. If it was the serving set, no set serves
        afterwards.
        """
        self._add("retired", set=name, why=why)

    def expose(self, name: str, why: str, *, automatic: bool = False) -> None:
        """List a parameter set as stolen in the ledger.

        A second listing of the same set has no effect, except for the first report after an `automatic` listing, which
        replaces that listing.
        """
        self._add("exposed", set=name, why=why, automatic=automatic)

    def delete(self, name: str, why: str = "") -> None:
        """Record that the parameters of an unused set were deleted. Stolen sets cannot be deleted, because other sets
        are tested against them.
        """
        self._add("deleted", set=name, why=why)

    def answered(self, epoch: int, answers: Mapping[str, int], others: int = 0) -> None:
        """Record further numbers of requests that were answered in a period of service, by caller. The period may have
        ended.

        `others` is the number of answers to callers without a name.
        """
        if answers or others:
            self._add("answers", epoch=epoch, answers=dict(answers), others=others)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager in which no other process or thread can add entries to the ledger. Entries of other processes
        are read before.
        """
        with self._thread_lock:
            if self._has_lock:
                yield
                return
            with locked(self.path.with_name(LOCK)):
                self._log.repair()
                self._has_lock = True
                try:
                    yield
                finally:
                    self._has_lock = False

    def _add(self, kind: str, **content: Any) -> None:
        entry = {"kind": kind, "at": self._now(), **content}
        try:
            well_formed(entry)
        except (ValueError, TypeError) as error:
            raise UsageError(f"the entry is invalid for the ledger: {error}") from error
        with self.alone():
            self._state.refuse_illegal(entry)
            # Added under the lock and after the entries of other processes were read, so that the chain never forks.
            self._log.add(entry)

    def _view(self, view: Callable[[LedgerState], T]) -> T:
        """Read new entries, waiting for a writer if necessary, and return a view of the state."""
        with self._thread_lock:
            if not self._has_lock and self._log.has_changed():
                with self.alone():
                    pass
            return view(self._state)


# --- the log


def ledger_key(seal: Seal, pool: str) -> bytes:
    """Return the key that authenticates the ledger of a pool. It is derived from the encryption key and the id of the
    pool.
    """
    return seal.derived(_PURPOSE, pool)


def ledger_log(folder: Path, key: bytes | None, state: LedgerState) -> AppendLog:
    """Return the ledger in the folder of a pool as a log, whose entries update a state as they are read and added.

    Without a `key`, only the public chain and the numbers are verified, and nothing can be added.
    """

    def take(link: Link, number: int) -> None:
        try:
            state.refuse_illegal(link.content)
        except UsageError as error:
            raise TargetError(
                f"entry {number} of {str(folder / LEDGER)!r} cannot follow those before it ({error}); {WAY_OUT}"
            ) from error
        state.take(link.content)

    form = LogForm(well_formed, "entry", WAY_OUT, refusal_in_pool, authenticated=True, key=key)
    return AppendLog(folder / LEDGER, form, take, LedgerHead(folder / HEAD, key))


@dataclass(frozen=True)
class LedgerHead:
    """The file with the number and the digest of the last entry of a ledger, and an HMAC of both.

    Entries that are missing at the end of the ledger are detected by it. Without a `key`, the HMAC is not verified.
    """

    path: Path
    key: bytes | None

    def write(self, head: Head) -> None:
        """Replace the stored head. Raises `OSError`."""
        content = {"entries": head.entries, "digest": head.digest, "mac": self._mac(head)}
        write_atomically(self.path, document(content), PRIVATE)

    def read(self) -> Head | None:
        """Return the stored head, or None if the file does not exist. Raises `TargetError` if it was not written with
        the key of the pool.
        """
        with usable(self.path, refusal_in_pool):
            if not self.path.exists():
                return None
        content = read_document(self.path)
        # The content is not trusted yet: without the key the HMAC below is not verified.
        entries, digest = content.get("entries"), content.get("digest")
        if type(entries) is not int or entries < 1 or not isinstance(digest, str):
            raise TargetError(f"{str(self.path)!r} does not contain the head of a ledger; {WAY_OUT}")
        head = Head(entries, digest)
        if self.key is not None and not equal(content.get("mac"), self._mac(head)):
            raise TargetError(
                f"{str(self.path)!r} was not written with the pool's key: its HMAC is wrong, so it was changed, or "
                f"copied from another pool; {WAY_OUT}"
            )
        return head

    def refuse_shortened(self, head: Head | None, links: Sequence[Link]) -> None:
        """Raise `TargetError` if entries are missing at the end of a ledger, according to the stored `head`."""
        path = self.path.with_name(LEDGER)
        if head is None:
            if links:
                raise TargetError(
                    f"{str(self.path)!r} is missing, which contains the number of entries of {path.name}; restore both "
                    "from a copy; until then no set of this pool is served"
                )
        elif head.entries > max(len(links), 1):  # a first entry that a kill interrupted does not count
            raise TargetError(
                f"{str(path)!r} has {len(links)} entries, but {HEAD} records {head.entries}: entries at the end are "
                f"missing; {WAY_OUT}"
            )
        elif links and (digest := links[head.entries - 1].digest) != head.digest:
            raise TargetError(
                f"entry {head.entries} of {str(path)!r} has the digest {digest[:16]}…, but {HEAD} records "
                f"{head.digest[:16]}…: one of the two files is from another time or another pool; {WAY_OUT}"
            )

    def _mac(self, head: Head) -> str:
        assert self.key is not None, "the head is written with the key only"
        message = canonical({"kind": "head", "entries": head.entries, "digest": head.digest})
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()


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
    refuse_malformed_head(expected, f"holdfast rotate head {shlex.quote(str(path))}")
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
