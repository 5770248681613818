"""The audit chain of a worker: one record for each request, in a file that only grows."""

import errno
import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import TypedDict

from holdfast.core.chain import canonical
from holdfast.core.errors import Placeholder, Remedy, TargetError
from holdfast.guard.rules import Action, RequestDecision, RowDecision
from holdfast.io.files import open_regular
from holdfast.runs.store import files as store
from holdfast.runs.store.append_log import BEGINNING, Head, LogForm, LogReader
from holdfast.runs.store.columns import Count, Whole, conforming, required
from holdfast.runs.store.files import content_of, create_private
from holdfast.runs.store.leases import WAIT_S

_ACTIONS = tuple(map(str, Action))
"""names of the actions by their numbers"""


def started(request: str, principal: str, rows: int, digest: str, time: float) -> bytes:
    """Return the record of a request before the model is called: its identifier, the pseudonym of its client, its
    number of inputs and their digest.
    """
    return (
        f'{{"digest":{quoted(digest)},"kind":"started","principal":{quoted(principal)},"request":{quoted(request)},'
        f'"rows":{rows},"time":{time!r}}}'
    ).encode()


def answered(
    request: str,
    decision: RequestDecision,
    action: Action,
    status: int,
    set_name: str,
    epoch: int,
    time: float,
) -> bytes:
    """Return the record of the end of a request about which the guard decided, with the scores of each input."""
    scored = [_row(row) for row in decision.rows if row.scores]
    rows = f'"rows":[{",".join(scored)}],' if scored else ""
    notes = f'"notes":{canonical(dict(decision.notes)).decode()},' if decision.notes else ""
    return (
        f'{{"action":"{_ACTIONS[action]}","epoch":{epoch},"kind":"answered",{notes}'
        f'"request":{quoted(request)},{rows}"set":{quoted(set_name)},"status":{status},"time":{time!r}}}'
    ).encode()


def _row(row: RowDecision) -> str:
    """The action for an input, and the score of each rule with whether it fired and the mode of the rule."""
    scores = [
        f'{quoted(rule)}:[{_number(value)},{"true" if fired else "false"},"{mode.value}"]'
        for rule, value, fired, mode, _ in sorted(row.scores)
    ]
    return f'["{_ACTIONS[row.action]}",{{{",".join(scores)}}}]'


def _number(value: float) -> str:
    return repr(round(value, 6)) if isfinite(value) else f'"{value}"'


SUFFIX = ".jsonl"
SERVER = ".server"
_NAME = re.compile(rf"([0-9]{{8}}T[0-9]{{12}}-[0-9a-f]{{6}})(\{SERVER}|\.worker-[1-9][0-9]{{0,8}})\{SUFFIX}")
"""Names of chains, with the run that wrote them. Names in a chain are compared with it before they are used as paths,
because a folder may be from elsewhere."""
_BEGINNING = b'{"content":{"'
"""first bytes of each record"""
_PROBE = _BEGINNING.ljust(1 << 13)
"""bytes that test whether records can be written: longer than a block of a disk, of which a full one may have a part
left, and like an incomplete record, which a kill may leave"""
_KEY_BYTES, _DIGITS = 32, 32
_POLL_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT)
ENDS = frozenset({"answered", "interrupted", "failed"})
"""kinds of records that end a request"""


def advice_for(error: OSError) -> str:
    """Return what an operator can do about a chain that cannot be written."""
    return "free some space" if error.errno in _FULL else "check the disk and its permissions"


def refusal_in_audit(path: Path, error: OSError) -> TargetError:
    """Return the error for a file of an audit folder that cannot be read or written."""
    cause = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
    return TargetError(
        f"{str(path)!r} cannot be used: {cause}; {advice_for(error)}",
        Remedy("audit", Placeholder("DIR"), reason="for another folder"),
    )


usable = partial(store.usable, refused=refusal_in_audit)
"""context manager that converts an `OSError` to a `TargetError` with advice about the audit folder"""


