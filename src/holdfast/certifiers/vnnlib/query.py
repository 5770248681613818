"""A query of VNN-LIB: declared networks with their variables, and constraints on them."""

import math
from dataclasses import dataclass

from holdfast.certifiers.vnnlib.formulas import DisjunctiveForm
from holdfast.core.errors import TargetError


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
