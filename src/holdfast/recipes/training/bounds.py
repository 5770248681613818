"""Interval bounds of a network in training, as differentiable functions of its weights, and the initialisation and the
regularisation that such a training needs.

Bounds: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
arXiv:1810.12715. Initialisation and regularisation: Shi et al., "Fast Certified Robust Training with Short Warmup",
NeurIPS 2021, arXiv:2103.17268.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.operations import Activation, Interval, Linear
from holdfast.certifiers.bounds.tracing import Recording, recording
from holdfast.certifiers.objectives import margin_rows
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import NoBounds, Remedy, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, PerExample
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import GROWN, Learner, Loop

TAU = 0.5
"""tau of Shi et al.: the ratios below which the regularisation is positive"""
Initialisation = Literal["given", "ibp"]
"""weights with which a training starts: those of the given model, or random ones"""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def live_graph(sample: Inputs) -> Callable[[Classifier], Graph]:
    """Return a function from a network in training to its graph with the present weights, through which gradients pass.

    The operations are those of evaluation mode, so that batch norm uses its running statistics. They are recorded once,
    at the first call, on the inputs `sample`. Raises the errors of `traced`.
    """

    @cache
    def recorded(net: Classifier) -> Recording:
        net.eval()
        try:
            # with automatic precision, conversions of data types would be recorded
            with torch.autocast(sample.device.type, enabled=False):
                return recording(net, sample)
        except NoBounds as error:
            raise NoBounds(error.message, Remedy("recipe", "pgd")) from error
        finally:
            net.train()

    return lambda net: recorded(net).graph()


def refuse_without_bounds(threat: ThreatModel, training: Training) -> None:
    """Raise `UsageError` for settings with which the bounds of a network in training cannot be computed."""
    constraint = threat.constraint
    if not isinstance(constraint, Linf):
        raise UsageError(
            f"certified training bounds a network over boxes, which are the balls of linf, and the threat is "
            f"{constraint.name}; under l2, a network with a certificate by its layers, such as lipschitz-aol, is "
            "trained with the recipe margin",
            Remedy("threat", threat.with_change("linf:0.1")),
        )
    if training.compiled:
        raise UsageError(
            "compiled is true, and certified training computes bounds from the single operations of the network, which "
            "a compiled network does not have; leave recipe.training.compiled out"
        )


def box(x: Inputs, radius: float, bounds: Bounds) -> Interval:
    """Return the smallest and largest valid inputs that differ from `x` by at most `radius` in each value."""
    return bounds.clamp(x - radius), bounds.clamp(x + radius)


@dataclass(frozen=True)
class BoundedLoss:
    """The loss of a certified training: the weighted mean of the cross-entropy on clean inputs and of its upper bound
    over a box around each example, plus the regularisation.
    """

    graph_of: Callable[[Classifier], Graph]
    """function from the network in training to its graph, as `live_graph` returns it"""
    clean: float
    """weight of the loss on clean inputs after the warm-up, during which it falls from 1"""
    regularisation: float
    """weight of the regularisation at the start of the warm-up, during which it falls to 0"""
    overshoot: float
    """as in `Training`"""

    def __call__(
        self, learner: Learner, batch: Batch, centre: Inputs, radius: float
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch over boxes with the given centres (n, *features) and radius, and the number
        of examples that the bounds prove to be classified correctly in their boxes.
        """
        warm = warmed(learner, self.overshoot)
        graph = self.graph_of(learner.net)
        bounds = graph.intervals(box(centre, radius, learner.net.bounds), rounded=False)
        margins = margin_bounds(graph, bounds, batch.y)
        clean = 1 - (1 - self.clean) * warm
        # a pass without a weight still updates the statistics of batch norm
        with torch.set_grad_enabled(clean > 0):
            logits = learner.net(batch.x)
        loss = clean * learner.mean_cross_entropy(logits, batch.y) + (1 - clean) * learner.mean(
            robust_cross_entropy(margins), batch.y
        )
        if self.regularisation and warm < 1:
            loss = loss + self.regularisation * (1 - warm) * regularisation(graph, bounds)
        return loss, (margins > 0).all(1).sum()


def with_bounds(
    loop: Loop,
    initialisation: Initialisation,
    loss: Callable[[BoundedLoss, Learner, Batch, Inputs], tuple[Tensor, Tensor]],
    clean: float,
    regularisation: float,
) -> Loop:
    """Return a certified training, whose `loss` gets the bounds of the network. Raises `UsageError` for settings with
    which bounds cannot be computed.
    """
    refuse_without_bounds(loop.threat, loop.how)
    start = initialised(loop.model, initialisation, loop.rng)
    bounded = BoundedLoss(live_graph(loop.data.first(8).x), clean, regularisation, loop.how.overshoot)
    return replace(loop, model=start, loss=partial(loss, bounded))


