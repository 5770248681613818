"""The exposure ledger of a rotation: which parameter set served when, whom it answered how often, and what leaked.

`ledger.jsonl` is a hash chain to which entries are only ever added. Several processes may use one ledger: each adds
under a lock, after it has read and verified what the others added, so that the chain never forks. What lacks its end,
because a kill cut it short, was never said. A chain shortened by whole entries still holds: who must know of that too
writes the `head` down elsewhere. What is rewritten in place under a living process, the
next one that opens it sees.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from holdfast.core.chain import GENESIS, Link
from holdfast.core.errors import TargetError, UsageError
from holdfast.store.files import PRIVATE, append, refusal_in_pool, usable
from holdfast.store.locking import locked
from holdfast.store.records import line_of, read_links
from holdfast.store.standing import Exposure, Member, Serving, Standing, State, Term, well_formed

NAME = "ledger.jsonl"
LOCK = "ledger.lock"
T = TypeVar("T")

_WAY_OUT = "restore it from a copy; until then nothing of it is served"


def utc_now() -> str:
    """The wall time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Ledger:
    """The ledger in a folder. Its views have what any process added; of a broken chain there is no view.

    It raises `UsageError` for an entry that cannot follow what the ledger has, `TargetError` where the chain is broken.
    """

    def __init__(self, folder: Path, now: Callable[[], str] = utc_now) -> None:
        self.path, self._now = folder / NAME, now
        self._threads, self._inside = RLock(), False
        self._standing, self._head, self._size, self._entries = Standing(), GENESIS, 0, 0

    # --- views

    @property
    def head(self) -> str:
        """The digest of the last entry: it stands for all of them."""
        return self._ask(lambda _: self._head)

    @property
    def entries(self) -> int:
        """How many there are."""
        return self._ask(lambda _: self._entries)

    @property
    def manifest(self) -> str | None:
        """Digest of the manifest of the pool whose ledger this is; None for a ledger alone."""
        return self._ask(lambda standing: standing.manifest)

    @property
    def members(self) -> tuple[Member, ...]:
        """Every set, in the order of arrival."""
        return self._ask(lambda standing: tuple(standing.members.values()))

    @property
    def states(self) -> dict[str, State]:
        """The state of each set."""
        return {member.name: member.state for member in self.members}

    @property
    def serving(self) -> Serving | None:
        """The set that answers now; None before the first, and after one that was retired without another."""
        return self._ask(lambda standing: standing.serving)

    @property
    def terms(self) -> tuple[Term, ...]:
        """All times of service, the present one last."""
        return self._ask(lambda standing: standing.terms)

    @property
    def ahead(self) -> tuple[str, ...]:
        """The admitted sets that wait to serve and are not exposed, those admitted first in front."""
        return self._ask(lambda standing: standing.ahead)

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Bases of sets that serve or may still, which are neither exposed nor deleted."""
        return self._ask(lambda standing: standing.unlisted)

    def exposed(self) -> tuple[Exposure, ...]:
        """The sets that an attacker may hold, in the order of their first mention, with its reason."""
        return self._ask(lambda standing: standing.exposed)

    def member(self, name: str) -> Member:
        """A set by name; `UsageError`, with the names near it, where there is none."""
        return self._ask(lambda standing: standing.member(name))

    # --- entries

    def begin(self, manifest: str) -> None:
        """Say first of all which manifest this ledger belongs to."""
        self._add("begun", manifest=manifest)

    def candidate(self, name: str, digest: str, bases: Sequence[str] = (), why: str = "") -> None:
        """A new set, and the sets that it was made from, which must be known too."""
        self._add("candidate", set=name, digest=digest, bases=list(bases), why=why)

    def admit(self, name: str, why: str = "", *, canary: str = "") -> None:
        """A candidate may serve, or a set that waits still may.

        `canary` is a digest of its answers to known inputs, to tell it by once loaded.
        """
        self._add("admitted", set=name, why=why, canary=canary)

    def refuse(self, name: str, why: str) -> None:
        """A candidate may not serve, or a set that waits may no longer."""
        self._add("refused", set=name, why=why)

    def serve(self, name: str, why: str = "") -> Serving:
        """An admitted set serves from now on, and what served before is retired: one entry, so both or neither."""
        with self.alone():
            before = self._standing.serving
            retires = [] if before is None else [before.name]
            self._add("serving", set=name, epoch=self._standing.epoch + 1, retires=retires, why=why)
            return Serving(name, self._standing.epoch, self._standing.members[name].since)

    def retire(self, name: str, why: str = "") -> None:
        """An admitted set will not serve, or the serving one stops and none takes its place."""
        self._add("retired", set=name, why=why)

    def expose(self, name: str, why: str) -> None:
        """An attacker may hold a set. Said again, it is written down again, and the first time counts."""
        self._add("exposed", set=name, why=why)

    def delete(self, name: str, why: str = "") -> None:
        """The weights of a set that serves no purpose any more are gone; exposed sets are kept, to test others by."""
        self._add("deleted", set=name, why=why)

    def answered(self, epoch: int, answers: Mapping[str, int], others: int = 0) -> None:
        """Answers that principals were given in an epoch, in addition to those said before; it may be over already.

        `others` are those to callers without a name.
        """
        if answers or others:
            self._add("answers", epoch=epoch, answers=dict(answers), others=others)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process or thread adds to the ledger meanwhile; all that was added before has been read."""
        with self._threads:
            if self._inside:
                yield
                return
            with locked(self.path.with_name(LOCK)):
                self._read()
                self._inside = True
                try:
                    yield
                finally:
                    self._inside = False

    def _add(self, kind: str, **content: Any) -> None:
        entry = {"kind": kind, "at": self._now(), **content}
        try:
            well_formed(entry)
        except (ValueError, TypeError) as error:
            raise UsageError(f"the ledger takes no such entry: {error}") from error
        with self.alone():
            self._standing.refuse_illegal(entry)
            link = Link(self._head, entry)
            line = line_of(link)
            with usable(self.path, refusal_in_pool):
                append(self.path, line, PRIVATE)
            self._take(link, len(line))

    def _take(self, link: Link, size: int) -> None:
        self._standing.take(link.content)
        self._head, self._size, self._entries = link.digest, self._size + size, self._entries + 1

    def _ask(self, view: Callable[[Standing], T]) -> T:
        """What the file says now; an entry that another process is adding is waited for."""
        with self._threads:
            if not self._inside and self._length() != self._size:
                with self.alone():
                    pass
            return view(self._standing)

    def _length(self) -> int:
        with usable(self.path, refusal_in_pool):
            try:
                return self.path.stat().st_size
            except FileNotFoundError:
                return 0

    def _read(self) -> None:
        """Verify and take what was added since; drop an end that a kill cut short. Only under the lock."""
        length = self._length()
        if length < self._size:
            raise TargetError(
                f"entry {self._entries} of {str(self.path)!r} was there and is no more, or others before it; {_WAY_OUT}"
            )
        if length == self._size:
            return
        with usable(self.path, refusal_in_pool):
            with self.path.open("rb") as file:
                file.seek(self._size)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(self.path, self._size + len(whole))
        first = self._entries + 1
        links = read_links(
            self.path, whole, well_formed, previous=self._head, first=first, noun="entry", way_out=_WAY_OUT
        )
        for link, line in zip(links, whole.splitlines(keepends=True), strict=True):
            try:
                self._standing.refuse_illegal(link.content)
            except UsageError as error:
                raise TargetError(
                    f"entry {self._entries + 1} of {str(self.path)!r} cannot follow those before it ({error}); "
                    f"{_WAY_OUT}"
                ) from error
            self._take(link, len(line))
