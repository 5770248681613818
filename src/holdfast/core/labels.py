"""Error messages for labels that are not among the classes of a model."""

from typing import Final

from holdfast.core.errors import TargetError
from holdfast.core.remedies import Remedy

CLASSIFIERS_ONLY: Final = (
    "Holdfast attacks classifiers with one class per example; regression and models with several outputs per example "
    "are not supported"
)
"""Sentence about targets that are not classes."""


def off_range(lowest: int, highest: int, classes: int, name: str, *, remote: bool = False) -> TargetError:
    """Return the error for the data set `name`, whose labels range from `lowest` to `highest` and do not fit a
    model with `classes` classes. `remote` means a served model.
    """
    return TargetError(
        f"the labels of {name} range from {lowest} to {highest}, but the model has {classes} classes "
        f"(0 to {classes - 1}); {advice(lowest, highest, classes)}",
        *remedies(lowest, highest, classes, remote=remote),
    )


def advice(lowest: int, highest: int, classes: int) -> str:
    """Return the part of an error message that suggests what to do if labels from `lowest` to `highest` do not fit a
    model with `classes` classes.
    """
    if lowest == 1 and highest == classes:
        return "they appear to count from 1: subtract 1"
    return (
        "check the label column, and that the model was trained on these classes (targets of a regression are no "
        "classes)"
    )


def remedies(lowest: int, highest: int, classes: int, *, remote: bool) -> tuple[Remedy, ...]:
    """Return the changes of arguments by which a served model may have more classes than its responses show."""
    if not remote or lowest < 0 or (lowest == 1 and highest == classes):
        return ()
    number = Remedy("classes", highest + 1, function="open_model")
    return (
        Remedy(
            "http_labels", True, function="open_model", also=(number,), reason="if the server returns classes"
        ),
    )
