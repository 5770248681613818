"""Labels of a data set: their checks, the numbers of named classes, and groups of examples."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from holdfast.core.batch import CLASSIFIERS_ONLY, off_range
from holdfast.core.errors import (
    HoldfastError,
    Placeholder,
    Remedy,
    TargetError,
    UsageError,
    data_argument,
    model_argument,
)
from holdfast.core.names import by_stripped, most_similar, note_on_spaces
from holdfast.io.data.columns import MOST_CHARACTERS, Words, number_of
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.files import names_of, similar_name

Array = NDArray[Any]

_ROUNDING = 1e-3
"""largest difference from 1 of the sum of the probabilities of the classes; larger than that of float16"""


def whole_numbers(y: Array) -> Array:
    """Return labels that are whole numbers stored as floats as int64, and other labels unchanged."""
    is_whole = y.dtype.kind == "f" and bool((np.isfinite(y) & (y == np.round(y))).all())
    return y.astype(np.int64) if is_whole else y


def refuse_swapped(x: Array, y: Array, name: str, *remedies: Remedy) -> None:
    """Raise `TargetError` if the labels have the shape of inputs, and the inputs are whole numbers or names in the
    shape of labels.
    """
    shaped = y.ndim > x.ndim and len(x) == len(y) and y[:1].size > 1
    if shaped and whole_numbers(x).dtype.kind in "iubU":
        advice = "" if remedies else "; give the inputs first and then the labels, as in (x, y)"
        raise TargetError(
            f"the inputs of {name} have shape {x.shape} and its labels {y.shape}, which seem to be swapped{advice}",
            *remedies,
        )


def class_labels(
    y: Array,
    n_rows: int,
    expected: DeclaredData,
    *,
    classes: int | None,
    name: str,
    source_labels: Array | None = None,
) -> NDArray[np.int64]:
    """Check the labels of a data set, and return them as int64 class numbers (n_rows,) from 0 to classes - 1.

    Raises `TargetError` for other labels, unless `expected` permits any label. If `y` is a part of a source,
    `source_labels` contains the labels of the whole source, whose range is part of the error message.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    all_labels = y if source_labels is None or source_labels.ndim != y.ndim else source_labels
    if y.ndim == 2 and len(y) == n_rows:
        _refuse_rows(all_labels, name)
    if y.ndim != 1:
        raise TargetError(
            f"the labels of {name} have shape {y.shape}; one class number per example was expected. {CLASSIFIERS_ONLY}"
        )
    if len(y) != n_rows:
        raise TargetError(
            f"{name} has {n_rows} examples and {len(y)} labels; one label per example was expected"
        )
    y, all_labels = whole_numbers(y), whole_numbers(all_labels)
    if all_labels.dtype.kind == "f":
        _refuse_fractions(all_labels, name)
    if y.dtype.kind not in "iub":
        raise TargetError(
            f"the labels of {name} are {y.dtype}; integers (int64) were expected: give the index of each name among "
            "the model's classes, as in [names.index(name) for name in y]"
        )
    y = y.astype(np.int64)
    if expected.any_label:
        return y
    if len(y) and y.min() < 0:
        signs = set(np.unique(all_labels).tolist()) == {-1, 1}
        way_out = "give (y + 1) // 2" if signs else "remove rows without a class, or renumber the classes"
        raise TargetError(f"the labels of {name} contain {y.min()}; class numbers start at 0: {way_out}")
    if classes is not None and len(y) and y.max() >= classes:
        lowest, highest = int(all_labels.min()), int(all_labels.max())
        raise off_range(lowest, highest, classes, name, remote=expected.remote)
    return y


def _refuse_fractions(y: Array, name: str) -> NoReturn:
    """Raise `TargetError` for labels that are floats and not all whole numbers."""
    missing = np.flatnonzero(~np.isfinite(y))
    present = y[np.isfinite(y)]
    if len(missing) and bool((present == np.round(present)).all()):
        raise TargetError(
            f"the label of row {missing[0]} of {name} is {y[missing[0]]}; a class number was expected: remove rows "
            "without a class"
        )
    fraction = present[present != np.round(present)][0]
    raise TargetError(
        f"the labels of {name} are {y.dtype} with values such as {fraction:.6g}; class numbers 0, 1, 2, … were "
        f"expected. {CLASSIFIERS_ONLY}"
    )


