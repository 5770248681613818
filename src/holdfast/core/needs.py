"""Needs of the later steps of a run, which are checked before anything is computed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from holdfast.core.errors import TargetError, UsageError


@dataclass(frozen=True)
class Need:
    """What a step of a run needs of the settings, the model, the data and the disk."""

    step: str
    """name of the step"""
    refuse: Callable[[], object]
    """function that raises `UsageError` or `TargetError` if the need is not met"""


def refuse_unmet(needs: Iterable[Need]) -> None:
    """Check the needs of later steps in their order. The message of an error begins with the name of the step."""
    for need in needs:
        try:
            need.refuse()
        except (TargetError, UsageError) as error:
            raise error.reworded(f"the later step {need.step} would fail: {error.message}") from error
