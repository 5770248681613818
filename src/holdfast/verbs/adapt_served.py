"""What a server has beside the model that is adapted: its guard, which is calibrated for the candidate, and its pool of
parameter sets.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from holdfast.adaptation.server_state import ServerState, server_state
from holdfast.core.errors import Inconclusive, InUse, Remedy, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.guard.calibration import Calibration, calibrated, read_calibration, write_calibration
from holdfast.guard.detectors.outputs import Fitted, Mahalanobis
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.query_rule import derived_key, guard_key
from holdfast.guard.rules import QUERIES
from holdfast.guard.state_in_memory import MemoryState
from holdfast.io.models.models import ROTATING
from holdfast.io.remote.operator_port import Json, OperatorPort
from holdfast.recipes.training.recipe import Recipe
from holdfast.reports.words import amount
from holdfast.reports.write import refuse_unwritable
from holdfast.rotation import Immunise, loaded
from holdfast.rotation.ledger import HEAD, LEDGER, SETS
from holdfast.rotation.ledger_state import State
from holdfast.rotation.pool import NAME_DIGITS, Pool
from holdfast.rotation.steps.admit import AdmitRequest, admit
from holdfast.rotation.steps.rotation_request import RotateRequest, secret, state_of
from holdfast.rotation.steps.serving_set import swap
from holdfast.rotation.steps.set_measuring import set_subject
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.engine.progress import Notify, Progress
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.store.columns import content_digest
from holdfast.runs.store.files import POOL_MANIFEST, PRIVATE, refuse_shared
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import ExampleSelection
from holdfast.settings.guard_settings import GuardSettings, read_guard_settings
from holdfast.statistics.intervals import fewest_examples
from holdfast.verbs.adapt_comparison import LivePairs
from holdfast.verbs.calibrate import calibration_stream
from holdfast.verbs.harden import name_of
from holdfast.verbs.opening.guard import (
    bounds_of,
    calibration_path,
    guard_pipeline,
    query_radius,
    query_rule,
    served_digest,
    settings_without_queries,
    stored_calibration,
)
from holdfast.verbs.opening.models import pool_of
from holdfast.verbs.opening.recipes import candidates
from holdfast.verbs.opening.resolve import open_examples, open_subject
from holdfast.verbs.rotate import refuse_other_network, reopened
from holdfast.verbs.settings import Adapt, Calibrate, RotateSettings


def candidate_calibrations(settings: Calibrate) -> tuple[Calibration, Calibration] | None:
    """Return the calibration of the guard of the settings for the served model and the candidate `model` together, and
    the one for the candidate alone; None if the guard has no calibration or accepts the candidate already.

    What does not depend on the model, such as the radius of the query detector, stays the same. The other rules get
    thresholds at which all rules together fire on at most the share `false_positives` of benign inputs; those for both
    models are the larger ones, so that the share holds for each. Raises `UsageError` for a rule that is fitted on the
    outputs of the served model, because no other model can share its parameters.
    """
    path = Path(settings.guard or "guard.yaml")
    guard = read_guard_settings(path)
    before = stored_calibration(guard, path)
    if before is None:
        return None
    alone = _for_candidate(guard, path, before, _in_range(settings, guard).model_copy(update={"guard": None}))
    if alone is None:
        return None
    thresholds = {name: max(alone.thresholds[name], value) for name, value in before.thresholds.items()}
    both = replace(alone, models=(*before.models, *alone.models), thresholds=thresholds)
    return both, alone


def refuse_uncalibratable(settings: Calibrate) -> None:
    """Raise the error with which `candidate_calibrations` would fail for any candidate: for a rule that is fitted on
    outputs, for examples that the guard does not accept, or for so few that thresholds may not exist. `model` is the
    served model, for which the guard is calibrated as a test.
    """
    path = Path(settings.guard or "guard.yaml")
    guard = read_guard_settings(path)
    before = stored_calibration(guard, path)
    if before is None:
        return
    settings = _in_range(settings, guard).model_copy(update={"guard": None})
    pipeline = _shared(guard, path, before)
    fixed = [pipeline.rules[name].fixed for name in pipeline.calibrated]
    if all(fixed):
        return
    subject = open_subject(settings)
    examples = open_examples(settings, subject.model)
    n_rules, rate = fixed.count(False) + any(fixed), before.false_positives
    if len(examples) < (enough := fewest_examples(rate, n_rules)):
        raise UsageError(
            f"the guard is calibrated for the candidate on {len(examples):,} inputs; {enough:,} suffice for its "
            f"{amount(n_rules, 'rules')} at a false-positive rate of {100 * rate:g} %, and fewer may be too few; give "
            "data with more test examples, or calibrate the guard at a higher rate before",
            *_more_examples(settings, subject.model, enough),
        )
    with readied(subject, examples, torch.device("cpu")) as (target, _):
        calibrated(pipeline, calibration_stream(pipeline, target.logits, examples), rate)


def _more_examples(settings: Calibrate, model: Classifier, enough: int) -> tuple[Remedy, ...]:
    """Return the option that chooses the examples with a larger number, if the data have so many."""
    if settings.n is None and settings.sample is None:
        return ()
    everything = open_examples(settings, model, selection=ExampleSelection())
    if len(everything) < enough:
        return ()
    return (Remedy("sample", enough) if settings.n is None else Remedy("n", enough, option="-n"),)


def _in_range(settings: Calibrate, guard: GuardSettings) -> Calibrate:
    """Return the settings with the range of the inputs of the guard if they give none."""
    if "bounds" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"bounds": bounds_of(guard).bounds})


def _for_candidate(
    guard: GuardSettings, path: Path, before: Calibration, settings: Calibrate
) -> Calibration | None:
    subject = open_subject(settings)
    model = served_digest(subject)
    if model in before.models:
        return None
    pipeline = _shared(guard, path, before)
    if all(pipeline.rules[name].fixed for name in pipeline.calibrated):
        return replace(before, models=(model,))
    examples = open_examples(settings, subject.model)
    with readied(subject, examples, torch.device("cpu")) as (target, _):
        stream = calibration_stream(pipeline, target.logits, examples)
        _, found = calibrated(pipeline, stream, before.false_positives)
    return replace(
        found,
        guard=before.guard,
        models=(model,),
        data=examples.digest,
        thresholds={**before.thresholds, **found.thresholds},
        parameters=before.parameters,
    )


def _shared(guard: GuardSettings, path: Path, before: Calibration) -> GuardPipeline:
    """Return the guard whose fitted rules have a given threshold. Raises `UsageError` for a rule that is fitted on the
    outputs of the served model.
    """
    queries = None
    if guard.rules.queries is not None:
        radius, key = query_radius(guard.rules.queries, before), derived_key(guard_key(path), QUERIES)
        queries = query_rule(guard, radius, key, MemoryState())
    pipeline = guard_pipeline(guard, queries, before)
    rules = dict(pipeline.rules)
    for name, detector in pipeline.detectors.items():
        if isinstance(detector, Fitted):
            if not isinstance(detector, Mahalanobis) or detector.on != "inputs":
                raise UsageError(
                    f"the rule {name} of {path.name} is fitted on outputs of the served model, so that a candidate "
                    "cannot be served beside it; set its setting on to inputs, or remove the rule"
                )
            rules[name] = replace(rules[name], fixed=True)
    return replace(pipeline, rules=rules)


EARLIER, CANDIDATE = "guard.calibration.json", "candidate.calibration.json"
"""files in the folder of a run: the calibration before it, and the one for the candidate alone"""


def calibration_of(guard: Path) -> Path:
    """Return the path of the calibration of a guard, without links. Raises `TargetError` if it is outside of the folder
    of the guard, or if another user could change it or the guard.
    """
    refuse_shared(guard)
    place = calibration_path(read_guard_settings(guard), guard).resolve()
    if place.parent != guard.resolve().parent:
        raise TargetError(
            f"the calibration {str(place)!r} of {str(guard)!r} is not in the folder of the guard, and adapt writes to "
            "no other; remove the setting calibration, or give the name of a file in that folder, and calibrate again"
        )
    if place.exists():
        refuse_shared(place)
    return place


@dataclass(frozen=True)
class AdaptedGuard:
    """The guard in a file, and the place of its calibration."""

    guard: Path
    place: Path
    """path of the calibration when the run began"""
    folder: Path
    """folder of the run"""

    def store(self) -> None:
        """Store the present calibration in the folder of the run, if there is one."""
        if self.place.exists():
            write_calibration(read_calibration(self.place), self.folder / EARLIER, PRIVATE)

    def refuse_unfit(self, settings: Calibrate) -> None:
        """Raise the error with which `extend` would fail for any candidate, given the settings for the served model."""
        refuse_unwritable(self.place)
        refuse_uncalibratable(settings)

    def extend(self, settings: Calibrate) -> None:
        """Calibrate the guard for the served model and the candidate together, given the settings for the candidate."""
        if calibration_of(self.guard) != self.place:
            raise TargetError(
                f"the calibration of {str(self.guard)!r} was {str(self.place)!r} when the run began, and is another "
                "file now; restore the guard, or begin a new run"
            )
        found = candidate_calibrations(settings)
        if found is not None:
            both, alone = found
            write_calibration(alone, self.folder / CANDIDATE, PRIVATE)
            write_calibration(both, self.place)

    def rules(self, *, candidate: bool) -> GuardPipeline:
        """Return the guard without its query detector, calibrated for the candidate or for the earlier model."""
        own = [self.folder / CANDIDATE] if candidate else []
        stored = next((each for each in [*own, self.folder / EARLIER, self.place] if each.exists()), None)
        calibration = None if stored is None else read_calibration(stored)
        settings = settings_without_queries(read_guard_settings(self.guard))
        return replace(guard_pipeline(settings, None, calibration), outputs="logit")

    def accept_both(self) -> None:
        """Let the guard accept the candidate and the earlier model, which a worker opens that is replaced before the
        reload.
        """
        if self._extended:
            alone, before = read_calibration(self.folder / CANDIDATE), read_calibration(self.folder / EARLIER)
            write_calibration(replace(alone, models=(*before.models, *alone.models)), self.place)

    def accept_candidate(self) -> None:
        """Let the guard accept the candidate alone."""
        if self._extended:
            write_calibration(read_calibration(self.folder / CANDIDATE), self.place)

    def restore(self) -> None:
        """Write the calibration from before the run again."""
        if (self.folder / EARLIER).exists():
            write_calibration(read_calibration(self.folder / EARLIER), self.place)

    @property
    def _extended(self) -> bool:
        return (self.folder / CANDIDATE).exists()


_POLL_S = 0.5
"""seconds between two looks at the server"""
_PATIENCE_S = 180.0
"""seconds in which the server must serve a set that the ledger states"""


def begin(status: ServerState, settings: Adapt) -> Json:
    """Return the facts about the pool of a server with which an adaptation begins.

    Raises `UsageError` or `TargetError` for a pool that cannot be adapted.
    """
    state = status["pool"]
    stated = state.get("settings", {})
    path = Path(stated.get("pool", "."))
    if "pool" not in stated:
        raise TargetError(
            "the server does not state the folder of its pool; run adapt at a server of this version"
        )
    if not path.is_dir():
        raise TargetError(
            f"the folder of the pool, {str(path)!r}, is not on this machine; run adapt where the server runs"
        )
    for each in (path, path / POOL_MANIFEST, path / LEDGER, path / HEAD, path / SETS):
        if each.exists():  # a folder without them is refused below; the sets themselves are authenticated
            refuse_shared(each)
    if guard := stated.get("guard"):
        refuse_shared(Path(guard))
    adapted = AdaptedPool(path, state["set"], "", settings)
    pool = adapted.pool
    if all(member.name != state["set"] for member in pool.ledger.members):
        raise TargetError(
            f"{str(path)!r} does not contain the set {state['set']}, which the server serves; it is another pool. "
            "Restore the pool, or restart the server"
        )
    if not all(os.access(each, os.W_OK) for each in (path, path / SETS, pool.ledger.path)):
        raise TargetError(
            f"this process may not write to the pool in {str(path)!r}, to which the candidate is added; run adapt as "
            "the user who owns it"
        )
    if set(pool.ahead) <= set(pool.unjudged):
        draw = "" if pool.ahead or pool.candidates else f"holdfast rotate draw {pool.shown}, then "
        raise UsageError(
            f"no set waits in {str(path)!r} that was judged against all stolen sets, so none could serve if the "
            f"candidate were worse on live requests; admit sets first: {draw}holdfast rotate admit {pool.shown}"
        )
    adapted.refuse_other_architecture()
    return {"set": state["set"], "pool": str(path), "settings": dict(stated)}


@dataclass(eq=False)
class AdaptedPool:
    """A pool, the set of it from which the candidate is trained, and the run that does so."""

    path: Path
    incumbent: str
    """name of the set that served when the run began"""
    run: str
    settings: Adapt

    @cached_property
    def pool(self) -> Pool:
        """The pool in the folder, which is written to."""
        pool = pool_of(f"{ROTATING}{self.path}")
        assert pool is not None, "this is the address of a pool"
        return pool

    @cached_property
    def common(self) -> RotateRequest:
        """The properties that all sets of the pool share. Raises `UsageError` for another architecture or data."""
        own = RotateSettings(
            device=self.settings.device,
            trust_code=self.settings.trust_code,
            follow_links=self.settings.follow_links,
        )
        return reopened(self.pool, own)

    def refuse_other_architecture(self) -> None:
        """Raise `TargetError` if the model with which the pool was created does not have the tensors of its sets."""
        loaded(self.common.model, self.pool.weights(self.incumbent), self.incumbent)

    @cached_property
    def incumbent_subject(self) -> DescribedModel:
        """The set that served when the run began, as a model."""
        return self._subject(self.pool.weights(self.incumbent))

    def _subject(self, weights: Mapping[str, Any]) -> DescribedModel:
        sha = content_digest(weights)
        name = sha[:NAME_DIGITS]
        return set_subject(self.common, name, sha, loaded(self.common.model, weights, name))

    # --- the candidate

    @property
    def _stored(self) -> str:
        return f"adapted_{self.run}"

    @cached_property
    def candidate(self) -> DescribedModel:
        """The immunised candidate."""
        stored = self.pool.kept(self._stored)
        if stored is None:
            raise TargetError(
                f"{str(self.path)!r} no longer contains the candidate of this run; begin a new run"
            )
        return self._subject(stored.columns)

    @property
    def name(self) -> str:
        """Name of the candidate as a set of the pool."""
        return self.candidate.digest[:NAME_DIGITS]

    def immunise(self, hardened: Hardened) -> Json:
        """Train the candidate against examples computed on the stolen sets and on the set from which it was trained,
        and store it encrypted in the pool.
        """
        against = dict.fromkeys(
            each.name for each in self.pool.ledger.exposed() if not self.pool.ledger.member(each.name).deleted
        )
        against[self.incumbent] = None
        exposed = [self.common.of_set(self.pool, name) for name in against]
        common, rng = self.common, secret(self.pool).at("adapted", self.run)
        model = loaded(common.model, state_of(hardened.model), "of the candidate")
        # the one that trained it, so that the robustness that it gave is kept
        recipe = self._recipes(model)[hardened.card["recipe"]]
        with common.enough_threads():
            immunised = Immunise()(model, exposed, recipe, common.train, common.threat, rng=rng)
        self.pool.keep(self._stored, state_of(immunised), {"against": list(against)})
        return {"set": self.name, "digest": self.candidate.digest, "against": list(against)[-10:]}

    def refuse_other_network(self) -> None:
        """Raise `UsageError` for a recipe whose network is not that of the sets of the pool."""
        for name, recipe in self._recipes(self.common.model).items():
            refuse_other_network(recipe, name)

    def _recipes(self, model: Classifier) -> dict[str, Recipe]:
        """The recipes of which one trains the candidate, by their names."""
        given: Any = self.settings.recipe
        if not isinstance(given, Mapping):
            return {name_of(given): given}
        chosen = candidates(given, model, self.common.train.example_shape)
        return {each.name: each.recipe for each in chosen}

    def admit(self, progress: Progress, notify: Notify, again: str) -> Json:
        """Add the candidate to the pool, and let the gates of the pool judge it. `again` states how the run is resumed.

        The set from which it was trained is listed as stolen when it is admitted, as for every set that was made from
        another one, so that the server replaces that set.
        """
        weights = state_of(self.candidate.model)
        name = self.pool.add(
            weights, {"by": "adapt"}, bases=(self.incumbent,), why=f"hardened from {self.incumbent}"
        )
        request = AdmitRequest(self.pool, self.common, accepted=self.settings.accept_doubts, only=name)
        while self._state(name) == "candidate":
            try:
                admit(request, again=again, notify=notify, progress=progress, is_step=True)
                break
            except UsageError as error:  # a running rotation judges sets, and may have judged this one
                if not isinstance(error, InUse) and self._state(name) == "candidate":
                    raise
            time.sleep(_POLL_S)
        member = self.pool.ledger.member(name)
        facts = {"set": name, "why": member.why}
        if member.state in ("candidate", "refused"):
            facts["ends"] = f"the pool did not admit the set {name}: {member.why}"
        return facts

    def _state(self, name: str) -> State:
        return self.pool.ledger.member(name).state

    def drop(self) -> None:
        """Delete the stored candidate, which is a set of the pool or is not used."""
        self.pool.drop(self._stored)

    # --- the server

    def measure(self, pairs: LivePairs) -> Json:
        """Compare the candidate with the set from which it was trained on the inputs that the serving sets answer."""
        facts = pairs.watched(self._watched_s, lambda status: "")
        return {**facts, "ends": f"before the promotion, {facts['ends']}"} if "ends" in facts else facts

    @property
    def _watched_s(self) -> float:
        return seconds(self.settings.canary_time, "canary_time")

    def promote(self, port: OperatorPort) -> Json:
        """Let the admitted set serve, and wait until the server does so."""
        if self._state(self.name) == "admitted":  # the server may have swapped already
            try:
                self.pool.serve(self.name, f"adapted by the run {self.run}")
            except UsageError as error:
                if self._state(self.name) == "admitted":  # and it did not do so meanwhile
                    return {"set": self.name, "ends": error.message}
        fault = self._wait(port, serves=True)
        if fault:
            self._withdraw(fault)
            return {"set": self.name, "ends": fault}
        return {"set": self.name, "waiting": len(self.pool.ahead), "unjudged": len(self.pool.unjudged)}

    def _wait(self, port: OperatorPort, *, serves: bool) -> str:
        """Wait until the server serves the set, or no longer serves it. Return why it does not."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            state = server_state(port, of="pool")["pool"]
            if (state["set"] == self.name) is serves:
                return ""
            if serves and self._state(self.name) == "retired":
                return f"the set {self.name} was replaced before the server used it"
            if time.monotonic() > until:
                return (
                    f"the server did not change its set within {_PATIENCE_S:g} s {state['reason']}".rstrip()
                )
            time.sleep(_POLL_S)

    def watch(self, pairs: LivePairs, port: OperatorPort) -> Json:
        """Watch the set while it serves, and replace it if it is worse than the set from which it was trained."""
        serves = True

        def look(status: ServerState) -> str:
            nonlocal serves  # a trigger of the rotation may replace it
            serves = serves and status["pool"]["set"] == self.name
            return ""

        facts = {**pairs.watched(self._watched_s, look), "serves": serves}
        if "ends" in facts:
            self._withdraw(facts["ends"])
            facts["ends"] = f"after the promotion, {facts['ends']}"
            if late := self._wait(port, serves=False):
                raise TargetError(late)
        return facts

    def _withdraw(self, fault: str) -> None:
        """Let another admitted set serve, also one that was not judged against the set that is replaced."""
        serving = self.pool.serving
        if serving is None or serving.name != self.name:
            return
        try:
            swap(self.pool, f"{self.name} is withdrawn: {fault}", unjudged=True, epoch=serving.epoch)
        except Inconclusive as error:
            raise TargetError(
                f"the set {self.name} is worse on live requests ({fault}), and no other admitted set waits: it still "
                "serves. Draw and admit sets, then resume the run"
            ) from error
