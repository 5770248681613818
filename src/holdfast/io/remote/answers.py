"""Converts the responses of a model server to scores or one-hot labels of the rows in the request.

A response contains one entry for each row: numbers, a string, or an object with a score for each class name. The
response to a single row may omit the axis of the rows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetLost, TargetRefused
from holdfast.core.outputs import LOGIT
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.io.data.class_numbers import listed
from holdfast.io.files import similar_name
from holdfast.io.remote.payloads import Shaped, Template, Values, as_values

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
PATH = Remedy(
    "http_response",
    Placeholder("PATH"),
    function="open_model",
    reason="for the path of the scores in the response",
)
"""the place of the scores, if a response contains several things"""
_ONE_ROW = Remedy(
    "http_max_rows", 1, function="open_model", reason="if the server accepts one row per request"
)


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
        self._integer_names = self._names is not None and all(map(_is_integer, self._names))
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
            classes = Remedy(
                "http_labels", True, function="open_model", also=names, reason="if it is a class"
            )
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
        first = Remedy("http_response", path, function="open_model")
        names = () if self._names else (_names(),)
        return (
            Remedy(
                "http_labels",
                True,
                function="open_model",
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
                Remedy("http_labels", function="open_model", reason="if these are scores"),
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


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _unreadable_text(text: str, reason: str, remedy: Remedy) -> TargetLost:
    return TargetLost(f"the response contains the text {text[:_SHOWN]!r}; {reason}", remedy)


def _names(reason: str = "") -> Remedy:
    """Return the declaration of all classes, in their order."""
    text = (
        f"{reason}, in the order of the model's classes" if reason else "in the order of the model's classes"
    )
    return Remedy("class_names", NAMES, function="open_model", reason=text)


def _class_numbers(reason: str, classes: int | None = None) -> Remedy:
    """Return the declaration of a server that returns class numbers."""
    number = Remedy("classes", Placeholder("N") if classes is None else classes, function="open_model")
    return Remedy("http_labels", True, function="open_model", also=(number,), reason=reason)