def _refuse_rows(y: Array, name: str) -> NoReturn:
    """Raise `TargetError` for labels (n, k) with several numbers for each example."""
    start = f"the labels of {name} have shape {y.shape}"
    if y.dtype.kind not in "iubf" or not len(y) or not y.shape[1]:
        raise TargetError(f"{start}; one class number per example was expected. {CLASSIFIERS_ONLY}")
    sums = y.sum(1, dtype=np.float64)
    if not bool(((y == 0) | (y == 1)).all()):
        if y.dtype.kind == "f" and bool((y >= 0).all()) and bool((np.abs(sums - 1) <= _ROUNDING).all()):
            raise TargetError(
                f"{start} and are probabilities of the classes (soft labels); success of an attack is defined by the "
                "true class, so one class number per example was expected"
            )
        raise TargetError(
            f"{start}, several numbers per example; one class number was expected. {CLASSIFIERS_ONLY}"
        )
    several, none = np.flatnonzero(sums > 1), np.flatnonzero(sums == 0)
    if len(several):
        raise TargetError(
            f"{start}, and row {several[0]} has {int(sums[several[0]])} classes; one class per example was expected. "
            "Classifiers with several labels per example are not supported"
        )
    if len(none):
        raise TargetError(
            f"{start}, and {len(none)} of the rows, first row {none[0]}, have no class; one class per example was "
            "expected: remove rows without a class, and then give y.argmax(1)"
        )
    raise TargetError(f"{start} and are one-hot rows; class numbers were expected: give y.argmax(1)")


_NAMES = Placeholder("A,B,C", "[A, B, C]")
_SHOWN, _SHOWN_CHARACTERS = 10, 60  # names in a message, and characters of each
_NUMBERED = 6  # class numbers in a note
MOST_NAMES = 100_000  # labels with more values are rather ids or texts than classes
MOST_TEXTS = 10_000_000
"""Largest number of string labels of an array; sorting more takes minutes and ten times their memory."""


def class_numbers(
    names_in_data: Sequence[str], expected: DeclaredData, classes: int | None, where: str, kind: str
) -> tuple[str, ...]:
    """Return the class names in the order of their class numbers. The result includes all names in `names_in_data`,
    which are the names in the data.

    `classes` is the number of the model's classes if it is known. `where` and `kind` describe the source and the names
    in messages, as in "class folders". Declared names determine the order. Without them the names are numbered in
    lexical order, as in torchvision and Keras. Raises `TargetError` if that order is ambiguous or a class is missing,
    and `UsageError` if the number of declared names differs from that of the model's classes.
    """
    if expected.class_names is not None:
        return _declared(names_in_data, expected, classes, where, kind)
    n_characters = sum(map(len, names_in_data))
    if n_characters > MOST_CHARACTERS:
        raise TargetError(
            f"{where} has {len(names_in_data):,} {kind} of {n_characters:,} characters in all; names of classes of at "
            f"most {MOST_CHARACTERS:,} were expected: shorten them, or number the classes 0, 1, 2, …"
        )
    lexical, numeric = sorted(names_in_data), _numeric_order(names_in_data)
    order = numeric if expected.class_order == "numeric" else lexical
    description = f"{where} has {len(names_in_data)} {kind} ({listed(numeric)})"
    description += "" if classes is None else f", and the model has {classes} classes"
    if classes is not None and len(names_in_data) < classes:
        raise TargetError(
            f"{description}; it is not clear which are missing",
            _names(f"with all {classes} names, in the order of the model's outputs"),
        )
    reason = "" if expected.class_order is not None else _unclear(lexical, numeric)
    if reason:
        condition = " and no class is missing" if classes is None else ""
        orders = (
            model_argument("class_order", order, reason=f"if the training used it{condition}")
            for order in ("lexical", "numeric")
        )
        names = _names("with all names, in the order of the model's outputs")
        raise TargetError(f"{description}; {reason}", *orders, names)
    if classes is not None and len(names_in_data) > classes:
        raise TargetError(
            f"{where} has {len(names_in_data)} {kind} ({listed(order)}), but the model has {classes} classes; remove "
            "the others, or correct the number of classes if it was declared",
            *_served(expected),
        )
    return tuple(order)


