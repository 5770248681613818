"""The step `run`: it performs all steps of a rotation, and then swaps parameter sets whenever a swap is due.

The loop keeps enough admitted sets in stock. Other processes record in the ledger which set serves and how many answers
it gave; this process reads the ledger, swaps, and produces new sets. A set that was not admitted never serves: without
an admitted set, the serving set is not swapped.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from holdfast.core.errors import Inconclusive, InUse, LostLoss, Need, Remedy, UsageError, refuse_unmet
from holdfast.rotation import Codec, Immunise, LatentDiffusion, refuse_faster
from holdfast.rotation.collecting import Basins, swapped
from holdfast.rotation.ledger_state import Serving
from holdfast.rotation.pool import Pool
from holdfast.rotation.rotating_model import Counters, Trigger, due_triggers, exposed
from holdfast.rotation.steps.admission_gates import IN_A_ROW, Admission
from holdfast.rotation.steps.admit import AdmitRequest, admission_time, admit, first_sizes, parsed_claim
from holdfast.rotation.steps.collect import Collected, CollectRequest, collect
from holdfast.rotation.steps.draw import FRESH, UPDATES, By, DrawRequest, TrainRequest, draw, train
from holdfast.rotation.steps.rotation_request import EVERY, FIRST, MOST, RotateRequest, trained_generator
from holdfast.rotation.steps.serving_set import UNJUDGED, swap
from holdfast.rotation.steps.set_measuring import MEASURED_LATER, planned_needs, sufficient, tolerance_text
from holdfast.runs.assess.expected_time import duration
from holdfast.runs.engine.identity import way_out
from holdfast.runs.engine.progress import Notify, Progress, Stopper, ignore, silent, stoppable

_INTERVAL_S, _PAUSE_S = (
    1.0,
    60.0,
)  # seconds between two checks of the ledger, and after one without a usable set


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop of a rotation, which swaps the serving set and produces new parameter sets."""

    triggers: tuple[Trigger, ...]
    """conditions under which the serving set is replaced; in addition, a stolen set is always replaced"""
    keep: int = 8
    """number of admitted sets that the loop keeps in stock"""
    immunise: Immunise | None = None
    by: By | None = None
    """how sets are produced; None for the generator until its sets are no longer admitted, and retraining after that"""
    claims: Sequence[str] = ()
    """gates in addition to the default ones"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """accepted doubts by name, with reasons"""
    n_judged: int = FIRST
    """number of held-out examples on which each set is judged first"""


@dataclass(frozen=True)
class RunRequest:
    """Settings of a whole rotation: the collection of parameter sets, the generator, the admission and the swaps."""

    collection: CollectRequest
    loop: LoopSettings
    codec: Codec = field(default_factory=Codec)
    diffusion: LatentDiffusion = field(default_factory=LatentDiffusion)
    once: bool = False
    """whether the call ends as soon as a set serves and enough admitted sets wait"""
    anyway: bool = False
    """whether a collection begins with data or a budget that are too small for the gates"""

    def needs(self) -> tuple[Need, ...]:
        """Return what the steps need."""
        common, loop = self.collection.common, self.loop
        gates = Need("admit", lambda: [parsed_claim(text) for text in loop.claims])
        if not self.collection.is_new:
            return (gates,)
        names = Need("collect", lambda: swapped(common.source, common.model))
        sets = Need("draw", self._refuse_one_set)
        return (names, sets, gates, *(() if self.anyway else (Need("admit", self.refuse_insufficient),)))

    def _refuse_one_set(self) -> None:
        """Raise `UsageError` if sets are to be generated from a collection of one set, which trains no generator."""
        source = self.collection.common.source
        if (
            self.loop.by == "generator"
            and source.runs == 1
            and not (isinstance(source, Basins) and source.sets > 1)
        ):
            raise UsageError(
                "the collection has one set, and a generator is trained on several; collect more runs",
                FRESH,
            )

    def refuse_insufficient(self) -> None:
        """Raise `UsageError` if there are too few training examples for the gates of an admission, or for an
        immunisation.
        """
        common, immunise, judged = self.collection.common, self.loop.immunise, self.loop.n_judged
        n_train, n_held_out = len(common.train), len(common.held_out)
        needs, texts = planned_needs(n_held_out, judged), []
        if any(need.widened for need in needs):
            need = sufficient(needs, judged)
            lost = " or ".join(f"{tolerance_text(need.tolerance)} of {need.gate}" for need in needs)
            enough = (
                f"; at least {EVERY * need:,} are needed"
                if need <= MOST
                else f", and never more than {MOST:,}"
            )
            texts.append(
                f"the gates of an admission need at least {need:,} held-out examples, and there are {n_held_out:,}, "
                f"one in {EVERY} of {n_train + n_held_out:,} training examples{enough}. {MEASURED_LATER}. With "
                f"fewer, a set that loses {lost} may pass"
            )
        batch = common.training.batch
        if immunise is not None and (updates := immunise.updates(n_train, batch)) < UPDATES:
            enough = f"{math.ceil(UPDATES * batch / immunise.share * EVERY / (EVERY - 1)):,}"
            texts.append(
                f"immunisation trains each set for {updates} updates, and has no effect below {UPDATES}, for which "
                f"{enough} training examples are enough in batches of {batch}; leave out --immunise"
            )
        if texts:
            raise UsageError("; ".join(texts), Remedy("anyway", True, reason="to start nevertheless"))

    def expected_time(self) -> str:
        """Return how long each step of a new rotation takes, as text."""
        common, sets = self.collection.common, self.loop.keep + 1
        runs, retraining = common.source.runs, self.loop.by == "retraining"
        sizes = first_sizes(self.loop.n_judged)
        judging = admission_time(common, sizes, sets, runs, 0 if retraining else runs)
        production = "a time that is not known in advance for the training of a generator"
        if retraining:
            production = (
                f"about {duration(sets * self.collection.seconds_for_each)} for training {sets} new sets"
            )
        immunising = "" if self.loop.immunise is None else " and for immunising them"
        return (
            f"{self.collection.expected_time()}; then, not limited by the budget, {production}{immunising}, and "
            f"{judging} for judging {sets} sets, more if sets are refused. The first admitted set serves at once"
        )


@dataclass(frozen=True)
class Rotated:
    """State of the pool at the end of the step `run` of a rotation."""

    serving: Serving | None
    """the serving set; None if no set serves"""
    waiting: int
    """number of admitted sets that wait to serve"""
    pool: Pool = field(repr=False, compare=False)


def run(
    request: RunRequest, *, again: str = "", notify: Notify = ignore, progress: Progress = silent
) -> Rotated:
    """Collect parameter sets, train a generator if needed, start serving, and then swap sets whenever a swap is due,
    until the call is stopped.

    `again` states how a stopped call is resumed. Raises `Inconclusive` if too few sets are admitted.
    """
    again = again or way_out("", request.collection.path)
    with stoppable(again) as stopper:
        collection = request.collection
        refuse_unmet(request.needs())
        if collection.is_new:
            if not request.anyway:
                collection = replace(collection, least_updates=UPDATES)
            if notify is not ignore:
                notify(f"expected total time: {request.expected_time()}")
        collected = collect(collection, again=again, notify=notify, progress=progress, is_step=True)
        pool = collected.pool
        settings = replace(request.loop, by=_train_if_needed(request, collected, again, notify))
        loop = RotationLoop(pool, request.collection.common, settings, again, stopper, notify, progress)
        loop.fill()
        notify(f"pool: {pool.path}")
        if not request.once:
            now = pool.serving
            serves = f"{now.name} serves as epoch {now.epoch}" if now else "no set serves"
            notify(
                f"{serves}, {len(pool.ahead)} wait; from now on sets are swapped whenever a swap is due, until Ctrl-C"
            )
            loop.watch()
    return Rotated(pool.serving, len(pool.ahead), pool)


def _train_if_needed(request: RunRequest, collected: Collected, again: str, notify: Notify) -> By | None:
    """Train a generator if sets are to be sampled from one and there is none.

    Returns how sets are produced: as requested, or by retraining if that training failed and nothing was requested.
    """
    by, pool = request.loop.by, collected.pool
    if by == "retraining" or collected.sets == 1 or trained_generator(pool) is not None:
        return by
    training = TrainRequest(pool, request.collection.common, request.codec, request.diffusion)
    try:
        train(training, again=again, notify=notify)
    except (Inconclusive, LostLoss) as error:
        if by is not None:
            raise
        notify(f"note: {error.message}; sets are trained from fresh random weights")
        return "retraining"
    return by


@dataclass
class RotationLoop:
    """The loop of a rotation: it swaps the serving set when a swap is due, and replaces sets that were used."""

    pool: Pool
    common: RotateRequest
    """the settings that all sets of the pool share"""
    settings: LoopSettings
    again: str = ""
    """text that states how a stopped step is resumed"""
    stopper: Stopper = field(default_factory=Stopper)
    notify: Notify = ignore
    progress: Progress = silent
    _by: By | None = None

    def _serve_first(self) -> None:
        """Let an admitted set serve if no set serves yet."""
        if self.pool.serving is None and len(self.pool.ahead) > len(self.pool.unjudged):
            self._swap(None, "the first")

    def watch(self, *, checks: int | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        """Check repeatedly whether a swap is due, `checks` times or, if it is None, without an end."""
        while checks is None or checks > 0:
            sleep(_INTERVAL_S if self.check() else _PAUSE_S)
            checks = None if checks is None else checks - 1

    def check(self) -> bool:
        """Swap the serving set if a trigger fires, and produce a new set for each one that was used. Return whether
        everything was done.

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
            self.notify(f"note: {error.on_command_line()}")
            return False
        except Inconclusive as error:
            if not self.pool.ahead:
                raise
            self.notify(f"note: {error.on_command_line()}")
            return False
        return True

    def fill(self) -> None:
        """Produce and admit parameter sets until enough sets wait that were tested against all stolen sets. If no set
        serves, the first one that is admitted serves at once.

        If the sets of the generator are refused, sets are trained from fresh random weights; after five refusals of
        such sets in a row, `Inconclusive` is raised. Because this may take long, triggers are evaluated between the
        steps, each of which is a draw of all missing sets or one admission. A set that a swap uses in the meantime is
        replaced in the next call.
        """
        begin, n_before, refused, settings = time.perf_counter(), self._admitted, 0, self.settings
        never_served = not self.pool.ledger.terms
        self._serve_first()
        self.swap_if_due()
        goal = n_before + max(settings.keep + (self.pool.serving is None) - len(self.pool.ahead), 0)
        while (missing := goal - self._admitted) > 0 or self.pool.unjudged:
            if not (self.pool.candidates or self.pool.unjudged):
                self._draw(missing)
                self.swap_if_due()
            last = {name for name in self.pool.candidates if self._last_resort(name)}
            request = AdmitRequest(
                self.pool, self.common, settings.claims, settings.accepted, settings.n_judged,
                until_admitted=self.pool.serving is None,
            )  # fmt: skip
            admission = admit(
                request, again=self.again, notify=self.notify, progress=self.progress, is_step=True
            )
            self._serve_first()
            self.swap_if_due()
            judged_last_resort = [judged for judged in admission.judged if judged.name in last]
            refused = 0 if admission.admitted else refused + len(judged_last_resort)
            if refused >= IN_A_ROW:
                raise Inconclusive(self._end_message(admission, refused))
            if (
                admission.judged
                and not (admission.admitted or judged_last_resort)
                and self._by != "retraining"
                and settings.by is None
                and any(self.pool.ledger.member(judged.name).bases for judged in admission.judged)
            ):
                self._retrain("the generated sets were not admitted")
        n_admitted = self._admitted - n_before
        if n_admitted > 0:
            self._refuse_faster((time.perf_counter() - begin) / n_admitted, strictly=never_served)

    @property
    def _admitted(self) -> int:
        """Number of sets that were admitted: those that wait and those that served."""
        return len(self.pool.ahead) + len(self.pool.ledger.terms)

    def _last_resort(self, name: str) -> bool:
        """Whether no other way is left to produce sets: `by` is set, or the candidate was retrained."""
        return self.settings.by is not None or not self.pool.ledger.member(name).bases

    def _end_message(self, admission: Admission, refused: int) -> str:
        """The message on why no more sets are produced, and which set serves."""
        serving = self.pool.serving
        serves = (
            "no set serves"
            if serving is None
            else f"{serving.name} remains the serving set, in epoch {serving.epoch}"
        )
        kind = "of the generator" if self.settings.by == "generator" else "trained from fresh weights"
        return (
            f"{refused} sets {kind} were refused in a row, the last one because of {admission.judged[-1].why}; "
            f"{serves}, and {len(self.pool.ahead)} admitted sets are waiting; {admission.remedy}"
        )

    def _refuse_faster(self, produced_in_s: float, *, strictly: bool) -> None:
        """Raise `UsageError` if the triggers would empty the pool; unless `strictly`, only warn."""
        try:
            refuse_faster(self.settings.triggers, produced_in_s)
        except UsageError as error:
            if strictly:
                raise
            self.notify(f"note: {error.on_command_line()}")

    # --- new sets

    def _draw(self, missing: int) -> None:
        """Produce candidates; train them from fresh weights if no generated set is usable, unless `by` is set.

        While no set serves, only one is trained from fresh weights, so that it can serve before the others are trained.
        """
        if self.settings.by is None and self._by is None and self._refused_of_generator():
            self._retrain(f"the last {IN_A_ROW} generated sets were refused")
        by = self.settings.by or self._by
        generated = by != "retraining" and trained_generator(self.pool) is not None
        sets = missing if generated or self.pool.serving is not None else 1
        request = DrawRequest(self.pool, self.common, sets, by, self.settings.immunise)
        try:
            draw(request, again=self.again, notify=self.notify)
        except Inconclusive as error:
            if request.by is not None:
                raise
            self._retrain(error.message)
            sets = missing if self.pool.serving is not None else 1
            draw(replace(request, by="retraining", sets=sets), again=self.again, notify=self.notify)

    def _refused_of_generator(self) -> bool:
        """Whether the last five generated sets were judged and refused."""
        generated = [member for member in self.pool.ledger.members if member.bases]
        return len(generated) >= IN_A_ROW and all(
            member.state == "refused" for member in generated[-IN_A_ROW:]
        )

    def _retrain(self, reason: str) -> None:
        self._by = "retraining"
        self.notify(f"note: {reason}; from now on sets are trained from fresh weights")

    # --- swaps

    def swap_if_due(self) -> None:
        """Swap the serving set if a trigger fires, such as a theft or an age limit, and another admitted set waits.

        A stolen serving set is replaced by any admitted set that waits, even by one that was not judged against it. For
        other reasons, only sets are used that were judged against all stolen sets.
        """
        serving = self.pool.serving
        if serving is None:
            return
        counters = self.counters()
        reasons, stolen = (
            due_triggers((*self.settings.triggers, exposed), counters),
            counters.exposure is not None,
        )
        if reasons and len(self.pool.ahead) > (0 if stolen else len(self.pool.unjudged)):
            self._swap(serving.epoch, "; ".join(reasons), unjudged=stolen)

    def counters(self) -> Counters:
        """Return the age and the number of answers of the serving set from the ledger. The triggers of swaps are
        evaluated on these values.
        """
        term = self.pool.ledger.terms[-1]
        exposure = self.pool.ledger.member(term.name).exposed
        since = datetime.fromisoformat(term.since)
        return Counters(
            max(term.answers.values(), default=0),
            # at least 0, because the clock may have been set back
            max((datetime.now(UTC) - since).total_seconds(), 0.0),
            exposure=None if exposure is None else exposure.why,
        )

    def _swap(self, epoch: int | None, reason: str, *, unjudged: bool = False) -> None:
        with self.stopper.finishing():
            swapped = swap(self.pool, reason, unjudged=unjudged, epoch=epoch)
        self.notify(f"{swapped.name} serves as epoch {swapped.epoch}: {reason}")
        if swapped.unjudged:
            self.notify(f"note: {UNJUDGED}")
