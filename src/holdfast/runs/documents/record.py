"""The record of a run: its settings, plan, documents and verdict, with the forms of `run.json`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from holdfast.core.errors import Interrupted, TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns, Cost, Doubt, DoubtState, Looks, Scope, Seconds
from holdfast.core.types import Access
from holdfast.gates.judging import Verdict
from holdfast.io.remote.http_client import Totals
from holdfast.reports.words import number, strict
from holdfast.runs.harness.assembly import Probes
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.harness.stage import Outline, StageOutline
from holdfast.runs.store.columns import Count, Flag, Name, Real, Whole, distinct, required, validated
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import Split
from holdfast.threats.stored import threat_from_json, threat_to_json

ExitCode = Annotated[Whole, required((0, 1, 4).__contains__, "0, 1 or 4")]


class Size(TypedDict):
    """The norm and the eps of a threat model."""

    norm: str
    eps: Real
    unit: NotRequired[str]


class _Named(TypedDict, total=False):
    name: str


class _ListedConfig(TypedDict):
    threat: Size
    suite: str


class _ListedPlan(TypedDict):
    stages: Annotated[list[Name], distinct()]


class Listed(TypedDict):
    """Model of those parts of `run.json` that the list of runs shows; it fits the runs of all verbs."""

    verb: str
    config: _ListedConfig
    model: _Named
    data: _Named
    plan: _ListedPlan


class _AuditConfig(TypedDict):
    kind: str
    format: NotRequired[Count]
    settings: dict[str, Any]


class _AuditedThing(TypedDict):
    name: str
    digest: str


class ListedAudit(TypedDict):
    """Model of those parts of `run.json` of an audit that the list of runs and the reports show."""

    verb: Literal["audit"]
    config: _AuditConfig
    model: _AuditedThing
    data: _AuditedThing
    plan: _ListedPlan
    notes: list[str]
    seed: Whole
    hardware: str
    versions: dict[str, str]


class _JudgedGate(TypedDict):
    gate: str
    verdict: Verdict
    because: str


class JudgedAudit(TypedDict):
    """Model of `verdict.json` of an audit."""

    verdict_of: Literal["audit"]
    gates: list[_JudgedGate]


class Judged(TypedDict):
    """Model of `verdict.json` of a hardening, whose verdict is that of the inner run that measured the new model."""

    verdict_of: Literal["after"]
    exit_code: ExitCode
    computed_from: dict[str, str]


class Inner(TypedDict):
    """Model of a document with the chain digest of an inner run."""

    chain: str


class Differing(TypedDict):
    """Model of the file `nodes.json`."""

    nodes: list[dict[str, str]]


@contextmanager
def consistent(path: Path) -> Iterator[None]:
    """Context manager that raises `TargetError` if the files of a run contradict each other.

    Each file may be valid alone and still not match the others, such as a column that is missing or too short.
    """
    try:
        yield
    except (TargetError, Interrupted, OSError):
        raise
    except Exception as error:
        raise TargetError(
            f"the files of the run in {str(path)!r} are inconsistent ({type(error).__name__}: {error}); restore it "
            "from a copy, or see holdfast verify"
        ) from error


Json = dict[str, Any]

_OF_STEP = ("name", "attack", "settings", "wave_of", "adaptive")


def outline_to_json(outline: Outline) -> Json:
    """Return the outline of a run as strict JSON: its stages, threat model, seed and suite."""
    return {
        "stages": [strict({**vars(step), "kind": step.kind.name}) for step in outline.steps],
        "threat": threat_to_json(outline.threat),
        "seed": outline.seed,
        "suite": outline.suite,
        "minimum_norm": outline.smallest,
    }


def outline_from_json(content: Mapping[str, Any]) -> Outline:
    """Return the outline of a run, such as its stages and threat model, from its JSON. It is the inverse of
    `outline_to_json`.
    """
    return Outline(
        tuple(
            StageOutline(
                **{name: step[name] for name in _OF_STEP},
                kind=KINDS[step["kind"]],
                notes=tuple(step["notes"]),
                after=step.get("after", ""),  # runs of `fast@1` have none
            )
            for step in content["stages"]
        ),
        threat_from_json(content["threat"]),
        content["seed"],
        content["suite"],
        content["minimum_norm"],
    )


VERDICT = "verdict"
"""Name of the document with the conditions of the gates, and with the digests of their judgements."""
DOUBTS = "doubts"
"""Name of the document with the doubts, and of the random stream and the timing of the probes."""
ADAPTIVE = "adaptive"
"""Name of the document that lists which adaptive attacks ran, and why."""
UNTIL = "until"
"""Name of the document with the number of examples after which the condition of a run was decided."""
ROTATION = "rotation"
"""Name of the document with the table of attackers of a model with rotation."""
doubt_from_json = TypeAdapter(Doubt).validate_python
"""Function that returns the doubt in a JSON object."""

_open = with_config(ConfigDict(extra="allow"))
"""Decorator of types of objects whose further fields are kept."""


class _Step(TypedDict):
    name: Name
    kind: Annotated[str, required(lambda kind: kind in KINDS, "a kind of stages")]
    attack: str
    settings: dict[str, Any]
    notes: list[str]
    wave_of: str
    adaptive: Flag


class _Threat(Size):
    per: str | None
    limits: dict[str, Any]
    goal: Whole | None
    access: Access
    queries: Count | None


@_open
class Settings(TypedDict):
    """The settings of a run that can change a number."""

    stages: Annotated[list[_Step], distinct("name")]
    threat: _Threat
    seed: Whole
    suite: str
    minimum_norm: Flag
    until: NotRequired[str]


class _Groups(TypedDict):
    column: str
    names: Annotated[list[str], distinct()]
    of: str
    absent: list[str]


@_open
class DataCard(TypedDict):
    """The description of the test examples in the record of a run: name of the data set, number of examples, names of
    the classes, shape of one example, digest of the examples, and groups. `sampled` is whether the examples are a
    random part of the data set.
    """

    name: str
    n: NotRequired[Count]
    sampled: NotRequired[bool]
    classes: NotRequired[list[str] | None]
    shape: NotRequired[list[Count]]
    digest: NotRequired[str]
    groups: NotRequired[_Groups]


@_open
class Other(TypedDict):
    """A further model or data set."""

    name: str
    digest: str
    how: NotRequired[str]
    n: NotRequired[Count]
    member: NotRequired[bool]


@_open
class _Model(TypedDict):
    name: NotRequired[str]
    randomised: Flag
    outputs: NotRequired[Count]
    members: NotRequired[list[Other]]


@dataclass(frozen=True)
class Division:
    """How a run is divided: into shards, batches and stages."""

    shards: tuple[tuple[int, int], ...]
    """for each shard, its first row and the row after its last one"""
    batch_size: Count
    stages: list[str]


@dataclass(frozen=True)
class Manifest:
    """What identifies a run: its settings, its model and its data. It is the content of `run.json`."""

    verb: str
    digests: dict[str, str]
    config: Settings
    model: _Model
    data: DataCard
    notes: list[str]
    details: list[str]
    surrogates: list[Other]
    other_data: list[Other]
    versions: dict[str, str]
    hardware: str
    seed: Whole
    plan: Division
    opening: dict[str, Any] = field(default_factory=dict)
    """settings with which the model and the data are opened again, apart from their addresses"""

    @cached_property
    def outline(self) -> Outline:
        """The stages, the threat model and the seed of the run."""
        return outline_from_json(self.config)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        content = {each.name: getattr(self, each.name) for each in fields(self)} | {"plan": vars(self.plan)}
        return content if self.opening else {key: content[key] for key in content if key != "opening"}


def manifest_from_json(path: Path, content: Mapping[str, Any]) -> Manifest:
    """Return the manifest of the run in a folder from the content of `run.json`. Raises `TargetError` if it has another
    form.
    """
    manifest: Manifest = validated(path / MANIFEST, content, Manifest)
    return manifest


class _Doubt(TypedDict):
    name: str
    state: DoubtState
    statistic: Real | None
    threshold: Real | None
    n: Count
    message: str


class _Cost(TypedDict):
    forwards: Real
    backwards: Real
    queries: Real


class _Doubted(TypedDict):
    cost: _Cost
    doubts: list[_Doubt]
    notes: list[str]
    broken: dict[str, list[Whole]]
    probes: list[tuple[str, Count]]
    batches: NotRequired[dict[str, Count]]


@dataclass(frozen=True)
class Doubted:
    """What the probes of a run found. It is the content of `doubts.json`."""

    doubts: tuple[Doubt, ...]
    broken: Mapping[str, Sequence[int]]
    """by doubt, the ids of the examples that its probes broke and the suite did not"""
    probes: Probes
    notes: Sequence[str]
    cost: Cost
    """numbers of passes and queries of the probes, without times"""
    batches: Mapping[str, int] = field(default_factory=dict)
    """smallest number of examples that were processed at once, by stage, where memory ran out"""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `doubts.json`."""
        return {
            "doubts": [strict(vars(doubt)) for doubt in self.doubts],
            "broken": dict(self.broken),
            "probes": list(self.probes),
            "notes": list(self.notes),
            **({"batches": dict(self.batches)} if self.batches else {}),
            "cost": {name: getattr(self.cost, name) for name in ("forwards", "backwards", "queries")},
        }


