"""The rules of a table: for each column what values are valid and how an attacker may change them, and relations
between columns, such as `n_failed <= n_logins`, as expression trees.
"""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from annotated_types import Gt

from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.names import suggestion

Operator = Literal["+", "-", "*", "/"]
Function = Literal["min", "max", "abs"]
Order = Literal["<=", "<", "=="]

_OPERATORS: dict[type[ast.operator], Operator] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_ARGUMENTS: dict[Function, tuple[int, int]] = {"min": (2, 8), "max": (2, 8), "abs": (1, 1)}
"""Smallest and largest number of arguments of each function."""
_IMPLICATION = re.compile(r"\s*if\s(?P<condition>.*)\sthen\s(?P<consequence>.*)", re.DOTALL)
_LONGEST, _DEEPEST = 2000, 50
"""Largest number of characters of a relation, and largest depth of its tree."""
_LARGEST = 1e30
"""Largest absolute value of a number in a relation."""


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True)
class ColumnValue:
    """The value of a column."""

    name: str


@dataclass(frozen=True)
class Arithmetic:
    """A sum, difference, product or quotient of two expressions."""

    operator: Operator
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True)
class Call:
    """The minimum, maximum or absolute value of expressions."""

    function: Function
    arguments: tuple["Expression", ...]


Expression = Number | ColumnValue | Arithmetic | Call


@dataclass(frozen=True)
class Comparison:
    """Comparison of two expressions. Those with `>=` and `>` are stored with exchanged sides."""

    order: Order
    left: Expression
    right: Expression


@dataclass(frozen=True)
class All:
    """Condition that holds if all its parts hold."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True)
class Either:
    """Condition that holds if one of its parts holds."""

    parts: tuple["Condition", ...]


Condition = Comparison | All | Either


@dataclass(frozen=True)
class Relation:
    """A condition with the text from which it was parsed."""

    text: str
    condition: Condition

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns in the relation, in the order of their first use."""
        return tuple(dict.fromkeys(columns_of(self.condition)))


def parse_relation(text: str) -> Relation:
    """Return the relation in a text such as `n_failed <= n_logins`. Raises `UsageError` for other texts."""
    if len(text) > _LONGEST:
        raise UsageError(
            f"the relation {text[:60]!r} … has {len(text):,} characters; at most {_LONGEST:,} were expected"
        )
    implication = _IMPLICATION.fullmatch(text)
    if implication is None:
        return Relation(text, _parsed(text, text))
    condition = _negated(_parsed(implication["condition"], text))
    return Relation(text, Either((condition, _parsed(implication["consequence"], text))))


