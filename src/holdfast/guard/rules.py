"""Decisions of the guard about requests, what clients receive of the scores, and the rules that need
only the inputs.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property, partial
from math import isfinite
from threading import Lock
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Bounds, Model, per_channel
from holdfast.core.outputs import refused
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.settings.values import InputKind
from holdfast.statistics.intervals import confidence_sequence


@dataclass
class ObservedRate:
    """Counter of the inputs for which a calibrated rule fired. The rate is that of false positives if there are no
    attacks, and otherwise an upper bound of it.
    """

    expected: float = 0.001
    """false-positive rate to which the guard was calibrated"""
    n: int = 0
    """number of inputs"""
    alarms: int = 0
    """number of inputs for which a calibrated rule fired"""
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, n: int, alarms: int) -> None:
        """Add `n` inputs, of which `alarms` fired a rule. May be called by several threads."""
        with self._lock:
            self.n, self.alarms = self.n + n, self.alarms + alarms

    def estimate(self, confidence: float = 0.95) -> Estimate | None:
        """Return the rate with an interval that is valid at all times, or None before the first input."""
        with self._lock:
            n, alarms = self.n, self.alarms
        if not n:
            return None
        return Estimate(alarms / n, *confidence_sequence(alarms, n, confidence, expected=self.expected), n)

    @property
    def too_high(self) -> bool:
        """Whether the rate is above the calibrated one, with 95 % confidence: the inputs have changed, or there is an
        attack.
        """
        estimate = self.estimate()
        return estimate is not None and estimate.low > self.expected


class Action(IntEnum):
    """What is done with an input, in order of severity. Between several actions, the most severe one is taken."""

    ALLOW = 0
    """the outputs of the model are returned"""
    FLAG = 1
    """like `ALLOW`, and the request is marked in the audit chain"""
    DELAY = 2
    """the response is delayed; also together with a more severe action that returns a response"""
    LABEL_ONLY = 3
    """the predicted class is returned, and no scores"""
    ABSTAIN = 4
    """no prediction is returned for the input"""
    BLOCK = 5
    """the request is refused"""

    def __str__(self) -> str:
        """Return the name of the action in configuration files and reports, as in `label_only`."""
        return self.name.lower()


class Mode(StrEnum):
    """What a rule of the guard may do."""

    OBSERVE = "observe"
    """it records its score"""
    SHADOW = "shadow"
    """it records its score, and the action that it would take"""
    ENFORCE = "enforce"
    """its action is taken"""


class Score(NamedTuple):
    """Result of one rule for one input. It is recorded, and never returned to a client."""

    rule: str
    value: float
    """score of the rule, larger for more suspicious inputs"""
    fired: bool
    """whether the score is above the threshold of the rule"""
    mode: Mode
    action: Action
    """action of the rule if it fires"""

    @property
    def taken(self) -> Action:
        """The action that is taken because of this score."""
        return self.action if self.fired and self.mode is Mode.ENFORCE else Action.ALLOW


@dataclass(frozen=True, slots=True)
class RowDecision:
    """Decision about one input of a request."""

    scores: tuple[Score, ...] = ()

    @property
    def action(self) -> Action:
        """The most severe action of the rules in mode `enforce`."""
        # a list of the few scores that fired, because this is computed for every input
        return max([score.taken for score in self.scores if score.fired], default=Action.ALLOW)

    @property
    def shadow(self) -> Action:
        """The most severe action of the rules in modes `shadow` and `enforce`, if all were enforced."""
        return max(
            (score.action for score in self.scores if score.fired and score.mode is not Mode.OBSERVE),
            default=Action.ALLOW,
        )


@dataclass(frozen=True)
class RequestDecision:
    """Decision about a request with one or more inputs."""

    request: str
    """identifier of the request, unique and unpredictable"""
    principal: str
    """name of the client, which the server assigns; empty if it has none"""
    rows: tuple[RowDecision, ...]
    """decision about each input"""
    refusal: str = ""
    """reason that a refused request is answered with, which discloses no score; empty if it is not refused"""
    delay_s: float = 0.0
    """seconds by which the response is delayed"""
    x: Tensor | None = field(default=None, repr=False)
    """inputs (n, *shape) after the input defences of the guard, which the model receives"""
    unchecked: bool = False
    """whether the query detector could not judge the inputs, because its state could not be reached"""
    unavailable: bool = False
    """whether the request is refused only for this reason: it is no detection, and the client may send it again later
    (status 503)"""
    notes: Mapping[str, object] = field(default_factory=dict)
    """further facts for the audit chain, such as that the shared state could not be reached"""

    @cached_property
    def action(self) -> Action:
        """The most severe action over all inputs."""
        return max([row.action for row in self.rows], default=Action.ALLOW)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The action for each input."""
        return tuple(row.action for row in self.rows)

    @property
    def answered(self) -> bool:
        """Whether the model is called for the request."""
        return self.action is not Action.BLOCK and not self.unavailable


