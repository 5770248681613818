"""Reads flagged inputs with their labels, and screens labels by the nearest neighbours among trusted examples.

Paudice, Muñoz-González & Lupu, "Label sanitization against label flipping poisoning attacks", ECML PKDD workshops 2018,
arXiv:1803.00992, for the nearest neighbours. Differs from the paper: labels are never changed; a flagged input whose
label disagrees with its neighbours is excluded, and training examples are refused as a whole if clearly more of their
labels disagree than of the trusted ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Labels, Mask
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.settings.label_files import read_labels
from holdfast.statistics.intervals import independent_difference

NEIGHBOURS = 10
_CONFIDENCE = 0.998
"""Confidence of the two-sided interval of the difference, so that its lower end has an error of 0.1 %."""
_LEAST = 0.02
"""Smallest difference of the shares for which training examples are refused."""
_ROWS = 512


@dataclass(frozen=True)
class Screened:
    """How many labels disagree with those of their neighbours."""

    n: int
    disagree: int
    trusted_n: int
    trusted_disagree: int

    @property
    def suspicious(self) -> bool:
        """Whether clearly more labels disagree than of the trusted examples."""
        difference = independent_difference(
            self.disagree, self.n, self.trusted_disagree, self.trusted_n, _CONFIDENCE
        )
        return difference.low > 0 and difference.value >= _LEAST


def disagreeing(
    points: Tensor, labels: Labels, trusted: Tensor, trusted_labels: Labels, *, own: bool = False
) -> Mask:
    """Return for each point (n, d) whether its label differs from the most frequent one of its nearest trusted points.

    With `own`, the points are the trusted ones, and a point is no neighbour of itself.
    """
    points, trusted = points.flatten(1).float(), trusted.flatten(1).float()
    classes = int(max(int(labels.max()), int(trusted_labels.max()))) + 1
    parts = []
    for start in range(0, len(points), _ROWS):
        distances = torch.cdist(points[start : start + _ROWS], trusted)
        if own:
            rows = torch.arange(len(distances))
            distances[rows, rows + start] = torch.inf
        nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False).indices
        votes = torch.nn.functional.one_hot(trusted_labels[nearest], classes).sum(1)
        parts.append(votes.argmax(1) != labels[start : start + _ROWS])
    return torch.cat(parts)


def screened(points: Tensor, labels: Labels, trusted: Tensor, trusted_labels: Labels) -> Screened:
    """Count the labels of points (n, d) that disagree with their neighbours among the trusted points, and those of the
    trusted points themselves.
    """
    found = disagreeing(points, labels, trusted, trusted_labels)
    own = disagreeing(trusted, trusted_labels, trusted, trusted_labels, own=True)
    return Screened(len(found), int(found.sum()), len(own), int(own.sum()))


@dataclass(frozen=True, eq=False)
class Flagged:
    """Flagged inputs."""

    n: int
    """number of all flagged inputs"""
    x: Tensor
    """those with a label (k, *shape)"""
    y: Labels
    """their classes (k,)"""


def read_flagged(
    stored: StoredInputs | None, labels: Path | None, class_names: Sequence[str], *, strict: bool
) -> Flagged:
    """Return the stored inputs of a guard with the labels in a CSV file.

    Raises `UsageError` for an invalid file and, if `strict`, for labels of requests that are not stored. The guard may
    delete inputs while an adaptation runs.
    """
    known = {} if labels is None else read_labels(labels, class_names)
    n, x, y = 0, [], []
    for request in () if stored is None else stored.read():
        n += len(request.rows)
        for place, row in enumerate(request.rows):
            label = known.pop((request.request, row), None)
            if label is not None:
                x.append(request.x[place])
                y.append(label)
    if known and strict:
        request_name, row = next(iter(known))
        raise UsageError(
            f"{labels}: input {row} of the request {request_name!r} is not among the stored flagged inputs; remove "
            "labels of other requests, and those of inputs that were deleted"
        )
    return Flagged(n, torch.stack(x) if x else torch.empty(0), torch.tensor(y, dtype=torch.int64))
