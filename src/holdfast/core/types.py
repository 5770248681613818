"""Names for the types that signatures share: tensors with their shapes, and numbers with their ranges.

A shape is written in the annotation (`Inputs` is `n *features`) and checked at run time under test, where
`holdfast.testing.shapes` wraps the public functions; it costs nothing otherwise.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

Kind = Literal["float", "int", "bool"]


@dataclass(frozen=True)
class Shape:
    """Shape of a tensor: names bind to one size within a call, `*name` to any number of dimensions."""

    dims: str
    kind: Kind


Inputs = Annotated[Tensor, Shape("n *features", "float")]
"""A batch of inputs, one row an example."""
Logits = Annotated[Tensor, Shape("n classes", "float")]
"""One score a class; the largest is the prediction."""
Labels = Annotated[Tensor, Shape("n", "int")]
"""One class index an example, int64."""
Ids = Annotated[Tensor, Shape("n", "int")]
"""The source row of each example, int64."""
PerExample = Annotated[Tensor, Shape("n", "float")]
"""One number an example."""
Mask = Annotated[Tensor, Shape("n", "bool")]
"""One truth value an example."""
Rows = Annotated[Tensor, Shape("k", "int")]
"""Positions of some rows of a batch."""

Access = Literal["none", "labels", "scores", "gradients"]
"""What an attacker sees of the model, least first; each includes those before it."""

ACCESS_ORDER: tuple[Access, ...] = ("none", "labels", "scores", "gradients")

Layout = Literal["chw", "hwc", "asis"]
"""Where the channels of an example are: first, last, or as the array has its axes, with no reordering."""

Steps = Annotated[int, Ge(1)]
Restarts = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
