"""Losses that attacks maximise, with one number for each example. A loss is larger for inputs that are closer to being
misclassified or to the target class.

The batch determines the goal: away from `batch.y`, or towards `batch.target` if there is one.
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
    "scaled_cross_entropy",
]

Loss = Callable[[Logits, Batch], PerExample]
"""function `loss(logits, batch)` that returns one number for each example, which attacks maximise"""

_TINY = 1e-12  # as in the authors' code of DLR
_DIFFERENCE = 4.0  # between the two largest scaled logits: 1, 2 and 4 were tried with PGD on eight networks


def cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of the label for each example. With targets, return minus the cross-entropy of the
    target class.
    """
    if batch.target is None:
        return F.cross_entropy(logits, batch.y, reduction="none")
    return -F.cross_entropy(logits, batch.target, reduction="none")


def margin_loss(logits: Logits, batch: Batch) -> PerExample:
    """Return minus the margin of each example, as a loss for attacks (Carlini & Wagner, "Towards evaluating the
    robustness of neural networks", 2017, f6).
    """
    return -margin(logits, batch)


def probability_margin(logits: Logits, batch: Batch) -> PerExample:
    """Return minus the margin between class probabilities instead of logits, as a bounded loss for attacks (Ma et al.,
    arXiv:2411.15210).

    Large logits therefore do not dominate.
    """
    return -margin(logits.softmax(1), batch)


def scaled_cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of logits that are scaled so that the two largest ones of each example differ by 4, as a
    loss for attacks (Yu & Xu, "Efficient Loss Function by Minimizing the Detrimental Effect of Floating-Point Errors
    on Gradient-Based Attacks", CVPR 2023).

    The gradient does not vanish where the softmax of a confident model saturates, and unlike that of the margin it
    depends on all classes. The factor is a constant for the gradient. Differs from the paper: the difference is 4
    instead of 1, which breaks more examples of undefended networks.
    """
    highest = logits.detach().topk(2, dim=1).values
    factor = _DIFFERENCE / (highest[:, 0] - highest[:, 1]).clamp_min(_TINY)
    return cross_entropy(logits * factor[:, None], batch)


def dlr(logits: Logits, batch: Batch) -> PerExample:
    """Return the difference of logits ratio (DLR) of each example, a loss for attacks that does not depend on the scale
    of the logits (Croce & Hein, ICML 2020, arXiv:2003.01690).

    It does not depend on the scale of the logits. It needs three classes, or four with targets; with fewer classes it
    is minus the margin, which then ranks points equally.
    """
    classes = logits.shape[1]
    if classes < (3 if batch.target is None else 4):
        return margin_loss(logits, batch)
    ordered, order = logits.sort(dim=1)
    label_logit = logits.gather(1, batch.y[:, None])[:, 0]
    if batch.target is None:
        first = order[:, -1] == batch.y
        best_other = torch.where(first, ordered[:, -2], ordered[:, -1])
        return -(label_logit - best_other) / (ordered[:, -1] - ordered[:, -3] + _TINY)
    target_logit = logits.gather(1, batch.target[:, None])[:, 0]
    return -(label_logit - target_logit) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + _TINY)


def likeliest(logits: Logits, y: Labels, k: int) -> Tensor:
    """Return the `k` wrong classes with the largest logits for each example, largest first, int64 (n, min(k, classes -
    1)).
    """
    other_logits = logits.scatter(1, y[:, None], -torch.inf)
    # stable, so that ties are in the order of the classes on every device
    return other_logits.argsort(dim=1, descending=True, stable=True)[:, : min(k, logits.shape[1] - 1)]


def aims(model: Model, batch: Batch, k: int) -> list[Labels | None]:
    """Return the target classes for the runs of a targeted attack, one run after another: the wrong classes with the
    largest logits, in order. The cost is one forward pass.

    The list is [None], for the goal of the batch itself, if k is 0, if the batch has targets, or if it is empty.
    """
    if not k or batch.target is not None or not len(batch):
        return [None]
    with torch.no_grad():
        return list(likeliest(model(batch.x, batch.ids), batch.y, k).unbind(1))
