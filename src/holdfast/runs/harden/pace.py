"""Measures how long the updates of a recipe take on this machine, and plans how many of them fit into a time budget."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from holdfast.core.batch import UNLABELLED, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.pieces import PIECE, half_batch, results_in_pieces
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, Checkpoint, TrainingPlan
from holdfast.recipes.training.distributed import broadcast, processes
from holdfast.recipes.training.fit import updates
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.recipes.training.update_plans import evaluation_interval
from holdfast.runs.harden.checkpoints import BEST, LAST, save
from holdfast.runs.harden.held_out import harmless

_WARM = 2  # examples of the update before anything is timed, in each process: batch norm needs two
_MOST = 400  # largest number of updates in a trial
_TRIED, _TRIED_MOST = 0.02, 0.05  # shares of the budget for all trials; the second one up to _TRIED_S
_TRIED_S = 2.0  # seconds in which a busy machine is measured as on average
_MARGINAL = 0.25  # smallest time of an update, relative to that of one with its share of the fixed costs
_COMPILED = 4  # smallest number of updates in the last trial of a compiled network, since each trial compiles it again
_NEGLIGIBLE_LR = 1e-9  # a learning rate so small that the loss cannot diverge
_AGAIN = 0.05  # largest share of the budget for an update that is timed twice
_RETIMED = 0.4  # share of the budget above which a first update is timed once more
_HOPELESS = 4.0  # budgets that an epoch of such updates takes, above which it is not, since no epoch can fit
_SPARE = 0.95  # share of the budget that is planned in whole epochs, since the speed of a machine varies
_USED = 0.97  # share of the budget that is planned if plans are repeated during the training
_EVALUATION_SPARE = 0.2  # share of the time of an evaluation that is left as a reserve for a slower one
_FIRST = 50  # smallest number of updates in the first plan, which is replaced after one update
_REVIEW = 0.01  # share of the budget between two plans
_REVIEW_LEFT = 0.1  # the same of the rest of the budget, for a machine that becomes slower
_DIFFERENT = 2.0  # factor between two measurements, above which the earlier one no longer counts
_LARGER = (
    0.75  # share of a suggested budget that is planned, since the planning takes longer for a larger budget
)

D = TypeVar("D", bound=TrainingData)
Clock = Callable[[], float]
"""Function that returns the time in seconds since an arbitrary moment."""


@dataclass(frozen=True)
class Pace:
    """Measured training time of a recipe on this machine, in seconds per update and per epoch."""

    update: float
    epoch: float
    """seconds of all updates of an epoch, of saving its checkpoint and, if its time is known, of the evaluation after
    it"""

    held_out: int = 0
    """number of held-out examples in an evaluation; 0 if the evaluation was not timed"""
    fastest: float = math.inf
    """seconds of the fastest update that was measured"""

    def least_s(self, n: int) -> float:
        """Return the seconds of `n` updates that are all as fast as the fastest measured one."""
        return n * min(self.fastest, self.update)

    def between(self, per_epoch: int) -> float:
        """Return the seconds of an epoch of `per_epoch` updates that are used for other work than updates, such as
        saving the checkpoint.
        """
        return max(self.epoch - per_epoch * self.update, 0.0)


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


@dataclass(frozen=True)
class _Trial:
    seconds: float
    updates: float
    last: Checkpoint

    @property
    def each(self) -> float:
        """Seconds for each update of the trial training, including a share of the fixed costs."""
        return self.seconds / self.updates


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
    rows, trials = torch.arange(len(data), device=data.ids.device), list[_Trial]()

    def trial(n: int) -> _Trial:
        part = with_predicted_labels(model, data.subset(rows[:n]))
        start = clock()
        *_, last = timed(model, part, harmless(threat), rng=Draws(0))
        seconds = broadcast(clock() - start)  # all processes take the same decisions
        # a recipe may hold examples back, and use a batch for several updates
        n_updates = last.updates / trials[0].last.updates if trials and last.updates else updates(n, size)
        return _Trial(seconds, n_updates, last)

    trial(min(_WARM * processes(), size))
    trials.append(trial(size))  # allocates memory, so it is slower than the next ones
    spent_s = trials[0].seconds
    is_long = spent_s > _RETIMED * budget_s and n_batches * spent_s <= _HOPELESS * budget_s
    if compiled or spent_s <= _AGAIN * budget_s or is_long:
        trials.append(trial(size))
        spent_s += trials[1].seconds
    n, limit_s = 1, max(_TRIED * budget_s, min(_TRIED_S, _TRIED_MOST * budget_s))
    while n < min(_MOST, n_batches):
        is_in_time = spent_s + 2 * trials[-1].seconds <= limit_s
        if not is_in_time and not (compiled and n < _COMPILED):
            break
        n *= 2
        trials.append(trial(min(n, n_batches) * size))
        spent_s += trials[-1].seconds
    fastest_s = min(each.each for each in trials)
    before, last = trials[-2:] if len(trials) > 1 else (trials[0], trials[0])
    update_s = fastest_s
    if last.updates > before.updates:
        more_s = (last.seconds - before.seconds) / (last.updates - before.updates)
        update_s = max(more_s, _MARGINAL * last.each)  # on a busy machine it may be too small by chance
    kept_s = _saving_s(last.last, min(n * size, len(data)), len(data), clock)
    return Pace(update_s, update_s * n_batches + kept_s, fastest=fastest_s)


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


def _saving_s(checkpoint: Checkpoint, n_trial: int, n_all: int, clock: Clock) -> float:
    """Seconds to write a checkpoint as the last and as the best one, at the size it would have with all examples."""
    with tempfile.TemporaryDirectory() as place:
        enlarged = _grown(checkpoint, n_trial, n_all)
        start = clock()
        for name in (LAST, BEST):
            save(Path(place), name, enlarged, ())
        return broadcast(clock() - start)


def _grown(checkpoint: Checkpoint, n_trial: int, n_all: int) -> Checkpoint:
    """The checkpoint with `n_all` examples instead of `n_trial`: the recipe's state for each example grows."""
    tensors = {
        name: value.new_zeros(n_all, *value.shape[1:])
        if name.startswith(STATE) and value.shape[:1] == (n_trial,)
        else value
        for name, value in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def first_total(epochs: float, per_epoch: int) -> int:
    """Return the number of updates in the first plan of a training for which `epochs` epochs were planned."""
    return max(round(epochs * per_epoch), _FIRST)


def whole_epochs(budget_s: float, measured: Pace) -> int:
    """Return the number of whole epochs of a training that fit into a time budget. It is 0 if not even one fits."""
    return max(int(_SPARE * budget_s / measured.epoch), 0)


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


def epochs_fitting(budget_s: float, measured: Pace, per_epoch: int) -> float:
    """Return the number of epochs of a training that fit into a time budget, which may be fractional. It is 0 if not
    even one update fits.
    """
    look_s = measured.between(per_epoch)
    interval = evaluation_interval(measured.update, look_s, per_epoch)
    return updates_fitting(_planned_s(budget_s, look_s), measured.update, look_s, 0, interval) / per_epoch


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


_BUDGET_FOR = "or more (for {}, the measuring and a reserve; measuring takes longer within a larger budget)"
"""what a suggested budget contains"""


def too_small(
    budget_s: float,
    measured: Pace,
    per_epoch: int,
    spent_s: float,
    *,
    anyway: bool = False,
    n_steps: int = 1,
) -> UsageError:
    """Return the error for a time budget in which no training update fits. It states a budget that would be enough:
    for one epoch, or with `anyway` for one update. `n_steps` is the number of attack steps of the recipe.
    """
    look_s = measured.between(per_epoch)
    least_s = (measured.update + (1 + _EVALUATION_SPARE) * look_s + spent_s) / _USED
    if not anyway:
        least_s = max((measured.epoch + spent_s) / _LARGER, least_s)
    return UsageError(
        f"a budget of {budget_s:g} s is too small: one update takes about {_seconds(measured.update)} on this machine, "
        f"the evaluation and the checkpoint after it {_seconds(look_s)}, and measuring these times took "
        f"{_seconds(spent_s)}{'; fewer steps take less time' if n_steps > 1 else ''}",
        Remedy(
            "budget", _rounded_up(least_s), reason=_BUDGET_FOR.format("one update" if anyway else "one epoch")
        ),
    )


def below_an_epoch(
    recipe: str, budget_s: float, epochs: float, measured: Pace, per_epoch: int, spent_s: float
) -> UsageError:
    """Return the error for a time budget in which only a part of an epoch, `epochs`, of a recipe fits. It states a
    budget that would be enough for one epoch.
    """
    enough_s = (measured.epoch + spent_s) / _LARGER
    return UsageError(
        f"a budget of {budget_s:g} s is too small for one epoch of {recipe}: after {_seconds(spent_s)} for measuring, "
        f"{round(epochs * per_epoch):,} of the {per_epoch:,} updates of an epoch fit, which takes about "
        f"{_seconds(measured.epoch)} on this machine",
        Remedy("budget", _rounded_up(enough_s), reason=_BUDGET_FOR.format("one epoch")),
        Remedy("anyway", True, reason="to train for a part of an epoch"),
    )


def _differ(measured: float, planned: float) -> bool:
    """Whether two measurements of the same work differ by more than a factor of two."""
    return max(measured, planned) > _DIFFERENT * min(measured, planned)


def _rounded_up(seconds: float) -> str:
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}min"


def _seconds(time: float) -> str:
    return f"{time:.2g} s" if time < 10 else f"{time:.0f} s"
