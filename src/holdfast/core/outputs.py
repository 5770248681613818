"""Interpretation of the outputs of a network: the tensor of logits in them, their scale, and whether inputs are
rejected; and networks with a detector that rejects suspicious inputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UnclearOutput, UsageError, model_argument
from holdfast.core.types import Inputs, Labels, Logits, Mask, PerExample

SAME = 1e-4
"""largest change of the outputs of a deterministic model for equal inputs, relative to the largest logit"""
_OUT_OF_REACH = 1e4  # below the largest: exp(-1e4) is 0 in every type


def contending(logits: Logits) -> Tensor:
    """Return a mask of the logits (n, classes) that can affect the prediction. These are finite and less than 1e4 below
    the largest logit of their row.

    A class that is masked out, with minus infinity or a large negative number, does not affect the scale of the others.
    """
    largest = logits.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return logits.isfinite() & (logits > largest - _OUT_OF_REACH)


def scale(logits: Logits) -> PerExample:
    """Return for each row of logits the largest absolute value among the logits that can affect the prediction, or 0 if
    there is none.
    """
    return logits.where(contending(logits), 0.0).abs().amax(1)


def change(first: Logits, second: Logits) -> PerExample:
    """Return for each row the largest difference between two sets of logits, divided by the largest logit of all rows.

    Row means are subtracted first. A logit that is finite in only one of both counts as a change of 1. Classes that are
    masked out do not count.
    """
    lost = (first.isfinite() != second.isfinite()).any(1)
    relevant = contending(first) | contending(second)
    first, second = (logits.nan_to_num(0.0, 0.0, 0.0).where(relevant, 0.0) for logits in (first, second))
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    largest = first.abs().max().clamp_min(1e-12)
    return torch.where(lost, 1.0, ((first - second).abs() / largest).amax(1))


OutputKind = Literal["logit", "probability"]
"""`logit`: any real number; `probability`: a number from 0 to 1, after a sigmoid or a softmax"""

PROBABILITY = model_argument("model_output", "probability", reason="(after a sigmoid or a softmax)")
LOGIT = model_argument("model_output", "logit")
"""declarations of the outputs of a model"""

_ROUNDING = 1e-4
"""tolerance of probabilities outside [0, 1]; the error of a softmax in half precision is smaller"""


_with_values = ContextVar("_with_values", default=True)
"""whether outputs have values, which are then checked"""


@contextmanager
def without_values() -> Iterator[None]:
    """Context manager in which the range of probabilities is not checked, because operations are recorded on outputs
    without values. Call the model before it, so that its outputs are checked once.
    """
    token = _with_values.set(False)
    try:
        yield
    finally:
        _with_values.reset(token)


def values_known() -> bool:
    """Return whether outputs have values, as everywhere outside of `without_values`."""
    return _with_values.get()


@runtime_checkable
class _HasLogits(Protocol):
    """Protocol of the outputs of networks that return several tensors in one object, such as those of Hugging Face."""

    logits: object


def logits_of(outputs: object, *, in_training: bool = False) -> object:
    """Return the logits among the outputs of a network: the attribute or the entry `logits`, or the outputs themselves.
    An array of numpy becomes a tensor.

    In training mode, the logits are the first element of a tuple, whose others are those of auxiliary classifiers, as
    in GoogLeNet and Inception v3.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, np.ndarray):
        return torch.tensor(outputs)
    if isinstance(outputs, _HasLogits):
        return outputs.logits
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return outputs[0] if in_training and isinstance(outputs, tuple) and outputs else outputs


REFUSED = torch.inf
"""value of all outputs of a served model for an input that its server rejects; real scores are finite"""


def refused(outputs: Tensor) -> Mask:
    """Return a mask of the inputs that a served model rejected, computed from its outputs (n, classes)."""
    return outputs.isposinf().all(1)


