"""Collection of a pool: independent training runs, resumable at the last epoch, their encrypted sets, and surrogates.

The surrogates represent a surrogate-only attacker: models of the same architecture, trained by the same recipe on
the same examples from their own random weights. Gates on thefts are relative to the success of this attacker.
"""

import math
import secrets
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.core.checkpoint import Checkpoint, without_prefix
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.engine.progress import Notify, Progress, Step, ignore, silent
from holdfast.engine.signals import Stopper
from holdfast.rotation import Members, Task, loaded, weights_of
from holdfast.rotation.collecting import begun_anew, swapped
from holdfast.store.columns import ColumnFile
from holdfast.store.manifest import refuse_other_head, stands
from holdfast.store.pool import Pool
from holdfast.verbs.pace import Pace, pace, whole_epochs
from holdfast.verbs.rotate.request import RotateRequest, accuracy, state_of

OWN = 4
"""Number of surrogates of a surrogate-only attacker."""
BASE = "a base, which other sets are generated from; it never serves"
"""The recorded reason for which a base does not serve. What makes it a base is its role."""
_LEFT = {
    "pool.json",
    ".pool.json.part",
    "ledger.jsonl",
    "ledger.head",
    ".ledger.head.part",
    "ledger.lock",
    "sets",
}  # may be left by a killed creation of the pool
_BEGUN, _PLAN, _SECRET = "begun", "plan", "secret"
_GUESSING = 1.5  # times the accuracy of the most frequent class, below which a run has diverged


@dataclass(frozen=True)
class Collected:
    """Number and accuracy of the collected sets and surrogates."""

    runs: int
    sets: int
    epochs: int
    accuracy: tuple[float, ...]
    """accuracy of each base on held-out examples"""
    own: tuple[float, ...]
    """accuracy of each surrogate"""


def begun(
    path: Path, request: RotateRequest, *, resume: bool, expect_head: str = "", notify: Notify = ignore
) -> Pool:
    """Return the pool in a folder: a new one, or with `resume` an existing one with the same settings.

    With `expect_head`, its ledger must contain that head; see `Pool.held`.
    """
    if stands(path):
        if not resume:
            raise UsageError(
                f"{str(path)!r} contains a pool already; resume it with --resume, or name another folder with --run"
            )
        pool = Pool.held(path, expect_head=expect_head)
        request.refuse_other(pool)
        return pool
    refuse_other_head(path, expect_head, lambda head: None)
    strange = sorted(each.name for each in path.iterdir() if each.name not in _LEFT) if path.is_dir() else []
    if strange:
        raise UsageError(
            f"{str(path)!r} contains {strange[0]!r} and is not a pool. The folder of a pool is private to its "
            "owner, so no other files may be in it; name a new folder with --run"
        )
    pool = Pool.begun(path, request.about())
    secret(pool)
    notify(f"the pool is encrypted; its key: {pool.seal.source}")
    return pool


def collect(
    pool: Pool,
    request: RotateRequest,
    *,
    budget_s: float | None = None,
    stopper: Stopper | None = None,
    notify: Notify = ignore,
    progress: Progress = silent,
) -> Collected:
    """Train the missing runs, and store their sets encrypted in the pool. Raises `UsageError`, `TargetError`."""
    with pool.alone_at("collect"):
        return _Collecting(pool, request, stopper or Stopper(), notify, progress).done(budget_s)


def members(pool: Pool) -> Members:
    """All collected sets. Raises `UsageError` if some are missing."""
    whole: Members | None = None
    for run, kept in enumerate(_runs(pool)):
        tensors = without_prefix(kept.columns, "set.")
        some = Members(tensors, torch.full((int(kept.about["sets"]),), run))
        whole = some if whole is None else whole.joined(some)
    assert whole is not None
    return whole


def bases(pool: Pool) -> tuple[str, ...]:
    """Names of the bases in their order."""
    return tuple(member.name for member in pool.ledger.members if member.role == "base")


def bases_left(pool: Pool) -> tuple[str, ...]:
    """Names of the bases that were not deleted."""
    return tuple(m.name for m in pool.ledger.members if m.role == "base" and not m.deleted)


def surrogates(pool: Pool, request: RotateRequest) -> list[Classifier]:
    """The surrogate models of a surrogate-only attacker. Raises `UsageError` if some are missing."""
    files = [pool.kept(_own(k)) for k in range(OWN)]
    _refuse_uncollected(pool, [_own(k) for k in range(OWN)], files)
    return [loaded(request.model, kept.columns, "own") for kept in files if kept is not None]


def secret(pool: Pool) -> Draws:
    """The secret random stream of the pool, created at the first call.

    Its seed comes from the operating system and is stored encrypted: a known seed would reproduce the collection.
    """
    stored = pool.kept(_SECRET)
    if stored is None:
        pool.keep(_SECRET, {"seed": torch.tensor([secrets.randbits(62)])}, {})
        stored = pool.kept(_SECRET)
        assert stored is not None
    return Draws(int(stored.columns["seed"]))


