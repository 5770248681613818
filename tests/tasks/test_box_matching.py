"""Matches of detections with objects, average precision and recall."""

import pytest
import torch

from benchmarks.rows.box_precision import case
from holdfast.core.errors import TargetError
from holdfast.statistics.intervals import mean_ratio
from holdfast.tasks.box_matching import average_precision, class_precisions, match, overlaps, recall

# AP at .5 and at .5:.95 of the cases of the benchmark row `box-precision` by pycocotools 2.0.11
BY_PYCOCOTOOLS = {
    0: (0.23838905629693405, 0.07305391564001121),
    3: (0.11200898936047453, 0.030158450799831114),
    4: (0.15708248456424587, 0.10521500176333422),
    6: (0.3969774569430187, 0.13389810066055696),
    9: (0.43485777149143473, 0.1086801705380622),
}


def precision(matching, weights, n_ious):
    return class_precisions(matching, torch.tensor([weights], dtype=torch.float64), n_ious)[0]


def detections(*rows):
    return torch.tensor([rows], dtype=torch.float64)


@pytest.mark.parametrize("seed", BY_PYCOCOTOOLS)
def test_average_precisions_are_those_of_pycocotools(seed):
    matching = match(*case(seed))
    at_half, over_all = BY_PYCOCOTOOLS[seed]
    assert float(precision(matching, [1.0] * 6, 1).nanmean()) == pytest.approx(at_half, abs=1e-9)
    assert float(precision(matching, [1.0] * 6, 10).nanmean()) == pytest.approx(over_all, abs=1e-9)


def test_the_weight_of_an_image_counts_it_as_often():
    outputs, truth = case(1)
    outputs[..., 4] += torch.arange(120, dtype=torch.float64).view(6, 20) * 1e-5  # without ties
    weights = [2.0, 0.0, 1.0, 3.0, 1.0, 0.0]
    repeated = torch.tensor([0, 0, 2, 3, 3, 3, 4])
    expected = precision(match(outputs[repeated], truth[repeated]), [1.0] * 7, 10)
    assert torch.equal(expected.isnan(), precision(match(outputs, truth), weights, 10).isnan())
    torch.testing.assert_close(precision(match(outputs, truth), weights, 10), expected, equal_nan=True)


def test_an_object_is_found_by_a_confident_detection_of_its_label_only():
    truth = detections(
        [0, 0, 10, 10, 1, 0], [20, 0, 40, 20, 1, 0], [0, 50, 5, 55, 1, 0], [60, 60, 64, 64, 2, 1]
    )
    outputs = detections(
        [0, 0, 10, 10, 0.9, 2],  # another label
        [20, 0, 40, 20, 0.49, 1],  # not confident
        [0, 50, 5, 54, 0.8, 1],
        [0, 0, 0, 0, 0, -1],
    )
    matching = match(outputs, truth)
    assert matching.found.tolist() == [[False, False, True, False]]
    assert matching.sizes.tolist() == [[10, 20, 5, 4]]
    assert matching.recalls.tolist() == [pytest.approx(1 / 3)]
    assert recall(matching, at_least=10).value == 0
    with pytest.raises(TargetError, match="at least 21 pixels; the largest has 20"):
        recall(matching, at_least=21)


def test_without_detections_the_precision_is_zero_and_without_objects_it_is_refused():
    nothing, truth = torch.zeros(8, 0, 6), detections([0, 0, 10, 10, 1, 0]).repeat(8, 1, 1)
    assert average_precision(match(nothing, truth)).value == 0
    with pytest.raises(TargetError, match="there is no object"):
        average_precision(match(nothing, truth[:, :0]))
    assert match(nothing, truth[:, :0]).recalls.tolist() == [1.0] * 8


def test_the_overlap_of_boxes_without_an_area_has_no_gradient():
    boxes = torch.tensor([[[5.0, 5.0, 5.0, 9.0], [0.0, 0.0, 10.0, 10.0]]], requires_grad=True)
    ious = overlaps(boxes, torch.tensor([[[0.0, 0.0, 10.0, 20.0], [3.0, 3.0, 3.0, 3.0]]]))
    assert ious.tolist() == [[[0.0, 0.0], [0.5, 0.0]]]
    ious.sum().backward()
    assert bool(boxes.grad.isfinite().all())


def test_a_mean_ratio_is_that_of_sums_over_the_columns_that_occur():
    numerators, denominators = torch.tensor([[1, 0, 0], [2, 3, 0]]), torch.tensor([[2, 2, 0], [2, 4, 0]])
    assert mean_ratio(numerators, denominators).value == pytest.approx((3 / 4 + 3 / 6) / 2)
