"""How long a recipe takes on this machine, and what fits into a budget of time."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.checkpoint import STATE, Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.ops.fit import updates
from holdfast.ops.recipe import Recipe, trained_as
from holdfast.ops.together import processes, told
from holdfast.runs.held_out import harmless
from holdfast.runs.pieces import halved, in_pieces
from holdfast.runs.training import BEST, LAST, Point, keep

_SHORT = 3  # updates of the shorter trial
_WATCHED = 512  # and its examples at least: guards watch where there are more than 256
_LEAST, _MOST = 2, 400  # updates that the longer one has more
_TRIED = 0.01  # of the budget may be spent on either of those
_STILL = 1e-9  # a learning rate at which no loss is lost
_SPARE = 0.95  # of the budget is planned, for a machine is not equally quick all the time


@dataclass(frozen=True)
class Pace:
    """Seconds of wall time on this machine."""

    update: float
    epoch: float
    """the updates of one epoch and the writing of its checkpoint, and once it is known, the look after it"""


def pace(recipe: Recipe, model: Classifier, data: Batch, threat: ThreatModel, budget_s: float) -> Pace:
    """Measured on updates of a copy, whose weights are dropped; nothing is looked at after them.

    Where memory runs out, with as small batches as it holds.
    """
    size = min(recipe.training.batch, len(data))
    while True:
        try:
            return _paced(recipe, size, model, data, threat, budget_s)
        except (RuntimeError, MemoryError) as error:
            size = smaller(size, error)


def smaller(batch: int, error: BaseException) -> int:
    """Half of a batch that memory ran out for; raises whatever else went wrong, and what no half mends."""
    half = halved(batch, error)
    if processes() > 1:
        raise TargetError(
            f"memory ran out for a batch of {batch} on {processes()} processes; go on with a smaller one in a new run, "
            f"as in --set recipe.training.batch={half}"
        ) from error
    return half


@dataclass(frozen=True)
class _Trial:
    seconds: float
    updates: int
    examples: int
    last: Checkpoint

    @property
    def each(self) -> float:
        """Seconds of an update, with its share of what is paid once."""
        return self.seconds / self.updates


def _paced(
    recipe: Recipe, size: int, model: Classifier, data: Batch, threat: ThreatModel, budget_s: float
) -> Pace:
    """From two trials of different length: what both pay once, a guard's look included, an epoch pays once.

    With next to nothing that may be changed, and nothing wrong: passes take as long as they do at a model that holds,
    and no guard has anything to object to. Where an update takes long, a single one says all, and pays for itself what
    an epoch pays once.
    """
    how = recipe.training
    few = replace(how, epochs=1, lr=_STILL, batch=size)
    rows, least = torch.arange(len(data), device=data.x.device), max(_SHORT * size, _WATCHED)
    all_of_it = updates(len(data), size)

    def taken(n: int) -> _Trial:
        some = as_it_says(model, data.take(rows[:n]))
        begun = time.perf_counter()
        *_, last = trained_as(recipe, few)(model, some, harmless(threat), rng=Draws(0))
        seconds = told(time.perf_counter() - begun)  # all decide alike
        return _Trial(seconds, updates(len(some), size), len(some), last)

    taken(size)  # chooses kernels and fills caches
    single = taken(size)
    if not how.compiled and updates(least, size) * single.seconds > _TRIED * budget_s:
        kept_s = _kept_s(single.last, single.examples, len(data))
        return Pace(single.seconds, single.seconds * all_of_it + kept_s)
    short = taken(least)
    update, once = short.each, 0.0
    more = min(int(_TRIED * budget_s / max(update, 1e-9)), _MOST)
    if more >= _LEAST:
        update = _apart(short, taken(least + more * size))
        once = 0.0 if how.compiled else max(short.seconds - short.updates * update, 0.0)
    return Pace(update, update * all_of_it + once + _kept_s(short.last, short.examples, len(data)))


def as_it_says(model: Classifier, data: Batch) -> Batch:
    """The same with the model's own predictions for labels, where there are labels."""
    was = model.training
    model.eval()
    with torch.no_grad():
        says = torch.cat(in_pieces(data, lambda some: model(some.x).argmax(1)))
    model.train(was)
    return data.labelled(torch.where(data.y == UNLABELLED, data.y, says))


def _apart(short: _Trial, long: _Trial) -> float:
    """Seconds of one update."""
    if long.updates == short.updates:
        return long.each
    return max(long.seconds - short.seconds, 0.0) / (long.updates - short.updates)


def _kept_s(checkpoint: Checkpoint, few: int, many: int) -> float:
    """Seconds that it takes to write it as the last one and as the best one, had it been trained on so many more."""
    with tempfile.TemporaryDirectory() as place:
        whole = _grown(checkpoint, few, many)
        begun = time.perf_counter()
        for name in (LAST, BEST):
            keep(Path(place), name, whole, ())
        return told(time.perf_counter() - begun)


def _grown(checkpoint: Checkpoint, few: int, many: int) -> Checkpoint:
    """What it would be of `many` examples in place of `few`: what a recipe remembers of each is as much longer."""
    tensors = {
        name: value.new_zeros(many, *value.shape[1:])
        if name.startswith(STATE) and value.shape[:1] == (few,)
        else value
        for name, value in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def fitting(budget_s: float, found: Pace) -> int:
    """Epochs that fit into a budget; 0 where not even one does."""
    return max(int(_SPARE * budget_s / found.epoch), 0)


def left(epochs: int, curve: Sequence[Point]) -> int:
    """Epochs in all, of so many that were planned, where updates have become dearer on the way."""
    cost = 1.0
    for point in curve:
        if point.dearer != cost:
            epochs = point.epoch + int((epochs - point.epoch) * cost / point.dearer)
            cost = point.dearer
    return epochs


def too_small(budget_s: float, found: Pace, spent_s: float) -> str:
    """Why no epoch fits beside the seconds that were spent on finding out, and what would do."""
    least = math.ceil(found.epoch / _SPARE + spent_s)
    asked = f"{least}s" if least < 120 else f"{math.ceil(least / 60)}min"
    return (
        f"a budget of {budget_s:g} s is too small: one epoch takes about {_seconds(found.epoch)} on this machine, and "
        f"finding that out took {_seconds(spent_s)}; give --budget {asked} or more, or fewer steps"
    )


def _seconds(time: float) -> str:
    return f"{time:.2g} s" if time < 10 else f"{time:.0f} s"
