"""IBP: certified training on interval bounds of the network, which hold for all inputs of the ball.

Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
arXiv:1810.12715, with the initialisation and the regularisation of Shi et al., "Fast Certified Robust Training with
Short Warmup", NeurIPS 2021, arXiv:2103.17268. Differs from the papers: eps grows linearly, the learning rate follows
one cycle, the weights are averaged, and batch norm uses its running statistics in the bounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.graph import Graph
from holdfast.certifiers.training import (
    Initialisation,
    box,
    initialised,
    live_graph,
    margin_bounds,
    refuse_without_bounds,
    regularisation,
    robust_cross_entropy,
    warmed,
)
from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, NonNegative
from holdfast.ops.fit import Training
from holdfast.ops.learner import Learner, clean_inputs, trained


@dataclass(frozen=True)
class IBPTraining:
    """Minimises an upper bound of the loss over all inputs of the ball, computed by interval bound propagation."""

    clean: Fraction = 0.0
    """weight of the loss on clean inputs after the warm-up, during which it falls from 1; the bound has the rest"""
    regularisation: NonNegative = 0.5
    """weight, at the start of the warm-up, of a penalty on wide bounds and on unbalanced activations; it falls to 0"""
    initialisation: Initialisation = "given"
    """weights at the start: those of the given model, or random ones with tight bounds, for networks with batch norm"""
    training: Training = field(default_factory=lambda: Training(lr=2e-3, weight_decay=0.0, warmup=0.3))

    def __call__(
        self,
        model: Classifier,
        data: Batch,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        refuse_without_bounds(threat, self.training)
        start = initialised(model, self.initialisation, rng)
        loss = partial(self.loss, live_graph(data.x[:8]))
        return trained(clean_inputs, loss, start, data, threat, self.training, rng=rng, after=after)

    def loss(
        self, graph_of: Callable[[Classifier], Graph], learner: Learner, batch: Batch, x_adv: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of examples that the bounds prove to be classified correctly.

        The loss is the weighted mean of the clean cross-entropy and its upper bound over the ball, plus the
        regularisation.
        """
        warm = warmed(learner, self.training.overshoot)
        graph = graph_of(learner.net)
        region = box(batch.x, learner.threat.constraint.eps, learner.net.bounds)
        bounds = graph.intervals(region, rounded=False)
        margins = margin_bounds(graph, bounds, batch.y)
        clean = 1 - (1 - self.clean) * warm
        with torch.set_grad_enabled(
            clean > 0
        ):  # a pass without a weight still updates the statistics of batch norm
            logits = learner.net(batch.x)
        loss = clean * F.cross_entropy(logits, batch.y) + (1 - clean) * robust_cross_entropy(margins).mean()
        if self.regularisation and warm < 1:
            loss = loss + self.regularisation * (1 - warm) * regularisation(graph, bounds)
        return loss, (margins > 0).all(1).sum()
