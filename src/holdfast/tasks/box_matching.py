"""Matches of detections with objects, as in COCO's evaluation, and the metrics of detection that follow from them.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv:1405.0312, and its evaluation in pycocotools,
whose average precision over objects of all sizes and at most 100 detections in an image is the same number.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.types import PerExample
from holdfast.statistics.intervals import bootstrap, mean_ratio, occurrences

MOST: Final = 100
"""largest number of detections of an image, as in COCO's evaluation"""
CONFIDENT: Final = 0.5
"""lowest score of a detection by which an object counts as found"""
IOUS: Final = torch.from_numpy(np.linspace(0.5, 0.95, 10))  # pycocotools compares with the same floats
"""IoU from which a detection matches an object, for each of the average precisions"""
HIT, MISS, IGNORED = 1, 0, -1
"""outcomes of a detection: matched with an object, with nothing, or with a crowd only, which does not count"""
_LEVELS = torch.from_numpy(np.linspace(0.0, 1.0, 101))  # levels of recall at which precision is averaged
_PAIRS = 1 << 20  # pairs of a detection and an object at once: 8 MB
_WEIGHTS = 1 << 20  # weights of detections at once, so that they remain in the cache of the processor


def overlaps(boxes: Tensor, others: Tensor, crowd: Tensor | None = None) -> Tensor:
    """Return the IoU (n, m, k) of boxes (n, m, 4) with others (n, k, 4), each of them x1, y1, x2, y2.

    For others that are a crowd (n, k) it is the intersection over the area of the box. Boxes without an area have the
    IoU 0, and no gradient.
    """
    a, b = boxes[:, :, None], others[:, None]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    shared, areas, other_areas = sides.prod(-1), areas_of(boxes)[:, :, None], areas_of(others)[:, None]
    union = areas + other_areas - shared
    if crowd is not None:
        union = torch.where(crowd[:, None], areas, union)
    return torch.where(shared > 0, shared / union.where(shared > 0, 1.0), 0.0)


def areas_of(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4 or more values), 0 for those whose sides are not positive."""
    return (boxes[..., 2:4] - boxes[..., :2]).clamp_min(0).prod(-1)


@dataclass(frozen=True)
class Matching:
    """Matches of the detections of images with their objects, as columns with a row for each image."""

    scores: Tensor
    """scores of the detections, highest first, (n, m) float64"""
    labels: Tensor
    """labels of the detections, (n, m) int64; -1 for padding"""
    outcomes: Tensor
    """outcomes of the detections at each IoU of `IOUS`, (n, m, 10) int8: `HIT`, `MISS` or `IGNORED`"""
    objects: Tensor
    """labels of the objects, (n, k) int64; -1 for crowds, which do not count, and for padding"""
    sizes: Tensor
    """square roots of the areas of the objects in pixels, (n, k) float64"""
    found: Tensor
    """whether an object is matched, at an IoU of at least 0.5, by a detection with a score of at least 0.5, (n, k)"""

    @property
    def recalls(self) -> PerExample:
        """Share of the objects of each image that are found (n), float64; 1 for an image without objects."""
        counts = (self.objects >= 0).sum(1)
        return torch.where(counts > 0, self.found.sum(1).double() / counts.clamp_min(1), 1.0)


def match(outputs: Tensor, truth: Tensor) -> Matching:
    """Return the matches of detections (n, m, 6 or more values) with objects (n, k, 6), on the CPU.

    A detection is x1, y1, x2, y2, score, label, of which the first 100 of an image count, and an object x1, y1, x2, y2,
    label, crowd; a row with the label -1 is padding. In the order of their scores, detections take the free object of
    the same label with which their IoU is the largest.
    """
    rows, truth = outputs[:, :MOST, :6].detach().double().cpu(), truth.double().cpu()
    order = rows[..., 4].argsort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    size = max(1, _PAIRS // max(1, rows.shape[1] * max(truth.shape[1], len(IOUS))))
    parts = [
        matched(rows[i : i + size], truth[i : i + size], IOUS) for i in range(0, max(1, len(rows)), size)
    ]
    outcomes, found = (torch.cat(part) for part in zip(*parts, strict=True))
    objects = torch.where(truth[..., 5] > 0, -1, truth[..., 4].long())
    labels = rows[..., 5].long()
    return Matching(rows[..., 4].contiguous(), labels, outcomes, objects, areas_of(truth).sqrt(), found)


def matched(rows: Tensor, truth: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outcomes (n, m, levels) of detections (n, m, 6), sorted by their scores, at some levels of the IoU,
    and whether each object (n, k) is found at the first level; see `match`.
    """
    crowd = (truth[..., 5] > 0) & (truth[..., 4] >= 0)
    free = (~crowd & (truth[..., 4] >= 0))[:, None].repeat(1, len(levels), 1)
    same = rows[:, :, None, 5] == truth[:, None, :, 4]
    ious = overlaps(rows[..., :4], truth[..., :4], crowd).where(same, -1.0)
    outcomes = torch.zeros(*rows.shape[:2], len(levels), dtype=torch.int8, device=rows.device)
    found, places = torch.zeros_like(crowd), torch.arange(truth.shape[1], device=rows.device)
    for rank in range(rows.shape[1] if truth.shape[1] else 0):
        enough = ious[:, rank, None] >= levels[:, None]
        values = ious[:, rank, None].where(free & enough, -1.0)
        best = values.amax(2, keepdim=True)
        # pycocotools takes the last of several objects with the same IoU
        taken = torch.where((values == best) & (best >= 0), places, -1).amax(2, keepdim=True)
        hit, took = taken[..., 0] >= 0, places == taken
        free &= ~took
        outcomes[:, rank] = torch.where(
            hit, HIT, torch.where((enough & crowd[:, None]).any(2), IGNORED, MISS)
        )
        found |= took[:, 0] & (rows[:, rank, 4] >= CONFIDENT)[:, None]
    return outcomes, found


