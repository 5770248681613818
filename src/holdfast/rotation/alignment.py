"""Permutation alignment, which reorders the hidden units of one network to match another and preserves its outputs.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
arXiv:2209.04836: weight matching by coordinate descent over linear assignments. Differs from the paper: only
networks that are a sequence of layers are supported. Narrow networks stay far from each other even after alignment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.rotation.members import Members, Weights, put

_ROUNDS = 20  # passes over all layers; the loop ends when no layer changes, usually after three
_LOOKED_AT = 64  # inputs that are used to compare the outputs before and after
_UNITWISE = (
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """A hidden layer of a network, with its number of units and the names of the parameters that depend on
    their order.
    """

    units: int
    made: tuple[str, ...]
    """names of the parameters whose first dimension is the units: those of the layer and of a batch norm after it"""
    read: str
    """name of the weight of the next layer; its second dimension is the units, each of which may have several
    columns"""


def hidden(model: Classifier) -> tuple[Hidden, ...]:
    """Return the hidden layers of a sequence of layers. Raises `TargetError` for any other network."""
    layers: list[tuple[int, list[str], str]] = []
    refuse_shared(model)
    for name, layer in _leaves(model.net, ""):
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            layers.append((len(layer.weight), _parameters(name, layer), f"{name}.weight"))
        elif isinstance(layer, _BatchNorm) and layers:
            layers[-1][1].extend(_parameters(name, layer))
        elif not isinstance(layer, _UNITWISE):
            raise TargetError(
                f"{name or 'the network'} is {type(layer).__name__}, but alignment supports only sequences of "
                "linear layers, convolutions, batch norm and elementwise layers; collect without alignment"
            )
    return tuple(Hidden(units, tuple(made), following[2]) for (units, made, _), following in pairwise(layers))


def _leaves(layer: object, name: str) -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(layer, nn.Module)
    if type(layer) is nn.Sequential:  # a subclass may have another forward
        for key, child in layer.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, layer


def _parameters(name: str, layer: nn.Module) -> list[str]:
    return [f"{name}.{key}" for key, _ in layer.named_parameters()]


def permuted(weights: Weights, layers: Sequence[Hidden], orders: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the parameters of an equivalent network in which the units of each hidden layer are in the given order."""
    tensors = dict(weights)
    for layer, order in zip(layers, orders, strict=True):
        for name in layer.made:
            tensors[name] = tensors[name][order]
        read = tensors[layer.read]
        tensors[layer.read] = read.reshape(len(read), layer.units, -1)[:, order].view(read.shape)
    return tensors


def aligned(weights: Weights, known: Weights, layers: Sequence[Hidden], *, rng: Draws) -> dict[str, Tensor]:
    """Return the parameter set `weights` with its hidden units reordered so that they are most similar to those of
    `known`.
    """
    from scipy.optimize import linear_sum_assignment  # takes 0.2 s, and every verb imports this module

    tensors = dict(weights)
    slots = torch.arange(len(layers))
    for turn in range(_ROUNDS):
        changed = False
        for place in rng.at(turn).bits(slots).argsort().tolist():
            layer = layers[place]
            order = torch.as_tensor(linear_sum_assignment(_alike(tensors, known, layer), maximize=True)[1])
            if not torch.equal(order, torch.arange(layer.units)):
                changed = True
                tensors = permuted(tensors, [layer], [order.to(tensors[layer.read].device)])
        if not changed:
            break
    return tensors


def _alike(weights: Weights, known: Weights, layer: Hidden) -> Tensor:
    """Inner products of each unit of `known` with each unit of `weights`, (units, units)."""

    def rows(one: Weights) -> Tensor:
        made = [one[name].reshape(layer.units, -1) for name in layer.made]
        read = one[layer.read].flatten(1).view(len(one[layer.read]), layer.units, -1).movedim(1, 0)
        return torch.cat([*made, read.reshape(layer.units, -1)], 1).double().cpu()

    return rows(known) @ rows(weights).T


def refuse_shared(model: Classifier) -> None:
    """Raise `TargetError` if a layer occurs twice in the model, because no single order of its units may suit both
    places.
    """
    assert isinstance(model.net, nn.Module)
    seen: set[int] = set()
    for name, layer in model.net.named_modules(remove_duplicate=False):
        if [*layer.parameters(recurse=False)] and id(layer) in seen:
            raise TargetError(
                f"{name} is a layer that occurs twice, but alignment supports only sequences of separate layers; "
                "collect without alignment"
            )
        seen.add(id(layer))


def all_aligned(members: Members, model: Classifier, data: Batch, *, rng: Draws) -> Members:
    """Align every parameter set to the first one, and return the aligned collection.

    The outputs of each set before and after are compared on at most 64 inputs of `data`, which costs two forward passes
    of them for each set. Raises `TargetError` if they differ by more than rounding: the network then does not treat its
    units independently, as its list of layers suggests.
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
                f"aligning set {place + 1} changes its outputs by up to {float((old - new).abs().max()):.2g}, but "
                "no change was expected: the network does not apply its layers in order with independent units; "
                "collect without alignment"
            )
    return Members.of(sets, members.basins.tolist())
