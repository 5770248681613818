"""Sets of inputs around examples over which bounds are computed: a box, intersected with a ball of a norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.certifiers.bounds.graph import gamma
from holdfast.certifiers.bounds.linear import Interval
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.remedies import Remedy
from holdfast.core.types import Inputs


@dataclass(frozen=True, eq=False)
class Region:
    """Inputs in a box that are also in a ball, for each example of a batch.

    The ball has the Euclidean norm (`norm` 2) or the L1 norm (`norm` 1); a ball of the maximum norm is a box, so that
    `norm` is None.
    """

    low: Tensor
    """smallest value of each input, (n, *shape)"""
    high: Tensor
    """largest value of each input, (n, *shape)"""
    centre: Tensor
    """centres of the balls, (n, *shape)"""
    norm: int | None = None
    radius: float = 0.0

    @property
    def box(self) -> Interval:
        """Smallest and largest value of each input."""
        return self.low, self.high

    def minimum(self, a: Tensor) -> Tensor:
        """Return lower bounds (n, k) of the linear functions a . x over the region, from their coefficients `a` (n, k,
        *shape). Bounds are reduced by their rounding error.

        For a box they are exact up to rounding. For a ball, the larger one of the minima over box and ball is returned.
        """
        rows = a.flatten(2)
        middle, radius = ((self.high + self.low) / 2).flatten(1), ((self.high - self.low) / 2).flatten(1)
        sizes = rows.abs()
        spread = torch.stack((radius, middle.abs() + radius), 2)
        products = sizes @ spread
        least = (rows @ middle[:, :, None])[:, :, 0] - products[:, :, 0]
        error = gamma(rows.shape[2] + 4, a.dtype) * products[:, :, 1]
        if self.norm is None:
            return least - error
        centre = self.centre.flatten(1)
        dual = rows.norm(dim=2) if self.norm == 2 else sizes.amax(2)
        in_ball = (rows @ centre[:, :, None])[:, :, 0] - self.radius * dual * (
            1 + gamma(rows.shape[2] + 4, a.dtype)
        )
        return torch.maximum(least, in_ball) - 2 * error

    def minimiser(self, a: Tensor) -> Tensor:
        """Return for each linear function a . x, with coefficients (n, k, *shape), an input of the region at which it
        is small: for a box the exact minimiser. The result has the shape of `a`.
        """
        low, high, centre = (each[:, None] for each in (self.low, self.high, self.centre))
        if self.norm is None:
            return torch.where(a > 0, low, high)
        if self.norm == 2:
            size = a.flatten(2).norm(dim=2).clamp(min=torch.finfo(a.dtype).tiny)
            step = a * (self.radius / size).reshape(*size.shape, *(1,) * (a.dim() - 2))
            return torch.maximum(torch.minimum(centre - step, high), low)
        largest = a.flatten(2).abs().argmax(2, keepdim=True)
        step = torch.zeros_like(a).flatten(2).scatter_(2, largest, self.radius).reshape(a.shape) * a.sign()
        return torch.maximum(torch.minimum(centre - step, high), low)

    def of(self, rows: Tensor) -> "Region":
        """Return the regions of the examples with the given indices."""
        return Region(self.low[rows], self.high[rows], self.centre[rows], self.norm, self.radius)

    def to(self, dtype: torch.dtype) -> "Region":
        """Return the regions in another data type, rounded outwards."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        low = torch.where(
            low.to(self.low.dtype) > self.low, low.nextafter(torch.full_like(low, -torch.inf)), low
        )
        high = torch.where(
            high.to(self.high.dtype) < self.high, high.nextafter(torch.full_like(high, torch.inf)), high
        )
        return Region(low, high, self.centre.to(dtype), self.norm, self.radius)


def region_of(x: Inputs, constraint: Constraint, bounds: Bounds) -> Region:
    """Return the inputs that a threat model allows in place of each of the inputs `x`, in the data type of `x`.

    The radius includes the tolerance with which the harness accepts an input (`core/constraints.py`, `allowed`), so
    that an accepted adversarial input is inside. Raises `UsageError` for a constraint that is no ball of Linf, L2 or
    L1.
    """
    if not isinstance(constraint, Linf | L2 | L1):
        raise UsageError(
            f"{constraint} cannot be certified; expected a ball of the norm linf, l2 or l1",
            Remedy("threat", "linf:8/255"),
        )
    low, high = (limit + shift for limit, shift in zip(bounds.like(x), (-1e-7, 1e-7), strict=True))
    norm = 2 if isinstance(constraint, L2) else 1 if isinstance(constraint, L1) else None
    # the norm of the rounding of all values
    values = x[0].numel() ** (0.0 if norm is None else 1 / norm) if len(x) else 1.0
    stored = torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs()).amax()
    eps = constraint.eps * (1 + 1e-6) + 1e-7 + float(stored) * values
    below, above = (x.double() - eps).to(x.dtype), (x.double() + eps).to(x.dtype)
    # rounding to the data type may move the ends inwards
    below = below.nextafter(torch.full_like(below, -torch.inf))
    above = above.nextafter(torch.full_like(above, torch.inf))
    least, most = torch.maximum(below, low), torch.minimum(above, high)
    if bool((least > most).any()):
        raise UsageError(
            "an input is further outside of the bounds of the model than eps, so that the threat model allows no input "
            "in its place; check the bounds of the model with holdfast doctor"
        )
    return Region(least, most, x, norm, 0.0 if norm is None else eps)
