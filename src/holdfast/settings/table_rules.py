"""Reads the rules of a table from a YAML or JSON file, and drafts them from data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from holdfast.core.errors import Remedy, UsageError
from holdfast.io.data.columns import MISSING, SPLIT_COLUMN, TEXT, ColumnTable
from holdfast.io.files import refuse_address, text_of_file
from holdfast.settings.texts import MAX_CHARACTERS, complaint, parse_yaml, place
from holdfast.threats.table_rules import (
    MOST_VALUES,
    Budget,
    Column,
    Rules,
    parsed_relations,
    refuse_budget,
    refuse_rules,
)

if TYPE_CHECKING:
    from holdfast.threats.tables import Table

_HEADER = """\
# Rules of the table {name}, drafted from {rows:,} rows. Edit them: the draft knows no meaning of a column.
#
# columns: all features, in their order in the file.
#   type: number, whole (number) or category; min, max: valid values; values: those of a category
#   change: any, none, up or down: how an attacker may change the value
#   cost: factor of a change in the budget; missing: true if the value may be missing
# budget: norm (linf, l2, l1, l0) of the changes, each as a fraction of the range of its column, is at most eps;
#   a change of a category or of a group counts as its cost, which must therefore not exceed eps
# groups: one-hot columns, as in [[sex_f, sex_m]]
# relations: as in n_failed <= n_logins, total == debit + credit, or if n_failed > 0 then n_logins > 0
"""
_GROUPED = 200
"""Largest number of columns of zeros and ones among which one-hot groups are searched."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """Content of a file of rules."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    columns: dict[str, Column]
    budget: Budget = field(default_factory=Budget)
    groups: tuple[tuple[str, ...], ...] = ()
    relations: tuple[str, ...] = ()


def rules_from(content: object, source: str) -> Rules:
    """Return the rules in the content of a YAML or JSON file. Raises `UsageError` with the place of the first mistake.

    `source` is the name of the file in messages.
    """
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{source} contains {content!r}; a mapping with columns, budget, groups and relations was expected, as "
            "holdfast init --table writes it"
        )
    try:
        declared = TypeAdapter(_File).validate_python(content)
    except ValidationError as error:
        at = place(error)
        raise UsageError(
            f"{source}{': ' if at else ''}{at} {complaint(error)}; a mapping with columns, budget, groups and "
            "relations was expected, as holdfast init --table writes it"
        ) from None
    relations = parsed_relations(declared.relations, source)
    rules = Rules(declared.columns, declared.budget, declared.groups, relations)
    refuse_rules(rules, source)
    return rules


def table_threat(*, file: str, eps: float | None = None) -> "Table":
    """Return the constraint of the rules in a file; `eps` replaces the size of its budget.

    Raises `UsageError` or `TargetError` for a file that contains no rules.
    """
    from holdfast.threats.tables import Table  # late, because it imports torch

    refuse_address(file, "the rules are", "table:rules.yaml")
    text = text_of_file(Path(file), "file of rules", most=4 * MAX_CHARACTERS)
    rules = rules_from(parse_yaml(text, repr(file)), repr(file))
    if eps is None:
        return Table(file, rules.content, rules.budget.eps)
    refuse_budget(replace(rules.budget, eps=eps), rules.columns, repr(file))
    return Table(file, rules.content, eps)


def drafted(
    path: Path, label: str | None, drop: tuple[str, ...], separator: str | None
) -> tuple[str, tuple[str, ...]]:
    """Return a draft of the rules of a table file as YAML, and notes about what the draft leaves to the user."""
    from holdfast.io.data.layouts import DeclaredData  # late, because it imports torch
    from holdfast.io.data.tables import SUFFIXES, label_column, read_table

    if not path.name.endswith(SUFFIXES):
        raise UsageError(
            f"{str(path)!r} is no table; a file that ends with {', '.join(SUFFIXES)} was expected"
        )
    table = read_table(path, label=label, drop=drop, expected=DeclaredData(), separator=separator)
    name = label_column(label, table)
    if table.kinds is not None:
        texts = (table.kinds == TEXT).any(0)
        words = tuple(
            column
            for column, is_text in zip(table.features, texts, strict=True)
            if is_text and column not in drop
        )
        if words:
            by_words = read_table(
                path, label=label, drop=drop, expected=DeclaredData(words=words), separator=separator
            )
            table = replace(table, words=by_words.words)
    return draft(table, name, drop, path.name)


