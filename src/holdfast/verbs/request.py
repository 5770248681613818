"""Requests: what a verb measures, trains and judges, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from holdfast.core.batch import Batch, Data
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.engine.progress import Progress
from holdfast.gates.grammar import Claim
from holdfast.harness import Plan
from holdfast.verbs.candidates import Candidate

SHARD_SIZE = 1000
"""Examples in a shard, the largest number that a kill loses. In smaller shards, late attacks run on few examples and
are slow."""


@dataclass(frozen=True)
class Subject:
    """The model under test, and its description in the evidence."""

    model: Classifier
    digest: str
    """SHA-256 in hex of everything that determines its outputs"""
    card: Mapping[str, Any] = field(default_factory=dict)
    """`name`, `how` it was opened, `digest`, `parameters`, `bounds` and other properties"""
    notes: tuple[str, ...] = ()


Opening = Callable[[], tuple[Subject, Data, tuple[Subject, ...]]]
"""Opens the model, the data and the surrogates, possibly in another process."""


@dataclass(frozen=True)
class AssessRequest:
    """What is measured and judged, and how."""

    plan: Plan
    gates: tuple[Claim, ...] = ()
    baseline: Evidence | None = None
    """evidence for gates that compare with a baseline"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """accepted doubts by name, each with the reason of the person who accepts it"""
    batch_size: int | None = None
    """examples in one forward pass; None chooses by the size of the input"""
    shard_size: int = SHARD_SIZE
    fit: Data | None = None
    """examples for learned attacks, disjoint from the judged ones"""
    across: tuple[Data, ...] = ()
    """other data sets, for the transfer of perturbations"""
    time_budget_s: float | None = None
    """wall-clock limit of the attacks over all attempts; shards are then as small as batches, so that little is lost"""
    workers: int | None = None
    """number of worker processes that measure the shards, each with one thread; shards are then as small as batches"""
    device: str = "cpu"
    surrogates: tuple[Subject, ...] = ()
    """surrogate models of the attacker"""
    attackers: "MeasureAttackers | None" = None
    """measures the table of attackers of a rotation after the suite; None without rotation"""
    command: str = ""
    """command that repeats the run"""


@dataclass(frozen=True)
class HardenRequest:
    """The settings of a hardening."""

    name: str
    """name of the recipe, as requested"""
    candidates: tuple[Candidate, ...]
    """the recipe, or the recipes to choose from, the fastest first"""
    threat: ThreatModel
    assessment: AssessRequest
    """how the model is measured before and after"""
    budget_s: float | None = None
    """wall-clock time of the training, evaluations on held-out examples included; None uses the recipe's epochs"""
    seed: int = 0
    device: str = "cpu"
    command: str = ""
    examples: int = 0
    """number of training examples for learned attacks of the evaluation, if it has some"""
    excluded: Data | None = None
    """data that must not be trained on: the whole set of which the judged examples are a part; None for the judged
    ones only"""
    open_options: str = ""
    """command-line options that open the new model, in addition to its file and the data"""


Keep = Callable[[Mapping[str, Any]], None]
"""Records the current, possibly unfinished, content of a document."""


class MeasureAttackers(Protocol):
    """Measures the table of attackers of a pool with rotation."""

    def __call__(
        self,
        evidence: Evidence,
        judged_on: Batch,
        *,
        known: Mapping[str, Any] | None,
        keep: Keep,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Return the document. Rows in `known` are not measured again."""
