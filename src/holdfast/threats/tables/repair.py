"""Repairs rows that violate relations: the change of a column that satisfies a relation at the lowest cost is made, one
column after the other.

The judge of a run is `checking.py`, which shares no code with this module.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.threats.tables.relations import (
    All,
    Arithmetic,
    Call,
    ColumnValue,
    Comparison,
    Condition,
    Either,
    Expression,
    Number,
    columns_of,
)

if TYPE_CHECKING:
    from holdfast.threats.tables.table import TableTensors

_STEP = 1e-6
"""Relative amount by which the sides of a strict comparison differ after a repair."""
_SLACK = 1e-9
"""Relative difference of sides, in double precision, that needs no repair."""
_UNDEFINED = 1e9
"""Violation of a comparison whose sides are infinite or not defined."""
_PASSES = 3
"""Number of times that all relations are repaired, because a repair may violate another relation."""
_KEPT = 1e6
"""Added cost of a further change of a column that the attack has changed, in units, which exceeds any other cost."""
_COLUMNS = 4
"""Largest number of columns that one repair of a relation changes."""


def violation(condition: Condition, places: Mapping[str, int], x: Tensor) -> Tensor:
    """Return by how much each row (n, columns) violates a condition: 0 if it holds. It is differentiable."""
    match condition:
        case All(parts):
            return torch.stack([violation(part, places, x) for part in parts]).sum(0)
        case Either(parts):
            return torch.stack([violation(part, places, x) for part in parts]).amin(0)
        case Comparison():
            excess = _excess(condition, places, x)
            return excess.abs() if condition.order == "==" else excess.clamp_min(0)


def repaired(tensors: "TableTensors", x: Tensor, clean: Tensor, *, undo: bool) -> Tensor:
    """Return the rows `x` (n, columns), float64, with columns changed so that they satisfy relations which their clean
    rows satisfy, as far as single columns can do that. `x` is not changed.

    With `undo`, the column is preferred that brings the row nearest to its clean row, which may undo a change of the
    attack. Otherwise columns are preferred that the attack has not changed.
    """
    if not tensors.rules.relations:
        return x
    places, x = tensors.rules.places, x.clone()
    low, high = tensors.limits(clean)
    movable = (tensors.mutable & ~tensors.category & ~tensors.grouped).to(x.device)
    applied = [violation(relation.condition, places, clean) <= _SLACK for relation in tensors.rules.relations]
    with torch.enable_grad():
        for _ in range(_PASSES):
            unrepaired = False
            for relation, applies in zip(tensors.rules.relations, applied, strict=True):
                broken = applies & (violation(relation.condition, places, x) > _SLACK)
                rows = broken.nonzero()[:, 0]
                if len(rows):
                    unrepaired = True
                    part = _Part(tensors, places, clean[rows], low[rows], high[rows], movable, undo=undo)
                    x[rows] = part.satisfied(relation.condition, x[rows])
            if not unrepaired:
                break
    return x


class _Part:
    """Some rows that are repaired together, with the values that they may take."""

    def __init__(
        self,
        tensors: "TableTensors",
        places: Mapping[str, int],
        clean: Tensor,
        low: Tensor,
        high: Tensor,
        movable: Tensor,
        *,
        undo: bool,
    ) -> None:
        self._undo = undo
        self._tensors, self._places, self._movable = tensors, places, movable
        self._clean, self._low, self._high = clean, low, high

    def satisfied(self, condition: Condition, x: Tensor) -> Tensor:
        """Return the rows with columns changed towards the condition."""
        match condition:
            case Comparison():
                for _ in range(_COLUMNS):
                    x = self._step(condition, x)
                return x
            case All(parts):
                for part in parts:
                    x = self.satisfied(part, x)
                return x
            case Either(parts):
                return self._cheapest([self.satisfied(part, x) for part in parts], condition)

    def _cheapest(self, candidates: list[Tensor], condition: Condition) -> Tensor:
        """Return for each row the candidate of the lowest cost that satisfies the condition."""
        rows = torch.stack(candidates)
        cost = ((rows - self._clean) / self._unit).abs().nan_to_num(0.0).sum(2)
        for k, candidate in enumerate(candidates):
            cost[k, violation(condition, self._places, candidate) > _SLACK] = torch.inf
        return rows[cost.argmin(0), torch.arange(rows.shape[1], device=rows.device)]

    @property
    def _unit(self) -> Tensor:
        return self._tensors.unit.to(self._clean.device)

    def _step(self, comparison: Comparison, x: Tensor) -> Tensor:
        """Return the rows after a change of the column that satisfies the comparison at the lowest cost, or, if none
        does, that reduces its violation most.
        """
        point = x.detach().requires_grad_()
        excess = _excess(comparison, self._places, point)
        if not excess.requires_grad:
            return x
        (slope,) = torch.autograd.grad(excess.sum(), point)
        excess = excess.detach()
        broken = (excess.abs() if comparison.order == "==" else excess) > _SLACK
        needed = torch.where(slope == 0, torch.inf, -excess[:, None] / slope)
        whole = self._tensors.whole.to(x.device)
        outward = needed.sign() * (needed.abs() - 1e-9).ceil()
        if comparison.order == "==":
            outward = needed.round()
        needed = torch.where(whole, outward, needed)
        target = torch.clamp(x + needed.nan_to_num(0.0, 0.0, 0.0), self._low, self._high)
        left = excess[:, None] + slope * (target - x)
        left = left.abs() if comparison.order == "==" else left.clamp_min(0)
        if self._undo:
            cost = ((target - self._clean).abs() - (x - self._clean).abs()) / self._unit
        else:
            cost = (target - x).abs() / self._unit + _KEPT * (x != self._clean)
        usable = self._movable & (slope != 0) & (target != x) & ~x.isnan()
        done = usable & (left <= _SLACK)
        rank = torch.where(done, cost, torch.where(usable, 1e12 + left, torch.inf)).nan_to_num(torch.inf)
        best = rank.argmin(1)
        rows = torch.arange(len(x), device=x.device)
        change = broken & (rank[rows, best] < torch.inf)
        result = x.clone()
        result[rows[change], best[change]] = target[rows[change], best[change]]
        return result


def _excess(comparison: Comparison, places: Mapping[str, int], x: Tensor) -> Tensor:
    """Return the left side of a comparison less the right side (n). It is at most 0 where `<=` and `<` hold, and 0
    where `==` holds.
    """
    left, right = (_value(side, places, x) for side in (comparison.left, comparison.right))
    difference = left - right
    if comparison.order == "<":
        size = torch.maximum(left.detach().abs(), right.detach().abs()).clamp_min(1)
        difference = difference + _STEP * size
    is_missing = torch.stack(
        [x[:, places[name]].isnan() for name in columns_of(comparison)]
        or [torch.zeros_like(x[:, 0], dtype=torch.bool)]
    ).any(0)
    # a missing value violates nothing, and a division by zero cannot be repaired
    undefined = torch.where(is_missing, 0.0, _UNDEFINED).to(difference.dtype)
    return torch.where(difference.isfinite(), difference, undefined).expand(len(x))


def _value(expression: Expression, places: Mapping[str, int], x: Tensor) -> Tensor:
    match expression:
        case Number(value):
            return x.new_tensor(value)
        case ColumnValue(name):
            return x[:, places[name]]
        case Arithmetic(operator, first, second):
            left, right = _value(first, places, x), _value(second, places, x)
            match operator:
                case "+":
                    return left + right
                case "-":
                    return left - right
                case "*":
                    return left * right
                case "/":
                    return left / right
        case Call(function, arguments):
            parts = [_value(argument, places, x) for argument in arguments]
            if function == "abs":
                return parts[0].abs()
            stacked = torch.stack([part.expand(len(x)) for part in parts])
            return stacked.amin(0) if function == "min" else stacked.amax(0)
