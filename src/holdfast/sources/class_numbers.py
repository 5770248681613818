"""Assigns class numbers to class names: in the order that the user declares, or else in sorted order if it is
unambiguous.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.sources.columns import MOST_CHARACTERS
from holdfast.sources.expected import Expected
from holdfast.sources.files import similar_name

Array = NDArray[Any]
_SHOWN, _SHOWN_CHARACTERS = 10, 60
MOST_NAMES = 100_000
MOST_TEXTS = 10_000_000
"""Largest number of string labels of an array; sorting more takes minutes and ten times their memory."""


def class_numbers(
    found: Sequence[str], expected: Expected, classes: int | None, where: str, kind: str
) -> tuple[str, ...]:
    """Return the class names in the order of their class numbers. The result includes all names in `found`, which are
    the names in the data.

    `classes` is the number of the model's classes if it is known. `where` and `kind` describe the source and the names
    in messages, as in "class folders". Declared names determine the order. Without them the names are numbered in
    lexical order, as in torchvision and Keras. Raises `TargetError` if that order is ambiguous or a class is missing,
    and `UsageError` if the number of declared names differs from that of the model's classes.
    """
    if expected.class_names is not None:
        return _declared(found, expected, classes, where, kind)
    n_characters = sum(map(len, found))
    if n_characters > MOST_CHARACTERS:
        raise TargetError(
            f"{where} has {len(found):,} {kind} of {n_characters:,} characters in all; names of classes of at most "
            f"{MOST_CHARACTERS:,} were expected: shorten them, or number the classes 0, 1, 2, …"
        )
    lexical, numeric = sorted(found), _numeric_order(found)
    order = numeric if expected.class_order == "numeric" else lexical
    seen = f"{where} has {len(found)} {kind} ({listed(numeric)})"
    seen += "" if classes is None else f", and the model has {classes} classes"
    names = "in the order of the model's outputs: --class-names A,B,C (or @FILE, one name a line)"
    if classes is not None and len(found) < classes:
        raise TargetError(f"{seen}; it is not clear which are missing. Give all {classes} names {names}")
    why = "" if expected.class_order is not None else _unclear(lexical, numeric)
    if why:
        provided = " if no class is missing" if classes is None else ""
        raise TargetError(
            f"{seen}; {why}. Give the order of the training, --class-order lexical or --class-order numeric{provided}, "
            f"or give all names {names}"
        )
    if classes is not None and len(found) > classes:
        raise TargetError(
            f"{where} has {len(found)} {kind} ({listed(order)}), but the model has {classes} classes; remove those "
            f"that it does not know, or correct --classes{_served(expected)}"
        )
    return tuple(order)


def lenient_numbers(
    found: Sequence[str], expected: Expected, where: str, kind: str
) -> tuple[tuple[str, ...], str]:
    """Return the class names in the order of their class numbers, as `class_numbers` does, and an empty string.

    If `class_numbers` raises an error and `expected` permits any label, return the names in lexical order and the
    error's message instead.
    """
    classes = expected.classes or (None if expected.probe is None else expected.probe.classes)
    try:
        return class_numbers(found, expected, classes, where, kind), ""
    except (TargetError, UsageError) as error:
        if not expected.any_label:
            raise
        return tuple(sorted(found)), str(error)


@dataclass(frozen=True)
class Numbered:
    """Labels of the examples of a data set, converted to class numbers."""

    y: Array
    names: tuple[str, ...] | None = None
    """names of the classes, if the original labels are strings"""
    objection: str = ""
    """reason why the class numbers are uncertain, if the data were accepted in spite of it; else empty"""


def numbered(y: Array, expected: Expected, name: str) -> Numbered:
    """Convert the labels `y` (n,) of a data set, which may be integers or strings, to class numbers.

    Integers are looked up among the class labels of the model if it has some; otherwise they are the class numbers.
    Strings are numbered as in `class_numbers`. Labels of other types are returned unchanged and rejected by a later
    check. Raises `TargetError` for a label that the model does not have.
    """
    if y.ndim == 1 and y.dtype.kind == "U" and len(y):
        if len(y) > MOST_TEXTS:
            raise TargetError(
                f"{name} has {len(y):,} labels that are text; at most {MOST_TEXTS:,} are read: save class numbers"
            )
        found, places = np.unique(y, return_inverse=True)
        return numbered_words(found.tolist(), places, expected, name)
    if expected.class_labels is None or y.ndim != 1 or y.dtype.kind not in "iu":
        return Numbered(y)
    return Numbered(_among(y, expected.class_labels, expected, name))


def numbered_words(words: Sequence[str], places: Array, expected: Expected, name: str) -> Numbered:
    """Convert string labels to class numbers. `words` contains the distinct labels, and `places` (n,) is the index in
    `words` of the label of each example.

    Words that are not the label of any example are not classes. Raises the errors of `class_numbers`, and `TargetError`
    for more than 100,000 different labels.
    """
    used = np.unique(places)
    if len(used) > MOST_NAMES:
        raise TargetError(
            f"{name} has {len(used):,} different text labels; at most {MOST_NAMES:,} classes were expected: name the "
            "column of the label with --label"
        )
    names, objection = lenient_numbers(sorted(words[place] for place in used), expected, name, "text labels")
    numbers = {each: number for number, each in enumerate(names)}
    return Numbered(np.array([numbers.get(word, -1) for word in words])[places], names, objection)


def _among(y: Array, labels: tuple[int, ...], expected: Expected, name: str) -> Array:
    """Return the index of each label in `labels`, the class labels of the model."""
    numbers = {label: number for number, label in enumerate(labels)}
    found, places = np.unique(y, return_inverse=True)
    strange = [label for label in found.tolist() if label not in numbers]
    if strange and not expected.any_label:
        raise TargetError(
            f"the labels of {name} hold {strange[0]}, and the classes of the model are "
            f"{listed(list(map(str, labels)))}; give the labels that the model was fitted on"
        )
    beyond = len(labels)  # number of a label outside the classes
    return np.array([numbers.get(label, beyond) for label in found.tolist()], dtype=np.int64)[places]


def matched(
    names: tuple[str, ...] | None, expected: Expected
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Compare the class names of a data set with those of the model. Return the class names, and the new number of each
    class if the order differs, else None.

    Integer labels are class numbers. They are renumbered only if the source and the model have the same class names in
    a different order. Raises `TargetError` if the user declared names that do not include all names of the source.
    """
    declared = expected.class_names
    if declared is None or names is None or names == declared:
        return names or declared, None
    numbers = {name: number for number, name in reversed([*enumerate(declared)])}
    strange = [name for name in names if name not in numbers]
    if not strange:
        return declared, tuple(numbers[name] for name in names)
    if expected.names_declared:
        raise TargetError(
            f"the data name the classes {listed(names)}, and --class-names {listed(declared)}"
            f"{similar_name(strange[0], declared)}; leave --class-names out, or use the same names"
        )
    return names, None


