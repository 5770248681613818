"""Outputs of detectors as one tensor, and the losses of detection."""

import pytest
import torch

from holdfast.core.errors import TargetError
from holdfast.tasks.box_matching import MOST, overlaps
from holdfast.tasks.box_outputs import (
    _kept,
    fabricate,
    mislabel,
    read_boxes,
    refuse_other_units,
    vanish,
)

X = torch.zeros(2, 3, 40, 80)
IDS = (1, 4)
BOXES = torch.tensor([[[10.0, 10.0, 30.0, 20.0], [40.0, 0.0, 80.0, 40.0]], [[0.0] * 4, [2.0, 4.0, 6.0, 8.0]]])
SCORES = torch.tensor([[0.6, 0.9], [0.0, 0.7]])
LABELS = torch.tensor([[4, 1], [-1, 9]])
ROWS = torch.cat((BOXES, SCORES[..., None], LABELS[..., None].float()), 2)
EXPECTED = [
    [[40, 0, 80, 40, 0.9, 0], [10, 10, 30, 20, 0.6, 1], [0, 0, 0, 0, 0, -1]],
    [[2, 4, 6, 8, 0.7, 2], [0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, -1]],
]


def image(row, keep):
    return {"boxes": BOXES[row][keep], "scores": SCORES[row][keep], "labels": LABELS[row][keep]}


FORMS = {
    "torchvision": [image(0, [0, 1]), image(1, [1])],
    "dict": {"boxes": BOXES, "scores": SCORES, "labels": LABELS},
    "tuple": (BOXES, LABELS, SCORES),
    "rows": ROWS,
    "rows of a list": [ROWS[0], ROWS[1][1:]],
    "rows beside features": (ROWS, [torch.zeros(2, 6, 5, 5)]),
    "arrays": {"boxes": BOXES.numpy(), "scores": SCORES.numpy(), "labels": LABELS.numpy()},
}


@pytest.mark.parametrize("form", FORMS)
def test_equal_detections_in_other_forms_give_the_same_rows(form):
    outputs = read_boxes(FORMS[form], X, IDS)
    assert outputs.shape == (2, MOST, 6)
    torch.testing.assert_close(outputs[:, :3], torch.tensor(EXPECTED))


def test_a_detector_that_returns_nothing_gives_padding():
    nothing = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.long),
    }
    for returned in ([nothing, nothing], [torch.zeros(0, 6)] * 2, torch.zeros(2, 0, 6)):
        assert read_boxes(returned, X, IDS)[..., 5].unique().tolist() == [-1]


def test_rows_have_the_gradients_of_their_boxes_and_scores():
    rows = ROWS.clone().requires_grad_()
    read_boxes(rows, X, IDS)[..., :5].sum().backward()
    assert rows.grad.tolist() == [[[1, 1, 1, 1, 1, 0]] * 2, [[0] * 6, [1, 1, 1, 1, 1, 0]]]


LOGITS = torch.tensor([[[2.0, 1.5, -3.0], [-1.0, 0.5, 0.0]]]).repeat(2, 1, 1)
SHARES = torch.tensor([[[0.5, 0.5, 0.25, 0.5], [0.125, 0.25, 0.25, 0.5]]]).repeat(2, 1, 1)


def test_the_last_logit_of_a_softmax_stands_for_no_object():
    outputs = read_boxes({"logits": LOGITS, "pred_boxes": SHARES}, X, (0, 1))
    assert outputs.shape == (2, MOST + 2, 8)
    probabilities = LOGITS[0].softmax(1)
    expected = torch.tensor(
        [[30, 10, 50, 30, probabilities[0, 0], 0], [0, 0, 20, 20, probabilities[1, 1], 1]]
    )
    torch.testing.assert_close(outputs[0, :2, :6], expected)
    torch.testing.assert_close(outputs[0, MOST, 6:], probabilities[0, :2])


def test_a_query_with_independent_scores_has_a_detection_of_each_label():
    outputs = read_boxes({"logits": LOGITS, "pred_boxes": SHARES}, X, (0, 2), no_object=False)
    sigmoid = LOGITS[0].sigmoid()
    expected = [sigmoid[0, 0], sigmoid[0, 1], sigmoid[1, 1], sigmoid[1, 2], sigmoid[1, 0], sigmoid[0, 2]]
    torch.testing.assert_close(outputs[0, :6, 4], torch.stack(expected))
    assert outputs[0, :6, 5].tolist() == [0, 2, 2, 1, 0, 1]  # 2 is any other label of the model
    assert outputs[0, :6, 0].tolist() == [30, 30, 0, 0, 0, 30]


def suppressed_one_after_another(boxes, labels):
    kept = []
    for place in range(len(boxes)):
        over = [
            labels[place] == labels[other]
            and float(overlaps(boxes[None, place : place + 1], boxes[None, other : other + 1])) > 0.7
            for other in kept
        ]
        kept += [] if any(over) else [place]
    return kept


def test_suppression_keeps_the_boxes_of_the_sequential_algorithm():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(80, 2, generator=generator) * 6
    boxes = torch.cat((corners, corners + 10 + torch.rand(80, 2, generator=generator)), 1)
    labels, scores = torch.arange(80) % 2, torch.linspace(0.9, 0.1, 80)
    kept = _kept(boxes, scores, labels).nonzero()[:, 0].tolist()
    assert kept == suppressed_one_after_another(boxes, labels)
    assert 2 < len(kept) < 40
    centres = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
    class_scores = torch.stack([scores * (labels == label) for label in (0, 1)], 1)
    raw = torch.cat((centres, class_scores), 1).T[None]
    outputs = read_boxes((raw, [torch.zeros(1, 6, 4, 4)]), X[:1], (0, 1))
    assert outputs.shape == (1, MOST + 80, 8)
    torch.testing.assert_close(outputs[0, : len(kept), :4], boxes[kept])
    assert outputs[0, len(kept) :, 5][: MOST - len(kept)].unique().tolist() == [-1]


