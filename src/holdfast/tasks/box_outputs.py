"""What detectors return, as one tensor, and the losses of detection that attacks maximise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.core.names import enumerated
from holdfast.core.types import Inputs, PerExample
from holdfast.tasks.box_matching import CONFIDENT, MOST, overlaps

CANDIDATES: Final = 300
"""largest number of candidates of an image that are kept, which few models exceed by their queries"""
# IoU from which, in its evaluation, ultralytics suppresses the lower of two boxes of a class
_SUPPRESSED = 0.7
_LOWEST = 0.001  # score that ultralytics requires in its evaluation
_COMPARED = 1000  # boxes of an image, in the order of their scores, among which some are suppressed
_NEAR = 0.3  # IoU from which a candidate may become a match, which needs 0.5: boxes move during an attack
_ROUNDING = 1e-3  # by which a score in half precision may exceed 1
_SHARES = 1.5  # largest coordinate of boxes in shares of the image, which may reach beyond it


@dataclass(frozen=True)
class _Output:
    """Boxes of a batch in the axes of the model's output."""

    boxes: Tensor
    """x1, y1, x2, y2 in pixels, (n, q, 4)"""
    scores: Tensor
    """(n, q), or (n, q, classes) without labels"""
    labels: Tensor | None = None
    """labels of the model (n, q); None if there are scores of each class"""
    exclusive: bool = False
    """whether a box has one label at most, because its scores are a softmax"""
    overlapping: bool = False
    """whether overlapping boxes remain to be suppressed"""


def read_boxes(returned: object, x: Inputs, ids: Sequence[int], *, no_object: bool | None = None) -> Tensor:
    """Return what a detector returned for images `x` (n, channels, height, width) as rows (n, 100 or more, 6 or more),
    differentiable in boxes and scores.

    A row is x1, y1, x2, y2 in pixels of the input image, a score from 0 to 1, and a label. The label is the position in
    `ids`, which contains the label of the model for each class of the data, or `len(ids)` for any other label of the
    model. Boxes are not clipped to the image, as in pycocotools. Rows without a detection are 0 with the label -1.

    The first 100 rows are the detections, with the highest scores first. If the model returns the scores of all classes
    of each box, the columns after the sixth are these scores, in the order of the labels, and the rows after the first
    100 are the candidates of which the detections were chosen, at most 300 with the highest scores.

    Models return one of:

    - a list with a dict for each image: `boxes` (k, 4), `scores` (k), `labels` (k), as in torchvision;
    - a dict or a tuple of `boxes` (n, m, 4), `scores` (n, m) and integers `labels` (n, m); a box with the score 0 or a
      negative label is padding;
    - a tensor (n, m, 6), or a list of rows (k, 6) for each image: x1, y1, x2, y2, score, label, as in ultralytics after
      suppression;
    - a tensor (n, 4 + classes, anchors) with more anchors than classes: x, y of the centre, width and height in pixels,
      and probabilities, as in ultralytics before suppression. Boxes of one class are suppressed as in its evaluation;
    - `logits` (n, q, classes or classes + 1) and `pred_boxes` (n, q, 4), x, y of the centre, width and height in shares
      of the image, as in transformers. `no_object` states whether the last logit stands for no object, as in DETR. None
      takes the number of logits as evidence, if `ids` are 0, 1, 2 and so on.

    Raises `TargetError` for other outputs, NaN, scores outside of [0, 1], and labels that are not whole numbers.
    """
    output = _output_of(returned, x, ids, no_object=no_object)
    _refuse_invalid(output, len(x))
    if output.labels is not None:
        labels = _places(output.labels, ids).to(output.boxes.dtype)
        return _ranked(torch.cat((output.boxes, output.scores[..., None], labels[..., None]), 2))
    class_scores = _of_data(output.scores, ids)
    best, labels = class_scores.max(2, keepdim=True)
    candidates = torch.cat((output.boxes, best, labels.to(best.dtype), class_scores), 2)
    detections = candidates if output.exclusive else _pairs(candidates, output)
    highest = best[..., 0].detach().topk(min(CANDIDATES, candidates.shape[1]), 1).indices
    return torch.cat((_ranked(detections), _taken(candidates, highest)), 1)


