"""The constraint of a table: rows that its rules allow, within a budget, around each clean row.

Simonetto et al., "Constrained Adaptive Attack: Effective Adversarial Attack Against Deep Neural Networks for Tabular
Data", NeurIPS 2024, arXiv:2406.00775, for rules, repair and rounding. Differs from the paper: any relation is repaired,
not only equalities, and a row that cannot be repaired moves towards its clean row until it is valid.
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
from holdfast.threats.tables.checking import distances
from holdfast.threats.tables.repair import repaired, violation
from holdfast.threats.tables.rules import Rules, rules_of

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