def is_single(outputs: Tensor) -> bool:
    """Return whether the outputs of a network consist of one number for each example, with shape (n,) or (n, 1)."""
    return outputs.dim() == 1 or outputs.shape[1] == 1


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether outputs (n, classes) that are used as logits are probabilities: each row is positive or zero, and
    its sum is 1.
    """
    return bool(((outputs.sum(1) - 1).abs() < _ROUNDING).all() & (outputs >= 0).all())


def kind_of_single(outputs: Tensor, declared: OutputKind | None) -> OutputKind | None:
    """Return whether a model with one output for each input returns logits or probabilities: what is declared, or else
    what the values show.

    It is the declared kind if there is one, and otherwise logits if any value is outside [0, 1]. Returns None if all
    values are NaN.

    Raises `UnclearOutput` if all are inside [0, 1] and nothing is declared, because a probability that is interpreted
    as a logit would classify every example as class 1.
    """
    if declared is not None:
        return declared
    if bool(((outputs < 0) | (outputs > 1)).any()):
        return "logit"
    numbers = outputs[~outputs.isnan()]
    if not len(numbers):
        return None
    whole = bool((numbers == numbers.round()).all())
    raise UnclearOutput(
        f"the model returns one number for each example, from {float(numbers.min()):.4g} to "
        f"{float(numbers.max()):.4g}: that may be the logit of class 1 or its probability"
        + (
            ", or the number of the class of each example. If it is the class, return a row for each example instead, "
            "with 1 for its class and 0 for the others; if not, declare the output"
            if whole
            else ""
        ),
        PROBABILITY,
        LOGIT,
    )


def of_classes(outputs: Tensor, kind: OutputKind | None = None) -> Logits:
    """Convert the outputs of a network, logits or probabilities of shape (n, classes), (n, 1) or (n,), to logits (n,
    classes).

    One logit z for an example becomes two, (0, z); one probability p becomes (log(1 - p), log(p)). The logits of
    several probabilities are their logarithms, where smaller probabilities are replaced by the smallest normal number.
    Raises `TargetError` for a probability outside [0, 1].
    """
    if kind == "probability" and _with_values.get():
        _refuse_no_probabilities(outputs)
    if not is_single(outputs):
        return _log(outputs) if kind == "probability" else outputs
    single = outputs.reshape(len(outputs))
    if kind == "probability":
        return torch.stack((_log(1 - single), _log(single)), dim=1)
    return torch.stack((torch.zeros_like(single), single), dim=1)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _refuse_no_probabilities(outputs: Tensor) -> None:
    outside = (outputs < -_ROUNDING) | (outputs > 1 + _ROUNDING)
    if bool(outside.any()):
        raise TargetError(
            f"the model returned {float(outputs[outside][0].detach()):.4g}, but probabilities are from 0 to 1, and its "
            "outputs are declared as probabilities",
            LOGIT,
        )


Net = nn.Module | Callable[[Tensor], Tensor]


class Guarded(nn.Module):
    """Network with a detector of suspicious inputs. It returns one more logit than the network, the last one, for the
    additional class "rejected".
    """

    def __init__(
        self, net: Net, detector: Net, threshold: float, scale: float, output: OutputKind | None = None
    ) -> None:
        super().__init__()
        self.net, self.detector, self.output = net, detector, output
        self.threshold: Tensor
        self.scale: Tensor
        # buffers, so that they are part of the model's digest
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Inputs) -> Tensor:
        """Return the logits of the classes and, as the last column, the logit of "rejected": the largest logit plus
        `(score - threshold) / scale` of the detector.
        """
        logits = logits_of(self.net(x))
        if not isinstance(logits, Tensor) or logits.dim() not in (1, 2) or len(logits) != len(x):
            return logits  # type: ignore[return-value]  # `Classifier` raises the error
        if is_single(logits) and len(logits):
            self.output = kind_of_single(logits, self.output)
        logits = of_classes(logits, self.output)
        score = self.detector(x)
        if not isinstance(score, Tensor) or score.shape not in ((len(x),), (len(x), 1)):
            returned = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise TargetError(
                f"the detector returned {returned} for {len(x)} inputs; it must return one score for each input, "
                f"({len(x)},)"
            )
        score = score if score.is_floating_point() else score.to(self.threshold.dtype)
        beyond = (score.reshape(len(x)) - self.threshold.to(score.dtype)) / self.scale.to(score.dtype)
        rejected = logits.amax(1) + beyond.to(logits.dtype)
        return torch.cat((logits, rejected[:, None]), dim=1)


def with_detector(
    net: Net, detector: Net, threshold: float, *, scale: float = 1.0, output: OutputKind | None = None
) -> Guarded:
    """Combine a network with a detector: an input whose score is above the threshold is rejected.

    `detector` takes the same inputs as `net` and returns one score for each, higher for suspicious inputs. `scale` is
    the difference of scores that counts as much as one logit in an attack's loss. It changes only gradients, not which
    inputs are rejected, and adaptive attacks choose their own weights. The result must be the outermost network of a
    model.
    """
    if not callable(net) or not callable(detector):
        raise UsageError(
            f"with_detector() got {net!r} and {detector!r}; expected a network and a detector, functions or modules"
        )
    limit, weight = _number(threshold), _number(scale)
    if math.isnan(limit):
        raise UsageError(
            f"threshold is {threshold!r}; expected a number, such as a quantile of the scores of clean inputs"
        )
    if not 0 < weight < math.inf:
        raise UsageError(
            f"scale is {scale!r}; expected a positive number, such as the standard deviation of the scores"
        )
    return Guarded(net, detector, limit, weight, output)


def _number(value: float) -> float:
    """The value as a float, also of a tensor with one element; NaN if that is not possible."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def refuse_inner(model: nn.Module, *, outermost: bool) -> None:
    """Raise `TargetError` if a network with a detector is part of another network, which would treat the logit of
    "rejected" as a class.

    With `outermost`, `model` may itself be a guarded network.
    """
    if sum(isinstance(module, Guarded) for module in model.modules()) > outermost:
        raise TargetError(
            "a guarded network is part of another network, which would treat its last logit as a class; guard the "
            "outer network instead: with_detector(nn.Sequential(...), detector, threshold)"
        )


