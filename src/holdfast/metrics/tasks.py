"""Metrics of models with another task than classes, on clean inputs and on the worst case of each example."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.core.errors import Remedy
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.tasks import CLEAN, MEASURED
from holdfast.core.types import PerExample
from holdfast.metrics.shares import Absent, column, robust_accuracy
from holdfast.statistics.intervals import CONFIDENCE, Support, bonferroni, mean, mean_ratio, ratios

if TYPE_CHECKING:
    from holdfast.tasks.box_matching import Matching

_LENGTHS = Support(0.0)
_N_IOUS = 10  # of .5, .55, …, .95
_CERTIFY = "holdfast certify proves what the outputs can be"
_CERTIFIED = (Remedy("certify", True),)


def _pixels(evidence: Evidence, of: str) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers (n, classes) of right, predicted and true pixels."""
    right, predicted, true = column(evidence, f"{of}pixels").double().unbind(2)
    return right, predicted, true


def miou(evidence: Evidence, of: str = MEASURED) -> Estimate:
    """Return the mean over the classes of the intersection over union (IoU) of all pixels of all images: of one
    confusion matrix, and not a mean over images. Classes that occur in no mask and in no prediction do not count.
    """
    right, predicted, true = _pixels(evidence, of)
    return mean_ratio(right, predicted + true - right)


def pixel_accuracy(evidence: Evidence, of: str = MEASURED) -> Estimate:
    """Return the share of all pixels that have the right class."""
    right, _, true = _pixels(evidence, of)
    return mean_ratio(right.sum(1, keepdim=True), true.sum(1, keepdim=True))


def worst_class_iou(evidence: Evidence) -> Estimate:
    """Return the smallest IoU over the classes that occur in the masks, with Bonferroni's correction."""
    right, predicted, true = _pixels(evidence, MEASURED)
    present = true.sum(0).nonzero()[:, 0].tolist()
    if not present:
        raise Absent("no pixel of the masks counts, so that no class has an IoU")
    confidence = bonferroni(CONFIDENCE, len(present))
    union = predicted + true - right
    return _smallest(ratios(right[:, present], union[:, present], confidence), len(evidence))


def image_iou(evidence: Evidence) -> Estimate:
    """Return the mean over the images of the mean IoU of the classes in their masks, which is 1 for a mask without a
    pixel that counts.
    """
    from holdfast.tasks.segmentation import image_ious  # late: few runs are of masks

    return mean(image_ious(column(evidence, f"{MEASURED}pixels").double()))


def _smallest(estimates: list[Estimate], n: int) -> Estimate:
    """The smallest of several quantities, from their simultaneous intervals."""
    if not estimates:
        raise Absent("none of its classes occurs in the data")
    value, low, high = (
        min(getattr(estimate, end) for estimate in estimates) for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, n)


def mean_absolute_error(evidence: Evidence, of: str = MEASURED) -> Estimate:
    """Return the mean absolute difference between the outputs of a regression and the targets, in their units. It is
    infinite for an output that is NaN.
    """
    difference = column(evidence, f"{of}output").double() - column(evidence, f"{of}truth").double()
    return _mean_error(difference.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).mean(1))


def _mean_error(errors: PerExample) -> Estimate:
    if bool(errors.isinf().any()):  # which has no interval
        return Estimate(torch.inf, torch.inf, torch.inf, len(errors))
    return mean(errors, support=_LENGTHS)


def certified_mean_absolute_error(evidence: Evidence) -> Estimate:
    """Return the mean of the largest absolute error that the proved interval of each output allows."""
    low, high = (column(evidence, name, _CERTIFY, _CERTIFIED) for name in ("certified_low", "certified_high"))
    truth = column(evidence, f"{MEASURED}truth").double()
    return _mean_error(torch.maximum(high - truth, truth - low).mean(1))


def certified_pixel_accuracy(evidence: Evidence) -> Estimate:
    """Return the share of all pixels that are proved to be right."""
    proved = column(evidence, "certified_pixels", _CERTIFY, _CERTIFIED).double()
    true = _pixels(evidence, MEASURED)[2]
    return mean_ratio(proved.sum(1, keepdim=True), true.sum(1, keepdim=True))


