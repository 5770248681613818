"""Candidate recipes of a hardening, and the choice among them within a time budget."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.core.batch import TrainingData
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training.distributed import broadcast
from holdfast.recipes.training.fit import updates
from holdfast.recipes.training.recipe import Recipe, RecipeFacts
from holdfast.reports.numbers import plain
from holdfast.runs.harden.pace import Clock, Pace, import_optimisers, pace, too_small

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