@dataclass(frozen=True)
class AuditKey:
    """The key of the pseudonyms and digests in audit chains."""

    key: bytes

    @classmethod
    def of(cls, folder: Path, *, create: bool = True) -> "AuditKey":
        """Return the key of an audit folder, from the file beside it. If that does not exist, it is created, or without
        `create`, `TargetError` is raised.
        """
        file = Path(f"{os.path.abspath(folder)}.key")  # noqa: PTH100 - also of `.`, and links are not resolved
        if create:
            with usable(file), suppress(FileExistsError):
                create_private(file, secrets.token_hex(_KEY_BYTES).encode())
        elif not file.exists():
            raise TargetError(
                f"{str(file)!r}, the key of the audit folder, does not exist; give the folder that the server was "
                "started with (--audit DIR), or restore the key from a copy"
            )
        text = content_of(file, refusal_in_audit, follow=True).decode("ascii", "replace").strip()
        if len(text) != 2 * _KEY_BYTES or not all(digit in "0123456789abcdef" for digit in text):
            raise TargetError(
                f"{str(file)!r} is not the key of an audit folder; {2 * _KEY_BYTES} hex digits were expected: restore "
                "it from a copy, or give another folder"
            )
        return cls(bytes.fromhex(text))

    def pseudonym(self, principal: str) -> str:
        """Return the pseudonym under which a client is recorded; empty for a client without a name."""
        return self._mac(b"principal\0", principal.encode()) if principal else ""

    def digest(self, content: bytes) -> str:
        """Return the digest of the bytes of an input tensor, as it is recorded."""
        return self._mac(b"request\0", content)

    def _mac(self, purpose: bytes, content: bytes) -> str:
        mac = hmac.new(self.key, purpose, hashlib.sha256)
        mac.update(content)
        return mac.hexdigest()[:_DIGITS]


class ChainFile:
    """A hash chain in a file of its own, to which one process adds records. It locks the file until it ends.

    With `fail_open`, records that cannot be written are counted, and a record `lost` states their number as soon as the
    disk is writable again. Otherwise `OSError` is raised. The file then has its old content.
    """

    def __init__(self, path: Path, *, fail_open: bool = False) -> None:
        self.path, self._fail_open = path, fail_open
        self._lock = threading.Lock()
        self.last = self.flushed = BEGINNING
        """the last record, and the last one that outlasts a power failure"""
        self.lost = self.lost_in_total = 0
        with usable(path):
            with suppress(FileExistsError):  # the supervisor has created that of a worker
                create_private(path, b"")
            self._handle = open_regular(path, os.O_WRONLY)
            if not _locked(self._handle) or os.fstat(self._handle).st_size:
                os.close(self._handle)
                raise FileExistsError(errno.EEXIST, "the chain is that of another process", str(path))
        self._size = self._synced = 0

    def add(self, contents: Sequence[Mapping[str, Any]]) -> None:
        """Append records with one write. Every record has a `kind`."""
        self.add_texts([canonical(content) for content in contents])

    def add_texts(self, texts: Sequence[bytes]) -> None:
        """Append the records with these canonical texts with one write."""
        with self._lock:
            lost = canonical(timed_record("lost", records=self.lost))
            every = [lost, *texts] if self.lost else texts
            data, last = FORM.lines(every, self.last)
            try:
                self._write(data)
            except OSError:
                if not self._fail_open:
                    raise
                self.lost += len(texts)
                self.lost_in_total += len(texts)
                return
            self.last, self.lost = last, 0

    def refuse_full_disk(self) -> None:
        """Write some bytes after the last record and remove them again. Raises `OSError` if that is not possible."""
        with self._lock:
            size = self._size
            self._write(_PROBE)
            self._size = size
            os.ftruncate(self._handle, size)

    def _write(self, data: bytes) -> None:
        view, at = memoryview(data), self._size
        try:
            while view:
                # at a position: bytes of a failed write are overwritten by the next one
                written = os.pwrite(self._handle, view, at)
                view, at = view[written:], at + written
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._handle, self._size)
            raise
        self._size = at

    def flush(self) -> None:
        """Flush the records to the disk, so that they outlast a power failure."""
        with self._lock:
            size, flushed = self._size, self.last
        if size != self._synced:
            os.fsync(self._handle)
            self._synced, self.flushed = size, flushed

    def close(self) -> None:
        """Record the number of lost records if that is possible, flush, and close the file."""
        if self.lost:
            self.add_texts([])
        with suppress(OSError):
            self.flush()
        with self._lock, suppress(OSError):
            os.close(self._handle)
            self._handle = -1  # a check that still runs must not write to another file with this number


