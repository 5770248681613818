"""Recipes that may be trained by, and which of them a budget of time chooses."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.together import told
from holdfast.recipes.protocol import Recipe
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
) -> list[dict[str, Any]]:
    """What is trained, in the order in which it is tried, with the epochs that fit and why it was chosen.

    `candidates` go from the quickest to the strongest. The first attempt is the strongest that has its epochs within
    the budget; those after it are stronger, for the case that doubts object. `looks` is one look at held-out examples.
    """
    if budget_s is None:
        return [
            {"recipe": one.name, "epochs": one.recipe.training.epochs, "why": "asked for"}
            for one in candidates
        ]
    begun = time.perf_counter()
    looks()
    look_s = told(time.perf_counter() - begun)
    paces = [pace(one.recipe, model, data, threat, budget_s, look_s) for one in candidates]
    if len(candidates) == 1:
        return [_attempt(candidates[0], paces[0], _within(budget_s, paces[0]), "asked for")]
    fit = [fitting(budget_s, found) for found in paces]
    able = [k for k, one in enumerate(candidates) if fit[k] >= one.least]
    first = max(able, default=0)
    _within(budget_s, paces[first])
    stronger = [
        f"{one.name} would have {fit[k]} and wants {one.least}"
        for k, one in enumerate(candidates)
        if k > first
    ]
    why = (
        f"the strongest that has its epochs within the budget: {'; '.join([f'{fit[first]} fit', *stronger])}"
    )
    tried = [_attempt(candidates[first], paces[first], fit[first], why)]
    return tried + [
        _attempt(candidates[k], paces[k], max(fit[k], 1), "doubts object to the one before")
        for k in range(first + 1, len(candidates))
    ]


def _within(budget_s: float, found: Pace) -> int:
    epochs = fitting(budget_s, found)
    if epochs < 1:
        raise UsageError(too_small(budget_s, found))
    return epochs


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
        f"training by {attempt['recipe']} ({attempt['why']}): {epochs}{of}; judging {n:,} test examples before and "
        f"after comes on top"
    )
