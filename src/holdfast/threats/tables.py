"""The constraint of a table: rows that its rules allow, within a budget, around each clean row; and the repair of rows
that violate relations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Mask, NonNegative, PerExample
from holdfast.threats.domains import TABLE, Domain
from holdfast.threats.table_checking import distances
from holdfast.threats.table_rules import (
    All,
    Arithmetic,
    Call,
    ColumnValue,
    Comparison,
    Condition,
    Either,
    Expression,
    Number,
    Rules,
    columns_of,
    rules_of,
)

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


_SHARES = (1.0, 0.97, 0.9, 0.8, 0.65, 0.5, 0.3, 0.15)
"""Shares of the budget to which a row is moved back in turn, until it is valid after rounding and repair."""
_BALLS: dict[str, type[Linf | L2 | L1 | L0]] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}
_ANYWHERE = Bounds(-torch.inf, torch.inf)


@dataclass(frozen=True)
class TableTensors:
    """The rules of the columns as tensors (columns), and the relations."""

    rules: Rules
    low: Tensor
    high: Tensor
    unit: Tensor
    """change that counts as 1 in the budget, the cost included"""
    mutable: Tensor
    only_up: Tensor
    only_down: Tensor
    whole: Tensor
    """mask of the whole numbers and the categories"""
    category: Tensor
    grouped: Tensor
    """mask of the columns of one-hot groups"""
    groups: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(rules: Rules) -> "TableTensors":
        """Return the rules of the columns as tensors."""
        columns = rules.columns
        grouped = {name for group in rules.groups for name in group}
        return TableTensors(
            rules,
            torch.tensor([rules.low(name) for name in columns], dtype=torch.float64),
            torch.tensor([rules.high(name) for name in columns], dtype=torch.float64),
            torch.tensor([rules.unit(name) for name in columns], dtype=torch.float64),
            torch.tensor([rules.mutable(name) for name in columns]),
            torch.tensor([column.change == "up" for column in columns.values()]),
            torch.tensor([column.change == "down" for column in columns.values()]),
            torch.tensor([column.type != "number" for column in columns.values()]),
            torch.tensor([column.type == "category" for column in columns.values()]),
            torch.tensor([name in grouped for name in columns]),
            tuple(tuple(rules.places[name] for name in group) for group in rules.groups),
        )

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest values (n, columns) that an attacker may give to the rows `x`, whatever the
        budget. They include the values of the rows.
        """
        low, high = torch.minimum(self.low.to(x.device), x), torch.maximum(self.high.to(x.device), x)
        low = torch.where(self.only_up.to(x.device), x, low)
        high = torch.where(self.only_down.to(x.device), x, high)
        fixed = ~self.mutable.to(x.device) | x.isnan()
        return torch.where(fixed, x, low), torch.where(fixed, x, high)


@lru_cache(maxsize=16)
def _tensors(content: str) -> TableTensors:
    return TableTensors.of(rules_of(content))


