"""Recipes that may be trained by, and which of them a budget of time chooses."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.recipe import Recipe
from holdfast.ops.together import told
from holdfast.runs.pace import Pace, fitting, pace, too_small


@dataclass(frozen=True)
class Candidate:
    """A recipe that may be trained by."""

    name: str
    recipe: Recipe
    settings: Mapping[str, Any]
    """of the recipe, as plain values"""
    least: int = 1
    """epochs under which a weaker one does better"""


def attempts(
    candidates: Sequence[Candidate],
    budget_s: float | None,
    model: Classifier,
    data: Batch,
    threat: ThreatModel,
    looks: Callable[[], object],
) -> tuple[list[dict[str, Any]], float]:
    """What is trained, in the order in which it is tried, and the seconds that it took to say so.

    `candidates` go from the quickest to the strongest. The first attempt is the strongest that has its epochs within
    what is left of the budget; those after it are stronger, and fit, for the case that doubts object. `looks` is one
    look at held-out examples. Where one is chosen, `fits` are the epochs that each that was timed would have.
    """
    if budget_s is None:
        asked = [
            {"recipe": one.name, "epochs": one.recipe.training.epochs, "why": "asked for"}
            for one in candidates
        ]
        return asked, 0.0
    begun = time.perf_counter()
    paces = list(_paces(candidates, budget_s, model, data, threat, looks))
    spent_s = told(time.perf_counter() - begun)
    fit = [fitting(budget_s - spent_s, found) for found in paces]
    if fit[0] < 1:
        raise UsageError(too_small(budget_s, paces[0], spent_s))
    if len(candidates) == 1:
        return [_attempt(candidates[0], paces[0], fit[0], "asked for")], spent_s
    known = list(zip(candidates, fit, strict=False))
    first = max((k for k, (one, epochs) in enumerate(known) if epochs >= one.least), default=0)
    stronger = [f"{one.name} would have {epochs} and wants {one.least}" for one, epochs in known[first + 1 :]]
    told_of = "; ".join([f"{fit[first]} fit", *stronger])
    why = f"the strongest that has its epochs within the budget: {told_of}"
    tried = [_attempt(candidates[first], paces[first], fit[first], why)]
    tried[0]["fits"] = {one.name: epochs for one, epochs in known}
    tried += [
        _attempt(one, found, epochs, "doubts object to the one before")
        for (one, epochs), found in zip(known[first + 1 :], paces[first + 1 :], strict=True)
        if epochs
    ]
    return tried, spent_s


def _paces(
    candidates: Sequence[Candidate],
    budget_s: float,
    model: Classifier,
    data: Batch,
    threat: ThreatModel,
    looks: Callable[[], object],
) -> Iterator[Pace]:
    """Those of the candidates, up to the first of which no epoch fits: what is stronger takes longer yet."""
    look_s: float | None = None
    for one in candidates:
        found = pace(one.recipe, model, data, threat, budget_s)
        if fitting(budget_s, found):
            look_s = _seconds(looks) if look_s is None else look_s
            found = replace(found, epoch=found.epoch + look_s)
        yield found
        if not fitting(budget_s, found):
            return


def _seconds(of: Callable[[], object]) -> float:
    begun = time.perf_counter()
    of()
    return told(time.perf_counter() - begun)


def _attempt(candidate: Candidate, found: Pace, epochs: int, why: str) -> dict[str, Any]:
    return {
        "recipe": candidate.name,
        "epochs": epochs,
        "why": why,
        "update_s": found.update,
        "epoch_s": found.epoch,
    }


def announced(attempt: Mapping[str, Any], budget_s: float | None, n: int) -> str:
    """What is about to be trained, and that judging is not part of its budget."""
    of = (
        "" if budget_s is None else f" of about {attempt['epoch_s']:.1f} s, within a budget of {budget_s:g} s"
    )
    epochs = "1 epoch" if attempt["epochs"] == 1 else f"{attempt['epochs']} epochs"
    return (
        f"training by {attempt['recipe']} ({attempt['why']}): {epochs}{of}; judging the new model on {n:,} test "
        f"examples comes on top"
    )