def average_precision(matching: Matching, n_ious: int = len(IOUS)) -> Estimate:
    """Return the average precision, the mean over the first `n_ious` of `IOUS` and over the classes that have objects,
    with its bootstrap interval over images: 1 for AP at .5, 10 for AP at .5:.95.

    The classes of a resample are those of its images. Raises `TargetError` if there is no object.
    """
    _refuse_none(matching, 0.0)

    def statistic(rows: Tensor) -> PerExample:
        precisions = class_precisions(matching, occurrences(rows), n_ious)
        return precisions.nanmean(1).nan_to_num(nan=0.0)  # a resample without any object

    return bootstrap(statistic, len(matching.objects))


def classes_of(matching: Matching) -> Tensor:
    """Return the labels of the classes that have objects, in ascending order."""
    labels: Tensor = torch.unique(matching.objects[matching.objects >= 0])
    return labels


def class_precisions(matching: Matching, weights: Tensor, n_ious: int = len(IOUS)) -> Tensor:
    """Return the average precision of each class of `classes_of` (resamples, classes), the mean over the first `n_ious`
    of `IOUS`, if each image counts as often as its weight (resamples, n). It is NaN for a class without objects.
    """
    n, m = matching.scores.shape
    order = matching.scores.flatten().argsort(descending=True, stable=True)
    labels, outcomes = matching.labels.flatten()[order], matching.outcomes[..., :n_ious].flatten(0, 1)[order]
    images = torch.arange(n).repeat_interleave(m)[order]
    columns = []
    for label in classes_of(matching):
        own, counts = labels == label, (matching.objects == label).sum(1).double()
        size = max(1, _WEIGHTS // max(1, int(own.sum())))
        columns.append(
            torch.cat(
                [
                    _precision(part[:, images[own]], part @ counts, outcomes[own])
                    for part in torch.split(weights, size)
                ]
            )
        )
    return torch.stack(columns, 1)


def _precision(weights: Tensor, counts: Tensor, outcomes: Tensor) -> PerExample:
    """The average precision of one class (r), from the weights of its detections (r, d) in the order of their scores,
    the numbers of its objects (r), and the outcomes (d, ious).

    The largest precision from a level of recall on is always that of a hit, so that other detections are only counted.
    """
    total, sums = weights.cumsum(1), torch.zeros_like(counts)
    for outcome in outcomes.T:
        hits, ignored = (outcome == HIT).nonzero()[:, 0], outcome == IGNORED
        if not len(hits):
            continue
        counted = total - (weights * ignored).cumsum(1) if bool(ignored.any()) else total
        positives = weights[:, hits].cumsum(1)
        precisions = positives / counted[:, hits].clamp_min(1)
        largest = precisions.flip(1).cummax(1).values.flip(1)
        recalls = positives / counts[:, None]
        # levels of recall that are reached for the first time by each hit
        nearest = (recalls * (len(_LEVELS) - 1)).round().nan_to_num(nan=0.0).long()
        reached = nearest + (_LEVELS[nearest] <= recalls)
        sums += (largest * reached.diff(dim=1, prepend=reached.new_zeros(len(reached), 1))).sum(1)
    return torch.where(counts > 0, sums / (len(_LEVELS) * outcomes.shape[1]), torch.nan)


def recall(matching: Matching, *, at_least: float = 0.0) -> Estimate:
    """Return the share of the objects of at least a size that are found, with its bootstrap interval over images. The
    size is the square root of the area in pixels. Raises `TargetError` if there is no such object.
    """
    _refuse_none(matching, at_least)
    counted = (matching.objects >= 0) & (matching.sizes >= at_least)
    return mean_ratio((matching.found & counted).sum(1, keepdim=True), counted.sum(1, keepdim=True))


def _refuse_none(matching: Matching, at_least: float) -> None:
    counted = matching.sizes[matching.objects >= 0]
    if not bool((counted >= at_least).any()):
        largest = f"the largest has {float(counted.max()):.4g}" if len(counted) else "there is no object"
        raise TargetError(
            f"no object of the images has a size (square root of its area) of at least {at_least:g} pixels; {largest}. "
            "Give images with such objects"
        )
