"""Selection of the notes that a report shows with the verdict of a run."""

from collections.abc import Mapping
from typing import Any


def shown_notes(summary: Mapping[str, Any], *, verbose: bool = False) -> list[str]:
    """Return the notes that a report shows with the verdict of a run, without those that repeat a raised doubt.

    With `verbose`, the details are included.
    """
    in_doubts = {doubt["message"] for doubt in summary["doubts"] if doubt["state"] == "raised"}
    notes = [*summary["notes"], *(summary["details"] if verbose else ())]
    return [note for note in notes if note not in in_doubts]
