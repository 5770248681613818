"""How rows are written into a request for a model behind HTTP, and found in its answer: two forms of JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from holdfast.core.errors import TargetError, TargetLost, UsageError

Values = np.ndarray[Any, Any]
_ROWS, _ROWS_CHANNELS_LAST = "$x", "$x_last"


@dataclass(frozen=True)
class Shaped:
    """How rows are written into a request, by the Open Inference Protocol."""

    name: str
    datatype: str = "FP32"
    shape: tuple[int, ...] | None = None
    """with the batch first; -1 is any size, None says nothing"""
    output: str | None = None

    @property
    def channels_last(self) -> bool:
        """Whether images go with their channels last."""
        shape = self.shape
        return shape is not None and len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)

    def body(self, x: Tensor) -> bytes:
        """The request for these rows."""
        rows = x.permute(0, 2, 3, 1) if self.channels_last and x.dim() == 4 else x
        rows = x if self._fits(x) and not self._fits(rows) else rows  # whose channels are last already
        self._refuse_shape(rows)
        given = {"name": self.name, "shape": list(rows.shape), "datatype": self.datatype}
        content: dict[str, Any] = {"inputs": [{**given, "data": rows.flatten().tolist()}]}
        if self.output is not None:
            content["outputs"] = [{"name": self.output}]
        return _json(content)

    def _fits(self, rows: Tensor) -> bool:
        if self.shape is None:
            return True
        one, wanted = rows.shape[1:], self.shape[1:]
        return len(one) == len(wanted) and all(w in (-1, size) for size, w in zip(one, wanted, strict=True))

    def _refuse_shape(self, rows: Tensor) -> None:
        if self.shape is not None and not self._fits(rows):
            one, wanted = tuple(rows.shape[1:]), self.shape[1:]
            raise TargetError(
                f"the model takes inputs of shape {wanted} and was given {one}; reshape the data, or put a function "
                "in front of it with file.py:factory"
            )

    def found(self, answer: Any) -> Values:
        """What the answer says of the rows, nested as its shape says."""
        outputs = answer.get("outputs") if isinstance(answer, Mapping) else None
        named = [o for o in outputs if isinstance(o, Mapping)] if isinstance(outputs, list) else []
        mine = [o for o in named if self.output in (None, o.get("name"))]
        if not mine:
            has = ", ".join(str(o.get("name")) for o in named) or "none at all"
            raise TargetLost(f"the answer has no output {self.output or ''!r}; it has {has}")
        shape, values = mine[0].get("shape"), _values(mine[0].get("data"))
        try:
            return values if shape is None else values.reshape(tuple(map(int, shape)))
        except (TypeError, ValueError, OverflowError) as error:
            raise TargetLost(
                f"the answer holds {values.size} values in the shape {shape!r}; they do not fit"
            ) from error


@dataclass(frozen=True)
class Template:
    """How rows are written into a request, and found in its answer, as a user says."""

    before: str
    after: str
    channels_last: bool
    path: str | None

    @classmethod
    def of(cls, request: str, path: str | None) -> "Template":
        """The template in a text; `UsageError` if it is no JSON with one place for the rows."""
        mark = _ROWS_CHANNELS_LAST if _ROWS_CHANNELS_LAST in request else _ROWS
        before, _, after = request.partition(mark)
        form = """give JSON with $x for the rows, as in '{"instances": $x}', or $x_last for channels last"""
        try:
            if request.count("$x") != 1:
                raise ValueError("$x stands in it once")
            json.loads(f'{before}"rows"{after}')  # the quotes break it where $x stands in quotes already
        except (ValueError, RecursionError) as error:
            said = "its place is outside of quotes" if '"$x' in request else error
            raise UsageError(f"--http-request is {request!r}; {form} ({said})") from error
        return cls(before, after, mark == _ROWS_CHANNELS_LAST, path)

    def body(self, x: Tensor) -> bytes:
        """The request for these rows."""
        rows = x.movedim(1, -1) if self.channels_last and x.dim() > 2 else x
        return self.before.encode() + _json(rows.tolist()) + self.after.encode()

    def found(self, answer: Any) -> Values:
        """What the answer says of the rows."""
        return _values(walked(answer, self.path))


def walked(answer: Any, path: str | None) -> Any:
    """What stands at a path such as `outputs.0.data` or `predictions.*.scores`, where `*` takes every entry."""
    return _step(answer, path.split(".") if path else [])


def _step(found: Any, path: list[str]) -> Any:
    if not path:
        return found
    key, rest = path[0], path[1:]
    if isinstance(found, list) and key == "*":
        return [_step(entry, rest) for entry in found]
    if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
        return _step(found[int(key)], rest)
    if isinstance(found, Mapping) and key in found:
        return _step(found[key], rest)
    has = (
        f"the keys {', '.join(str(each)[:40] for each in list(found)[:8])}"
        if isinstance(found, Mapping)
        else f"a {_kind(found)}"
    )
    raise TargetLost(f"the answer has no {key!r}, but {has}; say where the scores are with --http-response")


def _kind(found: Any) -> str:
    return f"list of {len(found)}" if isinstance(found, list) else type(found).__name__


def _values(found: Any) -> Values:
    """Whole numbers and text as they are, all others as floats; null becomes NaN."""
    try:
        values = np.asarray(found)
        if values.dtype.kind == "U" and all(isinstance(each, str) for each in np.asarray(found, object).flat):
            return values
        if values.dtype.kind in "bUS":  # answers such as true are no scores
            raise TypeError(values.dtype)
        return values if values.dtype.kind in "iu" else values.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        shown = json.dumps(found)[:80]
        raise TargetLost(
            f"the answer holds {shown} where numbers were expected; say where they are with --http-response"
        ) from error


def _json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