def doubted_from_json(path: Path, content: Mapping[str, Any]) -> Doubted:
    """Return the findings of the probes of the run in a folder. Raises `TargetError` if the document has another
    form.
    """
    form: _Doubted = validated(path / f"{DOUBTS}.json", content, _Doubted)
    return Doubted(
        tuple(map(doubt_from_json, form["doubts"])),
        form["broken"],
        tuple(form["probes"]),
        form["notes"],
        Cost(**form["cost"]),
        form.get("batches", {}),
    )


def splits_of(splits: Sequence[Split]) -> tuple[dict[str, int], list[str]]:
    """Return the smallest number of examples that were processed at once, by stage, where memory ran out, and a note on
    the smallest of all.
    """
    sizes: dict[str, int] = {}
    for split in splits:
        sizes[split["stage"]] = min(split["size"], sizes.get(split["stage"], split["size"]))
    least = min(sizes.values(), default=0)
    note = (
        f"memory ran out, and the run continued with batches of {least} examples; --batch-size {least} starts with "
        "that size"
    )
    return sizes, [note] if sizes else []


@dataclass(frozen=True)
class Adapted:
    """Which adaptive attacks ran, and why. It is the content of `adaptive.json`."""

    reasons: dict[str, list[str]]
    """names of the doubts that require each attack"""
    bypassed: list[str]
    """descriptions of the parts of the model that the gradients bypass"""
    no_detector_gradient: bool
    unfinished: list[str]
    """notes on attacks for which time ran out"""
    notes: list[str]


