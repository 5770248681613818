"""The verb harden: it measures a model, trains a robust copy within a time budget, chooses the best checkpoint, and
measures the new model.
"""

import math
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from holdfast.core.batch import UNLABELLED, Batch, Data, TrainingData
from holdfast.core.chain import digest
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.names import threat_text
from holdfast.core.units import of_values
from holdfast.io.data.expected import Expected
from holdfast.io.data.memory import as_data
from holdfast.io.models.weights import written
from holdfast.recipes.training import distributed
from holdfast.reports.numbers import size
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.checks import batch_size_for, refuse_batch, refuse_data, refuse_threat, threads
from holdfast.runs.assess.executors import cluster_for
from holdfast.runs.assess.expected_time import TRIED, duration, expected_time
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import AssessRequest, HardenRequest, Subject
from holdfast.runs.assess.result import Result
from holdfast.runs.engine.identity import hardware
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.engine.resuming import repeatable, temporary_run_folder, way_out
from holdfast.runs.engine.run import Run
from holdfast.runs.engine.signals import stoppable
from holdfast.runs.harden.attempt_training import AttemptTraining
from holdfast.runs.harden.candidates import Candidate, Evaluation, announced, attempts
from holdfast.runs.harden.epochs import NOTHING, STAGES, Trainer, TrainingStart
from holdfast.runs.harden.hardened import (
    MODEL,
    Hardened,
    Made,
    card_of,
    opened_by,
    timeless,
    weights_metadata,
)
from holdfast.runs.harden.held_out import (
    TrainingExamples,
    examples_of,
    harmless,
    held_out_accuracies,
    proved_accuracy,
)
from holdfast.runs.harden.pace import Clock, with_predicted_labels
from holdfast.runs.harden.trainable import learner_of, refuse_untrainable, threats_of, training_notes
from holdfast.runs.harness import Target
from holdfast.runs.store.files import CHECKPOINTS
from holdfast.runs.store.folder import open_run_folder, refuse_used, stored_manifest
from holdfast.runs.stored.commands import command_of
from holdfast.runs.stored.run_manifest import about_run, harden_manifest

_CHECKED = 4_096  # training examples that are validated at once
_IN_PLACE_EXAMPLES = 8  # examples that show whether a network changes its input in place
_IGNORED_DOUBT = "not-exhausted"  # raised if the suite is too weak, which no training changes


def harden(
    subject: Subject,
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
) -> Hardened:
    """Train a copy of a model to be robust under a threat model. The training can be resumed from the folder `run`.

    Without `run`, a temporary folder is used and deleted at the end; if the training is stopped, that folder is kept
    and the error states its path. Under torchrun, the processes train together, the first one evaluates and writes, and
    all return the same result. `detail` is called with messages on single shards of a cluster. `clock` returns seconds
    and measures the budget. Raises `UsageError`, `TargetError`, or `Interrupted` with the command to resume.
    """
    if run is not None:
        refuse_used(run, resume=resume)
    # Before the data are prepared and any process is joined, because nothing is stored yet.
    refuse_untrainable(subject.model)
    refuse_data(test)
    with readied(subject, test, distributed.own(torch.device(request.device))) as (target, sample):
        bounds, n_threads = target.bare.bounds, torch.get_num_threads()
        # those that are read by index were checked when they were opened
        if isinstance(data, Batch):
            for part in data.split(_CHECKED):
                labelled = part.take(part.y != UNLABELLED)
                refuse_batch(labelled, bounds, target.classes, "the training data", whole=data)
        examples = examples_of(data, request.excluded or test, request.seed, target.classes)
        for threat in threats_of(request.threat, [one.recipe for one in request.candidates]):
            refuse_threat(threat, bounds, sample.x, target.classes)
        for note in request.notes:
            notify(note)
        if notify is not ignore and not (run is not None and stored_manifest(run)):
            tried = test.read(0, min(TRIED, len(test))).to(sample.x.device)
            notify(_expected_time(request, target, tried, len(test)))
    with ExitStack() as stack:
        stack.enter_context(distributed.joined(torch.device(request.device)))
        stack.enter_context(threads(n_threads))
        place = stack.enter_context(temporary_run_folder()) if run is None else run
        job = _Job(subject, examples, test, request, place, progress, notify, detail, clock)
        result = job.lead(resume=resume) if distributed.first() else job.follow()
    if run is not None:
        return result
    before, after = (replace(side, folder=None) for side in (result.before, result.after))
    return replace(result, before=before, after=after, folder=None)


