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
    # in float32, so that equal examples have equal losses, whichever instructions computed the last digits
    loss, predicted = cross_entropy(logits, y, reduction="none").float().double(), logits.argmax(1)
    suspect = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    probabilities = logits.softmax(1)
    for label, other, n in _label_errors(probabilities, y):
        rows = (y == label).nonzero()[:, 0]
        margin = probabilities[rows, other] - probabilities[rows, label]
        suspect[rows[margin.argsort(descending=True, stable=True)[:n]]] = True
    return LabelScores(loss, predicted, suspect & (predicted != y))


def _label_errors(probabilities: Tensor, y: Labels) -> list[tuple[int, int, int]]:
    """For pairs of a label and another class, the estimated number of examples with the label whose true class is the
    other one, from the confident joint.
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
    # only pairs that occur, as a table of all pairs of many classes would not fit into memory
    pairs, joint = torch.unique((y * classes + likely)[confident], return_counts=True)
    label, other = pairs // classes, pairs % classes
    of_label = torch.bincount(label, weights=joint.double(), minlength=classes)
    errors = (joint / of_label[label].clamp(min=1) * counts[label]).round().long()
    rows = torch.stack((label, other, errors), 1)[(label != other) & (errors > 0)]
    return [(a, b, n) for a, b, n in rows.tolist()]