def _output_of(returned: object, x: Inputs, ids: Sequence[int], *, no_object: bool | None) -> _Output:
    n, found = len(x), returned
    if isinstance(found, Mapping) and {"logits", "pred_boxes"} <= found.keys():
        logits, boxes = _tensor(found["logits"]), _tensor(found["pred_boxes"])
        return _of_queries(logits, boxes, x, ids, no_object=no_object)
    if isinstance(found, Mapping) and {"boxes", "scores", "labels"} <= found.keys():
        return _Output(_tensor(found["boxes"]), _tensor(found["scores"]), _tensor(found["labels"]))
    if isinstance(found, Sequence) and not isinstance(found, str):
        of_images = len(found) == n
        if of_images and all(isinstance(each, Mapping) and "boxes" in each for each in found):
            return _padded(
                [[_tensor(each.get(key)) for key in ("boxes", "scores", "labels")] for each in found]
            )
        tensors = [_tensor(each) for each in found if isinstance(each, Tensor | np.ndarray)]
        if (
            of_images
            and len(tensors) == n
            and all(each.dim() == 2 and each.shape[1] == 6 for each in tensors)
        ):
            return _padded([[each[:, :4], each[:, 4], each[:, 5]] for each in tensors])
        if len(found) == len(tensors) == 3 and sorted(each.dim() for each in tensors) == [2, 2, 3]:
            tensors.sort(key=lambda each: (each.dim() == 2, not each.is_floating_point()))
            if [each.is_floating_point() for each in tensors] == [True, True, False]:
                return _Output(tensors[0], tensors[1], tensors[2])
        # ultralytics adds lists or dicts of its heads' outputs
        found = tensors[0] if len(tensors) == 1 else found
    if isinstance(found, Tensor | np.ndarray):
        rows = _tensor(found)
        if rows.dim() == 3 and len(rows) == n and rows.shape[2] == 6:
            return _Output(rows[..., :4], rows[..., 4], rows[..., 5])
        if rows.dim() == 3 and len(rows) == n and max(ids) + 5 <= rows.shape[1] < rows.shape[2]:
            rows = rows.transpose(1, 2)
            return _Output(_corners(rows[..., :4]), rows[..., 4:], overlapping=True)
    raise _other(_described(returned), n)


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor | np.ndarray):
        return torch.as_tensor(value)
    raise _other(f"a {type(value).__name__} where boxes, scores or labels were expected", None)


def _described(returned: object) -> str:
    """The kind of an output, with its keys, its length or its shape, for a message."""
    if isinstance(returned, Mapping):
        return f"a dict with the keys {enumerated([str(key) for key in returned][:6])}"
    if isinstance(returned, Tensor | np.ndarray):
        return f"an array of shape {tuple(returned.shape)}"
    if isinstance(returned, Sequence):
        inside = f" of {_described(returned[0])}" if returned and returned[0] is not returned else ""
        return f"a {type(returned).__name__} with {len(returned)} entries{inside}"
    return f"a {type(returned).__name__}"


def _other(what: str, n: int | None) -> TargetError:
    images = "" if n is None else f" for {n} images"
    return TargetError(
        f"the model returned {what}{images}; a detector in eval mode returns a list with a dict of boxes, scores and "
        "labels for each image, a dict or a tuple of them, rows x1, y1, x2, y2, score, label, a tensor of shape "
        "(n, 4 + classes, anchors), or logits and pred_boxes. Return one of them, or declare another task (--task)",
    )


def _padded(images: Sequence[Sequence[Tensor]]) -> _Output:
    """Boxes, scores and labels of each image, with the label -1 for padding."""
    for number, (boxes, scores, labels) in enumerate(images):
        if boxes.shape != (len(boxes), 4) or not len(boxes) == scores.numel() == labels.numel():
            raise TargetError(
                f"the model returned boxes of shape {tuple(boxes.shape)}, scores of shape {tuple(scores.shape)} and "
                f"labels of shape {tuple(labels.shape)} for image {number} of the batch; return (k, 4), (k,) and (k,)"
            )
    most = max(len(boxes) for boxes, *_ in images)

    def together(place: int, value: float) -> Tensor:
        each = [image[place].flatten() for image in images]
        width = 4 if place == 0 else 1
        return torch.stack([F.pad(part, (0, width * most - len(part)), value=value) for part in each])

    return _Output(together(0, 0.0).reshape(len(images), most, 4), together(1, 0.0), together(2, -1.0))


