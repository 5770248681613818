"""The verb harden: it measures a model, trains a new one in attempts, and measures it within its budget."""

import bisect
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import nn

from holdfast.core.batch import UNLABELLED, Batch, Data, TrainingData
from holdfast.core.chain import digest
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier, of_values
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import Before, refuse_goal
from holdfast.io.data.data import selected
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.models.composed import Ensemble
from holdfast.io.models.exported import exported
from holdfast.io.models.weights import written
from holdfast.recipes.training import optimisation
from holdfast.recipes.training.fit import refuse_unusable_schedule
from holdfast.recipes.training.recipe import Finished, facts_of, trained_as
from holdfast.reports.card import training_summary
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.executors import cluster_for
from holdfast.runs.assess.expected_time import StageTimes, duration, stage_times
from holdfast.runs.assess.preparation import (
    plan_for,
    readied,
    refuse_batch,
    refuse_data,
    refuse_gates,
    refuse_threat,
    threads,
)
from holdfast.runs.assess.request import AssessRequest, DescribedModel, HardenRequest
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.run_manifest import about_run, command_of, harden_manifest
from holdfast.runs.documents.stored_runs import files_of
from holdfast.runs.engine.identity import hardware, repeatable, temporary_run_folder, way_out
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent, stoppable
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.attempt_training import (
    AttemptTraining,
    copy_of,
    freeze_others,
    learner_of,
    refuse_untrainable,
    spent_before,
    threats_of,
    training_notes,
)
from holdfast.runs.harden.candidates import (
    NOTHING,
    STAGES,
    Candidate,
    Evaluation,
    Trainer,
    TrainingStart,
    announced,
    announced_s,
    attempts,
    few_held_out,
    planned_elsewhere,
    untrained,
)
from holdfast.runs.harden.checkpoints import EpochLog
from holdfast.runs.harden.hardened import (
    MODEL,
    Hardened,
    Made,
    card_of,
    opened_by,
    timeless,
    trained_under,
    weights_metadata,
)
from holdfast.runs.harden.held_out import (
    TrainingExamples,
    digest_of,
    examples_of,
    harmless,
    held_out_accuracies,
    proved_accuracy,
    refuse_judged,
)
from holdfast.runs.harden.pace import Clock, first_total, with_predicted_labels
from holdfast.runs.store.files import CHECKPOINTS
from holdfast.runs.store.folder import open_run_folder, refuse_used, stored_manifest
from holdfast.statistics.privacy_budget import RowBudget

_LEAST = 50  # smallest number of test examples to which a limit reduces them


@dataclass(frozen=True)
class AssessmentTimes:
    """Expected time of the assessments of a hardening: of the given model and of the new one, and on held-out examples
    between two trainings.
    """

    stages: StageTimes
    """measured times of an assessment of the given model"""
    checked: int
    """number of held-out examples on which a model is checked before a stronger recipe is trained; 0 if only one recipe
    may be trained"""

    def of(self, n: int) -> float:
        """Return the expected seconds of all assessments on `n` test examples.

        The new model is slower to assess if more examples survive. Their share is taken to be in the middle between
        that of the given model and all.
        """
        hardened = (self.stages.share + 1) / 2
        seconds = self.stages.of(n) + self.stages.of(n, hardened)
        return seconds + (self.stages.of(min(self.checked, n), hardened) if self.checked else 0.0)

    def fitting(self, n: int, limit_s: float | None) -> int:
        """Return the largest number of test examples, at most `n`, whose assessments are expected to take at most
        `limit_s` seconds. It is at least 50, if there are so many.
        """
        if limit_s is None or n <= _LEAST:
            return n
        sizes = range(_LEAST + 1, n + 1)
        return _LEAST + bisect.bisect_left(sizes, True, key=lambda size: self.of(size) > limit_s)


def affordable(
    subject: DescribedModel, test: Data, request: HardenRequest, held_out: int, notify: Notify
) -> int:
    """Return the number of test examples on which both models are assessed, and announce the expected time. It is
    measured with a few passes of the given model. `held_out` is the number of held-out examples.
    """
    limit, assessment = limit_s(request), request.assessment
    if notify is ignore and limit is None:
        return len(test)
    with readied(subject, test, optimisation.own(torch.device(request.device))) as (target, sample):
        stages = stage_times(assessment.plan, target, test, sample.x.device, assessment.batch_size)
    times = AssessmentTimes(stages, held_out if len(request.candidates) > 1 else 0)
    n = times.fitting(len(test), limit)
    notify(_expected_time(request, times, n, len(test)))
    return n


