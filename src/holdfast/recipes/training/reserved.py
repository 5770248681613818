"""Training examples that a recipe reserves for its own decisions, and the robust accuracy on them."""

import torch

from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.recipes.training.learner import Learner

MOST, EVERY = 256, 10
"""Largest number of reserved examples; at most one training example in `EVERY` is reserved."""
_STEPS, _REACH = 5, 2.5  # of the attack that measures robust accuracy


def reserved(data: TrainingData, rng: Draws) -> tuple[TrainingData, Batch]:
    """Return the training examples without the reserved ones, and the reserved ones, which are drawn at random.

    Fewer than `EVERY` examples, on which updates are only timed, are returned as both.
    """
    rows = rng.at("reserved").bits(data.ids).argsort()
    if len(data) < EVERY:
        return data, data.take(rows)
    chosen = rows[data.y[rows] != UNLABELLED][: min(MOST, len(data) // EVERY)]
    is_reserved = torch.zeros(len(data), dtype=torch.bool, device=data.ids.device)
    is_reserved[chosen] = True
    return data.subset(~is_reserved), data.take(is_reserved)


def robust_share(learner: Learner, examples: Batch) -> float:
    """Return the share of examples that the network classifies correctly after a short attack inside the learner's
    ball, which is the same in each call.
    """
    x_adv = learner.worst(examples, Draws(0).at("reserved"), steps=_STEPS, reach=_REACH)
    with torch.no_grad():
        return float((learner.frozen(x_adv).argmax(1) == examples.y).double().mean())
