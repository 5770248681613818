"""Models of `run.json` and of the other JSON documents of a run. The files are validated against them when they are
read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from holdfast.core.errors import Interrupted, TargetError
from holdfast.core.evidence import DoubtState
from holdfast.core.types import Access
from holdfast.gates.judging import Verdict
from holdfast.runs.harness import KINDS
from holdfast.runs.store.forms import Count, Flag, Name, Real, Whole, distinct, required

ExitCode = Annotated[Whole, required((0, 1, 4).__contains__, "0, 1 or 4")]


class _Step(TypedDict):
    name: Name
    kind: Annotated[str, required(lambda kind: kind in KINDS, "a kind of stages")]
    attack: str
    settings: dict[str, Any]
    notes: list[str]
    wave_of: str
    adaptive: Flag


class _Size(TypedDict):
    norm: str
    eps: Real
    unit: NotRequired[str]


class _Threat(_Size):
    per: str | None
    limits: dict[str, Any]
    goal: Whole | None
    access: Access
    queries: Count | None


class _Config(TypedDict):
    stages: Annotated[list[_Step], distinct("name")]
    threat: _Threat
    seed: Whole
    suite: str
    minimum_norm: Flag


class _Named(TypedDict, total=False):
    name: str


class _Groups(TypedDict):
    column: str
    names: Annotated[list[str], distinct()]
    of: str
    absent: list[str]


class _Data(TypedDict):
    name: str
    n: NotRequired[Count]
    sampled: NotRequired[bool]
    classes: NotRequired[list[str] | None]
    shape: NotRequired[list[Count]]
    digest: NotRequired[str]
    groups: NotRequired[_Groups]


class _Other(TypedDict):
    name: str
    digest: str
    n: NotRequired[Count]
    member: NotRequired[bool]


class _Model(_Named):
    randomised: Flag
    outputs: NotRequired[Count]
    members: NotRequired[list[_Other]]


class Assessed(TypedDict):
    """Model of the file `run.json` of an assessment."""

    verb: str
    digests: dict[str, str]
    config: _Config
    model: _Model
    data: _Data
    notes: list[str]
    versions: dict[str, str]
    hardware: str
    details: list[str]
    surrogates: list[_Other]
    other_data: list[_Other]


class _ListedConfig(TypedDict):
    threat: _Size
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


class _Estimate(TypedDict):
    value: Real
    low: Real
    high: Real
    n: Count


class _Gate(TypedDict):
    condition: str
    estimate: _Estimate
    verdict: Verdict
    open_doubts: list[str]
    scope: NotRequired[str]


class Decided(TypedDict):
    """Model of the file `verdict.json` of an assessment."""

    gates: list[_Gate]
    accepted_doubts: dict[str, str]
    exit_code: ExitCode


class Judged(TypedDict):
    """Model of `verdict.json` of a hardening, whose verdict is that of the inner run that measured the new model."""

    verdict_of: Literal["after"]
    exit_code: ExitCode


class Inner(TypedDict):
    """Model of a document with the chain digest of an inner run."""

    chain: str


class _Cost(TypedDict):
    forwards: Real
    backwards: Real
    queries: Real


class _Doubt(TypedDict):
    name: str
    state: DoubtState
    statistic: Real | None
    threshold: Real | None
    n: Count
    message: str


class Doubted(TypedDict):
    """Model of the file `doubts.json`."""

    cost: _Cost
    doubts: list[_Doubt]
    notes: list[str]
    broken: dict[str, list[Whole]]
    batches: NotRequired[dict[str, Count]]


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