def _corners(boxes: Tensor) -> Tensor:
    centres, halves = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centres - halves, centres + halves), -1)


def _of_queries(
    logits: Tensor, boxes: Tensor, x: Inputs, ids: Sequence[int], *, no_object: bool | None
) -> _Output:
    """The output of a detector of transformers."""
    if logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4) or len(boxes) != len(x):
        raise TargetError(
            f"the model returned logits of shape {tuple(logits.shape)} and pred_boxes of shape {tuple(boxes.shape)} "
            f"for {len(x)} images; return (n, queries, classes) and (n, queries, 4)"
        )
    n_logits, classes = logits.shape[2], len(ids)
    if no_object is None and [*ids] == [*range(classes)] and n_logits in (classes, classes + 1):
        no_object = n_logits > classes
    if no_object is None:
        raise TargetError(
            f"the model returns {n_logits} logits for each box, and the data have {classes} classes with the labels "
            f"{min(ids)} to {max(ids)}; return `boxes`, `scores` and `labels` instead, with the labels of the data"
        )
    boxes = _corners(boxes) * boxes.new_tensor([*x.shape[:1:-1], *x.shape[:1:-1]])
    scores = logits.softmax(2)[..., :-1] if no_object else logits.sigmoid()
    return _Output(boxes, scores, exclusive=no_object)


def _refuse_invalid(output: _Output, n: int) -> None:
    named = {"boxes": output.boxes, "scores": output.scores}
    if output.labels is not None:
        named["labels"] = output.labels
    boxes, scores, *_ = named.values()
    flat = output.labels is not None
    if (
        len(boxes) != n
        or boxes.shape[2:] != (4,)
        or any(
            each.shape[:2] != boxes.shape[:2] or (flat and each.dim() != 2) for each in [*named.values()][1:]
        )
    ):
        shapes = ", ".join(f"{name} of shape {tuple(each.shape)}" for name, each in named.items())
        raise TargetError(f"the model returned {shapes}; return ({n}, m, 4), ({n}, m) and ({n}, m)")
    for name, values in named.items():
        wrong = ~values.detach().isfinite().flatten(1).all(1)
        if bool(wrong.any()):
            raise TargetError(
                f"the {name} of image {int(wrong.nonzero()[0, 0])} of the batch contain NaN or infinite values; finite "
                "numbers were expected: correct the model"
            )
    counted = scores.detach() if output.labels is None else scores.detach()[output.labels >= 0]
    if counted.numel() and (float(counted.min()) < -_ROUNDING or float(counted.max()) > 1 + _ROUNDING):
        raise TargetError(
            f"the scores of the boxes are {float(counted.min()):.4g} to {float(counted.max()):.4g}; probabilities from "
            "0 to 1 were expected: return the sigmoid of logits"
        )
    labels = scores.new_zeros(0) if output.labels is None else output.labels.detach().double()
    wrong = (labels != labels.round()) | (labels < -1)
    if bool(wrong.any()):
        raise TargetError(
            f"a label of the boxes is {float(labels[wrong][0]):g}; whole numbers of at least 0 were expected, or -1 "
            "for padding: return x1, y1, x2, y2, score, label in this order"
        )


