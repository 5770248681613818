"""Interpretation of the outputs of a network: the tensor of logits in them, their scale, and whether it contains
logits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError, UnclearOutput
from holdfast.core.remedies import model_argument
from holdfast.core.types import Logits, Mask, PerExample

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
