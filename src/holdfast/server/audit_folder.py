"""The folder of audit chains: the chain of the supervisor, which lists those of its workers, and their verification."""

import os
import secrets
import shlex
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.core.chain import GENESIS, refuse_malformed_head
from holdfast.core.errors import TargetError
from holdfast.runs.store.append_log import BEGINNING
from holdfast.runs.store.files import AUDIT_MARK, PRIVATE, content_of, create_private
from holdfast.runs.store.leases import Owner, locked
from holdfast.server.audit_chain import (
    ENDS,
    SERVER,
    SUFFIX,
    ChainFile,
    end_chain,
    reading_chain,
    refusal_in_audit,
    run_of,
    timed_record,
    usable,
)

_LOCK = ".lock"
_MARK = b'{"kind":"holdfast audit","schema":1}\n'


@dataclass(eq=False)
class AuditFolder:
    """The audit folder of a running server.

    Chains of servers that were killed are completed first: their open requests are recorded as interrupted.
    """

    path: Path
    run: str
    chain: ChainFile
    recovered: int
    """number of requests of killed servers that were recorded as interrupted"""
    _workers: int = 0
    _open: set[Path] = field(default_factory=set)
    """chains of workers that are not recorded as closed"""
    _heads: dict[str, tuple[int, str]] = field(default_factory=dict)
    """last recorded lengths and heads of chains of workers"""

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any], *, fail_open: bool = False) -> "AuditFolder":
        """Create the folder if needed, complete the chains of killed servers, and begin the chain of this one."""
        with usable(path):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.path.lexists(path / AUDIT_MARK) and any(
                not file.name.startswith(_LOCK) for file in path.iterdir()
            ):
                raise TargetError(
                    f"{str(path)!r} contains other files, and no {AUDIT_MARK}; give an empty folder, or a new one"
                )
        with locked(path / _LOCK):
            with usable(path), suppress(FileExistsError):
                create_private(path / AUDIT_MARK, _MARK)
            _refuse_other_mark(path)
            earlier, recovered = _complete(path)
            run = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(3)}"
            chain = ChainFile(path / f"{run}{SERVER}{SUFFIX}", fail_open=fail_open)
            owner = Owner.myself()
            folder = cls(path, run, chain, recovered)
            facts = {"owner": [owner.host, owner.pid, owner.started], "earlier": earlier}
            folder.record("begin", **facts, **about)
        return folder

    def new_worker(self) -> Path:
        """Create and record the chain of a new worker, and return its path."""
        self._workers += 1
        path = self.path / f"{self.run}.worker-{self._workers}{SUFFIX}"
        with usable(path):
            path.touch(PRIVATE, exist_ok=False)  # here, so that a missing file is always a fault
        try:
            self.record("worker", chain=path.name)
        except TargetError:
            path.unlink(missing_ok=True)
            raise
        self._open.add(path)
        return path

    def record(self, kind: str, **facts: Any) -> None:
        """Add a record to the chain of the supervisor. Raises `TargetError` if it cannot be written."""
        with usable(self.chain.path):
            self.chain.add([timed_record(kind, **facts)])
            self.chain.flush()

    def record_heads(self, heads: Mapping[str, tuple[int, str]]) -> None:
        """Record the lengths and heads of chains of running workers, by file name, so that records before them cannot
        be removed at the end of these chains without a trace. Raises `TargetError` if they cannot be written.
        """
        changed = {name: head for name, head in heads.items() if self._heads.get(name) != head}
        if changed:
            self.record("heads", chains=[[name, *head] for name, head in sorted(changed.items())])
            self._heads.update(changed)

    def ended(self, path: Path, *, reason: str) -> int:
        """Complete the chain of a worker that has ended, record its head, and return the number of requests that it did
        not answer.
        """
        facts = _completed(path, reason)
        self.record("closed", **facts)
        self._open.discard(path)
        return int(facts["interrupted"])

    def close(self) -> None:
        """Complete the chains that could not be completed before, record the end of the server, and close its chain."""
        with suppress(
            TargetError
        ):  # of a full disk; without a record of the end, the next server completes the chains
            for path in sorted(self._open):
                self.ended(path, reason="the worker died")
            self.record("end")
        self.chain.close()


def _refuse_other_mark(path: Path) -> None:
    """Raise `TargetError` unless a folder is one of audit chains in the format of this version."""
    mark = path / AUDIT_MARK
    if content_of(mark, refusal_in_audit) != _MARK:
        raise TargetError(
            f"{str(mark)!r} is not the file with which this version marks an audit folder; restore it from a copy, or "
            "give another folder"
        )


