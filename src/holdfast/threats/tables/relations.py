"""Relations between the columns of a table, such as `n_failed <= n_logins`, as expression trees.

A relation is a comparison of two expressions with `<=`, `<`, `==`, `>=` or `>`, comparisons that are joined by `and`
or `or`, or `if A then B`. Expressions have column names, numbers, `+ - * /`, `min`, `max` and `abs`. A column whose
name is no identifier is written in quotes, as in `"days past due" >= 0`. Nothing is executed: the text is parsed, and
only these parts are accepted.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from holdfast.core.errors import UsageError

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
