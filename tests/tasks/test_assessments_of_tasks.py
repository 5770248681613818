"""Assessments of models of numbers, masks, boxes and several labels, from Python and through the command line."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import holdfast
from holdfast.core.errors import TargetError, UnclearOutput, UsageError

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 0.5]])


def linear():
    net = nn.Linear(4, 1).requires_grad_(False)
    net.weight.copy_(WEIGHT)
    net.bias.fill_(10.0)
    return net


def houses(n=40, noise=0.02):
    draws = np.random.default_rng(0)
    x = (0.2 + 0.6 * draws.random((n, 4))).astype(np.float32)
    y = x @ WEIGHT[0].numpy() + 10 + draws.normal(0, noise, n)
    return x, y.astype(np.float32)


def test_regression_on_a_linear_model_reaches_the_largest_error_exactly():
    x, y = houses()
    result = holdfast.assess(
        linear(), (x, y), threat="linf:0.05", tolerance="0.34", suite="fast", doubts=False
    )
    errors = np.abs(linear()(torch.tensor(x))[:, 0].numpy() - y) + 0.05 * float(WEIGHT.abs().sum())
    assert result.metrics["mean_absolute_error"].value == pytest.approx(errors.mean(), abs=1e-5)
    assert result.metrics["within_tolerance"].value == (errors <= 0.34).mean()
    assert 0 < (errors <= 0.34).mean() < 1
    assert result.metrics["clean_mean_absolute_error"].value < 0.05


def test_exactly_the_tolerance_is_within_it_and_less_is_not():
    x = np.full((8, 1), 0.5, np.float32)
    y = np.arange(8, dtype=np.float32) + 1

    def off(z):
        return z[:, 0] * 0 + 3

    for tolerance, share in (("2", 5 / 8), ("1.9", 3 / 8)):
        run = holdfast.assess(off, (x, y), threat="linf:0.1", tolerance=tolerance, doubts=False)
        assert run.metrics["clean_accuracy"].value == share


def masks():
    """Images in which the class of a pixel is whether it is bright, and a network that sees it."""
    x = np.full((6, 1, 8, 8), 0.4, np.float32)
    y = np.zeros((6, 8, 8), np.uint8)
    x[:, :, 2:5, 2:6], y[:, 2:5, 2:6] = 0.6, 1
    y[:, 0] = 255  # not counted
    return x, y


def bright(x):
    return torch.cat((0.5 - x, x - 0.5), 1) * 20


def test_segmentation_is_recognised_by_its_masks_and_broken_where_eps_is_large_enough():
    x, y = masks()
    weak = holdfast.assess(bright, (x, y), threat="linf:0.05", doubts=False)
    assert weak.evidence.model["task"]["name"] == "segmentation"
    assert weak.metrics["miou"].value == weak.metrics["clean_miou"].value == 1
    strong = holdfast.assess(bright, (x, y), threat="linf:0.15", doubts=False)
    assert strong.metrics["miou"].value == 0
    assert strong.evidence["clean.pixels"][0].tolist() == [[44, 44, 44], [12, 12, 12]]
    with pytest.raises(UsageError, match="ap50 is no metric of a model of segmentation"):
        holdfast.assess(bright, (x, y), threat="linf:0.1", gates=["ap50 >= 0.5"])


def test_a_worst_case_keeps_the_input_of_the_attack_with_the_lowest_score():
    x, y = masks()
    run = holdfast.assess(bright, (x, y), threat="linf:0.12", doubts=False, save_adversarial=True)
    kept = torch.as_tensor(run.adversarial["x"])
    predicted = bright(kept).argmax(1).numpy()
    right = (predicted == y)[y != 255].mean()
    assert right == pytest.approx(run.metrics["pixel_accuracy"].value)


def test_a_map_as_the_goal_gives_all_pixels_its_class():
    x, y = masks()
    run = holdfast.assess(bright, (x, y), threat="linf:0.15,goal=map:1", doubts=False)
    assert run.evidence["task.pixels"][0].tolist() == [[0, 0, 44], [12, 56, 12]]
    assert "goal=map:1" in str(run.evidence.threat)
    with pytest.raises(TargetError, match="the goal is class 4"):
        holdfast.assess(bright, (x, y), threat="linf:0.1,goal=map:4")


def test_a_regressor_of_scikit_learn_is_attacked_by_its_numbers():
    from sklearn.linear_model import LinearRegression

    x, y = houses()
    run = holdfast.assess(
        LinearRegression().fit(x, y), (x, y), threat="linf:0.05", tolerance="10%", doubts=False
    )
    assert run.evidence.model["access"] == "scores"
    assert run.metrics["mean_absolute_error"].value > 0.2 > run.metrics["clean_mean_absolute_error"].value
    with pytest.raises(TargetError, match="is a regressor"):
        holdfast.assess(LinearRegression().fit(x, y), (x, (y > y.mean()).astype(int)), threat="linf:0.05")


def test_threats_that_tasks_do_not_have_are_refused():
    with pytest.raises(UsageError, match="moves the objects"):
        holdfast.assess(bright, masks(), threat="spatial:rotate=5")
    with pytest.raises(UsageError, match="is for models of classes"):
        holdfast.assess(bright, masks(), threat="linf:0.1,goal=targeted:1")
    with pytest.raises(UsageError, match="on images with boxes"):
        holdfast.assess(bright, masks(), threat="patch:2x2,at=on")
    with pytest.raises(UsageError, match="does not place patches by the objects"):
        holdfast.assess(
            detector, objects(), task="detection", threat="patch:2x2,at=on", suite="AdversarialPatch"
        )


def tags():
    x = np.array([[0.9, 0.1, 0.8], [0.4, 0.9, 0.45], [0.2, 0.8, 0.1]] * 4, np.float32)
    return x, (x > 0.5).astype(np.int64)


def test_several_labels_are_attacked_together():
    x, y = tags()
    run = holdfast.assess(
        lambda z: (z - 0.5) * 10, (x, y), task="multilabel", threat="linf:0.12", doubts=False
    )
    # both values near 0.5, of one example in three, change
    assert run.metrics["label_accuracy"].value == pytest.approx(1 - 2 / 9)
    assert run.metrics["robust_accuracy"].value == pytest.approx(2 / 3)
    assert run.metrics["label_recall"].value == 1
    with pytest.raises(UnclearOutput, match="logits or probabilities"):
        holdfast.assess(lambda z: z, (x, y), task="multilabel", threat="linf:0.1")


BOX = [2.0, 2.0, 6.0, 6.0]


def detector(x):
    """A detector of one object whose score is the brightness of its box."""
    score = torch.sigmoid(20 * (x[:, 0, 2:6, 2:6].mean((1, 2)) - 0.5))
    box = torch.tensor([BOX])
    return [{"boxes": box, "scores": each[None], "labels": torch.tensor([0])} for each in score]


def objects():
    x = np.full((5, 1, 8, 8), 0.3, np.float32)
    x[:, :, 2:6, 2:6] = 0.6
    return x, np.array([[[*BOX, 0, 0], [0, 0, 0, 0, -1, 0]]] * 5, np.float32)


def test_detection_loses_objects_beyond_the_margin_of_their_scores():
    x, y = objects()
    for eps, recall in ((0.05, 1), (0.15, 0)):
        run = holdfast.assess(detector, (x, y), task="detection", threat=f"linf:{eps}", doubts=False)
        assert run.metrics["object_recall"].value == recall
        assert run.metrics["clean_ap50"].value == 1
    assert (
        holdfast.assess(detector, (x, y), task="detection", threat="linf:0.15,goal=fabricate", doubts=False)
        .metrics["ap50"]
        .value
        == 1
    )


def test_patches_on_objects_and_beside_them():
    x, y = objects()

    def everywhere(z):
        return [
            {**each, "scores": 0.5 + each["scores"] * w.mean()}
            for each, w in zip(detector(z), z, strict=True)
        ]

    found = {
        at: holdfast.assess(
            everywhere,
            (x, y),
            task="detection",
            threat=f"patch:2x2,at={at},goal=vanish",
            doubts=False,
            save_adversarial=True,
        )
        for at in ("on", "beside")
    }
    changed = torch.as_tensor(found["beside"].adversarial["x"]) != torch.tensor(x)
    assert not changed[:, :, 2:6, 2:6].any()
    assert changed.any()
    assert (found["on"].evidence["task.left"] < found["beside"].evidence["task.left"]).all()


def broken_detector(x):
    nan = torch.full((1, 4), torch.nan)
    return [{"boxes": nan, "scores": torch.ones(1), "labels": torch.zeros(1)} for _ in x]


def test_bad_inputs_get_one_error():
    x, y = masks()
    z, w = objects()
    cases = [
        (bright, (x, np.where(y == 1, 7, y)), {}, "the class 7, and the model has 2 classes"),
        (bright, (x, y.astype(np.int64) - 3), {}, "contain -3"),
        (bright, (x, y * 0 + 255), {}, "no pixel of the masks of .* counts"),
        (bright, (x, y[:, :4]), {"task": "segmentation"}, r"\(4, 8\)"),
        (linear(), houses(), {"tolerance": "0"}, "tolerance is '0'"),
        (linear(), houses(), {"task": "regression"}, "needs the largest error"),
        (linear(), (houses()[0], houses()[1] * 0), {"tolerance": "10%"}, "is 0, of which a tolerance of 10 %"),
        (linear(), (houses()[0], houses()[1] * 1000), {"tolerance": "10%"}, "in other units"),
        (bright, (x, y * 0 + 255), {"task": "segmentation"}, "no pixel of the masks"),
        (bright, (x, y), {"threat": "linf:0.1,goal=map:2"}, "the goal is class 2, and the model has 2"),
        (lambda v: bright(v).movedim(1, -1), (x, y), {}, "with the classes last"),
        (detector, (z, w[..., :4]), {"task": "detection"}, "needs boxes"),
        (detector, (z, w - 1000), {"task": "detection"}, "no image of the data has an object"),
        (broken_detector, (z, w), {"task": "detection"}, "NaN"),
        (bright, (x, y), {"threat": "linf:0.1,goal=vanish"}, "of an attack on a detector"),
        (bright, (x, y), {"threat": "linf:0.1,goal=maps:1"}, "or for masks map:K"),
    ]  # fmt: skip
    for net, data, settings, message in cases:
        with pytest.raises((TargetError, UsageError), match=message):
            holdfast.assess(net, data, **{"threat": "linf:0.1", "doubts": False, **settings})


def test_a_detector_that_finds_nothing_has_no_recall_and_ends_no_run():
    def blind(x):
        empty = x.sum() * 0 + torch.zeros(0)
        return [{"boxes": empty.reshape(0, 4), "scores": empty, "labels": empty.long()} for _ in x]

    run = holdfast.assess(blind, objects(), task="detection", threat="linf:0.1", doubts=False)
    assert run.metrics["clean_object_recall"].value == run.metrics["ap50"].value == 0


def test_a_gate_on_large_objects_states_their_size_and_keeps_abbreviations():
    run = holdfast.assess(
        detector,
        objects(),
        task="detection",
        threat="linf:0.05",
        doubts=False,
        gates=["object_recall@4 >= 0.2", "ap50 >= 0.2"],
    )
    shown = str(run)
    assert "object recall for objects of at least 4 x 4 pixels" in shown
    assert "20 % AP50" in shown


def test_networks_with_channels_last_and_a_fixed_batch_size_are_measured():
    x, y = masks()

    def last(z):
        assert z.shape == (4, 8, 8, 1)
        return bright(z.movedim(-1, 1))

    run = holdfast.assess(last, (x.transpose(0, 2, 3, 1), y), threat="linf:0.15", doubts=False)
    assert (run.metrics["clean_miou"].value, run.metrics["miou"].value) == (1, 0)


def test_attacks_that_see_labels_only_search_for_errors():
    run = holdfast.assess(
        linear(), houses(8), threat="linf:0.1,access=labels,queries=200", tolerance="0.2", doubts=False
    )
    assert run.metrics["clean_accuracy"].value == 1
    assert run.metrics["robust_accuracy"].value == 0


def test_nan_and_ties_are_wrong_in_all_metrics():
    x, y = tags()

    def undecided(z):
        return torch.stack((z[:, 0] * torch.nan, z[:, 1] * 0, (z[:, 2] - 0.5) * 10), 1)

    run = holdfast.assess(undecided, (x, y), task="multilabel", threat="linf:0.01", doubts=False)
    assert run.metrics["clean_label_accuracy"].value == pytest.approx(1 / 3)
    assert run.evidence["clean.output"][:, :2].tolist() == (1 - y[:, :2]).tolist()
    x, y = houses(8)
    run = holdfast.assess(
        lambda z: z[:, 0] * torch.nan, (x, y), tolerance="1", threat="linf:0.01", doubts=False
    )
    assert run.metrics["mean_absolute_error"].value == np.inf
    assert run.metrics["within_tolerance"].value == 0


def test_without_any_true_label_there_is_no_recall():
    x, y = tags()
    run = holdfast.assess(lambda z: z - 2, (x, y * 0), task="multilabel", threat="linf:0.01", doubts=False)
    assert run.metrics["label_accuracy"].value == 1
    assert "label_recall" not in run.metrics
    assert "worst_label_recall" not in run.metrics


def test_the_iou_of_images_does_not_depend_on_the_goal():
    x, y = masks()
    run = holdfast.assess(bright, (x, y), threat="linf:0.15,goal=map:1", doubts=False, save_adversarial=True)
    assert run.metrics["image_iou"].value == pytest.approx(12 / 56 / 2)
    # an image that no attack lowers has no adversarial input
    run = holdfast.assess(bright, (x, y), threat="linf:0.01,goal=map:1", doubts=False, save_adversarial=True)
    assert len(run.adversarial["id"]) == 0


def test_groups_of_an_archive_divide_the_examples_of_a_task(tmp_path):
    x, y = houses(8)
    y[:4] += 1  # outside of the tolerance
    np.savez(tmp_path / "houses.npz", x=x, y=y, site=np.arange(8) // 4)
    run = holdfast.assess(
        linear(),
        str(tmp_path / "houses.npz"),
        threat="linf:0.001",
        tolerance="0.5",
        groups="site",
        doubts=False,
        gates=["worst_group >= 0.5"],
    )
    assert run.metrics["worst_group"].value == 0


def test_an_image_outside_of_the_folder_of_its_labels_is_not_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "labels.csv").write_text("file,red\n../other.png,1\n")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "other.png")
    with pytest.raises(TargetError, match=r"line 2 of .* names the image '../other.png'"):
        holdfast.assess(linear(), str(tmp_path / "images"), task="multilabel", threat="linf:0.1")