@dataclass(frozen=True)
class Incoming:
    """A request before the guard has seen it."""

    x: Tensor
    """inputs (n, *shape)"""
    principal: str = ""
    request: str = field(default_factory=lambda: secrets.token_hex(16))
    sent: Tensor | None = field(default=None, repr=False)
    """inputs as the client sent them, if `x` was rounded to another data type"""


class RequestGuard(Protocol):
    """Protocol of a guard: it decides about requests before and after the model was called."""

    @property
    def actions(self) -> frozenset[Action]:
        """Actions of the rules in mode `enforce`."""
        return frozenset()

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return the decisions about several requests, with one call of each rule for all of them. The model is called
        with the inputs `x` of those with `answered`.

        The query detector receives the inputs in the order of the requests.
        """

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the decisions after the model returned the outputs (n, classes) of each request, with one call of each
        detector for all of them. `outputs` has None for a refused request, whose decision is unchanged. `features` are
        the outputs (n, …) of the layer that a detector needs; None if no detector needs any. `network` is the model for
        detectors that need further forward passes.
        """

    def before(self, x: Tensor, *, principal: str = "") -> RequestDecision:
        """Return the decision about the inputs (n, *shape) of one request before the model is called.

        The field `x` of the result contains the inputs for the model. A refused request, whose field `answered` is
        False, must not be given to the model.
        """
        return self.before_many([Incoming(x, principal)])[0]

    def after(
        self,
        decision: RequestDecision,
        outputs: Tensor,
        features: Tensor | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> RequestDecision:
        """Return the final decision about one request, given the outputs (n, classes) of the model.

        `features` (n, d) are the activations for the Mahalanobis distance on features, and `network` the function from
        inputs to outputs, for detectors that need further forward passes.
        """
        every = None if features is None else [features]
        return self.after_many([decision], [outputs], every, network=network)[0]


class NoRules(RequestGuard):
    """A guard without rules, which allows every request."""

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return decisions that allow all requests."""
        return [
            RequestDecision(each.request, each.principal, (RowDecision(),) * each.x.shape[0], x=each.x)
            for each in requests
        ]

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the decisions unchanged."""
        return list(decisions)


Release = Callable[[Tensor], Tensor]
"""function from the scores (n, classes) of a model to those that clients receive"""


def all_scores(scores: Tensor) -> Tensor:
    """Return the scores unchanged."""
    return scores


def labels(scores: Tensor) -> Tensor:
    """Return 1 for the predicted class of each row and 0 for the others. A single column contains class numbers, which
    are returned unchanged.
    """
    if scores.shape[1] == 1:
        return scores
    return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)


def release_of(detail: str) -> Release:
    """Return the function for a setting: `all`, `labels`, or a number of decimal digits."""
    if detail == "labels":
        return labels
    return all_scores if detail == "all" else partial(_rounded, decimals=int(detail))


def _rounded(scores: Tensor, decimals: int) -> Tensor:
    """Return scores with a number of decimal digits. Class numbers are unchanged, as are scores so large that their
    product with a power of ten overflows: these have no decimal digits.
    """
    if not scores.is_floating_point():
        return scores
    rounded = torch.round(scores, decimals=decimals)
    return torch.where(rounded.isfinite(), rounded, scores)


_LEAD = 1e-4  # of the predicted class, which clients know: less than the digits that are released


