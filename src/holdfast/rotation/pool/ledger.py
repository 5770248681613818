"""The ledger of a pool records when each parameter set served, how many requests it answered, and which sets were
stolen.

`ledger.jsonl` is a hash chain to which entries are only ever added, each authenticated with the key of the pool.
Several processes may use one ledger: a process adds an entry under a lock, after it has read and verified the entries
of other processes, so that the chain never forks. A last line without its end, which a kill may leave, is not an entry.
`ledger.head` contains the number of entries, so that entries missing at the end are detected. An older copy of both
files is detected only with a `head` that is stored elsewhere. If an earlier entry is changed while a process uses the
ledger, the next process that opens the ledger detects it.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from holdfast.core.chain import GENESIS, Link
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.files import open_regular, refuse_irregular
from holdfast.rotation.pool.authentic import (
    HEAD,
    WAY_OUT,
    Head,
    LedgerKey,
    authenticated_line,
    read_entries,
    read_head,
    refuse_shortened,
    write_head,
)
from holdfast.rotation.pool.ledger_state import (
    Exposure,
    LedgerState,
    Role,
    Serving,
    SetRecord,
    State,
    Term,
    well_formed,
)
from holdfast.runs.store.files import append, content_of, refusal_in_pool, usable
from holdfast.runs.store.locking import locked
from holdfast.runs.store.records import record_lines

NAME = "ledger.jsonl"
LOCK = "ledger.lock"
T = TypeVar("T")


def utc_now() -> str:
    """Return the current time in UTC, with a resolution of seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Ledger:
    """The ledger of the pool in a folder. Its properties include entries that other processes add.

    Raises `UsageError` for an entry that is not allowed in the current state, and `TargetError` for a broken chain.
    """

    def __init__(self, folder: Path, key: LedgerKey, now: Callable[[], str] = utc_now) -> None:
        self.path, self._head_path, self._key, self._now = folder / NAME, folder / HEAD, key, now
        self._thread_lock, self._has_lock = RLock(), False
        self._state, self._size = LedgerState(), 0
        self._digests: list[str] = []

    @classmethod
    def create(
        cls, folder: Path, key: LedgerKey, manifest: str, now: Callable[[], str] = utc_now
    ) -> "Ledger":
        """Create the ledger of a new pool, whose manifest has the digest `manifest`. The caller must have locked the
        pool.
        """
        ledger = cls(folder, key, now)
        with ledger._thread_lock:
            ledger._has_lock = True
            try:
                ledger._read_existing()
                ledger._add("begun", manifest=manifest)
            finally:
                ledger._has_lock = False
        return ledger

    def _read_existing(self) -> None:
        """Read an existing ledger. An incomplete first entry is removed, and its head is written again."""
        with usable(self.path, refusal_in_pool):
            has_entry = self.path.exists() and b"\n" in content_of(self.path, refusal_in_pool)
            if self.path.exists() and not has_entry:
                os.truncate(self.path, 0)
        if has_entry:
            self._read()

    # --- views

    @property
    def head(self) -> str:
        """Digest of the last ledger entry, which depends on all earlier entries."""
        return self._view(lambda _: self._last)

    @property
    def entries(self) -> int:
        """Number of entries in the ledger."""
        return self._view(lambda _: len(self._digests))

    def entry_of(self, head: str) -> int | None:
        """Return the number, counted from 1, of the ledger entry with the digest `head`, or None if there is no such
        entry.
        """
        digests = self._view(lambda _: self._digests)
        return digests.index(head) + 1 if head in digests else None

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
                self._read()
                self._has_lock = True
                try:
                    yield
                finally:
                    self._has_lock = False

    @property
    def _last(self) -> str:
        return self._digests[-1] if self._digests else GENESIS

    def _add(self, kind: str, **content: Any) -> None:
        entry = {"kind": kind, "at": self._now(), **content}
        try:
            well_formed(entry)
        except (ValueError, TypeError) as error:
            raise UsageError(f"the entry is invalid for the ledger: {error}") from error
        with self.alone():
            self._state.refuse_illegal(entry)
            # Made under the lock and after the entries of other processes were read, so that the chain never forks.
            link, number = Link(self._last, entry), len(self._digests) + 1
            line, head = authenticated_line(link, number, self._key), Head(number, link.digest)
            with usable(self.path, refusal_in_pool):
                self._write(line, head)
            self._take(link, len(line))

    def _write(self, line: bytes, head: Head) -> None:
        """Write an entry and then the head. A kill in between leaves a ledger longer than its head, which is allowed.

        For the first entry, the head is written first, so that a ledger with entries always has a head.
        """
        if head.entries == 1:
            write_head(self._head_path, head, self._key)
            append(self.path, line)
            return
        append(self.path, line)
        try:
            write_head(self._head_path, head, self._key)
        except BaseException:
            # After an error the entry must not be in the ledger, because the caller reports that nothing was recorded.
            with suppress(OSError):
                os.truncate(self.path, self._size)
            raise

    def _take(self, link: Link, size: int) -> None:
        self._state.take(link.content)
        self._size += size
        self._digests.append(link.digest)

    def _view(self, view: Callable[[LedgerState], T]) -> T:
        """Read new entries, waiting for a writer if necessary, and return a view of the state."""
        with self._thread_lock:
            if not self._has_lock and self._length() != self._size:
                with self.alone():
                    pass
            return view(self._state)

    def _length(self) -> int:
        with usable(self.path, refusal_in_pool):
            try:
                status = self.path.lstat()
            except FileNotFoundError:
                return 0
        refuse_irregular(self.path, status)
        return status.st_size

    def _read(self) -> None:
        """Verify and apply new entries, and drop an incomplete end. The caller must have the lock."""
        length = self._length()
        if length < self._size:
            raise TargetError(
                f"entry {len(self._digests)} of {str(self.path)!r} or an earlier one was removed or changed after "
                f"it was read; {WAY_OUT}"
            )
        if length == self._size:
            return
        with usable(self.path, refusal_in_pool):
            with os.fdopen(open_regular(self.path), "rb") as file:
                file.seek(self._size)
                data = file.read()
            complete_lines = data[: data.rfind(b"\n") + 1]
            if len(complete_lines) < len(data):
                os.truncate(self.path, self._size + len(complete_lines))
        head = read_head(self._head_path, self._key)
        links = read_entries(
            self.path,
            complete_lines,
            well_formed,
            self._key,
            previous=self._last,
            first=len(self._digests) + 1,
        )
        refuse_shortened(self.path, head, [*self._digests, *(link.digest for link in links)])
        for link, line in zip(links, record_lines(complete_lines), strict=True):
            refuse_out_of_order(self._state, link, len(self._digests) + 1, self.path)
            self._take(link, len(line) + 1)
        if head is not None and head.entries < len(
            self._digests
        ):  # a writer was killed before it wrote the head
            with suppress(OSError):
                write_head(self._head_path, Head(len(self._digests), self._last), self._key)


def refuse_out_of_order(state: LedgerState, link: Link, number: int, path: Path) -> None:
    """Raise `TargetError` if a stored ledger entry is not allowed after the entries before it."""
    try:
        state.refuse_illegal(link.content)
    except UsageError as error:
        raise TargetError(
            f"entry {number} of {str(path)!r} cannot follow those before it ({error}); {WAY_OUT}"
        ) from error
