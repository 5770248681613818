"""The folder of audit chains: the chain of the supervisor, which lists those of its workers, and their verification."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.core.chain import GENESIS, Link
from holdfast.core.errors import TargetError
from holdfast.serving.audit_chain import SERVER, SUFFIX, ChainFile, interrupt, lines, now, usable
from holdfast.store.files import AUDIT_MARK, PRIVATE
from holdfast.store.leases import Owner
from holdfast.store.locking import locked

_LOCK = ".lock"
_ENDS = ("answered", "failed", "interrupted")
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
            mark = path / AUDIT_MARK
            if not mark.exists():
                if any(path.iterdir()):
                    raise TargetError(
                        f"{str(path)!r} contains other files, and no {AUDIT_MARK}; give an empty folder, or a new one"
                    )
                mark.write_bytes(_MARK)
                mark.chmod(PRIVATE)
        with locked(path / _LOCK):
            earlier, recovered = _complete(path)
            run = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(3)}"
            chain = ChainFile(path / f"{run}{SERVER}{SUFFIX}", fail_open=fail_open)
            owner = Owner.myself()
            begin = {
                "kind": "begin",
                "time": now(),
                "owner": [owner.host, owner.pid, owner.started],
                "earlier": earlier,
            }
            with usable(chain.path):
                chain.add([{**begin, **about}])
                chain.flush()
        return cls(path, run, chain, recovered)

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
            self.chain.add([{"kind": kind, **facts, "time": now()}])
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
        if not path.exists():
            self.record("closed", chain=path.name, records=0, head=GENESIS)
            self._open.discard(path)
            return 0
        with usable(path):
            interrupted = interrupt(path, reason)
        records, head = _end(path)
        self.record("closed", chain=path.name, records=records, head=head, interrupted=interrupted)
        self._open.discard(path)
        return interrupted

    def close(self) -> None:
        """Complete the chains that could not be completed before, record the end of the server, and close its chain."""
        with suppress(
            TargetError
        ):  # of a full disk; without a record of the end, the next server completes the chains
            for path in sorted(self._open):
                self.ended(path, reason="the worker died")
            self.record("end")
        self.chain.close()


def _complete(path: Path) -> tuple[list[list[Any]], int]:
    """Complete the chains of killed servers. Return name, length and head of every server chain, and the number of
    interrupted requests.
    """
    recovered, earlier = 0, []
    for file in sorted(path.glob(f"*{SERVER}{SUFFIX}")):
        with usable(file):
            state = _state(file)
            if state.begin is not None and not state.ended and not Owner(*state.begin["owner"]).alive():
                interrupt(file, "")  # removes an incomplete last line
                chain = _Continued(file)
                for name in state.open_workers:
                    worker = path / name
                    n = interrupt(worker, "the server was killed") if worker.exists() else 0
                    records, head = _end(worker) if worker.exists() else (0, GENESIS)
                    chain.add(
                        {"kind": "closed", "chain": name, "records": records, "head": head, "interrupted": n}
                    )
                    recovered += n
                chain.add({"kind": "killed"})
            earlier.append([file.name, *_end(file)])
    return earlier, recovered


class _Continued:
    """The chain of a killed server, to which its end is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _, self._head = _end(path)

    def add(self, content: Mapping[str, Any]) -> None:
        data, self._head = lines(self._head, [{**content, "time": now()}])
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@dataclass
class _ServerState:
    begin: Mapping[str, Any] | None
    workers: list[str]
    closed: dict[str, tuple[int, str]]
    heads: dict[str, tuple[int, str]]
    """last recorded length and head of each chain while its worker ran"""
    ended: bool

    @property
    def open_workers(self) -> list[str]:
        return [name for name in self.workers if name not in self.closed]


def _state(file: Path) -> _ServerState:
    state = _ServerState(None, [], {}, {}, ended=False)
    for content in _contents(file):
        match content["kind"]:
            case "begin":
                state.begin = content
            case "worker":
                state.workers.append(str(content["chain"]))
            case "heads":
                state.heads.update({str(name): (int(n), str(head)) for name, n, head in content["chains"]})
            case "closed":
                state.closed[str(content["chain"])] = (int(content["records"]), str(content["head"]))
            case "end" | "killed":
                state.ended = True
    return state


