"""Parser of VNN-LIB 1.0: the part of SMT-LIB that the queries of VNN-COMP use.

Declarations of the inputs X_0, X_1, … and outputs Y_0, Y_1, … of one network, and assertions with comparisons of linear
functions, `and`, `or` and `not`. Demarchi, Guidotti, Pulina, Tacchella, "Supporting Standardization of Neural Networks
Verification with VNNLIB and CoCoNet", FoMLAS 2023. The time is linear in the size of the file.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from holdfast.certifiers.vnnlib.formulas import (
    Affine,
    AtMostZero,
    Conjunction,
    Disjunction,
    Formula,
    alternatives,
    compared,
)
from holdfast.certifiers.vnnlib.query import DeclaredNetwork, Query, Variable
from holdfast.certifiers.vnnlib.tokens import mistake, tokens
from holdfast.core.errors import TargetError
from holdfast.core.spelling import suggestion

_NAME = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_COMPARISONS = ("<=", "<", ">=", ">", "=", "==", "!=", "distinct")
_ARITHMETIC = ("+", "-", "*", "/")
_CONNECTIVES = ("and", "or", "not", "=>")
_IGNORED = ("set-logic", "set-info", "set-option", "check-sat", "get-model", "get-value", "exit")
_DECLARATIONS = ("declare-const", "declare-fun")
_MOST_PRODUCTS = 2**24
"""largest number of terms of all sums, so that nested sums do not take quadratic time"""

_Term = Affine | AtMostZero | Conjunction | Disjunction | str


@dataclass
class _Open:
    """An expression whose parenthesis is not closed yet."""

    offset: int
    operator: str = ""
    terms: list[_Term] = field(default_factory=list)
    """values of the arguments: functions, formulas, or plain words in a declaration"""


class _Parser:
    def __init__(self, text: str, path: str) -> None:
        self.text, self.path = text, path
        self.keys: dict[str, int] = {}
        self.assertions: list[Formula] = []
        self.products = 0

    def query(self) -> Query:
        """Return the query of the whole text."""
        stack: list[_Open] = []
        for word, offset in tokens(self.text, self.path):
            if word == "(":
                if stack and not stack[-1].operator:
                    raise self.mistake(offset, "an operator was expected before this parenthesis")
                stack.append(_Open(offset))
            elif word == ")":
                closed = stack.pop()
                value = self._closed(closed, outermost=not stack)
                if stack and value is not None:
                    stack[-1].terms.append(value)
            elif not stack:
                raise self.mistake(offset, f"{word!r} is outside of a command such as (assert …)")
            elif not stack[-1].operator:
                stack[-1].operator = word
                self._refuse_operator(word, offset, len(stack))
            else:
                stack[-1].terms.append(self._word(word, offset, stack[-1]))
        return self._finished()

    def mistake(self, offset: int, what: str) -> TargetError:
        """Return the error for a mistake at an offset."""
        return mistake(self.text, offset, self.path, what)

    def _refuse_operator(self, word: str, offset: int, depth: int) -> None:
        commands = ("assert", *_DECLARATIONS, *_IGNORED)
        known = commands if depth == 1 else (*_COMPARISONS, *_ARITHMETIC, *_CONNECTIVES)
        if depth > 1 and word in commands:
            raise self.mistake(offset, f"{word!r} is a command, which cannot be inside another one")
        if word not in known:
            what = "a command" if depth == 1 else "an operator"
            raise self.mistake(offset, f"{word!r} is not {what} of VNN-LIB 1.0{_suggested(word, known)}")

    def _word(self, word: str, offset: int, inside: _Open) -> _Term:
        if inside.operator in (*_DECLARATIONS, *_IGNORED):
            return word
        if word in self.keys:
            return Affine({self.keys[word]: 1.0})
        if _NUMBER.fullmatch(word):
            number = float(word)
            if math.isinf(number):
                raise self.mistake(offset, f"{word} is too large for a number of 64 bits")
            return Affine({}, number)
        if word in ("true", "false"):
            return Conjunction(()) if word == "true" else Disjunction(())
        raise self.mistake(
            offset, f"{word!r} is neither a number nor a declared variable{_suggested(word, self.keys)}"
        )

    def _closed(self, frame: _Open, *, outermost: bool) -> _Term | None:
        terms, operator, at = frame.terms, frame.operator, frame.offset
        if outermost:
            if operator == "assert":
                if len(terms) != 1 or isinstance(terms[0], Affine | str):
                    raise self.mistake(at, "assert has one condition, such as (assert (<= X_0 0.5))")
                self.assertions.append(terms[0])
            elif operator in _DECLARATIONS:
                self._declare(terms, at)
            elif not operator:
                raise self.mistake(at, "() is not a command")
            return None
        if not operator:  # () in a declare-fun
            return "()"
        if operator in _ARITHMETIC:
            return self._arithmetic(operator, terms, at)
        if operator in _CONNECTIVES:
            return self._connected(operator, terms, at)
        values = self._functions(operator, terms, at)
        if len(values) != 2:
            raise self.mistake(at, f"{operator} compares 2 values; {len(values)} are given")
        return compared("!=" if operator == "distinct" else operator, *values)

    def _declare(self, terms: list[_Term], at: int) -> None:
        words = [term for term in terms if isinstance(term, str) and term != "()"]
        if len(words) != 2 or len(words) < len(terms) - 1:
            raise self.mistake(at, "a declaration has a name and a type, such as (declare-const X_0 Real)")
        name, kind = words
        if not _NAME.fullmatch(name):
            raise self.mistake(
                at,
                f"{name!r} is declared; X_0, X_1, … for inputs and Y_0, Y_1, … for outputs were expected",
            )
        if kind.lower() != "real":
            raise self.mistake(at, f"{name} has the type {kind!r}; Real was expected")
        if name in self.keys:
            raise self.mistake(at, f"{name} is declared twice")
        index = int(name[2:])
        self.keys[name] = index if name[0] == "X" else -1 - index

    def _functions(self, operator: str, terms: list[_Term], at: int) -> list[Affine]:
        values = [term for term in terms if isinstance(term, Affine)]
        if len(values) < len(terms):
            raise self.mistake(at, f"{operator} has numbers and variables as arguments, not conditions")
        return values

    def _arithmetic(self, operator: str, terms: list[_Term], at: int) -> Affine:
        values = self._functions(operator, terms, at)
        if not values or (operator == "/" and len(values) != 2):
            raise self.mistake(at, f"{operator} has too few arguments, or too many")
        self.products += sum(len(value.coefficients) for value in values)
        if self.products > _MOST_PRODUCTS:
            raise self.mistake(at, f"sums have more than {_MOST_PRODUCTS:,} terms up to here")
        if operator in ("+", "-"):
            return _sum(values, -1.0 if operator == "-" else 1.0)
        if operator == "/":
            if values[1].coefficients or not values[1].constant:
                raise self.mistake(at, "only a division by a number other than 0 is linear")
            return values[0].times(1 / values[1].constant)
        varying = [value for value in values if value.coefficients]
        if len(varying) > 1:
            raise self.mistake(at, "a product of two variables is not linear, and is not supported")
        factor = math.prod(value.constant for value in values if not value.coefficients)
        return varying[0].times(factor) if varying else Affine({}, factor)

    def _connected(self, operator: str, terms: list[_Term], at: int) -> Formula:
        parts = [term for term in terms if isinstance(term, AtMostZero | Conjunction | Disjunction)]
        if len(parts) < len(terms) or not parts:
            raise self.mistake(at, f"{operator} has conditions as arguments, such as (<= X_0 0.5)")
        if operator == "not":
            if len(parts) != 1:
                raise self.mistake(at, f"not has one argument; {len(parts)} are given")
            return _negated(parts[0])
        if operator == "=>":
            return Disjunction((*(_negated(part) for part in parts[:-1]), parts[-1]))
        return Conjunction(tuple(parts)) if operator == "and" else Disjunction(tuple(parts))

    def _finished(self) -> Query:
        sizes = {}
        for letter, what in (("X", "input"), ("Y", "output")):
            indices = {int(name[2:]) for name in self.keys if name[0] == letter}
            size = len(indices)
            if not indices:
                raise TargetError(f"{self.path!r} declares no {what} {letter}_0; is it a query of VNN-LIB?")
            if max(indices) != size - 1:
                missing = next(i for i in range(size) if i not in indices)
                raise TargetError(
                    f"{self.path!r} declares {letter}_{max(indices)}, but not {letter}_{missing}; "
                    f"all {what}s from 0 on must be declared"
                )
            sizes[letter] = size
        x, y = (Variable(letter, "real", (sizes[letter],)) for letter in "XY")
        return Query("1.0", (DeclaredNetwork("", x, y),), alternatives(self.assertions))


def _suggested(word: str, known: Iterable[str]) -> str:
    nearest = suggestion(word, known)
    return f"; {nearest}" if nearest else ""


def _sum(values: list[Affine], sign: float) -> Affine:
    """The sum of functions, or the first one minus the others; a single one is negated by `sign`."""
    if len(values) == 1:
        return values[0].times(sign)
    coefficients, constant = dict(values[0].coefficients), values[0].constant
    for value in values[1:]:
        constant += sign * value.constant
        for key, factor in value.coefficients.items():
            coefficients[key] = coefficients.get(key, 0.0) + sign * factor
    return Affine(coefficients, constant)


def _negated(formula: Formula) -> Formula:
    """The negation of a formula, whose depth is limited."""
    if isinstance(formula, AtMostZero):
        return AtMostZero(formula.function.times(-1.0), not formula.strict)
    parts = tuple(_negated(part) for part in formula.parts)
    return Disjunction(parts) if isinstance(formula, Conjunction) else Conjunction(parts)


def query_of_version_1(text: str, path: str) -> Query:
    """Return the query in the text of a file of VNN-LIB 1.0. Raises `TargetError` with line and column of a mistake."""
    return _Parser(text, path).query()
