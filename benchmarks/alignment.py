"""Permutation alignment, which reorders the hidden units of a network so that its parameters are similar to those of
another network. Its outputs do not change.

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
from holdfast.rotation.collecting import Members, Weights, put

_ROUNDS = 20  # passes over all layers; the loop ends when no layer changes, usually after three
_LOOKED_AT = 64  # inputs that are used to compare the outputs before and after
_UNITWISE = (
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """A hidden layer of a network: its number of units, and the names of the parameters that are reordered if the units
    are.
    """

    units: int
    made: tuple[str, ...]
    """names of the parameters whose first dimension is the units: those of the layer and of a batch norm after it"""
    read: str
    """name of the weight of the next layer; its second dimension is the units, each of which may have several
    columns"""


def hidden(model: Classifier) -> tuple[Hidden, ...]:
    """Return the hidden layers of a network that is a sequence of layers. Raises `TargetError` for any
    other network.
    """
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
    return tuple(
        Hidden(units, tuple(names), following[2]) for (units, names, _), following in pairwise(layers)
    )


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
    """Return the parameters of an equivalent network in which the units of each hidden layer are in a given order."""
    tensors = dict(weights)
    for layer, order in zip(layers, orders, strict=True):
        for name in layer.made:
            tensors[name] = tensors[name][order]
        weight = tensors[layer.read]
        tensors[layer.read] = weight.reshape(len(weight), layer.units, -1)[:, order].view(weight.shape)
    return tensors


def aligned(
    weights: Weights, reference: Weights, layers: Sequence[Hidden], *, rng: Draws
) -> dict[str, Tensor]:
    """Return a parameter set whose hidden units are reordered so that it is most similar to the set `reference`. The
    outputs of the network do not change.
    """
    from scipy.optimize import linear_sum_assignment  # takes 0.2 s, and every verb imports this module

    tensors = dict(weights)
    slots = torch.arange(len(layers))
    for turn in range(_ROUNDS):
        changed = False
        # in random order, as in the paper
        for place in rng.at(turn).bits(slots).argsort().tolist():
            layer = layers[place]
            order = torch.as_tensor(
                linear_sum_assignment(_similarity(tensors, reference, layer), maximize=True)[1]
            )
            if not torch.equal(order, torch.arange(layer.units)):
                changed = True
                tensors = permuted(tensors, [layer], [order.to(tensors[layer.read].device)])
        if not changed:
            break
    return tensors


def _similarity(weights: Weights, reference: Weights, layer: Hidden) -> Tensor:
    """Inner products of each unit of `reference` with each unit of `weights`, (units, units)."""

    def rows(tensors: Weights) -> Tensor:
        outgoing = [tensors[name].reshape(layer.units, -1) for name in layer.made]
        incoming = (
            tensors[layer.read].flatten(1).view(len(tensors[layer.read]), layer.units, -1).movedim(1, 0)
        )
        return torch.cat([*outgoing, incoming.reshape(layer.units, -1)], 1).double().cpu()

    return rows(reference) @ rows(weights).T


def refuse_shared(model: Classifier) -> None:
    """Raise `TargetError` if a layer occurs twice in the model, because its units cannot be reordered independently in
    both positions.
    """
    assert isinstance(model.net, nn.Module)
    visited: set[int] = set()
    for name, layer in model.net.named_modules(remove_duplicate=False):
        if [*layer.parameters(recurse=False)] and id(layer) in visited:
            raise TargetError(
                f"{name} is a layer that occurs twice, but alignment supports only sequences of separate layers; "
                "collect without alignment"
            )
        visited.add(id(layer))


def all_aligned(members: Members, model: Classifier, data: Batch, *, rng: Draws) -> Members:
    """Reorder the hidden units of every parameter set of a collection so that it is most similar to the first one, and
    return the aligned collection.

    The outputs of each set before and after are compared on at most 64 inputs of `data`, which costs two forward passes
    of them for each set. Raises `TargetError` if they differ by more than rounding: the network then does not treat its
    units independently, as its list of layers suggests.
    """
    layers, sets = hidden(model), [members.one(0)]
    sample = data.take(torch.arange(min(_LOOKED_AT, len(data))))
    for place in range(1, len(members)):
        before = members.one(place)
        sets.append(aligned(before, sets[0], layers, rng=rng))
        with torch.no_grad():
            old, new = (put(model, weights, data)(sample.x) for weights in (before, sets[-1]))
        if not torch.allclose(old, new, rtol=1e-4, atol=1e-5 * float(old.abs().max())):
            raise TargetError(
                f"aligning set {place + 1} changes its outputs by up to {float((old - new).abs().max()):.2g}, but "
                "no change was expected: the network does not apply its layers in order with independent units; "
                "collect without alignment"
            )
    return Members.of(sets, members.basins.tolist())
