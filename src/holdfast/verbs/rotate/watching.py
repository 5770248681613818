"""Keeps a rotation running: enough admitted sets in stock, and a swap whenever a trigger fires.

Other processes record in the ledger which set serves and how many answers it gave; this one reads the ledger, swaps,
and makes new sets. A timer never causes a set that was not admitted to serve: without an admitted set, the serving
set stays.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from holdfast.core.errors import Inconclusive, InUse, UsageError
from holdfast.engine.progress import Notify, Progress, ignore, silent
from holdfast.engine.signals import Stopper
from holdfast.rotation import Immunise, next_set, refuse_faster
from holdfast.rotation.triggers import Counters, Trigger, due_triggers, exposed
from holdfast.store.pool import Pool
from holdfast.verbs.rotate.admission import admit
from holdfast.verbs.rotate.drawing import By, candidates, draw
from holdfast.verbs.rotate.request import FIRST, RotateRequest
from holdfast.verbs.rotate.status import UNJUDGED
from holdfast.verbs.rotate.verdicts import IN_A_ROW, Admission

_LOOKS_S, _PAUSE_S = 1.0, 60.0  # seconds between two reads of the ledger, and after one without a usable set


@dataclass(frozen=True)
class LoopSettings:
    """Settings of a running rotation."""

    triggers: tuple[Trigger, ...]
    """when the serving set is replaced; a theft always replaces it"""
    keep: int = 8
    """number of admitted sets in stock"""
    immunise: Immunise | None = None
    by: By | None = None
    """how sets are made; None uses the generator until its sets are not admitted any more"""
    claims: Sequence[str] = ()
    """gates in addition to the default ones"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """accepted doubts with reasons"""
    judged: int = FIRST
    """first number of held-out examples for judging a set"""
    again: str = ""
    """command that resumes a stopped call"""


@dataclass
class RotationLoop:
    """A process that keeps a rotation running."""

    pool: Pool
    request: RotateRequest
    how: LoopSettings
    stopper: Stopper = field(default_factory=Stopper)
    notify: Notify = ignore
    progress: Progress = silent
    _by: By | None = None

    def fill(self) -> None:
        """Draw and admit until enough sets wait that were judged against all stolen sets, else raise `Inconclusive`.

        If the sets of the generator are refused, sets are trained from fresh random weights; five refusals of those
        in a row end the call. This may take long, so triggers are evaluated between the steps, each of which is a
        draw of all missing sets or one admission. A set that a swap uses in the meantime is replaced in the next
        call.
        """
        begin, before, refused = time.perf_counter(), self._admitted, 0
        self._turn()
        goal = before + max(self.how.keep - len(self.pool.ahead), 0)
        while (missing := goal - self._admitted) > 0 or self.pool.unjudged:
            if not (candidates(self.pool) or self.pool.unjudged):
                self._draw(missing)
                self._turn()
            last = {name for name in candidates(self.pool) if self._last_resort(name)}
            admission = admit(
                self.pool, self.request, claims=self.how.claims, accepted=self.how.accepted, judged=self.how.judged,
                again=self.how.again, stopper=self.stopper, notify=self.notify, progress=self.progress,
            )  # fmt: skip
            self._turn()
            fell = [one for one in admission.judged if one.name in last]
            refused = 0 if admission.admitted else refused + len(fell)
            if refused >= IN_A_ROW:
                raise Inconclusive(self._ended(admission, refused))
            if admission.judged and not (admission.admitted or fell) and self._by != "anew":
                self._refused(admission)
        n_admitted = self._admitted - before
        if n_admitted > 0:
            self._refuse_faster((time.perf_counter() - begin) / n_admitted)

    def _refused(self, found: Admission) -> None:
        """Train sets from fresh weights from now on if all sets of the generator were refused, unless `by` is set."""
        if self.how.by is None and any(self.pool.ledger.member(one.name).bases for one in found.judged):
            self._go_anew("the generated sets were not admitted")

    def _last_resort(self, name: str) -> bool:
        """Whether no other way is left to make sets: `by` is set, or the candidate was trained from fresh weights."""
        return self.how.by is not None or not self.pool.ledger.member(name).bases

    def _ended(self, found: Admission, refused: int) -> str:
        """The message on why no more sets are made, and which set serves."""
        now = self.pool.serving
        serves = (
            "no set serves" if now is None else f"{now.name} remains the serving set, in epoch {now.epoch}"
        )
        kind = "of the generator" if self.how.by == "generator" else "trained from fresh weights"
        return (
            f"{refused} sets {kind} were refused in a row, the last one because of {found.judged[-1].why}; "
            f"{serves}, and {len(self.pool.ahead)} admitted sets are waiting; {found.remedy}"
        )

    @property
    def _admitted(self) -> int:
        """Number of sets that were admitted: those that wait and those that served."""
        return len(self.pool.ahead) + len(self.pool.ledger.terms)

    def _turn(self) -> None:
        """Swap if a set serves, a trigger fires, and another set waits.

        A stolen serving set is replaced by any admitted set, even by one that was not judged against it, until a
        judged one is available. For other reasons only judged sets are used.
        """
        now = self.pool.serving
        if now is None:
            return
        reading = self.reading()
        why, stolen = due_triggers((*self.how.triggers, exposed), reading), reading.exposure is not None
        if why and len(self.pool.ahead) > (0 if stolen else len(self.pool.unjudged)):
            self._swap(now.epoch, "; ".join(why), unjudged=stolen)

    def _draw(self, missing: int) -> None:
        """Make candidates; train them from fresh weights if no generated set is usable, unless `by` is set."""
        if self.how.by is None and self._by is None and self._refused_of_generator():
            self._go_anew(f"the last {IN_A_ROW} generated sets were refused")
        by = self.how.by or self._by
        options: dict[str, Any] = {
            "immunise": self.how.immunise,
            "stopper": self.stopper,
            "notify": self.notify,
        }
        try:
            draw(self.pool, self.request, missing, by=by, **options)
        except Inconclusive as error:
            if by is not None:
                raise
            self._go_anew(str(error))
            draw(self.pool, self.request, missing, by="anew", **options)

    def _refused_of_generator(self) -> bool:
        """Whether the last five generated sets were judged and refused."""
        drawn = [member for member in self.pool.ledger.members if member.bases]
        return len(drawn) >= IN_A_ROW and all(member.state == "refused" for member in drawn[-IN_A_ROW:])

    def _go_anew(self, why: str) -> None:
        self._by = "anew"
        self.notify(f"note: {why}; from now on sets are trained from fresh weights")

    def _refuse_faster(self, made_in_s: float) -> None:
        """Raise `UsageError` if the triggers would empty the pool and nothing has served yet; later only warn."""
        try:
            refuse_faster(self.how.triggers, made_in_s)
        except UsageError as error:
            if not self.pool.ledger.terms:
                raise
            self.notify(f"note: {error}")

    def begin(self) -> None:
        """Make sure that a set serves and that enough sets wait.

        Raises `Inconclusive` if too few sets are admitted; if one was admitted, it serves nevertheless.
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
        """Swap if a trigger fires, and replace the used set. Returns whether everything was done.

        Raises `Inconclusive` if no set is admitted and none waits, so that no swap is possible.
        """
        if self.pool.serving is None:
            self.notify(
                "note: no set serves, because the last one was retired; start another with holdfast rotate swap"
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
        """Call `look` repeatedly, without an end or `looks` times."""
        while looks is None or looks > 0:
            sleep(_LOOKS_S if self.look() else _PAUSE_S)
            looks = None if looks is None else looks - 1

    def reading(self) -> Counters:
        """The state of the serving set from the ledger."""
        term = self.pool.ledger.terms[-1]
        mark = self.pool.ledger.member(term.name).exposed
        since = datetime.fromisoformat(term.since)
        return Counters(
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