def lenient_numbers(
    names_in_data: Sequence[str], expected: DeclaredData, where: str, kind: str
) -> tuple[tuple[str, ...], HoldfastError | None]:
    """Return the class names in the order of their class numbers, as `class_numbers` does, and None.

    If `class_numbers` raises an error and `expected` permits any label, return the names in lexical order and the
    error instead.
    """
    classes = expected.classes or (None if expected.probe is None else expected.probe.classes)
    try:
        return class_numbers(names_in_data, expected, classes, where, kind), None
    except (TargetError, UsageError) as error:
        if not expected.any_label:
            raise
        return tuple(sorted(names_in_data)), error


@dataclass(frozen=True)
class Numbered:
    """Labels of the examples of a data set, converted to class numbers."""

    y: Array
    names: tuple[str, ...] | None = None
    """names of the classes, if the original labels are strings"""
    objection: HoldfastError | None = None
    """reason why the class numbers are uncertain, if the data were accepted in spite of it"""
    on_spaces: tuple[str, ...] = ()
    """note on labels that were read without spaces at their ends"""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report on the number of each class and on spaces, if the original labels are strings."""
        if self.names is None:
            return ()
        shown = ", ".join(f"{name}={i}" for i, name in enumerate(self.names[:_NUMBERED]))
        more = " …" if len(self.names) > _NUMBERED else ""
        return (f"text labels were numbered: {shown}{more}", *self.on_spaces)


def numbered(y: Array, expected: DeclaredData, name: str) -> Numbered:
    """Convert the labels `y` (n,) of a data set, which may be integers or strings, to class numbers.

    Integers are looked up among the class labels of the model if it has some; otherwise they are the class numbers.
    Strings are numbered as in `class_numbers`. Labels of other types are returned unchanged and rejected by a later
    check. Raises `TargetError` for a label that the model does not have.
    """
    if y.ndim == 1 and y.dtype.kind == "U" and len(y):
        if len(y) > MOST_TEXTS:
            raise TargetError(
                f"{name} has {len(y):,} labels that are text; at most {MOST_TEXTS:,} are read: save class numbers "
                "instead"
            )
        distinct, indices = np.unique(y, return_inverse=True)
        return numbered_words(distinct.tolist(), indices, expected, name)
    if expected.class_labels is None or y.ndim != 1 or y.dtype.kind not in "iu":
        return Numbered(y)
    return Numbered(_among(y, expected.class_labels, expected, name))


def numbered_words(words: Sequence[str], indices: Array, expected: DeclaredData, name: str) -> Numbered:
    """Convert string labels to class numbers. `words` contains the distinct labels, and `indices` (n,) is the index in
    `words` of the label of each example.

    Words that are not the label of any example are not classes, and words that differ only by spaces at their ends are
    the same class. Raises the errors of `class_numbers`, and `TargetError`
    for more than 100,000 different labels.
    """
    used_places = np.unique(indices)
    if len(used_places) > MOST_NAMES:
        raise TargetError(
            f"{name} has {len(used_places):,} different text labels; at most {MOST_NAMES:,} classes were expected",
            data_argument("label", Placeholder("COLUMN"), reason="if another column has the labels"),
        )
    read_as = by_stripped((words[place] for place in used_places), expected.class_names or ())
    names, objection = lenient_numbers(sorted({*read_as.values()}), expected, name, "text labels")
    numbers = {class_name: number for number, class_name in enumerate(names)}
    y = np.array([numbers.get(read_as.get(word, word), -1) for word in words])[indices]
    return Numbered(y, names, objection, note_on_spaces(f"the label of {name}", read_as))


def _among(y: Array, labels: tuple[int, ...], expected: DeclaredData, name: str) -> Array:
    """Return the index of each label in `labels`, the class labels of the model."""
    numbers = {label: number for number, label in enumerate(labels)}
    distinct, places = np.unique(y, return_inverse=True)
    unknown = [label for label in distinct.tolist() if label not in numbers]
    if unknown and not expected.any_label:
        raise TargetError(
            f"the labels of {name} contain {unknown[0]}, but the classes of the model are "
            f"{listed(list(map(str, labels)))}; give the labels that the model was fitted on"
        )
    outside = len(labels)  # number of a label outside the classes
    return np.array([numbers.get(label, outside) for label in distinct.tolist()], dtype=np.int64)[places]


def matched(
    names: tuple[str, ...] | None, expected: DeclaredData
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Compare the class names of a data set with those of the model. Return the class names, and the new number of each
    class if the order differs, else None.

    Integer labels are class numbers. They are renumbered only if the source and the model have the same class names in
    a different order. Raises `TargetError` if the user declared names that do not include all names of the source.
    """
    declared = expected.class_names
    if declared is None or names is None or names == declared:
        return names or declared, None
    read_as = by_stripped(names, declared)
    names = tuple(read_as[name] for name in names)
    if names == declared:
        return declared, None
    # Reversed, so that of two equal names the first one counts.
    numbers = {name: number for number, name in reversed([*enumerate(declared)])}
    unknown = [name for name in names if name not in numbers]
    if not unknown:
        return declared, tuple(numbers[name] for name in names)
    if expected.names_declared:
        raise TargetError(
            f"the classes of the data are {listed(names)}, but class_names is {listed(declared)}"
            f"{similar_name(unknown[0], declared)}; use the same names",
            model_argument("class_names"),
        )
    return names, None