def _expected_time(request: HardenRequest, times: AssessmentTimes, n: int, n_all: int) -> str:
    """Message with the expected time of the training and of the assessments on `n` of `n_all` test examples."""
    budget_s = request.budget_s
    training = "the training" if budget_s is None else f"{duration(budget_s)} of training"
    examples = f"{n:,} test examples" if n == n_all else f"{n:,} of {n_all:,} test examples"
    more = ""
    if budget_s is not None and len(request.candidates) > 1:
        more = f"; {duration(budget_s)} more of training if doubts are raised"
    return f"expected total time: {training}, about {duration(max(times.of(n), 1))} of assessment on {examples}{more}"


def limit_s(request: HardenRequest) -> float | None:
    """Return the seconds that the assessments of a hardening may take: by default as long as its training, and without
    a budget as long as they need.
    """
    return request.budget_s if request.assess_budget_s is None else request.assess_budget_s


def assessed(test: Data, n: int, seed: int) -> Data:
    """Return the test examples of both assessments: all, or a random sample of `n` of them, determined by the seed."""
    return test if n >= len(test) else selected(test, n=None, sample=n, seed=seed)


def sample_note(test: Data, n: int, limit: float | None) -> str:
    """Return a note if both assessments use a sample of `n` of the test examples, else an empty text."""
    if n >= len(test) or limit is None:
        return ""
    reason = f"the most that are expected to fit into {duration(limit)}"
    if n == _LEAST:
        reason = f"which is the smallest sample, and may take longer than the limit of {duration(limit)}"
    return f"both assessments use a random sample of {n:,} of the {len(test):,} test examples, {reason} (assess_budget)"


_CHECKED = 4_096  # training examples that are validated at once
_IN_PLACE_EXAMPLES = 8  # examples that show whether a network changes its input in place
_IGNORED_DOUBT = "not-exhausted"  # raised if the suite is too weak, which no training changes


def harden(
    subject: DescribedModel,
    data: TrainingData,
    test: Data,
    request: HardenRequest,
    *,
    run: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
    clock: Clock = time.perf_counter,
    log: EpochLog | None = None,
) -> Hardened:
    """Train a copy of a model to be robust under a threat model. The training can be resumed from the folder `run`.

    Without `run`, a temporary folder is used and deleted at the end; if the training is stopped, that folder is kept
    and the error states its path. Under torchrun, the processes train together, the first one evaluates and writes, and
    all return the same result. `detail` is called with messages on single shards of a cluster. `clock` returns seconds
    and measures the budget. Each epoch is reported to `log`. Raises `UsageError`, `TargetError`, or `Interrupted` with
    the command to resume.
    """
    if run is not None:
        refuse_used(run, resume=resume)
    # Before any process is joined, because nothing is stored yet.
    inputs = checked(subject, data, test, request)
    for note in request.notes:
        notify(note)
    with ExitStack() as stack:
        stack.enter_context(optimisation.joined(torch.device(request.device)))
        stack.enter_context(threads(inputs.threads))
        place = stack.enter_context(temporary_run_folder()) if run is None else run
        watching = _Watching(progress, notify, detail, log or EpochLog())
        job = _Job(subject, inputs, test, request, place, watching, clock)
        result = job.lead(resume=resume) if optimisation.first() else job.follow()
    if run is not None:
        return result
    before, after = (replace(side, folder=None) for side in (result.before, result.after))
    return replace(result, before=before, after=after, folder=None)


@dataclass(frozen=True)
class CheckedInputs:
    """The inputs of a hardening, after the checks."""

    examples: TrainingExamples
    further: list[str]
    """digests of the further examples that recipes read"""
    budgets: Mapping[str, RowBudget]
    """privacy budgets by the name of the recipe"""
    threads: int
    """number of threads for the network"""


