"""A stage of a measurement, and the base class of the kinds of stages.

The kinds are in `holdfast.runs.harness.kinds`. A new kind is a subclass of `StageKind` in a file of that package, and
an entry in `KINDS`. No other module distinguishes kinds.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.attacks.suites import LEAST, AttackSpec
from holdfast.certifiers.protocol import Prover
from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns, Cost, Table
from holdfast.core.meter import Room
from holdfast.core.model import VOTES
from holdfast.core.outputs import Aim
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.doubts.not_exhausted import repeated
from holdfast.doubts.protocol import Outcome
from holdfast.doubts.zero_gradient import ZERO_GRADIENTS
from holdfast.runs.harness.target import PreparedModel

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan


@dataclass(frozen=True)
class Against:
    """Settings of an attack on a model with a detector that rejects inputs: the weight of the detector's score in the
    loss of the attack, and the threshold that the attack evades.
    """

    weight: float
    """weight of the score, as a multiple of the weight that balances it with the margins of the classes; with 0, the
    detector is ignored"""
    rejecting: float | None = None
    """fraction of the clean inputs that the attacked threshold rejects; None for the threshold of the model"""


@dataclass(frozen=True)
class Member:
    """An attack of a suite with its name, such as `APGD-CE`."""

    name: str
    attack: Attack
    waves: int = 0
    """number of times that the surviving examples are halved for the first wave; with 0, the attack is run on all at
    once"""
    against: Against | None = None
    """how the attack treats a detector; None if it treats the model as an ordinary classifier"""
    least: int = LEAST
    """smallest number of examples in a wave"""
    after: str = ""
    """name of an earlier attack, if this one is run only if that one broke an example; otherwise empty"""
    surrogate: str = ""
    """loss of another task than classes that the attack maximises; empty for the first one of the task"""

    @classmethod
    def of(cls, spec: AttackSpec) -> "Member":
        """Return the attack of an entry of a suite."""
        return cls(spec.name, spec.build(), spec.waves, None, spec.least, spec.after, spec.surrogate)


@dataclass(frozen=True)
class Work:
    """The plan, the model and the examples on which a stage is run."""

    plan: "Plan"
    target: PreparedModel
    sets: tuple[Batch, ...]
    """one batch with the examples of a shard or, for a stage without shards, its data sets"""
    room: Room
    clean: Columns = field(default_factory=dict)
    """columns of the clean stage, for the examples of the shard or, without shards, for all; empty
    for the clean stage"""
    chosen: Mask | None = None
    """mask of the examples of the shard that the stage is run on; None for all"""
    broken: Mask | None = None
    """mask of the examples that the suite has broken, for a stage outside the suite; otherwise None"""
    certified: Mask | None = None
    """mask of the certified examples, on which an attack of the suite is a short test; None for none"""

    @property
    def batch(self) -> Batch:
        """Examples of the shard or, for a stage without shards, of its first data set."""
        return self.sets[0]


class StageKind(Protocol):
    """Base class of the kinds of stages of a measurement, such as the clean stage and the attacks of the suite."""

    name: ClassVar[str]
    """name of the kind in `run.json`"""
    named: ClassVar[str] = r"\D.*"
    """regular expression of the names of its stages; those of the attacks of the suite begin with a digit"""
    sharded: ClassVar[bool] = True
    """whether the stage is divided into shards; otherwise it is run once, on its own data sets"""
    in_suite: ClassVar[bool] = False
    """whether the stage runs an attack of the suite, so that later stages skip the examples that it breaks"""
    reuses: ClassVar[bool] = False
    """whether the stage starts from results of an earlier run, so that comparisons of runs ignore it"""
    of_attack: ClassVar[bool] = False
    """whether the stage prepares an attack, so that its cost and its deadline are those of that attack"""
    smallest: ClassVar[bool] = False
    """whether its distances are sizes of smallest changes, which count in `Evidence["distance"]`"""
    title: ClassVar[str] = ""
    """name in sentences, with `{}` for the attack, if this is a pass outside the suite whose adversarial examples
    count; otherwise empty"""
    lost: ClassVar[str] = ""
    """subject and verb of the sentence that states what is left out if time runs out during the stage"""
    listed: ClassVar[str] = ""
    """name of the attacks of this kind in a comparison of two runs; empty if other settings show the difference"""
    sampled: ClassVar[bool] = False
    """whether the stage is run on a sample of the examples"""
    proves: ClassVar[bool] = False
    """whether the stage proves robustness, so that later stages skip the examples that it certifies"""

    # kinds have no state, so that a copy in another process is the same kind
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def stages(self, plan: "Plan") -> Sequence["Stage"]:
        """Return the stages of this kind that a plan contains, in the order in which they run."""

    def ready(self, stage: "Stage", by_stage: Mapping[str, Columns]) -> "Stage":
        """Return the stage with all values from the columns of earlier stages that its attack needs, such as a fitted
        perturbation.
        """
        return stage

    @abstractmethod
    def due(self, stage: "Stage", plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask | None:
        """Return the mask of the examples on which a stage is run, or None if the stage does not depend on the results
        of earlier stages.
        """

    @abstractmethod
    def run(self, stage: "Stage", work: Work) -> Columns:
        """Run a stage on the examples of one shard, and return the columns of its results.

        Columns of tables (see `holdfast.core.evidence.in_table`) contain only some examples, which their `id`
        identifies.
        """

    @abstractmethod
    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of a stage for examples on which it is not run."""

    def unattacked(self, stage: "Stage", clean: Columns) -> Columns:
        """Return the columns of a stage for a shard without an example on which it is run."""
        return self.columns(clean)

    def as_if_broken(self, stage: "Stage", work: Work) -> Columns:
        """Return the columns that a stage would have if it broke every correct example. They serve to check gates
        before a run.
        """
        return self.columns(work.clean)

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """Return the cost of a stage from its columns, summed over the examples, without times: forward passes, which
        are the queries of the attack and the passes with which its results were judged, backward passes, and queries.
        """
        queries = int(columns["queries"].sum())
        judged = self.judged(columns, randomised=randomised)
        return Cost(queries + judged, int(columns["backwards"].sum()), queries)

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """Return the number of forward passes with which the results of a stage were judged."""
        judged = int(columns["ran"].sum()) if "ran" in columns else len(columns["id"])
        return judged * evaluations(randomised=randomised and "right" in columns)

    def evidence(
        self, outline: "Outline", by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return the columns that the stages of this kind add to the evidence. `worst` contains the columns of the
        worst case of each example.
        """
        return {}

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the tables that the stages of this kind add to the evidence, such as the transfer matrix, by name."""
        return {}


@dataclass(frozen=True)
class Stage:
    """One attack or other measurement of a plan. Its unique name also names its file and determines its random
    numbers.
    """

    name: str
    kind: StageKind
    member: Member | None = None
    earlier: tuple[str, ...] = ()
    """names of the earlier waves of the same attack"""
    adaptive: bool = False
    """whether the stage is run after the doubts, if one requires it, with gradients that bypass masked parts of the
    model"""
    aim: Aim = Aim()
    """how the attack treats a detector"""
    prover: Prover | None = None
    """method of certification that the stage runs; None for other stages"""

    @property
    def title(self) -> str:
        """Name of the stage in reports: that of its attack, pass or method of certification, or of the stage itself if
        it has none of these.
        """
        run = self.member or self.prover
        if run is None or not (self.kind.in_suite or self.kind.of_attack or self.kind.title):
            return self.name
        wave = f", wave {len(self.earlier) + 1}" if self.earlier else ""
        prefix = "fitting " if self.kind.of_attack else ""
        return f"{prefix}{(self.kind.title or '{}').format(run.name)}{wave}"

    @property
    def first(self) -> str:
        """Name of the first wave of the same attack."""
        return (*self.earlier, self.name)[0]

    @property
    def surrogate(self) -> str:
        """Loss of another task than classes that the attack maximises; see `Member.surrogate`."""
        return "" if self.member is None else self.member.surrogate

    @property
    def attack(self) -> Attack:
        """Attack that the stage runs on its examples."""
        assert self.member is not None
        return self.member.attack


@dataclass(frozen=True)
class StageOutline:
    """The description of a stage in plain values, which are stored as JSON with a run."""

    name: str
    kind: StageKind
    attack: str = ""
    """name of the attack in the suite, or of the method of certification"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """notes for the reader of a report"""
    wave_of: str = ""
    """name of the first wave of the same attack, if this is a later wave"""
    after: str = ""
    """see `Member.after`"""
    adaptive: bool = False
    """whether the stage is run only if a raised doubt requires it"""

    @property
    def first(self) -> str:
        """Name of the first wave of the same attack."""
        return self.wave_of or self.name


@dataclass(frozen=True)
class Outline:
    """The description of a plan in plain values, from which the evidence of a run is created."""

    steps: tuple[StageOutline, ...]
    threat: ThreatModel
    seed: int
    suite: str
    smallest: bool


def evaluations(*, randomised: bool) -> int:
    """Return the number of forward passes with which one input is judged: 1 for a deterministic model, more for the
    votes of a randomised one.
    """
    return 1 + 2 * VOTES if randomised else 1


def table_of_stage(name: str, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
    """Return the columns of a stage whose names begin with its name as a table of the evidence; none if the stage was
    not run or not finished.
    """
    prefix = f"{name}."
    columns = {
        column.removeprefix(prefix): values
        for column, values in by_stage.get(name, {}).items()
        if column.startswith(prefix)
    }
    return {name: Table("example", columns)} if columns else {}


def suite_columns(
    stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]
) -> dict[str, Columns]:
    """Return the columns of those attacks of the suite that have been run, by the name of the stage, in the order of
    the plan.
    """
    return {
        stage.name: by_stage[stage.name] for stage in stages if stage.kind.in_suite and stage.name in by_stage
    }


def outcomes(stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]) -> tuple[Outcome, ...]:
    """Return what each attack of the suite did in its waves together, without adaptive attacks and a baseline."""
    waves: dict[str, list[Stage | StageOutline]] = {}
    certified = certified_in(stages, by_stage)  # attacks on these only test the certificates
    for stage in stages:
        if stage.kind.in_suite and not stage.kind.reuses and not stage.adaptive and stage.name in by_stage:
            waves.setdefault(stage.first, []).append(stage)
    return tuple(
        _outcome(of_attack, [by_stage[s.name] for s in of_attack], certified) for of_attack in waves.values()
    )


def _outcome(waves: Sequence[Stage | StageOutline], columns: Sequence[Columns], certified: Mask) -> Outcome:
    ran, first = [int((wave["ran"] & ~certified).sum()) for wave in columns], waves[0]
    last = max((k for k, n in enumerate(ran) if n), default=0)
    return Outcome(
        first.title if isinstance(first, Stage) else first.attack,
        torch.stack([wave["success"] for wave in columns]).any(0),
        sum(ran),
        ran[last],
        bool(ran[last]) and not columns[last]["success"].any(),
        sum(int((wave["queries"] + wave["backwards"]).sum()) for wave in columns),
        first.attack if isinstance(first, Stage) else None,
    )


def gradients_vanish(suite: Mapping[str, Columns]) -> bool:
    """Return whether the first gradients of the attacks of a suite were zero or not a number for more than 1 % of the
    examples, from the columns of its stages.
    """
    followed = [columns["ran"] & (columns["dead"] | (columns["backwards"] > 0)) for columns in suite.values()]
    dead = sum(int(columns["dead"].sum()) for columns in suite.values())
    return dead > ZERO_GRADIENTS * sum(int(mask.sum()) for mask in followed)


def repeated_attacks(
    stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]
) -> dict[int, str]:
    """Return the names of the attacks of the suite that the fresh pass of `not-exhausted` repeats, by their places in
    it: all of them if gradients vanish.
    """
    done = outcomes(stages, by_stage)
    chosen = dict(enumerate(done)) if gradients_vanish(suite_columns(stages, by_stage)) else repeated(done)
    return {place: outcome.name for place, outcome in chosen.items()}


def broken_by_suite(stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]) -> Mask:
    """Return the mask of the examples that at least one attack of the suite has broken."""
    broken = torch.zeros_like(by_stage["clean"]["correct"])
    for columns in suite_columns(stages, by_stage).values():
        broken |= columns["success"]
    return broken


def certified_in(stages: Sequence[Stage | StageOutline], by_stage: Mapping[str, Columns]) -> Mask:
    """Return the mask of the examples that at least one finished stage has certified."""
    certified = torch.zeros_like(by_stage["clean"]["correct"])
    for stage in stages:
        if stage.kind.proves and stage.name in by_stage:
            certified |= by_stage[stage.name]["certified"]
    return certified
