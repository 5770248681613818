"""The parts of a query for a computation: boxes of inputs, and sets of outputs that must not be reached from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.certifiers.branching.branching import OutputProperty
from holdfast.certifiers.vnnlib.formulas import ConstrainedBox
from holdfast.certifiers.vnnlib.query import Query


@dataclass(frozen=True, eq=False)
class UnsafeSet:
    """A set of outputs: those at which all of some linear functions are at most zero."""

    rows: Tensor
    """coefficients (k, values) of the functions, float64"""
    constants: Tensor
    """constants (k) of the functions, float64"""
    strict: Tensor
    """mask (k) of the functions that must be negative"""

    def claim(self, dtype: torch.dtype) -> OutputProperty:
        """Return the claim that the set is not reached, as at least one function is positive.

        Constants are rounded down. If the coefficients are integers, the sum of the functions is a further function: if
        it is positive, one of them is, and it may have a positive bound where none of them has one.
        """
        rows, constants = self.rows, self.constants
        if len(rows) > 1 and bool((rows == rows.round()).all()):
            error = 4 * len(rows) * torch.finfo(torch.float64).eps * constants.abs().sum()
            rows = torch.cat((rows, rows.sum(0, keepdim=True)))
            constants = torch.cat((constants, (constants.sum() - error)[None]))
        # twice: the sum of a bound and the constant is rounded, too
        rounded = (constants - 2 * torch.finfo(dtype).eps * constants.abs()).to(dtype)
        return OutputProperty(rows.to(dtype), rounded)

    def exact_in(self, dtype: torch.dtype) -> bool:
        """Return whether the coefficients are numbers of a data type."""
        return bool((self.rows.to(dtype).double() == self.rows).all())

    def reached(self, values: Tensor) -> Tensor:
        """Return the mask of the rows of values (n, values) that are in the set."""
        functions = values @ self.rows.t() + self.constants
        return torch.where(self.strict, functions < 0, functions <= 0).all(1)


@dataclass(frozen=True, eq=False)
class Problem:
    """The question whether an input of a box leads to one of some sets of outputs."""

    low: Tensor
    """smallest values (d) of the inputs, float64"""
    high: Tensor
    """largest values (d) of the inputs, float64"""
    targets: tuple[UnsafeSet, ...]

    @property
    def varying(self) -> int:
        """Number of inputs that are not fixed."""
        return int((self.low < self.high).sum())


def problems_of(query: Query) -> tuple[tuple[Problem, ...], bool]:
    """Return the problems of a query, with one problem for each different box, and whether the values on which its
    constraints depend include the inputs.

    The values are all outputs, followed by all inputs if they are included.
    """
    cases = list(query.alternatives.all())
    with_inputs = any(
        key >= 0 and value
        for case in cases
        for each in case.constraints
        for key, value in each.function.coefficients.items()
    )
    boxes: dict[bytes, tuple[Tensor, list[UnsafeSet]]] = {}
    for case in cases:
        box = torch.tensor(
            [[bounds[i] for i in range(query.inputs)] for bounds in (case.low, case.high)],
            dtype=torch.float64,
        )
        targets = boxes.setdefault(box.numpy().tobytes(), (box, []))[1]
        targets.append(_target(case, query, with_inputs=with_inputs))
    return tuple(Problem(box[0], box[1], tuple(targets)) for box, targets in boxes.values()), with_inputs


def _target(case: ConstrainedBox, query: Query, *, with_inputs: bool) -> UnsafeSet:
    size = query.outputs + (query.inputs if with_inputs else 0)
    rows = torch.zeros(len(case.constraints), size, dtype=torch.float64)
    for row, constraint in zip(rows, case.constraints, strict=True):
        for key, value in constraint.function.coefficients.items():
            row[-1 - key if key < 0 else query.outputs + key] = value
    constants = [constraint.function.constant for constraint in case.constraints]
    strict = [constraint.strict for constraint in case.constraints]
    return UnsafeSet(
        rows, torch.tensor(constants, dtype=torch.float64), torch.tensor(strict, dtype=torch.bool)
    )
