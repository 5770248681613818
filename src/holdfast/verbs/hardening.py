"""The harden verb: measure, train a new model within a budget, choose a checkpoint, and measure again."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.chain import digest
from holdfast.core.checkpoint import STATE, Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss, UsageError
from holdfast.core.model import Classifier
from holdfast.engine.identity import hardware
from holdfast.engine.progress import Notify, Progress, ignore, silent
from holdfast.engine.resuming import lent, repeatable, way_out
from holdfast.engine.signals import Stopper, stoppable
from holdfast.ops import distributed
from holdfast.ops.overfitting import RAISED
from holdfast.reports.numbers import size
from holdfast.sources.expected import Expected
from holdfast.sources.memory import as_data
from holdfast.sources.weights import written
from holdfast.store.files import CHECKPOINTS, usable, write_atomically
from holdfast.store.folder import RunFolder, opened, planned, refuse_used
from holdfast.verbs import training
from holdfast.verbs.assess import assess
from holdfast.verbs.candidates import Candidate, Look, announced, attempts
from holdfast.verbs.checks import refuse_batch, refuse_data, refuse_threat
from holdfast.verbs.epochs import NOTHING, STAGES, Course, Trainer, ended_by
from holdfast.verbs.hardened import (
    MODEL,
    Hardened,
    Made,
    card_of,
    described,
    digest_of_weights,
    opened_by,
    timeless,
)
from holdfast.verbs.held_out import (
    digest_of,
    harmless,
    looked_at,
    refuse_classes,
    split_of,
    without_held,
    without_judged,
)
from holdfast.verbs.pace import Clock, Pacer, as_it_says, smaller
from holdfast.verbs.preparation import readied
from holdfast.verbs.request import AssessRequest, Subject
from holdfast.verbs.result import Result
from holdfast.verbs.trainable import learner_of, refuse_untrainable, remarks, threats_of
from holdfast.verbs.training import BEST, LAST, Point
from holdfast.verbs.wish import Wish, about, manifest_of

_CHECKED = 4_096  # training examples that are validated at once
_SEEN = 8  # examples that show whether a network changes its input in place
_NO_OBJECTION = "not-exhausted"  # raised if the suite is too weak, which no training changes


def harden(
    subject: Subject,
    data: Batch,
    test: Data,
    wish: Wish,
    *,
    run: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    clock: Clock = time.perf_counter,
) -> Hardened:
    """Train a copy of the model to be robust under a threat model, in a folder from which a stopped run is resumed.

    Without `run`, nothing is kept except the return value; if the run is stopped, its folder is kept and named in
    the error. Under torchrun, the processes train together, the first one evaluates and writes, and all return the
    same result. `clock` returns seconds, for the budget. Raises `UsageError`, `TargetError`, or `Interrupted` with
    the command to resume.
    """
    if run is not None:
        refuse_used(run, resume=resume)
    refuse_untrainable(subject.model)
    refuse_data(test)
    with readied(subject, test, distributed.own(torch.device(wish.device))) as (target, sample):
        bounds = target.bare.bounds
        for some in data.split(_CHECKED):
            labelled = some.take(some.y != UNLABELLED)
            refuse_batch(labelled, bounds, target.classes, "the training data", whole=data)
        examples = _parted(data, wish.apart or test, wish.seed, target.classes)
        for threat in threats_of(wish.threat, [one.recipe for one in wish.candidates]):
            refuse_threat(threat, bounds, sample.x, target.classes)
    with ExitStack() as stack:
        stack.enter_context(distributed.joined(torch.device(wish.device)))
        place = stack.enter_context(lent()) if run is None else run
        job = _Job(subject, examples, test, wish, place, progress, notify, clock)
        found = job.done(resume=resume) if distributed.first() else job.followed()
    if run is not None:
        return found
    before, after = (replace(side, folder=None) for side in (found.before, found.after))
    return replace(found, before=before, after=after, folder=None)


@dataclass(frozen=True)
class _Examples:
    """The training examples, and the held-out examples that choose the checkpoint."""

    rest: Batch
    held: Batch
    digest: str
    """SHA-256 over the training and the held-out examples, in hex"""
    notes: tuple[str, ...]
    """which examples were left out, and why"""


def _parted(data: Batch, apart: Data, seed: int, classes: int) -> _Examples:
    """Split the training examples, without those of the evaluation.

    Raises an error if a class has no training example left.
    """
    refuse_classes(data, classes)
    fresh, judged = without_judged(data, apart)
    rest, held = split_of(fresh, seed)
    rest, chosen_by = without_held(rest, held)
    notes = tuple(note for note in (judged, chosen_by) if note)
    if notes:
        refuse_classes(rest, classes, after="; ".join(notes))
    return _Examples(rest, held, digest_of(fresh), notes)


class _Job:
    """A hardening that runs in a folder, by the first process or by another one."""

    def __init__(
        self,
        subject: Subject,
        examples: _Examples,
        test: Data,
        wish: Wish,
        run: Path,
        progress: Progress,
        notify: Notify,
        clock: Clock,
    ) -> None:
        device = distributed.own(torch.device(wish.device))
        self.rest, self.held = examples.rest.to(device), examples.held.to(device)
        seen = self.held.x[:_SEEN]
        around = tuple(
            learner_of(model, seen).eval().requires_grad_(False) if isinstance(model, Classifier) else model
            for model in wish.threat.surrogates
        )
        wish = replace(wish, threat=replace(wish.threat, surrogates=around))
        self.subject, self.test, self.wish, self.run = subject, test, wish, run
        self.again = way_out(wish.command, run)
        self.progress, self.notify, self.clock = progress, notify, clock
        self.model = learner_of(subject.model, seen)
        digests = [test.digest, examples.digest]
        self._as_the_first(digests)
        machine = hardware(device, distributed.processes())
        self.trainer = Trainer(self.model, self.rest, self.held, wish.threat, wish.seed, machine, clock)
        for one in wish.candidates:  # refuses unsuitable data; nothing is trained yet
            self.trainer.begun(one.recipe, None)
        self.notes = [*examples.notes, *remarks(self.model, seen)]
        known = distributed.broadcast(planned(run))
        self.plan = distributed.broadcast(known["plan"] if known else self._planned())
        self.looked = self._few_held(self.plan["attempts"][0].get("held_out", len(self.held)))
        self.trainer = replace(self.trainer, held=self.looked)
        self.manifest = manifest_of(subject, digests, test, wish, self.plan, machine)
        self.judge = replace(wish.judge, device=str(device), fit=self._to_learn_on())

    def _few_held(self, n: int) -> Batch:
        """A random sample of the held-out examples, determined by the seed."""
        drawn = Draws(self.wish.seed).at("looked at").bits(self.held.ids).argsort()[:n]
        return self.held.take(drawn.sort().values)

    def _as_the_first(self, digests: list[str]) -> None:
        """Verify that the data equal those of the first process, and use its initial weights."""
        if distributed.broadcast(digests) != digests:
            raise UsageError(
                "this process holds other data than the first; give all the same, in the same order, as from one file"
            )
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(distributed.broadcast(weights))

    def _to_learn_on(self) -> Data | None:
        """Training examples for learned attacks of the evaluation, disjoint from judged and held-out examples."""
        n, model = self.wish.examples, self.subject.model
        if not n:
            return None
        known = self.rest.take(self.rest.y != UNLABELLED)
        some = known.take(Draws(self.wish.seed).at("learned on").bits(known.ids).argsort()[:n])
        some = some.to(torch.device("cpu"))
        return as_data(some.x, some.y, expected=Expected(model.bounds, model.classes))

    def _planned(self) -> dict[str, Any]:
        wish = self.wish
        if wish.budget_s is not None:
            names = ", ".join(one.name for one in wish.candidates)
            self.notify(f"timing updates of {names} on this machine, for a budget of {wish.budget_s:g} s")
        tried, spent_s = attempts(
            wish.candidates,
            wish.budget_s,
            self.model,
            self.rest,
            wish.threat,
            Look(
                len(self.held),
                lambda n: looked_at(
                    self.model, as_it_says(self.model, self._few_held(n)), harmless(wish.threat)
                ),
            ),
            self.clock,
        )
        return {"attempts": tried, "budget_s": wish.budget_s, "planning_s": spent_s, "stages": STAGES}

    def done(self, *, resume: bool) -> Hardened:
        """Perform all steps that are not done yet, and return the result."""
        with (
            stoppable(self.again) as stopper,
            opened(self.run, self.manifest, about(self.wish), resume=resume) as folder,
        ):
            before = self._judged(self.subject, self.test, "before", replace(self.judge, gates=()))
            looked = looked_at(self.model, self.looked, self.wish.threat)
            folder.record("before", _head(before))
            made, best = self._made(folder, stopper)
            after = self._judged(best.subject, self.test, "after", self.judge)
            net = best.subject.model.net
            assert isinstance(net, nn.Module)  # other models were refused before
            weights = written(net, described(self.subject, self.manifest))
            card = card_of(made, best, (before, after), folder.manifest, self._said(looked))
            found = Hardened(best.subject.model, before, after, best.curve, card, weights, self.run)
            with stopper.finishing():
                _keep(folder, found)
        distributed.broadcast(
            replace(found, model=NOTHING)
        )  # the model may come from a factory and is not sent; its weights are part of the result
        return found

    def followed(self) -> Hardened:
        """Take part as a process other than the first, until the new model is done."""
        while True:
            heard: Course | Hardened = distributed.broadcast(NOTHING)
            if isinstance(heard, Hardened):
                return replace(heard, model=self._opened(heard.weights))
            self.trainer.follow(self._candidate(heard.name), heard)

    def _said(self, looked: tuple[float, float]) -> dict[str, Any]:
        """Entries of the card from the request, and the metrics of the given model on held-out examples."""
        wish, constraint = self.wish, self.wish.threat.constraint
        return {
            "asked": wish.name,
            "threat": f"{type(constraint).__name__.lower()}:{size(constraint.eps)}",
            "seed": wish.seed,
            "notes": self.notes,
            "command": repeatable(wish.command),
            "opened_by": opened_by(wish.opens, str(self.manifest["data"]["name"])),
            "held_out": {"n": len(self.looked), "before": looked},
        }

    def _made(self, folder: RunFolder, stopper: Stopper) -> tuple[list[Made], Made]:
        """Train the attempts of the plan until no doubt is raised, and return all trained models and the best one.

        Robust accuracy is compared on held-out examples; a model with raised doubts ranks below all models without.
        """
        made: list[Made] = []
        heights: list[tuple[bool, float]] = []
        held, tried = self.held.to(torch.device("cpu")), self.plan["attempts"]
        own = self.subject.model
        examples = as_data(held.x, held.y, expected=Expected(own.bounds, own.classes))
        for k, attempt in enumerate(tried):
            self.notify(announced(attempt, self.plan["budget_s"], len(self.test)))
            made.append(self._attempt(k, attempt, stopper))
            if len(tried) == 1:
                return made, made[0]
            judge = replace(self.judge, gates=(), baseline=None)
            found = self._judged(made[-1].subject, examples, _numbered("checked", k), judge)
            folder.record(_numbered("checked", k), _head(found))
            raised = {doubt.name for doubt in found.doubts if doubt.state == "raised"}
            fair = not raised - {_NO_OBJECTION, *found.accepted_doubts}
            heights.append((fair, found.metrics["robust_accuracy"].value))
            if fair:
                break
        return made, made[heights.index(max(heights))]

    def _attempt(self, k: int, attempt: Mapping[str, Any], stopper: Stopper) -> Made:
        candidate = self._candidate(attempt["recipe"])
        place = self.run / _numbered(CHECKPOINTS, k)
        curve = self._trained(place, candidate, attempt, stopper)
        best, last = training.kept(place, BEST), training.kept(place, LAST)
        assert best is not None and last is not None
        new = self._new_model(best.checkpoint, candidate)
        state = last.checkpoint.tensors.get(STATE + RAISED)
        raised = 0 if state is None else int(state)
        # if the budget left no update, no checkpoint records the end
        why = ended_by(last.checkpoint, curve, candidate.recipe.training) or "budget"
        plans = len(last.checkpoint.plans)
        return Made(candidate, attempt, new, curve, best.curve[-1], raised, why, plans)

    def _candidate(self, name: str) -> Candidate:
        return next(one for one in self.wish.candidates if one.name == name)

    def _opened(self, weights: bytes) -> Classifier:
        """The new model with weights from a file."""
        model = deepcopy(self.subject.model)
        assert isinstance(model.net, nn.Module)
        model.net.load_state_dict(safetensors.torch.load(weights))
        return model.eval()

    def _new_model(self, checkpoint: Checkpoint, candidate: Candidate) -> Subject:
        new = deepcopy(self.subject.model)
        checkpoint.put_into(new)
        name = f"{self.subject.card.get('name', 'model')}, {candidate.name}"
        card = {**self.subject.card, "name": name}
        return replace(self.subject, model=new.eval(), digest=digest_of_weights(checkpoint), card=card)

    def _judged(self, subject: Subject, data: Data, place: str, judge: AssessRequest) -> Result:
        return assess(
            subject, data, judge, run=self.run / place, resume=True, progress=self.progress, again=self.again
        )

    def _trained(
        self, place: Path, candidate: Candidate, attempt: Mapping[str, Any], stopper: Stopper
    ) -> tuple[Point, ...]:
        """Train, and return the curve over all epochs. The last and the best checkpoint are in their files."""
        how = candidate.recipe.training
        if self.plan["budget_s"] is not None:
            # a recipe with its own loop uses the epochs of the first plan
            epochs = max(int(attempt["epochs"]), 1)
            how = replace(how, epochs=epochs, pacing=self._pacer(place, attempt))
        batch = training.kept_batch(place) or how.batch
        while True:
            try:
                sized = replace(how, batch=batch, lr=how.lr * batch / how.batch)
                return self.trainer.course(place, candidate, sized, stopper, self.progress)
            except (RuntimeError, MemoryError) as error:
                batch = smaller(batch, error)
                with stopper.finishing():
                    training.keep_batch(place, batch)
            except LostLoss as error:
                raise LostLoss(f"{error}; {self._rescued(place, candidate)}") from error

    def _pacer(self, place: Path, attempt: Mapping[str, Any]) -> Pacer:
        """The pacer for the rest of the budget, after the planning and the epochs that are done."""
        last = training.kept(place, LAST)
        curve = () if last is None else last.curve
        spent_s = self.plan["planning_s"] + sum(point.wall_s for point in curve)
        times = (attempt["epoch_s"], attempt["look_s"])
        return Pacer(self.plan["budget_s"], *times, spent_s, self.clock)

    def _rescued(self, place: Path, candidate: Candidate) -> str:
        """Save the best model so far, if there is one, and return a sentence with its path."""
        best, last = training.kept(place, BEST), training.kept(place, LAST)
        if best is None or last is None:
            return "no epoch had been finished"
        net = self._new_model(best.checkpoint, candidate).model.net
        assert isinstance(net, nn.Module)
        path = place / MODEL
        with usable(path):
            write_atomically(path, written(net, described(self.subject, self.manifest)))
        return f"the best of the {len(last.curve)} epochs before is in {str(path)!r}"


def _keep(folder: RunFolder, found: Hardened) -> None:
    """Write the new model and its documents to the folder of the run."""
    folder.keep("model", MODEL, found.weights)
    folder.record("training", {"chosen": found.card["chosen"]["epoch"], "weights": digest(found.weights)})
    folder.record("after", _head(found.after))
    folder.record("card", timeless(found.card))
    folder.record("verdict", {"exit_code": found.after.exit_code, "judged": "after"})


def _numbered(name: str, k: int) -> str:
    return name if k == 0 else f"{name}-{k + 1}"


def _head(result: Result) -> dict[str, Any]:
    """Digest that links a measurement in its own folder to this run."""
    return {"chain": result.about["hashes"]["chain"]}
