"""Forms of the answers of the operator's port, flagged inputs with their labels, and the screening of labels by the
nearest neighbours among trusted examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import line
from holdfast.core.types import Labels, Mask
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.io.remote.operator_port import OperatorPort
from holdfast.reports.audit import NEXT
from holdfast.runs.store.columns import Count, FormFault, conforming, is_name, required
from holdfast.settings.texts import read_labels
from holdfast.statistics.intervals import independent_difference

NEIGHBOURS = 10
_CONFIDENCE = 0.998
"""Confidence of the two-sided interval of the difference, so that its lower end has an error of 0.1 %."""
_LEAST = 0.02
"""Smallest difference of the shares for which training examples are refused."""
_ROWS = 512


@dataclass(frozen=True)
class Screened:
    """How many labels disagree with those of their neighbours."""

    n: int
    disagree: int
    trusted_n: int
    trusted_disagree: int

    @property
    def suspicious(self) -> bool:
        """Whether clearly more labels disagree than of the trusted examples."""
        difference = independent_difference(
            self.disagree, self.n, self.trusted_disagree, self.trusted_n, _CONFIDENCE
        )
        return difference.low > 0 and difference.value >= _LEAST


def disagreeing(
    points: Tensor, labels: Labels, trusted: Tensor, trusted_labels: Labels, *, own: bool = False
) -> Mask:
    """Return for each point (n, d) whether its label differs from the most frequent one of its nearest trusted points.

    With `own`, the points are the trusted ones, and a point is no neighbour of itself.
    """
    points, trusted = points.flatten(1).float(), trusted.flatten(1).float()
    classes = int(max(int(labels.max()), int(trusted_labels.max()))) + 1
    parts = []
    for start in range(0, len(points), _ROWS):
        distances = torch.cdist(points[start : start + _ROWS], trusted)
        if own:
            rows = torch.arange(len(distances))
            distances[rows, rows + start] = torch.inf
        nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False).indices
        votes = torch.nn.functional.one_hot(trusted_labels[nearest], classes).sum(1)
        parts.append(votes.argmax(1) != labels[start : start + _ROWS])
    return torch.cat(parts)


def screened(points: Tensor, labels: Labels, trusted: Tensor, trusted_labels: Labels) -> Screened:
    """Count the labels of points (n, d) that disagree with their neighbours among the trusted points, and those of the
    trusted points themselves.
    """
    found = disagreeing(points, labels, trusted, trusted_labels)
    own = disagreeing(trusted, trusted_labels, trusted, trusted_labels, own=True)
    return Screened(len(found), int(found.sum()), len(own), int(own.sum()))


@dataclass(frozen=True, eq=False)
class Flagged:
    """Flagged inputs."""

    n: int
    """number of all flagged inputs"""
    x: Tensor
    """those with a label (k, *shape)"""
    y: Labels
    """their classes (k,)"""


def read_flagged(
    stored: StoredInputs | None, labels: Path | None, class_names: Sequence[str], *, strict: bool
) -> Flagged:
    """Return the stored inputs of a guard with the labels in a CSV file.

    Raises `UsageError` for an invalid file and, if `strict`, for labels of requests that are not stored. The guard may
    delete inputs while an adaptation runs.
    """
    known = {} if labels is None else read_labels(labels, class_names)
    n, x, y = 0, [], []
    for request in () if stored is None else stored.read():
        n += len(request.rows)
        for place, row in enumerate(request.rows):
            label = known.pop((request.request, row), None)
            if label is not None:
                x.append(request.x[place])
                y.append(label)
    if known and strict:
        request_name, row = next(iter(known))
        raise UsageError(
            f"{labels}: input {row} of the request {request_name!r} is not among the stored flagged inputs; remove "
            "labels of other requests, and those of inputs that were deleted"
        )
    return Flagged(n, torch.stack(x) if x else torch.empty(0), torch.tensor(y, dtype=torch.int64))


_LONGEST_PATH, _LONGEST_TEXT = 4096, 10_000
_NO_FILE = "text without @ at its beginning, which would name a file"

Approval = Literal["pending", "approved", "rejected"]


def _is_path(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_PATH and text.isprintable() and not text.startswith("@")


def _names_no_file(settings: Mapping[str, Any]) -> bool:
    """Whether no value is `@FILE`, from which a setting would be read."""
    return not any(isinstance(value, str) and value.lstrip().startswith("@") for value in settings.values())


Shown = Annotated[str, Field(max_length=_LONGEST_TEXT), AfterValidator(line)]
"""text for a terminal"""
PathText = Annotated[str, required(_is_path, "the path of a file")]
SetName = Annotated[str, required(lambda text: text == "" or is_name(text), "the name of a parameter set")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Settings = Annotated[dict[str, Any], required(_names_no_file, f"settings whose values are {_NO_FILE},")]


class _Kept(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]


class OpeningSettings(_Kept, total=False):
    """Settings with which the served model is opened; the others are checked when it is opened."""

    model: PathText
    guard: PathText | None
    pool: PathText
    arch: PathText | None


class ServedFile(_Kept):
    """A model in a file."""

    set: SetName
    digest: Annotated[str, required(lambda text: text == "" or is_name(text), "a digest")]
    reload: Literal["none", "running", "done", "failed"]
    reason: Shown
    settings: NotRequired[Annotated[OpeningSettings, required(_names_no_file, _NO_FILE)]]


class ServedPool(_Kept):
    """A pool."""

    set: SetName
    reason: Shown
    settings: NotRequired[Annotated[OpeningSettings, required(_names_no_file, _NO_FILE)]]


class CanaryState(_Kept):
    """The canary of a server."""

    state: Literal["none", "starting", "serving", "failed"]
    reason: Shown


class Worker(_Kept):
    """A process that answers requests."""

    set: SetName


class ServerState(_Kept):
    """The answer to `GET /status`: the state of a server that serves a file or a pool."""

    workers: Annotated[list[Worker], Field(max_length=10_000)]
    sets: dict[SetName, dict[str, Annotated[float, Field(ge=0, le=2**53)]]]
    model: NotRequired[ServedFile]
    pool: NotRequired[ServedPool]
    canary: NotRequired[CanaryState]


class _Share(_Kept):
    value: Number
    low: Number
    high: Number
    n: Count


class _ClassError(_Kept):
    name: Shown
    error: _Share


class _Accuracy(_Kept):
    accuracy: _Share
    calibration_error: Number
    errors: list[_ClassError]


class _Power(_Kept):
    signal: Shown
    shift: Number | None
    drop: Number | None
    false_alarms: Count | None
    errors: bool


class Alarm(_Kept):
    """An alarm of a test."""

    after: Count
    signal: Shown
    evidence: Shown
    view: Annotated[str, required(NEXT.__contains__, f"one of {', '.join(NEXT)}")]


class _Test(_Kept):
    name: Shown
    compares: Shown
    state: Shown
    alarm: Alarm | None
    guarantee: Shown
    power: _Power | None
    fewest: Count
    restarted: list[Shown]


class _Source(_Kept):
    name: Shown
    n: Count


class MonitorState(_Kept):
    """The answer to `GET /monitor`: what the monitor has found."""

    verdict: Literal["alarm", "no alarm"]
    alarmed: list[Shown]
    requests: Count
    flagged: Count
    stream: _Source
    reference: _Source
    decisive: Annotated[list[Shown], Field(min_length=1)]
    tests: list[_Test]
    measured: _Accuracy | None
    of_reference: _Accuracy | None
    expected: _Share | None
    notes: list[Shown]


class _Run(_Kept):
    """A run of an adaptation."""

    run: Shown
    approval: Approval | None
    by: Shown


class _Runs(_Kept):
    runs: list[_Run]


class LabelAnswer(_Kept):
    """The answer to `POST /labels`."""

    accepted: Count
    unknown: list[Shown]
    invalid: dict[Shown, Shown]


def server_state(port: OperatorPort, of: Literal["model", "pool"] | None = None) -> ServerState:
    """Return the state of a server of a file or a pool, or of the one that is given with `of`.

    Raises `TargetError` for another answer, and for a server of the other one.
    """
    state = cast(ServerState, _checked(port, "/status", port.get("/status"), ServerState))
    if ("model" in state) is ("pool" in state) or ("model" in state) is not ("canary" in state):
        raise _odd(port, "/status", "there is neither a model with a canary nor a pool")
    if of is not None and of not in state:
        raise TargetError(
            f"{port.url} is no longer the server of a {'file' if of == 'model' else 'pool'} with which this run began; "
            "begin a new run"
        )
    return state


def monitor_state(port: OperatorPort) -> MonitorState:
    """Return what the monitor of a server has found. Raises `TargetError` for another answer."""
    return cast(MonitorState, _checked(port, "/monitor", port.get("/monitor"), MonitorState))


def approval_of(port: OperatorPort, run: str) -> tuple[Approval | None, str]:
    """Return whether a run of an adaptation was approved, and the principal that decided; None for a run that does not
    wait for an approval, or that the server does not have. Raises `TargetError` for another answer.
    """
    content = _checked(port, "/adaptation", port.get("/adaptation"), _Runs)
    found = (each for each in content["runs"] if each["run"] == run)
    return next(((each["approval"], each["by"]) for each in found), (None, ""))


def send_labels(port: OperatorPort, labels: Mapping[str, list[int]]) -> LabelAnswer:
    """Send the classes of requests, and return which were accepted. Raises `TargetError` for another answer."""
    return cast(LabelAnswer, _checked(port, "/labels", port.post("/labels", {"labels": labels}), LabelAnswer))


def _checked(port: OperatorPort, path: str, content: dict[str, Any], form: Any) -> Any:
    try:
        return conforming(content, form)
    except FormFault as fault:
        raise _odd(port, path, str(fault)) from None


def _odd(port: OperatorPort, path: str, fault: str) -> TargetError:
    return TargetError(
        f"{port.url}{path} has another form than that of a server of this version: {line(fault)}; give the address of "
        "the operator's port of your server, and use one version of Holdfast for both"
    )
