"""Scores of training examples by the features of a network that was trained on them: the energy in the top singular
directions of each class, and activation clustering.

Tran, Li and Madry, "Spectral signatures in backdoor attacks", NeurIPS 2018, arXiv:1811.00636. Chen et al., "Detecting
backdoor attacks on deep neural networks by activation clustering", SafeAI 2019, arXiv:1811.03728.

Differs from the papers:

- The energy is that in ten directions instead of one, because the first direction is often another one than that of
  the manipulated examples.
- The features of a class are projected on the same directions before they are divided into two clusters, in place of an
  independent component analysis.
- Directions and clusters are those of the examples whose label is not suspect, because wrong labels are as unusual as
  manipulated inputs. All examples get a score.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.types import Mask, PerExample

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