def _chains_of(path: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the files of a folder whose names are those of server chains, of worker chains, and other names with the
    suffix of a chain.
    """
    kinds: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    with usable(path):
        for file in sorted(path.iterdir()):
            if file.name.endswith(SUFFIX):
                own = run_of(file.name) is not None
                kinds[0 if own and file.name.endswith(f"{SERVER}{SUFFIX}") else 1 if own else 2].append(file)
    return kinds


def _complete(path: Path) -> tuple[list[list[Any]], int]:
    """Complete the chains of killed servers. Return name, length and head of every server chain, and the number of
    interrupted requests.
    """
    recovered, earlier = 0, []
    for file in _chains_of(path)[0]:
        state = _ServerState(file)
        with reading_chain(file) as chain:
            for link in chain:
                state.take(link.content)
            last = chain.last
        if state.begin is not None and not state.ended and not Owner(*state.begin["owner"]).alive():
            closed: list[dict[str, Any]] = []
            for name in state.open_workers:
                facts = _completed(path / name, "the server was killed")
                recovered += facts["interrupted"]
                closed.append(timed_record("closed", **facts))
            with usable(file):
                _, last = end_chain(file, [*closed, timed_record("killed")])
        earlier.append([file.name, *last])
    return earlier, recovered


def _completed(path: Path, reason: str) -> dict[str, Any]:
    """Complete the chain of a worker that has ended, if there is one, and return what the record `closed` states."""
    interrupted, last = 0, BEGINNING
    if os.path.lexists(path):
        with usable(path):
            interrupted, last = end_chain(path, reason=reason)
    return {"chain": path.name, "records": last.entries, "head": last.digest, "interrupted": interrupted}


@dataclass
class _ServerState:
    file: Path
    begin: Mapping[str, Any] | None = None
    workers: list[str] = field(default_factory=list)
    closed: set[str] = field(default_factory=set)
    heads: list[tuple[str, int, str]] = field(default_factory=list)
    """name, length and head of a chain of a worker in each record that states them; all of them must hold, because
    anyone who can write to the folder can add records"""
    ended: bool = False

    @property
    def open_workers(self) -> list[str]:
        return [name for name in self.workers if name not in self.closed]

    def take(self, content: Mapping[str, Any]) -> None:
        """Follow a record of the server chain. Raises `TargetError` if it names a chain of another server, or if it
        cannot come after the records before it.
        """
        kind, named = content["kind"], list[str]()
        possible = not self.ended and (kind == "begin") == (self.begin is None)
        match kind:
            case "begin":
                self.begin = content
            case "worker":
                named = [content["chain"]]
                possible = possible and named[0] not in self.workers
                self.workers += named
            case "heads":
                self.heads += [(name, n, head) for name, n, head in content["chains"]]
                named = [name for name, *_ in content["chains"]]
            case "closed":
                named = [content["chain"]]
                possible = possible and named[0] in self.open_workers
                self.closed.update(named)
                self.heads.append((named[0], content["records"], content["head"]))
            case "end" | "killed":
                self.ended = True
        if not possible:
            raise TargetError(
                f"{str(self.file)!r} has a record of the kind {kind} where there can be none; restore it from a copy"
            )
        for name in named:
            if run_of(name) != run_of(self.file.name):
                raise TargetError(
                    f"{str(self.file)!r} names the chain {name!r}, which is not one of its server; restore it from a "
                    "copy"
                )


@dataclass(frozen=True)
class VerifiedAudit:
    """The result of the verification of an audit folder in which no fault was found."""

    chains: int
    records: int
    answered: int
    failed: int
    interrupted: int
    open: int
    """requests without an end; they are in progress if their server runs"""
    lost: int
    """records that could not be written while the disk was full, in mode `open`"""
    head: str
    """digest of the last record of the newest server chain; a copy that is stored elsewhere shows later removals"""
    notes: tuple[str, ...] = ()


def verify_audit(path: Path, *, expect_head: str = "") -> VerifiedAudit:
    """Verify all audit chains of a folder together. Raises `TargetError` with the first fault.

    Each record must contain the digest of the one before, each chain that a server lists must exist with the recorded
    length and head, and each request must start once and end at most once. `expect_head` is an earlier head, which a
    server chain must contain; empty for none. Raises `UsageError` if it is no digest.
    """
    refuse_malformed_head(expect_head, f"holdfast verify {shlex.quote(str(path))}")
    _refuse_other_mark(path)
    totals: dict[str, int] = dict.fromkeys(
        ("records", "answered", "failed", "interrupted", "open", "lost"), 0
    )
    heads: dict[str, list[str]] = {}
    servers, workers, others = _chains_of(path)
    if not servers:
        raise TargetError(f"{str(path)!r} contains no chain of a server; restore it from a copy")
    states = {file: _ServerState(file) for file in servers}
    for file in servers:  # before the other chains, which a running server may extend in the meantime
        heads[file.name] = _verified_chain(file, totals, states[file].take)
    named = {path / name for state in states.values() for name in state.workers}
    for file in sorted({*workers, *(file for file in named if os.path.lexists(file))}):
        heads[file.name] = _verified_chain(file, totals)
    notes: list[str] = []
    listed: set[str] = {file.name for file in servers}
    for file in servers:
        _refuse_missing(path, file, states[file], heads, listed, notes)
    unlisted = [path / name for name, digests in heads.items() if name not in listed and len(digests) > 1]
    for file in (*unlisted, *others):  # a server that was killed may leave an empty one
        raise TargetError(
            f"{str(file)!r} is listed by no server chain of the folder; restore that, or move it elsewhere"
        )
    if expect_head and not any(expect_head in heads[file.name][1:] for file in servers):
        raise TargetError(
            f"no record of a server chain in {str(path)!r} has the digest {expect_head[:16]}… that was expected: "
            "records were removed, or the folder is another one. Restore the newest copy, and find out how it was "
            "replaced"
        )
    newest = max(servers, key=lambda file: file.name)
    return VerifiedAudit(len(heads), **totals, head=heads[newest.name][-1], notes=tuple(notes))


def server_records(path: Path, kinds: Collection[str]) -> list[Mapping[str, Any]]:
    """Return the records of these kinds in the server chains of a folder, the oldest first. Raises `TargetError` for a
    record that was changed; see `verify_audit` for the whole folder.
    """
    _refuse_other_mark(path)
    found: list[Mapping[str, Any]] = []
    for file in _chains_of(path)[0]:
        with reading_chain(file) as chain:
            found += [link.content for link in chain if link.content["kind"] in kinds]
    return found


def _refuse_missing(
    path: Path,
    file: Path,
    state: _ServerState,
    heads: Mapping[str, list[str]],
    listed: set[str],
    notes: list[str],
) -> None:
    """Compare what a server chain states about other chains with these."""
    if state.begin is None:
        raise TargetError(f"{str(file)!r} does not begin with the record of a server; restore it from a copy")
    listed.update(state.workers)
    # of a chain that was never closed, the file must exist
    expected = [(name, 0, GENESIS) for name in state.open_workers] + state.heads
    expected += [(str(name), int(records), str(head)) for name, records, head in state.begin["earlier"]]
    for name, records, head in expected:
        digests = heads.get(name, [])
        if len(digests) <= records or digests[records] != head:
            raise TargetError(
                f"{str(path / name)!r} is missing, was shortened or replaced: {file.name} recorded its record "
                f"{records} with the digest {head[:16]}…; restore it from a copy"
            )
    if not state.ended:
        alive = Owner(*state.begin["owner"]).alive()
        notes.append(f"{file.name}: the server {'runs' if alive else 'was killed, or runs on another host'}")


def _verified_chain(
    file: Path, totals: dict[str, int], take: Callable[[Mapping[str, Any]], None] = lambda content: None
) -> list[str]:
    """Verify the records of one chain, add their numbers to the totals, pass each content to `take`, and return all
    digests after `GENESIS`.
    """
    digests, begun, done, lost = [GENESIS], set[str](), set[str](), 0
    with reading_chain(file) as chain:
        for link in chain:
            content = link.content
            digests.append(link.digest)
            kind, request = content["kind"], content.get("request", "")
            fault = (kind == "started" and request in begun) or (
                kind in ENDS and ((request not in begun and not lost) or request in done)
            )
            if fault:
                raise TargetError(
                    f"record {len(digests) - 1} of {str(file)!r} states {kind} for a request that is not in progress; "
                    "restore it from a copy"
                )
            if kind == "started":
                begun.add(request)
            elif kind in ENDS:
                done.add(request)
                totals[kind] += 1
            elif kind == "lost":
                lost += content["records"]
            take(content)
    totals["records"] += chain.last.entries
    totals["open"] += len(begun - done)
    totals["lost"] += lost
    return digests
