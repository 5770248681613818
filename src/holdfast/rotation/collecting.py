"""Collecting parameter sets of one architecture, by any recipe, from which others are generated.

Sets of one training run are neighbours, and an attack on one breaks the others; sets of independent runs are strangers.
`basins` has both: a few runs, each with a short tail of checkpoints at a small constant rate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import STATE, Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Positive, Steps
from holdfast.ops.fit import drawing
from holdfast.ops.recipe import Recipe, trained_as
from holdfast.rotation.members import Members, rotated, weights_of

Beginning = Literal["he", "own"]


@dataclass(frozen=True)
class Task:
    """What every set is trained with."""

    model: Classifier
    """whose architecture they share; it stays as it is"""
    data: Batch
    """training data"""
    threat: ThreatModel
    recipe: Recipe
    """by which each run is trained from its beginning"""
    tail: Recipe
    """by which checkpoints follow one another closely; its epochs, rate, warm-up and averaging give way"""
    begins: Beginning = "he"
    """how weights of a run of its own are drawn: so large that activations keep their size (He), or by each layer's own
    rule, which for torch's is 2.4 times smaller and leaves independent runs three times as much alike to an attack"""


class Source(Protocol):
    """Where parameter sets come from."""

    anew: ClassVar[bool]
    """whether each run is trained from weights of its own; the others begin at the given model"""

    @property
    def runs(self) -> int:
        """Training runs, each of which can be made by itself."""

    @property
    def updates(self) -> int:
        """Of one run, beside the training that it begins after."""

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        """The models of one run that stands at `base`, whose parameters are its sets, in order."""


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints of one run, as the published recipe has it: one basin, so rotating among them protects nothing."""

    sets: Steps = 200
    """checkpoints"""
    every: Steps = 4
    """updates between them"""
    lr: Positive = 1e-3
    """constant rate at which they follow one another"""

    anew: ClassVar[bool] = True

    @property
    def runs(self) -> int:
        """One."""
        return 1

    @property
    def updates(self) -> int:
        """Those between its checkpoints."""
        return self.sets * self.every

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        return tail(base, task, self.sets, self.every, self.lr, rng)


@dataclass(frozen=True)
class Seeds:
    """The ends of independent runs."""

    seeds: Steps = 18
    """runs"""

    anew: ClassVar[bool] = True

    @property
    def runs(self) -> int:
        """As many as sets."""
        return self.seeds

    @property
    def updates(self) -> int:
        """None: a run ends where its training does."""
        return 0

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        yield base


@dataclass(frozen=True)
class Basins:
    """A few independent runs, each with a short tail of checkpoints."""

    seeds: Steps = 8
    """runs"""
    sets: Steps = 25
    """checkpoints of each"""
    every: Steps = 4
    """updates between them"""
    lr: Positive = 1e-3
    """constant rate at which they follow one another"""

    anew: ClassVar[bool] = True

    @property
    def runs(self) -> int:
        """As many as seeds."""
        return self.seeds

    @property
    def updates(self) -> int:
        """Those between its checkpoints."""
        return self.sets * self.every

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        return tail(base, task, self.sets, self.every, self.lr, rng)


@dataclass(frozen=True)
class Subset:
    """Some parameters of the given model alone, trained on in several ways: for networks too large to make whole.

    They leave the features in place, and with them the attack.
    """

    names: tuple[str, ...]
    """how the names of the parameters begin that are swapped, as in ("net.8.",)"""
    sets: Steps = 20
    """trainings"""
    updates: Steps = 150
    """of each"""
    lr: Positive = 1e-3
    """constant rate"""

    anew: ClassVar[bool] = False

    @property
    def runs(self) -> int:
        """As many as sets."""
        return self.sets

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        model = deepcopy(base)
        chosen = self.chosen(model)
        for name, value in model.net.named_parameters():  # type: ignore[union-attr]
            value.requires_grad_(name in chosen)
        yield from tail(model, task, 1, self.updates, self.lr, rng)

    def chosen(self, model: Classifier) -> list[str]:
        """Names of what is swapped; `UsageError` where none begins so."""
        known = rotated(model)
        found = [name for name in known if name.startswith(self.names)]
        if not found:
            raise UsageError(
                f"no parameter's name begins with {' or '.join(map(repr, self.names))}; the model has "
                f"{', '.join(known[:12])}"
            )
        return found


@dataclass(frozen=True)
class LowRank:
    """The given model, each matrix of it kicked by a random one of low rank, and trained on."""

    rank: Steps = 4
    """of what is added"""
    kick: Positive = 1.0
    """its size, in that of the matrix"""
    sets: Steps = 20
    """trainings"""
    updates: Steps = 100
    """of each"""
    lr: Positive = 1e-3
    """constant rate"""

    anew: ClassVar[bool] = False

    @property
    def runs(self) -> int:
        """As many as sets."""
        return self.sets

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        model, place = deepcopy(base), rng.at("kick")
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and min(layer.weight.shape) > self.rank:
                _kicked(layer, self.rank, self.kick, place.at(name))
        yield from tail(model, task, 1, self.updates, self.lr, rng)


def collect(
    source: Source,
    task: Task,
    *,
    rng: Draws,
    said: Callable[[int, int], None] = lambda run, of: None,
) -> Members:
    """All sets of a source, side by side; `said` hears of each run that is done. Raises `UsageError`, `TargetError`."""
    sets, basins = [], []
    for run in range(source.runs):
        base = trained_anew(task, rng.at("run", run)) if source.anew else task.model
        for model in source(base, task, rng=rng.at("sets", run)):
            sets.append(weights_of(model, swapped(source, task.model)))
            basins.append(run)
        said(run + 1, source.runs)
    return Members.of(sets, basins)


def swapped(source: Source, model: Classifier) -> Sequence[str]:
    """Names of the parameters that a source's sets have."""
    return source.chosen(model) if isinstance(source, Subset) else rotated(model)