def renumbered(y: Array, numbers: tuple[int, ...], name: str) -> Array:
    """Replace the class number of each label by the entry of `numbers` for this class. Raises `TargetError` for a label
    without a class name.
    """
    if len(y) and (y.min() < 0 or y.max() >= len(numbers)):
        raise TargetError(
            f"the labels of {name} range from {y.min()} to {y.max()}, but it has the names of {len(numbers)} classes; "
            "correct the labels or the names"
        )
    return np.array(numbers, dtype=np.int64)[y]


def listed(names: Sequence[str]) -> str:
    """Return the first ten names as one string, separated by commas. An ellipsis stands for further names and for the
    rest of a long name.
    """
    shown = (
        name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…" for name in names[:_SHOWN]
    )
    return ", ".join(shown) + (" …" if len(names) > _SHOWN else "")


def _declared(
    names_in_data: Sequence[str], expected: DeclaredData, classes: int | None, where: str, kind: str
) -> tuple[str, ...]:
    names = expected.class_names or ()
    source = "class_names has" if expected.names_declared else "the model has the names of"
    if classes is not None and len(names) != classes:
        raise UsageError(
            f"{source} {len(names)} classes ({listed(names)}), but the model has {classes}; give one name for each of "
            "its outputs, in their order"
        )
    declared = set(names)
    unknown = [name for name in names_in_data if name not in declared]
    if unknown:
        raise TargetError(
            f"{where} has the {kind} {listed(unknown)}, and {source} {listed(names)}{similar_name(unknown[0], names)}; "
            "correct the names",
            _names("in the order of the model's outputs"),
        )
    return names


def _names(reason: str) -> Remedy:
    return model_argument("class_names", _NAMES, reason=reason)


def _served(expected: DeclaredData) -> tuple[Remedy, ...]:
    names = model_argument("class_names", _NAMES)
    labels = model_argument("http_labels", True, also=(names,), reason="if the server returns classes")
    return (labels,) if expected.remote else ()


def _unclear(lexical: list[str], numeric: list[str]) -> str:
    """Return the reason why the order of the names does not determine class numbers, or "" if it does."""
    integers = [name for name in numeric if re.fullmatch("-?[0-9]+", name)]
    if integers and len(integers) < len(numeric):
        no_integer = next(name for name in numeric if name not in integers)
        return f"some names are whole numbers and others, such as {no_integer!r}, are not"
    reasons = []
    if lexical != numeric:
        reasons.append(f"the lexical order of the names ({listed(lexical)}) differs from the numeric order")
    numbers = [int(name) for name in integers]
    if numbers and numbers[0] != 0 and numbers != [-1, 1]:
        reasons.append(f"class numbers start at 0, and these names at {numbers[0]}")
    if numbers and numbers[0] == 0 and numbers != list(range(len(numbers))):
        reasons.append("the numbers are not consecutive")
    return ", and ".join(reasons)


def _numeric_order(names: Sequence[str]) -> list[str]:
    """Return the names in numeric order: integers by value, and other names with each run of digits compared
    by value.
    """
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names, key=lambda name: (_characters(name), name))


def _characters(name: str) -> list[tuple[int, int]]:
    """Return the code points of a name, where each run of ASCII digits is one entry with its value."""
    runs = re.findall("[0-9]+|[^0-9]", name)
    return [(ord("0"), int(run)) if run[0] in "0123456789" else (ord(run), 0) for run in runs]


