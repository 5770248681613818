"""Small models and batches for tests, and a linear and a ReLU network with the exact distance of each input to the
decision boundary.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample

SHAPE = (3, 4, 4)
"""channels, height and width of the small images"""


class Sine(nn.Module):
    """Layer that computes sin(8 z) of each value z. A network with this layer has a loss with many local minima."""

    def forward(self, z: Tensor) -> Tensor:
        """Return sin(8 z) of each value of `z`."""
        return torch.sin(8 * z)


def network(
    seed: int = 0, *, classes: int = 4, shape: tuple[int, ...] = SHAPE, rippled: bool = False
) -> Classifier:
    """Return a two-layer network with random weights in eval mode, for inputs in [0, 1].

    Its loss is smooth, or has many local minima if `rippled` is true.
    """
    draw, features = torch.Generator().manual_seed(seed), torch.Size(shape).numel()
    hidden, last = nn.Linear(features, 16).double(), nn.Linear(16, classes).double()
    with torch.no_grad():
        for weight in (*hidden.parameters(), *last.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64) / 2)
    between = Sine() if rippled else nn.Tanh()
    return Classifier(nn.Sequential(nn.Flatten(), hidden, between, last)).eval().requires_grad_(False)


def examples(
    seed: int = 0, *, n: int = 21, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> Batch:
    """Return random inputs in [0, 1], some values of which are at the bounds, with labels 0 and unordered ids."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *shape, generator=draw, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1).to(dtype)
    ids = torch.randperm(4 * n, generator=draw)[:n]
    return Batch(x, torch.zeros(n, dtype=torch.int64), ids)


def labelled(model: Classifier, batch: Batch) -> Batch:
    """Return the batch with the model's predictions as labels, so that every example is classified correctly."""
    with torch.no_grad():
        return Batch(batch.x, model(batch.x).argmax(1), batch.ids)


class Constant(nn.Module):
    """Test model that returns the same logits for every input."""

    def __init__(self, logits: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float64))
        self.logits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the constant logits for each input, with a gradient of zero with respect to the input."""
        return self.logits.to(x.dtype).expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


class Gradientless(nn.Module):
    """Test model whose outputs have no gradient, like those of a network with a `no_grad` decorator."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the network, detached from the inputs."""
        logits: Tensor = self.net(x.detach())
        return logits.detach()


