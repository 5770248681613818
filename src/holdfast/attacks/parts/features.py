"""Search for the tensors inside a model at which its gradient ends, for attacks on these features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import HoldfastError
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Model, out_of_memory
from holdfast.core.relaxed import Relaxation, relaxed
from holdfast.core.types import Inputs, Logits

_LOOKED_AT = 8
"""number of examples on which a model is inspected"""
_LARGEST = 20_000
"""largest number of features of one example that are attacked; more are slow to compare"""


@dataclass(frozen=True)
class Features:
    """Places in a model whose values an attack can change on purpose, and how gradients reach them."""

    cross: bool
    """whether gradients pass through `detach` and `no_grad`"""
    relaxed: bool
    """whether a gradient reaches the logits through relaxed operations"""
    places: tuple[tuple[int, ...], ...]
    """positions of the tensors of each place in the record of a forward pass, counted from its end: a model that treats
    the examples one by one before it decides records more of them for a larger batch"""
    widths: tuple[int, ...]
    """number of features of each place"""
    chooses: bool
    """whether the model chooses among outcomes without a gradient, such as the entries of a codebook"""

    def forward(self, model: Model, batch: Batch, x: Inputs) -> tuple[Logits, list[Tensor]]:
        """Return the logits of `x` and the features (n, k) of each place, with gradients with respect to `x`.

        The features of a place that this forward pass does not have are zeros.
        """
        with torch.enable_grad(), relaxed(cross=self.cross) as record:
            logits = model(x, batch.ids)
        pairs = zip(self.places, self.widths, strict=True)
        return logits, [_joined(record, place, width, x) for place, width in pairs]


def features_of(model: Model, batch: Batch) -> Features | None:
    """Return the places of a model before the operations that have no useful gradient, or None if it has none.

    The places are the tensors that enter the last such operation (all that have the same shape, as of several votes),
    and the last output of a module before it. Cost: one to three forwards and backwards of at most 8 examples.
    """
    looked = batch.first(_LOOKED_AT)
    if not len(looked):
        return None
    for cross in (True, False):
        try:
            found = _inspected(model, looked, cross=cross)
        except (HoldfastError, RuntimeError) as error:
            if not _by_relaxation(error):
                raise
        else:
            return found
    return None


def _by_relaxation(error: Exception) -> bool:
    """Whether an error of a model may come from gradients that it does not expect, as in a second backward pass."""
    cause = error.__cause__ if isinstance(error, HoldfastError) else error
    return isinstance(cause, (RuntimeError, TypeError)) and not out_of_memory(cause)


def _inspected(model: Model, batch: Batch, *, cross: bool) -> Features | None:
    leaf = batch.x.detach().requires_grad_()
    with torch.enable_grad(), relaxed(cross=cross) as record:
        logits = model(leaf, batch.ids)
    reaches = logits.requires_grad
    if reaches:
        highest = logits.amax(1)
        gradient = input_gradient(highest, leaf)  # an error of the backward pass is raised here
        if not record.passed and gradient.flatten(1).any(1).double().mean() > 0.5:
            return None  # what is cut beside the way of a gradient is usually no defence
    if not record.passed and not record.cuts:
        return None
    places = tuple(place for place in _places(record, len(batch)) if place)
    relaxes = record.passed > 0 and reaches
    if not places and not relaxes:
        return None
    widths = tuple(sum(record.recorded[k][0].numel() for k in place) for place in places)
    end = len(record.recorded)
    relative = tuple(tuple(k - end for k in place) for place in places)
    return Features(cross, relaxes, relative, widths, record.choices > 0)


def _places(record: Relaxation, n: int) -> tuple[tuple[int, ...], ...]:
    usable = [
        k for k, values in enumerate(record.recorded)
        if values.dim() > 1 and len(values) == n and values[0].numel() <= _LARGEST
    ]  # fmt: skip
    cuts = [k for k in record.cuts if k in set(usable)]
    if not cuts:
        return ()
    last = record.recorded[cuts[-1]]
    alike = [k for k in cuts if record.recorded[k].shape == last.shape]
    group = tuple(alike[-(_LARGEST // last[0].numel()) :])
    before = [
        k for k in usable if k < group[0] and record.recorded[k].shape != last.shape and k not in set(cuts)
    ]
    return group, tuple(before[-1:])


def _joined(record: Relaxation, place: tuple[int, ...], width: int, x: Inputs) -> Tensor:
    parts = [record.recorded[k] for k in place if k >= -len(record.recorded)]
    if all(part.dim() and len(part) == len(x) and part.is_floating_point() for part in parts):
        joined = [part.flatten(1).to(x.dtype) for part in parts if part.dim() > 1]
        if sum(part.shape[1] for part in joined) == width:
            return torch.cat(joined, dim=1)
    return x.new_zeros(len(x), width)
