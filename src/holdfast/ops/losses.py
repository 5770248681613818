"""Losses that attacks climb: one number an example, rising as the attack gets closer to its goal.

Each knows the goal from the batch: away from `batch.y`, or towards `batch.target` where there is one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.meter import margin
from holdfast.core.model import Model
from holdfast.core.types import Labels, Logits, PerExample

__all__ = [
    "Loss",
    "aims",
    "cross_entropy",
    "dlr",
    "likeliest",
    "margin",
    "margin_loss",
    "probability_margin",
]

Loss = Callable[[Logits, Batch], PerExample]
"""`loss(logits, batch)`: per example, to be climbed."""

_TINY = 1e-12


def cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Cross-entropy of the label; with targets, minus that of the target."""
    if batch.target is None:
        return F.cross_entropy(logits, batch.y, reduction="none")
    return -F.cross_entropy(logits, batch.target, reduction="none")


def margin_loss(logits: Logits, batch: Batch) -> PerExample:
    """Minus the margin (Carlini & Wagner, "Towards evaluating the robustness of neural networks", 2017, f6)."""
    return -margin(logits, batch)


def probability_margin(logits: Logits, batch: Batch) -> PerExample:
    """Minus the margin between probabilities (Ma et al., arXiv:2411.15210): bounded, so no logit scale dominates."""
    return -margin(logits.softmax(1), batch)


def dlr(logits: Logits, batch: Batch) -> PerExample:
    """Difference of logits ratio (Croce & Hein, "Reliable evaluation … AutoAttack", ICML 2020, arXiv:2003.01690).

    Free of the logits' scale. Needs three classes, with targets four; below that it is the margin, which then ranks
    the same points.
    """
    classes = logits.shape[1]
    if classes < (3 if batch.target is None else 4):
        return margin_loss(logits, batch)
    ordered, order = logits.sort(dim=1)
    own = logits.gather(1, batch.y[:, None])[:, 0]
    if batch.target is None:
        first = order[:, -1] == batch.y
        other = torch.where(first, ordered[:, -2], ordered[:, -1])
        return -(own - other) / (ordered[:, -1] - ordered[:, -3] + _TINY)
    aimed = logits.gather(1, batch.target[:, None])[:, 0]
    return -(own - aimed) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + _TINY)


def likeliest(logits: Logits, y: Labels, k: int) -> Tensor:
    """The (up to) k wrong classes with the largest logits, likeliest first: int64 (n, min(k, classes - 1))."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, : min(k, logits.shape[1] - 1)]


def aims(model: Model, batch: Batch, k: int) -> list[Labels | None]:
    """What the runs of a targeted form go for: the `likeliest` wrong classes in turn; one forward.

    None is the goal itself, where k is 0, the batch has targets of its own, or there is no example.
    """
    if not k or batch.target is not None or not len(batch):
        return [None]
    with torch.no_grad():
        return list(likeliest(model(batch.x, batch.ids), batch.y, k).unbind(1))
