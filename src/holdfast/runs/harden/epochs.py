"""Trains a model epoch by epoch. After each epoch the model is evaluated on held-out examples and saved as a
checkpoint. Within a time budget, short epochs are not all evaluated.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import Checkpoint, TrainingPlan
from holdfast.recipes.training import distributed
from holdfast.recipes.training.fit import Saving, Training
from holdfast.recipes.training.recipe import Recipe, facts_of, trained_as
from holdfast.recipes.training.update_plans import most_evaluations
from holdfast.runs.engine.progress import EpochMeasures, Step
from holdfast.runs.engine.run import Run
from holdfast.runs.harden import checkpoints
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.checkpoints import BEST, LAST, EpochLog, Point, last_epoch
from holdfast.runs.harden.held_out import held_out_shares, proved_accuracy
from holdfast.runs.harden.pace import Clock, smaller

STAGES = ["before", "training", "after"]
"""Names of the stages of a hardening."""
NOTHING: Any = None
"""Value that every process except the first passes to a broadcast."""


@dataclass(frozen=True)
class TrainingStart:
    """Message with the settings of a training, which the first process sends to the other processes of a distributed
    training.
    """

    name: str
    """name of the candidate"""
    epochs: int
    batch: int
    lr: float
    """learning rate in the settings, for this size of a batch"""
    paced: bool
    """whether the training has a budget"""
    after: Checkpoint | None


@dataclass(frozen=True)
class Trainer:
    """Trains a model, with the training examples and the held-out examples on which its checkpoints are evaluated."""

    model: Classifier
    rest: TrainingData
    held_out: Batch
    threat: ThreatModel
    seed: int
    machine: str
    """description of the hardware, in one line"""
    clock: Clock = field(default=time.perf_counter)
    checkpoint_every: int | None = None
    """number of updates between two checkpoints within an epoch, or None"""
    log: EpochLog = field(default_factory=EpochLog)
    attempt: int = 1
    """number of the attempt, from 1"""
    given_clean: float | None = None
    """clean accuracy of the given model on the held-out examples"""

    def checkpoints(self, recipe: Recipe, after: Checkpoint | None) -> Iterator[Checkpoint]:
        """Return an iterator over the checkpoints of a training with a recipe. The training makes no update before the
        first checkpoint is requested.
        """
        return recipe(self.model, self.rest, self.threat, rng=Draws(self.seed), after=after)

    def start(self, recipe: Recipe) -> float | None:
        """Return the clean accuracy on the held-out examples with which a training starts, or None if the recipe starts
        with other weights than the given ones.
        """
        return None if facts_of(recipe).starts_anew else self.given_clean

    def course(
        self,
        place: Path,
        candidate: Candidate,
        settings: Training,
        run: Run,
    ) -> tuple[Point, ...]:
        """Continue the training from the last saved checkpoint until it ends. Return the training curve, which has one
        point for each epoch that was evaluated.
        """
        last, start = checkpoints.saved(place, LAST), self.start(candidate.recipe)
        curve = () if last is None else last.curve
        self.log.resumed(self.attempt, candidate.name, curve)
        if last is not None and ended_by(last.checkpoint, curve, settings, start):
            return curve
        # Below every score, so that the first epoch is always stored as the best one.
        highest = max((point.score for point in curve), default=(-1.0, -1.0))
        evaluated_model = facts_of(candidate.recipe).network(self.model)
        within = checkpoints.saved_within(place, last_epoch(curve), settings.batch)
        latest = within or last
        after = None if latest is None else latest.checkpoint
        is_paced = settings.pacing is not None
        distributed.broadcast(
            TrainingStart(candidate.name, settings.epochs, settings.batch, settings.lr, is_paced, after)
        )
        spent_s = (0.0, 0.0) if within is None else within.spent_s
        cpu, wall = time.process_time() - spent_s[0], self.clock() - spent_s[1]

        def save_within(checkpoint: Checkpoint) -> None:
            spent_s = time.process_time() - cpu, self.clock() - wall
            with run.stopper.finishing():
                checkpoints.save_within(place, checkpoint, curve, settings.batch, spent_s)

        settings = self._saving(settings, save_within)
        for checkpoint in self.checkpoints(trained_as(candidate.recipe, settings), after):
            checkpoint.put_into(evaluated_model)
            shares = held_out_shares(evaluated_model, self.held_out, self.threat)
            certified = proved_accuracy(evaluated_model, self.held_out, self.threat, [candidate.recipe])
            now = time.process_time(), self.clock()
            point = Point(
                checkpoint.epoch, **dict(checkpoint.measured), batch=settings.batch, **vars(shares),
                cpu_s=now[0] - cpu, wall_s=now[1] - wall, hardware=self.machine, part=checkpoint.part,
                share=checkpoint.share, certified=certified,
            )  # fmt: skip
            cpu, wall = now
            curve = (*curve, point)
            with run.stopper.finishing():
                # The best checkpoint is written before the last one: after a kill in between, the epoch is repeated
                # with the same result.
                if point.score > highest and not collapsed(curve, start):
                    highest = point.score
                    checkpoints.save(place, BEST, checkpoint, curve)
                checkpoints.save(place, LAST, checkpoint, curve)
                checkpoints.delete_within(place)
            self.log.epoch(self.attempt, candidate.name, point)
            run.progress(_step(candidate, curve, checkpoint, len(self.held_out)))
            if not distributed.broadcast(not (collapsed(curve, start) or _stale(curve, settings))):
                break
        return curve

    def _saving(self, settings: Training, save: Callable[[Checkpoint], None]) -> Training:
        """The settings with checkpoints within an epoch, if they were requested."""
        if self.checkpoint_every is None:
            return settings
        return replace(settings, saving=Saving(self.checkpoint_every, save))

    def follow(self, candidate: Candidate, message: TrainingStart) -> None:
        """Take part in a distributed training as a process other than the first, which saves no checkpoints."""
        try:
            settings = replace(
                candidate.recipe.training,
                epochs=message.epochs,
                batch=message.batch,
                lr=message.lr,
                pacing=planned_elsewhere if message.paced else None,
            )
            settings = self._saving(settings, lambda checkpoint: None)
            for _ in self.checkpoints(trained_as(candidate.recipe, settings), message.after):
                if not distributed.broadcast(NOTHING):
                    break
        except LostLoss:
            return  # the first process reports it
        except (RuntimeError, MemoryError) as error:
            smaller(message.batch, error)


def _step(candidate: Candidate, curve: tuple[Point, ...], checkpoint: Checkpoint, n_held_out: int) -> Step:
    point, of = curve[-1], checkpoint.of
    left_s = _left_s(curve, checkpoint)
    measured = EpochMeasures(point.epoch, of, point.loss, point.robust, point.clean, n_held_out, left_s)
    n_robust = round(point.robust * n_held_out)
    return Step(f"training {candidate.name}", 2, len(STAGES), point.epoch, of, n_robust, n_held_out, measured)


def _left_s(curve: tuple[Point, ...], checkpoint: Checkpoint) -> float:
    """Expected seconds until the end of a training: of its last plan, or at the pace of its epochs."""
    n_left = checkpoint.of - checkpoint.epoch
    if not checkpoint.plans or not checkpoint.plans[-1].update_s:  # epochs or passes were given, and no time
        return n_left * sum(point.wall_s for point in curve) / len(curve)
    plan = checkpoint.plans[-1]
    updates_s = max(plan.end - checkpoint.updates, 0) * plan.update_s
    return updates_s + min(n_left, most_evaluations(updates_s, plan.look_s)) * plan.look_s


def planned_elsewhere(done: int, position: int, per_epoch: int, last: TrainingPlan | None) -> TrainingPlan:
    """Pacing of a process that receives its plans from the first process, or of a training that only shows that a
    budget of time is possible.
    """
    no_plan: TrainingPlan = NOTHING
    return no_plan


EndedBy = Literal["epochs", "budget", "patience", "collapse"]
"""Reason for the end of a training: all epochs done, budget spent, patience exceeded, or a network that predicts one
class only."""
_BETTER = 0.75  # largest share of its errors that an earlier epoch made


def ended_by(
    last: Checkpoint, curve: tuple[Point, ...], settings: Training, start: float | None
) -> EndedBy | None:
    """Return the reason why a training ends with the checkpoint `last`, such as an exhausted budget, or None if it
    continues. `start` is the clean accuracy before the training, as for `collapsed`.
    """
    if collapsed(curve, start):
        return "collapse"
    if _stale(curve, settings):
        return "patience"
    if last.plans:
        return "budget" if last.updates >= last.plans[-1].end else None
    return "epochs" if last.epoch >= settings.epochs else None


def collapsed(curve: tuple[Point, ...], start: float | None = None) -> bool:
    """Return whether the network predicts one class for nearly all held-out examples after the last epoch, and was
    clearly better after an earlier one.

    If only the given model was better, whose clean accuracy is `start`, the network is collapsed after the second such
    epoch in a row: a warm-up may pass through a constant prediction. Without `start`, a network that has predicted one
    class since the first epoch is not collapsed: it has not learned yet.
    """
    *earlier, last = curve
    largest = _BETTER * (1 - last.clean)
    if not last.is_constant:
        return False
    if any(1 - point.clean <= largest for point in earlier):
        return True
    is_second = bool(earlier) and earlier[-1].is_constant
    return is_second and start is not None and 1 - start <= largest


def _stale(curve: tuple[Point, ...], settings: Training) -> bool:
    """Whether the held-out robust or certified accuracy has not improved for as many epochs as the patience.

    Epochs in which eps still increased do not count.
    """
    points, patience = [point for point in curve if point.share > settings.warmup], settings.patience
    if not patience or not points:
        return False
    best = max(points, key=lambda point: point.score[0])  # the first of equal ones
    return points[-1].epoch - best.epoch >= patience
