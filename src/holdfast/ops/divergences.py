"""How far an attacked prediction is from the clean one, per example: what recipes keep small."""

import torch.nn.functional as F
from torch import Tensor

from holdfast.core.types import Logits, PerExample


def kullback_leibler(logits: Logits, clean: Logits) -> PerExample:
    """Kullback-Leibler divergence of the attacked prediction from the clean one, in nats."""
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)


def squared_error(logits: Logits, clean: Logits) -> PerExample:
    """Squared Euclidean distance of the two predictions (Pang et al., SCORE, ICML 2022, arXiv:2202.10103)."""
    return (logits.softmax(1) - clean.softmax(1)).square().sum(1)


def weighted_gaps(logits: Logits, clean: Logits, weight: Tensor) -> PerExample:
    """A quarter of the squared differences of all gaps between logits, each pair of classes with its weight.

    The part of the Kullback-Leibler divergence that holds the logits together (Cui et al., "Decoupled Kullback-Leibler
    Divergence Loss", NeurIPS 2024, arXiv:2305.13948). `weight` (n, classes) is of one class; a pair has the product.

    With w the weights and d the difference of the logits, the double sum is 2 (w d² Σw - (w d)²): no pair is formed.
    """
    apart = logits - clean
    total, mean, square = weight.sum(1), (weight * apart).sum(1), (weight * apart.square()).sum(1)
    return 0.5 * (square * total - mean.square())
