"""Adapts the model of a running server: the steps behind `holdfast adapt`."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from holdfast.adaptation.journal import (
    HARDENING,
    OF_FILE,
    OF_POOL,
    Adapted,
    Journal,
    concluded,
    facts_text,
    open_journal,
)
from holdfast.adaptation.server_state import (
    Flagged,
    ServerState,
    approval_of,
    disagreeing,
    monitor_state,
    read_flagged,
    screened,
    server_state,
)
from holdfast.core.batch import Batch, Data, TrainingData
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, Need, TargetError, UsageError, refuse_unmet
from holdfast.core.types import Labels, Mask
from holdfast.gates.grammar import Claim, parse
from holdfast.gates.judging import Doubts, Judgement, judge, judged_estimate
from holdfast.generators.networks import names_generator
from holdfast.guard.guard import GuardPipeline
from holdfast.io.data.arrays import selected_rows
from holdfast.io.data.data import selected
from holdfast.io.files import content_of_file
from holdfast.io.models.factories import names_code
from holdfast.io.remote.operator_port import Json, OperatorPort, Refusal, read_key
from holdfast.reports.words import strict
from holdfast.reports.write import refuse_unwritable
from holdfast.rotation.collecting import rows_of
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.documents.stored_runs import new_folder
from holdfast.runs.engine.identity import way_out
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.harness.target import PreparedModel
from holdfast.runs.store.files import mode_of, refuse_shared, usable, write_atomically
from holdfast.runs.store.folder import read_chain
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import InputSpace, ModelSource
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.settings.serve_settings import ALARM, NOW, is_public
from holdfast.statistics.intervals import paired_difference
from holdfast.verbs import adapt_served
from holdfast.verbs.adapt_comparison import LivePairs, Samples, Side, read_samples
from holdfast.verbs.adapt_served import CANDIDATE, EARLIER, AdaptedGuard, AdaptedPool, calibration_of
from holdfast.verbs.checked_settings import composed
from holdfast.verbs.configuration import canonical_settings
from holdfast.verbs.harden import ForHardening, hardened, needs_of_hardening
from holdfast.verbs.opening.arguments import gradients
from holdfast.verbs.opening.guard import input_storage
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Adapt, Calibrate, Doctor, Harden

GATES = ("regression <= 0 vs baseline", "clean_accuracy_drop <= 0.02 vs baseline")
"""Gates if none are given."""
_SUFFIX = ".safetensors"
_POLL_S, _LIFE_S = 0.5, 15.0
"""seconds between two looks at the server, and between two signs of life"""
_END_S = 3.0
"""seconds in which the server must note the end of a run, which it notices otherwise after 60 s"""
_PATIENCE_S = 180.0
"""seconds for which a canary may start, and a worker may take the promoted model"""
_TRUSTED, _SCREENED = 2000, 2000
"""largest numbers of trusted and of training examples in the nearest-neighbour screen"""
_TESTED = 10_000
"""largest number of test examples on which clean accuracies are compared"""
_BATCH = 256
_INCUMBENT, _CANDIDATE = "incumbent.safetensors", "candidate.safetensors"
_OPENING = ({*ModelSource.model_fields, *InputSpace.model_fields} | {"guard"}) - {"trust_code"}
"""settings that are taken from the server; others, such as data, could name code"""


class _NotReloaded(TargetError):
    """The server did not reload the model."""


class _Ended(Exception):
    """The run ends here."""


@gradients()
def adapted(
    settings: Adapt,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
) -> Adapted:
    """Take the steps of an adaptation, or those that are left of a run that is resumed, and return how it ended."""
    if settings.server is None:
        raise UsageError(
            "the address of the operator's port is missing; give its URL, as in http://127.0.0.1:8081"
        )
    if names_code(settings.server) or names_generator(settings.server):
        what = "a file of code, such as that of a generator" if names_code(settings.server) else "a generator"
        raise UsageError(
            f"{settings.server} is {what}, and adapt replaces the classifier of a running server by an accuracy on "
            "labels, which a generator does not have; monitor its samples with holdfast monitor, and train it again "
            "after an audit (holdfast audit generator)"
        )
    if settings.data is None:
        raise UsageError("data is missing; give examples for the training and the assessments")
    for gate in settings.gates:
        parse(gate)
    if settings.key_file is None and is_public(urlsplit(settings.server).hostname or "localhost"):
        raise UsageError(
            f"{settings.server} is not an address of this machine, and a server there must prove that it is yours; "
            "start it with --keys, and give a file with a key of the scope adapt as the key file"
        )
    port = OperatorPort(settings.server, None if settings.key_file is None else read_key(settings.key_file))
    config = {**canonical_settings(settings), "server": settings.server}
    place = new_folder("adapt", digest(canonical(config))) if folder is None else Path(folder)
    with open_journal(place, config, resume=resume) as journal:
        if journal.stored().outcome is None:
            run = _Adaptation(settings, journal, port, progress, notify)
            with _signs_of_life(port, journal.run):
                run.finish()
        return Adapted.of(journal.stored())


@contextmanager
def _signs_of_life(port: OperatorPort, run: str) -> Iterator[None]:
    """Context manager in which the run holds the server. Raises `Refusal` while another run holds it."""
    body = {"run": run, "step": None}
    port.post("/adaptation", body)
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(_LIFE_S):
            with suppress(
                HoldfastError
            ):  # of a server that restarts; the next step reports one that does not
                port.post("/adaptation", body)

    thread = threading.Thread(target=repeat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_END_S)
        with suppress(HoldfastError):
            port.post("/adaptation", {**body, "ended": True}, answer_s=_END_S)


@dataclass(eq=False)
class _Adaptation:
    """A run in progress."""

    settings: Adapt
    journal: Journal
    port: OperatorPort
    progress: Progress
    notify: Notify
    _result: Hardened | None = field(default=None, init=False)

    def finish(self) -> None:
        """Take all steps that are left, and note how the run ended."""
        if taken := self.journal.stored().steps:  # the run may have been killed before it sent the last one
            self._send(taken[-1].step, taken[-1].facts)
        with suppress(_Ended):
            self._once("begin")
            for step in (OF_FILE if self._pool is None else OF_POOL)[1:]:
                self._once(step)
        outcome, reason = concluded(self.journal.stored().steps) or ("", "")
        if outcome != "promoted":
            self._restore_guard()
        if self._pool is not None:
            self._pool.drop()
            shutil.rmtree(self._hardening_folder, ignore_errors=True)  # contains weights as plain text
        self._send("end", {"outcome": outcome, "reason": reason})
        self.journal.end()

    def _of_pool(self) -> AdaptedPool:
        assert self._pool is not None, "only a pool has this step"
        return self._pool

    def _once(self, step: str) -> None:
        """Take a step unless it is finished. A step that ends the run is recorded as well."""
        taken = self.journal.facts(step) is not None
        facts = self.journal.take(step, lambda: strict(_STEPS[step](self)))  # the server refuses NaN
        if not taken:
            self._send(step, facts)
            self.notify(f"{step}: {facts_text(step, facts)}")
        if facts.get("ends"):
            raise _Ended

    def _send(self, step: str, facts: Mapping[str, Any]) -> None:
        """Let the server record a step in its audit chain."""
        self.port.post("/adaptation", {"run": self.journal.run, "step": step, "facts": facts})

    # --- the server and its model

    def _status(self) -> ServerState:
        """The state of the server of a file."""
        return server_state(self.port, of="model")

    @cached_property
    def _begun(self) -> Mapping[str, Any]:
        facts = self.journal.facts("begin")
        assert facts is not None, "this is the first step"
        return facts

    @property
    def _served_file(self) -> Path:
        return Path(self._begun["model"])

    def _begin(self) -> Json:
        """Describe the server, and check the needs of the later steps. A run that is refused here stores nothing."""
        stored = (_INCUMBENT, EARLIER)
        try:
            self._begun = begun = self._described()
            refuse_unmet(self._needs())
        except HoldfastError:
            for name in stored:
                self.journal.drop_written(name)
            raise
        for name in stored:
            self.journal.keep_written(name)
        return begun

    def _needs(self) -> Iterator[Need]:
        """What the later steps need, in their order. Each step checks its own again."""
        if self.settings.trigger == ALARM:
            yield Need("trigger", self._alarmed)
        yield Need("quarantine", lambda: self._flagged(strict=True))
        pool, gates = self._pool, self.settings.gates or GATES
        held_out = None if pool is None else pool.common.held_out
        if pool is not None:
            yield Need("immunise", pool.refuse_other_network)
        yield from needs_of_hardening(self._harden_settings, self._opened_for_hardening, gates, held_out)
        yield Need("shadow", self._sampled)
        yield Need("canary" if pool is None else "measure", partial(self._rules, candidate=False))
        if pool is not None:
            return
        if (guard := self._guard) is not None:
            settings = self._calibration_of(self.journal.folder / _INCUMBENT, guard)
            yield Need("canary", partial(guard.refuse_unfit, settings))
        yield Need("promote", partial(refuse_unwritable, self._served_file))

    def _described(self) -> Json:
        """The server and its model, as the run begins."""
        status = server_state(self.port)
        if "pool" in status:
            return adapt_served.begin(status, self.settings)
        served = status["model"]
        settings: Json = {key: value for key, value in served.get("settings", {}).items() if key in _OPENING}
        file = Path(settings.get("model", ""))
        if file.suffix != _SUFFIX:
            raise TargetError(
                f"the server does not serve a {_SUFFIX} file, and adapt replaces no other model; serve the weights as "
                f"such a file, as in holdfast serve model{_SUFFIX}"
            )
        if not file.is_file():
            raise TargetError(
                f"the served file {str(file)!r} is not on this machine; run adapt where the server runs"
            )
        refuse_shared(file)
        self._refuse_code(settings.get("arch") or "")
        copy = self.journal.folder / _INCUMBENT
        with usable(copy):
            write_atomically(copy, content_of_file(file, "served model"))
        with self._stated_settings():
            opened = self._opened(copy, settings)
            guard = settings.get("guard")
            place = None if guard is None else calibration_of(Path(guard))
        if opened.digest != served["digest"]:
            raise TargetError(
                f"the file {str(file)!r} is not the model that is served; reload it (SIGHUP), or restore the file"
            )
        begun = {"set": served["set"], "model": str(file), "digest": served["digest"], "settings": settings}
        if guard is None or place is None:
            return begun
        AdaptedGuard(Path(guard), place, self.journal.folder).store()
        return {**begun, "calibration": str(place)}

    def _refuse_code(self, code: str) -> None:
        """Refuse code that the server names as the architecture unless it is allowed, and is that of this user."""
        if names_code(code):
            if not self.settings.trust_code:
                raise UsageError(
                    f"the server names the code {code} as the architecture, and code is run only if you allow it: set "
                    "trust_code if you trust that file"
                )
            refuse_shared(Path(code.rpartition(":")[0]))

    @contextmanager
    def _stated_settings(self) -> Iterator[None]:
        """Context manager in which settings that cannot be used are a fault of the server, which states them."""
        try:
            yield
        except UsageError as error:
            raise TargetError(
                f"the model cannot be opened with the settings that {self.port.url} states: {error}"
            ) from error

    @property
    def _guard(self) -> AdaptedGuard | None:
        """The guard whose calibration is replaced together with a served file."""
        begun = self._begun
        if "calibration" not in begun:
            return None
        return AdaptedGuard(Path(begun["settings"]["guard"]), Path(begun["calibration"]), self.journal.folder)

    @staticmethod
    def _guard_of(settings: Mapping[str, Any]) -> Path | None:
        return None if settings.get("guard") is None else Path(settings["guard"])

    @staticmethod
    def _opened(file: Path, settings: Mapping[str, Any]) -> DescribedModel:
        return open_subject(Doctor(model=str(file), **_opening(settings)))

    @cached_property
    def _pool(self) -> AdaptedPool | None:
        """The pool behind the server; None if it serves a file."""
        begun = self._begun
        if "pool" not in begun:
            return None
        return AdaptedPool(Path(begun["pool"]), begun["set"], self.journal.run, self.settings)

    @cached_property
    def _incumbent(self) -> DescribedModel:
        if self._pool is not None:
            return self._pool.incumbent_subject
        return self._opened(self.journal.folder / _INCUMBENT, self._begun["settings"])

    @property
    def _candidate_file(self) -> Path:
        return self.journal.folder / _CANDIDATE

    @cached_property
    def _candidate(self) -> DescribedModel:
        if self._pool is not None:
            return self._pool.candidate
        opened = self._opened(self._candidate_file, self._begun["settings"])
        trained = self.journal.facts("harden")
        if trained is not None and trained["digest"] != opened.digest:
            raise TargetError(
                f"the candidate {str(self._candidate_file)!r} was changed after its training; begin a new run"
            )
        return opened

    def _refuse_changed(self, status: ServerState) -> None:
        """Raise `TargetError` if the server serves another model than the one that this run began with."""
        if status["model"]["digest"] not in (self._begun["digest"], self._candidate.digest):
            raise TargetError(
                f"the server serves {status['model']['set']}, and this run began with {self._begun['set']}: it was "
                "changed meanwhile. Begin a new run"
            )

    # --- trigger and quarantine

    def _trigger(self) -> Json:
        """Wait for an alarm of the monitor, or for the time."""
        trigger = self.settings.trigger
        if trigger == NOW:
            return {"trigger": NOW}
        until = float("inf") if trigger == ALARM else time.monotonic() + seconds(trigger, "trigger")
        self.notify("waiting for an alarm of the monitor")
        while time.monotonic() < until:
            if alarmed := self._alarmed():
                return {"trigger": "alarm", "tests": alarmed}
            time.sleep(_POLL_S)
        return {"trigger": trigger}

    def _alarmed(self) -> list[str]:
        """Names of the tests of the monitor that raised an alarm. Raises `UsageError` if a run that waits for an alarm
        has a server without a monitor.
        """
        try:
            return list(monitor_state(self.port)["alarmed"])
        except Refusal as refusal:
            if self.settings.trigger == ALARM:
                raise UsageError(
                    f"the server has no monitor, whose alarm would begin the adaptation ({refusal.reason}); start "
                    "it with --monitor, or set trigger to now"
                ) from refusal
            return []

    @cached_property
    def _opened_for_hardening(self) -> ForHardening:
        return self._harden_settings.open()

    @cached_property
    def _opened_data(self) -> tuple[TrainingData, Data]:
        """The training examples, and all test examples."""
        _, training, _, tested, _ = self._opened_for_hardening
        return training, tested

    @cached_property
    def _harden_settings(self) -> Harden:
        if self._pool is not None:
            model = deepcopy(self._pool.incumbent_subject.model).requires_grad_()
            return composed(Harden, self.settings).model_copy(
                update={"model": model, "gates": [], "output": []}
            )
        opened = Doctor(model=str(self.journal.folder / _INCUMBENT), **_opening(self._begun["settings"]))
        own = {key: getattr(opened, key) for key in opened.model_fields_set}
        return composed(Harden, self.settings).model_copy(update={**own, "gates": [], "output": []})

    @cached_property
    def _trusted(self) -> tuple[Tensor, Tensor]:
        some = rows_of(self._tested, _TRUSTED, Draws(self.settings.seed).at("trusted"))
        return some.x, some.y

    @cached_property
    def _tested(self) -> Batch:
        _, tested = self._opened_data
        some = selected(tested, n=None, sample=_TESTED, seed=self.settings.seed)
        return some.read(0, len(some))

    def _quarantine(self) -> Json:
        """Screen the labels of the training examples and of the flagged inputs, which are never trained on."""
        training, _ = self._opened_data
        rows = selected_rows(
            len(training),
            n=None,
            sample=min(len(training), _SCREENED),
            seed=self.settings.seed,
            name="the data",
        )
        sample, (x, y) = training.take(torch.as_tensor(rows)), self._trusted
        with self._target(self._incumbent) as target:
            found = screened(_outputs(target, sample.x), sample.y, _outputs(target, x), y)
        facts: Json = {
            "training_labels": f"{found.disagree} of {found.n} disagree with their neighbours",
            "test_labels": f"{found.trusted_disagree} of {found.trusted_n}",
        }
        if found.suspicious:
            facts["ends"] = (
                f"the labels of {found.disagree} of {found.n} training examples disagree with those of their nearest "
                f"test examples, and {found.trusted_disagree} of {found.trusted_n} test examples do so"
            )
        flagged, excluded = self._flagged(strict=True)
        return {"flagged": flagged.n, "labelled": len(flagged.y) + excluded, "excluded": excluded, **facts}

    def _flagged(self, *, strict: bool) -> tuple[Flagged, int]:
        """Return the flagged inputs with labels, without those whose label disagrees with their nearest trusted
        examples, and the number of these.
        """
        guard = self._guard_of(self._begun["settings"])
        stored = None if guard is None else input_storage(read_guard_settings(guard), guard)
        names = self._incumbent.model.class_names
        labels = None if self.settings.labels is None else Path(self.settings.labels)
        flagged = read_flagged(stored, labels, tuple(names or ()), strict=strict)
        if not len(flagged.y):
            return flagged, 0
        # in the space of the inputs, where an adversarial example is near its own class
        bad = disagreeing(flagged.x, flagged.y, *self._trusted)
        return Flagged(flagged.n, flagged.x[~bad], flagged.y[~bad]), int(bad.sum())

    @contextmanager
    def _target(self, subject: DescribedModel) -> Iterator[PreparedModel]:
        with readied(subject, self._opened_data[1], torch.device("cpu")) as (target, _):
            yield target

    # --- training, assessment and gates

    @property
    def _hardening_folder(self) -> Path:
        """The folder of the hardening. That of a pool is deleted at the end, and is therefore not in the chain."""
        return self.journal.folder / (HARDENING if self._pool is None else "training")

    def _hardened(self) -> Hardened:
        if self._result is None:
            folder = self._hardening_folder
            self._result = hardened(
                self._harden_settings,
                folder,
                resume=folder.exists(),
                command="",
                notify=self.notify,
                held_out=None if self._pool is None else self._pool.common.held_out,
                progress=self.progress,
                detail=ignore,
            )
        return self._result

    def _harden(self) -> Json:
        result = self._hardened()
        facts = {"recipe": result.card["recipe"], "verdict": result.verdict}
        if self._pool is not None:
            return facts
        self.journal.keep(_CANDIDATE, result.weights)
        chain = read_chain(self._hardening_folder, repair=False)
        return {**facts, "digest": self._candidate.digest, "chain": chain.head}

    def _assess(self) -> Json:
        result = self._hardened()
        facts: Json = {}
        for name in ("clean_accuracy", "robust_accuracy"):
            for side, measured in (("served", result.before), ("candidate", result.after)):
                if name in measured.metrics:
                    facts[f"{name}_{side}"] = measured[name].value
        flagged, _ = self._flagged(strict=False)
        if len(flagged.y):
            right = [
                self._correct(subject, flagged.x, flagged.y) for subject in (self._candidate, self._incumbent)
            ]
            difference = paired_difference(right[0], right[1])
            facts["flagged_accuracy_served"] = float(right[1].double().mean())
            facts["flagged_accuracy_candidate"] = float(right[0].double().mean())
            if difference.high < 0:
                facts["ends"] = (
                    "the candidate classifies fewer of the flagged inputs correctly than the served model"
                )
        return facts

    def _correct(self, subject: DescribedModel, x: Tensor, y: Labels) -> Mask:
        with self._target(subject) as target:
            return _outputs(target, x).argmax(1) == y

    def _judge(self) -> Json:
        result = self._hardened()
        doubts = Doubts(result.after.doubts, self.settings.accept_doubts)
        judged = [self._judged(parse(gate), result, doubts) for gate in self.settings.gates or GATES]
        facts: Json = {"gates": [f"{each.claim.text}: {each}" for each in judged]}
        failed = [each.claim.text for each in judged if not each]
        if failed:
            facts["ends"] = f"the gate {failed[0]!r} did not pass"
        return facts

    def _judged(self, claim: Claim, result: Hardened, doubts: Doubts) -> Judgement:
        """Judge a gate. The loss of clean accuracy is measured on more examples than the attacks."""
        if claim.metric != "clean_accuracy_drop":
            return judge(claim, result.after.evidence, doubts, baseline=result.before.evidence)
        tested = self._tested
        right = [self._correct(subject, tested.x, tested.y) for subject in (self._incumbent, self._candidate)]
        return judged_estimate(claim, paired_difference(right[0], right[1]), doubts)

    def _shadow(self) -> Json:
        """Compare the candidate with the served model on a sample of the live inputs, which no client sees."""
        return self._live_pairs(guarded=False).compared(self._sampled())

    def _sampled(self) -> Samples:
        """The inputs that the server has sampled."""
        shape = self._tested.example_shape
        return read_samples(self.port.read("/samples"), shape, self.port.url)

    def _live_pairs(self, *, guarded: bool = True) -> LivePairs:
        """The comparison of the candidate with the served model on live inputs, with the guard if it is `guarded`."""
        name = self._candidate.digest[: len(self._begun["set"])]
        candidate, served = (
            Side(
                partial(self._target, subject),
                partial(self._rules, candidate=subject is self._candidate) if guarded else None,
            )
            for subject in (self._candidate, self._incumbent)
        )
        shape = self._tested.example_shape
        of: Literal["model", "pool"] = "model" if self._pool is None else "pool"
        return LivePairs(self.port, of, shape, candidate, served, name)

    def _rules(self, *, candidate: bool) -> GuardPipeline | None:
        """The rules of the guard, as for the candidate or for the earlier model."""
        guard = self._guard_of(self._begun["settings"])
        if guard is None:
            return None
        return (self._guard or AdaptedGuard(guard, calibration_of(guard), self.journal.folder)).rules(
            candidate=candidate
        )

    def _approval(self) -> Json:
        """Wait until the operator approves the candidate, if this is required."""
        if not self.settings.approval:
            return {"required": False}
        gates = self.journal.facts("gates") or {}
        self.notify("waiting for the approval of the operator")
        while True:
            approval, by = approval_of(self.port, self.journal.run)
            match approval:
                case "approved":
                    return {"required": True, "by": by}
                case "rejected":
                    return {"required": True, "by": by, "ends": "the operator rejected the candidate"}
                case None:  # also after a restart of the server, which then knows no runs
                    self._send("approval", {"gates": gates.get("gates", [])})
            time.sleep(_POLL_S)

    # --- canary and promotion

    def _canary(self) -> Json:
        """Let the candidate answer a share of the requests, and compare it with the served model."""
        self._refuse_changed(self._status())
        self._end_canary()
        self._extend_guard()
        body = {
            "run": self.journal.run,
            "model": str(self._candidate_file.resolve()),
            "digest": self._candidate.digest,
        }
        self.port.post("/canary", body)
        until = time.monotonic() + _PATIENCE_S
        while self._status()["canary"]["state"] == "starting":
            if time.monotonic() > until:
                return {"ends": f"the canary was not ready within {_PATIENCE_S:g} s"}
            time.sleep(_POLL_S)

        def ended(status: ServerState) -> str:
            state = status["canary"]
            return (
                ""
                if state["state"] == "serving"
                else f"the canary ended: {state['reason'] or state['state']}"
            )

        facts = self._live_pairs().watched(self._canary_s, ended)
        self._end_canary()
        return {**facts, "ends": f"as a canary, {facts['ends']}"} if "ends" in facts else facts

    @property
    def _canary_s(self) -> float:
        return seconds(self.settings.canary_time, "canary_time")

    def _end_canary(self) -> None:
        until = time.monotonic() + _PATIENCE_S
        while self._status()["canary"]["state"] in ("starting", "serving"):
            if time.monotonic() > until:
                raise TargetError(
                    f"the canary did not end within {_PATIENCE_S:g} s; look at the log of the server"
                )
            self.port.delete("/canary")
            time.sleep(_POLL_S)

    def _promote(self) -> Json:
        """Let the candidate serve, and restart the monitor. The file of a served model is replaced, until all workers
        serve it.
        """
        facts = self._pool.promote(self.port) if self._pool is not None else self._promote_file()
        if "ends" not in facts:
            with suppress(Refusal):  # a server without a monitor
                self.port.post("/monitor/restart", {})
        return facts

    def _promote_file(self) -> Json:
        self._refuse_changed(self._status())
        guard = self._guard
        if guard is not None:
            guard.accept_both()
        try:
            self._serve(self._candidate_file, self._candidate.digest)
        except _NotReloaded as error:
            self._put_back()
            return {"ends": str(error)}
        if guard is not None:
            guard.accept_candidate()
        return {"set": self._status()["model"]["set"], "digest": self._candidate.digest}

    def _watch(self) -> Json:
        """Watch the promoted candidate, and put the earlier model back if it is worse than that was."""
        if self._pool is not None:
            return self._pool.watch(self._live_pairs(), self.port)
        if self._served_file.read_bytes() == (self.journal.folder / _INCUMBENT).read_bytes():
            self._put_back()  # the run was killed while it did so
            return {"ends": "the earlier model was put back after the promotion"}

        def replaced(status: ServerState) -> str:
            self._refuse_changed(status)
            is_earlier = status["model"]["digest"] == self._begun["digest"]
            return "the earlier model was put back" if is_earlier else ""

        facts = self._live_pairs().watched(self._canary_s, replaced)
        if "ends" in facts:
            self._put_back()
            return {**facts, "ends": f"after the promotion, {facts['ends']}"}
        return facts

    def _put_back(self) -> None:
        """Serve the earlier model again, with the earlier calibration of the guard."""
        self._restore_guard()
        self._serve(self.journal.folder / _INCUMBENT, self._begun["digest"])

    def _serve(self, file: Path, model: str) -> None:
        """Replace the file of the served model by another one, and wait until all workers serve it."""
        write_atomically(self._served_file, file.read_bytes(), mode_of(self._served_file))
        until, requested = time.monotonic() + _PATIENCE_S, False
        while True:
            status = self._status()
            workers = {worker["set"] for worker in status["workers"]}
            state = status["model"]
            if state["digest"] == model and workers == {state["set"]} and state["reload"] != "running":
                return
            if not requested:
                self.port.post("/reload", {"run": self.journal.run})
                requested = True
            elif state["reload"] == "failed":
                raise _NotReloaded(f"the server could not reload the model: {state['reason']}")
            if time.monotonic() > until:
                raise _NotReloaded(
                    f"the server did not reload the model within {_PATIENCE_S:g} s; look at its log"
                )
            time.sleep(_POLL_S)

    # --- guard

    def _extend_guard(self) -> None:
        """Calibrate the guard for the served model and the candidate together."""
        if (guard := self._guard) is None:
            return
        guard.extend(self._calibration_of(self._candidate_file, guard))
        self.journal.keep_written(CANDIDATE)

    def _calibration_of(self, model: Path, guard: AdaptedGuard) -> Calibrate:
        """The settings of a calibration of the guard for a model on the data of the run."""
        base = Calibrate(model=str(model), guard=str(guard.guard), **_opening(self._begun["settings"]))
        own = {key: getattr(base, key) for key in base.model_fields_set}
        return composed(Calibrate, self.settings).model_copy(update=own)

    def _restore_guard(self) -> None:
        if (guard := self._guard) is not None:
            guard.restore()


_STEPS: Mapping[str, Callable[[_Adaptation], Json]] = {
    "begin": lambda run: run._begin(),
    "trigger": lambda run: run._trigger(),
    "quarantine": lambda run: run._quarantine(),
    "harden": lambda run: run._harden(),
    "immunise": lambda run: run._of_pool().immunise(run._hardened()),
    "assess": lambda run: run._assess(),
    "gates": lambda run: run._judge(),
    "shadow": lambda run: run._shadow(),
    "approved": lambda run: run._approval(),
    "canary": lambda run: run._canary(),
    "measure": lambda run: run._of_pool().measure(run._live_pairs()),
    "admit": lambda run: run._of_pool().admit(run.progress, run.notify, way_out("", run.journal.folder)),
    "promote": lambda run: run._promote(),
    "watch": lambda run: run._watch(),
}
"""The functions of all steps; `OF_FILE` and `OF_POOL` have the order of those of a server"""


def _opening(settings: Mapping[str, Any]) -> Json:
    """The settings with which the model in any file is opened, out of those that the server states."""
    return {key: value for key, value in settings.items() if key not in ("guard", "model")}


def _outputs(target: PreparedModel, x: Tensor) -> Tensor:
    """Return the logits (n, classes) of inputs."""
    with torch.no_grad():
        return torch.cat([target.logits(part).detach() for part in torch.split(x, _BATCH)])
