"""Candidate recipes of a hardening, and the training of one epoch by epoch."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import Checkpoint, TrainingPlan
from holdfast.recipes.training import optimisation
from holdfast.recipes.training.fit import Saving, Training, updates
from holdfast.recipes.training.optimisation import broadcast, most_evaluations
from holdfast.recipes.training.recipe import Recipe, RecipeFacts, facts_of, trained_as
from holdfast.reports.words import plain
from holdfast.runs.engine.progress import EpochMeasures, Step
from holdfast.runs.engine.run import Run
from holdfast.runs.harden import checkpoints
from holdfast.runs.harden.checkpoints import BEST, LAST, EpochLog, Point, last_epoch
from holdfast.runs.harden.held_out import held_out_shares, proved_accuracy
from holdfast.runs.harden.pace import Clock, Pace, import_optimisers, pace, smaller, too_small

_TIMED_EXAMPLES = (8, 8, 16, 32, 64)
"""Held-out examples on which evaluations are timed: twice on a few, since a machine may be busy for a moment, and on
more as far as an evaluation takes at most half of its share of the budget."""
_UNTIMED_EXAMPLES = 2  # held-out examples in the evaluation before
_EVALUATION_SHARE = 0.05  # largest share of the budget for an evaluation
_PLANNING = 0.1  # share of the budget after which no recipe is timed that cannot reach its number of epochs
_FEW_UPDATES = 1_000  # number of updates below which a training may have a larger learning rate
_FEW = 100  # number of held-out examples below which a training is announced with a warning


@dataclass(frozen=True)
class Evaluation:
    """Function that evaluates a model on held-out examples, with the number of available examples."""

    examples: int
    """number of available held-out examples"""
    at: Callable[[int], object]
    """function that evaluates the model on a given number of these examples"""


@dataclass(frozen=True)
class Candidate:
    """A recipe that a hardening may choose for its training, with its settings."""

    name: str
    recipe: Recipe
    settings: Mapping[str, Any]
    """settings of the recipe, as plain values"""
    least: int = 1
    """smallest number of epochs for which this recipe is chosen; with fewer epochs, a weaker recipe gives better
    results"""
    short_lr: float | None = None
    """learning rate of a training of few updates; None for that of the recipe"""

    def taught_by(self, teacher: Classifier) -> "Candidate":
        """Return the same candidate, whose recipe trains on the predictions of a teacher if it needs one."""
        if not isinstance(self.recipe, RecipeFacts):
            return self
        taught: Recipe = self.recipe.taught_by(teacher)
        return replace(self, recipe=taught)

    def per_epoch(self, examples: int) -> int:
        """Return the number of updates of this recipe in an epoch of `examples` training examples."""
        return updates(examples, self.recipe.training.batch)


@dataclass(frozen=True)
class _Planned:
    """A candidate that was timed, and how many epochs of it fit into the budget."""

    candidate: Candidate
    pace: Pace
    epochs: float

    def attempt(self, reason: str) -> dict[str, Any]:
        """Return this candidate recipe as an entry of the stored plan, with its epochs, its measured times and the
        reason for the choice. A training of few updates may have another learning rate than the recipe.
        """
        lr = self.candidate.short_lr if self.epochs * self.pace.per_epoch < _FEW_UPDATES else None
        if lr is not None:
            reason += f"; learning rate {plain(lr)}, since fewer than {_FEW_UPDATES:,} updates fit"
        return {
            "recipe": self.candidate.name,
            "epochs": self.epochs,
            "reason": reason,
            "update_s": self.pace.update,
            "epoch_s": self.pace.epoch,
            "evaluation_s": self.pace.look_s,
            "held_out": self.pace.held_out,
            "lr": lr,
        }


def attempts(
    candidates: Sequence[Candidate],
    budget_s: float | None,
    model: Classifier,
    data: TrainingData,
    threat: ThreatModel,
    evaluation: Evaluation,
    clock: Clock = time.perf_counter,
    *,
    anyway: bool = False,
) -> tuple[list[dict[str, Any]], float]:
    """Choose the recipes of a hardening that fit into the time budget. Return them in the order in which they are
    trained, and the seconds that the planning took.

    `candidates` are ordered from the fastest to the strongest. The first attempt is the strongest candidate whose
    required epochs fit into the budget that remains after the planning. The later attempts are the stronger candidates
    of which one epoch fits into the budget; they are used if doubts are raised against the model of the attempt before.
    If there are several candidates, the entry `fitting_epochs` of the first attempt gives the number of epochs that fit
    for each timed candidate, which may be fractional. All candidates are timed up to the first one whose epochs show
    that no later one can reach its smallest number of epochs; later ones are timed while a share of the budget is left
    for a second training. Raises `UsageError` if not even one epoch fits at the speed of the fastest measured update;
    with `anyway`, if not even one such update fits. A training whose epoch may fit is started and ends within the
    budget.
    """
    if budget_s is None:
        requested = [
            {"recipe": candidate.name, "epochs": candidate.recipe.training.epochs, "reason": "requested"}
            for candidate in candidates
        ]
        return requested, 0.0
    import_optimisers()
    started, planned, evaluation_time = clock(), list[_Planned](), None
    for k, candidate in enumerate(candidates):  # each is slower than the one before
        measured = pace(candidate.recipe, model, data, threat, budget_s, clock)
        if measured.least_s(1 if anyway else measured.per_epoch) <= budget_s:
            evaluation_time = evaluation_time or _timed_evaluation(evaluation, budget_s, clock)
            measured = replace(measured, look_s=evaluation_time[0], held_out=evaluation_time[1])
        epochs = measured.epochs_within(budget_s)
        planned.append(_Planned(candidate, measured, epochs))
        could_be_chosen = any(epochs >= later.least for later in candidates[k + 1 :])
        # broadcast, because all processes of a distributed training must choose the same recipes
        in_time = broadcast(clock() - started) <= _PLANNING * budget_s
        # a later one may still be trained second
        if not could_be_chosen and not (epochs >= 1 and in_time):
            break
    spent_s = broadcast(clock() - started)
    planned = [replace(one, epochs=one.pace.epochs_within(budget_s - spent_s)) for one in planned]
    fastest = planned[0]
    per_epoch = fastest.pace.per_epoch
    if fastest.pace.least_s(1 if anyway else per_epoch) > budget_s - spent_s:
        n_steps = fastest.candidate.settings.get("steps", 1)
        raise too_small(
            fastest.candidate.name, budget_s, fastest.pace, spent_s, anyway=anyway, n_steps=n_steps
        )
    planned[0] = fastest = replace(fastest, epochs=max(fastest.epochs, 1 / per_epoch))
    if len(candidates) == 1:
        return [fastest.attempt("requested")], spent_s
    reaching = [k for k, each in enumerate(planned) if each.epochs >= each.candidate.least]
    chosen = max(reaching, default=0)
    first = planned[chosen].attempt(_reason(planned, chosen, candidates[len(planned) :]))
    first["fitting_epochs"] = {each.candidate.name: each.epochs for each in planned}
    later = [each for each in planned[chosen + 1 :] if each.epochs >= 1]
    return [first, *(each.attempt("doubts were raised against the model before") for each in later)], spent_s


def _reason(planned: Sequence[_Planned], chosen: int, untimed: Sequence[Candidate]) -> str:
    """Why the recipe at the position `chosen` is trained first: its epochs, and those of the stronger recipes."""
    taken = planned[chosen]
    fit = f"{_epochs(taken.epochs)} {'fits' if taken.epochs == 1 else 'fit'}"
    if taken.epochs >= taken.candidate.least:
        first = f"the strongest recipe whose smallest number of epochs fits into the budget: {fit}"
    else:
        first = (
            "no recipe reaches its smallest number of epochs within the budget, and this is the fastest: "
            + fit
        )
    first += f" and {taken.candidate.least} {'is' if taken.candidate.least == 1 else 'are'} needed"
    stronger = [
        f"of {each.candidate.name}, {_epochs(each.epochs)} would fit and {each.candidate.least} are needed"
        for each in planned[chosen + 1 :]
    ]
    slower = [f"{each.name}, which is slower, needs {each.least}" for each in untimed]
    return "; ".join([first, *stronger, *slower])


def _epochs(n: float) -> str:
    return "1 epoch" if n == 1 else f"{plain(n)} epochs"


def _timed_evaluation(evaluation: Evaluation, budget_s: float, clock: Clock) -> tuple[float, int]:
    """Return the seconds of an evaluation, timed on a few held-out examples, and the number of examples that it uses.

    That number is as large as the part of the budget for evaluations allows. The first evaluation is not timed, because
    it selects kernels.
    """
    evaluation.at(min(_UNTIMED_EXAMPLES, evaluation.examples))
    seconds_per_example, share_s = math.inf, _EVALUATION_SHARE * budget_s
    for n_examples in (min(n_examples, evaluation.examples) for n_examples in _TIMED_EXAMPLES):
        if n_examples > _TIMED_EXAMPLES[0] and n_examples * seconds_per_example > share_s / 2:
            break
        start = clock()
        evaluation.at(n_examples)
        seconds_per_example = min(seconds_per_example, broadcast(clock() - start) / n_examples)
    n = min(
        evaluation.examples,
        max(int(share_s / max(seconds_per_example, 1e-9)), _TIMED_EXAMPLES[0]),
    )
    return n * seconds_per_example, n


def announced(attempt: Mapping[str, Any], left_s: float | None, n_held_out: int) -> str:
    """Return the message that is shown before a training: its recipe, its epochs, the seconds that are left for it if
    there is a budget, and the number of held-out examples that choose the checkpoint, if any do.
    """
    duration = (
        ""
        if left_s is None
        else f" of about {attempt['epoch_s']:.2g} s in the first plan, within the remaining {left_s:.3g} s"
    )
    start = f"training by {attempt['recipe']} ({attempt['reason']}): {_epochs(attempt['epochs'])}{duration}"
    if not n_held_out:
        return start
    return (
        f"{start}; {n_held_out:,} held-out examples choose the checkpoint, with a standard error of robust accuracy of "
        f"at most {100 * standard_error(0.5, n_held_out):.1f} percentage points"
    )


def standard_error(share: float, n: int) -> float:
    """Return the standard error of a share that was measured on `n` examples."""
    return math.sqrt(share * (1 - share) / n)


def few_held_out(n: int) -> str:
    """Return a note if the held-out examples that choose the checkpoint are few, else an empty text."""
    if n >= _FEW:
        return ""
    return (
        f"only {n} held-out examples choose the checkpoint, so robust accuracies of two epochs that differ by less "
        f"than {200 * standard_error(0.5, n):.0f} percentage points may be equal; a larger budget or more training "
        "examples allow more"
    )


def announced_s(budget_s: float, n_trainings: int) -> float:
    """Return the seconds that were announced for `n_trainings` trainings: the budget, and the same time once more for
    all trainings after the first one.
    """
    return budget_s if n_trainings == 1 else 2 * budget_s


def untrained(attempt: Mapping[str, Any], left_s: float) -> str:
    """Return a note on an attempt that is not trained, although doubts were raised against the model before."""
    return (
        f"doubts were raised, but {attempt['recipe']} was not trained: one epoch takes about "
        f"{attempt['epoch_s']:.2g} s, and {max(left_s, 0):.2g} s of the announced time are left"
    )


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
        optimisation.broadcast(
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
            if not optimisation.broadcast(not (collapsed(curve, start) or _stale(curve, settings))):
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
                if not optimisation.broadcast(NOTHING):
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