def adapted_from_json(path: Path, content: Mapping[str, Any]) -> Adapted:
    """Return which adaptive attacks the run in a folder made. Raises `TargetError` if the document has another form."""
    adapted: Adapted = validated(path / f"{ADAPTIVE}.json", content, Adapted)
    return adapted


def looks_from_json(path: Path, content: Mapping[str, Any]) -> Looks:
    """Return how many examples the run in a folder measured until its condition was decided. Raises `TargetError` if
    the document has another form.
    """
    looks: Looks = validated(path / f"{UNTIL}.json", content, Looks)
    return looks


class _Estimate(TypedDict):
    value: Real
    low: Real
    high: Real
    n: Count


@dataclass(frozen=True)
class DecidedGate:
    """A gate of a finished run. Its judgement is computed from the columns, and only the digest of it is stored."""

    condition: str
    judgement: str
    """SHA-256 of the estimate, the open doubts and the verdict, in hex"""
    compared: _Estimate | None = None
    """estimate of a metric that compares with a measurement outside the run; None for other metrics"""
    scope: Scope | None = None
    """adversarial examples that this comparison counts"""

    @property
    def estimate(self) -> Estimate | None:
        """Estimate of a metric that compares with a measurement outside the run."""
        stored = self.compared
        if stored is None:
            return None
        return Estimate(number(stored["value"]), number(stored["low"]), number(stored["high"]), stored["n"])


@dataclass(frozen=True)
class Decided:
    """The verdict of a run. It is the content of `verdict.json`."""

    gates: list[DecidedGate]
    accepted_doubts: dict[str, str]
    exit_code: ExitCode
    computed_from: dict[str, str]
    """digests of the records of all other files in the chain, by the names of the files"""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `verdict.json`."""
        gates = [
            {key: value for key, value in vars(gate).items() if value is not None} for gate in self.gates
        ]
        return {**vars(self), "gates": gates}


def decided_from_json(path: Path, content: Mapping[str, Any]) -> Decided:
    """Return the verdict of the run in a folder. Raises `TargetError` if the document has another form."""
    decided: Decided = validated(path / f"{VERDICT}.json", content, Decided)
    return decided


@dataclass(frozen=True)
class Record:
    """One run: its settings, and everything that was measured."""

    manifest: Manifest
    columns: Mapping[str, Columns]
    """columns of each finished stage, by its name"""
    doubted: Doubted
    adapted: Adapted | None = None
    """None for a plan without adaptive attacks"""
    seconds: Mapping[str, Seconds] = field(default_factory=dict)
    """time of each step"""
    sent: Totals | None = None
    """what was sent to the server of a served model"""
    nodes: Sequence[Mapping[str, str]] = ()
    """properties of the nodes of a cluster that differ from the process of the run"""
    looks: Looks | None = None
    """how many examples were measured until a condition was decided; None for a run on all examples"""
