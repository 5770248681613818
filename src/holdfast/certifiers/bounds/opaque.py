"""Layers as single operations of a graph, because their Lipschitz constant does not follow from their operations.

A residual layer that subtracts what it adds (SLL), a pair of maximum and minimum (MaxMin) and a convolution that is
computed by Fourier transforms (Cayley) have a Lipschitz constant of one, but the product over their operations is
larger or not defined. While a model is traced, they are recorded as one operation each, with a gain that is proved
from their weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from holdfast.certifiers.bounds.graph import Graph, gamma
from holdfast.certifiers.bounds.linear import Interval
from holdfast.certifiers.bounds.nonlinear import Activation
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.bounds.spectral import UP, spectral_bound
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.bounds.translation import TracedValue, Translator
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs
from holdfast.io.models.lipschitz_layers import CayleyConv2d, MaxMin, SLLConv2d, overlaps

_LAYERS = (CayleyConv2d, MaxMin, SLLConv2d)
_ROUNDING = 1e-9
"""relative rounding error of the outputs of a layer in float64, which is assumed"""

_traced_layers: list[nn.Module] = []
"""layers of the model that is being traced; an operation of torch has only tensors and numbers as its arguments"""


@torch.library.custom_op("holdfast::layer", mutates_args=())
def _layer(x: Tensor, place: int) -> Tensor:
    y: Tensor = _traced_layers[place](x)
    return y.clone()


@_layer.register_fake
def _(x: Tensor, place: int) -> Tensor:
    """Return a tensor without values in the shape of the outputs, from the shape of the inputs."""
    layer = _traced_layers[place]
    with unset_fake_temporarily():
        shape = layer(torch.zeros(x.shape, dtype=x.dtype)).shape
    return x.new_empty(shape)


@dataclass(frozen=True, eq=False)
class Contraction(Activation):
    """A layer of a network with a known gain, as one operation that acts on whole tensors."""

    module: nn.Module
    """the layer in float64"""
    gain: float
    """proved upper bound of its Lipschitz constant in Euclidean distance"""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer."""
        y: Tensor = self.module(x.double()).to(x.dtype)
        return y

    def interval(self, x: Interval) -> Interval:
        """Return bounds of the outputs from the output for the centre, the gain and the Euclidean radius."""
        low, high = x
        y = self((low + high) / 2)
        radius = self.gain * ((high - low) / 2).flatten(1).norm(dim=1) * UP
        radius = radius + _ROUNDING * (1 + y.flatten(1).abs().amax(1))
        spread = radius.view(-1, *(1,) * (y.dim() - 1))
        return y - spread, y + spread

    def offsets(self, slope: Tensor, x: Interval) -> Interval:
        """Return bounds of f(x) - slope * x, from those of both terms."""
        smallest, largest = self.interval(x)
        first, second = slope * x[0], slope * x[1]
        return smallest - torch.maximum(first, second), largest - torch.minimum(first, second)

    def candidates(self, x: Interval) -> tuple[Tensor, ...]:
        """Return the slope 0."""
        return (torch.zeros_like(self.interval(x)[0]),)


class _Recorded(nn.Module):
    """A layer that is recorded as one operation."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer."""
        y: Tensor = _layer(x, self.place)
        return y


def traced_by_layers(model: Classifier, sample: Inputs) -> Graph:
    """Return the graph of a classifier in evaluation mode, with layers of known gain as single operations.

    Raises `UsageError` as `holdfast.certifiers.bounds.tracing.traced` does.
    """
    if not any(isinstance(layer, _LAYERS) for layer in model.modules()):
        return traced(model, sample)
    with _recording(model) as recorded:
        return traced(recorded, sample)


@contextmanager
def _recording(model: Classifier) -> Iterator[Classifier]:
    copy = deepcopy(model)
    layers: list[nn.Module] = []
    for parent in list(copy.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, _LAYERS):
                setattr(parent, name, _Recorded(len(layers)))
                layers.append(layer)
    _traced_layers[:] = layers
    try:
        yield copy
    finally:
        _traced_layers.clear()


def _translated(to: Translator, x: TracedValue, place: TracedValue) -> TracedValue:
    layer = _traced_layers[place.constant]
    gain = _gain(layer, to.shape_of(x))
    return to.add(Contraction(deepcopy(layer).double(), gain), x)


TRANSLATIONS["holdfast.layer"] = _translated


def _gain(layer: nn.Module, shape: torch.Size) -> float:
    with torch.no_grad():
        if isinstance(layer, SLLConv2d):
            return _residual_gain(layer)
        if isinstance(layer, CayleyConv2d):
            kernel = layer.weight.shape[2]
            small = min(shape[1:]) < kernel
            size = torch.Size(side + kernel - 1 for side in shape[1:]) if small else shape[1:]
            # as stored while the model runs
            stored = torch.complex64 if layer.weight.dtype == torch.float32 else torch.complex128
            return spectral_bound(layer.matrices(size).to(stored).to(torch.complex128))
    return 1.0  # maxima and minima of pairs: a permutation of the inputs on each piece


def _residual_gain(layer: SLLConv2d) -> float:
    """Bound of the gain of an SLL layer, with the divisors as they are computed.

    With divisors T for which T - W W^T is positive semi-definite the gain is one. If rounding made them too small by a
    factor 1 / r, the layer is r times such a layer plus (1 - r) times the identity.
    """
    kernel = layer.weight.detach().cpu().double()
    q = layer.ratios.detach().cpu().double()
    sizes = kernel.abs().flatten(1).sum(1)
    rounding = gamma(kernel[0].numel() + 4, torch.float64) * sizes[:, None] * sizes[None]
    needed = (overlaps(kernel) + rounding) @ q / q
    ratio = float((needed / layer.heights().detach().cpu().double()).amax()) * UP
    return max(1.0, 2 * ratio - 1)
