"""Progress of a run, and messages for the user."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Progress of a run."""

    stage: str
    """what is running, such as `1-apgd-ce`"""
    place: int
    """index of the stage, from 1"""
    of_stages: int
    done: int
    """finished examples of the stage"""
    of: int
    standing: int
    """examples that no finished shard has broken; during the clean pass, those known to be correct"""
    seen: int
    """number of examples that `standing` refers to"""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """A progress function that does nothing."""


Notify = Callable[[str], None]
"""Receives a message for the user on what the run does next."""


def ignore(message: str) -> None:
    """A notification function that does nothing."""