def _expected_time(request: HardenRequest, target: Target, sample: Batch, n: int) -> str:
    """Message with the expected time of the training and of the two assessments. The second assessment is slower if
    more examples survive.
    """
    assessment, budget_s = request.assessment, request.budget_s
    size = assessment.batch_size or batch_size_for(math.prod(sample.x.shape[1:]), request.device)
    judging = expected_time(assessment.plan, target, sample, n, size, assessment.workers or 1)
    training = "the training, "
    if budget_s is not None:
        training = f"{duration(budget_s)} for the training, which the budget limits, "
    return (
        f"expected total time: {training}and {judging} for the assessment of the given model on {n:,} test examples; "
        "that of the new model takes longer if more examples survive"
    )


class _Job:
    """A hardening that runs in a folder, by the first process or by another one."""

    def __init__(
        self,
        subject: Subject,
        examples: TrainingExamples,
        test: Data,
        request: HardenRequest,
        run: Path,
        progress: Progress,
        notify: Notify,
        detail: Notify,
        clock: Clock,
    ) -> None:
        device = distributed.own(torch.device(request.device))
        self.rest, self.held_out = examples.rest.to(device), examples.held_out.to(device)
        inputs = self.held_out.x[:_IN_PLACE_EXAMPLES]
        prepared = tuple(
            learner_of(model, inputs).eval().requires_grad_(False) if isinstance(model, Classifier) else model
            for model in request.threat.surrogates
        )
        request = replace(request, threat=replace(request.threat, surrogates=prepared))
        self.subject, self.test, self.request, self.run = subject, test, request, run
        self.again = way_out(request.command, run)
        self.progress, self.notify, self.detail, self.clock = progress, notify, detail, clock
        self.model = learner_of(subject.model, inputs)
        digests = [test.digest, examples.digest]
        distributed.match_first(digests, self.model)
        machine = hardware(device, distributed.processes())
        self.trainer = Trainer(
            self.model, self.rest, self.held_out, request.threat, request.seed, machine, clock
        )
        for candidate in request.candidates:  # refuses unsuitable data; nothing is trained yet
            self.trainer.checkpoints(candidate.recipe, None)
        self.notes = [*request.notes, *examples.notes, *training_notes(self.model, inputs)]
        stored = distributed.broadcast(stored_manifest(run))
        self.plan = distributed.broadcast(stored["plan"] if stored else self._planned())
        self.evaluated = self._held_out_sample(self.plan["attempts"][0].get("held_out", len(self.held_out)))
        self.trainer = replace(self.trainer, held_out=self.evaluated)
        self.manifest = harden_manifest(subject, digests, test, request, self.plan, machine)
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
        return as_data(examples.x, examples.y, expected=Expected(model.bounds, model.classes))

    def _planned(self) -> dict[str, Any]:
        request = self.request
        if request.budget_s is not None:
            names = ", ".join(candidate.name for candidate in request.candidates)
            self.notify(f"timing updates of {names} on this machine, for a budget of {request.budget_s:g} s")
        planned_attempts, spent_s = attempts(
            request.candidates,
            request.budget_s,
            self.model,
            self.rest,
            request.threat,
            Evaluation(
                len(self.held_out),
                lambda n: self._evaluated(with_predicted_labels(self.model, self._held_out_sample(n))),
            ),
            self.clock,
        )
        return {
            "attempts": planned_attempts,
            "budget_s": request.budget_s,
            "planning_s": spent_s,
            "stages": STAGES,
        }

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
            cluster_for(self.assessment, self.detail),
        ):
            run = Run(tuple(STAGES), folder, stopper=stopper, progress=self.progress)
            before = self._assessed(self.subject, self.test, "before", replace(self.assessment, gates=()))
            accuracies_before = held_out_accuracies(self.model, self.evaluated, self.request.threat)
            run.record("before", _head(before))
            trained, best = self._trained_attempts(run)
            after = self._assessed(best.subject, self.test, "after", self.assessment)
            command = command_of(folder.manifest, after.gates)
            after = replace(after, about={**after.about, "command": command})
            net = best.subject.model.net
            assert isinstance(net, nn.Module)  # other models were refused before
            weights = written(net, weights_metadata(self.subject, self.manifest))
            entries = {**self._entries(accuracies_before), "generalisation": self._on_training(best)}
            card = card_of(trained, best, (before, after), folder.manifest, entries)
            model = of_values(best.subject.model)
            result = Hardened(model, before, after, best.curve, card, weights, self.run)
            with stopper.finishing():
                folder.keep("model", MODEL, weights)
            run.record("training", {"chosen": card["chosen"]["epoch"], "weights": digest(weights)})
            run.record("after", _head(after))
            run.record("card", timeless(card))
            run.record("verdict", {"exit_code": after.exit_code, "verdict_of": "after"})
        # the model may come from a factory and is not sent; its weights are part of the result
        distributed.broadcast(replace(result, model=NOTHING))
        return result

    def follow(self) -> Hardened:
        """Take part in a distributed hardening as a process other than the first, until the new model is finished."""
        while True:
            message: TrainingStart | Hardened = distributed.broadcast(NOTHING)
            if isinstance(message, Hardened):
                return replace(message, model=self._opened(message.weights))
            self.trainer.follow(self._candidate(message.name), message)

    def _entries(self, accuracies_before: tuple[float, float]) -> dict[str, Any]:
        """Entries of the card from the request, and the metrics of the given model on held-out examples."""
        request, constraint = self.request, self.request.threat.constraint
        return {
            "requested_recipe": request.name,
            "threat": threat_text(
                f"{constraint.name}:{size(constraint.eps)}", None, "gradients", None, request.threat.unit
            ),
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

    def _trained_attempts(self, run: Run) -> tuple[list[Made], Made]:
        """Train the attempts of the plan until no doubt is raised, and return all trained models and the best one.

        Robust accuracy is compared on held-out examples; a model with raised doubts ranks below all models without.
        """
        trained_models: list[Made] = []
        ranks: list[tuple[bool, float]] = []
        held_out, planned = self.held_out.to(torch.device("cpu")), self.plan["attempts"]
        metadata = weights_metadata(self.subject, self.manifest)
        trainings = AttemptTraining(self.subject, self.trainer, self.plan, metadata, self.clock)
        given_model = self.subject.model
        examples = as_data(held_out.x, held_out.y, expected=Expected(given_model.bounds, given_model.classes))
        for k, attempt in enumerate(planned):
            self.notify(announced(attempt, self.plan["budget_s"]))
            candidate = self._candidate(attempt["recipe"])
            trained_models.append(
                trainings.trained(self.run / _numbered(CHECKPOINTS, k), candidate, attempt, run)
            )
            if len(planned) == 1:
                return trained_models, trained_models[0]
            assessment = replace(self.assessment, gates=(), baseline=None)
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

    def _opened(self, weights: bytes) -> Classifier:
        """The new model with weights from a file."""
        model = deepcopy(self.subject.model)
        assert isinstance(model.net, nn.Module)
        model.net.load_state_dict(safetensors.torch.load(weights))
        return of_values(model.eval())

    def _assessed(self, subject: Subject, data: Data, place: str, request: AssessRequest) -> Result:
        return assess(
            subject,
            data,
            request,
            run=self.run / place,
            resume=True,
            progress=self.progress,
            again=self.again,
            is_step=True,
            notify=self.notify,
            detail=self.detail,
        )


def _numbered(name: str, k: int) -> str:
    return name if k == 0 else f"{name}-{k + 1}"


def _head(result: Result) -> dict[str, Any]:
    """Digest that links a measurement in its own folder to this run."""
    return {"chain": result.about["hashes"]["chain"]}
