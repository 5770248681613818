"""Networks of 8-bit integers: linear and convolutional layers whose weights and inputs have 256 values.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877. Weights are symmetric with a scale for each output channel, inputs have one scale and zero point for
each layer, and their range was measured on training examples. Differs from the paper: products are computed in floating
point with the dequantised values, and batch norm is not folded into the layers.

The gradient of rounding is zero everywhere. A layer therefore passes the gradient of its output to its input as if
nothing was rounded (straight-through estimator: Bengio et al. 2013, arXiv:1308.3432), so that every attack on the model
is an adaptive one. `naive_gradients` restores the true gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.through import instead
from holdfast.core.types import Inputs

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LARGEST = 127  # of a weight, whose range is symmetric
_STEPS = 255  # between the lowest and the highest input


class Int8Layer(nn.Module):
    """Linear or convolutional layer whose weights and inputs are rounded to 8 bits.

    With `trained`, `weight` is a parameter in floating point, which is rounded in each pass; otherwise it has 8-bit
    integers, and `scale` (out, 1, …) has the size of one of their steps. Inputs are rounded to whole multiples of
    `step`, from `lowest` to `lowest` + 255 times `step`.
    """

    weight: Tensor
    scale: Tensor
    step: Tensor
    lowest: Tensor

    def __init__(self, layer: nn.Module, *, trained: bool = False) -> None:
        super().__init__()
        assert isinstance(layer, LAYERS)
        weight, self.bias = layer.weight.detach(), layer.bias
        self.is_trained, self.straight_through = trained, True
        if trained:
            self.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
        else:
            self.weight = nn.Parameter(torch.zeros_like(weight, dtype=torch.int8), requires_grad=False)
            self.register_buffer("scale", weight.new_ones(len(weight), *[1] * (weight.dim() - 1)))
        self.register_buffer("step", weight.new_ones(()))
        self.register_buffer("lowest", weight.new_zeros(()))
        shape = deepcopy(layer)
        shape.weight = shape.bias = None  # type: ignore[assignment]
        self._shape = (
            shape,
        )  # in a tuple, so that it is no module of the network: only its settings are used

    def extra_repr(self) -> str:
        """Return the settings of the original layer."""
        return repr(self._shape[0])

    def forward(self, x: Inputs) -> Tensor:
        """Return the output of the layer for its rounded inputs."""
        values = (x / self.step).round().clamp(self.lowest, self.lowest + _STEPS) * self.step
        # without gradients, the rounding is recorded for bounds, which refuse it
        x = instead(values, x) if self.straight_through and torch.is_grad_enabled() else values
        if self.is_trained:
            weight = instead(torch.mul(*rounded(self.weight)), self.weight)
        else:
            weight = self.weight.to(x.dtype) * self.scale
        (layer,) = self._shape
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        output: Tensor = layer._conv_forward(x, weight, self.bias)
        return output


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of a layer as whole numbers from -127 to 127, in floating point, and the scale (out, 1, …) of
    each output channel.
    """
    scale = weight.detach().abs().amax(tuple(range(1, weight.dim())), keepdim=True) / _LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.detach() / scale).round(), scale


def layers_of(net: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers of a network that can be rounded. Subclasses and layers whose weights are computed
    from others are left out.

    Raises `UsageError` if there are none.
    """
    names = tuple(
        name
        for name, layer in net.named_modules(remove_duplicate=False)
        if type(layer) in LAYERS and layer._parameters.get("weight") is not None
    )
    if not names:
        raise UsageError(
            f"int8 rounds layers of torch.nn ({', '.join(kind.__name__ for kind in LAYERS)}), and "
            f"{type(net).__name__} has none; give a network that is built of them, as in net.py:make"
        )
    return names


def with_int8(net: nn.Module, names: Sequence[str], *, trained: bool = False) -> nn.Module:
    """Return a network whose layers with these names are rounded to 8 bits. Other layers are those of `net`, which is
    changed in place. Raises `TargetError` for a name of another module.
    """
    modules, replaced = dict(net.named_modules(remove_duplicate=False)), dict[nn.Module, Int8Layer]()
    for name in names:
        layer = modules.get(name)
        if type(layer) not in LAYERS:
            raise TargetError(
                f"{name!r} is rounded to 8 bits in the file of the model, and it is no linear or convolutional layer "
                "of its architecture; give the architecture with which it was trained"
            )
        assert layer is not None
        new = replaced.setdefault(layer, Int8Layer(layer, trained=trained))
        if not name:
            return new
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, new)
    return net


def int8_layers(net: object) -> dict[str, Int8Layer]:
    """Return the layers of a network that are rounded to 8 bits, by name; none for other models."""
    modules = net.named_modules(remove_duplicate=False) if isinstance(net, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, Int8Layer)}


def note_of(net: nn.Module) -> str:
    """Return a note for the report on the layers of a network that are rounded to 8 bits."""
    return (
        f"{len(int8_layers(net))} layers have weights and inputs of 8 bits; attacks pass their gradient through the "
        "rounding (straight-through estimator)"
    )


@torch.no_grad()
def set_ranges(layers: Mapping[str, Int8Layer], model: Classifier, inputs: Sequence[Inputs]) -> None:
    """Set the ranges of the inputs of `layers` to those that the layers of the same names in the network of `model`,
    which is not rounded, receive when it is called with each of `inputs`.
    """
    assert isinstance(model.net, nn.Module)
    ranges: dict[str, list[float]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, received: tuple[Tensor, ...]) -> None:
            low, high = received[0].aminmax()
            ranges[name] = [*ranges.get(name, [0.0]), float(low), float(high)]

        return hook

    hooks = [model.net.get_submodule(name).register_forward_pre_hook(observe(name)) for name in layers]
    try:
        for x in inputs:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        low, high = min(ranges.get(name, [0.0])), max(ranges.get(name, [0.0]))
        step = (high - low) / _STEPS or 1.0  # 1 for a layer that is not called, or only with zeros
        layer.step.fill_(step)
        layer.lowest.fill_(round(low / step))


@contextmanager
def naive_gradients(net: nn.Module) -> Iterator[None]:
    """Context manager inside which the layers of a network have their true gradient, which is zero: attacks by gradient
    then find nothing, and the robust accuracy is an overestimate.
    """
    layers = int8_layers(net).values()
    for layer in layers:
        layer.straight_through = False
    try:
        yield
    finally:
        for layer in layers:
            layer.straight_through = True


def packed(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of a network with 8-bit integers from those of the same network in training. `names` are the
    layers, as in the names of the tensors.
    """
    result = dict(tensors)
    for name in names:
        whole, result[f"{name}.scale"] = rounded(tensors[f"{name}.weight"])
        result[f"{name}.weight"] = whole.to(torch.int8)
    return result
