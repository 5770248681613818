"""Training of many parameter sets, and collections of them as matrices."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
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

Weights = Mapping[str, Tensor]
"""parameters by name, as in a state dict"""

_STATISTICS = 2_000  # inputs from which the statistics of batch norm are recomputed
_AT_ONCE = 500  # inputs in one batch


@dataclass(frozen=True)
class Members:
    """A collection of `n` parameter sets, stacked in tensors of shape (n, *shape), with the index of each set's
    training run in `basins`.
    """

    tensors: dict[str, Tensor]
    basins: Tensor
    """index of the training run of each set (n), int64; sets of one run lie in one basin of the loss"""

    @classmethod
    def of(cls, sets: Sequence[Weights], basins: Sequence[int]) -> "Members":
        """Return a collection with the given parameter sets. `basins` contains the index of the training run of each
        set.

        Raises `TargetError` if architectures differ or a value is not finite, and `UsageError` if there are no sets.
        """
        if not sets:
            raise UsageError("there are no parameter sets; collect some first")
        for place, weights in enumerate(sets):
            refuse_foreign(weights, sets[0], f"parameter set {place + 1}")
        tensors = {name: torch.stack([weights[name] for weights in sets]) for name in sets[0]}
        return cls(tensors, torch.as_tensor(basins))

    def __len__(self) -> int:
        return len(self.basins)

    @property
    def parameters(self) -> int:
        """Number of parameters of one set of the collection."""
        return sum(value[0].numel() for value in self.tensors.values())

    def one(self, place: int) -> dict[str, Tensor]:
        """Return the parameter set at the index `place` of the collection."""
        return {name: value[place] for name, value in self.tensors.items()}

    def take(self, rows: Tensor) -> "Members":
        """Return a collection with some of the parameter sets, selected by indices or by a mask."""
        return Members({name: value[rows] for name, value in self.tensors.items()}, self.basins[rows])

    def joined(self, other: "Members") -> "Members":
        """Return a collection with the parameter sets of this collection and of `other`. The indices of training runs
        do not change.

        Raises `TargetError` if architectures differ. If one of the collections is empty, nothing is compared.
        """
        if len(self) and len(other):
            refuse_foreign(other.one(0), self.one(0), "the first of the other parameter sets")
        tensors = {name: torch.cat((value, other.tensors[name])) for name, value in self.tensors.items()}
        return Members(tensors, torch.cat((self.basins, other.basins)))

    def bases(self) -> "Members":
        """Return the mean parameter set of each training run, ordered by the index of the run."""
        runs = sorted(set(self.basins.tolist()))
        means = {
            name: torch.stack([value[self.basins == run].mean(0) for run in runs])
            for name, value in self.tensors.items()
        }
        return Members(means, torch.tensor(runs))


def refuse_foreign(weights: Weights, reference: Weights, description: str) -> None:
    """Raise `TargetError` if a parameter set differs from the set `reference` in names, shapes or types, or contains a
    value that is not finite.

    `description` is that of the parameter set in the message.
    """
    if weights.keys() != reference.keys():
        name_of_one = min(weights.keys() ^ reference.keys())
        has = "lacks" if name_of_one in reference else "has"
        raise TargetError(
            f"{description} {has} {name_of_one!r}, so it has another architecture; give sets of one architecture only"
        )
    for name, value in weights.items():
        expected = reference[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise TargetError(
                f"{description} has {name} of shape {tuple(value.shape)} and {value.dtype}, but "
                f"{tuple(expected.shape)} and {expected.dtype} were expected; give sets of one architecture and "
                "type only"
            )
        if not bool((value.isfinite() | ~expected.isfinite()).all()):  # a mask may hold infinity
            raise TargetError(
                f"{description} has NaN or infinite values in {name}: its training diverged; leave it out, or train it "
                "with a smaller learning rate"
            )


def rotated(model: Classifier) -> list[str]:
    """Return the names of the parameters that a rotation swaps, which are all floating-point parameters of the model.
    Buffers are recomputed from data.
    """
    return [name for name, value in model.net.named_parameters() if value.is_floating_point()]  # type: ignore[union-attr]


def weights_of(model: Classifier, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return copies of the model's parameters with the given names, by default of all parameters that a
    rotation swaps.
    """
    assert isinstance(model.net, nn.Module)
    parameters = dict(model.net.named_parameters())
    return {name: parameters[name].detach().clone() for name in (rotated(model) if names is None else names)}


def put(model: Classifier, weights: Weights, data: Batch | None = None) -> Classifier:
    """Return a copy of the model in eval mode with the parameters of a set. Parameters that the set does not contain
    keep their values.

    The statistics of batch norm are recomputed on the first inputs of `data`, since those of the model belong to other
    parameters. Raises `UsageError` if the model has batch norm and `data` is None.
    """
    new = deepcopy(model).eval()
    assert isinstance(new.net, nn.Module)
    parameters = dict(new.net.named_parameters())
    buffers = [name for name, _ in new.net.named_buffers() if name in weights]
    if buffers:
        raise UsageError(
            f"the set contains {buffers[0]}, which is a buffer; only parameters were expected; load a whole state "
            "dict with rotation.loaded"
        )
    refuse_foreign(
        weights, {name: parameters[name] for name in weights if name in parameters}, "the parameter set"
    )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    norms = [layer for layer in new.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    if norms:
        if data is None:
            raise UsageError(
                "the model has batch norm, whose statistics belong to other parameters; give training inputs to "
                "compute them again"
            )
        _settle(new, norms, data)
    return new


@torch.no_grad()
def _settle(model: Classifier, norms: Sequence[_NormBase], data: Batch) -> None:
    """Set the running statistics to their means over batches of the first inputs."""
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # the average of all batches, in any order
        layer.train()
    n = min(_STATISTICS, len(data))
    n -= n % _AT_ONCE if n > _AT_ONCE else 0  # batches of equal size, so that each has the same weight
    for batch in data.take(torch.arange(n)).split(_AT_ONCE):
        model(batch.x)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def l1(sets: Members, other_sets: Members) -> Tensor:
    """Return the mean absolute difference of the parameters for each pair of a set of `sets` and a set of `other_sets`,
    (n, m), float64.
    """
    total = torch.zeros(len(sets), len(other_sets), dtype=torch.float64)
    for name, value in sets.tensors.items():
        total += torch.cdist(value.flatten(1), other_sets.tensors[name].flatten(1), p=1).double().cpu()
    return total / sets.parameters


def apart(members: Members) -> float:
    """Return how different the training runs of a collection are: the mean L1 distance between the mean parameter sets
    of its runs.

    For a collection from a single run, return the mean L1 distance of each set to its nearest other set.
    """
    bases = members.bases()
    if len(bases) > 1:
        between = l1(bases, bases)
        return float(between.sum() / (between.numel() - len(bases)))
    within = l1(members, members).fill_diagonal_(torch.inf)
    return float(within.min(1).values.mean())


def nearest_sets(sets: Members, other_sets: Members) -> tuple[Tensor, Tensor]:
    """Return the L1 distance of each parameter set of `sets` to the nearest set of `other_sets` (n), and the index of
    that nearest set (n).
    """
    nearest = l1(sets, other_sets).min(1)
    return nearest.values, nearest.indices


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
