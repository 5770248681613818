"""Certificates from Lipschitz constants of layers and networks, for threats in Euclidean distance."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from holdfast.attacks.parts.losses import leeway
from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.graph import Graph, Node, gamma, region_of
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.bounds.translator import TracedValue, Translator
from holdfast.certifiers.objectives import margin_rows
from holdfast.certifiers.protocol import Proofs, ReadyProver
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, PerExample
from holdfast.io.models.architectures import CayleyConv2d, MaxMin, SLLConv2d, overlaps

UP = 1 + 1e-12
"""factor that covers the rounding errors of sums, products and roots of a few thousand nonnegative numbers"""
_STEPS = 40
"""number of steps of power iterations, which only propose a bound"""
_SLACKS = (1e-6, 1e-4, 1e-3, 1e-2, 0.1)
"""relative distances of the bounds that are tried from the square of the proposed singular value"""
_WORK = 5e10
"""largest number of multiplications for one layer, about ten seconds on one core; cheaper bounds are used beyond it"""
_DIRECT = 2e9
"""number of values, rows times squared columns, up to which eigenvalues are proposed by a direct solver"""
_BETWEEN = 0.004
"""relative error of the values between the points of a grid of frequencies that is aimed at"""


def spectral_bound(matrices: Tensor) -> float:
    """Return a proved upper bound of the largest singular value of all matrices (…, m, n), real or complex.

    The bound is at most a millionth too large in most cases. It is looser for matrices of more than about 2,500 rows
    and columns, for which the decomposition is not computed.
    """
    a = _as_double(matrices).flatten(0, -3) if matrices.dim() > 2 else _as_double(matrices)[None]
    if a.shape[1] < a.shape[2]:
        a = a.mH
    sizes = a.abs()
    squares = sizes.square().sum((1, 2))
    by_norms = (sizes.sum(1).amax(1) * sizes.sum(2).amax(1)).sqrt()
    cheap = float(torch.minimum(squares.sqrt(), by_norms).amax()) * UP
    b, m, n = a.shape
    if not cheap or not math.isfinite(cheap) or b * m * n * n > _WORK:
        return cheap
    gram = a.mH @ a
    # a complex product has at most four times the relative error of a real one
    error = 8 * gamma(m + 4, torch.float64) * squares
    bound = cheap
    proposed = _proposed(gram)
    for slack in _SLACKS:
        candidate = proposed * (1 + slack)
        if math.sqrt(candidate) * UP >= cheap:
            break
        if _dominated(gram, candidate, error):
            bound = math.sqrt(candidate) * UP
            break
    return bound


def _as_double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _proposed(gram: Tensor) -> float:
    """An approximation of the largest eigenvalue of positive semi-definite matrices (b, n, n)."""
    if len(gram) * gram.shape[1] ** 3 <= _DIRECT:
        return max(float(torch.linalg.eigvalsh(gram).amax()), 0.0)
    first = gram.diagonal(dim1=1, dim2=2).abs().argmax(1)
    v = gram[torch.arange(len(gram)), :, first][:, :, None]
    value = torch.zeros(len(gram), dtype=torch.float64)
    for _ in range(_STEPS):
        v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
        v = gram @ v
        value = v.flatten(1).norm(dim=1)
    return float(value.amax())


def _dominated(gram: Tensor, candidate: float, error: Tensor) -> bool:
    """Whether candidate * I - A^H A is proved to be positive semi-definite for all matrices `gram` (b, n, n), which
    differ from A^H A by at most `error` (b) in the spectral norm.
    """
    n = gram.shape[1]
    trace = n * candidate * UP
    shift = error + 8 * gamma(n + 4, torch.float64) * trace + 1e-300
    shifted = -gram
    shifted.diagonal(dim1=1, dim2=2).add_((candidate - shift)[:, None])
    _, info = torch.linalg.cholesky_ex(shifted)
    return not bool(info.any())


def overlap_bound(kernel: Tensor) -> float:
    """Return a proved upper bound of the gain of a convolution with stride 1 and a kernel (out, in, *size), from the
    absolute correlations between its filters.

    For the matrix G of these correlations and any positive vector q, the largest entry of G q / q is at least the
    square of the gain. The vector is computed by power iteration, so that the entry approaches the spectral radius.
    """
    weight = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.transpose(0, 1)
    correlate = _CONVOLUTIONS[weight.dim() - 2]
    pads = [size - 1 for size in weight.shape[2:]]
    terms = weight[0].numel()
    sizes = weight.abs().flatten(1).sum(1)
    # the sums of magnitudes over outputs and inputs: the cheapest bound
    columns = weight.abs().flatten(2).sum(2).sum(0).amax()
    by_sums = math.sqrt(float(sizes.amax() * columns)) * UP
    shifts = math.prod(2 * size - 1 for size in weight.shape[2:])
    if len(weight) ** 2 * terms * shifts > _WORK:
        return by_sums
    sums = correlate(weight, weight, padding=pads).abs().flatten(2).sum(2)
    sums = sums + gamma(terms + 4, torch.float64) * sizes[:, None] * sizes[None]
    q = torch.ones(len(sums), dtype=torch.float64)
    best = math.inf
    for _ in range(_STEPS):
        image = sums @ q
        best = min(best, float((image / q).amax()))
        q = image / image.amax().clamp_min(1e-300)
        q = q.clamp_min(1e-9)
    return min(by_sums, math.sqrt(best) * UP)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution_bound(
    weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> float:
    """Return a proved upper bound of the gain of a convolution with a kernel (out, in / groups, *size).

    It holds for zero padding of any width and for inputs of any size.
    """
    kernels = _as_double(weight).view(groups, -1, *weight.shape[1:])
    if max(stride) > 1:
        kernels = _phases(_dilated(kernels, dilation), stride)
    # on the unbounded plane a dilated convolution with stride 1 is several copies of the one without dilation
    by_overlaps = max(overlap_bound(kernel) for kernel in kernels)
    return min(by_overlaps, _symbol_bound(kernels))


def _dilated(kernels: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """Kernels with zeros between their entries."""
    if max(dilation) == 1:
        return kernels
    size = [(k - 1) * step + 1 for k, step in zip(kernels.shape[3:], dilation, strict=True)]
    spread = kernels.new_zeros(*kernels.shape[:3], *size)
    places = tuple(slice(None, None, step) for step in dilation)
    spread[(slice(None), slice(None), slice(None), *places)] = kernels
    return spread


def _phases(kernels: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Kernels (groups, out, in * phases, *size) of stride 1 with the same gain: the input is divided into one channel
    for each phase of the stride.
    """
    missing = [-size % step for size, step in zip(kernels.shape[3:], stride, strict=True)]
    kernels = F.pad(kernels, [width for least in reversed(missing) for width in (0, least)])
    dims = len(stride)
    for axis, step in enumerate(stride):
        shape = kernels.shape
        at = 3 + 2 * axis
        kernels = kernels.reshape(*shape[:at], shape[at] // step, step, *shape[at + 1 :])
    places, phases = [3 + 2 * axis for axis in range(dims)], [4 + 2 * axis for axis in range(dims)]
    return kernels.permute(0, 1, 2, *phases, *places).flatten(2, 2 + dims)


def _symbol_bound(kernels: Tensor) -> float:
    """Bound of the singular values of the symbols of kernels (groups, out, in, *size); infinity if it would take too
    long.
    """
    groups, out, inner, *size = kernels.shape
    each = groups * out * inner * min(out, inner) * 4
    points = _grid(tuple(size), each)
    if points is None:
        return math.inf
    beyond = math.prod(1 / math.cos(math.pi * (k - 1) / 2 / n) for k, n in zip(size, points, strict=True))
    # the symbol of a real kernel at -w is the conjugate of that at w
    half = [*points[:-1], points[-1] // 2 + 1]
    axes = [
        torch.arange(n)[:, None] * torch.arange(k) % full
        for n, k, full in zip(half, size, points, strict=True)
    ]
    waves = torch.ones(1, 1, dtype=torch.complex128)
    for turns, full in zip(axes, points, strict=True):
        angles = turns.double() * (2 * math.pi / full)
        wave = torch.complex(angles.cos(), -angles.sin())
        waves = (waves[:, None, :, None] * wave[None, :, None, :]).flatten(2).flatten(0, 1)
    flat = kernels.flatten(3)
    # rounding of each entry, of which the Frobenius norm bounds the effect on singular values
    terms = flat.shape[3]
    rounding = 4 * gamma(terms + 16, torch.float64) * float(flat.abs().sum(3).norm())
    largest = 0.0
    for piece in torch.split(waves, max(1, 2**21 // (groups * out * inner))):
        symbols = torch.einsum("goiq,fq->fgoi", flat.to(torch.complex128), piece)
        largest = max(largest, spectral_bound(symbols))
    return (largest + rounding) * beyond * UP


def _grid(size: tuple[int, ...], work: float) -> tuple[int, ...] | None:
    """Number of frequencies in each dimension, or None if even a coarse grid exceeds the limit of work."""
    for between, most in ((_BETWEEN, _WORK / 5), (4 * _BETWEEN, _WORK / 5), (16 * _BETWEEN, _WORK)):
        points = tuple(
            max(1, math.ceil(math.pi * (k - 1) / 2 * math.sqrt(len(size) / (2 * between)))) for k in size
        )
        if math.prod(points) / 2 * work <= most:
            return points
    return None


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
class Contraction(operations.Activation):
    """A layer of a network with a known gain, as one operation that acts on whole tensors."""

    module: nn.Module
    """the layer in float64"""
    gain: float
    """proved upper bound of its Lipschitz constant in Euclidean distance"""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer."""
        y: Tensor = self.module(x.double()).to(x.dtype)
        return y

    def interval(self, x: operations.Interval) -> operations.Interval:
        """Return bounds of the outputs from the output for the centre, the gain and the Euclidean radius."""
        low, high = x
        y = self((low + high) / 2)
        radius = self.gain * ((high - low) / 2).flatten(1).norm(dim=1) * UP
        radius = radius + _ROUNDING * (1 + y.flatten(1).abs().amax(1))
        spread = radius.view(-1, *(1,) * (y.dim() - 1))
        return y - spread, y + spread

    def offsets(self, slope: Tensor, x: operations.Interval) -> operations.Interval:
        """Return bounds of f(x) - slope * x, from those of both terms."""
        smallest, largest = self.interval(x)
        first, second = slope * x[0], slope * x[1]
        return smallest - torch.maximum(first, second), largest - torch.minimum(first, second)

    def candidates(self, x: operations.Interval) -> tuple[Tensor, ...]:
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


_AT_ONCE = 64
"""number of examples whose logits are bounded together"""
_SMALL = 1e10
"""largest number of multiplications for the matrix of a convolution at the size of its input, about two seconds"""
_STEEPEST = {torch.tanh: 1.0, torch.sigmoid: 0.25, F.softplus: 1.0, F.gelu: 1.13, F.silu: 1.1}
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
        if gain != 1.0 or isinstance(node.operation, Contraction | operations.Dense | operations.Convolution):
            gains.append(Gain(type(node.operation).__name__.lower(), gain, node.place))
    classes = graph.shape_of(graph.output)[0]
    margins = torch.full((classes, classes), math.sqrt(2) * constants[-1] * UP, dtype=torch.float64)
    last = graph.node(graph.output)
    if isinstance(last.operation, operations.Dense) and len(graph.shape_of(graph.output)) == 1:
        weight = last.operation.weight.detach().cpu().double()
        rows = torch.stack([(weight - row).norm(dim=1) for row in weight])
        margins = torch.minimum(margins, rows * constants[last.inputs[0]] * UP)
    return LipschitzBounds(tuple(gains), constants[-1], margins)


def _composed(node: Node, gain: float, before: Sequence[float], graph: Graph) -> float:
    """Lipschitz constant of a value, from the gain of its operation and the constants of its inputs."""
    operation = node.operation
    if isinstance(operation, operations.Sum):
        copies = [_copies(graph.shape_of(i), node.shape) for i in node.inputs]
        return (before[0] * copies[0] + abs(operation.factor) * before[1] * copies[1]) * UP
    return gain * math.hypot(*before) * UP


def gain_of(node: Node, shapes: Sequence[torch.Size]) -> float:
    """Return a proved upper bound of the gain of an operation as a function of all of its inputs, which have the given
    shapes for one example.
    """
    operation = node.operation
    match operation:
        case operations.Dense():
            return spectral_bound(operation.weight)
        case operations.Convolution():
            return _convolution_gain(operation, shapes[0], node.shape)
        case operations.Scaled():
            scale = 1.0 if operation.scale is None else float(operation.scale.abs().double().amax())
            return scale * _copies(shapes[0], node.shape)
        case operations.Sum():
            return math.hypot(1.0, operation.factor) * UP
        case operations.Nonnegative():
            return _nonnegative_gain(operation, shapes, node.shape)
        case operations.MaxPool():
            return _pool_gain(operation, shapes[0])
        case Contraction():
            return operation.gain
        case operations.ReLU():
            return 1.0
        case operations.Piecewise():
            return max(abs(slope) for slope in operation.slopes)
        case operations.Smooth():
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


def _convolution_gain(operation: operations.Convolution, shape: torch.Size, out: torch.Size) -> float:
    bound = convolution_bound(operation.weight, operation.stride, operation.dilation, operation.groups)
    n, m = shape.numel(), out.numel()
    if n * m * (operation.weight[0].numel() + min(n, m)) > _SMALL:
        return bound
    unit = torch.eye(n, dtype=torch.float64).view(n, *shape)
    linear = replace(operation, weight=operation.weight.detach().cpu().double(), bias=None)
    return min(bound, spectral_bound(linear(unit).flatten(1)))


def _nonnegative_gain(
    operation: operations.Nonnegative, shapes: Sequence[torch.Size], out: torch.Size
) -> float:
    """The root of the product of the largest row sum and the largest column sum (Schur test); exact for operations that
    move, average or omit values.
    """
    rows = operation(*(torch.ones(1, *shape, dtype=torch.float64) for shape in shapes))
    columns = operation.transposed(torch.ones(1, 1, *out, dtype=torch.float64), shapes)
    product = float(rows.amax()) * max(float(each.amax()) for each in columns)
    # operations that move values are exact
    return 1.0 if product == 1.0 else math.sqrt(max(product, 0.0)) * UP


def _pool_gain(operation: operations.MaxPool, shape: torch.Size) -> float:
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
