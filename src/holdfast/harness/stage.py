"""A stage of a measurement, and what a kind of stage has to provide.

The kinds are in `holdfast.harness.kinds`. A new kind is a subclass of `StageKind` in a file of that package, and an
entry in `KINDS`. No other module distinguishes kinds.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns, Cost, Table
from holdfast.core.guard import Aim
from holdfast.core.model import VOTES
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.harness.target import Target
from holdfast.ops.pieces import Room

if TYPE_CHECKING:
    from holdfast.harness.plan import Plan


@dataclass(frozen=True)
class Against:
    """How an attack treats the detector of a model that rejects, relative to the scores of the clean inputs."""

    weight: float
    """weight of the score, in multiples of the weight that balances it with the margins of the classes; 0 ignores it"""
    rejecting: float | None = None
    """aim at the threshold that rejects this share of the clean inputs; None uses the threshold of the model"""


@dataclass(frozen=True)
class Member:
    """An attack and its name in the suite, such as `APGD-CE`."""

    name: str
    attack: Attack
    waves: int = 0
    """number of halvings of the surviving examples that give the first wave; 0 runs the attack on all at once"""
    against: Against | None = None
    """how it treats a detector; None treats the model as an ordinary classifier"""


@dataclass(frozen=True)
class Work:
    """The model and the examples that a stage is run on."""

    plan: "Plan"
    target: Target
    sets: tuple[Batch, ...]
    """the examples of a shard; for a stage without shards, its data sets"""
    room: Room
    clean: Columns = field(default_factory=dict)
    """columns of the clean stage, for the examples of the shard or for all examples; empty for the clean stage"""
    chosen: Mask | None = None
    """the examples of the shard that the stage is run on; None for all"""
    broken: Mask | None = None
    """the examples that the suite has broken, for a stage outside the suite; else None"""

    @property
    def batch(self) -> Batch:
        """The examples of the shard, or the first data set."""
        return self.sets[0]


class StageKind(Protocol):
    """What stages of one kind have in common. A kind has no state."""

    name: ClassVar[str]
    """name in `run.json`"""
    sharded: ClassVar[bool] = True
    """whether the stage is divided into shards; else it is run once, on data sets of its own"""
    in_suite: ClassVar[bool] = False
    """whether the stage is an attack of the suite, so that later stages skip the examples that it breaks"""
    of_attack: ClassVar[bool] = False
    """whether the stage prepares an attack, so that its cost and its deadline are those of the attack"""
    smallest: ClassVar[bool] = False
    """whether its distances are smallest changes, which count in `Evidence["distance"]`"""
    title: ClassVar[str] = ""
    """a pass outside the suite whose adversarial examples count, as text with `{}` for the attack; else empty"""
    lost: ClassVar[str] = ""
    """what is left out if time runs out during the stage, as the subject and the verb of a sentence"""
    listed: ClassVar[str] = ""
    """name of the attacks of this kind where two runs are compared; empty if other settings show the difference"""
    sampled: ClassVar[bool] = False
    """whether the stage is run on a sample of the examples"""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def stages(self, plan: "Plan") -> Sequence["Stage"]:
        """The stages of this kind in a plan, in their order."""

    def ready(self, stage: "Stage", by_stage: Mapping[str, Columns]) -> "Stage":
        """The stage with what its attack needs of the columns of earlier stages."""
        return stage

    @abstractmethod
    def due(self, stage: "Stage", plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask | None:
        """Mask of the examples that the stage is run on; None if it is run on all, before anything is known of them."""

    @abstractmethod
    def run(self, stage: "Stage", work: Work) -> Columns:
        """Measure the stage, and return its columns.

        Columns of tables (see `holdfast.core.evidence.in_table`) contain only some examples, given by their `id`.
        """

    @abstractmethod
    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """The columns of examples that the stage is not run on."""

    def as_if_broken(self, stage: "Stage", work: Work) -> Columns:
        """The columns that the stage would have if it broke every correct example."""
        return self.columns(work.clean)

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """The passes through the model that the stage took, without its time."""
        queries = int(columns["queries"].sum())
        judged = self.judged(columns, randomised=randomised)
        return Cost(queries + judged, int(columns["backwards"].sum()), queries)

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """The forward passes that judge the inputs of the stage."""
        judged = int(columns["ran"].sum()) if "ran" in columns else len(columns["id"])
        return judged * evaluations(randomised=randomised and "right" in columns)

    def evidence(
        self, outline: "Outline", by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """The columns that stages of this kind add to the evidence. `worst` are those of the worst case."""
        return {}

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """The tables that stages of this kind add to the evidence, by name; see `Evidence.tables`."""
        return {}


@dataclass(frozen=True)
class Stage:
    """One step of a measurement. `name` is unique in the plan and names its random stream and its file."""

    name: str
    kind: StageKind
    member: Member | None = None
    earlier: tuple[str, ...] = ()
    """names of the earlier waves of the same attack"""
    adaptive: bool = False
    """run after the doubts, if one requires it, with gradients that bypass masked stages"""
    aim: Aim = Aim()
    """how it treats a detector"""

    @property
    def attack(self) -> Attack:
        """The attack of the stage."""
        assert self.member is not None
        return self.member.attack


@dataclass(frozen=True)
class StageOutline:
    """A stage in plain values, for JSON."""

    name: str
    kind: StageKind
    attack: str = ""
    """name of the attack in the suite"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """notes for the reader of a report"""
    wave_of: str = ""
    """name of the first wave of the same attack, if this is a later wave"""
    adaptive: bool = False
    """run only if a raised doubt requires it"""


@dataclass(frozen=True)
class Outline:
    """The parts of a plan that evidence needs."""

    steps: tuple[StageOutline, ...]
    threat: ThreatModel
    seed: int
    suite: str
    smallest: bool


def evaluations(*, randomised: bool) -> int:
    """Forward passes that judge one input: 1, or with two sets of votes in addition."""
    return 1 + 2 * VOTES if randomised else 1


def suite_columns(
    stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]
) -> dict[str, Columns]:
    """The columns of the attacks of the suite that are measured, by the name of the stage, in the order of the plan."""
    return {
        stage.name: by_stage[stage.name] for stage in stages if stage.kind.in_suite and stage.name in by_stage
    }


def broken_by_suite(stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]) -> Mask:
    """Mask of the examples that an attack of the suite has broken."""
    broken = torch.zeros_like(by_stage["clean"]["correct"])
    for columns in suite_columns(stages, by_stage).values():
        broken |= columns["success"]
    return broken