def trained_anew(task: Task, rng: Draws) -> Classifier:
    """A model of the task's architecture that begins at weights drawn for the place."""
    begun = begun_anew(task.model, rng.at("begin"), task.begins)
    return last_of(task.recipe, begun, task.data, task.threat, rng.at("training"))


def begun_anew(model: Classifier, rng: Draws, begins: Beginning) -> Classifier:
    """A copy with fresh weights; `TargetError` for a layer that has no rule to draw them by.

    With `he` the weights of linear layers and convolutions have the variance of He et al., "Delving Deep into
    Rectifiers", ICCV 2015, arXiv:1502.01852, those of the last one half of it, and what the layer's own rule says of
    everything else stands.
    """
    new = deepcopy(model).requires_grad_()
    with drawing(rng):
        for name, layer in new.named_modules():
            if not [*layer.parameters(recurse=False), *layer.buffers(recurse=False)] or layer is new:
                continue
            begin = getattr(layer, "reset_parameters", None)
            if not callable(begin):
                raise TargetError(
                    f"{name} is {type(layer).__name__}, which cannot draw its weights anew; give it a method "
                    f"reset_parameters(), or collect a Subset or LowRank, which begin at the given model"
                )
            begin()
        if begins == "he":
            _enlarge([layer for layer in new.modules() if isinstance(layer, nn.Linear | _ConvNd)])
    return new


def _enlarge(layers: Sequence[nn.Linear | _ConvNd]) -> None:
    for place, layer in enumerate(layers, 1):
        if "weight" in layer._parameters:  # what is parametrised draws its own
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if place == len(layers) else "relu")


def tail(base: Classifier, task: Task, sets: int, every: int, lr: float, rng: Draws) -> Iterator[Classifier]:
    """`sets` models, each `every` updates after the one before, at a constant rate, on batches drawn for the place.

    A recipe that keeps examples aside, as a guard does, makes fewer updates of them.
    """
    batch = task.tail.training.batch
    passes = math.ceil(every / max(len(task.data) // batch, 1))  # over the data, where it is small
    how = replace(
        task.tail.training,
        epochs=sets * passes,
        lr=lr,
        schedule="flat",
        warmup=0.0,
        averaging="none",
        weight_decay=0.0,
        optimizer="adamw",
    )
    recipe = trained_as(task.tail, how)
    after: Checkpoint | None = None
    for place in range(sets):
        for turn in range(passes):
            updates = every // passes + (turn < every % passes)
            some = rows_of(task.data, updates * batch, rng.at("batches", place + turn * sets))
            after = next(iter(recipe(base, some, task.threat, rng=rng.at("training"), after=after)))
            after = _without_examples(after)
        assert after is not None
        new = deepcopy(base)
        after.put_into(new)
        yield new.eval()


def _without_examples(checkpoint: Checkpoint) -> Checkpoint:
    """Without what a recipe remembers of each example, as `atta` does: those that follow are others."""
    kept = {name: value for name, value in checkpoint.tensors.items() if not name.startswith(STATE)}
    return replace(checkpoint, tensors=kept)


def last_of(recipe: Recipe, model: Classifier, data: Batch, threat: ThreatModel, rng: Draws) -> Classifier:
    """The new model that a recipe ends with, in eval mode."""
    new = deepcopy(model)
    checkpoint: Checkpoint | None = None
    for checkpoint in recipe(model, data, threat, rng=rng):  # noqa: B007
        pass
    assert checkpoint is not None
    checkpoint.put_into(new)
    return new.eval()


def rows_of(data: Batch, n: int, rng: Draws) -> Batch:
    """At most `n` of the examples, drawn for the place."""
    return data.take(rng.bits(data.ids).argsort()[:n])


@torch.no_grad()
def _kicked(layer: nn.Linear, rank: int, size: float, rng: Draws) -> None:
    """Add a random matrix of that rank and of so many times the norm of the layer's own."""
    out, features = layer.weight.shape
    tall = rng.at("tall").normal(torch.arange(out), rank).to(layer.weight)
    wide = rng.at("wide").normal(torch.arange(rank), features).to(layer.weight)
    added = tall @ wide
    layer.weight += size * layer.weight.norm() / added.norm() * added