def renumbered(y: Array, numbers: tuple[int, ...], name: str) -> Array:
    """Replace the class number of each label by the entry of `numbers` for this class. Raises `TargetError` for a label
    without a class name.
    """
    if len(y) and (y.min() < 0 or y.max() >= len(numbers)):
        raise TargetError(
            f"the labels of {name} range from {y.min()} to {y.max()}, but it names {len(numbers)} classes; "
            "correct the labels or the classes"
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
    found: Sequence[str], expected: Expected, classes: int | None, where: str, kind: str
) -> tuple[str, ...]:
    names = expected.class_names or ()
    source = "--class-names has" if expected.names_declared else "the model names"
    if classes is not None and len(names) != classes:
        raise UsageError(
            f"{source} {len(names)} classes ({listed(names)}), but the model has {classes}; give one name for each of "
            "its outputs, in their order"
        )
    known = set(names)
    strange = [name for name in found if name not in known]
    if strange:
        raise TargetError(
            f"{where} has the {kind} {listed(strange)}, and {source} {listed(names)}{similar_name(strange[0], names)}; "
            "correct the names, with --class-names A,B,C in the order of the model's outputs"
        )
    return names


def _served(expected: Expected) -> str:
    given = "--http-labels and --class-names A,B,C"
    return f"; if the server answers with classes, give {given}" if expected.remote else ""


def _unclear(lexical: list[str], numeric: list[str]) -> str:
    """Return the reason why the order of the names does not determine class numbers, or "" if it does."""
    whole = [name for name in numeric if re.fullmatch("-?[0-9]+", name)]
    if whole and len(whole) < len(numeric):
        other = next(name for name in numeric if name not in whole)
        return f"some names are whole numbers and others, such as {other!r}, are not"
    reasons = []
    if lexical != numeric:
        reasons.append(f"the lexical order of the names ({listed(lexical)}) differs from the numeric order")
    numbers = [int(name) for name in whole]
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
