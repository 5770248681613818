"""Keeping a pool turning: enough admitted sets ahead, and a swap whenever one is due.

What serves, and to whom, other processes say in the ledger; this one reads it, swaps and makes new sets. A set that was
not admitted never serves because a timer rang: where nothing is admitted, what serves goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from holdfast.core.errors import Inconclusive, InUse, UsageError
from holdfast.rotation import Immunise, next_set, refuse_faster
from holdfast.rotation.triggers import Reading, Trigger, due, exposed
from holdfast.runs.order import Notify, Progress, ignore, silent
from holdfast.runs.rotate.admission import admit
from holdfast.runs.rotate.drawing import By, candidates, draw
from holdfast.runs.rotate.status import UNJUDGED
from holdfast.runs.rotate.terms import FIRST, Terms
from holdfast.runs.rotate.verdicts import IN_A_ROW, Admission
from holdfast.runs.signals import Stopper
from holdfast.store.pool import Pool

_LOOKS_S, _PAUSE_S = 1.0, 60.0  # between two looks at the ledger, and after one at which no set could be had


@dataclass(frozen=True)
class Turning:
    """How a pool is kept turning."""

    triggers: tuple[Trigger, ...]
    """when the set that serves gives way; an exposure always does"""
    keep: int = 8
    """admitted sets ahead"""
    immunise: Immunise | None = None
    by: By | None = None
    """how sets are made; None takes the generator until it draws nothing that is admitted"""
    claims: Sequence[str] = ()
    """what sets must hold beside the usual gates"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """doubts that a person answers for"""
    judged: int = FIRST
    """held-out examples that a set is judged on at first"""
    again: str = ""
    """how to go on with what is stopped"""


@dataclass
class Turner:
    """One process that keeps a pool turning."""

    pool: Pool
    terms: Terms
    how: Turning
    stopper: Stopper = field(default_factory=Stopper)
    notify: Notify = ignore
    progress: Progress = silent
    _by: By | None = None

    def fill(self) -> None:
        """Draw and admit until enough sets wait, judged against everything exposed; else `Inconclusive`.

        Where the generator's are refused, sets are trained from fresh weights; after five refusals of those in a row it
        ends. That may take long, so what calls for a swap is looked for between its steps, which are one drawing of
        all that is missing, and one admission. What a swap takes meanwhile is made by the next call.
        """
        begin, before, refused = time.perf_counter(), self._admitted, 0
        self._turn()
        goal = before + max(self.how.keep - len(self.pool.ahead), 0)
        while (missing := goal - self._admitted) > 0 or self.pool.unjudged:
            if not (candidates(self.pool) or self.pool.unjudged):
                self._draw(missing)
                self._turn()
            last = {name for name in candidates(self.pool) if self._last_resort(name)}
            found = admit(
                self.pool, self.terms, claims=self.how.claims, accepted=self.how.accepted, judged=self.how.judged,
                again=self.how.again, stopper=self.stopper, notify=self.notify, progress=self.progress,
            )  # fmt: skip
            self._turn()
            fell = [one for one in found.judged if one.name in last]
            refused = 0 if found.admitted else refused + len(fell)
            if refused >= IN_A_ROW:
                raise Inconclusive(self._ended(found, refused))
            if found.judged and not (found.admitted or fell) and self._by != "anew":
                self._refused(found)
        made = self._admitted - before
        if made > 0:
            self._refuse_faster((time.perf_counter() - begin) / made)

    def _refused(self, found: Admission) -> None:
        """Make sets another way where all that the generator drew was refused, unless it alone was asked for."""
        if self.how.by is None and any(self.pool.ledger.member(one.name).bases for one in found.judged):
            self._go_anew("what the generator draws is not admitted")

    def _last_resort(self, name: str) -> bool:
        """Whether a candidate was made as it was asked for, or from fresh weights: no other way to make one is left."""
        return self.how.by is not None or not self.pool.ledger.member(name).bases

    def _ended(self, found: Admission, refused: int) -> str:
        """Why no more sets are made, and what serves."""
        now = self.pool.serving
        serves = "nothing serves" if now is None else f"{now.name} goes on serving as epoch {now.epoch}"
        made = "of the generator" if self.how.by == "generator" else "trained from fresh weights"
        return (
            f"{refused} sets {made} were refused in a row, the last one by {found.judged[-1].why}; {serves}, and "
            f"{len(self.pool.ahead)} admitted sets wait; {found.remedy}"
        )

    @property
    def _admitted(self) -> int:
        """Sets that wait, and those that served."""
        return len(self.pool.ahead) + len(self.pool.ledger.terms)

    def _turn(self) -> None:
        """Swap if something serves, that is due, and another set waits.

        Where what serves is exposed, any admitted set is better, so one that was not judged against that serves, too,
        until another is judged; for any other reason only a judged one does.
        """
        now = self.pool.serving
        if now is None:
            return
        reading = self.reading()
        why, stolen = due((*self.how.triggers, exposed), reading), reading.exposure is not None
        if why and len(self.pool.ahead) > (0 if stolen else len(self.pool.unjudged)):
            self._swap(now.epoch, "; ".join(why), unjudged=stolen)

    def _draw(self, missing: int) -> None:
        """New candidates: trained anew where the generator draws none that works, unless it was asked for."""
        if self.how.by is None and self._by is None and self._refused_of_generator():
            self._go_anew(f"the last {IN_A_ROW} that the generator drew were refused")
        by = self.how.by or self._by
        given: dict[str, Any] = {
            "immunise": self.how.immunise,
            "stopper": self.stopper,
            "notify": self.notify,
        }
        try:
            draw(self.pool, self.terms, missing, by=by, **given)
        except Inconclusive as error:
            if by is not None:
                raise
            self._go_anew(str(error))
            draw(self.pool, self.terms, missing, by="anew", **given)

    def _refused_of_generator(self) -> bool:
        """Whether the last that it drew, as many as end a filling, were judged and refused, by this call or another."""
        drawn = [member for member in self.pool.ledger.members if member.bases]
        return len(drawn) >= IN_A_ROW and all(member.state == "refused" for member in drawn[-IN_A_ROW:])

    def _go_anew(self, why: str) -> None:
        self._by = "anew"
        self.notify(f"note: {why}; sets are trained anew from here on")

    def _refuse_faster(self, made_in_s: float) -> None:
        """`UsageError` for a schedule that empties the pool, before anything serves; later it is told."""
        try:
            refuse_faster(self.how.triggers, made_in_s)
        except UsageError as error:
            if not self.pool.ledger.terms:
                raise
            self.notify(f"note: {error}")

    def begin(self) -> None:
        """Make sure that something serves, and that as many sets wait as are wanted.

        `Inconclusive` where too few sets are admitted; one that was admitted serves nevertheless.
        """
        try:
            self.fill()
        except Inconclusive:
            if self.pool.serving is None and len(self.pool.ahead) > len(self.pool.unjudged):
                self._swap(None, "the first")
            raise
        if self.pool.serving is None:
            self._swap(None, "the first")
            self.fill()

    def look(self) -> bool:
        """Swap if that is due, and make up for it; whether all that was due was done.

        `Inconclusive` where no set is admitted and none waits, so that there is nothing to swap in.
        """
        if self.pool.serving is None:
            self.notify(
                "note: nothing serves, for what did was retired; let another set serve by holdfast rotate swap"
            )
            return False
        try:
            self.fill()
        except InUse as error:
            self.notify(f"note: {error}")
            return False
        except Inconclusive as error:
            if not self.pool.ahead:
                raise
            self.notify(f"note: {error}")
            return False
        return True

    def turn(self, *, looks: int | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        """Look again and again, for good unless told how often."""
        while looks is None or looks > 0:
            sleep(_LOOKS_S if self.look() else _PAUSE_S)
            looks = None if looks is None else looks - 1

    def reading(self) -> Reading:
        """What the ledger says of the set that serves."""
        term = self.pool.ledger.terms[-1]
        mark = self.pool.ledger.member(term.name).exposed
        since = datetime.fromisoformat(term.since)
        return Reading(
            max(term.answers.values(), default=0),
            max((datetime.now(UTC) - since).total_seconds(), 0.0),
            exposure=None if mark is None else mark.why,
        )

    def _swap(self, epoch: int | None, why: str, *, unjudged: bool = False) -> None:
        old = self.pool.unjudged
        with self.stopper.finishing():
            now = self.pool.swap(epoch=epoch, why=why, choose=next_set, unjudged=unjudged)
        self.notify(f"{now.name} serves as epoch {now.epoch}: {why}")
        if now.name in old:
            self.notify(f"note: {UNJUDGED}")