def warmed(learner: Learner, overshoot: float) -> float:
    """Return the completed fraction of the warm-up, during which eps grows to `overshoot` times its value."""
    return min(float(learner.state[GROWN]) / overshoot, 1.0)


def margin_bounds(graph: Graph, bounds: Sequence[Interval], y: Labels) -> Tensor:
    """Return lower bounds (n, classes - 1) of the margins of the labels over each other class, from the bounds of all
    values of the network. Gradients pass through them, and rounding errors are ignored.

    The margins are linear functions of the last hidden layer, whose bounds are used: those of the logits would treat
    the logits as independent.
    """
    rows = margin_rows(y, graph.shape_of(graph.output)[0], bounds[0][0].dtype)
    constant, index = torch.zeros_like(rows[:, :, 0]), graph.output
    while index:
        node = graph.node(index)
        if not isinstance(node.operation, Linear) or len(node.inputs) != 1:
            break
        if (offset := node.operation.constants(rows)) is not None:
            constant = constant + offset
        (rows,) = node.operation.transposed(rows, [graph.shape_of(node.inputs[0])])
        index = node.inputs[0]
    low, high = (each.flatten(1)[:, :, None] for each in bounds[index])
    rows = rows.flatten(2)
    return (rows @ ((high + low) / 2) - rows.abs() @ ((high - low) / 2))[:, :, 0] + constant


def robust_cross_entropy(margins: Tensor) -> PerExample:
    """Return upper bounds of the cross-entropy of each example from lower bounds (n, classes - 1) of its margins."""
    return F.pad(-margins, (1, 0)).logsumexp(1)


def regularisation(graph: Graph, bounds: Sequence[Interval]) -> Tensor:
    """Return the regularisation of Shi et al. for the bounds of all values of a network, as the mean over activations.

    One term is positive if the bounds of the input of an activation are wider than 1 / tau times those of the input of
    the network. The other two are positive if the inputs that are always positive and those that are always negative
    differ, in the sum of their magnitudes or in their variance, by more than the factor 1 / tau.
    """
    inputs = [bounds[node.inputs[0]] for node in graph.nodes if isinstance(node.operation, Activation)]
    first, terms = _width(bounds[0]), [torch.zeros((), dtype=bounds[0][0].dtype, device=bounds[0][0].device)]
    for low, high in inputs:
        middle = (low + high) / 2
        deviations = (middle - middle.mean()).square()
        active, inactive = low > 0, high < 0
        terms += [
            F.relu(TAU - first / _width((low, high))),
            F.relu(TAU - _balance((middle * active).sum(), -(middle * inactive).sum())),
            F.relu(TAU - _balance((deviations * active).sum(), (deviations * inactive).sum())),
        ]
    return torch.stack(terms).sum() / (TAU * max(len(inputs), 1))


def _width(x: Interval) -> Tensor:
    return (x[1] - x[0]).mean().clamp(min=torch.finfo(x[0].dtype).tiny)


def _balance(first: Tensor, second: Tensor) -> Tensor:
    """Smaller one of two nonnegative numbers divided by the larger one."""
    larger = torch.maximum(first, second).clamp(min=torch.finfo(first.dtype).tiny)
    return torch.minimum(first, second) / larger


def initialised(model: Classifier, how: Initialisation, rng: Draws) -> Classifier:
    """Return a copy of a model, with its own weights (`given`), or with those of the IBP initialisation of Shi et al.

    There the weights of a linear or convolutional layer with n inputs for each output are normal with the standard
    deviation sqrt(2 pi) / n, so that bounds do not grow from layer to layer in a network of any depth. Biases become
    zero. The values themselves shrink from layer to layer, which batch norm compensates: a network without it may not
    learn from these weights.
    """
    copied = deepcopy(model)
    for name, layer in copied.named_modules() if how == "ibp" else ():
        if isinstance(layer, _LAYERS):
            rows = torch.arange(len(layer.weight), device=layer.weight.device)
            draws = rng.at("initial weights", name).normal(
                rows, *layer.weight.shape[1:], dtype=layer.weight.dtype
            )
            with torch.no_grad():
                layer.weight.copy_(math.sqrt(2 * math.pi) / layer.weight[0].numel() * draws)
                if layer.bias is not None:
                    layer.bias.zero_()
    return copied
