"""Divides notes into those that are always shown and details that need no action."""

from collections.abc import Mapping
from typing import Any

DETAILS = frozenset(
    (
        "batch norm is folded into the layer before it",
        "convolutions run channels last",
        "convolutions of few channels give their input gradient as a matrix product",
    )
)
"""Notes on optimisations of the copy that attacks query; a test compares them with `holdfast.ops.prepare`."""


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """The notes that are not details."""
    return [note for note in summary["notes"] if note not in DETAILS]


def details(summary: Mapping[str, Any]) -> list[str]:
    """The notes that are details."""
    return [note for note in summary["notes"] if note in DETAILS]


def spoken_notes(summary: Mapping[str, Any], *, verbose: bool = False) -> list[str]:
    """The notes to show with the verdict, without those that repeat a raised doubt; with details if `verbose`."""
    in_doubts = {doubt["says"] for doubt in summary["doubts"] if doubt["state"] == "raised"}
    notes = summary["notes"] if verbose else remarks(summary)
    return [note for note in notes if note not in in_doubts]
