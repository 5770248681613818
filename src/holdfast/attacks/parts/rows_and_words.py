"""Shared parts of attacks on tables and on texts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import Best, margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.threats.tables.table import Table, TableTensors
from holdfast.threats.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS, registered_domains


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
    several = batch.take(torch.arange(len(batch)).repeat(k))
    x = constraint.valid(constraint.moved(candidates.flatten(0, 1), several.x), several.x)
    heights = margin(model(x, several.ids), several)
    return x.view_as(candidates), heights.view(k, len(batch))


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


_LONGEST = 64  # longer words are data or addresses, and their edits would need too much memory

Operation = tuple[int, int, str]
"""Replacement of the characters from a position up to another one by a text."""


def edited(word: str, done: tuple[Operation, ...] = ()) -> dict[str, tuple[Operation, ...]]:
    """Return the words that one edit makes of a word beside the operations `done`, with all their operations.

    No two operations change a common character. The registered domains of URLs do not change.
    """
    found: dict[str, tuple[Operation, ...]] = {}
    for operation in _operations(word):
        together = (*done, operation)
        new = word
        for start, stop, text in sorted(together, reverse=True):
            new = new[:start] + text + new[stop:]
        if new and all(_apart(operation, other) for other in done) and _changes(word, new):
            found.setdefault(new, together)
    return found


def _operations(word: str) -> Iterator[Operation]:
    """Yield the single edits that the constraint allows, in the first `_LONGEST` characters of a word."""
    for place, character in enumerate(word[:_LONGEST]):
        yield place, place, INVISIBLE
        if HOMOGLYPHS.get(character):
            yield place, place + 1, HOMOGLYPHS[character]
        if word[place + 1 : place + 2] not in ("", character):
            yield place, place + 2, word[place + 1] + character
        yield place, place + 1, ""
        yield place, place, character
        for key in NEIGHBOURS.get(character, ""):
            yield place, place + 1, key
    yield len(word), len(word), INVISIBLE


def _apart(one: Operation, other: Operation) -> bool:
    """Return whether two operations change no common character, and do not insert at the same position."""
    if one[0] == one[1] and other[0] == other[1]:
        return one[0] != other[0]
    return one[1] <= other[0] or other[1] <= one[0]


def _changes(word: str, new: str) -> bool:
    """Return whether two words differ, and have the same registered domains."""
    return new != word and registered_domains(new) == registered_domains(word)
