"""Distilled examples: inputs that look like one training input, but for which a stolen set computes the features of
another training input.

Yang et al., "DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles", NeurIPS 2020,
arXiv:2009.14720. An input is moved, inside a ball around it, to where a network computes the features of another
input. A model that is trained on such inputs with the original label does not rely on the features that mislead that
network. Differs from the paper: one network is trained against stolen sets that do not change, instead of all
members of an ensemble against each other in turn; the features are the inputs of the last layer, not of a layer that
is sampled in each epoch; paths start at random points of the ball and use no momentum; the examples are computed
once, and their loss is added to that of a recipe, while the paper has no other loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Logits, PerExample, Positive, Steps
from holdfast.recipes.training.learner import climbed
from holdfast.rotation.immunising import ball, shared_out


class Features:
    """Record of the features of a network, that is of the input of its last layer in the latest forward pass."""

    def __init__(self) -> None:
        self._rows = 0
        self._features: Tensor | None = None

    def or_logits(self, logits: Logits) -> Tensor:
        """Return the recorded features of the latest forward pass, with at least as many rows as the batch, or `logits`
        if none were recorded.
        """
        return logits if self._features is None else self._features

    def _begin(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._rows, self._features = len(inputs[0]), None

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # a layer that runs for single examples or for a part of the batch is left out
        if inputs and inputs[0].dim() > 1 and len(inputs[0]) >= self._rows:
            self._features = inputs[0]


@contextmanager
def watched(model: nn.Module) -> Iterator[Features]:
    """Context manager that records the features of a network: the input of the last linear layer or convolution that is
    called for a whole batch.

    Layers are recognised by their type; none is found in a network that was imported as one graph or program, or that
    stores its weights elsewhere. All hooks are removed on exit, also after an error.
    """
    features = Features()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
    hooks = [model.register_forward_pre_hook(features._begin, prepend=True)]
    hooks += [layer.register_forward_pre_hook(features._note) for layer in layers]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Distilled:
    """Settings of distilled examples for immunising. They look like one training input, but a stolen set computes for
    them the features of another training input.
    """

    examples: Steps = 6_000
    """largest number of training inputs; each is assigned to one of the stolen sets"""
    overshoot: Positive = 1.25
    """radius of the ball, in multiples of eps"""
    steps: Steps = 6
    """number of gradient steps towards the features of the other input"""
    reach: Positive = 2.0
    """path length, in multiples of that radius"""

    def __call__(
        self, exposed: Sequence[Classifier], data: Batch, threat: ThreatModel, *, rng: Draws
    ) -> Batch:
        """Return the changed inputs (n, *features) with their original labels.

        The other input, whose features are the goal, is a random example of `data`. The features are the input of the
        last linear layer or convolution, of any shape; for a network in which none is found, the logits. Cost for each
        example: `steps` forward and backward passes, and one forward pass of the other input. Raises `UsageError` if no
        stolen set is given, or if the threat model has no eps.
        """
        compute = partial(self._computed, data=data, constraint=ball(threat, self.overshoot, self), rng=rng)
        return shared_out(exposed, data, self.examples, compute, rng.at("inputs"))

    def _computed(
        self, model: Classifier, batch: Batch, *, data: Batch, constraint: Constraint, rng: Draws
    ) -> Batch:
        goals = data.take(rng.at("others").integers(batch.ids, len(data)))
        with watched(model) as features:
            with torch.no_grad():
                goal_features = features.or_logits(model(goals.x))

            def nearness(logits: Logits, _: Batch) -> PerExample:
                change = features.or_logits(logits) - goal_features
                return -change.square().flatten(1).sum(1)

            start = rng.at("start")
            x_adv = climbed(model, batch, constraint, start, nearness, steps=self.steps, reach=self.reach)
        return batch.at(x_adv)