def _parsed(part: str, text: str) -> Condition:
    try:
        tree = ast.parse(part.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refusal(text, "it cannot be parsed") from None
    return _condition(tree, text, 0)


def _refusal(text: str, reason: str) -> UsageError:
    return UsageError(
        f"the relation {text!r} is not supported: {reason}; expected comparisons of columns, numbers, + - * /, "
        "min, max and abs, joined by and, or, or written as if A then B, as in if n_failed > 0 then n_logins > 0"
    )


def _condition(node: ast.expr, text: str, depth: int) -> Condition:
    if depth > _DEEPEST:
        raise _refusal(text, "it is nested too deeply")
    if isinstance(node, ast.BoolOp):
        parts = tuple(_condition(value, text, depth + 1) for value in node.values)
        return All(parts) if isinstance(node.op, ast.And) else Either(parts)
    if not isinstance(node, ast.Compare):
        raise _refusal(text, "a comparison is missing")
    sides = [_expression(side, text, depth + 1) for side in (node.left, *node.comparators)]
    comparisons = tuple(
        _comparison(operator, left, right, text)
        for operator, left, right in zip(node.ops, sides, sides[1:], strict=False)
    )
    return comparisons[0] if len(comparisons) == 1 else All(comparisons)


def _comparison(operator: ast.cmpop, left: Expression, right: Expression, text: str) -> Comparison:
    match operator:
        case ast.LtE():
            return Comparison("<=", left, right)
        case ast.Lt():
            return Comparison("<", left, right)
        case ast.GtE():
            return Comparison("<=", right, left)
        case ast.Gt():
            return Comparison("<", right, left)
        case ast.Eq():
            return Comparison("==", left, right)
        case _:
            raise _refusal(text, "it has another comparison than <=, <, ==, >= and >")


def _expression(node: ast.expr, text: str, depth: int) -> Expression:
    if depth > _DEEPEST:
        raise _refusal(text, "it is nested too deeply")
    match node:
        case ast.Constant(value=bool()):
            raise _refusal(text, "True and False are no numbers; write 1 and 0")
        case ast.Constant(value=int() | float() as value):
            if not abs(value) <= _LARGEST:
                raise _refusal(text, f"a number is larger than {_LARGEST:g}")
            return Number(float(value))
        case ast.Constant(value=str() as name):
            return ColumnValue(name)
        case ast.Name(id=name):
            return ColumnValue(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return Arithmetic("-", Number(0.0), _expression(operand, text, depth + 1))
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            sides = (_expression(side, text, depth + 1) for side in (left, right))
            return Arithmetic(_OPERATORS[type(operator)], *sides)
        case ast.Call(func=ast.Name(id="min" | "max" | "abs" as name), args=arguments, keywords=[]):
            function: Function = name
            least, most = _ARGUMENTS[function]
            if not least <= len(arguments) <= most:
                raise _refusal(
                    text, f"{name} has {len(arguments)} arguments, and {least} to {most} were expected"
                )
            return Call(function, tuple(_expression(argument, text, depth + 1) for argument in arguments))
        case _:
            raise _refusal(text, f"{ast.unparse(node)!r} is not an expression of columns")


def _negated(condition: Condition) -> Condition:
    match condition:
        case All(parts):
            return Either(tuple(map(_negated, parts)))
        case Either(parts):
            return All(tuple(map(_negated, parts)))
        case Comparison("<=", left, right):
            return Comparison("<", right, left)
        case Comparison("<", left, right):
            return Comparison("<=", right, left)
        case Comparison(_, left, right):
            return Either((Comparison("<", left, right), Comparison("<", right, left)))


def comparisons_in(condition: Condition) -> int:
    """Return the number of comparisons in a condition."""
    return 1 if isinstance(condition, Comparison) else sum(map(comparisons_in, condition.parts))


def columns_of(node: Condition | Expression) -> Iterator[str]:
    """Yield the names of the columns in a condition or an expression, in their order."""
    match node:
        case ColumnValue(name):
            yield name
        case Arithmetic(_, left, right) | Comparison(_, left, right):
            yield from columns_of(left)
            yield from columns_of(right)
        case Call(_, parts):
            for argument in parts:
                yield from columns_of(argument)
        case All(parts) | Either(parts):
            for part in parts:
                yield from columns_of(part)
        case Number():
            return


ColumnType = Literal["number", "whole", "category"]
Change = Literal["any", "none", "up", "down"]
BudgetNorm = Literal["linf", "l2", "l1", "l0"]

FAR = 1e30
"""Limit of a column that declares none, which only a column that never changes may do."""
MOST_VALUES = 10_000
"""Largest number of values of a category."""
MOST_RELATIONS, MOST_COMPARISONS, MOST_CHARACTERS = 1000, 2000, 100_000
"""Largest number of relations, and of their comparisons and characters in all. Each comparison is evaluated for every
candidate row of an attack.
"""

_FORM: Any = {"extra": "forbid", "coerce_numbers_to_str": True}
"""Form of the entries of a file: unknown keys are refused, and numbers may be values of a category."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """Valid values of a column, and how an attacker may change them."""

    __pydantic_config__ = _FORM

    type: ColumnType = "number"
    """number, whole number, or category"""
    min: float | None = None
    """smallest valid value"""
    max: float | None = None
    """largest valid value"""
    values: tuple[str, ...] = ()
    """valid values of a category; the model is given these strings"""
    change: Change = "any"
    """how an attacker may change the value: in any direction, not at all, only up, or only down"""
    cost: Annotated[float, Gt(0)] = 1.0
    """factor by which a change of this column counts in the budget"""
    unit: Annotated[float, Gt(0)] | None = None
    """change that counts as 1 in the budget; by default the width of the range, or 1 with `unit: value`"""
    missing: bool = False
    """whether the value may be missing; a missing value stays missing, and no other value becomes missing"""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a row an attacker may change: `norm` of the changes, each divided by its unit, is at most `eps`."""

    __pydantic_config__ = _FORM

    norm: BudgetNorm = "linf"
    """how changes of columns are combined: the largest, the Euclidean length, the sum, or the number of columns"""
    eps: Annotated[float, Gt(0)] = 0.1
    """largest combined change"""
    unit: Literal["range", "value"] = "range"
    """whether a change of a number is measured in widths of its range, or in its own unit"""


@dataclass(frozen=True)
class Rules:
    """Rules of a table. The columns are in the order of the inputs of the model."""

    columns: Mapping[str, Column]
    budget: Budget
    groups: tuple[tuple[str, ...], ...]
    """one-hot groups: in each, exactly one column is 1 and the others are 0"""
    relations: tuple[Relation, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, in the order of the inputs."""
        return tuple(self.columns)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Position of each column in the inputs."""
        return {name: place for place, name in enumerate(self.columns)}

    @cached_property
    def categories(self) -> Mapping[str, tuple[str, ...]]:
        """Values of each column that is a category."""
        return {name: column.values for name, column in self.columns.items() if column.type == "category"}

    @cached_property
    def content(self) -> str:
        """The rules as JSON, from which `rules_of` returns equal ones."""
        content = {
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "budget": asdict(self.budget),
            "groups": self.groups,
            "relations": [relation.text for relation in self.relations],
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))

    def mutable(self, name: str) -> bool:
        """Return whether an attacker may change a column."""
        column = self.columns[name]
        if column.type == "category":
            return column.change != "none" and len(column.values) > 1
        return column.change != "none" and self.low(name) < self.high(name)

    def low(self, name: str) -> float:
        """Return the smallest valid value of a column; categories have the numbers 0, 1, 2, … of their values."""
        column = self.columns[name]
        return 0.0 if column.type == "category" else -FAR if column.min is None else column.min

    def high(self, name: str) -> float:
        """Return the largest valid value of a column."""
        column = self.columns[name]
        if column.type == "category":
            return float(max(len(column.values) - 1, 0))
        return FAR if column.max is None else column.max

    def unit(self, name: str) -> float:
        """Return the change of a column that counts as 1 in the budget, its cost included."""
        column = self.columns[name]
        if column.type == "category":
            return 1 / column.cost
        width = self.high(name) - self.low(name)
        usual = 1.0 if self.budget.unit == "value" or not 0 < width < FAR else width
        return (column.unit or usual) / column.cost


def rules_of(content: str) -> Rules:
    """Return the rules in the JSON text `Rules.content`. Raises `TargetError` for any other text."""
    try:
        entries = json.loads(content)
        columns = {name: Column(**_typed(entry)) for name, entry in entries["columns"].items()}
        groups = tuple(tuple(map(str, group)) for group in entries["groups"])
        rules = Rules(
            columns,
            Budget(**_typed(entries["budget"])),
            groups,
            parsed_relations(entries["relations"], "the stored rules"),
        )
        refuse_rules(rules, "the stored rules")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TargetError(f"the stored rules of a table are damaged: {error}; repeat the run") from error
    return rules


def parsed_relations(texts: Sequence[str], source: str) -> tuple[Relation, ...]:
    """Return the relations in texts. Raises `UsageError` if there are too many of them, or of their comparisons.

    `source` is the name of the file in messages.
    """
    _refuse_many(len(texts), MOST_RELATIONS, f"{source} has", "relations")
    _refuse_many(sum(map(len, texts)), MOST_CHARACTERS, f"the relations in {source} have", "characters")
    relations = tuple(map(parse_relation, texts))
    n_comparisons = sum(comparisons_in(relation.condition) for relation in relations)
    _refuse_many(n_comparisons, MOST_COMPARISONS, f"the relations in {source} have", "comparisons")
    return relations


def _refuse_many(n: int, most: int, beginning: str, what: str) -> None:
    if n > most:
        raise UsageError(
            f"{beginning} {n:,} {what}; at most {most:,} were expected: leave out those that follow from others"
        )


def _typed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored properties of a column or of a budget, with tuples in place of lists. Raises `ValueError` for
    values of other types.
    """
    for name, value in entry.items():
        if name in _STORED and value not in _STORED[name]:
            raise ValueError(f"{name} is {value!r}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in ("cost", "eps") and not (is_number and value > 0):
            raise ValueError(f"{name} is {value!r}")
        if name in ("min", "max") and not (value is None or is_number):
            raise ValueError(f"{name} is {value!r}")
        if name == "unit" and "norm" not in entry and not (value is None or (is_number and value > 0)):
            raise ValueError(f"{name} is {value!r}")
    return {
        name: tuple(map(str, value)) if isinstance(value, list) else value for name, value in entry.items()
    }


_STORED: Mapping[str, tuple[object, ...]] = {
    "type": get_args(ColumnType),
    "change": get_args(Change),
    "missing": (True, False),
    "norm": get_args(BudgetNorm),
}
"""Accepted values of stored properties."""


def refuse_rules(rules: Rules, source: str) -> None:
    """Raise `UsageError` for rules that contradict each other, or that let an attacker change nothing.

    `source` is the name of the file in messages.
    """
    if not rules.columns:
        raise UsageError(f"{source} has no columns; list all features of the table in their order")
    for name, column in rules.columns.items():
        _refuse_column(name, column, source)
    refuse_budget(rules.budget, rules.columns, source)
    _refuse_groups(rules, source)
    for relation in rules.relations:
        _refuse_relation(relation, rules, source)
    if not any(map(rules.mutable, rules.names)):
        raise UsageError(
            f"{source} lets an attacker change no column, so nothing can be attacked; set change of a column to "
            "any, up or down, and its min below its max"
        )


def refuse_budget(budget: Budget, columns: Mapping[str, Column], source: str) -> None:
    """Raise `UsageError` for a budget that is not above 0, or that does not fit the costs of the columns."""
    if not 0 < budget.eps < math.inf:
        raise UsageError(f"{source}: eps of the budget is {budget.eps}; a finite number above 0 was expected")
    if budget.norm != "l0":
        return
    if budget.eps % 1:
        raise UsageError(
            f"{source}: eps of the budget is {budget.eps:g}; l0 counts columns, so it must be whole"
        )
    for name, column in columns.items():
        if column.cost != 1:
            raise UsageError(
                f"{source}: column {name!r} has cost {column.cost:g}, and l0 counts each changed column once; leave it "
                "out, or use l1"
            )


def _refuse_column(name: str, column: Column, source: str) -> None:
    """Raise `UsageError` for a column whose declared properties contradict each other."""
    where = f"{source}: column {name!r}"
    limits = [limit for limit in (column.min, column.max) if limit is not None]
    if any(not math.isfinite(size) for size in (column.cost, column.unit or 1.0)):
        raise UsageError(
            f"{where} has cost {column.cost} and unit {column.unit}; finite numbers were expected"
        )
    if any(not math.isfinite(limit) or abs(limit) > FAR for limit in limits):
        raise UsageError(
            f"{where} has the limits {column.min} and {column.max}; finite numbers were expected"
        )
    if column.type == "category":
        if (
            not column.values
            or len(set(column.values)) != len(column.values)
            or not all(map(str.strip, column.values))
        ):
            raise UsageError(
                f"{where} is a category; its values were expected, each once, as in values: [a, b]"
            )
        if len(column.values) > MOST_VALUES:
            raise UsageError(
                f"{where} has {len(column.values):,} values; at most {MOST_VALUES:,} were expected: is it an "
                "identifier? Drop it"
            )
        if limits or column.unit is not None or column.change in ("up", "down"):
            raise UsageError(
                f"{where} is a category, which has no min, max, unit or direction; leave them out"
            )
        return
    if column.type == "whole" and len(limits) == 2 and limits[0] <= limits[1] < math.ceil(limits[0]):
        raise UsageError(
            f"{where} has no whole number from {limits[0]:g} to {limits[1]:g}; correct min and max"
        )
    if column.values:
        raise UsageError(f"{where} has values, which only a category has; set its type to category")
    if column.min is not None and column.max is not None and column.min > column.max:
        raise UsageError(f"{where} has min {column.min:g} above max {column.max:g}; exchange them")
    if column.change != "none" and len(limits) < 2:
        raise UsageError(
            f"{where} may change, and has {'one limit' if limits else 'no limits'}; give min and max, or change: none"
        )


def _refuse_groups(rules: Rules, source: str) -> None:
    seen: set[str] = set()
    for group in rules.groups:
        if len(group) < 2:
            raise UsageError(f"{source}: the group {list(group)} has one column; at least two were expected")
        for name in group:
            _refuse_unknown(name, rules, f"{source}: the group {list(group)}")
            if name in seen:
                raise UsageError(f"{source}: the column {name!r} is in two groups; it can be in one")
            seen.add(name)
            column = rules.columns[name]
            if column.type != "whole" or (rules.low(name), rules.high(name)) != (0, 1):
                raise UsageError(
                    f"{source}: the column {name!r} is in a one-hot group; expected type: whole, min: 0, max: 1"
                )
        changes = {rules.columns[name].change for name in group}
        if len(changes) > 1 or changes & {"up", "down"}:
            raise UsageError(
                f"{source}: the columns of the group {list(group)} have change: {', '.join(sorted(changes))}; one "
                "rises when another falls, so give any, or none, to all of them"
            )


def _refuse_relation(relation: Relation, rules: Rules, source: str) -> None:
    where = f"{source}: the relation {relation.text!r}"
    if not relation.columns:
        raise UsageError(f"{where} has no column")
    for name in relation.columns:
        _refuse_unknown(name, rules, where)
        if rules.columns[name].type == "category":
            raise UsageError(
                f"{where} is about {name!r}, which is a category; relations are about numbers: use one-hot columns"
            )


def _refuse_unknown(name: str, rules: Rules, where: str) -> None:
    if name not in rules.columns:
        near = suggestion(name, rules.names)
        raise UsageError(
            f"{where} has no column {name!r}{f'; {near}' if near else ' among the columns of the file'}"
        )


def refuse_other_columns(rules: Rules, columns: Sequence[str], table: str) -> None:
    """Raise `UsageError` if the features of a table are not the columns of its rules."""
    unknown = [name for name in rules.names if name not in columns]
    without = [name for name in columns if name not in rules.columns]
    if unknown:
        near = suggestion(unknown[0], columns)
        raise UsageError(
            f"the rules have the column {unknown[0]!r}, which {table} has not{f'; {near}' if near else ''}"
        )
    if without:
        raise UsageError(
            f"{table} has the column {without[0]!r}, which the rules do not list; add it, with change: none if it "
            "cannot be attacked",
            Remedy("drop", (without[0],), function="open_data", repeated=True, reason="to leave it out"),
        )
