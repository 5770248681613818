"""Lipschitz constants (gains) of the layers of a network, and a constraint that keeps them below a bound in training.

Gouk et al., "Regularisation of Neural Networks by Enforcing Lipschitz Continuity", Machine Learning 110, 2021,
arXiv:1804.04368: after each update the weights are projected to where the layer's gain is within a bound, in a given
norm. The gain is that of the convolution itself at the size of its input, with strides and padding, and not that of its
kernel as a matrix. Differs from the paper: under Linf, where the gain is that of one output, only outputs beyond the
bound shrink; and the power iteration under L2 continues from its state after the last update.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.core.types import Inputs

Order = Literal["linf", "l2", "l1"]
"""norm in which changes of inputs and outputs are measured"""
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
"""layers whose gain is bounded; all other layers are unchanged"""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_TINY = 1e-12  # prevents divisions by zero, for a layer whose weights are all zero


def order_of(constraint: Constraint) -> Order:
    """Return the norm in which the gains of layers are measured under a constraint. Raises `UsageError` if the
    constraint is not Linf, L2 or L1.
    """
    for kind, order in ((Linf, "linf"), (L2, "l2"), (L1, "l1")):
        if isinstance(constraint, kind):
            return order  # type: ignore[return-value]  # mypy widens the pairs to str
    raise UsageError(
        f"the gain of a layer can be computed under linf, l2 and l1; the threat model is {constraint}",
        Remedy("recipe", "pgd"),
    )


def layers(net: nn.Module, x: Inputs) -> dict[str, tuple[Layer, torch.Size]]:
    """Return the layers of a network that have a gain (Lipschitz constant), by name, each with the shape of its input
    in a forward pass.

    The network is in eval mode during the pass, so that its running statistics do not change.
    """
    training = net.training
    shapes: dict[str, tuple[Layer, torch.Size]] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, Layer)
            shapes.setdefault(name, (layer, inputs[0].shape))

        return note

    named = [(name, layer) for name, layer in net.named_modules() if _has_gain(layer)]
    hooks = [layer.register_forward_pre_hook(noting(name)) for name, layer in named]
    try:
        with torch.no_grad():
            net.eval()(x[:1])
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return shapes


def _has_gain(layer: nn.Module) -> bool:
    if isinstance(layer, _NORMS):
        return layer.affine and layer.track_running_stats
    return isinstance(layer, Layer)


def trained_layers(net: nn.Module, x: Inputs) -> dict[str, tuple[Layer, torch.Size]]:
    """Return the layers of a network that have a gain (Lipschitz constant) and whose weights are trained, by name, each
    with the shape of its input.

    Raises `UsageError` if such a weight is not a parameter of its layer: a weight that is computed at each pass, as
    with a parametrisation, would lose the changes.
    """
    confined = layers(net, x)
    for name, (layer, _) in confined.items():
        parameters = dict(layer.named_parameters())
        parameters.pop("bias", None)
        if "weight" not in parameters and any(weight.requires_grad for weight in parameters.values()):
            raise UsageError(
                f"the weight of {name} is computed from {' and '.join(parameters)} at each pass, so its gain cannot be "
                "bounded; remove the parametrisation by torch.nn.utils.parametrize.remove_parametrizations",
                Remedy("recipe", "gradient-regularisation"),
            )
    return {name: entry for name, entry in confined.items() if entry[0].weight.requires_grad}


def gain(layer: Layer, shape: torch.Size, order: Order, towards: Tensor) -> Tensor:
    """Return the gain (Lipschitz constant) of a layer: the largest change of its outputs for a change of its inputs
    with norm one, as one number or one for each output.

    Under L2 it is estimated from below by one power iteration, which updates `towards` in place to approach the
    direction with the largest gain.
    """
    with torch.no_grad():
        if isinstance(layer, _NORMS):
            assert layer.running_var is not None
            gains: Tensor = layer.weight.abs() * torch.rsqrt(layer.running_var + layer.eps)
            return gains
        weight = layer.weight.abs()
        if order == "linf":
            outputs = _applied(layer, weight, torch.ones(shape).to(weight))
            return (
                outputs.flatten(0, -2).amax(0)
                if isinstance(layer, nn.Linear)
                else outputs[0].flatten(1).amax(1)
            )
        if order == "l1":
            return _transposed(layer, weight, shape, torch.ones_like).amax()
        transposed = _transposed(
            layer, layer.weight, shape, lambda zero: _applied(layer, layer.weight, towards)
        )
        towards.copy_(transposed / transposed.norm().clamp_min(_TINY))
        largest: Tensor = _applied(layer, layer.weight, towards).norm() / towards.norm().clamp_min(_TINY)
        return largest


def _applied(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's output with another weight and no bias."""
    tensors = {"weight": weight}
    if layer.bias is not None:
        tensors["bias"] = torch.zeros_like(layer.bias)  # type: ignore[arg-type]
    output: Tensor = torch.func.functional_call(layer, tensors, (x,))
    return output


def _transposed(
    layer: nn.Module, weight: Tensor, shape: torch.Size, seed: Callable[[Tensor], Tensor]
) -> Tensor:
    """The transposed layer applied to `made(output)`."""
    # the gradient of a linear function is its transpose, for every stride and padding
    with torch.enable_grad():
        x = torch.zeros(shape).to(weight).requires_grad_()
        output = _applied(layer, weight, x)
        (transposed,) = torch.autograd.grad(output, x, seed(output.detach()))
    gradient: Tensor = transposed.detach()
    return gradient


def _random_direction(shape: torch.Size, like: Tensor, rng: Draws) -> Tensor:
    ids = torch.zeros(1, dtype=torch.int64, device=like.device)
    direction = rng.normal(ids, shape.numel(), dtype=like.dtype).view(shape)
    unit: Tensor = direction / direction.norm()
    return unit


def gain_directions(net: nn.Module, x: Inputs, order: Order, rng: Draws) -> dict[str, Tensor]:
    """Return the starting directions of the power iterations that estimate the gains of layers under L2, by layer.
    Under other norms there are none.
    """
    if order != "l2":
        return {}
    named_layers = layers(net, x).items()
    return {
        f"towards.{name}": _random_direction(shape, layer.weight, rng.at(name))
        for name, (layer, shape) in named_layers
    }


@dataclass(frozen=True)
class Confined:
    """Function that is called after each update of a training and scales down the weights of layers whose gain exceeds
    a bound.
    """

    layers: Mapping[str, tuple[Layer, torch.Size]]
    order: Order
    most: float
    state: Mapping[str, Tensor]
    """state of the power iterations, which is changed in place; see `gain_directions`"""

    def __call__(self) -> None:
        """Scale the weights whose gain exceeds the bound, and leave all others unchanged."""
        with torch.no_grad():
            for name, (layer, shape) in self.layers.items():
                towards = self.state.get(f"towards.{name}", layer.weight)
                estimate = gain(layer, shape, self.order, towards)
                factor = (self.most / estimate.clamp_min(_TINY)).clamp_max(1)
                layer.weight.mul_(
                    factor.view(-1, *[1] * (layer.weight.dim() - 1)) if factor.dim() else factor
                )
