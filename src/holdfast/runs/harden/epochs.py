"""Trains a model epoch by epoch. After each epoch the model is evaluated on held-out examples and saved as a
checkpoint.
"""

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import Checkpoint, TrainingPlan
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training import distributed
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.runs.engine.progress import Step
from holdfast.runs.engine.run import Run
from holdfast.runs.harden import checkpoints
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.checkpoints import BEST, LAST, Point
from holdfast.runs.harden.held_out import held_out_accuracies, proved_accuracy
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
    how: Training
    """settings of the training, without the pacing for a budget, which only the first process needs"""
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

    def checkpoints(self, recipe: Recipe, after: Checkpoint | None) -> Iterator[Checkpoint]:
        """Return an iterator over the checkpoints of a training with a recipe. The training makes no update before the
        first checkpoint is requested.
        """
        return recipe(self.model, self.rest, self.threat, rng=Draws(self.seed), after=after)

    def course(
        self,
        place: Path,
        candidate: Candidate,
        settings: Training,
        run: Run,
    ) -> tuple[Point, ...]:
        """Continue the training from the last saved checkpoint until it ends. Return the training curve, which has one
        point for each epoch.
        """
        last = checkpoints.saved(place, LAST)
        curve = () if last is None else last.curve
        if last is not None and ended_by(last.checkpoint, curve, settings):
            return curve
        # Below every score, so that the first epoch is always stored as the best one.
        highest = max((point.score for point in curve), default=(-1.0, -1.0))
        evaluated_model = deepcopy(self.model)
        after = None if last is None else last.checkpoint
        distributed.broadcast(
            TrainingStart(candidate.name, replace(settings, pacing=None), settings.pacing is not None, after)
        )
        cpu, wall = time.process_time(), self.clock()
        for checkpoint in self.checkpoints(trained_as(candidate.recipe, settings), after):
            checkpoint.put_into(evaluated_model)
            clean, robust = held_out_accuracies(evaluated_model, self.held_out, self.threat)
            certified = proved_accuracy(evaluated_model, self.held_out, self.threat, [candidate.recipe])
            now = time.process_time(), self.clock()
            point = Point(
                checkpoint.epoch, **dict(checkpoint.measured), batch=settings.batch, clean=clean, robust=robust,
                cpu_s=now[0] - cpu, wall_s=now[1] - wall, hardware=self.machine, part=checkpoint.part,
                share=checkpoint.share, certified=certified,
            )  # fmt: skip
            cpu, wall = now
            curve = (*curve, point)
            with run.stopper.finishing():
                # The best checkpoint is written before the last one: after a kill in between, the epoch is repeated
                # with the same result.
                if point.score > highest:
                    highest = point.score
                    checkpoints.save(place, BEST, checkpoint, curve)
                checkpoints.save(place, LAST, checkpoint, curve)
            run.progress(_step(candidate, point, checkpoint.of, len(self.held_out)))
            if not distributed.broadcast(not _stale(curve, settings)):
                break
        return curve

    def follow(self, candidate: Candidate, message: TrainingStart) -> None:
        """Take part in a distributed training as a process other than the first, which saves no checkpoints."""
        try:
            settings = replace(message.how, pacing=_planned_elsewhere if message.paced else None)
            for _ in self.checkpoints(trained_as(candidate.recipe, settings), message.after):
                if not distributed.broadcast(NOTHING):
                    break
        except LostLoss:
            return  # the first process reports it
        except (RuntimeError, MemoryError) as error:
            smaller(message.how.batch, error)


def _step(candidate: Candidate, point: Point, epochs: int, n_held_out: int) -> Step:
    n_robust = round(point.robust * n_held_out)
    return Step(f"training {candidate.name}", 2, len(STAGES), point.epoch, epochs, n_robust, n_held_out)


def _planned_elsewhere(done: int, position: int, per_epoch: int, last: TrainingPlan | None) -> TrainingPlan:
    """Pacing of a process that receives its plans from the first process."""
    no_plan: TrainingPlan = NOTHING
    return no_plan


EndedBy = Literal["epochs", "budget", "patience"]
"""Reason for the end of a training: all epochs done, budget spent, or patience exceeded."""


def ended_by(last: Checkpoint, curve: tuple[Point, ...], settings: Training) -> EndedBy | None:
    """Return the reason why a training ends with the checkpoint `last`, such as an exhausted budget, or None if it
    continues.
    """
    if _stale(curve, settings):
        return "patience"
    if last.plans:
        return "budget" if last.updates >= last.plans[-1].end else None
    return "epochs" if last.epoch >= settings.epochs else None


def _stale(curve: tuple[Point, ...], settings: Training) -> bool:
    """Whether the held-out robust or certified accuracy has not improved for as many epochs as the patience.

    Epochs in which eps still increased do not count.
    """
    accuracies, patience = (
        [point.score[0] for point in curve if point.share > settings.warmup],
        settings.patience,
    )
    return (
        bool(patience and accuracies) and len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience
    )
