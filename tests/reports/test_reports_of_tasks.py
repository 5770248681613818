"""Reports and explanations of models that return masks, boxes and numbers."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import holdfast
from holdfast.core.errors import UsageError
from holdfast.reports.tasks import CHANGES, _returned, by_class
from holdfast.runs.harness.assembly import join

LOST, WRONG, GAINED = (tuple(bytes.fromhex(colour[1:])) for _, colour in CHANGES)


def bright(x):
    """Scores of two classes: whether a pixel is bright."""
    return torch.cat((0.5 - x, x - 0.5), 1) * 20


@pytest.fixture(scope="module")
def masks():
    """A run on images, in each of which an attack changes one row of pixels more than in the one before."""
    x, y = np.full((4, 1, 8, 8), 0.1, np.float32), np.zeros((4, 8, 8), np.uint8)
    x[:, :, 6:], y[:, 6:] = 0.9, 1
    for k in range(4):
        x[k, :, :k] = 0.4  # dark, but near to bright
    x[:, :, 5], y[:, 0] = 0.95, 255  # a row that is wrong already, and one that does not count
    data = {"x": x, "y": y, "classes": np.array(["floor", "sign"])}
    return holdfast.assess(bright, (data["x"], data["y"]), threat="linf:0.15", suite="quick", doubts=False)


def pixels(url):
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.asarray(image.convert("RGB"))


def test_examples_that_lost_most_come_first_with_what_the_model_returned_in_the_worst_case(masks):
    evidence = masks.evidence
    gallery, lost = evidence.gallery, evidence["clean.left"] - evidence["task.left"]
    assert gallery["id"].tolist() == [3, 2]  # the lost row of image 1 does not count
    assert torch.equal(gallery["lost"], lost[gallery["id"]])
    assert torch.equal(gallery["output"].long(), bright(gallery["x_adv"]).argmax(1))
    assert torch.equal(gallery["clean"].long(), bright(gallery["x"]).argmax(1))


def test_of_shards_those_that_lost_most_are_kept():
    shards = [
        {"gallery.id": torch.arange(8) + 8 * k, "gallery.lost": torch.linspace(0, 0.9, 8) + k}
        for k in range(2)
    ]
    assert join(shards)["gallery.id"].tolist() == [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4]


def test_pixels_that_an_attack_changed_have_the_colours_of_the_key(masks):
    first = masks.summary()["examples"][0]
    outputs = first["outputs"]
    changes = pixels(outputs["changes"])
    assert {tuple(map(int, changes[row, 4])) for row in (1, 2)} == {LOST}
    assert tuple(changes[5, 4]) == WRONG
    assert tuple(changes[0, 0]) not in (LOST, WRONG, GAINED)  # it does not count
    assert (outputs["lost"], outputs["counted"], outputs["gained"]) == (16, 56, 0)
    before, after = pixels(outputs["before"]), pixels(outputs["after"])
    assert (before[7] == after[7]).all()
    # the class that a lost row gets has the colour of the class of the bright rows, over a darker image
    assert after[1, 0, 2] - after[1, 0, 0] > 50 > abs(int(before[1, 0, 2]) - int(before[1, 0, 0]))


def test_scores_of_classes_average_to_the_mean(masks):
    (table,) = by_class(masks.evidence)
    for kind, metric in (("clean", "clean_miou"), ("attacked", "miou")):
        values = [row[kind]["value"] for row in table["rows"]]
        assert sum(values) / len(values) == pytest.approx(masks.metrics[metric].value)
    assert all(
        row["attacked"]["low"] <= row["attacked"]["value"] <= row["attacked"]["high"] for row in table["rows"]
    )


def test_the_words_of_a_report_are_those_of_the_task(masks, tmp_path):
    text = masks.write(tmp_path / "report.md").read_text()
    assert "Mean IoU of 4 images is" in text
    assert "The 2 images that lost most of the score, most first" in text
    assert "label 0" not in text


BOX, OTHER = [2.0, 2.0, 6.0, 6.0], [-1.0, -1.0, 3.0, 2.0]


def detector(x):
    """A detector of two objects, the score of the first of which is the brightness of its box."""
    score = torch.sigmoid(20 * (x[:, 0, 2:6, 2:6].mean((1, 2)) - 0.5))
    boxes, labels = torch.tensor([BOX, OTHER]), torch.tensor([0, 1])
    return [
        {"boxes": boxes, "scores": torch.stack((each, 0 * each + 0.9)), "labels": labels} for each in score
    ]


@pytest.fixture(scope="module")
def boxes():
    x = np.full((2, 1, 8, 8), 0.3, np.float32)
    x[:, :, 2:6, 2:6] = 0.6
    y = np.array([[[*BOX, 0, 0], [*OTHER, 1, 0], [0, 0, 0, 0, -1, 0]]] * 2, np.float32)
    settings = {"task": "detection", "threat": "linf:0.15,goal=vanish", "suite": "quick", "doubts": False}
    return holdfast.assess(detector, (x, y), **settings)


def test_lost_objects_are_dashed_where_they_are_and_others_are_not(boxes, tmp_path):
    shown = boxes.summary()["examples"][0]["outputs"]
    first, second = shown["objects"]
    assert first["before"]["score"] > 0.5
    assert first["after"] is None
    assert second["after"]["box"] == OTHER
    assert shown["false"] == {"before": [], "after": []}
    page = boxes.write(tmp_path / "report.html").read_text()
    path = "M2.00,2.00H6.00V6.00H2.00Z"
    assert f'class="box-found" d="{path}"' in page.partition("after the attack")[0]
    assert f'class="box-lost" d="{path}"' in page.partition("after the attack")[2]
    assert page.count('class="box-lost"') == 2
    assert "1 of 2 objects found before" not in page
    (of_class, of_size) = by_class(boxes.evidence)
    assert [row["attacked"]["value"] for row in of_class["rows"]] == [0, 1]
    assert sum(row["n"] for row in of_size["rows"]) == 4


def test_a_box_finds_one_object_of_its_label_and_boxes_on_a_crowd_are_not_false():
    truth = torch.tensor([[0, 0, 4, 4, 0, 0], [8, 8, 16, 16, 1, 1], [0, 0, 4, 5, 0, 0]], dtype=torch.float32)
    rows = torch.tensor(
        [
            [0, 0, 4, 4, 0.9, 0],  # finds the first object
            [0, 0, 4, 4, 0.8, 0],  # and the next best one
            [0, 0, 4, 4, 0.7, 0],  # no further object
            [0, 0, 4, 4, 0.6, 1],  # another label
            [9, 9, 12, 12, 0.6, 1],  # in a crowd
            [0, 0, 4, 4, 0.4, 0],  # not confident
        ]
    )
    found, false = _returned(rows, truth, ("a", "b"))
    assert {k: round(each["score"], 1) for k, each in found.items()} == {0: 0.9, 2: 0.8}
    assert [(each["name"], round(each["score"], 1)) for each in false] == [("a", 0.7), ("b", 0.6)]


def price(x):
    return x[:, 0] * 2 + 1


def test_a_regression_is_shown_and_explained_by_its_numbers(tmp_path):
    x = np.linspace(0.2, 0.8, 6, dtype=np.float32)[:, None]
    y = x[:, 0] * 2 + 1 + np.array([0, 0.01, 0, 0, 0, 0], np.float32)
    settings = {"threat": "linf:0.1", "tolerance": "0.15"}
    run = holdfast.assess(price, (x, y), **settings, suite="quick", doubts=False)
    (example,) = (each for each in run.summary()["examples"] if each["id"] == 1)
    assert example["label"] == "1.65 ± 0.15"
    assert (example["clean_prediction"], example["adversarial_prediction"]) == ("1.64", "1.44")
    one = holdfast.explain(price, x, y, **settings, index=1)
    assert one.sentence.startswith("1.64 becomes 1.44 (by APGD")
    assert one["outputs"].rows[0][5:] == (pytest.approx(0.01, abs=1e-5), pytest.approx(0.21, abs=1e-5))


def test_an_explanation_of_a_run_shows_its_strongest_attack_and_a_model_is_not_explained(masks):
    evidence = masks.evidence
    one = masks.explain(3)
    ious_of = {row[0]: row[2:4] for row in one["outputs"].rows}
    after = sum(ious[1] for ious in ious_of.values()) / 2
    assert after == pytest.approx(float(evidence["task.left"][3]))
    assert "the strongest attack of the run" in one.sentence
    assert len(one["outputs"].pictures) == 6
    with pytest.raises(UsageError, match="a model of segmentation is explained by one of its examples"):
        masks.explain()
