"""Measures how long the updates of a recipe take on this machine, and plans how many of them fit into a time budget."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from holdfast.core.batch import UNLABELLED, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.meter import PIECE, half_batch, results_in_pieces
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import TrainingPlan
from holdfast.recipes.training.fit import updates
from holdfast.recipes.training.optimisation import broadcast, evaluation_interval, processes
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.runs.harden.held_out import harmless

_WARM = 2  # examples of the update before anything is timed, in each process: batch norm needs two
_MOST = 400  # largest number of updates in a trial
_TRIED = 0.03  # share of the budget for all trials
_MARGINAL = 0.25  # smallest time of an update, relative to that of one with its share of the fixed costs
_COMPILED = 4  # smallest number of updates in the last trial of a compiled network, since each trial compiles it again
_NEGLIGIBLE_LR = 1e-9  # a learning rate so small that the loss cannot diverge
_AGAIN = 0.05  # largest share of the budget for an update that is timed twice
_USED = 0.97  # share of the budget that is planned, since plans are repeated during the training
_EVALUATION_SPARE = 0.2  # share of the time of an evaluation that is left as a reserve for a slower one
_FIRST = 50  # smallest number of updates in the first plan, which is replaced after one update
_REVIEW = 0.01  # share of the budget between two plans
_REVIEW_LEFT = 0.1  # the same of the rest of the budget, for a machine that becomes slower
_DIFFERENT = 2.0  # factor between two measurements, above which the earlier one no longer counts
_LARGER = 0.75  # share of a suggested budget that is planned, since planning takes longer for a larger one

D = TypeVar("D", bound=TrainingData)
Clock = Callable[[], float]
"""Function that returns the time in seconds since an arbitrary moment."""


@dataclass(frozen=True)
class Pace:
    """Measured training time of a recipe on this machine, in seconds."""

    update: float
    """seconds of an update"""
    per_epoch: int
    """number of updates in an epoch"""
    look_s: float = 0.0
    """seconds of the evaluation after an epoch; 0 if it was not timed"""
    held_out: int = 0
    """number of held-out examples in an evaluation; 0 if it was not timed"""
    fastest: float = math.inf
    """seconds of the fastest update that was measured"""

    @property
    def epoch(self) -> float:
        """Seconds of all updates of an epoch and of the evaluation after it."""
        return self.per_epoch * self.update + self.look_s

    def least_s(self, n: int) -> float:
        """Return the seconds of `n` updates that are all as fast as the fastest measured one."""
        return n * min(self.fastest, self.update)

    def epochs_within(self, budget_s: float) -> float:
        """Return the number of epochs that fit into a time budget, which may be fractional. It is 0 if not even one
        update fits.
        """
        interval = evaluation_interval(self.update, self.look_s, self.per_epoch)
        planned_s = _planned_s(budget_s, self.look_s)
        return updates_fitting(planned_s, self.update, self.look_s, 0, interval) / self.per_epoch


def pace(
    recipe: Recipe,
    model: Classifier,
    data: TrainingData,
    threat: ThreatModel,
    budget_s: float,
    clock: Clock = time.perf_counter,
) -> Pace:
    """Measure how long the updates of a recipe take, by training a copy of the model for some updates. The copy is then
    discarded.

    The time of an evaluation is not included. If memory runs out, smaller batches are used.
    """
    size = min(recipe.training.batch, len(data))
    while True:
        try:
            return _paced(recipe, size, model, data, threat, budget_s, clock)
        except (RuntimeError, MemoryError) as error:
            size = smaller(size, error)


def smaller(batch: int, error: BaseException) -> int:
    """Return half of a training batch size, after the error `error` reported that memory ran out.

    Any other error is raised again. Raises `TargetError` if the batch cannot be halved, or if several processes train
    together, because these cannot change the batch size.
    """
    half = half_batch(batch, error)
    if processes() > 1:
        raise TargetError(
            f"memory ran out for a batch of {batch} on {processes()} processes; start a new run with a smaller one",
            Remedy("recipe.training.batch", half),
        ) from error
    return half


def _paced(
    recipe: Recipe,
    size: int,
    model: Classifier,
    data: TrainingData,
    threat: ThreatModel,
    budget_s: float,
    clock: Clock,
) -> Pace:
    """Measure trials of one batch, of two, of four and so on, as far as they take a share of the budget. The difference
    of the last two contains no fixed costs of a training, such as a compilation.

    An update on a few examples is not timed: it imports parts of torch, which takes seconds, and selects kernels. The
    labels are the model's own predictions and eps is very small. So attacks take as many passes as on a robust
    model, and no guard adds a step.
    """
    compiled, n_batches = recipe.training.compiled, updates(len(data), size)
    timed = trained_as(recipe, replace(recipe.training, epochs=1, lr=_NEGLIGIBLE_LR, batch=size, trial=True))
    rows = torch.arange(len(data), device=data.ids.device)

    def trial(n: int) -> tuple[float, int]:
        """Seconds of a training on `n` examples, and its number of updates."""
        part = with_predicted_labels(model, data.subset(rows[:n]))
        start = clock()
        *_, last = timed(model, part, harmless(threat), rng=Draws(0))
        return broadcast(clock() - start), last.updates  # all processes take the same decisions

    trial(min(_WARM * processes(), size))
    first_s, of_batch = trial(size)  # allocates memory, so it is slower than the next ones
    trials = [(first_s, 1.0)]
    if compiled or first_s <= _AGAIN * budget_s:
        trials.append((trial(size)[0], 1.0))
    n = 1
    while n < min(_MOST, n_batches):
        is_in_time = sum(seconds for seconds, _ in trials) + 2 * trials[-1][0] <= _TRIED * budget_s
        if not is_in_time and not (compiled and n < _COMPILED):
            break
        n = min(2 * n, n_batches)
        seconds, n_updates = trial(n * size)
        # a recipe may hold examples back, and use a batch for several updates
        trials.append((seconds, n_updates / of_batch if of_batch else n))
    fastest_s = min(seconds / n for seconds, n in trials)
    update_s, (last_s, n_last), (before_s, n_before) = fastest_s, trials[-1], trials[max(len(trials) - 2, 0)]
    if n_last > n_before:
        more_s = (last_s - before_s) / (n_last - n_before)
        update_s = max(more_s, _MARGINAL * last_s / n_last)  # on a busy machine it may be too small by chance
    return Pace(update_s, n_batches, fastest=fastest_s)


def with_predicted_labels(model: Classifier, data: D) -> D:
    """Replace the labels of the data by the predictions of the model. Unlabelled examples remain unlabelled."""
    mode = model.training
    model.eval()
    rows = torch.split(torch.arange(len(data), device=data.ids.device), PIECE)
    with torch.no_grad(), data.reading(rows, Draws(0).at("predicted")) as pieces:
        predictions = torch.cat(
            [
                classes
                for piece in pieces
                for classes in results_in_pieces(piece, lambda part: model(part.x).argmax(1))
            ]
        )
    model.train(mode)
    return data.labelled(torch.where(data.y == UNLABELLED, data.y, predictions))


def first_total(epochs: float, per_epoch: int) -> int:
    """Return the number of updates in the first plan of a training for which `epochs` epochs were planned."""
    return max(round(epochs * per_epoch), _FIRST)


def updates_fitting(seconds: float, update_s: float, look_s: float, position: int, interval: int) -> int:
    """Return the number of training updates that fit into `seconds` of time. After each `interval` updates, an
    evaluation takes `look_s` seconds.

    The count starts after `position` updates of an interval. The last interval may be incomplete; an evaluation follows
    it as well.
    """
    left_in_interval = interval - position
    first_s = left_in_interval * update_s + look_s
    if seconds < first_s:
        return _whole((seconds - look_s) / max(update_s, 1e-9))
    whole_interval = max(interval * update_s + look_s, 1e-9)
    n_whole = _whole((seconds - first_s) / whole_interval)
    rest_s = seconds - first_s - n_whole * whole_interval - look_s
    return left_in_interval + n_whole * interval + _whole(rest_s / max(update_s, 1e-9))


def _whole(times: float) -> int:
    """Round down, with a tolerance for rounding errors."""
    return max(int(times + 1e-6), 0)


def _planned_s(budget_s: float, look_s: float) -> float:
    """The seconds of a budget that are planned."""
    return _USED * budget_s - _EVALUATION_SPARE * look_s


def import_optimisers() -> None:
    """Import the parts of torch that the first optimiser of a process imports. It takes seconds, and on a busy machine
    much longer, which is part of the start of the process and not of a budget.
    """
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


class Pacer:
    """Plans how many updates of a training fit into a time budget, and repeats the plan during the training.

    A plan depends only on the plan before and on the elapsed time.
    """

    def __init__(
        self, budget_s: float, epoch_s: float, look_s: float, spent_s: float, clock: Clock = time.perf_counter
    ) -> None:
        """Create a pacer for a budget of `budget_s` seconds, of which `spent_s` are already used, also by other
        trainings.

        `epoch_s` and `look_s` are the seconds of an epoch and of the evaluation within it, measured before the
        training.
        """
        self._budget_s, self._updates_s, self._look_s, self._clock = (
            budget_s,
            epoch_s - look_s,
            look_s,
            clock,
        )
        self._begun = clock() - spent_s

    def __call__(self, done: int, position: int, per_epoch: int, last: TrainingPlan | None) -> TrainingPlan:
        """Return the plan after `done` updates, of which `position` belong to the current epoch."""
        spent_s = self._clock() - self._begun
        update_s, look_s, review = self._estimated(done, spent_s, per_epoch, last)
        planned_s = _planned_s(self._budget_s, look_s) - spent_s
        # an epoch begins after an evaluation
        looked = done if last is None or not position else last.looked
        interval = evaluation_interval(update_s, look_s, per_epoch)
        # the next evaluation is at the end of this epoch, which the first one always is, or later
        at_the_end = interval - per_epoch + position
        since = min(done - looked, at_the_end) if looked else at_the_end
        n = updates_fitting(planned_s, update_s, look_s, since, interval)
        end = done + (n if done else max(n, _FIRST))
        between_s = min(_REVIEW * self._budget_s, _REVIEW_LEFT * max(planned_s - look_s, 0.0))
        share = 0.0 if last is None else last.done(done)
        review = min(review, max(int(between_s / max(update_s, 1e-9)), 1))
        return TrainingPlan(done, share, end, done + review, spent_s, update_s, look_s, looked=looked)

    def _estimated(
        self, done: int, spent_s: float, per_epoch: int, last: TrainingPlan | None
    ) -> tuple[float, float, int]:
        """Current estimates of the seconds of an update and of an evaluation, and the updates until the next plan."""
        if last is None:
            return self._updates_s / per_epoch, self._look_s, 1
        n, seconds = done - last.at, spent_s - last.spent_s
        if not n:  # two plans at the same update differ by an evaluation only
            first = not last.looked or _differ(seconds, last.look_s)
            look_s = seconds if first else (last.look_s + seconds) / 2
            return last.update_s, look_s, max(last.review - last.at, 1)
        seconds_per_update = seconds / n
        if last.at and _differ(seconds_per_update, last.update_s):
            return (
                seconds_per_update,
                last.look_s,
                n,
            )  # the next plan is made soon, since the pace has changed
        # the measurement before the training, or the first updates, may have been slow for a moment
        update_s = (
            min(last.update_s, seconds_per_update)
            if last.at == 0
            else (last.update_s + seconds_per_update) / 2
        )
        return update_s, last.look_s, 2 * n


def too_small(
    recipe: str, budget_s: float, measured: Pace, spent_s: float, *, anyway: bool = False, n_steps: int = 1
) -> UsageError:
    """Return the error for a time budget in which no epoch of a recipe fits, or with `anyway` no update. It states a
    budget that would be enough. `n_steps` is the number of attack steps of the recipe.
    """
    n_fitting = round(measured.epochs_within(budget_s - spent_s) * measured.per_epoch)
    enough_s = (measured.update + (1 + _EVALUATION_SPARE) * measured.look_s + spent_s) / _USED
    if not anyway:
        enough_s = max((measured.epoch + spent_s) / _LARGER, enough_s)
    unit = "one update" if anyway else "one epoch"
    fewer = "; fewer steps take less time" if n_steps > 1 else ""
    contained = f"(for {unit}, the measuring and a reserve; measuring takes longer within a larger budget)"
    larger = Remedy("budget", _rounded_up(enough_s), reason=f"or more {contained}")
    start = Remedy("anyway", True, reason="to train for a part of an epoch")
    return UsageError(
        f"a budget of {budget_s:g} s is too small for {unit} of {recipe}: {n_fitting:,} of the {measured.per_epoch:,} "
        f"updates of an epoch fit, because one update takes about {_seconds(measured.update)} on this machine, the "
        f"evaluation after it {_seconds(measured.look_s)}, and measuring these times took {_seconds(spent_s)}{fewer}",
        *((larger,) if anyway or not n_fitting else (larger, start)),
    )


def _differ(measured: float, planned: float) -> bool:
    """Whether two measurements of the same work differ by more than a factor of two."""
    return max(measured, planned) > _DIFFERENT * min(measured, planned)


def _rounded_up(seconds: float) -> str:
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}min"


def _seconds(time: float) -> str:
    return f"{time:.2g} s" if time < 10 else f"{time:.0f} s"
