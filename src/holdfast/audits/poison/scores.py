"""Scores of training examples: label errors by confident learning, and scores of features."""

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


DIRECTIONS = 10
"""number of singular directions of a class"""
FENCE = 3.0
"""an energy is unusual if its logarithm exceeds the median of its class by this many standard deviations, which are
1.4826 times the median absolute deviation"""
SMALLER_SHARE = 0.35
"""largest share of a class of a suspect cluster, as in the paper"""
MIN_SILHOUETTE = 0.5
"""smallest silhouette of suspect clusters. On MNIST with a network of two convolutions, classes with manipulated
examples had 0.63 and others at most 0.42"""
_MOST_ITERATIONS = 100  # of 2-means, which needs about ten


@dataclass(frozen=True)
class FeatureScores:
    """Scores of the examples of one class (n), of which larger ones are more suspect."""

    energy: PerExample
    """squared length of the projection on the top singular directions"""
    clustering: PerExample
    """how much nearer an example is to the centre of the smaller cluster than to that of the larger one"""
    unusual: Mask
    """whether the energy is beyond the fence"""
    clustered: Mask
    """whether an example is in the smaller cluster, if this is small and well separated"""
    share: float
    """share of the smaller cluster"""
    silhouette: float
    """mean silhouette of the clusters, with distances to their centres"""


def feature_scores(features: Tensor, trusted_label: Mask) -> FeatureScores:
    """Return the scores of the examples of one class from their features (n, d). Directions and clusters are those of
    the examples with `trusted_label`; without two of these, all scores are 0.
    """
    n = len(features)
    if int(trusted_label.sum()) < 2:
        zeros, none = features.new_zeros(n), torch.zeros(n, dtype=torch.bool, device=features.device)
        return FeatureScores(zeros, zeros, none, none, 0.0, 0.0)
    centred = features - features[trusted_label].mean(0)
    points = centred @ _directions(centred[trusted_label])
    energy = points.square().sum(1)
    logs = energy.clamp(min=torch.finfo(energy.dtype).tiny).log()
    reference = logs[trusted_label]
    deviation = 1.4826 * (reference - reference.median()).abs().median()
    unusual = logs > reference.median() + FENCE * deviation
    smaller, larger = _centres(points[trusted_label])
    to_smaller, to_larger = (points - smaller).norm(dim=1), (points - larger).norm(dim=1)
    inside = to_smaller < to_larger
    widest = torch.maximum(to_smaller, to_larger)
    silhouettes = (to_smaller - to_larger).abs() / widest.clamp(min=torch.finfo(widest.dtype).tiny)
    share, silhouette = (float(values[trusted_label].double().mean()) for values in (inside, silhouettes))
    suspect = share <= SMALLER_SHARE and silhouette >= MIN_SILHOUETTE
    clustered = inside if suspect else torch.zeros_like(inside)
    return FeatureScores(energy, to_larger - to_smaller, unusual, clustered, share, silhouette)


def _directions(centred: Tensor) -> Tensor:
    """The top singular directions (d, k) of centred features (n, d), from their Gram matrix."""
    vectors: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return vectors[:, -DIRECTIONS:]


def _centres(points: Tensor) -> tuple[Tensor, Tensor]:
    """The centres of the smaller and the larger cluster of points (n, k), by 2-means.

    It starts from the two halves of each axis, and the result of the smallest inertia is returned. Without two
    clusters both centres are the mean.
    """
    best, result = float("inf"), (points.mean(0), points.mean(0))
    for axis in range(points.shape[1]):
        second = points[:, axis] > 0
        for _ in range(_MOST_ITERATIONS):
            if bool(second.all()) or not bool(second.any()):
                break
            centres = points[~second].mean(0), points[second].mean(0)
            distances = torch.stack([(points - centre).square().sum(1) for centre in centres])
            inertia = float(distances.min(0).values.sum())
            if inertia < best:
                best, is_first_smaller = inertia, int(second.sum()) * 2 > len(second)
                result = centres if is_first_smaller else centres[::-1]
            moved = distances[1] < distances[0]
            if torch.equal(moved, second):
                break
            second = moved
    return result
