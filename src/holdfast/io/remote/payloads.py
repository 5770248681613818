"""The two JSON formats in which rows are sent to a model behind HTTP and its responses are read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from holdfast.core.errors import TargetError, TargetLost, UsageError
from holdfast.core.remedies import Placeholder, Remedy

Values = np.ndarray[Any, Any]
FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
TEXT = frozenset({"BYTES"})
_PLACES = ("$x", "$x_last", "$x_one", "$x_one_last")
"""Placeholders of a template: for all rows, or for one example without a batch axis; `last` puts the channels last."""
_NAME, _NAMES = 40, 8
"""Number of characters of a name, and number of names, in an error message."""
_PATH = Remedy(
    "http_response",
    Placeholder("PATH"),
    function="open_model",
    reason="for the path of the scores or classes in the response",
)


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
        description = {"name": self.name, "shape": list(rows.shape), "datatype": self.datatype}
        content: dict[str, Any] = {"inputs": [{**description, "data": rows.flatten().tolist()}]}
        if self.output is not None:
            content["outputs"] = [{"name": self.output}]
        return _json(content)

    def _fits(self, rows: Tensor) -> bool:
        if self.shape is None:
            return True
        example, expected = rows.shape[1:], self.shape[1:]
        return len(example) == len(expected) and all(
            wanted in (-1, size) for size, wanted in zip(example, expected, strict=True)
        )

    def _refuse_shape(self, rows: Tensor) -> None:
        if self.shape is not None and not self._fits(rows):
            example, expected = tuple(rows.shape[1:]), self.shape[1:]
            raise TargetError(
                f"an input has shape {example}; the model expects {expected}: reshape the data, or give a "
                "function that calls the model, as file.py:factory"
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
                f"the response contains {values.size} values and declares the shape {shape!r}; a shape with as many "
                "values was expected, so check the server"
            ) from error

    def _tensor(self, answer: Any) -> Mapping[str, Any]:
        """Return the requested output, else the first output with scores, or with labels if `labels` is True."""
        outputs = answer.get("outputs") if isinstance(answer, Mapping) else None
        objects = [o for o in outputs if isinstance(o, Mapping)] if isinstance(outputs, list) else []
        candidates = [o for o in objects if self.output in (None, o.get("name"))]
        if not candidates:
            known = [str(o.get("name"))[:_NAME] for o in objects[:_NAMES]]
            names = ", ".join(known) or "no output at all: check the server"
            requested = "no output" if self.output is None else f"no output {self.output!r}"
            raise TargetLost(
                f"the response has {requested}; it has {names}",
                *(Remedy("http_response", name, function="open_model") for name in known[:1]),
            )
        wanted_types = WHOLE | TEXT if self.labels else FLOATS
        return next((o for o in candidates if _datatype(o) in wanted_types), candidates[0])


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
            reason = "it must be outside of quotes" if f'"{place}' in request and place else error
            raise UsageError(
                f"http_request is {request!r} ({reason}); give JSON with $x for the rows, as in "
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
        return value_at(answer, self.path)


def value_at(answer: Any, path: str | None) -> Any:
    """Return the value in a server's response at a path such as `outputs.0.data` or `predictions.*.scores`, where `*`
    means every entry.

    Raises `TargetLost` if the response does not have this path.
    """
    return _step(answer, path.split(".") if path else [])


def _step(content: Any, path: list[str]) -> Any:
    if not path:
        return content
    key, rest = path[0], path[1:]
    if isinstance(content, list) and key == "*":
        return [_step(entry, rest) for entry in content]
    if isinstance(content, list) and key.isdecimal() and int(key) < len(content):
        return _step(content[int(key)], rest)
    if isinstance(content, Mapping) and key in content:
        return _step(content[key], rest)
    description = (
        f"the keys {', '.join(str(key_in_content)[:_NAME] for key_in_content in list(content)[:_NAMES])}"
        if isinstance(content, Mapping) and content
        else _kind(content)
    )
    raise TargetLost(f"the response has no {key!r}, but {description}", _PATH)


def _kind(content: Any) -> str:
    if isinstance(content, list):
        return f"a list of {len(content)}"
    if content == {}:
        return "an empty object"
    kinds = {dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(content), "a number")


def as_values(content: Any) -> Values:
    """Convert the scores or labels of a server's response to an array. Integers and strings are unchanged, other
    numbers become floats, and null becomes NaN.

    Raises `TargetLost` for anything else, such as booleans, objects, lists of different lengths, and a single null.
    """
    if isinstance(content, np.ndarray):
        return content
    kind = _kind(content)
    try:
        values = np.asarray(content)
        # numpy converts text and numbers to text, and true and numbers to 1
        mixed = values.dtype.kind in "OU" or ((values == 0) | (values == 1)).any()
        kinds = {type(entry) for entry in np.asarray(content, object).flat} if mixed else set()
        if kinds == {str}:
            return values
        kind = "true or false" if values.dtype.kind == "b" or bool in kinds else kind
        if kind == "true or false" or str in kinds or (kinds == {type(None)} and values.ndim < 2):
            raise TypeError
        return values if values.dtype.kind in "iu" else values.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TargetLost(f"the response contains {kind}, but numbers or text were expected", _PATH) from error


def _json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
