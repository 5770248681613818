"""Certificates from Lipschitz constants, for threats in Euclidean distance.

If the logits of a network have the Lipschitz constant L, the difference of two logits has at most sqrt(2) L, so that no
input within margin / (sqrt(2) L) is misclassified (Tsuzuku, Sato & Sugiyama, "Lipschitz-Margin Training: Scalable
Certification of Perturbation Invariance for Deep Neural Networks", NeurIPS 2018, arXiv:1802.04034). L is bounded by the
product over the layers of proved upper bounds of their gains (`certifiers/bounds/spectral.py`). If the last operation
is linear, the difference of its two rows replaces sqrt(2) times its gain, as in the same paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.closest import leeway
from holdfast.certifiers.bounds.graph import Graph, Node
from holdfast.certifiers.bounds.linear import Convolution, Dense, Nonnegative, Scaled, Sum
from holdfast.certifiers.bounds.nonlinear import MaxPool, Piecewise, ReLU, Smooth
from holdfast.certifiers.bounds.opaque import Contraction, traced_by_layers
from holdfast.certifiers.bounds.region import region_of
from holdfast.certifiers.bounds.spectral import UP, convolution_bound, spectral_bound
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.certifiers.provers import margin_rows
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.types import PerExample

_AT_ONCE = 64
"""number of examples whose logits are bounded together"""
_SMALL = 1e10
"""largest number of multiplications for the matrix of a convolution at the size of its input, about two seconds"""
_STEEPEST = {
    torch.tanh: 1.0,
    torch.sigmoid: 0.25,
    F.softplus: 1.0,
    F.gelu: 1.13,
    F.silu: 1.1,
}
"""bounds of the slopes of smooth activations: GELU has 1.1290, its form with tanh 1.1294, SiLU 1.0998"""


@dataclass(frozen=True)
class Gain:
    """Proved upper bound of the gain of one operation of a network."""

    operation: str
    """kind of the operation, such as `convolution`"""
    gain: float
    """bound of the Lipschitz constant of the operation"""
    place: str
    """place in the user's code"""


@dataclass(frozen=True, eq=False)
class LipschitzBounds:
    """Proved upper bounds of the Lipschitz constants of a network, in Euclidean distance of its inputs."""

    gains: tuple[Gain, ...]
    """bounds of the operations that change distances"""
    logits: float
    """bound for the vector of all logits"""
    margins: Tensor
    """bounds for the differences of two logits, (classes, classes) float64"""


@torch.no_grad()
def lipschitz_bounds(graph: Graph) -> LipschitzBounds:
    """Return proved upper bounds of the Lipschitz constants of a network.

    Raises `UsageError` for an operation whose gain is not known, with its place in the user's code.
    """
    constants, gains = [1.0], []
    for node in graph.nodes:
        before = [constants[i] for i in node.inputs]
        gain = gain_of(node, [graph.shape_of(i) for i in node.inputs])
        constants.append(_composed(node, gain, before, graph))
        if gain != 1.0 or isinstance(node.operation, Contraction | Dense | Convolution):
            gains.append(Gain(type(node.operation).__name__.lower(), gain, node.place))
    classes = graph.shape_of(graph.output)[0]
    margins = torch.full((classes, classes), math.sqrt(2) * constants[-1] * UP, dtype=torch.float64)
    last = graph.node(graph.output)
    if isinstance(last.operation, Dense) and len(graph.shape_of(graph.output)) == 1:
        weight = last.operation.weight.detach().cpu().double()
        rows = torch.stack([(weight - row).norm(dim=1) for row in weight])
        margins = torch.minimum(margins, rows * constants[last.inputs[0]] * UP)
    return LipschitzBounds(tuple(gains), constants[-1], margins)


def _composed(node: Node, gain: float, before: Sequence[float], graph: Graph) -> float:
    """Lipschitz constant of a value, from the gain of its operation and the constants of its inputs."""
    operation = node.operation
    if isinstance(operation, Sum):
        copies = [_copies(graph.shape_of(i), node.shape) for i in node.inputs]
        return (before[0] * copies[0] + abs(operation.factor) * before[1] * copies[1]) * UP
    return gain * math.hypot(*before) * UP


def gain_of(node: Node, shapes: Sequence[torch.Size]) -> float:
    """Return a proved upper bound of the gain of an operation as a function of all of its inputs, which have the given
    shapes for one example.
    """
    operation = node.operation
    match operation:
        case Dense():
            return spectral_bound(operation.weight)
        case Convolution():
            return _convolution_gain(operation, shapes[0], node.shape)
        case Scaled():
            scale = 1.0 if operation.scale is None else float(operation.scale.abs().double().amax())
            return scale * _copies(shapes[0], node.shape)
        case Sum():
            return math.hypot(1.0, operation.factor) * UP
        case Nonnegative():
            return _nonnegative_gain(operation, shapes, node.shape)
        case MaxPool():
            return _pool_gain(operation, shapes[0])
        case Contraction():
            return operation.gain
        case ReLU():
            return 1.0
        case Piecewise():
            return max(abs(slope) for slope in operation.slopes)
        case Smooth():
            function = getattr(operation.function, "func", operation.function)
            if function in _STEEPEST:
                return _STEEPEST[function]
    where = f", at {node.place}" if node.place else ""
    raise UsageError(
        f"no bound of the Lipschitz constant of {type(operation).__name__} is known{where}",
        Remedy("method", "crown"),
    )


