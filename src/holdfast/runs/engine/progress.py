"""State of the progress of a run, and types of functions that show progress and messages to the user."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class EpochMeasures:
    """Measurements of a training after an epoch."""

    epoch: int
    of: int
    """planned number of epochs"""
    loss: float
    robust: float
    """robust accuracy on the held-out examples"""
    clean: float
    held_out: int
    """number of held-out examples"""
    left_s: float
    """expected seconds until the end of the training"""


@dataclass(frozen=True)
class Step:
    """State of the progress of a run: the current stage, the number of finished examples, and the number
    that survive.
    """

    stage: str
    """name of the current stage, such as `1-apgd-ce`"""
    place: int
    """index of the stage, from 1"""
    of_stages: int
    done: int
    """number of finished examples of the stage"""
    of: int
    surviving: int
    """number of examples that no finished shard has broken; in the clean stage, number of examples that are known to be
    correct"""
    seen: int
    """number of examples of which `surviving` survive"""
    measured: EpochMeasures | None = None
    """measurements after an epoch, for the step of a training"""
    title: str = ""
    """name of the stage in reports, such as `APGD-CE`; empty if it is the same as `stage`"""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Ignore the progress of a run. This is the default of functions that accept a progress callback."""


Notify = Callable[[str], None]
"""Function that shows the user a message on what the run does next."""


def ignore(message: str) -> None:
    """Ignore a message for the user. This is the default of functions that accept a callback for messages."""