class NaNBeyond(nn.Module):
    """Test model that returns NaN for inputs farther than `reach` from the inputs `clean`, and otherwise the logits of
    a network.
    """

    def __init__(self, net: nn.Module, clean: Tensor, reach: float) -> None:
        super().__init__()
        self.net, self.reach = net, reach
        self.register_buffer("clean", clean)
        self.clean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the network for inputs near the clean inputs, and NaN for all others."""
        distance = torch.cdist(x.detach().flatten(1), self.clean.flatten(1)).amin(1)
        logits: Tensor = self.net(x)
        return torch.where(distance[:, None] > self.reach, torch.nan, logits)


@dataclass(frozen=True)
class LinearOracle:
    """Linear classifier for tests of attacks, with a method that computes the exact distance of an input to the
    decision boundary.
    """

    weight: Tensor
    """weights, (classes, features)"""
    bias: Tensor
    """biases, (classes,)"""
    bounds: Bounds = Bounds()

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes)."""
        return x.flatten(1) @ self.weight.T + self.bias

    def classifier(self) -> Classifier:
        """Return the same linear model as a `Classifier`, the type of model that assessments and attacks are run on."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0]).to(self.weight)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        return Classifier(nn.Sequential(nn.Flatten(), layer), bounds=self.bounds).eval()

    def distance(self, x: Inputs, y: Labels, norm: Constraint) -> PerExample:
        """Return the exact distance of each input to the nearest point inside the bounds that is not classified as `y`,
        or infinity if there is none.
        """
        x, logits = x.double(), self(x).double()
        low, high = self.bounds.like(x)
        rivals = []
        for rival in range(len(self.bias)):
            normal = (self.weight[rival] - self.weight[y]).double()
            gap = logits.gather(1, y[:, None])[:, 0] - logits[:, rival]
            room = torch.where(normal > 0, (high - x).flatten(1), (x - low).flatten(1))
            distance = _smallest(normal.abs(), room, gap.clamp_min(0), norm)
            rivals.append(distance.masked_fill(y == rival, torch.inf))
        return torch.stack(rivals).amin(0)


def _smallest(gain_rate: Tensor, room: Tensor, gap: Tensor, norm: Constraint) -> PerExample:
    """Size of the smallest change that gains `gap`, if a value gains `gain_rate` per unit and can move by `room`."""
    match norm:
        case Linf():
            return _root(room, gain_rate, gap)
        case L2():
            t = _root(
                torch.where(gain_rate > 0, room / gain_rate, 0), gain_rate**2, gap
            )  # values without gain do not move
            lengths = torch.minimum(t[:, None] * gain_rate, room).norm(dim=1)
            return torch.where(t < torch.inf, lengths, torch.inf)
        case L1():
            order = gain_rate.argsort(dim=1, descending=True)
            rates, rooms = gain_rate.gather(1, order), room.gather(1, order)
            earlier_gain = (rates * rooms).cumsum(1) - rates * rooms
            spent = (
                ((gap[:, None] - earlier_gain) / rates.clamp_min(1e-300)).clamp_min(0).minimum(rooms).sum(1)
            )
            return torch.where((gain_rate * room).sum(1) >= gap, spent, torch.inf)
        case L0():
            gains = (gain_rate * room).sort(dim=1, descending=True).values.cumsum(1)
            count = (gains < gap[:, None]).sum(1) + 1.0
            return torch.where(gap <= 0, 0.0, torch.where(gains[:, -1] >= gap, count, torch.inf))
        case _:
            raise UsageError(f"the oracle knows Linf, L2, L1 and L0; the constraint is {norm}")


def _root(stops: Tensor, slopes: Tensor, gap: Tensor) -> PerExample:
    """Return t with `sum(slopes * min(t, stops)) = gap` for each row; inf if the sum does not reach it."""
    stops, order = stops.sort(dim=1)
    slopes = slopes.gather(1, order)
    gained = (slopes * stops).cumsum(1)
    later_slope = slopes.sum(1, keepdim=True) - slopes.cumsum(1)  # total slope after each stop
    piece = (gained + later_slope * stops < gap[:, None]).sum(1, keepdim=True)
    segment = piece.clamp_max(stops.shape[1] - 1)
    earlier_gain = (gained - slopes * stops).gather(1, segment)[:, 0]
    slope = (later_slope + slopes).gather(1, segment)[:, 0]
    t = (gap - earlier_gain).clamp_min(0) / slope.clamp_min(1e-300)
    return torch.where(piece[:, 0] < stops.shape[1], t, torch.inf)


def linear_problem(
    seed: int, *, n: int = 40, features: int = 12, classes: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[LinearOracle, Batch]:
    """Return a random linear model, and inputs in [0, 1] that it classifies correctly. Some input values are at the
    bounds.
    """
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, features, generator=draw, dtype=torch.float64)
    x = (torch.rand(n, features, generator=draw, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    bias = -(x @ weight.T).mean(0)  # prevents that one class is predicted for all inputs
    model = LinearOracle(weight.to(dtype), bias.to(dtype))
    x = x.to(dtype)
    return model, Batch(x, model(x).argmax(1), torch.arange(n))


_Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
_FEASIBLE = 1e-9  # residual of a least-distance problem below which it has no solution


@dataclass(frozen=True)
class ReLUOracle:
    """Fully connected ReLU network of at most about twelve hidden units, with a method that computes the exact distance
    of an input to the decision boundary.
    """

    weights: tuple[Tensor, ...]
    """weights (out, in) of the layers, in float64"""
    biases: tuple[Tensor, ...]
    """biases (out) of the layers"""
    bounds: Bounds = Bounds()

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes)."""
        z = x.flatten(1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            z = (z @ weight.T + bias).relu()
        return z @ self.weights[-1].T + self.biases[-1]

    def classifier(self) -> Classifier:
        """Return the same network as a `Classifier`, the type of model that provers and attacks are run on."""
        layers: list[nn.Module] = [nn.Flatten()]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            layers += [layer, nn.ReLU()]
        return Classifier(nn.Sequential(*layers[:-1]), bounds=self.bounds).eval().requires_grad_(False)

    def distance(self, x: Inputs, y: Labels, norm: Constraint) -> PerExample:
        """Return the exact distance of each input to the nearest point inside the bounds that is not classified as `y`,
        or infinity if there is none. A tie between classes counts as misclassified.

        Raises `UsageError` for a constraint other than Linf, L2 and L1.
        """
        if not isinstance(norm, Linf | L2 | L1):
            raise UsageError(f"the oracle knows Linf, L2 and L1; the constraint is {norm}")
        pieces, low, high = list(self._pieces()), *self.bounds.like(x.double().flatten(1)[0])
        box = (low.expand(x[0].numel()).numpy(), high.expand(x[0].numel()).numpy())
        distances = [
            _smallest_distance([_wrong_on(piece, label) for piece in pieces], point, norm, box)
            for point, label in zip(x.double().flatten(1).numpy(), y.tolist(), strict=True)
        ]
        return torch.tensor(distances, dtype=torch.float64)

    def _pieces(self) -> Iterator[tuple[_Array, _Array, _Array, _Array]]:
        """Yield for each pattern of active units the inequalities `rows` @ x <= `limits` of its polytope, and the
        matrix and offset of the logits.
        """
        widths = [len(bias) for bias in self.biases[:-1]]
        for pattern in itertools.product((0.0, 1.0), repeat=sum(widths)):
            matrix, offset = np.eye(self.weights[0].shape[1]), np.zeros(self.weights[0].shape[1])
            rows, limits, start = [], [], 0
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                matrix, offset = weight.numpy() @ matrix, weight.numpy() @ offset + bias.numpy()
                active = np.array(pattern[start : start + len(bias)])
                sign = 1 - 2 * active  # inactive units are at most 0
                rows.append(sign[:, None] * matrix)
                limits.append(-sign * offset)
                matrix, offset, start = active[:, None] * matrix, active * offset, start + len(bias)
            last = self.weights[-1].numpy()
            yield (
                np.vstack(rows),
                np.concatenate(limits),
                last @ matrix,
                last @ offset + self.biases[-1].numpy(),
            )


_Polytope = tuple[_Array, _Array]
"""inequalities rows @ x <= limits"""


def _wrong_on(piece: tuple[_Array, _Array, _Array, _Array], label: int) -> list[_Polytope]:
    """The polytopes of the points of a piece whose logit of another class is at least that of the label."""
    rows, limits, matrix, offset = piece
    return [
        (np.vstack((rows, matrix[label] - matrix[rival])), np.append(limits, offset[rival] - offset[label]))
        for rival in range(len(offset))
        if rival != label
    ]


def _smallest_distance(
    wrong: Sequence[Sequence[_Polytope]], point: _Array, norm: Linf | L2 | L1, box: tuple[_Array, _Array]
) -> float:
    """Distance of a point to the nearest of the polytopes, beginning with those that are nearest in L2."""
    polytopes = [polytope for of_piece in wrong for polytope in of_piece]
    lengths = [_euclidean(polytope, point, box) for polytope in polytopes]
    if isinstance(norm, L2):
        return min(lengths)
    smallest, share = math.inf, 1 / math.sqrt(len(point)) if isinstance(norm, Linf) else 1.0
    for place in np.argsort(lengths).tolist():
        if lengths[place] * share >= smallest:  # no shorter in the other norm
            break
        smallest = min(smallest, _by_program(polytopes[place], point, norm, box))
    return smallest


def _euclidean(polytope: _Polytope, point: _Array, box: tuple[_Array, _Array]) -> float:
    """Euclidean distance of a point to a polytope within a box; infinity if it is empty."""
    from scipy.optimize import nnls

    rows, limits = polytope
    unit = np.eye(len(point))
    above = np.vstack((-rows, unit, -unit))
    least = np.concatenate((rows @ point - limits, box[0] - point, point - box[1]))
    system, target = np.vstack((above.T, least)), np.append(np.zeros(len(point)), 1.0)
    residual = system @ nnls(system, target)[0] - target
    if np.linalg.norm(residual) < _FEASIBLE:
        return math.inf
    return float(np.linalg.norm(residual[:-1] / residual[-1]))


def _by_program(polytope: _Polytope, point: _Array, norm: Linf | L1, box: tuple[_Array, _Array]) -> float:
    """Distance of a point to a polytope within a box under Linf or L1, by a linear program."""
    from scipy.optimize import linprog

    rows, limits = polytope
    unit = np.eye(len(point))
    # variables: the point, and the size of its change (of each value under L1)
    sizes = np.ones((len(point), 1)) if isinstance(norm, Linf) else unit
    solved = linprog(
        np.concatenate((np.zeros(len(point)), np.ones(sizes.shape[1]))),
        A_ub=np.block([[rows, np.zeros((len(rows), sizes.shape[1]))], [unit, -sizes], [-unit, -sizes]]),
        b_ub=np.concatenate((limits, point, -point)),
        bounds=[*zip(*box, strict=True), *[(0, None)] * sizes.shape[1]],
    )
    return float(solved.fun) if solved.status == 0 else math.inf


def relu_problem(
    seed: int, *, n: int = 5, features: int = 3, widths: tuple[int, ...] = (3, 2), classes: int = 3
) -> tuple[ReLUOracle, Batch]:
    """Return a random small ReLU network, and inputs in [0, 1] that it classifies correctly."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (features, *widths, classes)
    pairs = list(itertools.pairwise(sizes))
    weights = tuple(2 * torch.randn(out, inner, generator=draw, dtype=torch.float64) for inner, out in pairs)
    x = torch.rand(n, features, generator=draw, dtype=torch.float64)
    biases, z = [], x
    for weight in weights:
        biases.append(
            -(z @ weight.T).mean(0)
        )  # about half of the units are active, and no class is predicted always
        z = (z @ weight.T + biases[-1]).relu()
    oracle = ReLUOracle(weights, tuple(biases))
    return oracle, Batch(x, oracle(x).argmax(1), torch.arange(n))
