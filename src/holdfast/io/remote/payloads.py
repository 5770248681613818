"""The formats in which rows are sent to a model behind HTTP, and the reading of its answers."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import (
    Placeholder,
    Remedy,
    TargetError,
    TargetLost,
    TargetRefused,
    UsageError,
    model_argument,
)
from holdfast.core.outputs import LOGIT
from holdfast.io.data.labels import listed
from holdfast.io.files import similar_name

Values = np.ndarray[Any, Any]
FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
TEXT = frozenset({"BYTES"})
_PLACES = ("$x", "$x_last", "$x_one", "$x_one_last")
"""Placeholders of a template: for all rows, or for one example without a batch axis; `last` puts the channels last."""
_NAME, _NAMES = 40, 8
"""Number of characters of a name, and number of names, in an error message."""
_PATH = model_argument(
    "http_response", Placeholder("PATH"), reason="for the path of the scores or classes in the response"
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
                *(model_argument("http_response", name) for name in known[:1]),
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
    """Convert the scores or labels of a server's response, a value or nested lists of values, to an array of the same
    shape. Integers and strings are unchanged, and other numbers become floats. An array is returned unchanged.

    A null beside numbers, or in a list of rows, becomes NaN. Raises `TargetLost` for a null alone or a single list of
    nothing but nulls, and for booleans, objects, strings beside other values, and lists of different lengths.
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


_SHOWN = 80
"""Number of characters of an unknown label that an error message contains."""
_BEGINNING = 100
"""Number of characters of an invalid response that an error message contains."""
_MASKED = 2000
"""Number of characters of a response that are searched for secrets before it is shortened."""
_CLASS_KEYS = frozenset({"label", "score"})
"""Keys of one class if a response lists the classes of a row, as pipelines of Hugging Face do."""
_NO_SCORES = (list, dict, str, bool)
NAMES = Placeholder("A,B,C", "[A, B, C]")
"""all names of the classes"""
PATH = model_argument(
    "http_response", Placeholder("PATH"), reason="for the path of the scores in the response"
)
"""the place of the scores, if a response contains several things"""
_ONE_ROW = model_argument("http_max_rows", 1, reason="if the server accepts one row per request")