def certified_label_accuracy(evidence: Evidence) -> Estimate:
    """Return the share of all labels that are proved to be right."""
    low, high = (column(evidence, name, _CERTIFY, _CERTIFIED) for name in ("certified_low", "certified_high"))
    right = torch.where(column(evidence, f"{MEASURED}truth") > 0, low > 0, high < 0)
    return mean(right.double().mean(1))


def label_recall(evidence: Evidence, of: str = MEASURED) -> Estimate:
    """Return the mean over the labels of the share of their examples that got them. Labels that no example has do not
    count.
    """
    return mean_ratio(*_labels(evidence, of))


def _labels(evidence: Evidence, of: str) -> tuple[Tensor, Tensor]:
    """Which labels were found and which are true, both (n, labels). Raises `Absent` if none is true."""
    predicted, true = (column(evidence, f"{of}{name}").double() for name in ("output", "truth"))
    if not bool(true.any()):
        raise Absent("no example has a label, so that none can be found")
    return predicted * true, true


def worst_label_recall(evidence: Evidence) -> Estimate:
    """Return the smallest recall over the labels that occur, with Bonferroni's correction."""
    found, true = _labels(evidence, MEASURED)
    present = true.sum(0).nonzero()[:, 0].tolist()
    confidence = bonferroni(CONFIDENCE, len(present))
    return _smallest(ratios(found[:, present], true[:, present], confidence), len(evidence))


def _matching(evidence: Evidence, of: str) -> "Matching":
    from holdfast.tasks.box_matching import match  # late: few runs are of detectors

    return match(column(evidence, f"{of}boxes"), column(evidence, f"{MEASURED}truth"))


def ap50(evidence: Evidence, of: str = MEASURED, n_ious: int = 1) -> Estimate:
    """Return the average precision at IoU .5, or the mean of those of the first `n_ious` of .5, .55, …, .95."""
    from holdfast.tasks.box_matching import average_precision  # the same

    return average_precision(_matching(evidence, of), n_ious)


def object_recall(evidence: Evidence, of: str = MEASURED, *, eps: float | None = None) -> Estimate:
    """Return the share of the objects that are found. `eps` is the smallest size that counts, the square root of the
    area of an object in pixels, in place of a size of changes.
    """
    from holdfast.tasks.box_matching import recall  # the same

    return recall(_matching(evidence, of), at_least=eps or 0.0)


def worst_class_recall(evidence: Evidence) -> Estimate:
    """Return the smallest share of objects that are found over the classes, with Bonferroni's correction."""
    matching = _matching(evidence, MEASURED)
    from holdfast.tasks.box_matching import classes_of  # the same

    own = matching.objects[..., None] == classes_of(matching)
    found, counts = (own & matching.found[..., None]).sum(1), own.sum(1)
    return _smallest(ratios(found, counts, bonferroni(CONFIDENCE, counts.shape[1])), len(evidence))


def label_accuracy(evidence: Evidence, of: str = MEASURED) -> Estimate:
    """Return the share of the labels of all examples that are right."""
    right = column(evidence, f"{of}output") == column(evidence, f"{of}truth")
    return mean(right.double().mean(1))


PLAIN: Mapping[str, Callable[[Evidence], Estimate]] = {
    "miou": miou,
    "clean_miou": partial(miou, of=CLEAN),
    "pixel_accuracy": pixel_accuracy,
    "clean_pixel_accuracy": partial(pixel_accuracy, of=CLEAN),
    "worst_class_iou": worst_class_iou,
    "image_iou": image_iou,
    "ap50": ap50,
    "clean_ap50": partial(ap50, of=CLEAN),
    "ap": partial(ap50, n_ious=_N_IOUS),
    "clean_ap": partial(ap50, of=CLEAN, n_ious=_N_IOUS),
    "clean_object_recall": partial(object_recall, of=CLEAN),
    "worst_class_recall": worst_class_recall,
    "within_tolerance": robust_accuracy,
    "mean_absolute_error": mean_absolute_error,
    "clean_mean_absolute_error": partial(mean_absolute_error, of=CLEAN),
    "certified_pixel_accuracy": certified_pixel_accuracy,
    "certified_mean_absolute_error": certified_mean_absolute_error,
    "certified_label_accuracy": certified_label_accuracy,
    "label_accuracy": label_accuracy,
    "clean_label_accuracy": partial(label_accuracy, of=CLEAN),
    "label_recall": label_recall,
    "clean_label_recall": partial(label_recall, of=CLEAN),
    "worst_label_recall": worst_label_recall,
}
"""metrics by name"""
