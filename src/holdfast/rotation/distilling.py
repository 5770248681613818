"""Distilled examples: inputs that look like one training input and are another one to a set that leaked.

Yang et al., "DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles", NeurIPS 2020,
arXiv:2009.14720. An input is moved, inside a ball around it, to where a network has the features of another; what is
trained with the label that it looks to have does not rest on the features that mislead that network. Differs from the
paper: one network is trained against others that leaked and stay as they are, in place of all of an ensemble against
each other in turn; the features are those that the last layer is given, and not those of a layer that is drawn anew for
each epoch; paths begin anywhere in the ball and keep no momentum; the examples are made once, and their loss stands
beside that of a recipe, where the paper has no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Logits, PerExample, Positive, Steps
from holdfast.ops.ascent import ascend
from holdfast.ops.features import watched
from holdfast.rotation.immunising import ball, shared_out


@dataclass(frozen=True)
class Distilled:
    """How examples with the features of others are made of training inputs, for `Immunise(crafting=Distilled())`."""

    examples: Steps = 6_000
    """training inputs, at most; each goes to one of the exposed sets"""
    overshoot: Positive = 1.25
    """size of the ball, in multiples of eps"""
    steps: Steps = 6
    """gradient steps towards the features of the other input"""
    reach: Positive = 2.0
    """path length, in multiples of that size"""

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """The changed inputs (n, *features) with the labels they had; the other input of each is any of `data`.

        The features are the input of the last linear layer or convolution, however many dimensions it has; of a network
        that shows none, the logits. Cost: `steps` forwards and backwards of each example, and a forward of the other.
        Raises `UsageError` where no set is exposed, and where the threat has no eps.
        """
        made = partial(self._made, data=data, constraint=ball(threat, self.overshoot, self), rng=rng)
        return shared_out(exposed, data, self.examples, made, rng.at("inputs"))

    def _made(
        self, model: Classifier, few: Batch, *, data: Batch, constraint: Constraint, rng: Draws
    ) -> Batch:
        others = data.take(rng.at("others").integers(few.ids, len(data)))
        with watched(model) as features:
            with torch.no_grad():
                wanted = features.or_logits(model(others.x))

            def nearness(logits: Logits, _: Batch) -> PerExample:
                return -_squared(features.or_logits(logits) - wanted)

            x_adv, _ = ascend(
                model,
                few,
                constraint.sample(few, model.bounds, rng.at("start")),
                nearness,
                constraint,
                steps=self.steps,
                step_size=self.reach * constraint.eps / self.steps,
                keep="last",
            )
        return few.at(x_adv)


def _squared(change: Tensor) -> PerExample:
    length: PerExample = change.square().flatten(1).sum(1)
    return length
