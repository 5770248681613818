"""A query of VNN-LIB: declared networks, linear constraints, and their disjunctive normal form."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from holdfast.core.errors import TargetError

MOST_CASES = 2**17
"""largest number of cases of a query"""
MOST_PARTS = 2**23
"""largest number of bounds and constraints of all cases of a query"""


@dataclass(frozen=True)
class Affine:
    """A linear function of variables plus a constant.

    The key of an input is its index among all inputs of the query, and the key of output j is -1 - j.
    """

    coefficients: Mapping[int, float] = field(default_factory=dict)
    constant: float = 0.0

    def plus(self, other: "Affine", factor: float = 1.0) -> "Affine":
        """Return the sum of this function and `factor` times another one."""
        coefficients = dict(self.coefficients)
        for key, value in other.coefficients.items():
            coefficients[key] = coefficients.get(key, 0.0) + factor * value
        return Affine(coefficients, self.constant + factor * other.constant)

    def times(self, factor: float) -> "Affine":
        """Return this function times a number."""
        return Affine(
            {key: factor * value for key, value in self.coefficients.items()}, factor * self.constant
        )


@dataclass(frozen=True)
class AtMostZero:
    """The constraint that a linear function is at most zero, or negative if `strict`."""

    function: Affine
    strict: bool = False


@dataclass(frozen=True)
class Conjunction:
    """Formula that is true if all of its parts are."""

    parts: tuple["Formula", ...]


@dataclass(frozen=True)
class Disjunction:
    """Formula that is true if at least one of its parts is."""

    parts: tuple["Formula", ...]


Formula = AtMostZero | Conjunction | Disjunction


def compared(operator: str, left: Affine, right: Affine) -> Formula:
    """Return the formula of a comparison: <=, <, >=, >, = (or ==) or !=."""
    if operator in ("<=", "<"):
        return AtMostZero(left.plus(right, -1.0), strict=operator == "<")
    if operator in (">=", ">"):
        return AtMostZero(right.plus(left, -1.0), strict=operator == ">")
    strict = operator == "!="
    parts = (AtMostZero(left.plus(right, -1.0), strict), AtMostZero(right.plus(left, -1.0), strict))
    return Disjunction(parts) if strict else Conjunction(parts)


@dataclass(frozen=True)
class ConstrainedBox:
    """A box of inputs, and constraints of which all must be satisfied."""

    low: Mapping[int, float] = field(default_factory=dict)
    """lower bounds of inputs, by index"""
    high: Mapping[int, float] = field(default_factory=dict)
    """upper bounds of inputs, by index"""
    constraints: tuple[AtMostZero, ...] = ()
    """constraints that are no bounds of an input"""

    @property
    def size(self) -> int:
        """Number of bounds and constraints."""
        return len(self.low) + len(self.high) + len(self.constraints)

    def joined(self, other: "ConstrainedBox") -> "ConstrainedBox":
        """Return the case in which both cases are satisfied."""
        low, high = dict(self.low), dict(self.high)
        for key, value in other.low.items():
            low[key] = max(value, low.get(key, -math.inf))
        for key, value in other.high.items():
            high[key] = min(value, high.get(key, math.inf))
        return ConstrainedBox(low, high, self.constraints + other.constraints)

    @property
    def possible(self) -> bool:
        """Whether no input has a lower bound above its upper bound."""
        return all(value <= self.high.get(key, math.inf) for key, value in self.low.items())


@dataclass(frozen=True)
class DisjunctiveForm:
    """A formula in disjunctive normal form: what all cases share, and the cases, of which one must be satisfied."""

    shared: ConstrainedBox
    cases: tuple[ConstrainedBox, ...]

    def all(self) -> Iterator[ConstrainedBox]:
        """Yield the complete cases that are not contradictory by their bounds alone."""
        for case in self.cases:
            complete = self.shared.joined(case)
            if complete.possible:
                yield complete


def alternatives(assertions: Iterable[Formula]) -> DisjunctiveForm:
    """Return the conjunction of formulas in disjunctive normal form.

    Raises `TargetError` if the result is too large: disjunctions that are combined by conjunctions multiply.
    """
    shared, disjunctions = _Collected(), []
    pending = list(reversed(list(assertions)))
    while pending:
        formula = pending.pop()
        if isinstance(formula, Conjunction):
            pending.extend(reversed(formula.parts))
        elif isinstance(formula, Disjunction):
            disjunctions.append(formula)
        else:
            shared.add(formula)
    cases = [ConstrainedBox()]
    for disjunction in disjunctions:
        cases = _product(cases, _cases(disjunction))
    return DisjunctiveForm(shared.case(), tuple(cases))


def _cases(formula: Formula) -> list[ConstrainedBox]:
    """The cases of a formula. Its depth is limited by the readers."""
    if isinstance(formula, Disjunction):
        cases = [case for part in formula.parts for case in _cases(part)]
        _refuse_large(len(cases), sum(case.size for case in cases))
        return cases
    if isinstance(formula, AtMostZero):
        formula = Conjunction((formula,))
    collected, nested = _Collected(), []
    for part in formula.parts:
        if isinstance(part, AtMostZero):
            collected.add(part)
        else:
            nested.append(part)
    cases = [collected.case()]
    for part in nested:
        cases = _product(cases, _cases(part))
    return cases


def _product(first: list[ConstrainedBox], second: list[ConstrainedBox]) -> list[ConstrainedBox]:
    n = len(first) * len(second)
    parts = len(second) * sum(case.size for case in first) + len(first) * sum(case.size for case in second)
    _refuse_large(n, parts)
    return [a.joined(b) for a in first for b in second]


def _refuse_large(cases: int, parts: int) -> None:
    if cases > MOST_CASES or parts > MOST_PARTS:
        raise TargetError(
            f"the query has {cases:,} cases with {parts:,} bounds and constraints after its disjunctions are "
            f"multiplied; at most {MOST_CASES:,} and {MOST_PARTS:,} are possible: split it into several queries"
        )


class _Collected:
    """Bounds and constraints of a conjunction, while they are collected."""

    def __init__(self) -> None:
        self.low: dict[int, float] = {}
        self.high: dict[int, float] = {}
        self.constraints: list[AtMostZero] = []

    def add(self, constraint: AtMostZero) -> None:
        """Add a constraint, as a bound if it is one."""
        terms = [(key, value) for key, value in constraint.function.coefficients.items() if value]
        if len(terms) != 1 or terms[0][0] < 0 or constraint.strict:
            self.constraints.append(constraint)
            return
        ((key, factor),) = terms
        bound = -constraint.function.constant / factor
        exact = abs(factor) == 1
        if factor > 0:
            bound = bound if exact else math.nextafter(bound, math.inf)
            self.high[key] = min(bound, self.high.get(key, math.inf))
        else:
            bound = bound if exact else math.nextafter(bound, -math.inf)
            self.low[key] = max(bound, self.low.get(key, -math.inf))

    def case(self) -> ConstrainedBox:
        """Return what was collected."""
        return ConstrainedBox(self.low, self.high, tuple(self.constraints))


@dataclass(frozen=True)
class Variable:
    """A declared input or output of a network."""

    name: str
    element_type: str
    """element type in lower case, such as `float32` or `real`"""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DeclaredNetwork:
    """The declaration of a network with one input and one output."""

    name: str
    input: Variable
    output: Variable
    equal_to: str = ""
    """name of the network whose file is also that of this network; empty if it has a file of its own"""
    isomorphic_to: str = ""
    """name of the network that the file declares to have the same architecture, with parameters that may differ; empty
    for none. The declaration is not checked, and decides nothing"""


@dataclass(frozen=True)
class Query:
    """The question whether inputs of the networks exist that satisfy one of the cases.

    Inputs and outputs are numbered through all networks, in the order of their declaration and row by row.
    """

    version: str
    """`1.0`, or the version that the file declares"""
    networks: tuple[DeclaredNetwork, ...]
    alternatives: DisjunctiveForm

    @property
    def inputs(self) -> int:
        """Number of values of all inputs."""
        return sum(network.input.size for network in self.networks)

    @property
    def outputs(self) -> int:
        """Number of values of all outputs."""
        return sum(network.output.size for network in self.networks)

    def name_of(self, key: int) -> str:
        """Return the name of the variable with a key of `Affine`, such as `X_3` or `X[0,3]`."""
        index, of_input = (key, True) if key >= 0 else (-1 - key, False)
        for network in self.networks:
            variable = network.input if of_input else network.output
            if index < variable.size:
                return self._element(variable, index)
            index -= variable.size
        raise IndexError(key)

    def _element(self, variable: Variable, index: int) -> str:
        if self.version == "1.0":
            return f"{variable.name}_{index}"
        indices = []
        for size in reversed(variable.shape):
            index, place = divmod(index, size)
            indices.append(str(place))
        return f"{variable.name}[{','.join(reversed(indices))}]" if indices else variable.name


def refuse_unbounded_inputs(query: Query, path: str) -> None:
    """Raise `TargetError` if a case of a query has an input without a finite lower and upper bound."""
    shared = query.alternatives.shared
    missing = [i for i in range(query.inputs) if i not in shared.low or i not in shared.high]
    for i in missing:
        for case in query.alternatives.cases:
            for bounds, common, what in ((case.low, shared.low, "lower"), (case.high, shared.high, "upper")):
                if i not in bounds and i not in common:
                    raise TargetError(
                        f"{path!r} gives no {what} bound for {query.name_of(i)}; bounds of all inputs are needed, such "
                        f"as (assert ({'>=' if what == 'lower' else '<='} {query.name_of(i)} 0.0))"
                    )
