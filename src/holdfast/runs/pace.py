"""How long a recipe takes on this machine, and what fits into a budget of time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.fit import updates
from holdfast.recipes.protocol import Recipe

_WARM, _TIMED = 3, 12  # updates: the first ones choose kernels and fill caches
_SPARE = 0.95  # of the budget is planned, for a machine is not equally quick all the time


@dataclass(frozen=True)
class Pace:
    """Seconds of wall time on this machine."""

    update: float
    epoch: float
    """the updates of one epoch, and the look at the held-out examples after it"""


def pace(
    recipe: Recipe, model: Classifier, data: Batch, threat: ThreatModel, looks: Callable[[Classifier], object]
) -> Pace:
    """Measured on a few updates of a copy, whose weights are dropped, and on one look at the held-out examples."""
    few = replace(recipe.training, epochs=1)
    size = min(recipe.training.batch, len(data))

    def taken(n: int) -> float:
        rows = torch.arange(min(n * size, len(data)), device=data.x.device)
        short: Any = replace(recipe, training=few)  # type: ignore[type-var]  # every recipe is a dataclass
        begun = time.perf_counter()
        list(short(model, data.take(rows), threat, rng=Draws(0)))
        return (time.perf_counter() - begun) / updates(len(rows), size)

    taken(_WARM)
    update = taken(_TIMED)
    begun = time.perf_counter()
    looks(model)
    return Pace(update, update * updates(len(data), size) + time.perf_counter() - begun)


def within(budget_s: float, found: Pace) -> int:
    """Epochs that fit into a budget; `UsageError` where not even one does."""
    epochs = int(_SPARE * budget_s / found.epoch)
    if epochs < 1:
        raise UsageError(
            f"a budget of {budget_s:g} s is too small: one epoch takes about {found.epoch:.0f} s on this machine; "
            f"give --budget {max(1, round(found.epoch / _SPARE / 60 + 0.5))}min or more, or fewer steps"
        )
    return epochs
