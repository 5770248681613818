"""Linear classifier for tests, with the exact distance of each input to its decision boundary.

For one other class the smallest change solves a knapsack problem. For Linf and L2 all values move up to the bounds by
an amount that is solved for; for L1 and L0 the values with the largest gain move first. The distance is the minimum
over the other classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample


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
            found = _smallest(normal.abs(), room, gap.clamp_min(0), norm)
            rivals.append(found.masked_fill(y == rival, torch.inf))
        return torch.stack(rivals).amin(0)


def _smallest(pay: Tensor, room: Tensor, gap: Tensor, norm: Constraint) -> PerExample:
    """Size of the smallest change that gains `gap`, if a value gains `pay` for each unit and can move by `room`."""
    match norm:
        case Linf():
            return _root(room, pay, gap)
        case L2():
            t = _root(torch.where(pay > 0, room / pay, 0), pay**2, gap)  # values without gain do not move
            moved = torch.minimum(t[:, None] * pay, room).norm(dim=1)
            return torch.where(t < torch.inf, moved, torch.inf)
        case L1():
            order = pay.argsort(dim=1, descending=True)
            pays, rooms = pay.gather(1, order), room.gather(1, order)
            before = (pays * rooms).cumsum(1) - pays * rooms
            spent = ((gap[:, None] - before) / pays.clamp_min(1e-300)).clamp_min(0).minimum(rooms).sum(1)
            return torch.where((pay * room).sum(1) >= gap, spent, torch.inf)
        case L0():
            gains = (pay * room).sort(dim=1, descending=True).values.cumsum(1)
            count = (gains < gap[:, None]).sum(1) + 1.0
            return torch.where(gap <= 0, 0.0, torch.where(gains[:, -1] >= gap, count, torch.inf))
        case _:
            raise UsageError(f"the oracle knows Linf, L2, L1 and L0; the constraint is {norm}")


def _root(stops: Tensor, slopes: Tensor, gap: Tensor) -> PerExample:
    """Return t with `sum(slopes * min(t, stops)) = gap` for each row; inf if the sum does not reach it."""
    stops, order = stops.sort(dim=1)
    slopes = slopes.gather(1, order)
    gained = (slopes * stops).cumsum(1)
    rest = slopes.sum(1, keepdim=True) - slopes.cumsum(1)  # total slope after each stop
    piece = (gained + rest * stops < gap[:, None]).sum(1, keepdim=True)
    inside = piece.clamp_max(stops.shape[1] - 1)
    before = (gained - slopes * stops).gather(1, inside)[:, 0]
    slope = (rest + slopes).gather(1, inside)[:, 0]
    t = (gap - before).clamp_min(0) / slope.clamp_min(1e-300)
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