NAN = BOXES.clone()
NAN[1, 1, 2] = torch.nan
BAD = {
    "a dict with the keys loss_classifier": {"loss_classifier": torch.zeros(())},
    r"an array of shape \(2, 5\)": torch.zeros(2, 5),
    "boxes of image 1 of the batch contain NaN": {"boxes": NAN, "scores": SCORES, "labels": LABELS},
    "scores of the boxes are -9 to 4": {
        "boxes": BOXES,
        "scores": torch.tensor([[4.0, -9], [1, 1]]),
        "labels": LABELS,
    },
    "a label of the boxes is 0.6": ROWS[..., [0, 1, 2, 3, 5, 4]].clamp(0, 1),
    r"scores of shape \(1,\) and labels of shape \(2,\) for image 1": [
        image(0, [0, 1]),
        image(1, [0, 1]) | {"scores": torch.ones(1)},
    ],
    r"scores of shape \(2, 1\)": {"boxes": BOXES, "scores": SCORES[:, :1], "labels": LABELS},
    r"boxes of shape \(1, 2, 4\)": {"boxes": BOXES[:1], "scores": SCORES[:1], "labels": LABELS[:1]},
    "return `boxes`, `scores` and `labels` instead": {"logits": LOGITS, "pred_boxes": SHARES},
    "3 logits|a list with 2 entries of an array": [torch.zeros(1, 3), torch.zeros(1, 3)],
    "a tuple with 2 entries": (LOGITS, SHARES),
}


@pytest.mark.parametrize("message", BAD)
def test_other_outputs_are_refused(message):
    with pytest.raises(TargetError, match=message):
        read_boxes(BAD[message], X, IDS)


@pytest.mark.parametrize(
    ("boxes", "label", "message"),
    [
        ([50, 30, 20, 10], 0, "x, y, width, height"),
        ([0.1, 0.1, 0.9, 0.5], 0, "shares of the image"),
        ([300, 10, 400, 30], 0, "outside of the images of 40 x 80"),
        ([10, 10, 20, 20], 2, "none of the 2 detections"),
    ],
)
def test_detections_in_other_units_are_refused(boxes, label, message):
    row = torch.tensor([*boxes, 0.9, label], dtype=torch.float32)
    outputs = read_boxes(
        torch.stack((row, row * torch.tensor([1, 1, 1, 1, 0.1, 1])))[None].repeat(2, 1, 1), X, (0, 1)
    )
    with pytest.raises(TargetError, match=message):
        refuse_other_units(outputs, (40, 80), (0, 1))
    refuse_other_units(read_boxes(ROWS, X, IDS), (40, 80), IDS)


TRUTH = torch.tensor([[[0.0, 0.0, 20.0, 20.0, 0, 0], [0.0, 0.0, 0.0, 0.0, -1, 0]]])
# at the object, at the object with another label, half over it, far from it
CANDIDATE_BOXES = torch.tensor([[[0.0, 0, 20, 21], [1, 0, 21, 20], [10, 0, 30, 20], [50, 10, 70, 30]]])
CANDIDATE_SCORES = torch.tensor([[[0.9, 0.2], [0.3, 0.6], [0.4, 0.1], [0.8, 0.1]]])


def gradients(loss, *, with_classes):
    boxes, scores = CANDIDATE_BOXES.clone().requires_grad_(), CANDIDATE_SCORES.clone().requires_grad_()
    best, labels = scores.max(2, keepdim=True)
    rows = torch.cat((boxes, best, labels.float(), *([scores] if with_classes else [])), 2)
    value = loss(torch.cat((torch.zeros(1, MOST, rows.shape[2]), rows), 1) if with_classes else rows, TRUTH)
    return torch.autograd.grad(value.sum(), (boxes, scores), materialize_grads=True)


def signs(loss, *, with_classes=True):
    return gradients(loss, with_classes=with_classes)[1][0].sign().int().tolist()


def test_vanishing_lowers_every_score_that_could_find_the_object():
    assert signs(vanish) == [[-1, 0], [-1, 0], [-1, 0], [0, 0]]
    assert signs(vanish, with_classes=False) == [[-1, 0], [0, 0], [-1, 0], [0, 0]]


def test_fabrication_raises_the_scores_of_boxes_that_match_nothing():
    assert signs(fabricate) == [[0, 0], [0, 1], [1, 0], [1, 0]]


def test_mislabelling_lowers_the_right_label_and_raises_another():
    assert signs(mislabel) == [[-1, 1], [-1, 1], [-1, 1], [0, 0]]
    assert signs(mislabel, with_classes=False) == [[-1, 0], [0, 1], [-1, 0], [0, 0]]


@pytest.mark.parametrize("loss", [vanish, fabricate, mislabel])
def test_a_loss_is_finite_for_certain_scores_and_without_objects(loss):
    scores = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    rows = torch.cat((CANDIDATE_BOXES[:, :2], scores[..., :1], torch.zeros(1, 2, 1), scores), 2)
    for truth in (TRUTH, TRUTH[:, :0]):
        outputs = torch.cat((torch.zeros(1, MOST, 8), rows), 1)
        value = loss(outputs, truth)
        assert value.shape == (1,)
        assert bool(value.isfinite().all())
        (gradient,) = torch.autograd.grad(value.sum(), scores, materialize_grads=True)
        assert bool(gradient.isfinite().all())
