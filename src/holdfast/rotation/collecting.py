"""Training of many parameter sets of one architecture, with any recipe, as the training data of a generator.

Sets from one training run are similar, and an attack on one breaks the others; sets from independent runs differ more.
`Basins` combines both: a few runs, each continued by a short sequence of checkpoints at a small constant learning rate.
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
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, Checkpoint
from holdfast.core.types import Positive, Steps
from holdfast.recipes.training.fit import Training, drawing
from holdfast.recipes.training.optimisation import Rate
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.rotation.parameter_sets import Members, rotated, weights_of

Beginning = Literal["he", "own"]


@dataclass(frozen=True)
class Task:
    """What all training runs of a collection of parameter sets share: the model, the data, the threat model and the
    recipes.
    """

    model: Classifier
    """model that defines the architecture; it is not changed"""
    data: Batch
    """training examples"""
    threat: ThreatModel
    recipe: Recipe
    """recipe that trains each run from its initial weights"""
    tail: Recipe
    """recipe that continues a run to produce its sequence of checkpoints; its epochs, learning rate, warm-up and
    averaging are overridden"""
    begins: Beginning = "he"
    """how initial weights are sampled. `he` preserves the size of the activations (He et al.). `own` is the rule of
    each layer; for the layers of torch its weights are 2.4 times smaller, and an attack on one of the resulting runs
    breaks the others three times as often"""


class Source(Protocol):
    """Protocol of a method that produces a collection of parameter sets by one or more training runs."""

    from_fresh_weights: ClassVar[bool]
    """whether each run is trained from fresh random weights; otherwise it starts from the given model"""

    @property
    def runs(self) -> int:
        """Number of training runs that produce the collection of parameter sets. The runs are independent of each
        other.
        """

    @property
    def updates(self) -> int:
        """Number of further updates of the optimiser after the end of a training run, which produce its later
        checkpoints.
        """

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        """Yield the models of one run that starts at `base`, in order; their parameters are the parameter sets."""


@dataclass(frozen=True)
class Seeds:
    """Settings for a collection of the final parameter sets of independent runs."""

    seeds: Steps = 18
    """number of runs"""

    from_fresh_weights: ClassVar[bool] = True

    @property
    def runs(self) -> int:
        """Number of training runs that produce the collection, equal to its number of parameter sets."""
        return self.seeds

    @property
    def updates(self) -> int:
        """Number of updates after a training run, which is always 0, because no further checkpoints are collected."""
        return 0

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        yield base


@dataclass(frozen=True)
class Basins:
    """Settings for a collection from a few independent runs, each continued by a short sequence of checkpoints."""

    seeds: Steps = 8
    """number of runs"""
    sets: Steps = 25
    """number of checkpoints of each run"""
    every: Steps = 4
    """number of updates between two checkpoints"""
    lr: Positive = 1e-3
    """constant learning rate between the checkpoints"""

    from_fresh_weights: ClassVar[bool] = True

    @property
    def runs(self) -> int:
        """Number of training runs that produce the collection, equal to the setting `seeds`."""
        return self.seeds

    @property
    def updates(self) -> int:
        """Number of updates of the optimiser from the end of a training run to its last checkpoint in
        the collection.
        """
        return self.sets * self.every

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        return tail(base, task, self.sets, self.every, self.lr, rng)


@dataclass(frozen=True)
class Subset:
    """Settings for several trainings of a subset of the given model's parameters, for networks too large to train in
    full.

    The other parameters do not change, so the features stay similar and an attack on one set also works on the others.
    """

    names: tuple[str, ...]
    """prefixes of the names of the parameters that are trained, such as `("net.8.",)`"""
    sets: Steps = 20
    """number of trainings"""
    updates: Steps = 150
    """number of updates of each training"""
    lr: Positive = 1e-3
    """constant learning rate"""

    from_fresh_weights: ClassVar[bool] = False

    @property
    def runs(self) -> int:
        """Number of training runs that produce the collection, equal to its number of parameter sets."""
        return self.sets

    def __call__(self, base: Classifier, task: Task, *, rng: Draws) -> Iterator[Classifier]:
        model = deepcopy(base)
        chosen = self.chosen(model)
        for name, value in model.net.named_parameters():  # type: ignore[union-attr]
            value.requires_grad_(name in chosen)
        yield from tail(model, task, 1, self.updates, self.lr, rng)

    def chosen(self, model: Classifier) -> list[str]:
        """Return the names of the model's parameters that are trained, by the prefixes in the settings. Raises
        `UsageError` if no name has one of the prefixes.
        """
        names = rotated(model)
        chosen = [name for name in names if name.startswith(self.names)]
        if not chosen:
            raise UsageError(
                f"no parameter's name begins with {' or '.join(map(repr, self.names))}; the model has "
                f"{', '.join(names[:12])}"
            )
        return chosen


@dataclass(frozen=True)
class LowRank:
    """Settings for several copies of the given model, each trained further after a random low-rank change."""

    rank: Steps = 4
    """rank of the change"""
    kick: Positive = 1.0
    """Frobenius norm of the change, in multiples of the Frobenius norm of the weight"""
    sets: Steps = 20
    """number of trainings"""
    updates: Steps = 100
    """number of updates of each training"""
    lr: Positive = 1e-3
    """constant learning rate"""

    from_fresh_weights: ClassVar[bool] = False

    @property
    def runs(self) -> int:
        """Number of training runs that produce the collection, equal to its number of parameter sets."""
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
    """Run all trainings of a method such as `Basins`, and return the collection of parameter sets. Raises `UsageError`
    and `TargetError`.

    `said` is called after each run with the number of completed runs and the number of all runs.
    """
    sets, basins = [], []
    for run in range(source.runs):
        base = (
            trained_from_fresh_weights(task, rng.at("run", run)) if source.from_fresh_weights else task.model
        )
        for model in source(base, task, rng=rng.at("sets", run)):
            sets.append(weights_of(model, swapped(source, task.model)))
            basins.append(run)
        said(run + 1, source.runs)
    return Members.of(sets, basins)


def swapped(source: Source, model: Classifier) -> Sequence[str]:
    """Return the names of the parameters that the sets of a collection contain. A rotation swaps only these."""
    return source.chosen(model) if isinstance(source, Subset) else rotated(model)


def trained_from_fresh_weights(task: Task, rng: Draws) -> Classifier:
    """Return a model of the given architecture that is trained from fresh random weights with the recipe of the
    collection.
    """
    initial = with_fresh_weights(task.model, rng.at("begin"), task.begins)
    return last_of(task.recipe, initial, task.data, task.threat, rng.at("training"))


def with_fresh_weights(model: Classifier, rng: Draws, begins: Beginning) -> Classifier:
    """Return a copy of the model with fresh random weights.

    With `he`, weights of linear layers and convolutions have the variance of He et al., "Delving Deep into Rectifiers",
    ICCV 2015, arXiv:1502.01852, and those of the last such layer half of it. Other parameters are sampled by the rule
    of their layer. Raises `TargetError` for a layer without `reset_parameters`.
    """
    new = deepcopy(model).requires_grad_()
    with drawing(rng):
        for name, layer in new.named_modules():
            if not [*layer.parameters(recurse=False), *layer.buffers(recurse=False)] or layer is new:
                continue
            begin = getattr(layer, "reset_parameters", None)
            if not callable(begin) and not [*layer.parameters(recurse=False)]:
                continue  # its buffers are constants, such as the mean of the inputs
            if not callable(begin):
                raise TargetError(
                    f"{name} is {type(layer).__name__}, whose weights cannot be initialised again; give it a "
                    "method reset_parameters(), or collect a Subset or LowRank, which start from the given model"
                )
            begin()
        if begins == "he":
            _enlarge([layer for layer in new.modules() if isinstance(layer, nn.Linear | _ConvNd)])
    return new


def _enlarge(layers: Sequence[nn.Linear | _ConvNd]) -> None:
    for place, layer in enumerate(layers, 1):
        if "weight" in layer._parameters:  # a parametrised weight is sampled by its own rule
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if place == len(layers) else "relu")


def tail(base: Classifier, task: Task, sets: int, every: int, lr: float, rng: Draws) -> Iterator[Classifier]:
    """Continue the training of the model `base`, and yield a copy of it after every `every` updates, `sets` copies in
    total.

    The learning rate is constant, and batches are sampled with `rng`. Recipes that reserve held-out examples, such as
    those with a guard, make fewer updates.
    """
    batch = task.tail.training.batch
    # over the data, which may be smaller than `every` batches
    passes = math.ceil(every / max(len(task.data) // batch, 1))
    recipe = trained_as(task.tail, further(task.tail.training, sets * passes, lr, "flat"))
    after: Checkpoint | None = None
    for place in range(sets):
        for turn in range(passes):
            updates = every // passes + (turn < every % passes)
            examples = rows_of(task.data, updates * batch, rng.at("batches", place + turn * sets))
            after = next(iter(recipe(base, examples, task.threat, rng=rng.at("training"), after=after)))
            after = _without_examples(after)
        assert after is not None
        new = deepcopy(base)
        after.put_into(new)
        yield new.eval()


def further(training: Training, epochs: int, lr: float, schedule: Rate) -> Training:
    """Return the settings of a training that continues with the weights of a trained network: without warm-up, weight
    decay and averaging.
    """
    how = replace(training, epochs=epochs, lr=lr, schedule=schedule, optimizer="adamw", weight_decay=0.0)
    return replace(how, warmup=0.0, averaging="none")


def _without_examples(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without state that a recipe keeps for each example, as `atta` does: the next examples differ."""
    tensors = {name: value for name, value in checkpoint.tensors.items() if not name.startswith(STATE)}
    return replace(checkpoint, tensors=tensors)


def last_of(recipe: Recipe, model: Classifier, data: Batch, threat: ThreatModel, rng: Draws) -> Classifier:
    """Train a copy of the model with a recipe to the end, and return the trained copy in eval mode."""
    new = deepcopy(model)
    checkpoint: Checkpoint | None = None
    for checkpoint in recipe(model, data, threat, rng=rng):  # noqa: B007
        pass
    assert checkpoint is not None
    checkpoint.put_into(new)
    return new.eval()


def rows_of(data: Batch, n: int, rng: Draws) -> Batch:
    """Return at most `n` of the examples, sampled at random without replacement."""
    return data.take(rng.bits(data.ids).argsort()[:n])


@torch.no_grad()
def _kicked(layer: nn.Linear, rank: int, size: float, rng: Draws) -> None:
    """Add a random matrix of the given rank; its norm is `size` times that of the layer's weight."""
    out, features = layer.weight.shape
    left = rng.at("tall").normal(torch.arange(out), rank).to(layer.weight)
    right = rng.at("wide").normal(torch.arange(rank), features).to(layer.weight)
    added = left @ right
    layer.weight += size * layer.weight.norm() / added.norm() * added