def _contents(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open("rb") as stored:
        for line in stored:
            if line.endswith(b"\n"):
                yield json.loads(line)["content"]


def _end(file: Path) -> tuple[int, str]:
    """Number of records of a chain, and the digest of the last one."""
    records, head = 0, GENESIS
    with file.open("rb") as stored:
        for line in stored:
            records, head = records + 1, json.loads(line)["digest"]
    return records, head


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


def verify_audit(path: Path) -> VerifiedAudit:
    """Verify all audit chains of a folder together. Raises `TargetError` with the first fault.

    Each record must contain the digest of the one before, each chain that a server lists must exist with the recorded
    length and head, and each request must start once and end at most once.
    """
    totals: dict[str, int] = dict.fromkeys(
        ("records", "answered", "failed", "interrupted", "open", "lost"), 0
    )
    heads: dict[str, list[str]] = {}
    servers, files = sorted(path.glob(f"*{SERVER}{SUFFIX}")), set(path.glob(f"*{SUFFIX}"))
    if not servers:
        raise TargetError(f"{str(path)!r} contains no chain of a server; restore it from a copy")
    for file in servers:
        heads[file.name] = _verified_chain(file, totals)
    # before the other chains, which a running server may extend in the meantime
    states = {file: _valid_state(file) for file in servers}
    files |= {path / name for state in states.values() for name in state.workers if (path / name).exists()}
    for file in sorted(files - {*servers}):
        heads[file.name] = _verified_chain(file, totals)
    notes: list[str] = []
    listed: set[str] = {file.name for file in servers}
    for file in servers:
        _refuse_missing(path, file, states[file], heads, listed, notes)
    for name, digests in heads.items():
        if name not in listed and len(digests) > 1:  # a server that was killed may leave an empty one
            raise TargetError(
                f"{str(path / name)!r} is listed by no server chain of the folder; restore that, or move it elsewhere"
            )
    newest = max(servers, key=lambda file: file.name)
    return VerifiedAudit(len(heads), **totals, head=heads[newest.name][-1], notes=tuple(notes))


def _valid_state(file: Path) -> _ServerState:
    """Return the state in a server chain. Raises `TargetError` if a record has not the form of this version."""
    try:
        with usable(file):
            return _state(file)
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{str(file)!r} contains a record of a form that this version does not write; restore it from a copy"
        ) from error


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
    expected = [(name, *state.closed.get(name, (0, GENESIS))) for name in state.workers]
    expected += [(name, *head) for name, head in state.heads.items()]
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


def _verified_chain(file: Path, totals: dict[str, int]) -> list[str]:
    """Verify the records of one chain, add their numbers to the totals, and return all digests after `GENESIS`."""
    digests, begun, done, lost = [GENESIS], set[str](), set[str](), 0
    with usable(file), file.open("rb") as stored:
        for number, line in enumerate(stored, 1):
            if not line.endswith(b"\n"):
                break  # a write in progress, or what a kill left; it is not a record
            try:
                record = json.loads(line)
                link = Link(record["previous"], record["content"])
                kind, valid = link.content["kind"], link.digest == record["digest"]
            except (ValueError, KeyError, TypeError, RecursionError):
                kind, valid = "", False
            if not valid or link.previous != digests[-1]:
                raise TargetError(
                    f"record {number} of {str(file)!r} was changed, or a record before it was removed; restore it from "
                    "a copy"
                )
            digests.append(link.digest)
            request = str(link.content.get("request", ""))
            fault = (kind == "started" and request in begun) or (
                kind in _ENDS and ((request not in begun and not lost) or request in done)
            )
            if fault:
                raise TargetError(
                    f"record {number} of {str(file)!r} states {kind} for a request that is not in progress; restore it "
                    "from a copy"
                )
            if kind == "started":
                begun.add(request)
            elif kind in _ENDS:
                done.add(request)
                totals[kind] += 1
            elif kind == "lost":
                lost += int(link.content["records"])
    totals["records"] += len(digests) - 1
    totals["open"] += len(begun - done)
    totals["lost"] += lost
    return digests