def lines(head: str, contents: Iterable[Mapping[str, Any]]) -> tuple[bytes, str]:
    """Return records as lines of a chain file, and the digest of the last one. `head` is the digest of the record
    before them.
    """
    data, last = FORM.lines(map(canonical, contents), Head(0, head))
    return data, last.digest


def _locked(handle: int) -> bool:
    """Lock an open file for this process until it is closed, and return whether that is possible now."""
    import fcntl  # absent on Windows, where chains are verified only

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def now() -> float:
    """Return the time in seconds since 1970, with microseconds, as it is recorded."""
    return round(time.time(), 6)


def timed_record(kind: str, **facts: Any) -> dict[str, Any]:
    """Return a record with the present time."""
    return {"kind": kind, **facts, "time": now()}


def run_of(name: str) -> str | None:
    """Return the run in the name of a chain, or None for a name that is not that of a chain."""
    matched = _NAME.fullmatch(name)
    return None if matched is None else matched[1]


_ChainName = Annotated[str, required(run_of, "the name of a chain")]
_LastRecord = tuple[_ChainName, Count, str]
"""Name, length and head of a chain"""


class _Request(TypedDict):
    request: str


class _Lost(TypedDict):
    records: Count


class _Begin(TypedDict):
    owner: tuple[str, Whole, Any]
    earlier: list[_LastRecord]


class _Worker(TypedDict):
    chain: _ChainName


class _Heads(TypedDict):
    chains: list[_LastRecord]


class _Closed(_Worker):
    records: Count
    head: str


_FORMS: Mapping[str, type] = {
    **dict.fromkeys(("started", "answered", "failed", "interrupted"), _Request),
    "lost": _Lost,
    "begin": _Begin,
    "worker": _Worker,
    "heads": _Heads,
    "closed": _Closed,
}
"""Models of the kinds of records whose contents are used"""


class _Content(TypedDict):
    kind: str


def _check(content: Any) -> None:
    conforming(content, _Content)
    conforming(content, _FORMS.get(content["kind"], _Content))


FORM = LogForm(_check, refused=refusal_in_audit)
"""Form of the records of an audit chain"""


@contextmanager
def reading_chain(path: Path) -> Iterator[LogReader]:
    """Context manager that opens a chain for reading. Raises `TargetError` for anything else than a regular file."""
    with usable(path), os.fdopen(open_regular(path), "rb") as file:
        yield LogReader(file, path, FORM)


def end_chain(
    path: Path, contents: Sequence[Mapping[str, Any]] = (), *, reason: str = "", wait_s: float = WAIT_S
) -> tuple[int, Head]:
    """Add the record `interrupted` with a reason for each open request of a chain whose process has ended, and then the
    records `contents`. Return the number of open requests and the last record.

    A worker whose supervisor was killed ends by itself once it has answered what it received, for which `wait_s`
    seconds are waited. An incomplete last line, which a kill may leave, is removed. The file is changed only if it is a
    chain, and if it has no other name, under which it may be a file of someone else. Raises `OSError` if the file
    cannot be written, or if its process does not end.
    """
    with os.fdopen(open_regular(path, os.O_RDWR), "r+b") as file:
        if os.fstat(file.fileno()).st_nlink > 1:
            raise TargetError(
                f"{str(path)!r} has further names (hard links), under which it would be changed, too; replace it by a "
                "copy"
            )
        until = time.monotonic() + wait_s
        while not _locked(file.fileno()):
            if time.monotonic() >= until:
                raise OSError(
                    errno.EBUSY, "a worker of a killed server still writes to it; end that process", str(path)
                )
            time.sleep(_POLL_S)
        chain, pending = LogReader(file, path, FORM), dict[str, None]()
        for content in (link.content for link in chain):
            if content["kind"] == "started":
                pending[content["request"]] = None
            elif content["kind"] in ENDS:
                pending.pop(content["request"], None)
        if not (chain.rest.startswith(_BEGINNING) or _BEGINNING.startswith(chain.rest)):
            raise TargetError(
                f"{str(path)!r} ends with {len(chain.rest)} bytes that are not the beginning of a record, and is not "
                "changed; restore it from a copy"
            )
        ends = [timed_record("interrupted", request=request, reason=reason) for request in pending]
        data, last = FORM.lines(map(canonical, [*ends, *contents]), chain.last)
        file.truncate(chain.size)
        file.seek(chain.size)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(pending), last
