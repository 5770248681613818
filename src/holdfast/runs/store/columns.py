"""Reads, writes and checks column files: safetensors files with the columns of a stage; and checks JSON documents
against their forms.
"""

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError
from holdfast.runs.store.files import content_of, usable, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.core.evidence import Columns


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,150}")
_DESCRIBED = 1000
"""largest number of faults of a document that are described, which takes much more memory than the document"""
_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


def refuse_form(file: Path, content: Any, model: Hashable) -> None:
    """Raise `TargetError` if the content of a JSON document does not match its model."""
    validated(file, content, model)


class FormFault(ValueError):
    """Content that does not match its model. The message contains the first field that does not match, and what was
    expected.
    """


def validated(file: Path, content: Any, model: Hashable) -> Any:
    """Return the content of a JSON document as a value of its model. Raises `TargetError` if it does not match; the
    message contains the file, the first field that does not match, and what was expected.
    """
    try:
        return conforming(content, model)
    except FormFault as fault:
        raise TargetError(
            f"{str(file)!r} has another format than this version writes: {fault}; restore it from a copy, or repeat "
            "the run if an earlier version wrote it"
        ) from None


def conforming(content: Any, model: Hashable) -> Any:
    """Return content of JSON as a value of its model. Raises `FormFault` if it does not match."""
    try:
        return _adapter(model).validate_python(content)
    except ValidationError as error:
        n = error.error_count()
        raise FormFault(
            _fault(error.errors(include_url=False)[0])
            if n <= _DESCRIBED
            else f"{n:,} fields have other types"
        ) from None


@lru_cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _fault(error: ErrorDetails) -> str:
    """The path of a field, its value, and what was expected, as text of limited length."""
    place, value, expected = list(error["loc"]), error["input"], error["msg"].removeprefix("Input should be ")
    if error["type"] == "missing":
        absent = place.pop()
        value, expected = (
            (value, "a longer list")
            if isinstance(value, list)
            else (sorted(value), f"an object with {absent!r}")
        )
    if error["type"] == "too_long":
        expected = "a shorter list"
    if error["type"] == "dict_type":
        expected = "an object"
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{_SHOWN.repr(part)[1:-1]}" for part in place)
    return f"{path.removeprefix('.') or 'the document'} is {_SHOWN.repr(value)}; {expected} was expected"


def required(is_valid: Callable[[Any], object], expected: str) -> AfterValidator:
    """Return a validator that refuses the values for which `is_valid` returns False. `expected` describes the others
    in the message.
    """

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise PydanticCustomError("form", "{expected}", {"expected": expected})
        return value

    return AfterValidator(check)


def is_name(value: object) -> bool:
    """Return whether a value is a valid file name within a run: letters, digits and a few other characters, but no path
    separators.
    """
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e308


Name = Annotated[str, required(is_name, "a name of letters, digits and the characters _.+=-")]
"""name of a stage, which is also a part of the name of its file"""
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict(), Field(gt=-(2**63), lt=2**63)]
"""integer of at most 63 bits"""
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Real = Annotated[Any, required(lambda value: _finite(value) or value in ("inf", "-inf", "nan"), "a number")]
"""number, or one of the strings that represent infinities and NaN in strict JSON"""


def distinct(field: str | None = None) -> AfterValidator:
    """Return a validator of lists that refuses equal entries, or entries with equal values of a field."""
    return required(
        lambda entries: len({each if field is None else each[field] for each in entries}) == len(entries),
        "a list of distinct names",
    )


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
        fault = _columns_fault(columns[name], form, sizes)
        if fault:
            expected = ", ".join(f"{size} = {sizes[size]:,}" for size in form.sizes if size in sizes)
            where = f" with {expected}" if expected else ""
            raise TargetError(
                f"the column {name!r} in {file!r} has {fault}; {form}{where} were expected: restore it from a copy"
            )
    return sizes


def _columns_fault(values: "Tensor", form: Form, sizes: dict[str, int]) -> str:
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


SUFFIX = ".safetensors"
_KEY = "holdfast"
_VERSION = 1


@dataclass(frozen=True)
class ColumnFile:
    """The content of a column file: the columns of a stage, and metadata."""

    columns: "dict[str, Tensor]"
    about: Mapping[str, Any] = field(default_factory=dict)
    """metadata that were passed to `encode`"""
    digest: str = ""
    """SHA-256 of the bytes of the file, in hex"""


def encode(columns: "Columns", about: Mapping[str, Any]) -> bytes:
    """Return the bytes of a column file with the given columns and metadata. Equal content gives equal bytes."""
    from safetensors.torch import save

    tensors = {name: values.clone() for name, values in sorted(_plain(columns).items())}
    metadata = {"schema_version": _VERSION, "about": dict(about), "columns": content_digest(tensors)}
    return save(tensors, metadata={_KEY: canonical(metadata).decode()})


def decode(data: bytes, name: str) -> ColumnFile:
    """Return the content of a column file from its bytes. Raises `TargetError`, which contains `name`, if the bytes
    were altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"][_KEY])
        tensors = load(data)
        version, expected, about = metadata["schema_version"], metadata["columns"], metadata["about"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TargetError(
            f"{name!r} is not a column file, or is truncated: {error}; restore it from a copy"
        ) from error
    if version != _VERSION:
        raise TargetError(
            f"{name!r} has schema version {version}; this version reads {_VERSION}. Install the holdfast that wrote it"
        )
    if content_digest(tensors) != expected:
        raise TargetError(f"{name!r} was changed after it was written; restore it from a copy")
    return ColumnFile(tensors, about, digest(data))


def write(path: Path, columns: "Columns", about: Mapping[str, Any]) -> str:
    """Write a column file atomically, and return its SHA-256 in hex."""
    data = encode(columns, about)
    with usable(path):
        write_atomically(path, data)
    return digest(data)


def read(path: Path) -> ColumnFile:
    """Return the content of a column file, after verification of the digest that the file contains."""
    return decode(content_of(path), str(path))


def content_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 of the names, types, shapes and values of tensors, in hex."""
    import torch

    sha = hashlib.sha256()
    for name, values in sorted(_plain(tensors).items()):
        sha.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        sha.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _plain(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    return {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
