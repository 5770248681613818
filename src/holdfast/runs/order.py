"""What a run is asked for, and of whom."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from holdfast.core.batch import Batch, Data
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.gates.grammar import Claim
from holdfast.harness import Plan

SHARD_SIZE = 1000
"""Examples that are lost at most when a run is killed; smaller shards leave late attacks with too few to be quick."""


@dataclass(frozen=True)
class Subject:
    """The model under test, and what the evidence says of it."""

    model: Classifier
    digest: str
    """SHA-256 in hex of everything that decides what it computes"""
    card: Mapping[str, Any] = field(default_factory=dict)
    """`name`, `how` it was opened, `digest`, `parameters`, `bounds` and the like"""
    notes: tuple[str, ...] = ()


Opening = Callable[[], tuple[Subject, Data, tuple[Subject, ...]]]
"""Opens the model, the data and the surrogates, in another process if need be."""


@dataclass(frozen=True)
class Order:
    """What is measured and judged."""

    plan: Plan
    gates: tuple[Claim, ...] = ()
    baseline: Evidence | None = None
    """what gates compare with that say so"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """doubts that a person answers for, with the reason"""
    batch_size: int | None = None
    """examples that go through the model at once; None goes by the size of the input"""
    shard_size: int = SHARD_SIZE
    fit: Data | None = None
    """examples that are not judged, for attacks that are learned"""
    across: tuple[Data, ...] = ()
    """other data sets, which changes are carried to and from"""
    time_budget_s: float | None = None
    """attacks stop after this long, over all attempts; shards are then batches, so that little of the last is lost"""
    workers: int | None = None
    """processes that share the shards out among them, each on one thread; shards are then batches"""
    device: str = "cpu"
    surrogates: tuple[Subject, ...] = ()
    """models that the attacker holds of its own"""
    attackers: "Attackers | None" = None
    """measures whom a rotation of parameter sets stops, once the suite is over; None where nothing rotates"""
    command: str = ""
    """how to repeat it"""


@dataclass(frozen=True)
class Step:
    """How far a run has come."""

    stage: str
    """what is running, such as `1-apgd-ce`"""
    place: int
    """which of the stages that is, from 1"""
    of_stages: int
    done: int
    """examples of the stage that are finished"""
    of: int
    standing: int
    """examples that no finished shard has broken; before the clean pass is done, those known to be correct"""
    seen: int
    """examples that `standing` is counted among"""


Progress = Callable[[Step], None]
Keep = Callable[[Mapping[str, Any]], None]
"""Records what there is of a document so far."""


class Attackers(Protocol):
    """Measures the table of attackers of a pool whose sets take turns at serving."""

    def __call__(
        self,
        evidence: Evidence,
        judged_on: Batch,
        *,
        known: Mapping[str, Any] | None,
        keep: Keep,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """The document; of what is `known` already nothing is measured again."""


def silent(step: Step) -> None:
    """The progress that nobody watches."""


Notify = Callable[[str], None]
"""Receives a message for the user: what the run does next."""


def ignore(message: str) -> None:
    """Show no message."""
