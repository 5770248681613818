"""Confident learning: label errors, from the probabilities of networks that were not trained on the example.

Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", JAIR 70, 2021,
arXiv:1911.00068, with the rule "prune by noise rate".

Differs from the paper: an example is a suspect only if its label is not the predicted class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from holdfast.core.types import Labels, Logits, Mask, PerExample


@dataclass(frozen=True)
class LabelScores:
    """Scores of the labels of examples (n)."""

    loss: PerExample
    """cross-entropy of the label, which is larger for more suspect labels"""
    predicted: Labels
    suspect: Mask
    """whether the label is likely to be wrong"""


def label_scores(logits: Logits, y: Labels) -> LabelScores:
    """Return the scores of the labels `y` (n) from out-of-sample logits (n, classes)."""
    loss, predicted = cross_entropy(logits, y, reduction="none"), logits.argmax(1)
    suspect = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    probabilities = logits.softmax(1)
    errors = _label_errors(probabilities, y)
    for label, other in errors.nonzero().tolist():
        rows = (y == label).nonzero()[:, 0]
        margin = probabilities[rows, other] - probabilities[rows, label]
        suspect[rows[margin.argsort(descending=True, stable=True)[: int(errors[label, other])]]] = True
    return LabelScores(loss, predicted, suspect & (predicted != y))


def _label_errors(probabilities: Tensor, y: Labels) -> Tensor:
    """The estimated number of examples with each label (rows) whose true class is another one (columns), from the
    confident joint.
    """
    classes = probabilities.shape[1]
    own = probabilities.gather(1, y[:, None])[:, 0]
    counts = torch.bincount(y, minlength=classes)
    mean_confidence = (
        torch.bincount(y, weights=own, minlength=classes) / counts
    )  # NaN for a class without examples
    above = probabilities >= mean_confidence - 1e-12  # equal confidences have a mean that is rounded
    confident = above.any(1)
    likely = torch.where(above, probabilities, -1.0).argmax(1)
    pairs = (y * classes + likely)[confident]
    joint = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    scaled = joint / joint.sum(1, keepdim=True).clamp(min=1) * counts[:, None]
    return (scaled - scaled.diag().diag()).round().long()