def _places(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """The positions of labels (n, m) in `ids`, `len(ids)` for other ones, and -1 for negative ones."""
    same = labels[..., None].long() == torch.tensor(ids, device=labels.device)
    places = torch.where(same.any(2), same.long().argmax(2), len(ids))
    return torch.where(labels < 0, -1, places)


def _of_data(class_scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Scores (n, q, classes of the data), and the largest of the other classes of the model as one more column."""
    classes = class_scores.shape[2]
    if max(ids) >= classes:
        raise TargetError(
            f"the model has {classes} classes (0 to {classes - 1}), and a class of the data has the label {max(ids)}; "
            "give the labels that the model returns"
        )
    others = torch.ones(classes, dtype=torch.bool, device=class_scores.device)
    others[list(ids)] = False
    own = class_scores[..., list(ids)]
    return torch.cat((own, class_scores[..., others].amax(2, keepdim=True)), 2) if bool(others.any()) else own


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


def _pairs(candidates: Tensor, output: _Output) -> Tensor:
    """Rows of pairs of a candidate and a label, with the highest scores first, without those that are suppressed."""
    scores = candidates[..., 6:].flatten(1)
    places = scores.detach().topk(min(_COMPARED, scores.shape[1]), 1).indices
    classes = candidates.shape[2] - 6
    queries, labels = places // classes, (places % classes).to(scores.dtype)
    rows = _taken(candidates, queries)
    values = scores.gather(1, places)
    if output.overlapping:
        kept = torch.stack(
            [_kept(*each) for each in zip(rows[..., :4].detach(), values.detach(), labels, strict=True)]
        )
        labels = torch.where(kept, labels, -1)
    return torch.cat((rows[..., :4], values[..., None], labels[..., None], rows[..., 6:]), 2)


def _kept(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Mask of the boxes of one image (p), in the order of their scores, that non-maximum suppression keeps.

    The iteration ends with the boxes that the sequential algorithm keeps (Zheng et al., "Enhancing geometric factors in
    model learning and inference for object detection and instance segmentation", arXiv:2005.03572, section IV).
    """
    enough = scores > _LOWEST
    kept, n = enough, int(enough.sum())
    same = labels[:n, None] == labels[:n]
    over = ((overlaps(boxes[None, :n], boxes[None, :n])[0] > _SUPPRESSED) & same).triu(1)
    while True:
        now = enough.clone()
        now[:n] = ~(over & kept[:n, None]).any(0)
        if torch.equal(now, kept):
            return kept
        kept = now


def _ranked(rows: Tensor) -> Tensor:
    """The 100 rows with the highest scores; rows without a score or a label are padding, and follow all others."""
    valid = (rows[..., 4] > 0) & (rows[..., 5] >= 0)
    order = rows[..., 4].detach().where(valid, -1.0).argsort(dim=1, descending=True, stable=True)[:, :MOST]
    empty = rows.new_zeros(rows.shape[2])
    empty[5] = -1
    rows = torch.where(valid[..., None], rows, empty)
    missing = empty.expand(len(rows), max(0, MOST - rows.shape[1]), -1)
    return torch.cat((_taken(rows, order), missing), 1)


def refuse_other_units(outputs: Tensor, size: tuple[int, int], ids: Sequence[int]) -> None:
    """Raise `TargetError` if the detections of clean images, as of `read_boxes`, are not corners in pixels, or have no
    label of the data.

    `size` is the height and width of the images. Only detections with a score of at least 0.5 count, if there are any.
    """
    rows = outputs[:, :MOST].detach()[outputs[:, :MOST, 5] >= 0]
    confident = rows[rows[:, 4] >= CONFIDENT]
    rows = confident if len(confident) else rows
    if not len(rows):
        return
    x1, y1, x2, y2 = rows[:, :4].unbind(1)
    height, width = size
    shown, shown_size = ", ".join(f"{value:.4g}" for value in rows[0, :4].tolist()), f"{height} x {width}"
    if float(((x2 <= x1) | (y2 <= y1)).double().mean()) > 1 / 2:
        raise TargetError(
            f"most boxes of the model end before they begin, such as ({shown}); x1, y1, x2, y2 were expected: convert "
            "them from x, y, width, height"
        )
    if float(rows[:, :4].abs().max()) <= _SHARES < min(size):
        raise TargetError(
            f"the boxes of the model are shares of the image, such as ({shown}); pixels were expected: multiply them "
            f"by the width and height of the images, {shown_size}"
        )
    if float(((x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)).double().mean()) > 1 / 2:
        raise TargetError(
            f"most boxes of the model are outside of the images of {shown_size} pixels, such as ({shown}); return "
            "pixels of the images that the model is given"
        )
    if bool((rows[:, 5] == len(ids)).all()):
        raise TargetError(
            f"none of the {len(rows)} detections of the model has a label of the data, which are "
            f"{enumerated([str(each) for each in ids][:10])}; give the labels that the model returns"
        )


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a candidate and an object."""

    rows: Tensor
    """candidates (n, q, 6 or more)"""
    ious: Tensor
    """IoU of candidates with objects (n, q, k)"""
    near: Tensor
    """whether a candidate may become a match of an object, if it has its label (n, q, k)"""
    own: Tensor
    """score of the candidate for the label of the object (n, q, k)"""


def _pairs_of(outputs: Tensor, truth: Tensor) -> _Pairs:
    rows = outputs[:, MOST:] if outputs.shape[1] > MOST else outputs
    truth = truth.to(rows.dtype)
    ious = overlaps(rows[..., :4], truth[..., :4], truth[..., 5] > 0)
    objects = (truth[..., 4] >= 0) & (truth[..., 5] == 0)
    near = (ious.detach() >= _NEAR) & objects[:, None] & (rows[..., 5] >= 0)[..., None]
    labels = truth[:, None, :, 4]
    if rows.shape[2] > 6:
        places = labels.long().clamp(0, rows.shape[2] - 7).expand(-1, rows.shape[1], -1)
        own = rows[..., 6:].gather(2, places)
    else:
        own = torch.where(rows[..., 5:6] == labels, rows[..., 4:5], 0.0)
    return _Pairs(rows, ious, near, own)


def _log_absent(scores: Tensor) -> Tensor:
    """log(1 - score), with a finite gradient for the score 1."""
    return torch.log1p(-scores * (1 - 1e-6))


def vanish(outputs: Tensor, truth: Tensor) -> PerExample:
    """Return the sum of log(1 - score) over the candidates near an object, for its label (n): 0 if all have vanished.

    `outputs` are those of `read_boxes`, and `truth` (n, k, 6) is that of `match`. Chow et al., "Adversarial Objectness
    Gradient Attacks in Real-time Object Detection Systems", TPS 2020, arXiv:2004.04320 (TOG, object vanishing). Differs
    from the paper: it sums over candidates near objects instead of all.
    """
    pairs = _pairs_of(outputs, truth)
    return _log_absent(pairs.own.where(pairs.near, 0.0)).sum((1, 2))


def fabricate(outputs: Tensor, truth: Tensor) -> PerExample:
    """Return the sum of the scores of the candidates that match no object, the expected number of false boxes (n).

    Object fabrication of TOG (see `vanish`). Differs from the paper: it sums scores instead of logarithms, so that
    candidates that are certain already do not count more.
    """
    pairs = _pairs_of(outputs, truth)
    same = pairs.rows[..., 5:6] == truth[:, None, :, 4].to(outputs.dtype)
    matched = ((pairs.ious >= CONFIDENT) & same).any(2) | (pairs.rows[..., 5] < 0)
    return pairs.rows[..., 4].where(~matched, 0.0).sum(1)


def mislabel(outputs: Tensor, truth: Tensor) -> PerExample:
    """Return a sum over the candidates near an object that is larger the lower the score of its label is, and the
    higher the largest score of another label is (n).

    A term is log(1 - score of the label) + log(largest score of another label), weighted by the score of the
    candidate. Without scores of all classes it is log(1 - score), or the score of a candidate with another label.
    Object mislabelling of TOG (see `vanish`); Chen et al., "ShapeShifter", ECML PKDD 2018, arXiv:1804.05810. Differs
    from the papers: the other label is the most probable one.
    """
    pairs = _pairs_of(outputs, truth)
    absent = _log_absent(pairs.own.where(pairs.near, 0.0))
    rows, labels = pairs.rows, truth[:, None, :, 4].to(outputs.dtype)
    if rows.shape[2] < 8:
        other = rows[..., 4:5].where((rows[..., 5:6] != labels) & pairs.near, 0.0)
        return (absent + other).sum((1, 2))
    (first, second), (best, _) = (each.unbind(2) for each in rows[..., 6:].topk(2, 2))
    other = torch.where(best[..., None] == labels, second[..., None], first[..., None])
    term = (absent + other.clamp_min(1e-12).log()).where(pairs.near, 0.0)
    return (rows[..., 4:5].detach() * term).sum((1, 2))
