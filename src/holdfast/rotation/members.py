"""Parameter sets of one architecture, side by side: what is collected, learned from and generated."""

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
"""Parameters by name, as a state dict has them."""

_STATISTICS = 2_000  # inputs by which the statistics of batch norm are computed anew
_AT_ONCE = 500


@dataclass(frozen=True)
class Members:
    """Sets of the same parameters, each tensor (n, *shape), and which training run each came from."""

    tensors: dict[str, Tensor]
    basins: Tensor
    """number of the run that a set came from (n), int64: sets of one run lie in one basin of the loss"""

    @classmethod
    def of(cls, sets: Sequence[Weights], basins: Sequence[int]) -> "Members":
        """Some sets side by side; `TargetError` where they are of different architectures or hold no numbers."""
        if not sets:
            raise UsageError("there are no parameter sets; collect some first")
        for place, one in enumerate(sets):
            refuse_foreign(one, sets[0], f"parameter set {place + 1}")
        tensors = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
        return cls(tensors, torch.as_tensor(basins))

    def __len__(self) -> int:
        return len(self.basins)

    @property
    def parameters(self) -> int:
        """How many numbers one set has."""
        return sum(value[0].numel() for value in self.tensors.values())

    def one(self, place: int) -> dict[str, Tensor]:
        """A set by its place."""
        return {name: value[place] for name, value in self.tensors.items()}

    def take(self, rows: Tensor) -> "Members":
        """Some of the sets (positions or a mask)."""
        return Members({name: value[rows] for name, value in self.tensors.items()}, self.basins[rows])

    def joined(self, other: "Members") -> "Members":
        """Those of both, whose runs are told apart by their numbers; `TargetError` for another architecture.

        Where one of them is empty nothing is compared.
        """
        if len(self) and len(other):
            refuse_foreign(other.one(0), self.one(0), "the first of the other parameter sets")
        tensors = {name: torch.cat((value, other.tensors[name])) for name, value in self.tensors.items()}
        return Members(tensors, torch.cat((self.basins, other.basins)))

    def bases(self) -> "Members":
        """The mean set of each run, in the order of their numbers."""
        runs = sorted(set(self.basins.tolist()))
        means = {
            name: torch.stack([value[self.basins == run].mean(0) for run in runs])
            for name, value in self.tensors.items()
        }
        return Members(means, torch.tensor(runs))


def refuse_foreign(weights: Weights, known: Weights, what: str) -> None:
    """`TargetError` where names, shapes or types are not those that are known, or a number is none."""
    if weights.keys() != known.keys():
        other = min(weights.keys() ^ known.keys())
        has = "lacks" if other in known else "has"
        raise TargetError(
            f"{what} {has} {other!r}, so it is of another architecture; give sets of one architecture alone"
        )
    for name, value in weights.items():
        expected = known[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise TargetError(
                f"{what} has {name} of shape {tuple(value.shape)} and {value.dtype}, where {tuple(expected.shape)} and "
                f"{expected.dtype} were expected; give sets of one architecture and type alone"
            )
        if not bool((value.isfinite() | ~expected.isfinite()).all()):  # a mask may hold infinity
            raise TargetError(
                f"{what} has values in {name} that are no numbers: its training diverged; leave it out, or train it "
                f"with a smaller learning rate"
            )


def rotated(model: Classifier) -> list[str]:
    """Names of what is swapped: every learned parameter; buffers follow from the data."""
    return [name for name, value in model.net.named_parameters() if value.is_floating_point()]  # type: ignore[union-attr]


def weights_of(model: Classifier, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Copies of the parameters of those names, or of all."""
    assert isinstance(model.net, nn.Module)
    known = dict(model.net.named_parameters())
    return {name: known[name].detach().clone() for name in (rotated(model) if names is None else names)}


def put(model: Classifier, weights: Weights, data: Batch | None = None) -> Classifier:
    """A copy of the model with other parameters, in eval mode; what `weights` does not name stays.

    Where it has batch norm, its statistics are computed anew on the first inputs of `data`, for those of the model
    belong to other parameters; `UsageError` where there is no data for it.
    """
    new = deepcopy(model).eval()
    assert isinstance(new.net, nn.Module)
    known = dict(new.net.named_parameters())
    buffers = [name for name, _ in new.net.named_buffers() if name in weights]
    if buffers:
        raise UsageError(
            f"the set has {buffers[0]}, which is a buffer, and parameters alone were expected; take a whole state dict "
            f"in with rotation.loaded"
        )
    refuse_foreign(weights, {name: known[name] for name in weights if name in known}, "the parameter set")
    with torch.no_grad():
        for name, value in weights.items():
            known[name].copy_(value)
    norms = [layer for layer in new.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    if norms:
        if data is None:
            raise UsageError(
                "the model has batch norm, whose statistics belong to other parameters; give training inputs to "
                "compute them anew"
            )
        _settle(new, norms, data)
    return new


@torch.no_grad()
def _settle(model: Classifier, norms: Sequence[_NormBase], data: Batch) -> None:
    """Make the statistics the plain means over batches of the first inputs."""
    kept = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches, whatever their order
        layer.train()
    n = min(_STATISTICS, len(data))
    n -= n % _AT_ONCE if n > _AT_ONCE else 0  # batches of one size, which count alike
    for some in data.take(torch.arange(n)).split(_AT_ONCE):
        model(some.x)
    for layer, momentum in zip(norms, kept, strict=True):
        layer.momentum = momentum
        layer.eval()
