"""What attacks on tables share: the constraint that they need, and the values that they try."""

import torch
from torch import Tensor

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.threats.tables.table import Table, TableTensors


def expect_table(constraint: Constraint, attack: object) -> Table:
    """Return the constraint if it is that of a table. Raises `UsageError` otherwise."""
    if isinstance(constraint, Table):
        return constraint
    raise UsageError(
        f"{type(attack).__name__} changes rows of a table by its rules, and the threat is {constraint}; give a threat "
        "such as table:rules.yaml"
    )


_ROWS_AT_ONCE = 8192
"""Number of rows that are repaired and evaluated together, which limits memory."""


def evaluated(
    model: Model, batch: Batch, constraint: Table, candidates: Tensor, best: Best
) -> tuple[Tensor, Tensor]:
    """Make candidates (k, n, columns) for the examples of a batch valid, query the model with them, and offer them to
    `best`. Return the valid rows, and their margins (k, n).
    """
    each = max(1, _ROWS_AT_ONCE // max(len(batch), 1))
    parts = [_evaluated(model, batch, constraint, part) for part in torch.split(candidates, each)]
    rows, margins = (torch.cat([part[k] for part in parts]) for k in range(2))
    for x, heights in zip(rows, margins, strict=True):
        best.offer(batch, x, heights)
    return rows, margins


def _evaluated(model: Model, batch: Batch, constraint: Table, candidates: Tensor) -> tuple[Tensor, Tensor]:
    k = len(candidates)
    several = Batch(batch.x.repeat(k, 1), batch.y.repeat(k), batch.ids.repeat(k), _repeated(batch.target, k))
    x = constraint.valid(constraint.moved(candidates.flatten(0, 1), several.x), several.x)
    heights = margin(model(x, several.ids), several)
    return x.view_as(candidates), heights.view(k, len(batch))


def _repeated(target: Tensor | None, k: int) -> Tensor | None:
    return None if target is None else target.repeat(k)


def decisions(tensors: TableTensors) -> tuple[tuple[int, ...], ...]:
    """Return the columns that an attacker may change, one by one, and the columns of each one-hot group together."""
    single = (tensors.mutable & ~tensors.grouped).nonzero()[:, 0].tolist()
    groups = tuple(group for group in tensors.groups if tensors.mutable[list(group)].any())
    return (*((place,) for place in single), *groups)


def single_change(x: Tensor, columns: tuple[int, ...], values: Tensor) -> Tensor:
    """Return the rows `x` with one decision changed to `values` (n): the value of a column, or the position of the 1 in
    a one-hot group.
    """
    changed = x.clone()
    if len(columns) == 1:
        changed[:, columns[0]] = values.to(x.dtype)
    else:
        places = torch.tensor(columns, device=x.device)
        changed[:, places] = torch.nn.functional.one_hot(values.long(), len(columns)).to(x.dtype)
    return changed
