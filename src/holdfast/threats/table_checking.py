"""Judges rows of a table by its rules: the size of a change, and which rules a row violates.

The module decides which adversarial rows count. It shares no code with the repair of rows in `tables.py`: it evaluates
the relations with NumPy in double precision, row by column, and changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    Relation,
    Rules,
)

Rows = NDArray[np.float64]
Truth = NDArray[np.bool_]

_ROUNDING = 1e-6
"""Relative amount by which a side of `<=` may exceed the other, because inputs are float32."""
_EQUAL = 1e-5
"""Largest relative difference of values that count as equal; sums of several float32 numbers."""
_OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
}


def violations(rules: Rules, x: Rows) -> dict[str, Truth]:
    """Return for each rule of a row alone, by its text, which rows (n, columns) violate it.

    Missing values violate nothing but a rule that forbids them, and relations that contain them count as satisfied. A
    relation with a division by zero is violated.
    """
    violated: dict[str, Truth] = {}
    for place, (name, column) in enumerate(rules.columns.items()):
        values = x[:, place]
        is_missing = np.isnan(values)
        if not column.missing:
            violated[f"{name} is not missing"] = is_missing
        low, high = rules.low(name), rules.high(name)
        below, above = values < low - _ROUNDING * abs(low), values > high + _ROUNDING * abs(high)
        violated[f"{name} is from {low:g} to {high:g}"] = below | above
        if column.type != "number":
            violated[f"{name} is {'whole' if column.type == 'whole' else 'a category'}"] = (
                values != np.round(values)
            ) & ~is_missing
    for group in rules.groups:
        members = x[:, [rules.places[name] for name in group]]
        one_hot = ((members == 1).sum(1) == 1) & ((members == 0).sum(1) == len(group) - 1)
        violated[f"one of {', '.join(group)} is 1"] = ~one_hot & ~np.isnan(members).any(1)
    for relation in rules.relations:
        violated[relation.text] = ~_holds(relation.condition, _by_name(rules, x))
    return violated


def distances(rules: Rules, x_adv: Rows, x: Rows) -> Rows:
    """Return the size of the change of each row in the budget, or infinity for a row that is no valid change of its
    clean row.

    A rule that the clean row violates is not applied to its change, except that a limit of a column is extended to the
    clean value. A budget counts a change of a category, or of a one-hot group, as its cost.
    """
    clean = violations(rules, x)
    forbidden = np.zeros(len(x), bool)
    for text, violated in violations(rules, x_adv).items():
        forbidden |= violated & ~clean[text]
    sizes = []
    grouped = {name for group in rules.groups for name in group}
    for place, (name, column) in enumerate(rules.columns.items()):
        before, after = x[:, place], x_adv[:, place]
        is_missing = np.isnan(before)
        forbidden |= is_missing != np.isnan(after)
        change = np.where(is_missing, 0.0, after - before)
        low, high = rules.low(name), rules.high(name)
        forbidden |= after < np.minimum(low - _ROUNDING * abs(low), before)
        forbidden |= after > np.maximum(high + _ROUNDING * abs(high), before)
        if not rules.mutable(name):
            forbidden |= change != 0
        forbidden |= (change < 0) if column.change == "up" else (change > 0) & (column.change == "down")
        if name not in grouped:
            sizes.append(
                (change != 0) / rules.unit(name)
                if column.type == "category"
                else np.abs(change) / rules.unit(name)
            )
    for group in rules.groups:
        places = [rules.places[name] for name in group]
        cost = max(rules.columns[name].cost for name in group)
        sizes.append((x_adv[:, places] != x[:, places]).any(1) * cost)
    return np.where(forbidden, np.inf, _combined(rules, np.stack(sizes, 1)))


def _combined(rules: Rules, sizes: Rows) -> Rows:
    match rules.budget.norm:
        case "linf":
            return np.asarray(sizes.max(1))
        case "l2":
            return np.asarray(np.sqrt((sizes**2).sum(1)))
        case "l1":
            return np.asarray(sizes.sum(1))
        case "l0":
            return np.asarray((sizes > 0).sum(1), np.float64)


def _by_name(rules: Rules, x: Rows) -> Callable[[str], Rows]:
    return lambda name: x[:, rules.places[name]]


def _holds(condition: Condition, values: Callable[[str], Rows]) -> Truth:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        match condition:
            case All(parts):
                return np.asarray(np.logical_and.reduce([_holds(part, values) for part in parts]))
            case Either(parts):
                return np.asarray(np.logical_or.reduce([_holds(part, values) for part in parts]))
            case Comparison(order, first, second):
                left, right = np.broadcast_arrays(_value(first, values), _value(second, values))
                size = np.maximum(_size(first, values), _size(second, values))
                # A quotient by zero violates a relation: an attacker could otherwise escape it.
                is_missing = _missing(first, values) | _missing(second, values)
                if order == "<":
                    return np.asarray((left < right) | is_missing)
                if order == "<=":
                    return np.asarray((left <= right + _ROUNDING * size) | is_missing)
                return np.asarray((np.abs(left - right) <= _EQUAL * size) | is_missing)


def _size(expression: Expression, values: Callable[[str], Rows]) -> Rows:
    """Return the largest absolute value of an expression and of its terms, to which rounding errors are relative."""
    size = np.nan_to_num(np.abs(_value(expression, values)), nan=0.0, posinf=0.0)
    match expression:
        case Arithmetic("+" | "-", left, right):
            return np.asarray(np.maximum(size, np.maximum(_size(left, values), _size(right, values))))
        case Call(_, arguments):
            for argument in arguments:
                size = np.maximum(size, _size(argument, values))
    return np.asarray(size)


def _missing(expression: Expression, values: Callable[[str], Rows]) -> Truth:
    """Return for which rows a column in an expression has no value."""
    match expression:
        case Number():
            return np.zeros(1, dtype=np.bool_)
        case ColumnValue(name):
            return np.asarray(np.isnan(values(name)))
        case Arithmetic(_, left, right):
            return np.asarray(_missing(left, values) | _missing(right, values))
        case Call(_, arguments):
            return np.asarray(
                np.logical_or.reduce(np.broadcast_arrays(*(_missing(part, values) for part in arguments)))
            )


def _value(expression: Expression, values: Callable[[str], Rows]) -> Rows:
    match expression:
        case Number(value):
            return np.asarray(value)
        case ColumnValue(name):
            return values(name)
        case Arithmetic(operator, left, right):
            return np.asarray(_OPERATORS[operator](_value(left, values), _value(right, values)))
        case Call(function, arguments):
            parts = [_value(argument, values) for argument in arguments]
            if function == "abs":
                return np.asarray(np.abs(parts[0]))
            return np.asarray(
                (np.minimum if function == "min" else np.maximum).reduce(np.broadcast_arrays(*parts))
            )


@dataclass(frozen=True)
class RuleCheck:
    """Result of comparing the rules of a table with its data."""

    broken: Mapping[str, int]
    """number of rows that violate each rule, for rules that some row violates"""
    idle: tuple[str, ...]
    """relations that no row inside the limits of the columns can violate"""
    fixed: tuple[str, ...]
    """columns that may change, whose smallest change is larger than the budget"""

    def notes(self, rows: int) -> tuple[str, ...]:
        """Return a sentence for each finding."""
        broken = (
            f"{count:,} of {rows:,} clean rows violate the rule {text!r}, which is not applied to changes of these rows"
            for text, count in self.broken.items()
        )
        idle = (
            f"the relation {text!r} holds for every row within the limits of the columns"
            for text in self.idle
        )
        return (*broken, *idle, *([self._fixed_columns()] if self.fixed else []))

    def _fixed_columns(self) -> str:
        count = "1 column" if len(self.fixed) == 1 else f"{len(self.fixed)} columns"
        more = " …" if len(self.fixed) > 6 else ""
        return (
            f"{count} cannot change, because the smallest change exceeds the budget: "
            f"{', '.join(self.fixed[:6])}{more}; a lower cost would allow it"
        )


def checked(rules: Rules, x: Rows) -> RuleCheck:
    """Compare rules with the clean rows `x` (n, columns)."""
    counts = {text: int(violated.sum()) for text, violated in violations(rules, x).items()}
    idle = tuple(relation.text for relation in rules.relations if _always_holds(relation, rules))
    fixed = tuple(
        name
        for name, column in rules.columns.items()
        if rules.mutable(name) and column.type != "number" and _smallest(rules, name) > rules.budget.eps
    )
    return RuleCheck({text: count for text, count in counts.items() if count}, idle, fixed)


def _smallest(rules: Rules, name: str) -> float:
    """Return the size of the smallest change of a whole number or of a category in the budget."""
    grouped = any(name in group for group in rules.groups)
    if rules.budget.norm == "l0":
        return 1.0
    return rules.columns[name].cost if grouped else 1 / rules.unit(name)


Interval = tuple[float, float]


def _always_holds(relation: Relation, rules: Rules) -> bool:
    return _certain(relation.condition, lambda name: (rules.low(name), rules.high(name)))


def _certain(condition: Condition, limits: Callable[[str], Interval]) -> bool:
    """Return whether intervals show that a condition holds for all values within the limits."""
    match condition:
        case All(parts):
            return all(_certain(part, limits) for part in parts)
        case Either(parts):
            return any(_certain(part, limits) for part in parts)
        case Comparison(order, first, second):
            left, right = _interval(first, limits), _interval(second, limits)
            if order == "==":
                return left == right and left[0] == left[1]
            return left[1] < right[0] if order == "<" else left[1] <= right[0]


def _interval(expression: Expression, limits: Callable[[str], Interval]) -> Interval:
    match expression:
        case Number(value):
            return value, value
        case ColumnValue(name):
            return limits(name)
        case Arithmetic(operator, first, second):
            return _combined_interval(operator, _interval(first, limits), _interval(second, limits))
        case Call(function, arguments):
            parts = [_interval(argument, limits) for argument in arguments]
            if function == "abs":
                ((low, high),) = parts
                return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
            choose: Callable[[Sequence[float]], float] = min if function == "min" else max
            return choose([low for low, _ in parts]), choose([high for _, high in parts])


def _combined_interval(operator: str, left: Interval, right: Interval) -> Interval:
    match operator:
        case "+":
            return left[0] + right[0], left[1] + right[1]
        case "-":
            return left[0] - right[1], left[1] - right[0]
        case "*":
            products = [a * b for a in left for b in right]
            return min(products), max(products)
        case _:
            if right[0] <= 0 <= right[1]:
                return -np.inf, np.inf
            quotients = [a / b for a in left for b in right]
            return min(quotients), max(quotients)
