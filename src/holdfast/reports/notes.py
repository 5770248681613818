"""Selects the notes to show with a verdict."""

from collections.abc import Mapping
from typing import Any


def spoken_notes(summary: Mapping[str, Any], *, verbose: bool = False) -> list[str]:
    """The notes to show with the verdict, without those that repeat a raised doubt; with details if `verbose`."""
    in_doubts = {doubt["message"] for doubt in summary["doubts"] if doubt["state"] == "raised"}
    notes = [*summary["notes"], *(summary["details"] if verbose else ())]
    return [note for note in notes if note not in in_doubts]
