"""Small ReLU network for tests, with the exact distance of each input to its decision boundary.

For each pattern of active units the network is affine on a polytope. The nearest misclassified point of each polytope
is the solution of a linear program (Linf, L1), or of a least-distance problem (L2), which is solved as a problem of
nonnegative least squares (Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23). All patterns are tried,
so that the cost doubles with each unit.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample

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
            _smallest([_wrong_on(piece, label) for piece in pieces], point, norm, box)
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


def _smallest(
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
