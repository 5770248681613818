"""FeatureTransfer: attacks the part of a model before the operations that have no useful gradient.

The gradient of such operations is replaced: by that of a smooth function (`holdfast.core.surrogate_gradients`), by that
of a small network that is trained on the model's answers (a head), or the features before them are moved to those of an
example of another class. Sources: Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security",
ICML 2018, arXiv:1802.00420, for the replacement; Tramèr et al., "On adaptive attacks to adversarial example defenses",
NeurIPS 2020, arXiv:2002.08347, for attacks on features; Sabour et al., "Adversarial manipulation of deep
representations", ICLR 2016, arXiv:1511.05122, and Inkawhich et al., "Feature space perturbations yield more
transferable adversarial examples", CVPR 2019, for moving them to another example. Differs from the papers: the
operations are found in a forward pass, so that the model is not rewritten, and the targets are the nearest examples of
other classes.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from holdfast.attacks.parts.boundaries import CountedQueries
from holdfast.attacks.parts.feature_search import FeatureSearch, features_of
from holdfast.attacks.parts.losses import expect_eps, expect_norm
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps

_STEPS = (8, 30)
"""smallest and largest number of gradient steps of one run"""
_LOOKING = 4
"""most passes of the inspection of the model"""
_LEAST = 20
"""smallest number of passes with which the attack begins: the inspection, the clean inputs, and some steps"""
_RUNS = 6
"""number of runs for which there are passes if they are few; this shortens the runs"""


@dataclass(frozen=True)
class FeatureTransfer:
    """Attacks the features of a model before the operations without a useful gradient, such as arg max or rounding."""

    passes: Steps = 2000
    """largest number of forward and backward passes for each example"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        expect_eps(threat.constraint, self)
        norm = expect_norm(threat.constraint, self, Linf, L2, L1)
        features = features_of(model, batch) if self.passes >= _LEAST else None
        if features is None:
            return batch.x.clone()
        queries = CountedQueries(model, batch, norm, self.passes - _LOOKING)
        steps = max(_STEPS[0], min(_STEPS[1], self.passes // (2 * _RUNS)))
        with suppress(BudgetSpent):  # the points that were queried are results
            queries.begin()
            FeatureSearch(queries, features, batch, steps, rng).rounds()
        return queries.best.x
