"""The two JSON formats in which rows are sent to a model behind HTTP and its responses are read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from holdfast.core.errors import TargetError, TargetLost, UsageError

Values = np.ndarray[Any, Any]
FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
TEXT = frozenset({"BYTES"})
_PLACES = ("$x", "$x_last", "$x_one", "$x_one_last")
"""Placeholders of a template: for all rows, or for one example without a batch axis; `last` puts the channels last."""
_NAME, _NAMES = 40, 8
"""Number of characters of a name, and number of names, in an error message."""
_ADVICE = "say where the scores or classes are with --http-response"


@dataclass(frozen=True)
class Shaped:
    """The format of HTTP requests and responses of the Open Inference Protocol, for one model."""

    name: str
    datatype: str = "FP32"
    shape: tuple[int, ...] | None = None
    """shape of the input with the batch first; -1 means any size, None means unknown"""
    output: str | None = None
    labels: bool = False
    """whether outputs with labels take precedence over outputs with scores"""
    one: ClassVar[bool] = False

    @property
    def channels_last(self) -> bool:
        """Whether images are sent to the server with their channels last."""
        shape = self.shape
        return shape is not None and len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)

    def body(self, x: Tensor) -> bytes:
        """Return the body of an HTTP request with the rows `x` (n, *features)."""
        rows = x.permute(0, 2, 3, 1) if self.channels_last and x.dim() == 4 else x
        rows = x if self._fits(x) and not self._fits(rows) else rows  # the channels are last already
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
        """Return the scores or labels in a server's response, in the shape that the response declares."""
        tensor = self._tensor(answer)
        values, shape, datatype = as_values(tensor.get("data")), tensor.get("shape"), _datatype(tensor)
        if datatype in FLOATS and values.dtype.kind in "iu":  # some servers write 1.0 as 1
            values = values.astype(np.float64)
        if datatype in WHOLE and values.dtype.kind == "f" and (values == values.round()).all():
            values = values.astype(np.int64)
        try:
            return values if shape is None else values.reshape(tuple(map(int, shape)))
        except (TypeError, ValueError, OverflowError) as error:
            raise TargetLost(
                f"the answer holds {values.size} values in the shape {shape!r}, which do not fit; a shape of the "
                "values was expected, so check the server"
            ) from error

    def _tensor(self, answer: Any) -> Mapping[str, Any]:
        """Return the requested output, else the first output with scores, or with labels if `labels` is True."""
        outputs = answer.get("outputs") if isinstance(answer, Mapping) else None
        named = [o for o in outputs if isinstance(o, Mapping)] if isinstance(outputs, list) else []
        mine = [o for o in named if self.output in (None, o.get("name"))]
        if not mine:
            has = ", ".join(str(o.get("name"))[:_NAME] for o in named[:_NAMES]) or "no output at all"
            wanted = "no output" if self.output is None else f"no output {self.output!r}"
            raise TargetLost(f"the answer has {wanted}; it has {has}: name one with --http-response")
        wanted_types = WHOLE | TEXT if self.labels else FLOATS
        return next((o for o in mine if _datatype(o) in wanted_types), mine[0])


def _datatype(tensor: Mapping[str, Any]) -> str:
    """Return the type of the numbers according to the response, as a string."""
    return str(tensor.get("datatype"))


@dataclass(frozen=True)
class Template:
    """Format of HTTP requests that the user defines by a JSON template, with the path to the scores in the response."""

    before: str
    after: str
    channels_last: bool
    one: bool
    """whether a request contains one example without a batch axis"""
    path: str | None

    @classmethod
    def of(cls, request: str, path: str | None) -> "Template":
        """Return the request format for a JSON template. Raises `UsageError` unless it is JSON with one placeholder for
        rows.
        """
        places = re.findall(r"\$x\w*", request)
        place = places[0] if places else ""
        before, _, after = request.partition(place) if place else (request, "", "")
        try:
            if len(places) != 1 or place not in _PLACES:
                raise ValueError(f"one of {', '.join(_PLACES)} was expected, once")
            json.loads(f'{before}"rows"{after}')  # the quotes make it invalid if $x is inside of quotes
        except (ValueError, RecursionError) as error:
            why = "its place is outside of quotes" if f'"{place}' in request and place else error
            raise UsageError(
                f"--http-request is {request!r} ({why}); give JSON with $x for the rows, as in "
                """'{"instances": $x}', or $x_one for one example without a batch axis; $x_last and $x_one_last put """
                "the channels last"
            ) from error
        return cls(before, after, place.endswith("_last"), place.startswith("$x_one"), path)

    def body(self, x: Tensor) -> bytes:
        """Return the body of an HTTP request with the rows `x` (n, *features). n must be 1 if the template takes one
        example.
        """
        rows = x.movedim(1, -1) if self.channels_last and x.dim() > 2 else x
        if self.one:
            (rows,) = rows
        return self.before.encode() + _json(rows.tolist()) + self.after.encode()

    def found(self, answer: Any) -> Any:
        """Return the value at the user's path in a server's response. Raises `TargetLost` if there is no such value."""
        return walked(answer, self.path)


def walked(answer: Any, path: str | None) -> Any:
    """Return the value in a server's response at a path such as `outputs.0.data` or `predictions.*.scores`, where `*`
    means every entry.

    Raises `TargetLost` if the response does not have this path.
    """
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
        f"the keys {', '.join(str(each)[:_NAME] for each in list(found)[:_NAMES])}"
        if isinstance(found, Mapping) and found
        else _kind(found)
    )
    raise TargetLost(f"the answer has no {key!r}, but {has}; {_ADVICE}")


def _kind(found: Any) -> str:
    if isinstance(found, list):
        return f"a list of {len(found)}"
    if found == {}:
        return "an empty object"
    kinds = {dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(found), "a number")


def as_values(found: Any) -> Values:
    """Convert the scores or labels of a server's response to an array. Integers and strings are unchanged, other
    numbers become floats, and null becomes NaN.

    Raises `TargetLost` for anything else, such as booleans, objects, lists of different lengths, and a single null.
    """
    if isinstance(found, np.ndarray):
        return found
    what = _kind(found)
    try:
        values = np.asarray(found)
        # numpy converts text and numbers to text, and true and numbers to 1
        mixed = values.dtype.kind in "OU" or ((values == 0) | (values == 1)).any()
        kinds = {type(each) for each in np.asarray(found, object).flat} if mixed else set()
        if kinds == {str}:
            return values
        what = "true or false" if values.dtype.kind == "b" or bool in kinds else what
        if what == "true or false" or str in kinds or (kinds == {type(None)} and values.ndim < 2):
            raise TypeError
        return values if values.dtype.kind in "iu" else values.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TargetLost(f"the answer holds {what} where numbers or text were expected; {_ADVICE}") from error


def _json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
