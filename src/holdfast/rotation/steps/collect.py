"""The step `collect` of a rotation: it trains independent models and surrogates, and stores their parameter sets
encrypted.

A stopped collection continues after the last epoch. The surrogates represent a surrogate-only attacker: models of the
same architecture, trained by the same recipe on the same examples from their own random weights. Gates on thefts are
relative to the success of this attacker.
"""

import math
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import OTHER_FOLDER, RESUME, Remedy, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.training import Checkpoint, without_prefix
from holdfast.rotation import Members, Task, weights_of
from holdfast.rotation.collecting import swapped, with_fresh_weights
from holdfast.rotation.ledger import is_complete, refuse_other_head
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.rotation_request import (
    FIRST,
    OWN,
    PLAN,
    PoolStore,
    RotateRequest,
    accuracy,
    secret,
    state_of,
    surrogate_name,
    training_name,
)
from holdfast.rotation.steps.set_measuring import planned_needs, statement
from holdfast.runs.assess.expected_time import duration
from holdfast.runs.engine.identity import way_out
from holdfast.runs.engine.progress import Notify, Progress, Step, ignore, silent, stoppable
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.pace import Pace, pace
from holdfast.runs.store.folder import StoredStage

BASE = "a base, which other sets are generated from; it never serves"
"""Reason that the ledger records with a base. Whether a set is a base is defined by its role."""
_LEFT_FILES = {
    "pool.json",
    ".pool.json.part",
    "ledger.jsonl",
    "ledger.head",
    ".ledger.head.part",
    "ledger.lock",
    "sets",
}  # may be left by a killed creation of the pool
_CHECKPOINT = "begun"  # name of the file with the last epoch of the training in progress
_TIMED_S = 60.0  # budget for which updates are timed if there is none, which takes about a second
_PLANNED = 0.95  # share of the budget that is planned, since the speed of a machine varies
_SPARE = 1.1  # factor of the advised budget, since the speed of a machine varies
_GUESSING = 1.5  # times the accuracy of the most frequent class, below which a run has diverged


@dataclass(frozen=True)
class CollectRequest:
    """The folder of a pool, and the settings of the training runs whose parameter sets are collected in it."""

    path: Path
    """folder of the pool"""
    common: RotateRequest
    """the settings that all sets share"""
    resume: bool = False
    """whether an existing pool in the folder is continued"""
    budget_s: float | None = None
    """wall-clock seconds for all trainings together; None for the epochs of the recipe"""
    n_judged: int = FIRST
    """number of held-out examples on which each set is judged first; used for the message on how many examples gates
    need"""
    expect_head: str = ""
    """digest of an entry that the ledger must contain; see `Pool.open`"""
    least_updates: int = 1
    """number of updates of each training below which a budget is refused"""

    @property
    def is_new(self) -> bool:
        """Whether the collection has not begun yet."""
        return not is_complete(self.path)

    def expected_time(self) -> str:
        """Return how long the trainings of a new collection take, as text: the budget, or a measured time."""
        n, seconds = n_trained(self.common), duration(n_trained(self.common) * self.seconds_for_each)
        if self.budget_s is not None:
            return f"{seconds} for {n} trainings, which the budget limits"
        return f"about {seconds} for {n} trainings of {self.common.training.epochs} epochs"

    @cached_property
    def seconds_for_each(self) -> float:
        """Seconds of one training: an equal share of the budget, or a measured time."""
        common = self.common
        if self.budget_s is not None:
            return self.budget_s / n_trained(common)
        with common.enough_threads():
            measured = pace(common.candidate.recipe, common.model, common.train, common.threat, _TIMED_S)
        return common.training.epochs * measured.epoch


@dataclass(frozen=True)
class Collected:
    """Numbers and accuracies of the parameter sets and surrogates that were collected in a pool."""

    runs: int
    sets: int
    epochs: int
    accuracy: tuple[float, ...]
    """accuracy of each base on held-out examples"""
    surrogate_accuracy: tuple[float, ...]
    """accuracy of each surrogate on held-out examples"""
    pool: Pool = field(repr=False, compare=False)


