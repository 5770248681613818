"""Lipschitz constraint: training in which the Lipschitz constant of each layer is bounded, with a penalty on the input
gradient of the loss.

Gouk et al., "Regularisation of Neural Networks by Enforcing Lipschitz Continuity", Machine Learning 110, 2021,
arXiv:1804.04368, for the constraint, which under L2 is a spectral normalisation (Miyato et al., "Spectral Normalization
for Generative Adversarial Networks", ICLR 2018, arXiv:1802.05957) that shrinks and never enlarges; Finlay & Oberman,
"Scaleable input gradient regularization for adversarial robustness", arXiv:1905.11468, for the penalty. After each
update the weights are projected to where the gain of a layer is within the bound, in a given norm. The gain is that of
the convolution itself at the size of its input, with strides and padding, and not that of its kernel as a matrix.
Differs from the papers: both are combined, eps grows at first, and under Linf, where the gain is that of one output,
only outputs beyond the bound shrink; the power iteration under L2 continues from its state after the last update. The
bound of a whole network is the product over its layers and far too loose for a certificate: see
`io/models/architectures.py` for layers that are made for one.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.gradients import rise, sloped
from holdfast.core.types import Inputs, NonNegative, Positive
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy, hits
from holdfast.recipes.training.recipe import LossRecipe

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


@dataclass(frozen=True)
class LipschitzConstraint(LossRecipe):
    """Limits the Lipschitz constant of each layer to `gain`, and adds a penalty on the loss's input gradient."""

    gain: Positive = 10.0
    """largest Lipschitz constant (gain) of each layer; under L2 as estimated by power iteration"""
    norm: Literal["threat", "l2"] = "threat"
    """norm in which the gain is measured: that of the threat, or `l2`, which is spectral normalisation with another
    bound"""
    weight: NonNegative = 6.0
    """weight of the first-order increase of the loss in a step of length eps; with 0 only the constraint remains"""
    training: Training = field(default_factory=lambda: Training(weight_decay=5e-4))

    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the power iterations that estimate the gains of layers."""
        order = order_of(loop.threat.constraint) if self.norm == "threat" else "l2"
        x = loop.data.first(1).x

        def confined(learner: Learner) -> Confined:
            return Confined(trained_layers(learner.net, x), order, self.gain, learner.state)

        # a copy, because a recipe must not change the mode of the given model
        directions = gain_directions(deepcopy(loop.model).eval(), x, order, loop.rng.at("gain"))
        return replace(loop, state=directions, settle=confined, differentiated_twice=self.weight > 0)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus its
        weighted first-order increase in a step of length eps.
        """
        if not self.weight:
            return adversarial_cross_entropy(learner, batch, x_adv)
        x, logits, losses = sloped(learner.net, x_adv, batch.y)
        slope = rise(losses, x, learner.threat.constraint, learner.net.bounds)
        return learner.mean(losses, batch.y) + self.weight * learner.mean(slope, batch.y), hits(
            logits, batch.y
        )