def checked(subject: DescribedModel, data: TrainingData, test: Data, request: HardenRequest) -> CheckedInputs:
    """Check all that a hardening needs, and return it. Nothing is trained or stored. Raises `UsageError` or
    `TargetError`.
    """
    refuse_untrainable(subject.model)
    freeze_others(copy_of(subject.model), request.train_only)
    refuse_data(test)
    with readied(subject, test, optimisation.own(torch.device(request.device))) as (target, sample):
        bounds, n_threads = target.original.bounds, torch.get_num_threads()
        # those that are read by index were checked when they were opened
        if isinstance(data, Batch):
            for part in data.split(_CHECKED):
                labelled = part.take(part.y != UNLABELLED)
                refuse_batch(labelled, bounds, target.classes, "the training data", whole=data)
        examples = examples_of(
            data, request.excluded or test, request.seed, target.classes, by_content=_on_parts(request)
        )
        for threat in threats_of(request.threat, [one.recipe for one in request.candidates]):
            refuse_threat(threat, bounds, sample.x, target.classes)
        further = _further_digests(request, subject.model, request.excluded or test, examples.held_out)
    refuse_unmeasured(subject, test, request, request.assessment.gates)
    # also of rows that are not trained on because they equal test or held-out rows
    private = [one for one in request.candidates if facts_of(one.recipe).private]
    stated = {one.name: facts_of(one.recipe).budget_on(data.fingerprints()) for one in private}
    budgets = {name: budget for name, budget in stated.items() if budget is not None}
    return CheckedInputs(examples, further, budgets, n_threads)


def refuse_unfit(
    subject: DescribedModel,
    data: TrainingData,
    test: Data,
    request: HardenRequest,
    clock: Clock = time.perf_counter,
) -> None:
    """Check all that a hardening needs, and plan its training, for which updates are timed if it has a budget. Nothing
    is stored. Raises `UsageError` or `TargetError`, also for a budget that is too small.
    """
    inputs = checked(subject, data, test, request)
    if request.budget_s is not None:
        with threads(inputs.threads), TemporaryDirectory() as place:
            watching = _Watching(silent, ignore, ignore, EpochLog())
            _Job(subject, inputs, test, request, Path(place), watching, clock)


def refuse_unmeasured(
    subject: DescribedModel,
    test: Data,
    request: HardenRequest,
    gates: Sequence[Claim],
    *,
    paired: bool = False,
) -> None:
    """Raise `UsageError` or `TargetError` if the assessments before and after a training cannot be measured, or if they
    do not measure the metric of a gate. Gates against a baseline are checked if they are `paired`: judged on both.
    """
    # the training examples on which attacks are fitted are chosen later
    assessment = replace(request.assessment, fit=test if request.examples else None)
    device = optimisation.own(torch.device(request.device))
    with readied(subject, test, device) as (target, sample), ExitStack() as stack:
        plan = plan_for(subject, test, assessment, target, sample, stack)
        refuse_gates(gates, plan, target, sample, test, paired=paired)


@dataclass(frozen=True)
class _Watching:
    """Functions that are called during a hardening."""

    progress: Progress
    notify: Notify
    detail: Notify
    log: EpochLog