def draft(
    table: ColumnTable, label: str, drop: Sequence[str], table_name: str
) -> tuple[str, tuple[str, ...]]:
    """Return a draft of the rules of a table as YAML, and notes about what the draft leaves to the user.

    Columns with text are categories, and columns of whole numbers are whole. Limits are those of the data. Columns of
    zeros and ones of which exactly one is 1 in every row become one-hot groups.
    """
    names = [name for name in table.columns if name not in (label, SPLIT_COLUMN, *drop)]
    columns: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for name in names:
        values, kinds = _cells(table, name)
        columns[name] = _column(table, name, values, kinds, notes)
    groups = _one_hot(table, [name for name in names if columns[name].get("type") == "whole"], columns)
    content = {
        "columns": columns,
        "budget": {"norm": "linf", "eps": 0.1},
        "groups": groups,
        "relations": [],
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return _HEADER.format(name=table_name, rows=len(table)) + text, tuple(notes)


def _cells(table: ColumnTable, name: str) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    place = table.features.index(name)
    return table.numbers[:, place], None if table.kinds is None else table.kinds[:, place]


def _column(
    table: ColumnTable,
    name: str,
    values: NDArray[np.float32],
    kinds: NDArray[np.uint8] | None,
    notes: list[str],
) -> dict[str, Any]:
    """Return the drafted properties of a column."""
    missing = {"missing": True} if kinds is not None and bool((kinds == MISSING).any()) else {}
    if kinds is not None and bool((kinds == TEXT).any()):
        words = sorted(word for word in table.words[name].words if word.strip())
        if len(words) > min(MOST_VALUES, len(table) / 2):
            raise UsageError(
                f"the column {name!r} of {table.name} has {len(words):,} different texts in {len(table):,} rows, so it "
                "is no category",
                Remedy("drop", (name,), repeated=True),
            )
        return {"type": "category", "values": words, **missing}
    present = values[~np.isnan(values)]
    if not len(present):
        notes.append(f"the column {name!r} has no values, and cannot change")
        return {"change": "none", **missing}
    low, high = float(present.min()), float(present.max())
    whole = bool((present == np.round(present)).all())
    limits: dict[str, Any] = {"min": _short(low), "max": _short(high)}
    if low == high:
        notes.append(f"the column {name!r} is {low:g} in every row, and cannot change")
        return {"type": "whole" if whole else "number", **limits, "change": "none", **missing}
    return {"type": "whole" if whole else "number", **limits, **missing}


def _short(value: float) -> int | float:
    """Return a float32 as the shortest number that is rounded to it."""
    return int(value) if value == int(value) and abs(value) < 2**53 else float(str(np.float32(value)))


def _one_hot(table: ColumnTable, names: Sequence[str], columns: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return adjacent columns of zeros and ones of which exactly one is 1 in every row."""
    binary = [name for name in names if (columns[name].get("min"), columns[name].get("max")) == (0, 1)]
    places = {name: table.features.index(name) for name in binary[:_GROUPED]}
    groups: list[list[str]] = []
    start = 0
    while start < len(places):
        names_left = list(places)[start:]
        total = np.cumsum([table.numbers[:, places[name]] for name in names_left], axis=0)
        if np.isnan(total).any():
            total = np.nan_to_num(total, nan=2.0)
        sizes = np.flatnonzero((total == 1).all(1)) + 1
        size = next((int(n) for n in sizes if n > 1), 0)
        if size:
            groups.append(names_left[:size])
        start += max(size, 1)
    return groups
