"""Terms of losses: differences between predictions, and immunity against stolen parameter sets."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.types import Logits, PerExample, Positive, Steps


def kullback_leibler(logits: Logits, clean: Logits) -> PerExample:
    """Return the Kullback-Leibler divergence between clean and attacked prediction, KL(clean || attacked), of each
    example in nats.
    """
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)


def squared_error(logits: Logits, clean: Logits) -> PerExample:
    """Return the squared Euclidean distance between the attacked and the clean class probabilities of each example
    (Pang et al., SCORE, ICML 2022, arXiv:2202.10103).
    """
    return (logits.softmax(1) - clean.softmax(1)).square().sum(1)


def weighted_gaps(logits: Logits, clean: Logits, weight: Tensor) -> PerExample:
    """Return a quarter of the weighted sum of squared changes of logit gaps between clean and attacked input, over all
    pairs of classes. A gap is the difference of two logits.

    This is the part of the Kullback-Leibler divergence that aligns the logits (Cui et al., "Decoupled Kullback-Leibler
    Divergence Loss", NeurIPS 2024, arXiv:2305.13948). `weight` (n, classes) is the weight of a class; the weight of a
    pair is the product of both.

    With w the weights and d the difference of the logits, the double sum is 2 (w d² Σw - (w d)²), so no pairs are
    formed.
    """
    difference = logits - clean
    total, mean, square = weight.sum(1), (weight * difference).sum(1), (weight * difference.square()).sum(1)
    return 0.5 * (square * total - mean.square())


@dataclass(frozen=True, eq=False)
class Immunity:
    """Adversarial examples that were computed on stolen parameter sets, with the weight of their loss in a training."""

    examples: Batch = field(repr=False)
    """adversarial examples computed on stolen parameter sets, with their original labels"""
    weight: Positive = 0.5
    """weight of the loss of these examples, relative to that of the recipe"""
    batch: Steps = 64
    """number of these examples in each update"""

    def __call__(self, model: nn.Module, rng: Draws) -> Tensor:
        """Return the weighted mean loss of `batch` random examples. Cost: one forward of them."""
        slots = torch.arange(self.batch, device=self.examples.x.device)
        chosen = self.examples.take(rng.at("immunity").integers(slots, len(self.examples)))
        return self.weight * F.cross_entropy(model(chosen.x), chosen.y)
