"""Transfer attacks of a surrogate-only attacker: adversarial examples are computed on models of the attacker, and the
target is never queried.

Which attack transfers best depends on the networks, so the attacker uses several, and the best counts: momentum
(MI-FGSM, Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv:1710.06081); 50 steps on the
margin (Madry et al., ICLR 2018, arXiv:1706.06083); momentum with resized images and gradients corrected by those of
neighbours (MI-DI-VMI; `attacks.Transfer` names the papers); and momentum on noisy copies of the weights, after
Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (SWAG), NeurIPS 2019, arXiv:1902.02476,
whose samples around a network transfer better than the network itself (arXiv:2011.05074). No attack stops early, and
none queries the target: the examples are computed once and can be tested on any model.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch

from holdfast.attacks.parts.ascent import ascend, cosine
from holdfast.attacks.parts.fast_networks import Ensemble
from holdfast.attacks.parts.losses import Loss, expect_eps, margin_loss
from holdfast.attacks.protocol import Attack
from holdfast.attacks.transfer import Transfer
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps

M = TypeVar("M", bound=torch.nn.Module)
_AT_ONCE = 250  # examples in one batch


@torch.no_grad()
def noisy(source: M, spread: float, rng: Draws) -> M:
    """Return a copy of a network with Gaussian noise added to its weights.

    The standard deviation is `spread` times the root mean square of each tensor.
    """
    copied = deepcopy(source)
    for name, value in copied.named_parameters():
        if value.is_floating_point():
            noise = rng.at(name).normal(torch.arange(value.numel())).view(value.shape).to(value)
            value.add_(noise, alpha=spread * float(value.square().mean().sqrt()))
    return copied


@dataclass(frozen=True)
class ToTheEnd:
    """PGD on the surrogates that performs all its steps, even if an example is adversarial earlier, because such
    examples transfer better.
    """

    steps: Steps = 50
    """number of steps, each of which uses the gradients of all surrogates"""
    reach: Positive = 20.0
    """path length, in multiples of eps"""
    loss: Loss = margin_loss
    """loss that is maximised"""

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
    """A transfer attack on copies of the surrogates with random noise in their weights.

    Differs from SWAG: an attacker with one parameter set has no training trajectory from which to estimate the noise,
    so its size is relative to each tensor.
    """

    attack: Transfer = field(default_factory=lambda: Transfer(neighbours=0))
    """attack that is run on the mean of the copies"""
    copies: Steps = 4
    """number of copies, made of each surrogate in turn; there is at least one copy of each surrogate"""
    spread: Positive = 0.1
    """size of the noise, as a fraction of the root mean square of each tensor"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        sources, n = threat.surrogates, max(self.copies, len(threat.surrogates))
        copies = tuple(self._moved(sources[k % len(sources)], rng.at("copy", k)) for k in range(n))
        return self.attack(model, batch, replace(threat, surrogates=copies), rng=rng)

    def _moved(self, source: Model, rng: Draws) -> Model:
        """A noisy copy; a model without weights, such as a remote one, is returned unchanged."""
        return noisy(source, self.spread, rng) if isinstance(source, torch.nn.Module) else source


ATTACKS: Mapping[str, Attack] = {
    "MI": Transfer(neighbours=0),
    "PGD-50": ToTheEnd(),
    "MI-DI-VMI": Transfer(diversity=0.5),
    "SWAG": Sampled(),
}
"""default attacks, by their names in the literature"""


@dataclass(frozen=True)
class TransferAttacker:
    """An attacker that computes adversarial examples for a target by several transfer attacks on one or more models of
    its own.
    """

    attacks: Mapping[str, Attack] = field(default_factory=lambda: ATTACKS)
    """attacks by name; each computes its examples on the surrogates of the threat model only"""

    def crafted(
        self, sources: Sequence[Classifier], batch: Batch, threat: ThreatModel, *, rng: Draws
    ) -> dict[str, Inputs]:
        """Return the adversarial examples of each transfer attack on the models `sources`, by name. With several
        models, each attack uses their mean.

        Each example is computed independently of the others. Cost for each example and source: about 160 gradients; the
        gradients of noisy copies are divided among the sources. Raises `UsageError` if there are no sources.
        """
        if not sources:
            raise UsageError("an attacker without models cannot compute examples; give at least one model")
        threat_of_attacker = replace(threat, surrogates=tuple(sources), queries=None)
        return {
            name: torch.cat(
                [
                    attack(sources[0], part, threat_of_attacker, rng=rng.at(name)).detach()
                    for part in batch.split(_AT_ONCE)
                ]
            )
            for name, attack in self.attacks.items()
        }
