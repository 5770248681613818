"""Reads VNN-LIB files of the versions 1.0 and 2, with limits of size and depth."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any

from holdfast.certifiers.vnnlib.query import (
    Affine,
    AtMostZero,
    Conjunction,
    DeclaredNetwork,
    Disjunction,
    Formula,
    Query,
    Variable,
    alternatives,
    compared,
    refuse_unbounded_inputs,
)
from holdfast.core.errors import TargetError, importing
from holdfast.core.names import suggestion
from holdfast.io.files import megabytes, opened

MOST_DEPTH = 128
"""largest number of parentheses that may be open at once"""

_TOKEN = re.compile(r"[ \t\r\n\f\v]+|;[^\n]*|([()])|(\"(?:[^\"\\]|\\.)*\"|[^\s()\";]+)")


def tokens(text: str, path: str) -> Iterator[tuple[str, int]]:
    """Yield parentheses and words with their offsets in the text. Blanks and comments are left out.

    Raises `TargetError` for a parenthesis that is not closed or not opened, and for too many open ones.
    """
    depth, position = 0, 0
    for match in _TOKEN.finditer(text):
        if match.start() != position:
            break
        position = match.end()
        word = match[1] or match[2]
        if word is None:
            continue
        if word == "(":
            depth += 1
            if depth > MOST_DEPTH:
                raise mistake(text, match.start(), path, f"more than {MOST_DEPTH} parentheses are open here")
        elif word == ")":
            depth -= 1
            if depth < 0:
                raise mistake(text, match.start(), path, "this parenthesis closes nothing")
        yield word, match.start()
    if position < len(text):
        raise mistake(text, position, path, f"{text[position]!r} is not expected here")
    if depth:
        raise mistake(text, len(text), path, f"the file ends before {depth} parentheses are closed")


def mistake(text: str, offset: int, path: str, what: str) -> TargetError:
    """Return the error for a mistake at an offset of a text, with its line and column."""
    line = text.count("\n", 0, offset) + 1
    column = offset - (text.rfind("\n", 0, offset) + 1) + 1
    return TargetError(f"{path!r}, line {line}, column {column}: {what}")


def first_command(text: str, path: str) -> str:
    """Return the first word of a file, such as `declare-const`. Raises `TargetError` if there is none."""
    for word, offset in tokens(text, path):
        if word == ")":
            raise mistake(text, offset, path, "a command such as (declare-const X_0 Real) was expected")
        if word != "(":
            return word
    raise TargetError(f"{path!r} contains no command; (declare-const X_0 Real) was expected")


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
                at, f"{name!r} is declared; X_0, X_1, … for inputs and Y_0, Y_1, … for outputs were expected"
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


MOST_VALUES = 2**24
"""largest number of values of all inputs and outputs of a query"""
_COMPARISON_KINDS = {
    "GreaterThan": ">",
    "GreaterEqual": ">=",
    "LessThan": "<",
    "LessEqual": "<=",
    "Equal": "==",
    "NotEqual": "!=",
}
_SPOT = re.compile(r"line (\d+), column (\d+): ?(.*)", re.DOTALL)


def query_of_version_2(text: str, path: str) -> Query:
    """Return the query in the text of a file of VNN-LIB 2.

    Raises `TargetError` for a mistake and for a query that is not supported, and `UsageError` if the package `vnnlib`
    is missing.
    """
    parser = importing("vnnlib", "a query of VNN-LIB 2 is read with packages that are missing", "vnnlib")
    written = [
        token for token, _ in tokens(text, path)
    ]  # limits the depth, on which the package is recursive
    version, types = _declared(written)
    try:
        parsed = parser.parse_query_string(text)
    except Exception as error:
        if not isinstance(error, parser.VNNLibException):
            raise
        raise TargetError(f"{path!r}{_reason(str(error))}") from error
    networks = tuple(_network(network, types, path) for network in parsed.networks)
    if sum(network.input.size + network.output.size for network in networks) > MOST_VALUES:
        raise TargetError(f"{path!r} declares more than {MOST_VALUES:,} values; use smaller networks")
    assertions = [_formula(assertion.expr, _Keys(networks, path)) for assertion in parsed.assertions]
    return Query(version, networks, alternatives(assertions))


def _declared(written: list[str]) -> tuple[str, dict[str, str]]:
    """The version, and the element types of the variables by name, which the package does not return for `real`."""
    version, types = "2.0", {}
    for i, (word, name) in enumerate(pairwise(written)):
        if word == "vnnlib-version":
            version = name.strip("<>")
        elif word in ("declare-input", "declare-output", "declare-hidden") and i + 2 < len(written):
            types[name] = re.split(r"\[", written[i + 2])[0].lower()
    return version, types


def _reason(message: str) -> str:
    """The part of an error of the package that describes the mistake, after the name of the file."""
    try:
        first = json.loads(message)["errors"][0]
        return f", line {first['line']}: {first['message']} {first['offendingSymbol']}. {first['hint']}"
    except (ValueError, LookupError, TypeError):
        spot = _SPOT.search(message)
    if spot is None:
        return f" is no query of VNN-LIB 2: {message[:300]}"
    return f", line {spot[1]}, column {spot[2]}: syntax error at {spot[3][:200]}"


def _network(network: Any, types: dict[str, str], path: str) -> DeclaredNetwork:
    if network.hidden:
        raise TargetError(
            f"{path!r} declares the hidden node {network.hidden[0].name} of {network.name}, which is not supported; "
            "export the network with this node as its output"
        )
    if len(network.inputs) != 1 or len(network.outputs) != 1:
        raise TargetError(
            f"{path!r} declares {len(network.inputs)} inputs and {len(network.outputs)} outputs of {network.name}; one "
            "of each is supported"
        )
    (x,), (y,) = network.inputs, network.outputs
    return DeclaredNetwork(
        network.name,
        Variable(x.name, types[x.name], tuple(x.shape)),
        Variable(y.name, types[y.name], tuple(y.shape)),
        network.equal_to,
        network.isometric_to,
    )


class _Keys:
    """The keys of the elements of all variables of a query."""

    def __init__(self, networks: tuple[DeclaredNetwork, ...], path: str) -> None:
        self.path = path
        self.starts: dict[str, tuple[int, bool, tuple[int, ...]]] = {}
        inputs = outputs = 0
        for network in networks:
            self.starts[network.input.name] = (inputs, True, network.input.shape)
            self.starts[network.output.name] = (outputs, False, network.output.shape)
            inputs += network.input.size
            outputs += network.output.size

    def of(self, variable: Any) -> int:
        """Return the key of an element of a variable."""
        start, of_input, shape = self.starts[variable.name]
        index = 0
        for place, size in zip(variable.indices, shape, strict=True):
            index = index * size + place
        return start + index if of_input else -1 - (start + index)


def _formula(expression: Any, keys: _Keys) -> Formula:
    kind = type(expression).__name__
    if kind == "And":
        return Conjunction(tuple(_formula(each, keys) for each in expression.args))
    if kind == "Or":
        return Disjunction(tuple(_formula(each, keys) for each in expression.args))
    return compared(_COMPARISON_KINDS[kind], _function(expression.lhs, keys), _function(expression.rhs, keys))


def _function(expression: Any, keys: _Keys) -> Affine:
    kind = type(expression).__name__
    if kind == "Var":
        return Affine({keys.of(expression): 1.0})
    if kind in ("Float", "Int", "IntExpr", "Literal"):
        return Affine({}, float(expression.lexeme))
    if kind == "Negate":
        return _function(expression.expr, keys).times(-1.0)
    if kind == "Minus":
        total = _function(expression.head, keys)
        for each in expression.rest:
            total = total.plus(_function(each, keys), -1.0)
        return total
    total, *others = (_function(each, keys) for each in expression.args)
    for other in others:
        if kind == "Plus":
            total = total.plus(other)
        elif other.coefficients and total.coefficients:
            raise TargetError(
                f"{keys.path!r} contains the product {str(expression)[:100]}, which is not linear; only linear "
                "constraints are supported"
            )
        else:
            total = other.times(total.constant) if other.coefficients else total.times(other.constant)
    return total


MAX_BYTES_OF_QUERY = 512_000_000
"""largest number of bytes of a query after decompression"""


def read_query(path: Path) -> Query:
    """Return the query in a VNN-LIB file, which may be compressed with gzip (`.vnnlib.gz`).

    Raises `TargetError` for a file that is too large, damaged or no query, with line and column of the mistake, and
    `UsageError` if a package is missing that reads version 2.
    """
    text = _text(path)
    if first_command(text, str(path)) == "vnnlib-version":
        query = query_of_version_2(text, str(path))
    else:
        query = _Parser(text, str(path)).query()
    refuse_unbounded_inputs(query, str(path))
    return query


def _text(path: Path) -> str:
    try:
        with opened(path, "query") as file:
            text: gzip.GzipFile | BufferedReader = (
                gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            )
            content = text.read(MAX_BYTES_OF_QUERY + 1)
        if len(content) > MAX_BYTES_OF_QUERY:
            raise TargetError(
                f"{str(path)!r} has more than {megabytes(MAX_BYTES_OF_QUERY)}; split it into several queries"
            )
        return content.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TargetError(f"{str(path)!r} is no VNN-LIB file: {error}; a text file was expected") from error
