"""Candidate recipes of a hardening, and the choice among them within a time budget."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.core.batch import TrainingData
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes.training.distributed import broadcast
from holdfast.recipes.training.fit import updates
from holdfast.recipes.training.recipe import Recipe
from holdfast.reports.numbers import plain
from holdfast.runs.harden.pace import Clock, Pace, epochs_fitting, pace, seconds_for_an_epoch, too_small

_TIMED_EXAMPLES = (
    8,
    64,
)  # held-out examples on which an evaluation is timed; the second number only if that fits into its share of the budget
_EVALUATION_SHARE = 0.05  # largest share of the budget for an evaluation
_PLANNING = 0.1  # share of the budget after which no stronger recipe is timed


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

    def per_epoch(self, examples: int) -> int:
        """Return the number of updates of this recipe in an epoch of `examples` training examples."""
        return updates(examples, self.recipe.training.batch)


@dataclass(frozen=True)
class _Planned:
    """A candidate that was timed, and how many epochs of it fit into the budget."""

    candidate: Candidate
    pace: Pace
    per_epoch: int
    epochs: float

    def attempt(self, reason: str) -> dict[str, Any]:
        """Return this candidate recipe as an entry of the stored plan, with its epochs, its measured times and the
        reason for the choice.
        """
        return {
            "recipe": self.candidate.name,
            "epochs": self.epochs,
            "reason": reason,
            "update_s": self.pace.update,
            "epoch_s": self.pace.epoch,
            "evaluation_s": self.pace.between(self.per_epoch),
            "held_out": self.pace.held_out,
        }


def attempts(
    candidates: Sequence[Candidate],
    budget_s: float | None,
    model: Classifier,
    data: TrainingData,
    threat: ThreatModel,
    evaluation: Evaluation,
    clock: Clock = time.perf_counter,
) -> tuple[list[dict[str, Any]], float]:
    """Choose the recipes of a hardening that fit into the time budget. Return them in the order in which they are
    trained, and the seconds that the planning took.

    `candidates` are ordered from the fastest to the strongest. The first attempt is the strongest candidate whose
    required epochs fit into the budget that remains after the planning. The later attempts are the stronger candidates
    that also fit; they are used if doubts are raised against the model of the attempt before. If there are several
    candidates, the entry `fitting_epochs` of the first attempt gives the number of epochs that fit for each timed
    candidate, which may be fractional. Raises `UsageError` if not even one update fits.
    """
    if budget_s is None:
        requested = [
            {"recipe": candidate.name, "epochs": candidate.recipe.training.epochs, "reason": "requested"}
            for candidate in candidates
        ]
        return requested, 0.0
    started = clock()
    paces = list(_paces(candidates, budget_s, model, data, threat, evaluation, clock))
    # Broadcast, because all processes of a distributed training must choose the same recipes.
    spent_s = broadcast(clock() - started)
    sizes = [candidate.per_epoch(len(data)) for candidate in candidates]
    fit = [
        epochs_fitting(budget_s - spent_s, *sizes_and_pace)
        for sizes_and_pace in zip(paces, sizes, strict=False)
    ]
    if not fit[0]:
        raise too_small(budget_s, paces[0], sizes[0], spent_s)
    planned = [
        _Planned(*sizes_and_pace)
        for sizes_and_pace in zip(candidates[: len(paces)], paces, sizes[: len(paces)], fit, strict=True)
    ]
    if len(candidates) == 1:
        return [planned[0].attempt("requested")], spent_s
    fits = [(sizes_and_pace.candidate, sizes_and_pace.epochs) for sizes_and_pace in planned]
    chosen = max((k for k, (candidate, epochs) in enumerate(fits) if epochs >= candidate.least), default=0)
    stronger = [
        f"{candidate.name} would have {plain(epochs)} and wants {candidate.least}"
        for candidate, epochs in fits[chosen + 1 :]
    ]
    reasons = "; ".join([f"{plain(fit[chosen])} fit", *stronger])
    reason = f"the strongest recipe whose epochs fit into the budget: {reasons}"
    attempts_made = [planned[chosen].attempt(reason)]
    attempts_made[0]["fitting_epochs"] = {candidate.name: epochs for candidate, epochs in fits}
    attempts_made += [
        sizes_and_pace.attempt("doubts object to the one before")
        for sizes_and_pace in planned[chosen + 1 :]
        if sizes_and_pace.epochs
    ]
    return attempts_made, spent_s


def _paces(
    candidates: Sequence[Candidate],
    budget_s: float,
    model: Classifier,
    data: TrainingData,
    threat: ThreatModel,
    evaluation: Evaluation,
    clock: Clock,
) -> Iterator[Pace]:
    """Yield the timing of each candidate, up to the first one of which no update fits; later candidates are slower.

    Also stops once a share of the budget is spent on timing.
    """
    evaluation_time: tuple[float, int] | None = None
    start = clock()
    for candidate in candidates:
        candidate_pace, per_epoch = (
            pace(candidate.recipe, model, data, threat, budget_s, clock),
            candidate.per_epoch(len(data)),
        )
        if epochs_fitting(budget_s, candidate_pace, per_epoch):
            evaluation_time = (
                _timed_evaluation(evaluation, budget_s, clock) if evaluation_time is None else evaluation_time
            )
            candidate_pace = replace(
                candidate_pace, epoch=candidate_pace.epoch + evaluation_time[0], held_out=evaluation_time[1]
            )
        yield candidate_pace
        if (
            not epochs_fitting(budget_s, candidate_pace, per_epoch)
            or broadcast(clock() - start) > _PLANNING * budget_s
        ):
            return


def _timed_evaluation(evaluation: Evaluation, budget_s: float, clock: Clock) -> tuple[float, int]:
    """Return the seconds of an evaluation, timed on a few held-out examples, and the number of examples that it uses.

    That number is as large as the part of the budget for evaluations allows.
    """
    seconds_per_example = 0.0
    for n_examples in (min(n_examples, evaluation.examples) for n_examples in _TIMED_EXAMPLES):
        if n_examples * seconds_per_example > _EVALUATION_SHARE * budget_s:
            break
        start = clock()
        evaluation.at(n_examples)
        seconds_per_example = broadcast(clock() - start) / n_examples
    n = min(
        evaluation.examples,
        max(int(_EVALUATION_SHARE * budget_s / max(seconds_per_example, 1e-9)), _TIMED_EXAMPLES[0]),
    )
    return n * seconds_per_example, n


def announced(attempt: Mapping[str, Any], budget_s: float | None) -> str:
    """Return the message that is shown before a training: its recipe, its epochs and its time budget, and a budget that
    suffices for one epoch if this one does not.
    """
    duration = (
        ""
        if budget_s is None
        else f" of about {attempt['epoch_s']:.1f} s in the first plan, within a budget of {budget_s:g} s"
    )
    epochs = "1 epoch" if attempt["epochs"] == 1 else f"{plain(attempt['epochs'])} epochs"
    short = ""
    if budget_s is not None and attempt["epochs"] < 1:
        enough = seconds_for_an_epoch(budget_s, attempt["epochs"], attempt["epoch_s"])
        short = f". The budget does not suffice for one epoch; about {enough} s would"
    return f"training by {attempt['recipe']} ({attempt['reason']}): {epochs}{duration}{short}"
