"""PGD (projected gradient descent): gradient steps inside the ball from random starts.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083.
Differs from the paper: it raises the cross-entropy of scaled logits, step sizes follow a cosine from eps to zero, and
the best iterate of each example is returned instead of the last. The paper's own settings are
`loss=cross_entropy, reach=2.5, schedule=flat`.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.attacks.parts.ascent import Schedule, ascend, cosine
from holdfast.attacks.parts.losses import Best, Loss, expect_eps, margin_loss, scaled_cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Restarts, Steps


@dataclass(frozen=True)
class PGD:
    """Maximises a loss by projected gradient steps from random starts."""

    steps: Steps = 40
    """number of gradient steps of one restart"""
    reach: Positive | None = None
    """path length of one restart, in multiples of eps; half the number of steps if it is not given"""
    restarts: Restarts = 1
    """number of random starts; each is run on the examples that survive the previous starts"""
    loss: Loss = scaled_cross_entropy
    """loss that is maximised: `scaled_cross_entropy`, `margin_loss`, `cross_entropy`, `dlr`, `probability_margin`"""
    schedule: Schedule = cosine
    """schedule of the step size: `cosine` from twice the mean step size to zero, or `flat`"""
    drop: bool = True
    """whether an example is no longer attacked once it is broken"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_eps(threat.constraint, self), Best(batch)
        step_size = 0.5 if self.reach is None else self.reach / self.steps
        for restart in range(self.restarts):
            remaining = batch.take(best.surviving)
            if not len(remaining):
                break
            result = ascend(
                model,
                remaining,
                constraint.sample(remaining, model.bounds, rng.at("restart", restart)),
                self.loss,
                constraint,
                steps=self.steps,
                step_size=step_size * constraint.eps,
                schedule=self.schedule,
                drop=self.drop,
            )
            best.offer(remaining, *result)
        return best.x


def margin_pgd(*, steps: int = 40, restarts: int = 1) -> PGD:
    """Return PGD on the margin along a path of 20 eps: the settings of PGD in suites, doubts, adaptive attacks and the
    evaluation of checkpoints, whose records and thresholds were measured with it.
    """
    return PGD(steps=steps, reach=20.0, restarts=restarts, loss=margin_loss)
