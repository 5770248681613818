"""Requests of the verbs: the settings that determine what a run measures, trains and judges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from holdfast.core.batch import Batch, Data
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import Before
from holdfast.runs.engine.progress import Progress
from holdfast.runs.engine.ray_cluster import RayOptions
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harness.plan import Plan

SHARD_SIZE = 1000
"""Number of examples in a shard, which is the largest number whose results are lost if the run is killed.

In smaller shards, the later attacks of a suite run on few examples and are slow.
"""


@dataclass(frozen=True)
class DescribedModel:
    """The model that a run assesses or trains, and its description for the evidence."""

    model: Classifier
    digest: str
    """SHA-256 of everything that determines the outputs of the model, in hex"""
    card: Mapping[str, Any] = field(default_factory=dict)
    """`name`, `how` (how the model was opened), `digest`, `parameters`, `bounds` and other properties"""
    notes: tuple[str, ...] = ()


Opened = tuple[DescribedModel, Data, tuple[DescribedModel, ...]]
"""The opened model, data and surrogates of a run."""
Opening = Callable[[], Opened]
"""Function that opens the model, the data and the surrogates, possibly in another process."""


@dataclass(frozen=True)
class AssessRequest:
    """The settings of an assessment, such as its attacks, gates and limits."""

    plan: Plan
    gates: tuple[Claim, ...] = ()
    baseline: Evidence | None = None
    """evidence of the run with which gates compare; None without such gates"""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """accepted doubts by name, each with the reason that the user gave"""
    batch_size: int | None = None
    """number of examples in a forward pass; with None it depends on the size of the inputs and the device"""
    shard_size: int = SHARD_SIZE
    fit: Data | None = None
    """examples on which learned attacks are fitted, disjoint from the test examples"""
    across: tuple[Data, ...] = ()
    """other data sets, for the transfer of perturbations between data sets"""
    time_budget_s: float | None = None
    """wall-clock seconds for the attacks over all attempts; shards are then at most as large as batches, so that little
    is lost"""
    workers: int | None = None
    """number of worker processes that measure shards, each with one thread; shards are then at most
    as large as batches"""
    ray: RayOptions | None = None
    """cluster on which `workers` tasks measure shards; None for processes of this machine"""
    device: str = "cpu"
    surrogates: tuple[DescribedModel, ...] = ()
    """surrogate models of the attacker"""
    attackers: "MeasureAttackers | None" = None
    """function that measures the table of attackers of a model with rotation after the suite; None without rotation"""
    sampled: bool = False
    """whether the test examples are a random sample, and not the first ones"""
    notes: tuple[str, ...] = ()
    """notes for the reader on settings without an effect"""
    command: str = ""
    """command that repeats the run"""
    opening: Mapping[str, Any] = field(default_factory=dict)
    """settings with which the model and the data are opened again, apart from their addresses"""
    verb: Literal["assess", "certify"] = "assess"
    """name of the verb in the run folder and in reports"""
    before: Before | None = None
    """measurement of the given model of a training, with which a gate on its verdict compares; None without training"""
    until: Claim | None = None
    """condition on which the run ends as soon as it is decided, and which is a further gate; None to measure all
    examples"""

    @property
    def claims(self) -> tuple[Claim, ...]:
        """All gates, beginning with the condition `until`."""
        return self.gates if self.until is None else (self.until, *self.gates)


@dataclass(frozen=True)
class HardenRequest:
    """The settings of a hardening, such as its recipe, time budget and assessments."""

    name: str
    """name of the recipe that the user requested"""
    candidates: tuple[Candidate, ...]
    """the requested recipe, or the recipes to choose from, ordered from the fastest to the strongest"""
    threat: ThreatModel
    assessment: AssessRequest
    """settings of the assessments before and after the training"""
    budget_s: float | None = None
    """wall-clock seconds of the training with its evaluations; None for the epochs that the recipe states"""
    assess_budget_s: float | None = None
    """wall-clock seconds of the assessments before and after, which determine the number of test examples; None for the
    budget of the training"""
    anyway: bool = False
    """whether to train although less than one epoch fits into the budget"""
    seed: int = 0
    device: str = "cpu"
    command: str = ""
    examples: int = 0
    """number of training examples for learned attacks of the evaluation, if the suite contains such attacks"""
    excluded: Data | None = None
    """data that must not be trained on: the whole set from which the test examples are taken; None for the test
    examples only"""
    open_options: str = ""
    """command-line options with which the new model is opened, in addition to its file and the data"""
    train_only: tuple[str, ...] = ()
    """patterns of the names of the parameters that are trained; empty for all"""
    checkpoint_every: int | None = None
    """number of updates between two checkpoints within an epoch; None for checkpoints after each epoch only"""
    notes: tuple[str, ...] = ()
    """notes on how the training examples are read, which are shown before the training and are on the card"""
    control: DescribedModel | None = None
    """network with which the recipe compares the new one after the training"""
    teacher: DescribedModel | None = None
    """network whose predictions the recipe trains on"""


Keep = Callable[[Mapping[str, Any]], None]
"""Function that stores the current content of a document, which may be unfinished."""


class MeasureAttackers(Protocol):
    """Protocol of functions that measure the success rates of the attackers of a model with rotation."""

    def __call__(
        self,
        evidence: Evidence,
        judged_on: Batch,
        *,
        known: Mapping[str, Any] | None,
        keep: Keep,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Return the table of attackers as a document. Rows in `known` are not measured again."""