@dataclass(frozen=True)
class Table(Constraint):
    """Constraint of the rows that the rules of a table allow, whose change has at most the size `eps` in the budget of
    the rules.
    """

    name: ClassVar[str] = "table"
    has_size: ClassVar[bool] = True
    domain: ClassVar[Domain | None] = TABLE

    file: str
    """file of the rules, as it was given"""
    content: str
    """the rules as JSON"""
    eps: NonNegative = 0.1

    @property
    def rules(self) -> Rules:
        """The rules of the table."""
        return _tensors(self.content).rules

    @property
    def tensors(self) -> TableTensors:
        """The rules of the columns as tensors."""
        return _tensors(self.content)

    @property
    def limits(self) -> Mapping[str, float | str]:
        """The file, the rules and the size of the budget."""
        return {"file": self.file, "eps": self.eps, "content": self.content}

    @property
    def ball(self) -> Linf | L2 | L1 | L0:
        """The budget as a ball of changes that are divided by their units."""
        return _BALLS[self.rules.budget.norm](self.eps)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return the size of each change in the budget, and infinity for a row that the rules do not allow."""
        rows = (values.detach().cpu().double().numpy() for values in (x_adv, x))
        return torch.from_numpy(np.ascontiguousarray(distances(self.rules, *rows))).to(x.device, x.dtype)

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return for each `x_adv` a row near it that the rules and the budget allow, which may be the clean row.

        Values are rounded, relations are repaired, and rows that are then too far away or still invalid are moved
        towards their clean rows.
        """
        return self.valid(self.moved(x_adv, x), x)

    def moved(self, x_adv: Inputs, x: Inputs) -> Tensor:
        """Return for each `x_adv` the nearest point (n, columns) within the limits of the columns and the budget, in
        double precision, without rounding and without regard to relations.
        """
        clean = x.double()
        low, high = self.tensors.limits(clean)
        return self._within(torch.clamp(x_adv.double(), low, high), clean, self.ball)

    def valid(self, point: Tensor, x: Inputs) -> Inputs:
        """Return for each point of `moved` a row that the rules and the budget allow."""
        clean, result = x.double(), x.clone()
        pending = torch.arange(len(x), device=x.device)
        for share in _SHARES:
            rows = clean[pending]
            nearer = (
                point[pending]
                if share == 1
                else self._within(point[pending], rows, _shrunk(self.ball, share))
            )
            rounded = self._rounded(nearer, rows)
            for undo in (False, True):
                candidate = repaired(self.tensors, rounded, rows, undo=undo).to(x.dtype)
                fits = self.allows(candidate, x[pending])
                result[pending[fits]] = candidate[fits]
                pending, rounded, rows = pending[~fits], rounded[~fits], rows[~fits]
            if not len(pending):
                break
        return result

    def allows(self, x_adv: Inputs, x: Inputs) -> Mask:
        """Return which rows the rules and the budget allow, as the judge of a run computes it."""
        return self.distance(x_adv.double(), x.double()) <= self.eps * (1 + 1e-6)

    def penalty(self, point: Tensor) -> PerExample:
        """Return by how much each point (n, columns) violates the relations, differentiable, in the units of their
        columns.
        """
        total = point.new_zeros(len(point))
        for relation in self.rules.relations:
            total = total + violation(relation.condition, self.tensors.rules.places, point)
        return total

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return for each row the direction of length one in the budget along which a function with this gradient
        increases most, among the numbers that an attacker may change.
        """
        tensors = self.tensors
        movable = (tensors.mutable & ~tensors.category).to(gradient.device)
        unit = torch.where(movable, tensors.unit.to(gradient.device), torch.zeros(())).to(gradient.dtype)
        return self.ball.steepest(gradient * unit, torch.zeros_like(gradient), _ANYWHERE) * unit

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return for each example a random valid row within the budget."""
        still = Batch(torch.zeros_like(batch.x), batch.y, batch.ids)
        change = self.ball.sample(still, _ANYWHERE, rng.at("change")) if self.ball.name != "l0" else None
        if change is None:  # any values in few columns
            change = 2 * rng.at("change").uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype) - 1
        return self.project(batch.x + change * self.tensors.unit.to(batch.x), batch.x, bounds)

    def resized(self, eps: float) -> "Table":
        """Return the same rules with a budget of the size `eps`."""
        return replace(self, eps=eps)

    def _within(self, point: Tensor, clean: Tensor, ball: Linf | L2 | L1 | L0) -> Tensor:
        # A change of a group is that of two columns, and counts once.
        grouped = self.tensors.grouped.to(clean.device)
        twice = {"l2": math.sqrt(2), "l1": 2.0}.get(ball.name, 1.0)
        unit = torch.where(grouped, twice, 1.0) * self.tensors.unit.to(clean.device)
        change = ((point - clean) / unit).nan_to_num(0.0)
        still = torch.zeros_like(change)
        if not isinstance(ball, L0) or not grouped.any():
            return clean + ball.project(change, still, _ANYWHERE) * unit
        groups = torch.stack(
            [(change[:, group] != 0).any(1) for group in map(list, self.tensors.groups)]
        ).sum(0)
        others = ball.within(
            change * ~grouped, still, _ANYWHERE, (ball.eps - groups.to(change.dtype)).clamp_min(0)
        )
        return clean + torch.where(grouped, change, others) * unit

    def _rounded(self, point: Tensor, clean: Tensor) -> Tensor:
        """Return the rows with whole numbers and one-hot groups in place of other values."""
        tensors = self.tensors
        rows = torch.where(tensors.whole.to(point.device) & (point != clean), point.round(), point)
        for group in tensors.groups:
            if not tensors.mutable[list(group)].any():
                continue
            places = torch.tensor(group, device=point.device)
            one_hot = torch.nn.functional.one_hot(point[:, places].nan_to_num(0.0).argmax(1), len(group))
            rows[:, places] = one_hot.to(rows.dtype)
        return rows


def table_of(constraint: Constraint) -> Table | None:
    """Return the constraint if it has the rules of a table, else None."""
    return constraint if isinstance(constraint, Table) else None


def _shrunk(ball: Linf | L2 | L1 | L0, share: float) -> Linf | L2 | L1 | L0:
    return (
        L0(max(float(int(ball.eps * share)), 0.0)) if isinstance(ball, L0) else ball.resized(ball.eps * share)
    )