class ServerAnswers:
    """Converter of the responses of one model server to tensors. It requires that all responses have the same
    structure.

    `labels` is the number of classes of a server that returns labels; None for a server that returns scores. `expected`
    is the declared number of classes. `names` are the class names in the order of the classes; string labels, and
    scores by class name, are looked up in it. If `declared` is True, single numbers are scores, whatever their type.
    `masked` is a function that removes secrets from a string before it is part of a message.
    """

    def __init__(
        self,
        form: Shaped | Template,
        *,
        labels: int | None,
        names: Sequence[str] | None,
        declared: bool,
        masked: Callable[[str], str],
        expected: int | None = None,
    ) -> None:
        self._form, self._labels, self._expected = form, labels, expected
        self._names = None if names is None else tuple(names)
        self._integer_names = self._names is not None and all(
            name.removeprefix("-").isdecimal() for name in self._names
        )
        """whether all class names are integers, so that integers in a response are class names"""
        self._declared, self._masked = declared, masked
        self._classes: int | None = None
        self._kind: str | None = None
        """kind of the entries of earlier responses"""
        self._has_fractions = False
        """whether an earlier response contained a score that is not an integer"""

    @property
    def classes(self) -> int | None:
        """Number of classes of the served model. If the server returns scores, it is None before the first response."""
        return self._classes or self._labels

    def read(self, answer: Any, x: Tensor) -> Tensor:
        """Return the scores (n, classes) float64, or one-hot labels (n, classes) int64, that the response `answer`
        contains for the rows `x` (n, *features).

        Raises `TargetLost` for a response of another structure, and `TargetRefused` for values that cannot be used. The
        message contains the beginning of the response.
        """
        try:
            content = self._form.found(answer)
            return self._scores(content, x) if self._labels is None else self._one_hot(content, x)
        except (TargetLost, TargetRefused) as error:
            beginning = first_characters(answer, self._masked)
            raise error.reworded(self._masked(f"{error.message}. The response begins: {beginning}")) from None

    def recall(self, row: Tensor) -> None:
        """Restore an answer of the server, a row of scores or a one-hot label, that an earlier attempt of a resumed run
        received. The length of the row is the number of classes.
        """
        if self._labels is None:
            self._classes = len(row)
            self._has_fractions = self._has_fractions or bool((row != row.round()).any())

    def _scores(self, content: Any, x: Tensor) -> Tensor:
        rows = rows_by_name(content, len(x))
        values = (
            as_values(content) if rows is None else self._in_order(rows, self._first_labels(content, rows))
        )
        if values.dtype.kind == "U":
            names = () if self._names else (_names(),)
            classes = model_argument("http_labels", True, also=names, reason="if it is a class")
            raise _unreadable_text(values.flat[0], "scores were expected", classes)
        self._refuse_other_kind("numbers" if rows is None else "objects by class name")
        values = self._entries(values, len(x))
        scores_of_rows = values.reshape(len(values), -1)
        self._refuse_class_numbers(scores_of_rows)
        if values.ndim > 2 or not scores_of_rows.shape[1]:
            raise TargetLost(
                f"the response has shape {values.shape}; one row of scores for each of {len(x)} rows was expected",
                PATH,
            )
        self._refuse_width(scores_of_rows.shape[1])
        self._classes = scores_of_rows.shape[1]
        scores = torch.from_numpy(scores_of_rows.astype(np.float64))
        # Checked in the type of the inputs, because a large float64 score would become infinite there.
        if scores.to(x.dtype).isinf().any():
            raise TargetRefused(
                f"the response contains an infinite score, or one too large for {str(x.dtype).removeprefix('torch.')}; "
                "a number for each class was expected, so check the server"
            )
        return scores

    def _first_labels(self, content: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[Remedy, ...]:
        """Return the arguments with which the first label of each row is read, if a response lists classes by
        decreasing score.
        """
        ordered = all(list(row.values()) == sorted(row.values(), reverse=True) for row in rows)
        if not isinstance(self._form, Template) or not isinstance(content, list) or not ordered:
            return ()
        if not _lists_classes(content) and not all(map(_lists_classes, content)):
            return ()
        place = "0.label" if _lists_classes(content) else "*.0.label"
        path = place if self._form.path is None else f"{self._form.path}.{place}"
        first = model_argument("http_response", path)
        names = () if self._names else (_names(),)
        return (
            model_argument(
                "http_labels",
                True,
                also=(first, *names),
                reason="to use the first label of each row, if the server returns only the best classes",
            ),
        )

    def _in_order(self, rows: Sequence[Mapping[str, Any]], first_labels: tuple[Remedy, ...]) -> Values:
        """Return the scores (n, classes) of rows that contain a score for each class name."""
        if self._names is None:
            keys = [name[:_SHOWN] for name in rows[0]]
            raise TargetLost(
                f"the response contains numbers with the keys {listed(keys)}, and the order of the classes is not "
                "declared",
                _names("if these are all classes"),
                *first_labels,
                PATH,
            )
        for row in rows:
            unknown = [name for name in row if name not in self._names]
            missing = [name for name in self._names if name not in row]
            if unknown or missing:
                difference = (
                    f"no score of {missing[0]!r}" if missing else f"a score of {unknown[0][:_SHOWN]!r}"
                )
                raise TargetLost(
                    f"the response has {difference}, but the classes are {listed(self._names)}",
                    *first_labels,
                    _names("with the names that the server uses"),
                    PATH,
                )
        return as_values([[row[name] for name in self._names] for row in rows])

    def _entries(self, values: Values, n: int) -> Values:
        """Return the values with the axis of the `n` rows first. It may be missing for a single row."""
        if n == 1 and values.size and values.ndim < 2:
            return values.reshape(1, -1)
        if values.ndim == 0 or len(values) != n:
            shape = f"shape {values.shape}" if values.shape else "one value"
            raise TargetLost(
                f"the response to {n} {'row' if n == 1 else 'rows'} has {shape}; one entry for each row was expected",
                PATH if n == 1 else _ONE_ROW,
            )
        return values

    def _refuse_other_kind(self, kind: str) -> None:
        if self._kind not in (None, kind):
            raise TargetLost(
                f"the response contains {kind}, but earlier ones contained {self._kind}; responses of the same format "
                "were expected: check the server"
            )
        self._kind = kind

    def _refuse_width(self, width: int) -> None:
        if self._classes not in (None, width):
            raise TargetLost(
                f"the response has {width} scores per row, but earlier ones had {self._classes}; the same number was "
                "expected: check the server"
            )
        refuse_too_many_classes("the response", width, self._expected)

    def _refuse_class_numbers(self, values: Values) -> None:
        """Raise `TargetLost` if each row is one integer, which is a class number unless it is declared as a score."""
        if values.shape[1] != 1 or self._declared:
            return
        have_integer_type = values.dtype.kind in "iu"
        # Some servers write class numbers as 3.0. A whole number outside [0, 1] would be read as a logit.
        are_integers = np.isfinite(values).all() and (values == values.round()).all()
        if have_integer_type or (
            are_integers and not self._has_fractions and ((values < 0) | (values > 1)).any()
        ):
            raise TargetLost(
                f"the response contains one integer per row, such as {values.flat[0]:g}, which may be a class or a "
                "score",
                _class_numbers("if these are classes"),
                replace(LOGIT, reason="if these are scores"),
                PATH,
            )
        self._has_fractions = self._has_fractions or not are_integers

    def _one_hot(self, content: Any, x: Tensor) -> Tensor:
        assert self._labels is not None
        values = as_values(content)
        self._refuse_other_kind("text" if values.dtype.kind == "U" else "numbers")
        values = self._entries(values, len(x))
        flat = values.reshape(len(values), -1)
        if flat.shape[1] != 1:
            raise TargetLost(
                f"the response has shape {values.shape}; one class for each of {len(x)} rows was expected",
                model_argument("http_labels", reason="if these are scores"),
                replace(PATH, reason="for the path of the classes"),
            )
        classes = flat[:, 0]
        if classes.dtype.kind != "U":
            self._refuse_no_classes(classes)
        if classes.dtype.kind == "U" or self._integer_names:
            classes = self._numbered([str(c if classes.dtype.kind == "U" else int(c)) for c in classes])
        return torch.nn.functional.one_hot(torch.from_numpy(classes.astype(np.int64)), self._labels)

    def _refuse_no_classes(self, numbers: Values) -> None:
        assert self._labels is not None
        invalid = ~np.isfinite(numbers) | (numbers != numbers.round())
        if not self._integer_names:
            invalid |= (numbers < 0) | (numbers >= self._labels)
        if invalid.any():
            raise TargetRefused(
                f"the response contains the class {numbers[invalid][0]:g}; integers from 0 to {self._labels - 1} were "
                "expected, because so many classes are declared",
                _names("if the classes have other numbers"),
            )

    def _numbered(self, labels: Sequence[str]) -> Values:
        """Return the class number of each string label."""
        if self._names is None:
            raise _unreadable_text(labels[0], "the order of the classes is not declared", _names())
        numbers = {name: number for number, name in enumerate(self._names)}
        for label in labels:
            if label not in numbers:
                shown = f"{listed(self._names)}{similar_name(label[:_SHOWN], self._names)}"
                raise _unreadable_text(
                    label, f"the names of the classes are {shown}", _names("with all names")
                )
        return np.array([numbers[label] for label in labels])


def refuse_too_many_classes(source: str, width: int, expected: int | None) -> None:
    """Raise `TargetLost` if a server returns another number of scores per row than the `expected` number of classes. A
    single score per row means two classes.
    """
    if expected in (None, max(width, 2)):
        return
    scores = "1 score" if width == 1 else f"{width} scores"
    raise TargetLost(
        f"{source} has {scores} per row, but {expected} classes are declared; check the declared classes",
        _class_numbers("if these are classes", expected),
        PATH,
    )


def rows_by_name(content: Any, n: int) -> list[Mapping[str, Any]] | None:
    """Return the scores in a server's response as one mapping from class names to scores for each of `n` rows. Return
    None if the response contains no class names.

    The response is a list of objects, an object with a list for each name, or, for a single row, one object. A list of
    objects with the keys `label` and `score` is equivalent to one object.
    """
    if isinstance(content, Mapping):
        columns = list(content.values())
        if columns and all(isinstance(column, list) and len(column) == n for column in columns):
            return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
        return [content] if n == 1 and _holds_scores(content) else None
    entries = content if isinstance(content, list) else []
    if n == 1 and len(entries) > 1 and _lists_classes(entries):
        entries = [entries]
    rows = [{str(e["label"]): e["score"] for e in row} if _lists_classes(row) else row for row in entries]
    return rows if rows and all(map(_holds_scores, rows)) else None


def _holds_scores(row: Any) -> bool:
    """Return whether a row is an object whose values are numbers or null."""
    return isinstance(row, Mapping) and bool(row) and not any(isinstance(v, _NO_SCORES) for v in row.values())


def _lists_classes(entry: Any) -> bool:
    return isinstance(entry, list) and all(isinstance(e, Mapping) and e.keys() >= _CLASS_KEYS for e in entry)


def first_characters(answer: Any, masked: Callable[[str], str]) -> str:
    """Return the first characters of a server's response as JSON for an error message, with secrets removed."""
    text = ""
    # Encoded in pieces, so that a response of many megabytes is not converted as a whole.
    for piece in json.JSONEncoder().iterencode(answer):
        text += piece[:_MASKED]
        if len(text) >= _MASKED:
            break
    # Secrets are removed before the text is shortened; otherwise the beginning of a secret could remain at its end.
    text = masked(text)
    return f"{text[:_BEGINNING]} …" if len(text) > _BEGINNING else text


def _unreadable_text(text: str, reason: str, remedy: Remedy) -> TargetLost:
    return TargetLost(f"the response contains the text {text[:_SHOWN]!r}; {reason}", remedy)


def _names(reason: str = "") -> Remedy:
    """Return the declaration of all classes, in their order."""
    text = (
        f"{reason}, in the order of the model's classes" if reason else "in the order of the model's classes"
    )
    return model_argument("class_names", NAMES, reason=text)


def _class_numbers(reason: str, classes: int | None = None) -> Remedy:
    """Return the declaration of a server that returns class numbers."""
    number = model_argument("classes", Placeholder("N") if classes is None else classes)
    return model_argument("http_labels", True, also=(number,), reason=reason)