def collect(
    request: CollectRequest,
    *,
    again: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    is_step: bool = False,
) -> Collected:
    """Create or resume a pool, perform the missing training runs, and store their parameter sets encrypted.

    `again` states how a stopped call is resumed. The expected time is stated, unless the collection `is_step` of a
    rotation, which states the time of all its steps. Raises `UsageError`, `TargetError`, and `Interrupted` on a signal.
    """
    again = again or way_out("", request.path)
    swapped(request.common.source, request.common.model)  # refuses names that the model does not have
    if request.is_new and not is_step and notify is not ignore:
        notify(f"expected total time: {request.expected_time()}")
    with stoppable(again) as stopper:
        pool = create_or_resume(request, notify=notify)
        common = request.common
        needs = planned_needs(len(common.held_out), request.n_judged)
        notify(statement(needs, request.n_judged, planned=True))
        for note in common.notes:
            notify(f"note: {note}")
        with pool.alone_at("collect"), common.enough_threads():
            runs = common.source.runs
            stages = (PLAN, *map(training_name, range(runs)), *map(surrogate_name, range(OWN)))
            run = Run(stages, PoolStore(pool=pool), stopper=stopper, progress=progress)
            plan = run.step(PLAN, partial(_plan, request, notify)).about
            _refuse_other_budget(plan, request)
            collection = _Collection(pool, common, run, common.task(plan["epochs"]))
            bases = [collection.base(k, notify) for k in range(runs)]
            surrogates = [collection.surrogate(k, notify) for k in range(OWN)]
            # The checkpoint of the last training is not needed once all trainings are stored.
            pool.drop(_CHECKPOINT)
            progress(Step("collected", n_trained(common), n_trained(common), 1, 1, 0, 0))
    return Collected(
        runs,
        sum(base["sets"] for base in bases),
        plan["epochs"],
        tuple(base["accuracy"] for base in bases),
        tuple(surrogate["accuracy"] for surrogate in surrogates),
        pool,
    )


def create_or_resume(request: CollectRequest, *, notify: Notify = ignore) -> Pool:
    """Create a pool in the requested folder. To resume, open the existing pool, which must have the same settings.

    Raises `UsageError` if the folder contains other files or another pool.
    """
    path = request.path
    if is_complete(path):
        if not request.resume:
            raise UsageError(f"{str(path)!r} contains a pool already", RESUME, OTHER_FOLDER)
        pool = Pool.open(path, expect_head=request.expect_head)
        request.common.refuse_other(pool)
        return pool
    refuse_other_head(path, request.expect_head, lambda head: None)
    foreign = (
        sorted(entry.name for entry in path.iterdir() if entry.name not in _LEFT_FILES)
        if path.is_dir()
        else []
    )
    if foreign:
        raise UsageError(
            f"{str(path)!r} contains {foreign[0]!r} and is not a pool. The folder of a pool is private to its "
            "owner, so no other files may be in it",
            OTHER_FOLDER,
        )
    pool = Pool.create(path, request.common.about())
    if request.resume:
        notify(f"note: there was no pool in {str(path)!r} to resume, so a new one was created")
    secret(pool)
    notify(f"the pool is encrypted; its key: {pool.seal.source}")
    return pool


# --- the plan


def n_trained(common: RotateRequest) -> int:
    """Return the number of models that are trained from random weights: the bases, if the source trains them, and the
    surrogates.
    """
    return (common.source.runs if common.source.from_fresh_weights else 0) + OWN


