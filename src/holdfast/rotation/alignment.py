"""Permutation alignment: the hidden units of one network put in the order of another's, which changes no output.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
arXiv:2209.04836: weight matching by coordinate descent over linear assignments. Differs from the paper: sequences of
layers alone, where the layer that reads a unit is the next one. Narrow networks stay far apart even so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.rotation.members import Members, Weights, put

_ROUNDS = 20  # over all layers; it ends when none changes, mostly after three
_LOOKED_AT = 64  # inputs
_UNITWISE = (
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """Units of a hidden layer, and the parameters that know their order."""

    units: int
    made: tuple[str, ...]
    """whose first dimension they are: the layer itself, and batch norm after it"""
    read: str
    """the weights of the next layer, whose second dimension they are, each of them perhaps several columns"""


def hidden(model: Classifier) -> tuple[Hidden, ...]:
    """The hidden layers of a sequence of layers; `TargetError` for any other network."""
    found: list[tuple[int, list[str], str]] = []
    refuse_shared(model)
    for name, layer in _leaves(model.net, ""):
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            found.append((len(layer.weight), _parameters(name, layer), f"{name}.weight"))
        elif isinstance(layer, _BatchNorm) and found:
            found[-1][1].extend(_parameters(name, layer))
        elif not isinstance(layer, _UNITWISE):
            raise TargetError(
                f"{name or 'the network'} is {type(layer).__name__}, and alignment knows sequences of linear "
                f"layers, convolutions, batch norm and what works on each unit alone; collect without aligning"
            )
    return tuple(Hidden(units, tuple(made), following[2]) for (units, made, _), following in pairwise(found))


def _leaves(layer: object, name: str) -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(layer, nn.Module)
    if type(layer) is nn.Sequential:  # another class may have a forward of its own
        for key, child in layer.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, layer


def _parameters(name: str, layer: nn.Module) -> list[str]:
    return [f"{name}.{key}" for key, _ in layer.named_parameters()]


def permuted(weights: Weights, layers: Sequence[Hidden], orders: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same network with the units of each hidden layer in another order."""
    found = dict(weights)
    for layer, order in zip(layers, orders, strict=True):
        for name in layer.made:
            found[name] = found[name][order]
        read = found[layer.read]
        found[layer.read] = read.reshape(len(read), layer.units, -1)[:, order].view(read.shape)
    return found


def aligned(weights: Weights, known: Weights, layers: Sequence[Hidden], *, rng: Draws) -> dict[str, Tensor]:
    """The set with its hidden units in that order in which they are most like those of another set."""
    found = dict(weights)
    slots = torch.arange(len(layers))
    for turn in range(_ROUNDS):
        changed = False
        for place in rng.at(turn).bits(slots).argsort().tolist():
            layer = layers[place]
            order = torch.as_tensor(linear_sum_assignment(_alike(found, known, layer), maximize=True)[1])
            if not torch.equal(order, torch.arange(layer.units)):
                changed = True
                found = permuted(found, [layer], [order.to(found[layer.read].device)])
        if not changed:
            break
    return found


def _alike(weights: Weights, known: Weights, layer: Hidden) -> Tensor:
    """Inner products of each unit that is known with each of the other's, (units, units)."""

    def rows(one: Weights) -> Tensor:
        made = [one[name].reshape(layer.units, -1) for name in layer.made]
        read = one[layer.read].flatten(1).view(len(one[layer.read]), layer.units, -1).movedim(1, 0)
        return torch.cat([*made, read.reshape(layer.units, -1)], 1).double().cpu()

    return rows(known) @ rows(weights).T


def refuse_shared(model: Classifier) -> None:
    """`TargetError` where a layer occurs twice: one order of its units cannot suit both places."""
    assert isinstance(model.net, nn.Module)
    seen: set[int] = set()
    for name, layer in model.net.named_modules(remove_duplicate=False):
        if [*layer.parameters(recurse=False)] and id(layer) in seen:
            raise TargetError(
                f"{name} is a layer that occurs twice, and alignment knows sequences of layers of their own; collect "
                f"without aligning"
            )
        seen.add(id(layer))


def all_aligned(members: Members, model: Classifier, data: Batch, *, rng: Draws) -> Members:
    """Every set aligned to the first. On some inputs of `data` each is compared with what it was.

    Raises `TargetError` where outputs change by more than rounding: units that the network takes apart in another way
    than it looks. Cost: two forwards of 64 inputs a set.
    """
    layers, sets = hidden(model), [members.one(0)]
    some = data.take(torch.arange(min(_LOOKED_AT, len(data))))
    for place in range(1, len(members)):
        before = members.one(place)
        sets.append(aligned(before, sets[0], layers, rng=rng))
        with torch.no_grad():
            old, new = (put(model, one, data)(some.x) for one in (before, sets[-1]))
        if not torch.allclose(old, new, rtol=1e-4, atol=1e-5 * float(old.abs().max())):
            raise TargetError(
                f"aligning set {place + 1} changes its outputs by up to {float((old - new).abs().max()):.2g}, where "
                f"none was expected: the network does not go through its layers one after another, unit by unit; "
                f"collect without aligning"
            )
    return Members.of(sets, members.basins.tolist())
