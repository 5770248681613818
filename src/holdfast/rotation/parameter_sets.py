"""Collections of parameter sets of one architecture, and distances between them."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier

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
