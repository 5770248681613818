"""Progress of a run, and messages for the user during a run."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """State of the progress of a run."""

    stage: str
    """name of the current stage, such as `1-apgd-ce`"""
    place: int
    """index of the stage, from 1"""
    of_stages: int
    done: int
    """number of finished examples of the stage"""
    of: int
    standing: int
    """number of examples that no finished shard has broken; in the clean stage, number of examples that are known to be
    correct"""
    seen: int
    """number of examples of which `standing` survive"""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Do nothing. The default for a progress function."""


Notify = Callable[[str], None]
"""Function that shows the user a message on what the run does next."""


def ignore(message: str) -> None:
    """Do nothing. The default for a function that shows messages."""
