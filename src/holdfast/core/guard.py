"""Guarded models: networks with a detector that rejects suspicious inputs.

The pair is one network with an additional class "rejected", so that any attack is an attack on both. The definition of
robustness is that of Tramèr, "Detecting adversarial examples is (nearly) as hard as classifying them", ICML 2022,
arXiv:2107.11630: the clean input is accepted and correct, and no attacked input is accepted and misclassified.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.outputs import OutputKind, is_single, kind_of_single, logits_of, of_classes
from holdfast.core.types import Inputs, Labels, Logits, PerExample

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