def _plan(request: CollectRequest, notify: Notify) -> StoredStage:
    """The plan of the first call, which fixes the number of epochs of each training for all later calls."""
    common, budget_s = request.common, request.budget_s
    epochs, spent_s = common.training.epochs, 0.0
    if budget_s is not None:
        notify(
            f"measuring the time of an update of {common.candidate.name} on this machine, for a budget of "
            f"{budget_s:g} s"
        )
        begin = time.perf_counter()
        measured = pace(common.candidate.recipe, common.model, common.train, common.threat, budget_s)
        spent_s = time.perf_counter() - begin + common.source.runs * common.source.updates * measured.update
        epochs = max(int(_PLANNED * (budget_s - spent_s) / n_trained(common) / measured.epoch), 0)
        least = math.ceil(request.least_updates / common.candidate.per_epoch(len(common.train)))
        if epochs < least:
            raise _too_small(budget_s, spent_s, measured, n_trained(common), least)
    about = {"epochs": epochs, "runs": common.source.runs, "budget_s": budget_s, "planning_s": spent_s}
    return StoredStage({"epochs": torch.tensor([epochs])}, about=about)


def _refuse_other_budget(plan: Mapping[str, Any], request: CollectRequest) -> None:
    """Raise `UsageError` if the plan was made for another budget. None accepts any budget."""
    budget_s, earlier = request.budget_s, plan["budget_s"]
    if budget_s is not None and budget_s != earlier:
        by = "none" if earlier is None else f"{earlier:g} s"
        raise UsageError(
            f"{str(request.path)!r} was planned with a budget of {by} ({plan['epochs']} epochs for each run), but "
            f"{budget_s:g} s were given; create another pool",
            Remedy("budget"),
        )


def _too_small(budget_s: float, spent_s: float, measured: Pace, n_models: int, epochs: int) -> UsageError:
    """The error for a budget that is too small for `epochs` epochs of each training."""
    least_min = math.ceil((n_models * epochs * measured.epoch + spent_s) / 60 / _PLANNED * _SPARE)
    needed = "one epoch" if epochs == 1 else f"{epochs} epochs"
    return UsageError(
        f"a budget of {budget_s:g} s is too small: {n_models} models must be trained, {OWN} of them surrogates, each "
        f"for {needed} at least; an epoch takes {measured.epoch:.3g} s on this machine, and everything else "
        f"{spent_s:.3g} s",
        Remedy("budget", f"{least_min}min", reason="or more"),
        Remedy("source.seeds", 3, reason="for fewer runs"),
    )


# --- trainings


