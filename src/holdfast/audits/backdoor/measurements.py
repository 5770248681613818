"""The measurements of the audit of a model, read from its stored steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.backdoor.controls import MIN_CONTROLS, Rank, is_comparable, ranked
from holdfast.audits.backdoor.inversion import Inverted, Strip, joined
from holdfast.audits.finding import Number, Share, Size, StoredSteps
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import PerExample
from holdfast.runs.store.columns import IDS, Form, whole
from holdfast.runs.store.forms import Flag
from holdfast.statistics.intervals import difference_of_counts

GROUP = 5
"""Number of classes of which triggers are searched in one batch; a stopped search continues after the last group."""
TRAINING, ACCURACY, TRANSFER, STRIP_CLEAN, STRIP = "training", "accuracy", "transfer", "strip-clean", "strip"
"""Names of steps: the training of the controls, the accuracies, the success of the trigger on the controls, and the
entropies of clean examples and of the stream."""


def groups_of(classes: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the groups of classes of which triggers are searched in one batch, each with the name of its stage."""
    for place, first in enumerate(range(0, classes, GROUP)):
        yield f"inversion-{place}", list(range(first, min(first + GROUP, classes)))


@dataclass(frozen=True)
class Control:
    """A control beside the model."""

    name: str
    """name of its file"""
    accuracy: float
    difference: Estimate
    """its accuracy minus that of the model, on the clean examples"""

    @property
    def is_comparable(self) -> bool:
        """Whether the control takes part in the comparison; otherwise it is left out."""
        return is_comparable(self.difference)

    @property
    def is_below(self) -> bool:
        """Whether the control is less accurate than the model, according to the whole interval."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Compared:
    """A model beside the controls that are comparable."""

    rank: Rank
    transfer: tuple[float, ...]
    """success of the trigger with the smallest ratio on each of these controls"""


@dataclass(frozen=True)
class Streamed:
    """The entropies of a stream of inputs, beside those of clean examples."""

    ids: Tensor
    entropy: PerExample
    threshold: float

    @property
    def suspect(self) -> Tensor:
        """Whether the entropy of each input is below the threshold."""
        return self.entropy < self.threshold


@dataclass(frozen=True)
class BackdoorMeasurements:
    """All measurements of the audit of a model."""

    examples: int
    """number of clean examples"""
    accuracy: float
    inverted: Inverted
    controls: tuple[Control, ...]
    """the controls in the order of their names; empty for none"""
    trained: tuple[int, ...]
    """epochs of each control that the audit trained; empty if it trained none"""
    compared: Compared | None
    """None if fewer than `MIN_CONTROLS` controls are comparable"""
    streamed: Streamed | None

    @property
    def used(self) -> list[Control]:
        """The controls that are comparable."""
        return [control for control in self.controls if control.is_comparable]

    @property
    def left_out(self) -> list[Control]:
        """The other controls."""
        return [control for control in self.controls if not control.is_comparable]

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference of accuracy between a comparable control and the model; 0 without any."""
        return max((abs(control.difference.value) for control in self.used), default=0.0)


class Settings(TypedDict):
    """Settings in `run.json` from which the finding is computed."""

    classes: Annotated[Size, Field(ge=2)]
    controls: Size
    """number of controls; 0 for none"""
    train_controls: str | None
    """time for the training of the controls; None if the audit trains none"""
    stream: Flag
    class_names: list[str] | None


class _Data(TypedDict):
    n: Size


class Beside(TypedDict):
    """The accuracy of a control beside that of the model."""

    ahead: Size
    """number of examples that only the control predicts correctly"""
    behind: Size
    """number of examples that only the model predicts correctly"""


class Accuracies(TypedDict):
    """The document of the accuracies."""

    model: Share
    controls: dict[str, Beside]


class _Epochs(TypedDict):
    number: Size
    epochs: Size


class _Training(TypedDict):
    controls: list[_Epochs]


class _Sizes(TypedDict):
    sizes: list[Annotated[Number, Field(gt=1e-30)]]


def measured(steps: StoredSteps) -> BackdoorMeasurements:
    """Return the measurements of the stored steps of an audit. Raises `TargetError` if they contradict each other."""
    settings = steps.settings(Settings)
    parts = list[Columns]()
    for name, classes in groups_of(settings["classes"]):
        parts.append(steps.columns(name, _FORMS, k=len(classes)))
        if parts[-1]["id"].tolist() != classes:
            raise steps.refuse(name, f"the classes {parts[-1]['id'].tolist()}", str(classes))
    inverted, n = joined(parts), steps.data(_Data)["n"]
    document = steps.document(ACCURACY, Accuracies)
    if any(beside["ahead"] + beside["behind"] > n for beside in document["controls"].values()):
        raise steps.refuse(ACCURACY, f"more than {n} examples", f"at most {n} for each control")
    controls, trained = controls_of(document, n), tuple[int, ...]()
    if len(controls) != settings["controls"]:
        raise steps.refuse(ACCURACY, f"{len(controls)} controls", str(settings["controls"]))
    if settings["train_controls"] is not None:
        training = steps.document(TRAINING, _Training)["controls"]
        trained = tuple(each["epochs"] for each in training)
        if len(trained) != len(controls):
            raise steps.refuse(TRAINING, f"{len(trained)} controls", str(len(controls)))
    compared = _compared(steps, inverted, controls) if controls else None
    streamed = None
    if settings["stream"]:
        clean = steps.columns(STRIP_CLEAN, {"entropy": Form()})["entropy"]
        columns = steps.columns(STRIP, {"id": IDS, "entropy": Form()})
        if not len(clean):
            raise steps.refuse(STRIP_CLEAN, "no entropy", "at least one")
        streamed = Streamed(columns["id"], columns["entropy"], Strip().threshold(clean))
    return BackdoorMeasurements(n, document["model"], inverted, controls, trained, compared, streamed)


def controls_of(document: Accuracies, n: int) -> tuple[Control, ...]:
    """Return the controls of a document of accuracies on `n` examples."""
    controls = []
    for name, beside in document["controls"].items():
        difference = difference_of_counts(beside["ahead"], beside["behind"], n)
        controls.append(Control(name, document["model"] + difference.value, difference))
    return tuple(controls)


def _compared(steps: StoredSteps, inverted: Inverted, controls: Sequence[Control]) -> Compared | None:
    """The comparison with the controls that are comparable, if they are enough. Of others no sizes are stored."""
    used = [control.is_comparable for control in controls]
    is_enough = sum(used) >= MIN_CONTROLS
    stored = [steps.document(f"control-{place}", _Sizes)["sizes"] for place in range(len(controls))]
    transfer = steps.document(TRANSFER, dict[str, Share])
    for place, (sizes, is_used) in enumerate(zip(stored, used, strict=True)):
        expected = len(inverted.classes) if is_used and is_enough else 0
        if len(sizes) != expected:
            raise steps.refuse(f"control-{place}", f"{len(sizes)} sizes", str(expected))
    if len(transfer) != (sum(used) if is_enough else 0):
        raise steps.refuse(TRANSFER, f"{len(transfer)} controls", f"the {sum(used)} that are compared")
    if not is_enough:
        return None
    rank = ranked(inverted.size, torch.tensor([sizes for sizes in stored if sizes]))
    return Compared(rank, tuple(transfer.values()))


_FORMS = {
    "id": whole("k"),
    "mask": Form(("k",), further=True, low=0, high=1),
    "pattern": Form(("k",), further=True),
    "size": Form(("k",), low=1e-30),
    "success": Form(("k",), low=0, high=1),
    "steps": whole("k"),
}
