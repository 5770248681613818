"""APGD (auto-PGD): projected gradient descent that chooses its own step sizes. Its targeted version is APGD-T.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, arXiv:2003.01690; for L1: Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks", ICML 2021,
arXiv:2103.01208.
Differs from the papers: an example is dropped once it is broken, targets are ranked once by the clean logits, and the
first checkpoint counts the first step as a rise only if it raised the loss.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from holdfast.attacks.parts.ascent import Climb, surface
from holdfast.attacks.parts.losses import Best, Loss, aims, cross_entropy, expect_eps
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Fraction, Inputs, Labels, PerExample, Restarts, Steps

# stages before the one at eps: radius in multiples of eps, share of the steps
_STAGES = ((3.0, 0.3), (2.0, 0.3))


@dataclass(frozen=True)
class APGD:
    """Projected gradient ascent with momentum, whose step size is halved when the loss stops increasing."""

    loss: Loss = cross_entropy
    """loss that is maximised: `cross_entropy`, `dlr`, `margin_loss`, `probability_margin`"""
    steps: Steps = 100
    """number of gradient steps of one restart"""
    restarts: Restarts = 1
    """number of random starts for each target; each is run on the examples that survive the previous starts"""
    targets: Count = 0
    """number of wrong classes that are targeted in turn, likeliest first; 0 for an untargeted attack"""
    rho: Fraction = 0.75
    """fraction of the steps since the last check that must raise the loss; if fewer do, the step size is halved"""
    shrink: bool = False
    """whether to start in balls of radius 3 and 2 eps (0.3 of the steps each) before the ball itself, as in the L1
    paper"""
    draws: Steps = 1
    """number of forward passes over which a gradient is averaged, for a randomised model"""
    sure: Fraction = 0.5
    """an example counts as broken if more than this fraction of these forward passes misclassifies it"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        best = Best(batch)
        for rank, aim in enumerate(aims(model, batch, self.targets)):
            for restart in range(self.restarts):
                rows = best.surviving
                if not len(rows):
                    return best.x
                remaining, targets = batch.take(rows), None if aim is None else aim[rows]
                result = self._run(
                    model, remaining, targets, constraint, rng.at("target", rank, "restart", restart)
                )
                best.offer(remaining, *result)
        return best.x

    def _run(
        self, model: Model, batch: Batch, aim: Labels | None, constraint: Constraint, rng: Draws
    ) -> tuple[Inputs, PerExample]:
        stages = _STAGES if self.shrink else ()
        balls = [constraint.resized(factor * constraint.eps) for factor, _ in stages]
        climb = Climb(self.loss, self.steps, self.rho, self.draws, self.sure, fresh=not stages)
        x, steps = surface(batch, [*balls, constraint][0], model.bounds, rng), self.steps
        for ball, (_, share) in zip(balls, stages, strict=True):
            stage_steps = int(share * self.steps)
            x = replace(climb, steps=stage_steps).highest(
                model, batch, aim, ball.project(x, batch.x, model.bounds), ball
            )
            steps -= stage_steps
        x = constraint.project(x, batch.x, model.bounds)
        return replace(climb, steps=steps)(model, batch, aim, x, constraint)