class _Collection:
    """The trainings of a collection, each of which is a step of the run."""

    def __init__(self, pool: Pool, common: RotateRequest, run: Run, task: Task) -> None:
        self.pool, self.common, self.run, self.task = pool, common, run, task
        self.draws = secret(pool)
        self.n_trained = n_trained(common)
        self.n_bases = self.n_trained - OWN
        held_out = common.first_held_out
        # accuracy that a training must exceed: 1.5 times that of always predicting the most frequent class, at most 1
        self.least = min(_GUESSING * int(held_out.y.bincount().max()) / len(held_out), 1.0)

    def base(self, k: int, notify: Notify) -> Mapping[str, Any]:
        """Perform the training run number `k` unless its sets are stored, add its base to the ledger, and return its
        description.
        """
        stored = self.run.step(training_name(k), partial(self._train_sets, k))
        # Also for a stored run: a kill may have come between the storing of the sets and this entry.
        self._list(stored)
        n_sets, right = stored.about["sets"], stored.about["accuracy"]
        notify(f"run {k + 1} of {self.common.source.runs}: {n_sets} sets, accuracy {100 * right:.1f} %")
        return stored.about

    def surrogate(self, k: int, notify: Notify) -> Mapping[str, Any]:
        """Train the surrogate number `k` unless it is stored, and return its description."""
        stored = self.run.step(surrogate_name(k), partial(self._train_surrogate, k))
        notify(f"surrogate {k + 1} of {OWN}: accuracy {100 * stored.about['accuracy']:.1f} %")
        return stored.about

    def _train_sets(self, k: int) -> StoredStage:
        """The sets of one run of the source, and its base."""
        source, model = self.common.source, self.common.model
        base = self._trained(k, self.draws.at("run", k)) if source.from_fresh_weights else model
        rotated_names = swapped(source, model)
        sets = [
            weights_of(model_of_set, rotated_names)
            for model_of_set in source(base, self.task, rng=self.draws.at("sets", k))
        ]
        base_accuracy = accuracy(base, self.common.first_held_out)
        self._refuse_diverged(f"run {k + 1}", base_accuracy)
        joined = Members.of(sets, [k] * len(sets)).tensors
        columns = {f"set.{name}": value.cpu() for name, value in joined.items()}
        columns |= {f"base.{name}": value for name, value in state_of(base).items()}
        return StoredStage(columns, about={"sets": len(sets), "accuracy": base_accuracy})

    def _train_surrogate(self, k: int) -> StoredStage:
        """One of the surrogate models of a surrogate-only attacker."""
        model = self._trained(self.n_bases + k, Draws(self.common.seed).at("own", k))
        model_accuracy = accuracy(model, self.common.first_held_out)
        self._refuse_diverged(f"surrogate {k + 1}", model_accuracy)
        return StoredStage(state_of(model), about={"accuracy": model_accuracy})

    def _trained(self, place: int, rng: Draws) -> Classifier:
        """Like `rotation.collecting.trained_from_fresh_weights`, but each epoch is stored encrypted for a later call.

        `place` is the index among all trainings: first the runs, then the surrogates.
        """
        k = place - self.n_bases
        name, title = (training_name(place), f"run {place + 1}")
        if k >= 0:
            name, title = surrogate_name(k), f"surrogate {k + 1}"
        task = self.task
        start = with_fresh_weights(task.model, rng.at("begin"), task.begins)
        after = self._checkpoint(name)
        done = 0 if after is None else after.epoch
        self.run.progress(Step(title, place + 1, self.n_trained, done, task.recipe.training.epochs, 0, 0))
        for checkpoint in task.recipe(start, task.data, task.threat, rng=rng.at("training"), after=after):
            after = checkpoint
            about = {
                "run": name,
                "epoch": checkpoint.epoch,
                "of": checkpoint.of,
                "measured": dict(checkpoint.measured),
            }
            with self.run.stopper.finishing():
                self.pool.keep(_CHECKPOINT, dict(checkpoint.tensors), about)
            self.run.progress(Step(title, place + 1, self.n_trained, checkpoint.epoch, checkpoint.of, 0, 0))
        assert after is not None
        model = deepcopy(start)
        after.put_into(model)
        return model.eval()

    def _checkpoint(self, name: str) -> Checkpoint | None:
        """The last epoch of a training that an earlier call stored."""
        stored = self.pool.kept(_CHECKPOINT)
        if stored is None or stored.about["run"] != name:
            return None
        about, device = stored.about, torch.device(self.common.device)
        tensors = {key: value.to(device) for key, value in stored.columns.items()}
        return Checkpoint(about["epoch"], about["of"], tensors, about["measured"])

    def _list(self, stored: StoredStage) -> None:
        """Add the base of a run to the pool as a set that never serves."""
        state = without_prefix(stored.columns, "base.")
        self.pool.add(state, {"base": True}, why=BASE, role="base")

    def _refuse_diverged(self, training: str, accuracy: float) -> None:
        """Raise `TargetError` if a training is not clearly better than guessing."""
        if accuracy <= self.least:
            raise TargetError(
                f"{training} has an accuracy of {100 * accuracy:.1f} % on held-out examples; more than "
                f"{100 * self.least:.1f} % was expected, which is 1.5 times that of guessing: the training diverged. "
                "Collect again with a smaller learning rate, a longer warm-up, or another seed",
                Remedy("recipe.training.lr", float(f"{self.common.training.lr / 3:.2g}")),
                Remedy("initialisation", "own"),
            )
