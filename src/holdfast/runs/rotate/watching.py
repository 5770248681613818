"""Keeping a pool turning: enough admitted sets ahead, and a swap whenever one is due.

What serves, and to whom, other processes say in the ledger; this one reads it, swaps and makes new sets. A set that was
not admitted never serves because a timer rang: where nothing is admitted, what serves goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from holdfast.core.errors import Inconclusive, InUse, UsageError
from holdfast.rotation import Immunise, refuse_faster
from holdfast.rotation.triggers import Reading, Trigger, due, exposed
from holdfast.runs.hardening import Told, unheard
from holdfast.runs.order import Progress, silent
from holdfast.runs.rotate.admission import IN_A_ROW, admit
from holdfast.runs.rotate.drawing import By, candidates, draw
from holdfast.runs.rotate.status import UNJUDGED, next_judged, unjudged
from holdfast.runs.rotate.terms import FIRST, Terms
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
    told: Told = unheard
    progress: Progress = silent
    _by: By | None = None

    def fill(self) -> None:
        """Draw and admit until enough sets wait, judged by all that leaked; `Inconclusive` after five refusals.

        That may take long, so what calls for a swap is looked for between its steps, which are one drawing of all that
        is missing, and one admission. What a swap takes meanwhile is made by the next call, so that this one ends.
        """
        begin, before, refused = time.perf_counter(), self._admitted, 0
        self._turn()
        goal = before + max(self.how.keep - len(self.pool.ahead), 0)
        while (missing := goal - self._admitted) > 0 or unjudged(self.pool):
            if not (candidates(self.pool) or unjudged(self.pool)):
                self._draw(missing)
                self._turn()
            found = admit(
                self.pool, self.terms, claims=self.how.claims, accepted=self.how.accepted, judged=self.how.judged,
                again=self.how.again, stopper=self.stopper, told=self.told, progress=self.progress,
            )  # fmt: skip
            self._turn()
            refused = 0 if found.admitted else refused + len(found.judged)
            if refused >= IN_A_ROW and (self.how.by is not None or self._by == "anew"):
                raise Inconclusive(found.kept_out)
            if refused and self.how.by is None and self._by != "anew":
                self._go_anew("what the generator draws is not admitted")
                refused = 0
        made = self._admitted - before
        if made > 0:
            self._refuse_faster((time.perf_counter() - begin) / made)

    @property
    def _admitted(self) -> int:
        """Sets that wait, and those that served."""
        return len(self.pool.ahead) + len(self.pool.ledger.terms)

    def _turn(self) -> None:
        """Swap if something serves, that is due, and another set waits."""
        now = self.pool.serving
        why = due((*self.how.triggers, exposed), self.reading()) if now else ()
        if now and why and self.pool.ahead:
            self._swap(now.epoch, "; ".join(why))

    def _draw(self, missing: int) -> None:
        """New candidates: trained anew where the generator draws none that works, unless it was asked for."""
        if self.how.by is None and self._by is None and self._refused_of_generator():
            self._go_anew(f"the last {IN_A_ROW} that the generator drew were refused")
        by = self.how.by or self._by
        given: dict[str, Any] = {"immunise": self.how.immunise, "stopper": self.stopper, "told": self.told}
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
        self.told(f"note: {why}; sets are trained anew from here on")

    def _refuse_faster(self, made_in_s: float) -> None:
        """`UsageError` for a schedule that empties the pool, before anything serves; later it is told."""
        try:
            refuse_faster(self.how.triggers, made_in_s)
        except UsageError as error:
            if not self.pool.ledger.terms:
                raise
            self.told(f"note: {error}")

    def begin(self) -> None:
        """Make sure that something serves, and that as many sets wait as are wanted."""
        self.fill()
        if self.pool.serving is None:
            self._swap(None, "the first")
            self.fill()

    def look(self) -> bool:
        """Swap if that is due, and make up for it; whether all that was due was done."""
        if self.pool.serving is None:
            self.told(
                "note: nothing serves, for what did was retired; let another set serve by holdfast rotate swap"
            )
            return False
        try:
            self.fill()
        except (Inconclusive, InUse) as error:
            self.told(f"note: {error}")
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
            exposure="" if mark is None else mark.why,
        )

    def _swap(self, epoch: int | None, why: str) -> None:
        old = unjudged(self.pool)
        with self.stopper.finishing():
            now = self.pool.swap(epoch=epoch, why=why, choose=partial(next_judged, self.pool))
        self.told(f"{now.name} serves as epoch {now.epoch}: {why}")
        if now.name in old:
            self.told(f"note: {UNJUDGED}")
