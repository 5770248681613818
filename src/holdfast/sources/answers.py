"""What a server answers, read as scores or as one-hot labels of the rows that it was asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetLost, TargetRefused
from holdfast.sources.class_numbers import listed
from holdfast.sources.files import nearest
from holdfast.sources.payloads import Shaped, Template, Values

_SHOWN = 80
"""characters that are shown of a label that is not known"""


class Answers:
    """Reads the answers of one server, which must all have the same form.

    `labels` is the number of classes of a server that answers with labels. Those that are text are looked up in
    `names`, which are in the order of the classes. With `declared` single numbers are scores, whatever their type.
    `masked` takes secrets out of a text that a message shows.
    """

    def __init__(
        self,
        form: Shaped | Template,
        *,
        labels: int | None,
        names: Sequence[str] | None,
        declared: bool,
        masked: Callable[[str], str],
    ) -> None:
        self._form, self._labels, self._names = form, labels, names
        self._declared, self._masked = declared, masked
        self._classes: int | None = None
        self._split = False
        """whether a score that is no whole number was seen"""

    @property
    def classes(self) -> int | None:
        """The number of scores of a row; None before the first answer."""
        return self._classes or self._labels

    def read(self, answer: Any, x: Tensor) -> Tensor:
        """Scores (n, classes) float64, or one-hot labels (n, classes) int64, of the rows `x` (n, *features).

        Raises `TargetLost` or `TargetRefused` for an answer that is neither.
        """
        try:
            values = self._form.found(answer)
        except TargetLost as error:
            raise TargetLost(self._masked(str(error))) from None
        if len(values.shape) == 0 or len(values) != len(x):
            shape = f"shape {values.shape}" if values.shape else "one value"
            raise TargetRefused(
                f"the answer to {len(x)} rows has {shape}; one entry for each row was expected"
            )
        return self._scores(values, x) if self._labels is None else self._one_hot(values, x)

    def recall(self, row: Tensor) -> None:
        """Take the scores of a row (classes), or its one-hot label, that an earlier attempt at the run was answered."""
        if self._labels is None:
            self._classes = len(row)
            self._split = self._split or bool((row != row.round()).any())

    def _scores(self, values: Values, x: Tensor) -> Tensor:
        if values.dtype.kind == "U":
            raise self._unread(
                values.flat[0], "scores were expected; if it is a class, give --http-labels and"
            )
        wide = values.reshape(len(values), -1)
        self._refuse_class_numbers(wide)
        if values.ndim > 2 or not wide.shape[1]:
            raise TargetRefused(
                f"the answer has shape {values.shape}; one row of scores for each of {len(x)} was expected"
            )
        if self._classes not in (None, wide.shape[1]):
            raise TargetRefused(
                f"the answer has {wide.shape[1]} scores a row, where earlier ones had {self._classes}"
            )
        self._classes = wide.shape[1]
        scores = torch.from_numpy(wide.astype(np.float64))
        if scores.to(x.dtype).isinf().any():
            raise TargetRefused(
                f"the answer holds an infinite score, or one too large for {str(x.dtype).removeprefix('torch.')}; "
                "a number for each class was expected"
            )
        return scores

    def _refuse_class_numbers(self, values: Values) -> None:
        """Raise `TargetLost` for one whole number a row, which is a class and no score unless it is declared as one."""
        if values.shape[1] != 1 or self._declared or not len(values):
            return
        written_as_whole = values.dtype.kind in "iu"
        # Some servers write class numbers as 3.0. A whole number outside [0, 1] would be read as a logit.
        whole = np.isfinite(values).all() and (values == values.round()).all()
        if written_as_whole or (whole and not self._split and ((values < 0) | (values > 1)).any()):
            raise TargetLost(
                f"the answer holds one whole number a row, such as {values.flat[0]:g}. If those are classes, give "
                "--http-labels and --classes N; if they are scores, declare them with --model-output logit, or name "
                "others with --http-response"
            )
        self._split = self._split or not whole

    def _one_hot(self, values: Values, x: Tensor) -> Tensor:
        assert self._labels is not None
        flat = values.reshape(len(values), -1)
        if flat.shape[1] != 1:
            raise TargetRefused(
                f"the answer has shape {values.shape}; one class for each of {len(x)} rows was expected"
            )
        classes = self._numbered(flat[:, 0]) if flat.dtype.kind == "U" else flat[:, 0]
        strange = (
            ~np.isfinite(classes) | (classes != classes.round()) | (classes < 0) | (classes >= self._labels)
        )
        if strange.any():
            raise TargetRefused(
                f"the answer holds the class {classes[strange][0]:g}; whole numbers from 0 to {self._labels - 1} were "
                "expected, so check --classes"
            )
        return torch.nn.functional.one_hot(torch.from_numpy(classes.astype(np.int64)), self._labels)

    def _numbered(self, labels: Values) -> Values:
        """The class number of each label that is text."""
        if self._names is None:
            raise self._unread(labels[0], "the order of the classes is not declared; give")
        numbers = {name: number for number, name in enumerate(self._names)}
        for label in labels:
            if label not in numbers:
                known = f"{listed(self._names)}{nearest(label[:_SHOWN], self._names)}"
                raise self._unread(label, f"the names of the classes are {known}; give all of them with")
        return np.array([numbers[label] for label in labels])

    def _unread(self, text: str, why: str) -> TargetRefused:
        said = f"the answer holds the text {text[:_SHOWN]!r}, and {why}"
        return TargetRefused(self._masked(f"{said} --class-names A,B,C in the order of the model's classes"))
