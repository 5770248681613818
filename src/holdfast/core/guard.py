"""A guarded model: a network and a detector, which rejects the inputs that it takes for strangers.

It is one network with one class more, "rejected", so that whoever attacks it attacks the pair. Tramèr, "Detecting
adversarial examples is (nearly) as hard as classifying them", ICML 2022, arXiv:2107.11630, for what robust means of it:
the clean input is accepted and right, and no attacked input is accepted and wrong.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.outputs import OutputKind, is_single, kind_of_single, of_classes
from holdfast.core.types import Inputs, Labels, Logits, PerExample

Net = nn.Module | Callable[[Tensor], Tensor]


class Guarded(nn.Module):
    """A network and a detector, with a logit for "rejected" after those of the classes; see `guarded`."""

    def __init__(
        self, net: Net, detector: Net, threshold: float, scale: float, output: OutputKind | None = None
    ) -> None:
        super().__init__()
        self.net, self.detector, self.output = net, detector, output
        self.threshold: Tensor
        self.scale: Tensor
        # in the state, so that a run knows its model by them
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Inputs) -> Tensor:
        """The logits of the classes, and the largest of them plus `(score - threshold) / scale`."""
        logits = self.net(x)
        if not isinstance(logits, Tensor) or logits.dim() not in (1, 2) or len(logits) != len(x):
            return logits  # for the `Classifier` to name
        if is_single(logits) and len(logits):
            self.output = kind_of_single(logits, self.output)
        logits = of_classes(logits, self.output)
        score = self.detector(x)
        if not isinstance(score, Tensor) or score.shape not in ((len(x),), (len(x), 1)):
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise TargetError(
                f"the detector returned {got} for {len(x)} inputs; it must return one score an input, ({len(x)},)"
            )
        score = score if score.is_floating_point() else score.to(self.threshold.dtype)
        beyond = (score.reshape(len(x)) - self.threshold.to(score.dtype)) / self.scale.to(score.dtype)
        rejected = logits.amax(1) + beyond.to(logits.dtype)
        return torch.cat((logits, rejected[:, None]), dim=1)


def guarded(
    net: Net, detector: Net, threshold: float, *, scale: float = 1.0, output: OutputKind | None = None
) -> Guarded:
    """The network with a detector before it: an input whose score is above the threshold is rejected.

    `detector` takes what `net` takes and returns one score an input, higher for a stranger. `scale` is how much of the
    score an attack weighs like one logit: it changes no input's verdict, but how far gradients lead; adaptive attacks
    find weights themselves. The result must be the outermost network, to be measured as one that rejects.
    """
    if not callable(net) or not callable(detector):
        raise UsageError(
            f"guarded() was given {net!r} and {detector!r}; expected a network and a detector, functions or modules"
        )
    limit, weight = _number(threshold), _number(scale)
    if math.isnan(limit):
        raise UsageError(
            f"threshold is {threshold!r}; expected a number, such as a quantile of clean inputs' scores"
        )
    if not 0 < weight < math.inf:
        raise UsageError(f"scale is {scale!r}; expected a positive number, such as how far the scores spread")
    return Guarded(net, detector, limit, weight, output)


def _number(value: float) -> float:
    """A single number, which a tensor may hold; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def refuse_inner(model: nn.Module, *, outermost: bool) -> None:
    """A guarded network inside another network, whose last logit would be read as a class."""
    if sum(isinstance(module, Guarded) for module in model.modules()) > outermost:
        raise TargetError(
            "a guarded network lies inside another, where its last logit would be read as a class; "
            "guard the whole of it: guarded(nn.Sequential(...), detector, threshold)"
        )


@dataclass(frozen=True)
class Aim:
    """How an attack takes the detector of a guarded model: what its score weighs, and beyond which one it rejects."""

    weight: float = 1.0
    """what the distance of the score to the threshold is multiplied by"""
    beyond: float = 0.0
    """the threshold, as `score` counts; infinite for an attack that knows of no detector"""
    softness: float = 0.0
    """over how many logits the gradient goes from the label's to that of the detector; 0 follows the larger alone"""


def score(logits: Logits) -> PerExample:
    """How far the detector's score is above the threshold, in its scale; where it is NaN nothing is rejected."""
    beyond: PerExample = logits[:, -1] - logits[:, :-1].amax(1)
    return beyond.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def taken(logits: Logits, aim: Aim) -> Logits:
    """Logits of a guarded model of another scale and threshold; what the classes say stays."""
    most = logits[:, :-1].amax(1, keepdim=True)
    return torch.cat((logits[:, :-1], most + aim.weight * (logits[:, -1:] - most - aim.beyond)), dim=1)


def held(logits: Logits, y: Labels) -> Tensor:
    """Logits (n, classes) of the classes alone; a rejected input counts for its label."""
    own = torch.maximum(logits.gather(1, y[:, None]), logits[:, -1:])
    return logits[:, :-1].scatter(1, y[:, None], own)


def softly_held(logits: Logits, y: Labels, softness: float) -> Tensor:
    """As `held`, with a smooth maximum over so many logits: its gradient leads along the edge of what is accepted."""
    own = torch.stack((logits.gather(1, y[:, None]), logits[:, -1:])) / softness
    return logits[:, :-1].scatter(1, y[:, None], softness * own.logsumexp(0))