MOST_GROUPS = 50
"""Largest number of groups. Simultaneous intervals of more groups are wide, and each group has its own letter."""
MISSING = "missing"
"""Name of the group of the examples without a value."""
_LETTERS = string.ascii_letters


@dataclass(frozen=True)
class Groups:
    """The group of each example of a data set."""

    names: tuple[str, ...]
    places: NDArray[np.int64]
    """(n,) indices in `names`"""
    column: str = ""
    """name of the column or array that states the groups; empty for an array that was given in Python"""
    absent: tuple[str, ...] = ()
    """names of the groups of the source without an example"""

    @classmethod
    def of_values(cls, values: NDArray[Any], column: str = "") -> "Groups":
        """Return the groups of examples by their values (n,). Examples without a value are the group `missing`.

        Raises `UsageError` for values with more than one axis.
        """
        if values.ndim != 1:
            raise UsageError(
                f"{_called(column)} has the shape {values.shape}; one value for each example was expected, as in (100,)"
            )
        distinct, places = np.unique(
            values.astype(str) if values.dtype.kind == "S" else values, return_inverse=True
        )
        return cls.of_words(Words(tuple(map(_text, distinct.tolist())), places.astype(np.int32)), column)

    @classmethod
    def of_words(cls, words: Words, column: str) -> "Groups":
        """Return the groups of the rows of a table by their strings in a column."""
        used, places = np.unique(words.places, return_inverse=True)
        texts = [words.words[place].strip() for place in used]
        shown = [MISSING if not text or text.lower() == "nan" else text for text in texts]
        names = sorted({*shown}, key=_order)
        indices = {name: place for place, name in enumerate(names)}
        return cls(tuple(names), np.array([indices[name] for name in shown], np.int64)[places], column)

    def taken(self, rows: Any) -> "Groups":
        """Return the groups of the examples in the given rows."""
        return replace(self, places=self.places[np.asarray(rows, dtype=np.int64)])

    def occurring(self) -> "Groups":
        """Return the groups that occur."""
        occurring, places = np.unique(self.places, return_inverse=True)
        names = tuple(self.names[place] for place in occurring)
        return replace(
            self, names=names, places=places, absent=tuple(n for n in self.names if n not in names)
        )

    def refuse_unusable(self) -> "Groups":
        """Return the groups that occur. Raise `UsageError` if only one occurs, or more than 50."""
        groups = self.occurring()
        if len(groups.names) > MOST_GROUPS:
            raise UsageError(
                f"{_called(self.column)} has {len(groups.names):,} different values; at most {MOST_GROUPS} groups were "
                "expected: give a column of categories, such as ranges of a number"
            )
        if len(groups.names) < 2:
            raise UsageError(
                f"{_called(self.column)} is {groups.names[0]!r} for all {len(self.places):,} examples; at "
                "least two groups were expected",
                Remedy("groups"),
            )
        return groups

    def to_json(self) -> dict[str, Any]:
        """Return the groups for a manifest: `of` has one letter for each example, `a` for the first group."""
        of = "".join(_LETTERS[place] for place in self.places)
        return {"column": self.column, "names": list(self.names), "of": of, "absent": list(self.absent)}


def refuse_unknown(name: str, known: Sequence[str], where: str, setting: str) -> None:
    """Raise `UsageError` if the data `where` have no column or array of the groups with this name, which `setting`
    states.
    """
    if name not in known:
        raise UsageError(
            f"{where} has no column or array {name!r}; it has {names_of(known)}",
            Remedy(setting, most_similar(name, known) or Placeholder("NAME")),
        )


def places_of_letters(letters: str, n_groups: int) -> NDArray[np.int64]:
    """Return the index of the group of each example from the letters in a manifest. Raises `TargetError` for a letter
    of no group.
    """
    wrong = {*letters} - {*_LETTERS[:n_groups]}
    if wrong:
        raise TargetError(
            f"the groups of the examples are {n_groups}, and a letter of them is {min(wrong)!r}; one of "
            f"{_LETTERS[:n_groups]} was expected"
        )
    return np.array([_LETTERS.index(letter) for letter in letters], np.int64)


def _called(column: str) -> str:
    return f"the group {column!r}" if column else "groups"


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _order(name: str) -> tuple[bool, bool, float, str]:
    """Order of groups: numbers, then names, and the group without a value last."""
    number = number_of(name)
    return name == MISSING, number is None, 0.0 if number is None else number, name
