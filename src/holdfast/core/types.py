"""Types of annotations: tensors with their shapes, and numbers with their ranges.

A shape is written in the annotation (`Inputs` is `n *features`) and checked at run time in tests, where
`holdfast.testing.shapes` wraps the public functions; otherwise it has no effect.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

Kind = Literal["float", "int", "bool"]


@dataclass(frozen=True)
class Shape:
    """Shape of a tensor: a name has one size within a call, `*name` stands for any number of dimensions."""

    dims: str
    kind: Kind


Inputs = Annotated[Tensor, Shape("n *features", "float")]
"""A batch of inputs, one row for each example."""
Logits = Annotated[Tensor, Shape("n classes", "float")]
"""One score for each class; the largest is the prediction."""
Labels = Annotated[Tensor, Shape("n", "int")]
"""One class index for each example, int64."""
Ids = Annotated[Tensor, Shape("n", "int")]
"""The source row of each example, int64."""
PerExample = Annotated[Tensor, Shape("n", "float")]
"""One number for each example."""
Mask = Annotated[Tensor, Shape("n", "bool")]
"""One truth value for each example."""
Rows = Annotated[Tensor, Shape("k", "int")]
"""Positions of some rows of a batch."""

Access = Literal["none", "labels", "scores", "gradients"]
"""The attacker's access to the model, in ascending order; each includes the ones before it."""

ACCESS_ORDER: tuple[Access, ...] = ("none", "labels", "scores", "gradients")

Layout = Literal["chw", "hwc", "asis"]
"""Position of the channel axis of an example: first, last, or as in the array, without reordering."""

Steps = Annotated[int, Ge(1)]
Restarts = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
