"""Trigger inversion (Neural Cleanse), and the measurements of the audit of a model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from typing_extensions import TypedDict

from holdfast.audits.backdoor_controls import MIN_CONTROLS, Rank, is_comparable, ranked
from holdfast.audits.finding import Number, Share, Size, StoredSteps
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.types import Fraction, Ids, Inputs, Labels, PerExample, Positive, Steps
from holdfast.runs.store.columns import IDS, Flag, Form, whole
from holdfast.statistics.intervals import difference_of_counts, threshold
from holdfast.threats.triggers import Trigger

VERIFIED = 256
"""Number of examples on which the success of a recovered trigger is measured."""
_MAD_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution in multiples of its median absolute deviation."""
_SMALLER = 0.99
"""Size, relative to the smallest one so far, from which on a trigger counts as smaller."""


@dataclass(frozen=True)
class Inverted:
    """The smallest trigger that was found for each of some classes."""

    classes: Tensor
    """class index of each trigger (k)"""
    mask: Tensor
    """share of each value that the pattern replaces, from 0 to 1 (k, *mask)"""
    pattern: Tensor
    """values that replace those of the input (k, *input)"""
    size: Tensor
    """sum of the values of each mask (k)"""
    success: Tensor
    """share of examples of other classes that are predicted as the class with the trigger (k)"""
    steps: Tensor
    """number of steps that the search took for each class (k)"""

    def trigger(self, label: int) -> Trigger:
        """Return the trigger of a class."""
        place = self.classes.tolist().index(label)
        return Trigger(self.mask[place], self.pattern[place], label)

    def columns(self) -> Columns:
        """Return the triggers as columns of a stage, with the class index as id."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "classes"}
        return {"id": self.classes, **named}


def joined(groups: Sequence[Columns]) -> Inverted:
    """Return the triggers of all classes from the columns of groups of classes."""
    columns = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    return Inverted(columns.pop("id"), **columns)


def abnormality(size: Tensor) -> Tensor:
    """Return the index of Neural Cleanse of each class: the difference of its size to the median, towards small sizes,
    in robust standard deviations.

    It is not a p-value. Among ten sizes the median absolute deviation varies so much that clean networks reach 2.
    """
    median = size.quantile(0.5)
    spread = _MAD_OF_NORMAL * (size - median).abs().quantile(0.5)
    return torch.where(size == median, 0.0, (median - size) / spread)


def refuse_one_class(y: Labels, *remedies: Remedy) -> None:
    """Raise `UsageError` with remedies if all examples are of one class."""
    if bool((y == y[:1]).all()):
        raise UsageError(
            f"all {len(y)} clean examples are of one class, and a trigger is searched on examples of other classes; "
            "give clean examples of at least two classes",
            *remedies,
        )


@dataclass(frozen=True)
class Inversion:
    """Searches for the smallest trigger of each class: `min CE(f((1 - m) x + m p), class) + weight · |m|_1`."""

    steps: Steps = 300
    """largest number of gradient steps"""
    examples: Steps = 16
    """number of examples in each step for each class"""
    step_size: Positive = 0.1
    """learning rate of Adam on the inverse sigmoid of mask and pattern"""
    goal: Fraction = 0.98
    """success that a trigger must have; the weight of the size grows while the success is a point higher"""
    factor: Positive = 1.5
    """factor by which the weight of the size grows; it falls by this factor to the power of 1.5"""
    window: Steps = 10
    """number of steps over which the success is averaged"""
    patience: Steps = 10
    """number of windows without a smaller trigger after which the search for a class ends"""

    def __call__(
        self, model: Classifier, x: Inputs, y: Labels, classes: Sequence[int], *, rng: Draws
    ) -> Inverted:
        """Return the smallest trigger of each of `classes` on clean examples, computed in one batch.

        The result of a class does not depend on the other classes, except for rounding. Costs at most
        `steps · examples` forward and backward passes for each class. Raises `UsageError` if all examples are of one
        class.
        """
        refuse_one_class(y)
        searches = [_Search(self, model, x[y != label], label, rng.at("class", label)) for label in classes]
        self._search(model, searches)
        return Inverted(
            torch.tensor(classes),
            torch.stack([one.mask.cpu() for one in searches]),
            torch.stack([one.pattern.cpu() for one in searches]),
            torch.stack([one.mask.sum().cpu() for one in searches]),
            torch.tensor([one.success(model) for one in searches]),
            torch.tensor([one.n_steps for one in searches]),
        )

    def _search(self, model: Classifier, searches: "Sequence[_Search]") -> None:
        optimiser = torch.optim.Adam([logits for one in searches for logits in one.logits], lr=self.step_size)
        for _ in range(self.steps):
            active = [one for one in searches if one.stale < self.patience]
            if not active:
                break
            optimiser.zero_grad()
            logits = model(torch.cat([one.stamped() for one in active])).unflatten(0, (len(active), -1))
            target = torch.tensor([one.label for one in active], device=logits.device)
            target = target[:, None].expand(-1, self.examples)
            losses = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            penalties = torch.stack([one.weight * one.size() for one in active])
            loss = losses.sum() / self.examples + penalties.sum()
            values = [value for one in active for value in one.logits]
            # gradients of these alone, because those of the weights would double the time
            for value, gradient in zip(values, torch.autograd.grad(loss, values), strict=True):
                value.grad = gradient
            successes = (logits.argmax(-1) == target).double().mean(1).tolist()
            for one, success in zip(active, successes, strict=True):
                one.advance(success)
            optimiser.step()


class _Search:
    """State of the search for the trigger of one class, on the examples of other classes."""

    def __init__(self, settings: Inversion, model: Classifier, x: Inputs, label: int, rng: Draws) -> None:
        self._settings, self._x, self._rng, self.label = settings, x, rng, label
        low, high = model.bounds.like(x[:1])
        self._low, self._width = low, high - low
        one_channel = (1, *x.shape[2:]) if x.dim() > 3 else x.shape[1:]
        self.logits = (x.new_zeros(one_channel).requires_grad_(), x.new_zeros(x.shape[1:]).requires_grad_())
        self.weight = 1 / self.logits[0].numel()
        self.n_steps, self.stale, self._smallest = 0, 0, math.inf
        self._successes: list[float] = []
        self.mask, self.pattern = self._values()

    def _values(self) -> tuple[Tensor, Tensor]:
        mask, pattern = (logits.detach().sigmoid() for logits in self.logits)
        return mask, (self._low + self._width * pattern).reshape(pattern.shape)

    def size(self) -> Tensor:
        """Return the sum of the current mask, with its gradient."""
        return self.logits[0].sigmoid().sum()

    def stamped(self) -> Inputs:
        """Return examples of the next step with the current trigger."""
        ids = torch.arange(self._settings.examples, device=self._x.device)
        x = self._x[self._rng.at("examples", self.n_steps).integers(ids, len(self._x))]
        mask, pattern = (logits.sigmoid() for logits in self.logits)
        return (1 - mask) * x + mask * (self._low + self._width * pattern)

    def advance(self, success: float) -> None:
        """Record the success in a step. At the end of a window, adjust the weight of the size, and keep the trigger if
        it is the smallest that reached the goal.
        """
        settings = self._settings
        self.n_steps += 1
        self._successes.append(success)
        if self.n_steps % settings.window:
            return
        mean = sum(self._successes[-settings.window :]) / settings.window
        size = float(self.size().detach())
        self.stale += self._smallest < math.inf
        if mean >= settings.goal:
            if size < _SMALLER * self._smallest:
                self.stale = 0
            if size < self._smallest:
                self._smallest, (self.mask, self.pattern) = size, self._values()
        if mean >= min(settings.goal + 0.01, 1.0):
            self.weight *= settings.factor
        elif mean < settings.goal:
            self.weight /= settings.factor**1.5

    @torch.no_grad()
    def success(self, model: Classifier) -> float:
        """Return the success of the kept trigger on examples that are drawn for this purpose."""
        ids = torch.arange(VERIFIED, device=self._x.device)
        x = self._x[self._rng.at("verified").integers(ids, len(self._x))]
        stamped = Trigger(self.mask, self.pattern).stamped(x, model.bounds)
        return float((model(stamped).argmax(1) == self.label).double().mean())


_ROWS = 1024
"""Number of blended inputs in one forward pass."""


@dataclass(frozen=True)
class Strip:
    """Scores inputs by the mean entropy of the predictions for the sum of an input and a clean example, clamped to the
    valid range.
    """

    overlays: Steps = 64
    """number of clean examples that are laid over each input"""
    false_positives: Fraction = 0.01
    """share of clean inputs below the threshold"""

    @torch.no_grad()
    def entropy(self, model: Classifier, x: Inputs, ids: Ids, clean: Inputs, *, rng: Draws) -> PerExample:
        """Return the mean entropy of each input, in nats. It is low if the predicted class does not depend on the
        overlay. Costs `overlays` forward passes for each input.
        """
        chosen = rng.at("overlays").integers(ids, len(clean), self.overlays)
        low, _ = model.bounds.like(x)

        def blended(rows: Tensor) -> Inputs:
            return model.bounds.clamp(x[rows, None] + (clean[chosen[rows]] - low)).flatten(0, 1)

        entropies = [
            _entropy(model(blended(rows))).view(-1, self.overlays).mean(1)
            for rows in torch.split(torch.arange(len(x), device=x.device), max(1, _ROWS // self.overlays))
        ]
        return torch.cat(entropies)

    def threshold(self, clean: PerExample) -> float:
        """Return the entropy below which an input is suspect, from the entropies of clean inputs."""
        return -threshold(-clean, self.false_positives)


def _entropy(logits: Tensor) -> PerExample:
    logs = log_softmax(logits.double(), 1)
    return -(logs.exp() * logs).sum(1)


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
