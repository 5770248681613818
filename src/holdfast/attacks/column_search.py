"""Column search: an attack on tables that tries values of single columns, and keeps the change that lowers the margin
most.

Kantchelian, Tygar & Joseph, "Evasion and Hardening of Tree Ensemble Classifiers", ICML 2016, arXiv:1509.07892, describe
a coordinate search on the symbolic trees. Differs from the paper: it needs scores and not the trees, it covers any
rules of a table, and in later rounds it tries only the columns that helped in the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.images import decisions, evaluated, expect_table, single_change
from holdfast.attacks.parts.losses import Best
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps
from holdfast.threats.tables import Table

_FRACTIONS = (1.0, 0.5, 0.2, 0.05)
"""Tried changes of a number in each direction, as fractions of the largest change that the budget allows."""
_MOST_VALUES = 50
"""Largest number of values of a category that are tried, evenly chosen."""


@dataclass(frozen=True)
class ColumnSearch:
    """Changes the column that lowers the margin most, again and again, until an example is broken or nothing helps."""

    rounds: Steps = 12
    """largest number of columns that are changed one after the other"""
    columns: Steps = 25
    """number of columns that are tried after the first round: those that lowered the margin most"""
    queries: Steps = 10000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_table(threat.constraint, self), Best(batch)
        left = min(self.queries, threat.queries or self.queries)
        tried, x = decisions(constraint.tensors), batch.x
        with torch.no_grad():
            for turn in range(self.rounds):
                rows = best.surviving
                if not len(rows):
                    break
                remaining, present = batch.take(rows), x[rows]
                columns, candidates = _candidates(constraint, tried, present, remaining.x)
                columns, candidates = columns[:left], candidates[:left]
                left -= len(columns)
                if not columns:
                    break
                margins = evaluated(model, remaining, constraint, candidates, best)[1]
                if turn == 0:
                    tried = self._promising(tried, columns, margins)
                if torch.equal(best.x[rows], present):
                    break
                x = best.x.clone()
        return best.x

    def _promising(
        self, tried: Sequence[tuple[int, ...]], columns: Sequence[int], margins: Tensor
    ) -> tuple[tuple[int, ...], ...]:
        """Return the decisions that lowered the margins (k, n) most, on average over the examples."""
        lowest = margins.new_full((len(tried), margins.shape[1]), torch.inf)
        places = torch.tensor(columns, device=margins.device)[:, None].expand_as(margins)
        lowest = lowest.scatter_reduce(0, places, margins, "amin")
        return tuple(tried[place] for place in lowest.mean(1).argsort()[: self.columns].tolist())


def _candidates(
    constraint: Table, tried: Sequence[tuple[int, ...]], x: Inputs, clean: Inputs
) -> tuple[list[int], Tensor]:
    """Return rows (k, n, columns) with one decision changed, and the position of this decision in `tried` for each."""
    places, rows = [], []
    for place, columns in enumerate(tried):
        for values in _values(constraint, columns, x, clean):
            places.append(place)
            rows.append(single_change(x, columns, values))
    return places, torch.stack(rows)


def _values(constraint: Table, columns: tuple[int, ...], x: Inputs, clean: Inputs) -> list[Tensor]:
    """Return the values (n) of a decision that are tried, other than the present ones as a rule."""
    tensors, n = constraint.tensors, len(x)
    if len(columns) > 1:
        return [x.new_full((n,), position) for position in range(len(columns))]
    (place,) = columns
    if tensors.category[place]:
        count = int(tensors.high[place]) + 1
        step = max(1, -(-count // _MOST_VALUES))
        return [x.new_full((n,), value) for value in range(0, count, step)]
    low, high = (side[:, place].to(x.dtype) for side in tensors.limits(clean.double()))
    reach = float(tensors.unit[place]) * (
        constraint.eps if constraint.rules.budget.norm != "l0" else float("inf")
    )
    values = []
    for fraction in _FRACTIONS:
        for side in (low, high):
            room = (side - clean[:, place]).clamp(-reach, reach)
            values.append(clean[:, place] + fraction * room)
    return values