def epochs_of(pool: Pool) -> int:
    """The planned number of epochs of each run. Raises `UsageError` if there is no plan."""
    plan = pool.kept(_PLAN)
    if plan is None:
        raise UsageError(
            f"nothing was collected in {str(pool.path)!r} yet; run holdfast rotate collect first"
        )
    return int(plan.about["epochs"])


def _runs(pool: Pool) -> list[ColumnFile]:
    plan = pool.kept(_PLAN)
    runs = 0 if plan is None else int(plan.about["runs"])
    files = [pool.kept(_run(k)) for k in range(runs)]
    _refuse_uncollected(pool, [_run(k) for k in range(max(runs, 1))], files)
    return [kept for kept in files if kept is not None]


def _refuse_uncollected(pool: Pool, names: list[str], found: list[ColumnFile | None]) -> None:
    done = sum(kept is not None for kept in found)
    if done < len(names):
        raise UsageError(
            f"{str(pool.path)!r} contains {done} of {len(names)} runs; finish the collection first, with --resume"
        )


def _too_small(budget_s: float, spent_s: float, found: Pace, trained: int) -> str:
    least = math.ceil((trained * found.epoch + spent_s) / 60 / 0.95)
    return (
        f"a budget of {budget_s:g} s is too small: {trained} models must be trained, {OWN} of them surrogates; an "
        f"epoch of each takes {found.epoch:.3g} s on this machine, and everything else {spent_s:.3g} s. Give "
        f"--budget {least}min or more, or fewer runs, as in --set source.seeds=3"
    )


def _run(k: int) -> str:
    return f"run_{k}"


def _own(k: int) -> str:
    return f"own_{k}"


def _where(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"epoch": checkpoint.epoch, "of": checkpoint.of, "measured": dict(checkpoint.measured)}


