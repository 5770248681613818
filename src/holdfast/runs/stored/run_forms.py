"""Models of `run.json` and of the other JSON documents of a run. The files are validated against them when they are
read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from holdfast.core.errors import Interrupted, TargetError
from holdfast.gates.judging import Verdict
from holdfast.runs.store.forms import Count, Name, Real, Whole, distinct, required

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
