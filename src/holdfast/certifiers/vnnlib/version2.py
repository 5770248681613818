"""Reads queries of VNN-LIB 2 with the package `vnnlib`, which parses and checks them.

Daggitt, Demarchi, et al., "The VNN-LIB standard", version 2.0, 2025.
"""

import json
import re
from itertools import pairwise
from types import ModuleType
from typing import Any

from holdfast.certifiers.vnnlib.formulas import (
    Affine,
    Conjunction,
    Disjunction,
    Formula,
    alternatives,
    compared,
)
from holdfast.certifiers.vnnlib.query import DeclaredNetwork, Query, Variable
from holdfast.certifiers.vnnlib.tokens import tokens
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Install

MOST_VALUES = 2**24
"""largest number of values of all inputs and outputs of a query"""
_COMPARISONS = {
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
    parser = _package()
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


def _package() -> ModuleType:
    try:
        import vnnlib
    except ImportError as error:
        raise UsageError(
            "a query of VNN-LIB 2 is read with packages that are missing", Install("vnnlib")
        ) from error
    module: ModuleType = vnnlib
    return module


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
    return compared(_COMPARISONS[kind], _function(expression.lhs, keys), _function(expression.rhs, keys))


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