class _Collecting:
    """One call of `collect`, which trains all missing runs of a pool."""

    def __init__(
        self, pool: Pool, request: RotateRequest, stopper: Stopper, notify: Notify, progress: Progress
    ) -> None:
        self.pool, self.request, self.stopper, self.notify, self.progress = (
            pool,
            request,
            stopper,
            notify,
            progress,
        )
        self.draws = secret(pool)
        self.anew = request.source.runs if request.source.anew else 0

    def done(self, budget_s: float | None) -> Collected:
        """Train all runs and surrogates that are missing, and return the result."""
        plan = self._planned(budget_s)
        task, runs, lost = self.request.task(plan["epochs"]), self.request.source.runs, self._guessed()
        descriptions: list[Mapping[str, Any]] = []
        own: list[float] = []
        for run in range(runs):
            stored = self.pool.kept(_run(run)) or self._run(task, run, lost)
            self._list(stored)
            descriptions.append(stored.about)
            self.notify(
                f"run {run + 1} of {runs}: {stored.about['sets']} sets, accuracy {100 * stored.about['accuracy']:.1f} %"
            )
        for k in range(OWN):
            stored = self.pool.kept(_own(k)) or self._surrogate(task, k, lost)
            own.append(stored.about["accuracy"])
            self.notify(f"surrogate {k + 1} of {OWN}: accuracy {100 * stored.about['accuracy']:.1f} %")
        self.pool.drop(_BEGUN)
        self.progress(Step("collected", self.anew + OWN, self.anew + OWN, 1, 1, 0, 0))
        right = tuple(one["accuracy"] for one in descriptions)
        return Collected(runs, sum(one["sets"] for one in descriptions), plan["epochs"], right, tuple(own))

    def _planned(self, budget_s: float | None) -> Mapping[str, Any]:
        """The plan of the first call, which fixes the number of epochs of each run."""
        stored = self.pool.kept(_PLAN)
        if stored is not None:
            planned = stored.about["budget_s"]
            if budget_s is not None and budget_s != planned:
                by = "none" if planned is None else f"{planned:g} s"
                raise UsageError(
                    f"{str(self.pool.path)!r} was planned with a budget of {by} ({stored.about['epochs']} epochs "
                    f"for each run), but {budget_s:g} s were given; leave --budget out, or create another pool"
                )
            return stored.about
        epochs, spent_s = self.request.training.epochs, 0.0
        if budget_s is not None:
            self.notify(
                f"measuring the time of an update of {self.request.candidate.name} on this machine, for a budget of "
                f"{budget_s:g} s"
            )
            begin = time.perf_counter()
            measured_pace = pace(
                self.request.candidate.recipe,
                self.request.model,
                self.request.train,
                self.request.threat,
                budget_s,
            )
            spent_s = time.perf_counter() - begin
            trained = self.anew + OWN
            spent_s += self.request.source.runs * self.request.source.updates * measured_pace.update
            epochs = whole_epochs((budget_s - spent_s) / trained, measured_pace)
            if not epochs:
                raise UsageError(_too_small(budget_s, spent_s, measured_pace, trained))
        plan = {
            "epochs": epochs,
            "runs": self.request.source.runs,
            "budget_s": budget_s,
            "planning_s": spent_s,
        }
        self.pool.keep(_PLAN, {"epochs": torch.tensor([epochs])}, plan)
        return plan

    def _guessed(self) -> float:
        """Accuracy that a run must exceed: 1.5 times that of always predicting the most frequent class, at most 1."""
        held = self.request.first_held
        return min(_GUESSING * int(held.y.bincount().max()) / len(held), 1.0)

    def _run(self, task: Task, run: int, lost: float) -> ColumnFile:
        """Train one run of the source, and store its sets and its base encrypted."""
        source, model = self.request.source, self.request.model
        base = self._trained(task, run, self.draws.at("run", run)) if source.anew else model
        named = swapped(source, model)
        sets = [weights_of(one, named) for one in source(base, task, rng=self.draws.at("sets", run))]
        right = accuracy(base, self.request.first_held)
        self._refuse_astray(f"run {run + 1}", right, lost)
        joined = Members.of(sets, [run] * len(sets)).tensors
        columns = {f"set.{name}": value.cpu() for name, value in joined.items()}
        columns |= {f"base.{name}": value for name, value in state_of(base).items()}
        metadata = {"sets": len(sets), "accuracy": right}
        with self.stopper.finishing():
            self.pool.keep(_run(run), columns, metadata)
        return ColumnFile(columns, metadata)

    def _surrogate(self, task: Task, k: int, lost: float) -> ColumnFile:
        """Train one of the surrogate models of a surrogate-only attacker."""
        model = self._trained(task, self.anew + k, Draws(self.request.seed).at("own", k))
        right = accuracy(model, self.request.first_held)
        self._refuse_astray(f"surrogate {k + 1}", right, lost)
        columns, metadata = state_of(model), {"accuracy": right}
        with self.stopper.finishing():
            self.pool.keep(_own(k), columns, metadata)
        return ColumnFile(columns, metadata)

    def _trained(self, task: Task, place: int, rng: Draws) -> Classifier:
        """Like `rotation.collecting.trained_anew`, but each epoch is stored encrypted for a later call.

        `place` is the index among all trainings: first the runs, then the surrogates.
        """
        k = place - self.anew
        name, stage = (_run(place), f"run {place + 1}") if k < 0 else (_own(k), f"surrogate {k + 1}")
        start = begun_anew(task.model, rng.at("begin"), task.begins)
        after = self._last(name)
        begun = 0 if after is None else after.epoch
        self.progress(Step(stage, place + 1, self.anew + OWN, begun, task.recipe.training.epochs, 0, 0))
        for checkpoint in task.recipe(start, task.data, task.threat, rng=rng.at("training"), after=after):
            after = checkpoint
            with self.stopper.finishing():
                self.pool.keep(_BEGUN, dict(checkpoint.tensors), {"run": name, **_where(checkpoint)})
            self.progress(Step(stage, place + 1, self.anew + OWN, checkpoint.epoch, checkpoint.of, 0, 0))
        assert after is not None
        model = deepcopy(start)
        after.put_into(model)
        return model.eval()

    def _last(self, name: str) -> Checkpoint | None:
        """The last epoch of a run that an earlier call stored."""
        stored = self.pool.kept(_BEGUN)
        if stored is None or stored.about["run"] != name:
            return None
        metadata = stored.about
        device = torch.device(self.request.device)
        tensors = {key: value.to(device) for key, value in stored.columns.items()}
        return Checkpoint(metadata["epoch"], metadata["of"], tensors, metadata["measured"])

    def _list(self, kept: ColumnFile) -> None:
        """Add the base of a run to the pool as a set that never serves."""
        state = without_prefix(kept.columns, "base.")
        name = self.pool.add(state, {"base": True}, why=BASE, role="base")
        if self.pool.ledger.member(name).state == "candidate":
            self.pool.refuse(name, BASE)

    def _refuse_astray(self, what: str, right: float, lost: float) -> None:
        """Raise `TargetError` if a run is not better than `lost`."""
        if right <= lost:
            raise TargetError(
                f"{what} has an accuracy of {100 * right:.1f} % on held-out examples; more than {100 * lost:.1f} % "
                "was expected, which is 1.5 times that of guessing: the training diverged. Collect again with a "
                f"smaller learning rate, as in --set recipe.training.lr={self.request.training.lr / 3:.2g}, a longer "
                "warm-up, another --seed, or --set begins=own"
            )