def _copies(shape: torch.Size, out: torch.Size) -> float:
    """The gain of broadcasting: the root of the number of copies of each value."""
    return 1.0 if shape == out else math.sqrt(out.numel() / shape.numel()) * UP


def _convolution_gain(operation: Convolution, shape: torch.Size, out: torch.Size) -> float:
    bound = convolution_bound(operation.weight, operation.stride, operation.dilation, operation.groups)
    n, m = shape.numel(), out.numel()
    if n * m * (operation.weight[0].numel() + min(n, m)) > _SMALL:
        return bound
    unit = torch.eye(n, dtype=torch.float64).view(n, *shape)
    linear = replace(operation, weight=operation.weight.detach().cpu().double(), bias=None)
    return min(bound, spectral_bound(linear(unit).flatten(1)))


def _nonnegative_gain(operation: Nonnegative, shapes: Sequence[torch.Size], out: torch.Size) -> float:
    """The root of the product of the largest row sum and the largest column sum (Schur test); exact for operations that
    move, average or omit values.
    """
    rows = operation(*(torch.ones(1, *shape, dtype=torch.float64) for shape in shapes))
    columns = operation.transposed(torch.ones(1, 1, *out, dtype=torch.float64), shapes)
    product = float(rows.amax()) * max(float(each.amax()) for each in columns)
    # operations that move values are exact
    return 1.0 if product == 1.0 else math.sqrt(max(product, 0.0)) * UP


def _pool_gain(operation: MaxPool, shape: torch.Size) -> float:
    """The root of the largest number of windows that contain one value."""
    zeros = torch.zeros(1, *shape)
    pull = torch.func.vjp(operation.windows, zeros)[1]
    (counts,) = pull(torch.ones(1, *operation.padding.shape))
    return math.sqrt(float(counts.amax()))


@dataclass(frozen=True)
class Lipschitz:
    """Certifies examples whose margin exceeds what the Lipschitz constant of the network allows within eps.

    Tsuzuku, Sato & Sugiyama, NeurIPS 2018, arXiv:1802.04034. It is for networks whose layers have small gains, such as
    those of `--recipe margin` and `--recipe lipschitz`, under L2.
    """

    name: ClassVar[str] = "lipschitz"

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> ReadyProver:
        """Trace the model and bound the gains of its layers. Raises `UsageError` for a threat that is not L2."""
        if not isinstance(threat.constraint, L2):
            raise UsageError(
                f"the method lipschitz is for threats in Euclidean distance; the threat model is {threat.constraint}",
                Remedy("method", "crown"),
                Remedy("threat", threat.with_change("l2:0.5")),
            )
        return PreparedLipschitz.of(model, sample, threat)


@dataclass(frozen=True, eq=False)
class PreparedLipschitz:
    """The method with the bounds of one network."""

    model: Classifier
    graph: Graph
    """the network in float64"""
    bounds: LipschitzBounds
    threat: ThreatModel

    @staticmethod
    def of(model: Classifier, sample: Batch, threat: ThreatModel) -> "PreparedLipschitz":
        """Prepare the method for a network, by tracing it on `sample`."""
        graph = traced_by_layers(model, sample.x)
        return PreparedLipschitz(model, graph.to(torch.float64), lipschitz_bounds(graph), threat)

    def __call__(self, batch: Batch) -> Proofs:
        """Return for each example whether its margin exceeds the change that is possible within eps."""
        none = Proofs.none(batch)
        if not len(batch):
            return none
        radius = region_of(batch.x[:1], self.threat.constraint, self.model.bounds).radius
        bound = (self._margins(batch) - radius * self._constants(batch) * UP).amin(1)
        bound = bound.nan_to_num(nan=-torch.inf)
        return replace(none, certified=bound > 0, bound=bound, work=torch.ones_like(none.work))

    def radii(self, batch: Batch) -> PerExample:
        """Return the certified Euclidean radius of each example in float64, rounded down: 0 if it is not classified
        correctly.
        """
        constants = self._constants(batch)
        radii = (self._margins(batch) / constants / UP).amin(1)
        return radii.nan_to_num(nan=0.0).clamp_min(0)

    def _constants(self, batch: Batch) -> Tensor:
        """Lipschitz constants (n, classes - 1) of the margins over each other class."""
        rows = self.bounds.margins.to(batch.x.device)[batch.y]
        others = torch.ones_like(rows, dtype=torch.bool).scatter_(1, batch.y[:, None], False)
        return rows[others].view(len(batch), -1)

    def _margins(self, batch: Batch) -> Tensor:
        """Lower bounds (n, classes - 1) of the margins of the clean inputs over each other class.

        They are bounds of the exact values in float64, reduced by the rounding errors that the model itself may make.
        Rounding errors of layers that are recorded as one operation are only covered by that reduction.
        """
        opaque = any(isinstance(node.operation, Contraction) for node in self.graph.nodes)
        parts = []
        with torch.no_grad():
            for part in batch.split(_AT_ONCE):
                x = part.x.double()
                logits = self.graph(x)
                low, high = (logits, logits) if opaque else self.graph.intervals((x, x))[-1]
                rows = margin_rows(part.y, low.shape[1], torch.float64)
                negative = rows.clamp(max=0)
                lower = ((rows - negative) @ low[:, :, None] + negative @ high[:, :, None])[:, :, 0]
                parts.append(lower - 2 * leeway(logits.to(part.x.dtype)).double()[:, None])
        return torch.cat(parts)