class _Job:
    """A hardening that runs in a folder, by the first process or by another one."""

    def __init__(
        self,
        subject: DescribedModel,
        inputs: CheckedInputs,
        test: Data,
        request: HardenRequest,
        run: Path,
        watching: _Watching,
        clock: Clock,
    ) -> None:
        examples, self.budgets = inputs.examples, inputs.budgets
        self.watching, self.notify, self.clock = watching, watching.notify, clock
        device = optimisation.own(torch.device(request.device))
        self.rest, self.held_out = examples.rest.to(device), examples.held_out.to(device)
        sample = self.held_out.x[:_IN_PLACE_EXAMPLES]
        prepared = tuple(
            learner_of(model, sample).eval().requires_grad_(False) if isinstance(model, Classifier) else model
            for model in request.threat.surrogates
        )
        request = replace(request, threat=replace(request.threat, surrogates=prepared))
        if request.teacher is not None:
            teacher = learner_of(request.teacher.model, sample)
            request = replace(request, candidates=tuple(one.taught_by(teacher) for one in request.candidates))
        self.subject, self.request, self.run = subject, request, run
        self.again = way_out(request.command, run)
        self.model = learner_of(subject.model, sample)
        freeze_others(self.model, request.train_only)
        digests = [test.digest, examples.digest, *inputs.further]
        optimisation.match_first(digests, self.model)
        machine = hardware(device, optimisation.processes())
        self.trainer = Trainer(
            self.model, self.rest, self.held_out, request.threat, request.seed, machine, clock,
            request.checkpoint_every, replace(watching.log, again=self.again),
        )  # fmt: skip
        for candidate in request.candidates:  # refuses unsuitable data; nothing is trained yet
            refuse_goal(candidate.name, facts_of(candidate.recipe).goal)
            settings = candidate.recipe.training
            if request.budget_s is not None:
                # a scheduler is created for the planned updates
                settings = replace(settings.timed, pacing=planned_elsewhere)
            self.trainer.checkpoints(trained_as(candidate.recipe, settings), None)
        stored = optimisation.broadcast(stored_manifest(run))
        self.plan = optimisation.broadcast(stored["plan"] if stored else self._planned(test))
        self.evaluated = self._held_out_sample(self.plan["attempts"][0].get("held_out", len(self.held_out)))
        n_assessed = self.plan["assessed"]
        self.test = assessed(test, n_assessed, request.seed)
        self.checked = self.held_out if self.test is test else self._held_out_sample(n_assessed)
        few = "" if _on_parts(request) else few_held_out(len(self.evaluated))
        stated = [budget.sentence() for budget in self.budgets.values()]
        limits = (few, sample_note(test, n_assessed, limit_s(request)), *stated)
        self.limits = [note for note in limits if note]
        self.notes = [*request.notes, *examples.notes, *training_notes(self.model, sample), *self.limits]
        self.trainer = replace(self.trainer, held_out=self.evaluated)
        self.manifest = harden_manifest(subject, digests, self.test, request, self.plan, machine)
        self.assessment = replace(
            request.assessment, device=str(device), fit=self._examples_for_learned_attacks()
        )

    def _held_out_sample(self, n: int) -> Batch:
        """A random sample of the held-out examples, determined by the seed."""
        if n >= len(self.held_out):
            return self.held_out  # not a copy, which may be large
        order = Draws(self.request.seed).at("looked at").bits(self.held_out.ids).argsort()[:n]
        return self.held_out.take(order.sort().values)

    def _examples_for_learned_attacks(self) -> Data | None:
        """Training examples for learned attacks of the evaluation, disjoint from judged and held-out examples."""
        n, model = self.request.examples, self.subject.model
        if not n:
            return None
        labelled = self.rest.subset(self.rest.y != UNLABELLED)
        examples = labelled.take(Draws(self.request.seed).at("learned on").bits(labelled.ids).argsort()[:n])
        examples = examples.to(torch.device("cpu"))
        return as_data(examples.x, examples.y, expected=DeclaredData(model.bounds, model.classes))

    def _planned(self, test: Data) -> dict[str, Any]:
        request = self.request
        n_assessed = affordable(self.subject, test, request, len(self.held_out), self.notify)
        if request.budget_s is not None:
            names = ", ".join(candidate.name for candidate in request.candidates)
            self.notify(f"timing updates of {names} on this machine, for a budget of {request.budget_s:g} s")
        planned_attempts, spent_s = attempts(
            [
                replace(one, recipe=trained_as(one.recipe, one.recipe.training.timed))
                for one in request.candidates
            ],
            request.budget_s,
            self.model,
            self.rest,
            request.threat,
            Evaluation(
                len(self.held_out),
                lambda n: self._evaluated(with_predicted_labels(self.model, self._held_out_sample(n))),
            ),
            self.clock,
            anyway=request.anyway,
        )
        if request.budget_s is not None:
            self._refuse_schedules(planned_attempts)
        return {
            "attempts": planned_attempts,
            "budget_s": request.budget_s,
            "planning_s": spent_s,
            "assessed": n_assessed,
            "stages": STAGES,
        }

    def _refuse_schedules(self, planned_attempts: list[dict[str, Any]]) -> None:
        """Raise an error for a function of the user that returns no scheduler for the planned number of updates."""
        candidates = {candidate.name: candidate for candidate in self.request.candidates}
        for attempt in planned_attempts:
            candidate = candidates[attempt["recipe"]]
            total = first_total(attempt["epochs"], candidate.per_epoch(len(self.rest)))
            refuse_unusable_schedule(self.model, candidate.recipe.training, total)

    def _evaluated(self, examples: Batch) -> None:
        """Evaluate the given model as after an epoch, against an attack that breaks none of the examples."""
        threat = harmless(self.request.threat)
        held_out_accuracies(self.model, examples, threat)
        proved_accuracy(self.model, examples, threat, [each.recipe for each in self.request.candidates])

    def lead(self, *, resume: bool) -> Hardened:
        """Perform all steps of the hardening that are not yet stored, as the first process, and return the result."""
        with (
            stoppable(self.again) as stopper,
            open_run_folder(
                self.run, self.manifest, about_run(self.request.command), resume=resume
            ) as folder,
            cluster_for(self.assessment, self.watching.detail),
        ):
            run = Run(tuple(STAGES), folder, stopper=stopper, progress=self.watching.progress)
            before = self._assessed(self.subject, self.test, "before", replace(self.assessment, gates=()))
            accuracies_before = held_out_accuracies(self.model, self.evaluated, self.request.threat)
            self.trainer = replace(self.trainer, given_clean=accuracies_before[0])
            run.record("before", _head(before))
            trained, best = self._trained_attempts(run)
            given = Before(before.evidence, facts_of(best.candidate.recipe).goal)
            after = self._assessed(best.subject, self.test, "after", replace(self.assessment, before=given))
            command = command_of(folder.manifest, after.gates)
            after = replace(after, about={**after.about, "command": command})
            net = best.subject.model.net
            assert isinstance(net, nn.Module)  # other models were refused before
            weights = written(net, weights_metadata(best.subject, self.manifest))
            entries = {**self._entries(accuracies_before), "generalisation": self._on_training(best)}
            entries |= self._follow_up(best)
            if best.candidate.name in self.budgets:
                entries["privacy"] = self.budgets[best.candidate.name].entry()
            card = card_of(trained, best, (before, after), folder.manifest, entries)
            after = replace(after, training=training_summary(card))
            model = of_values(best.subject.model)
            program = self._program(best.subject.model)
            result = Hardened(model, before, after, best.curve, card, weights, self.run, program)
            with stopper.finishing():
                folder.keep("model", MODEL, weights)
            run.record("training", {"chosen": card["chosen"]["epoch"], "weights": digest(weights)})
            run.record("after", _head(after))
            run.record("card", timeless(card))
            decided = {"exit_code": after.exit_code, "verdict_of": "after"}
            run.record("verdict", {**decided, "computed_from": files_of(folder.chain)})
        # the model may come from a factory and is not sent; its weights are part of the result
        optimisation.broadcast(replace(result, model=NOTHING))
        return result

    def follow(self) -> Hardened:
        """Take part in a distributed hardening as a process other than the first, until the new model is finished."""
        while True:
            message: TrainingStart | Hardened = optimisation.broadcast(NOTHING)
            if isinstance(message, Hardened):
                return replace(message, model=self._opened(message.weights, message.card["recipe"]))
            self.trainer.follow(self._candidate(message.name), message)

    def _entries(self, accuracies_before: tuple[float, float]) -> dict[str, Any]:
        """Entries of the card from the request, and the metrics of the given model on held-out examples."""
        request = self.request
        return {
            "requested_recipe": request.name,
            "threat": trained_under(request.threat),
            "seed": request.seed,
            "notes": self.notes,
            "command": repeatable(request.command),
            "opened_by": opened_by(request.open_options, str(self.manifest["data"]["name"])),
            "held_out": {"n": len(self.evaluated), "before": accuracies_before},
        }

    def _on_training(self, best: Made) -> dict[str, Any]:
        """Robust accuracy of the new model on as many training examples as are held out for evaluations."""
        labelled = self.rest.subset(self.rest.y != UNLABELLED)
        order = Draws(self.request.seed).at("generalisation").bits(labelled.ids).argsort()
        sample = labelled.take(order[: len(self.evaluated)].sort().values)
        model = learner_of(best.subject.model, sample.x[:_IN_PLACE_EXAMPLES])
        _, robust = held_out_accuracies(model, sample, self.request.threat)
        return {"n_training": len(sample), "robust_in_training": robust}

    def _follow_up(self, best: Made) -> dict[str, Any]:
        """The entries of the card that the recipe measures after the training; empty for most recipes."""
        control = self.request.control
        test = self.test.read(0, len(self.test)).to(self.held_out.x.device)
        inputs = test.x[:_IN_PLACE_EXAMPLES]
        finished = Finished(
            self.model,
            learner_of(best.subject.model, inputs),
            None if control is None else learner_of(control.model, inputs),
            self.rest,
            test,
            self.request.threat,
            Draws(self.request.seed).at("follow up"),
            {name: value.to(test.x.device) for name, value in best.state.items()},
        )
        measured = facts_of(best.candidate.recipe).follow_up(finished)
        if measured is None:
            return {}
        entry, note = measured
        return {"follow_up": entry, "notes": [*self.notes, note]}

    def _trained_attempts(self, run: Run) -> tuple[list[Made], Made]:
        """Train the attempts of the plan until no doubt is raised, and return all trained models and the best one.

        Robust accuracy is compared on held-out examples; a model with raised doubts ranks below all models without.
        """
        self.trainer.log.start()  # before the clock of a budget
        trained_models: list[Made] = []
        ranks: list[tuple[bool, float]] = []
        planned = self.plan["attempts"]
        metadata = weights_metadata(self.subject, self.manifest)
        for note in self.limits:
            self.notify(f"note: {note}")
        for k, attempt in enumerate(planned):
            # all attempts after the first one have its time once more, and what it left
            spent_s = spent_before(self.plan, trained_models)
            budget_s = None if self.plan["budget_s"] is None else announced_s(self.plan["budget_s"], k + 1)
            left_s = None if budget_s is None else budget_s - spent_s
            if k and left_s is not None and left_s < attempt["epoch_s"]:
                self.notes.append(untrained(attempt, left_s))
                break
            training = AttemptTraining(
                self.subject,
                replace(self.trainer, attempt=k + 1),
                self._candidate(attempt["recipe"]),
                attempt,
                budget_s,
                spent_s,
                self.run / _numbered(CHECKPOINTS, k),
                metadata,
                self.clock,
            )
            choosing = 0 if _on_parts(self.request) else len(self.evaluated)
            self.notify(training.resumed or announced(attempt, left_s, choosing))
            trained_models.append(training.trained(run))
            if len(planned) == 1:
                return trained_models, trained_models[0]
            assessment = replace(self.assessment, gates=(), baseline=None)
            checked, model = self.checked.to(torch.device("cpu")), self.subject.model
            examples = as_data(checked.x, checked.y, expected=DeclaredData(model.bounds, model.classes))
            result = self._assessed(trained_models[-1].subject, examples, _numbered("checked", k), assessment)
            run.record(_numbered("checked", k), _head(result))
            raised = {doubt.name for doubt in result.doubts if doubt.state == "raised"}
            without_doubts = not raised - {_IGNORED_DOUBT, *result.accepted_doubts}
            ranks.append((without_doubts, result.metrics["robust_accuracy"].value))
            if without_doubts:
                break
        return trained_models, trained_models[ranks.index(max(ranks))]

    def _candidate(self, name: str) -> Candidate:
        return next(candidate for candidate in self.request.candidates if candidate.name == name)

    def _program(self, model: Classifier) -> bytes | None:
        """The program of a member of an ensemble that has no architecture in the catalogue, if it can be exported."""
        if not isinstance(model.net, Ensemble) or "architecture" in self.subject.card:
            return None
        return exported(model.net.members[0], model.preprocess(self.held_out.x[:2]))

    def _opened(self, weights: bytes, recipe: str) -> Classifier:
        """The new model of a recipe with weights from a file."""
        model = facts_of(self._candidate(recipe).recipe).network(self.subject.model)
        assert isinstance(model.net, nn.Module)
        model.net.load_state_dict(safetensors.torch.load(weights))
        return of_values(model.eval())

    def _assessed(self, subject: DescribedModel, data: Data, place: str, request: AssessRequest) -> Result:
        return assess(
            subject,
            data,
            request,
            run=self.run / place,
            resume=True,
            progress=self.watching.progress,
            again=self.again,
            is_step=True,
            notify=self.notify,
            detail=self.watching.detail,
        )


def _further_digests(request: HardenRequest, model: Classifier, excluded: Data, held: Batch) -> list[str]:
    """Return the digests of the further examples that recipes read from files of the user. Raises `UsageError` if such
    a file contains a test example or a held-out example.
    """
    digests = []
    for recipe in (candidate.recipe for candidate in request.candidates):
        examples = facts_of(recipe).further_examples(model)
        if examples is not None:
            refuse_judged(examples, excluded, held)
            digests.append(digest_of(examples))
    return digests


def _on_parts(request: HardenRequest) -> bool:
    """Whether the recipe certifies changes of the training set."""
    return any(facts_of(candidate.recipe).threat_of_training_set for candidate in request.candidates)


def _numbered(name: str, k: int) -> str:
    return name if k == 0 else f"{name}-{k + 1}"


def _head(result: Result) -> dict[str, Any]:
    """Digest that links a measurement in its own folder to this run."""
    return {"chain": result.about["hashes"]["chain"]}
