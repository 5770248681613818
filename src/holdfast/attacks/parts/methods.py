"""Methods among which an adaptive search divides its budget, each as a function of the number of passes that it may
use.

Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, arXiv:1802.00420, and
Tramèr et al., "On adaptive attacks to adversarial example defenses", NeurIPS 2020, arXiv:2002.08347, for the choice of
methods; Papernot et al., "Practical black-box attacks against machine learning", AsiaCCS 2017, arXiv:1602.02697,
for the stand-in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdfast.attacks.apgd import APGD
from holdfast.attacks.feature_transfer import FeatureTransfer
from holdfast.attacks.hop_skip_jump import HopSkipJump
from holdfast.attacks.parts.losses import margin_loss
from holdfast.attacks.parts.ration import Averaged
from holdfast.attacks.parts.stable_ascent import stable_ascent
from holdfast.attacks.square import Square
from holdfast.attacks.stand_in import LEAST_PASSES, StandIn
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.evidence import MethodState
from holdfast.core.model import VOTES, Model
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs

DRAWS = 8
"""forward passes over which the outputs of a randomised model are averaged for methods without gradients"""
NOISE = 0.25
"""length of the noise for expected gradients of a deterministic model, in multiples of eps"""
_STEPS = 100  # most steps of one ascent
_NEAREST = 3  # images of other classes from which a search with labels starts, for each example
_BEYOND = (2.0, 4.0)  # multiples of the best change so far, from which it starts as well

Run = Callable[[Model, Batch, ThreatModel, int, Draws], tuple[Inputs, int]]
"""function of a model, a batch, a threat model, the number of passes and random numbers; it returns the points that the
method reached, and the number of draws of a gradient (0 if it does not average)"""


def judging(*, randomised: bool) -> int:
    """Return the number of passes with which the points that a method returned are judged."""
    return VOTES if randomised else 1


@dataclass(frozen=True)
class Method:
    """A method of an adaptive search, and when it is applicable."""

    name: str
    needs: Access
    run: Run
    least: int
    """smallest number of passes for each example with which it is worth running"""
    norms: tuple[type[Norm], ...] = (Linf, L2, L1)
    for_random: Literal["averaged", "itself", "no"] = "averaged"
    """how it treats a randomised model: it queries an average over `DRAWS` outputs, averages itself, or is not
    applicable"""

    def state(self, threat: ThreatModel, passes: int, *, randomised: bool) -> MethodState:
        """Return whether the method is applicable: `not reached` if it is, otherwise the reason why not."""
        if not threat.gives(self.needs):
            return "needs gradients" if self.needs == "gradients" else "needs scores"
        if not isinstance(threat.constraint, self.norms):
            return "other norm"
        if randomised and self.for_random == "no":
            return "randomised"
        least = self.cost(self.least, randomised=randomised) + judging(randomised=randomised)
        return "too few passes" if passes < least else "not reached"

    def cost(self, passes: int, *, randomised: bool) -> int:
        """Return the number of passes of the model for a number of passes of the method."""
        return passes * DRAWS if randomised and self.for_random == "averaged" else passes

    def points(
        self, model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws, *, randomised: bool
    ) -> tuple[Inputs, int]:
        """Run the method with at most `passes` passes of the model for each example."""
        if randomised and self.for_random == "averaged":
            return self.run(Averaged(model, DRAWS), batch, threat, passes // DRAWS, rng)
        return self.run(model, batch, threat, passes, rng)


def _margin(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    """APGD on the margin. Each of the `steps` + 1 points of a restart costs a forward and a backward pass."""
    steps = min(_STEPS, passes // 2 - 1)
    attack = APGD(loss=margin_loss, steps=steps, restarts=passes // (2 * (steps + 1)))
    return attack(model, batch, threat, rng=rng), 0


def _expected(
    model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws, noise: float = NOISE
) -> tuple[Inputs, int]:
    return stable_ascent(model, batch, threat.constraint, passes, noise, rng)


def _square(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    return Square(queries=passes)(model, batch, threat, rng=rng), 0


def _features(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    return FeatureTransfer(passes=passes)(model, batch, threat, rng=rng), 0


def _stand_in(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    return StandIn(passes=passes)(model, batch, threat, rng=rng), 0


METHODS: tuple[Method, ...] = (
    Method("features", "gradients", _features, 40, for_random="itself"),
    Method("stand-in", "labels", _stand_in, LEAST_PASSES, for_random="itself"),
    Method("margin", "gradients", _margin, 12, for_random="no"),
    Method("expectation", "gradients", _expected, 24, for_random="itself"),
    Method("square", "scores", _square, 20),
)
"""the methods that are compared on a few examples first"""


def label_search(
    model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws, starts: tuple[Inputs, ...]
) -> Inputs:
    """Run HopSkipJump from given points with at most `passes` queries."""
    return HopSkipJump(queries=passes).started(model, batch, threat, starts, rng=rng)


def no_search(model: Model, batch: Batch, threat: ThreatModel, passes: int, rng: Draws) -> tuple[Inputs, int]:
    """Return the inputs unchanged."""
    return batch.x, 0


LABELS = Method("labels", "labels", no_search, 30, norms=(Linf, L2))
"""the search with labels only, which is run last and starts from what the others reached"""


def starts(
    batch: Batch, best: Inputs, images: Tensor, predicted: Tensor, threat: ThreatModel
) -> tuple[Inputs, ...]:
    """Return the points from which a search with labels only starts: twice and four times the best change of each
    example so far, and the nearest other images of the class that the attack needs.

    `images` (m, *features) are the images to choose from, and `predicted` (m) their classes as the model predicts them.
    """
    points = [batch.x + factor * (best - batch.x) for factor in _BEYOND]
    distances = torch.stack(
        [threat.constraint.distance(image.expand_as(batch.x), batch.x) for image in images], dim=1
    )
    wanted = predicted != batch.y[:, None] if batch.target is None else predicted == batch.target[:, None]
    distances = distances.masked_fill(~wanted, torch.inf)
    for distance, row in zip(*(v.unbind(1) for v in distances.sort(stable=True, dim=1)), strict=True):
        if len(points) >= len(_BEYOND) + _NEAREST or not distance.isfinite().any():
            break
        # an example without another image keeps its clean input, which costs one query
        points.append(torch.where(spread(distance.isfinite(), batch.x), images[row], batch.x))
    return tuple(points)