class Releasing:
    """Model of which an attack receives what a release returns. The predicted class has the largest score also where
    rounded scores are equal, and rejected inputs stay marked.
    """

    def __init__(self, model: Model, release: Release) -> None:
        self._model, self._release = model, release

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self._model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the released scores (n, classes) of the inputs."""
        logits = self._model(x, ids)
        released = self._release(logits) + _LEAD * labels(logits)
        return torch.where(refused(logits)[:, None], logits, released)


def with_bits(x: Inputs, bits: int, low: float = 0.0, high: float = 1.0) -> Inputs:
    """Return the inputs rounded to `2**bits` equidistant values from `low` to `high`. The gradient is that of the
    identity.
    """
    steps = (2**bits - 1) / (high - low)
    rounded = ((x - low) * steps).round() / steps + low
    # The difference is detached, so that the gradient is one. `x + (rounded - x)` would change the last bit.
    straight: Inputs = x + (rounded - x).detach() if x.requires_grad else rounded
    return straight


def median_filtered(x: Inputs, size: int) -> Inputs:
    """Return images (n, channels, height, width) in which each value is the median of a window of `size` x `size`
    pixels around it. Images are mirrored at their borders; for an even `size` the lower median of the window is used,
    which extends further up and left.
    """
    before, after = size // 2, (size - 1) // 2
    padded = F.pad(x, (before, after, before, after), mode="reflect")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    medians: Inputs = windows.flatten(4).median(dim=4).values
    return medians


SCHEMA, RANGE, QUERIES = "schema", "range", "queries"
"""names of the rules that are evaluated before the model"""


class Basis(StrEnum):
    """Where the threshold of a rule comes from, or the radius of the query detector, which decides when it fires."""

    GIVEN = "given"
    """written in the settings"""
    FITTED = "fitted"
    """fitted to benign inputs by a calibration"""
    UNFITTED = "unfitted"
    """neither, so that the rule only reports"""


@dataclass(frozen=True)
class Rule:
    """What is done with the score of one rule: the threshold above which it fires, its mode and its action."""

    name: str
    mode: Mode = Mode.OBSERVE
    action: Action = Action.FLAG
    threshold: float = torch.inf
    """score above which the rule fires; infinite for a rule that is not calibrated, which never fires"""
    fixed: bool = False
    """whether calibration does not change the threshold, because it was given or is that of the query detector"""
    basis: Basis = Basis.GIVEN
    """where the threshold, or the radius of the query detector, comes from"""

    def score(self, value: float) -> Score:
        """Return the score of one input."""
        return Score(self.name, value, value > self.threshold, self.mode, self.action)


@dataclass(frozen=True)
class InputSchema:
    """Shape, data type and range of the inputs that the model accepts."""

    shape: tuple[int | None, ...]
    """sizes of one input without the batch; None where any size is accepted"""
    dtype: torch.dtype = torch.float32
    low: tuple[float, ...] = (0.0,)
    """lowest valid value: one number, or one for each channel"""
    high: tuple[float, ...] = (1.0,)
    """highest valid value: one number, or one for each channel"""
    kind: InputKind = "numbers"
    """what an input is; `shape` is the largest length of the rows of files and of texts"""

    def fault(self, x: Tensor) -> str:
        """Return what is wrong with the shape or the data type of the inputs of a request, or an empty text."""
        if x.shape[1:] == self.shape and x.dtype == self.dtype and x.shape[0]:
            return ""  # of nearly all requests
        sizes = tuple(x.shape)
        if len(sizes) != len(self.shape) + 1 or any(
            expected not in (None, size) and (self.kind == "numbers" or size > expected)
            for expected, size in zip(self.shape, sizes[1:], strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in ("n", *self.shape))
            expected = expected if self.kind == "numbers" else f"n, at most {self.shape[0]}"
            return f"the inputs have the shape {sizes}; expected ({expected})"
        if x.dtype != self.dtype:
            given, wanted = (str(kind).removeprefix("torch.") for kind in (x.dtype, self.dtype))
            return f"the inputs are {given}; expected {wanted}"
        return "" if len(x) else "the request contains no inputs"

    @cached_property
    def range_text(self) -> str:
        """The range as a message shows it."""
        return f"from {_numbers(self.low)} to {_numbers(self.high)}"

    def excess(self, x: Tensor) -> Tensor:
        """Return for each input how far its values are outside the range: 0 inside, infinite for NaN and infinity."""
        x = x if x.is_floating_point() else x.double()  # differences of unsigned integers would wrap around
        if len(self.low) == len(self.high) == 1:
            smallest, largest = torch.aminmax(x.flatten(1), dim=1)  # NaN is propagated
            outside = torch.maximum(self.low[0] - smallest, largest - self.high[0])
        else:
            low, high = (per_channel(x.new_tensor(ends), x) for ends in (self.low, self.high))
            outside = torch.maximum(low - x, x - high).flatten(1).amax(1)
        return outside.clamp_min(0).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def all_finite(x: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    # a sum takes a third of the time; it is not finite either if it overflows
    return isfinite(x.sum().item()) or bool(x.isfinite().all())


@dataclass(frozen=True)
class InputDefence:
    """Squeezes of the inputs before the model: fewer bits for each value, then a median filter.

    Xu, Evans & Qi, "Feature squeezing", NDSS 2018, arXiv:1704.01155, of which only the squeezes are used here.
    """

    bits: int = 0
    """number of bits of each value; 0 leaves values unchanged"""
    median: int = 0
    """side of the window of the median filter in pixels; 0 leaves images unchanged"""
    low: float = 0.0
    high: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the squeezed inputs (n, *shape)."""
        if self.bits:
            x = with_bits(x, self.bits, self.low, self.high)
        if self.median:
            if x.dim() != 4:
                raise UsageError(
                    f"the median filter needs images (n, channels, height, width), and the inputs have the shape "
                    f"{tuple(x.shape)}; set defence: median to 0"
                )
            x = median_filtered(x, self.median)
        return x
