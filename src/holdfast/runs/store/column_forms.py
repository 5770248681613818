"""Checks the columns of a stage against their forms: names, data types, sizes and ranges.

Columns are checked before anything is computed from them, because a run folder may be untrusted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.core.errors import TargetError

if TYPE_CHECKING:  # torch is imported when columns are read
    from torch import Tensor

    from holdfast.core.evidence import Columns

LARGEST = 1e30
"""Largest absolute value of a real number in a column, so that sums of squares stay finite in float64."""
_LARGEST_WHOLE = 2**53
"""Largest integer, so that it is exact as a float64."""


@dataclass(frozen=True)
class Form:
    """What a column may contain. A size is a number, or a name that stands for the same number everywhere."""

    sizes: tuple[int | str, ...] = ("n",)
    further: bool = False
    """whether there may be further sizes, which may be any"""
    rows: tuple[int, int] = (0, 2**40)
    """smallest and largest first size"""
    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    """whether the values are integers"""
    nan: bool = False
    """whether values may be NaN"""
    infinite: bool = False
    """whether values may be infinite"""
    optional: bool = False
    """whether the column may be missing"""

    def __str__(self) -> str:
        noun = "whole numbers" if self.whole else "numbers"
        sizes = ", ".join([*map(str, self.sizes), *(["…"] if self.further else [])])
        rows = "" if self.rows == (0, 2**40) else f" with {self.rows[0]} to {self.rows[1]:,} rows"
        return f"{noun} from {self.low:g} to {self.high:g} of shape ({sizes}){rows}"


def whole(*sizes: int | str, low: float = 0, high: float = _LARGEST_WHOLE) -> Form:
    """Return the form of a column of integers."""
    return Form(sizes, low=low, high=high, whole=True)


def flag(*sizes: int | str) -> Form:
    """Return the form of a column of truth values, which may be stored as 0 and 1."""
    return whole(*sizes, high=1)


IDS = whole("n", low=-(2**63), high=2**63)
"""form of the ids of examples"""


def validated_columns(
    file: str, columns: "Columns", forms: Mapping[str, Form], known: Mapping[str, int]
) -> dict[str, int]:
    """Return the sizes by their names, which begin with those that are `known`. Raises `TargetError` for the first
    column that is missing or has another form. The message contains `file`.
    """
    sizes = dict(known)
    for name, form in forms.items():
        if name not in columns:
            if form.optional:
                continue
            raise TargetError(f"{file!r} has no column {name!r}; restore it from a copy")
        fault = _fault(columns[name], form, sizes)
        if fault:
            expected = ", ".join(f"{size} = {sizes[size]:,}" for size in form.sizes if size in sizes)
            where = f" with {expected}" if expected else ""
            raise TargetError(
                f"the column {name!r} in {file!r} has {fault}; {form}{where} were expected: restore it from a copy"
            )
    return sizes


def _fault(values: "Tensor", form: Form, sizes: dict[str, int]) -> str:
    """What is wrong with a column; empty for nothing. Sizes that were not known are added."""
    import torch

    kind = values.dtype
    if kind not in ((torch.bool, torch.int64) if form.whole else (torch.float32, torch.float64)):
        return f"the data type {str(kind).removeprefix('torch.')}"
    if values.dim() < len(form.sizes) or (values.dim() > len(form.sizes) and not form.further):
        return f"the shape {tuple(values.shape)}"
    for size, expected in zip(values.shape, form.sizes, strict=False):
        known = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
        if size != known:
            return f"the shape {tuple(values.shape)}"
    if form.sizes and not form.rows[0] <= len(values) <= form.rows[1]:
        return f"{len(values):,} rows"
    if not values.numel() or kind == torch.bool:
        return ""
    if form.whole:
        smallest, largest = float(values.min()), float(values.max())
    else:
        if not form.nan and bool(values.isnan().any()):
            return "values that are not a number"
        finite = values[values.isfinite()] if form.infinite or form.nan else values
        if form.nan and not form.infinite and bool(values.isinf().any()):
            return "infinite values"
        if not finite.numel():
            return ""
        smallest, largest = float(finite.min()), float(finite.max())
    if smallest < form.low or largest > form.high:
        return f"values from {smallest:g} to {largest:g}"
    return ""
