"""Which notes a person is told at once, and which are details that nobody has to act upon."""

from collections.abc import Mapping
from typing import Any

DETAILS = frozenset(
    (
        "batch norm is folded into the layer before it",
        "convolutions run channels last",
        "convolutions of few channels give their input gradient as a matrix product",
    )
)
"""How the copy that the attacks ask is made quick; a test keeps them in step with `holdfast.ops.prepare`."""


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """The notes that are no details."""
    return [note for note in summary["notes"] if note not in DETAILS]


def details(summary: Mapping[str, Any]) -> list[str]:
    """The notes that are details."""
    return [note for note in summary["notes"] if note in DETAILS]


def spoken(summary: Mapping[str, Any], *, verbose: bool = False) -> list[str]:
    """The notes beside the verdict, which says the raised doubts: no sentence twice, details where `verbose`."""
    said = {doubt["says"] for doubt in summary["doubts"] if doubt["state"] == "raised"}
    notes = summary["notes"] if verbose else remarks(summary)
    return [note for note in notes if note not in said]
