"""Recipes that may be trained by, and which of them a budget of time chooses."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.distributed import broadcast
from holdfast.ops.fit import updates
from holdfast.ops.recipe import Recipe
from holdfast.reports.numbers import plain
from holdfast.runs.pace import Clock, Pace, epochs_fitting, pace, too_small

_FEW = (
    8,
    64,
)  # held-out examples that a look is timed on: the second where they take no longer than a look may
_LOOK = 0.05  # of the budget may a look take at most
_PLANNING = 0.1  # of the budget, after which no stronger recipe is timed


@dataclass(frozen=True)
class Look:
    """How a checkpoint is judged on held-out examples."""

    examples: int
    """that are held out"""
    at: Callable[[int], object]
    """judges the given model on so many of them"""


@dataclass(frozen=True)
class Candidate:
    """A recipe that may be trained by."""

    name: str
    recipe: Recipe
    settings: Mapping[str, Any]
    """of the recipe, as plain values"""
    least: int = 1
    """epochs under which a weaker one does better"""

    def per_epoch(self, examples: int) -> int:
        """Updates of an epoch, as far as the size of a batch decides it."""
        return updates(examples, self.recipe.training.batch)


@dataclass(frozen=True)
class _Planned:
    """A candidate that was timed, and the epochs of it that fit into the budget."""

    candidate: Candidate
    found: Pace
    per_epoch: int
    epochs: float

    def attempt(self, why: str) -> dict[str, Any]:
        """As the plan of the run has it."""
        return {
            "recipe": self.candidate.name,
            "epochs": self.epochs,
            "why": why,
            "update_s": self.found.update,
            "epoch_s": self.found.epoch,
            "look_s": self.found.between(self.per_epoch),
            "held_out": self.found.held_out,
        }


def attempts(
    candidates: Sequence[Candidate],
    budget_s: float | None,
    model: Classifier,
    data: Batch,
    threat: ThreatModel,
    look: Look,
    clock: Clock = time.perf_counter,
) -> tuple[list[dict[str, Any]], float]:
    """What is trained, in the order in which it is tried, and the seconds that it took to say so.

    `candidates` go from the quickest to the strongest. The first attempt is the strongest that has its epochs within
    what is left of the budget; those after it are stronger, and fit, for the case that doubts object. Where one is
    chosen, `fits` are the epochs that each that was timed would have, the last of them perhaps in part. `UsageError`
    where not even one update fits.
    """
    if budget_s is None:
        asked = [
            {"recipe": one.name, "epochs": one.recipe.training.epochs, "why": "asked for"}
            for one in candidates
        ]
        return asked, 0.0
    begun = clock()
    paces = list(_paces(candidates, budget_s, model, data, threat, look, clock))
    spent_s = broadcast(clock() - begun)
    sizes = [one.per_epoch(len(data)) for one in candidates]
    fit = [epochs_fitting(budget_s - spent_s, *each) for each in zip(paces, sizes, strict=False)]
    if not fit[0]:
        raise UsageError(too_small(budget_s, paces[0], sizes[0], spent_s))
    planned = [
        _Planned(*each)
        for each in zip(candidates[: len(paces)], paces, sizes[: len(paces)], fit, strict=True)
    ]
    if len(candidates) == 1:
        return [planned[0].attempt("asked for")], spent_s
    known = [(each.candidate, each.epochs) for each in planned]
    first = max((k for k, (one, epochs) in enumerate(known) if epochs >= one.least), default=0)
    stronger = [
        f"{one.name} would have {plain(epochs)} and wants {one.least}" for one, epochs in known[first + 1 :]
    ]
    told_of = "; ".join([f"{plain(fit[first])} fit", *stronger])
    why = f"the strongest that has its epochs within the budget: {told_of}"
    tried = [planned[first].attempt(why)]
    tried[0]["fits"] = {one.name: epochs for one, epochs in known}
    tried += [each.attempt("doubts object to the one before") for each in planned[first + 1 :] if each.epochs]
    return tried, spent_s


def _paces(
    candidates: Sequence[Candidate],
    budget_s: float,
    model: Classifier,
    data: Batch,
    threat: ThreatModel,
    look: Look,
    clock: Clock,
) -> Iterator[Pace]:
    """Those of the candidates, up to the first of which no update fits: what is stronger takes longer yet.

    None is timed once a share of the budget is spent on that.
    """
    known: tuple[float, int] | None = None
    begun = clock()
    for one in candidates:
        found, per_epoch = pace(one.recipe, model, data, threat, budget_s, clock), one.per_epoch(len(data))
        if epochs_fitting(budget_s, found, per_epoch):
            known = _looked(look, budget_s, clock) if known is None else known
            found = replace(found, epoch=found.epoch + known[0], held_out=known[1])
        yield found
        if (
            not epochs_fitting(budget_s, found, per_epoch)
            or broadcast(clock() - begun) > _PLANNING * budget_s
        ):
            return


def _looked(look: Look, budget_s: float, clock: Clock) -> tuple[float, int]:
    """Seconds of a look, timed on a few held-out examples, and at how many it is: all that its share of time allows."""
    each = 0.0
    for few in (min(few, look.examples) for few in _FEW):
        if few * each > _LOOK * budget_s:
            break
        begun = clock()
        look.at(few)
        each = broadcast(clock() - begun) / few
    n = min(look.examples, max(int(_LOOK * budget_s / max(each, 1e-9)), _FEW[0]))
    return n * each, n


def announced(attempt: Mapping[str, Any], budget_s: float | None, n: int) -> str:
    """What is about to be trained, by the first plan of it, and that judging is not part of its budget."""
    of = (
        ""
        if budget_s is None
        else f" of about {attempt['epoch_s']:.1f} s as first planned, within a budget of {budget_s:g} s"
    )
    epochs = "1 epoch" if attempt["epochs"] == 1 else f"{plain(attempt['epochs'])} epochs"
    return (
        f"training by {attempt['recipe']} ({attempt['why']}): {epochs}{of}; judging the new model on {n:,} test "
        f"examples comes on top"
    )
