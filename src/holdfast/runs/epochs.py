"""The epochs of one training: each looked at on held-out examples, written down, and the best one kept."""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops import together
from holdfast.ops.fit import Training
from holdfast.ops.recipe import Recipe, trained_as
from holdfast.runs import training
from holdfast.runs.candidates import Candidate
from holdfast.runs.held_out import looked_at
from holdfast.runs.order import Progress, Step
from holdfast.runs.pace import smaller
from holdfast.runs.signals import Stopper
from holdfast.runs.training import BEST, LAST, Kept, Point

STAGES = ["before", "training", "after"]
"""Of a hardening."""
Whole = Callable[[Sequence[Point]], int]
"""How many epochs a training has in all, as far as its curve lets it."""
NOTHING: Any = None
"""What a process says that only hears the first."""


@dataclass(frozen=True)
class Course:
    """What the first process tells the others before it trains."""

    name: str
    """of the candidate"""
    how: Training
    after: Checkpoint | None


@dataclass(frozen=True)
class Trainer:
    """What is trained, on which examples, and which others choose the checkpoint."""

    model: Classifier
    rest: Batch
    held: Batch
    threat: ThreatModel
    seed: int
    machine: str
    """what it is trained on, in one line"""

    def begun(self, recipe: Recipe, after: Checkpoint | None) -> Iterator[Checkpoint]:
        """The checkpoints of a recipe; nothing is trained before the first is asked for."""
        return recipe(self.model, self.rest, self.threat, rng=Draws(self.seed), after=after)

    def course(
        self,
        place: Path,
        candidate: Candidate,
        whole: Whole,
        batch: int,
        stopper: Stopper,
        progress: Progress,
    ) -> tuple[Point, ...]:
        """The curve, from the last checkpoint on, with batches of that size; `whole` says how many epochs it has."""
        how = candidate.recipe.training
        how = replace(how, batch=batch, lr=how.lr * batch / how.batch)
        while True:
            last = training.kept(place, LAST)
            how = replace(how, epochs=whole(() if last is None else last.curve))
            curve = self._some(place, candidate, how, last, whole, stopper, progress)
            if _stale(curve, how) or len(curve) >= whole(curve):
                return curve

    def _some(
        self,
        place: Path,
        candidate: Candidate,
        how: Training,
        last: Kept | None,
        whole: Whole,
        stopper: Stopper,
        progress: Progress,
    ) -> tuple[Point, ...]:
        """The curve as far as the training may go on like that."""
        curve = () if last is None else last.curve
        if _stale(curve, how) or len(curve) >= how.epochs:
            return curve
        highest = max((_score(point) for point in curve), default=(-1.0, -1.0))
        shown = deepcopy(self.model)
        after = None if last is None else last.checkpoint
        together.told(Course(candidate.name, how, after))
        cpu, wall = time.process_time(), time.perf_counter()
        for checkpoint in self.begun(trained_as(candidate.recipe, how), after):
            checkpoint.put_into(shown)
            clean, robust = looked_at(shown, self.held, self.threat)
            now = time.process_time(), time.perf_counter()
            point = Point(
                checkpoint.epoch, **dict(checkpoint.measured), batch=how.batch, clean=clean, robust=robust,
                cpu_s=now[0] - cpu, wall_s=now[1] - wall, hardware=self.machine,
            )  # fmt: skip
            cpu, wall = now
            curve = (*curve, point)
            with stopper.finishing():
                if _score(point) > highest:
                    highest = _score(point)
                    training.keep(place, BEST, checkpoint, curve)
                training.keep(place, LAST, checkpoint, curve)
            progress(_step(candidate, point, whole(curve), len(self.held)))
            if not together.told(not _stale(curve, how) and whole(curve) == how.epochs):
                break
        return curve

    def follow(self, candidate: Candidate, heard: Course) -> None:
        """Train along with the first process."""
        try:
            for _ in self.begun(trained_as(candidate.recipe, heard.how), heard.after):
                if not together.told(NOTHING):
                    break
        except LostLoss:
            return  # which the first process says
        except (RuntimeError, MemoryError) as error:
            smaller(heard.how.batch, error)


def _step(candidate: Candidate, point: Point, epochs: int, held: int) -> Step:
    standing = round(point.robust * held)
    return Step(f"training {candidate.name}", 2, len(STAGES), point.epoch, epochs, standing, held)


def _score(point: Point) -> tuple[float, float]:
    return point.robust, point.clean


def _stale(curve: tuple[Point, ...], how: Training) -> bool:
    """Whether as many epochs as its patience have passed since the held-out robust accuracy was last better than ever.

    Those in which eps still grew do not count.
    """
    heights, patience = [point.robust for point in curve][int(how.warmup * how.epochs) :], how.patience
    return bool(patience and heights) and len(heights) - 1 - heights.index(max(heights)) >= patience
