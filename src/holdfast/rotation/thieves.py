"""Thieves: what an attacker who holds some models makes of inputs, to turn a model that it has never asked.

Which of a thief's attacks carries best depends on the networks, so that it has several and counts by the best of them:
momentum (MI-FGSM, Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv:1710.06081); 50 steps on
the margin (Madry et al., ICLR 2018, arXiv:1706.06083); momentum with resized images and gradients corrected by those of
neighbours (MI-DI-VMI; `attacks.Transfer` names the papers); and momentum on noisy copies of the weights, after Maddox
et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (SWAG), NeurIPS 2019, arXiv:1902.02476, whose
samples around a network transfer better than it does (arXiv:2011.05074). None stops at success, and the target is never
asked: examples are made once, whomever they are then shown to.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch

from holdfast.attacks import Transfer
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps
from holdfast.ops.ascent import ascend, cosine
from holdfast.ops.ensemble import Ensemble
from holdfast.ops.losses import Loss, margin_loss
from holdfast.ops.norms import expect_eps

M = TypeVar("M", bound=torch.nn.Module)
_AT_ONCE = 250  # examples that are made together


@torch.no_grad()
def noisy(source: M, spread: float, rng: Draws) -> M:
    """A copy with noise in its weights, for each tensor a share of its own root mean square."""
    copied = deepcopy(source)
    for name, value in copied.named_parameters():
        if value.is_floating_point():
            noise = rng.at(name).normal(torch.arange(value.numel())).view(value.shape).to(value)
            value.add_(noise, alpha=spread * float(value.square().mean().sqrt()))
    return copied


@dataclass(frozen=True)
class ToTheEnd:
    """PGD on the surrogates that goes on to the end of its path, whatever they say on the way."""

    steps: Steps = 50
    """gradient steps, each of every surrogate"""
    reach: Positive = 20.0
    """path length, in multiples of eps"""
    loss: Loss = margin_loss
    """what is climbed"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        source = Ensemble(threat.surrogates, model.bounds)
        x_adv, _ = ascend(
            source,
            batch,
            constraint.sample(batch, model.bounds, rng.at("start")),
            self.loss,
            constraint,
            steps=self.steps,
            step_size=self.reach * constraint.eps / self.steps,
            schedule=cosine,
            keep="last",
        )
        return x_adv


@dataclass(frozen=True)
class Sampled:
    """Another attack, on copies of the surrogates whose weights were moved at random: a sample of their neighbours.

    Differs from SWAG: a thief of one set has no path of a training to take the spread from, so the noise of each tensor
    is a share of its own size.
    """

    attack: Transfer = field(default_factory=lambda: Transfer(neighbours=0))
    """what climbs their mean"""
    copies: Steps = 4
    """networks, the surrogates in turn; at least one of each surrogate"""
    spread: Positive = 0.1
    """size of the noise, as a share of the root mean square of each tensor"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        sources, n = threat.surrogates, max(self.copies, len(threat.surrogates))
        moved = tuple(self._moved(sources[k % len(sources)], rng.at("copy", k)) for k in range(n))
        return self.attack(model, batch, replace(threat, surrogates=moved), rng=rng)

    def _moved(self, source: Model, rng: Draws) -> Model:
        """A neighbour; of what has no weights, such as a remote model, itself."""
        return noisy(source, self.spread, rng) if isinstance(source, torch.nn.Module) else source


ATTACKS: Mapping[str, Attack] = {
    "MI": Transfer(neighbours=0),
    "PGD-50": ToTheEnd(),
    "MI-DI-VMI": Transfer(diversity=0.5),
    "SWAG": Sampled(),
}
"""What a thief tries, by the names of the field."""


@dataclass(frozen=True)
class Thief:
    """Who holds some models, and makes of inputs what should turn another."""

    attacks: Mapping[str, Attack] = field(default_factory=lambda: ATTACKS)
    """by name; each makes its examples on the surrogates of the threat model, and asks nothing else"""

    def crafted(
        self, sources: Sequence[Classifier], batch: Batch, threat: ThreatModel, *, rng: Draws
    ) -> dict[str, Inputs]:
        """What each attack makes of the inputs. Of several sources the mean counts; a row is made as it would be alone.

        Cost, for each example and source: 160 gradients or so, those of noisy copies shared out among the sources.
        """
        if not sources:
            raise UsageError(
                "a thief without models makes no examples; give those that it holds, one at least"
            )
        held = replace(threat, surrogates=tuple(sources), queries=None)
        return {
            name: torch.cat(
                [attack(sources[0], some, held, rng=rng.at(name)).detach() for some in batch.split(_AT_ONCE)]
            )
            for name, attack in self.attacks.items()
        }
