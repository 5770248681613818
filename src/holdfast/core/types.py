"""Types for annotations: tensors with their shapes, and numbers with their valid ranges.

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
    """Shape of a tensor in a type annotation. Equal dimension names have equal sizes within a call, and `*name` stands
    for any number of dimensions.
    """

    dims: str
    kind: Kind


Inputs = Annotated[Tensor, Shape("n *features", "float")]
"""batch of inputs, one row for each example"""
Logits = Annotated[Tensor, Shape("n classes", "float")]
"""one score for each class and example; the class with the largest is the prediction"""
Outputs = Annotated[Tensor, Shape("n *values", "float")]
"""what a model returns: logits of classes, or the outputs of another task in a shape of its own"""
Labels = Annotated[Tensor, Shape("n", "int")]
"""class index of each example, int64"""
Ids = Annotated[Tensor, Shape("n", "int")]
"""source row of each example, int64"""
PerExample = Annotated[Tensor, Shape("n", "float")]
"""one number for each example"""
Mask = Annotated[Tensor, Shape("n", "bool")]
"""one truth value for each example"""
Rows = Annotated[Tensor, Shape("k", "int")]
"""positions of some rows of a batch"""

Access = Literal["none", "labels", "scores", "gradients"]
"""access of the attacker to the model, in ascending order; each value includes all earlier ones"""

ACCESS_ORDER: tuple[Access, ...] = ("none", "labels", "scores", "gradients")

Layout = Literal["chw", "hwc", "asis"]
"""position of the channel axis of an example: first, last, or as in the array, without reordering"""

Steps = Annotated[int, Ge(1)]
Restarts = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