@dataclass(frozen=True)
class Aim:
    """Settings by which the loss of an attack takes the detector of a guarded model into account."""

    weight: float = 1.0
    """factor of the difference between score and threshold"""
    beyond: float = 0.0
    """threshold of rejection, in the units of `score`; infinite for an attack without knowledge of the detector"""
    softness: float = 0.0
    """width, in logits, of the smooth maximum of the label's and the detector's logit; 0 for the exact maximum"""


def score(logits: Logits) -> PerExample:
    """Return for each input the detector's score minus its threshold, divided by its scale, computed from the logits of
    a guarded model. NaN becomes minus infinity, which means not rejected.
    """
    beyond: PerExample = logits[:, -1] - logits[:, :-1].amax(1)
    return beyond.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def with_aim(logits: Logits, aim: Aim) -> Logits:
    """Return the logits of a guarded model with the detector's weight and threshold replaced by those of `aim`. The
    logits of the classes are unchanged.
    """
    largest = logits[:, :-1].amax(1, keepdim=True)
    return torch.cat((logits[:, :-1], largest + aim.weight * (logits[:, -1:] - largest - aim.beyond)), dim=1)


def rejected_as_correct(logits: Logits, y: Labels) -> Tensor:
    """Return the class logits (n, classes) of a guarded model, changed so that a rejected input counts as correctly
    classified.

    The logit of rejection replaces that of the label where it is larger.
    """
    correct_logit = torch.maximum(logits.gather(1, y[:, None]), logits[:, -1:])
    return logits[:, :-1].scatter(1, y[:, None], correct_logit)


def softly_rejected_as_correct(logits: Logits, y: Labels, softness: float) -> Tensor:
    """Return class logits of a guarded model in which a rejected input counts as nearly correct, as a smooth function
    that attacks can differentiate.

    A smooth maximum of width `softness` replaces the maximum, so that the gradient also depends on the logit of
    rejection near its boundary.
    """
    correct_logit = torch.stack((logits.gather(1, y[:, None]), logits[:, -1:])) / softness
    return logits[:, :-1].scatter(1, y[:, None], softness * correct_logit.logsumexp(0))
