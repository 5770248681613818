"""How long a recipe takes on this machine, and what fits into a budget of time."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier, out_of_memory
from holdfast.core.threat import ThreatModel
from holdfast.ops.fit import updates
from holdfast.ops.together import processes, told
from holdfast.recipes.protocol import Recipe, trained_as
from holdfast.runs.held_out import harmless
from holdfast.runs.training import BEST, LAST, Point, keep

_WARM, _TIMED = 3, 12  # updates: the first ones choose kernels and fill caches
_MORE, _SOON = 50, 15.0  # so many updates are timed where they take less than so many seconds
_STILL = 1e-9  # a learning rate at which no loss is lost
_SPARE = 0.95  # of the budget is planned, for a machine is not equally quick all the time


@dataclass(frozen=True)
class Pace:
    """Seconds of wall time on this machine."""

    update: float
    epoch: float
    """the updates of one epoch, the look at the held-out examples after it, and the writing of its checkpoint"""


def pace(recipe: Recipe, model: Classifier, data: Batch, threat: ThreatModel, look_s: float) -> Pace:
    """Measured on a few updates of a copy, whose weights are dropped; a look at held-out examples takes `look_s`.

    Where memory runs out, with as small batches as it holds.
    """
    size = min(recipe.training.batch, len(data))
    while True:
        try:
            return _paced(recipe, size, model, data, threat, look_s)
        except (RuntimeError, MemoryError) as error:
            size = smaller(size, error)


def smaller(batch: int, error: BaseException) -> int:
    """Half of a batch that memory ran out for; raises whatever else went wrong, and what no half mends."""
    if not out_of_memory(error):
        raise error
    if processes() > 1:
        raise TargetError(
            f"memory ran out for a batch of {batch} on {processes()} processes; go on with a smaller one in a new run, "
            f"as in --set recipe.training.batch={batch // 2}"
        ) from error
    if batch == 1:
        raise TargetError(
            "memory ran out for a batch of one example; train a smaller network, or on another --device"
        ) from error
    return batch // 2


def _paced(
    recipe: Recipe, size: int, model: Classifier, data: Batch, threat: ThreatModel, look_s: float
) -> Pace:
    """From two trials of different length, so that what a training costs once is in neither's difference.

    With nothing that may be changed: passes take as long, and no guard has anything to object to.
    """
    few = replace(recipe.training, epochs=1, lr=_STILL, batch=size)

    def taken(n: int) -> tuple[float, int, Checkpoint]:
        rows = torch.arange(min(n * size, len(data)), device=data.x.device)
        begun = time.perf_counter()
        *_, last = trained_as(recipe, few)(model, data.take(rows), harmless(threat), rng=Draws(0))
        return told(time.perf_counter() - begun), updates(len(rows), size), last  # all processes decide alike

    taken(_WARM)
    short = taken(_WARM)
    update = _apart(short, taken(_TIMED))
    if update * _MORE < _SOON:
        update = _apart(short, taken(_MORE))
    return Pace(update, update * updates(len(data), size) + look_s + _kept_s(short[2]))


def _apart(short: tuple[float, int, Checkpoint], long: tuple[float, int, Checkpoint]) -> float:
    """Seconds of one update."""
    if long[1] == short[1]:
        return long[0] / long[1]
    return max(long[0] - short[0], 0.0) / (long[1] - short[1])


def _kept_s(checkpoint: Checkpoint) -> float:
    """Seconds that it takes to write a checkpoint as the last one and as the best one."""
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        for name in (LAST, BEST):
            keep(Path(place), name, checkpoint, ())
        return told(time.perf_counter() - begun)


def fitting(budget_s: float, found: Pace) -> int:
    """Epochs that fit into a budget; 0 where not even one does."""
    return int(_SPARE * budget_s / found.epoch)


def left(epochs: int, curve: Sequence[Point]) -> int:
    """Epochs in all, of so many that were planned, where updates have become dearer on the way."""
    cost = 1.0
    for point in curve:
        if point.dearer != cost:
            epochs = point.epoch + int((epochs - point.epoch) * cost / point.dearer)
            cost = point.dearer
    return epochs


def too_small(budget_s: float, found: Pace) -> str:
    """Why no epoch fits, and what would do."""
    least = math.ceil(found.epoch / _SPARE)
    asked = f"{least}s" if least < 120 else f"{math.ceil(least / 60)}min"
    return (
        f"a budget of {budget_s:g} s is too small: one epoch takes about {found.epoch:.0f} s on this machine; give "
        f"--budget {asked} or more, or fewer steps"
    )
