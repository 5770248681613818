"""Generated scenes, and the bundled networks for segmentation and detection."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import holdfast
from holdfast.core.errors import NoSplit, UsageError
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.scenes import CLASSES, scenes
from holdfast.io.models.dense_prediction import detections, overlap
from holdfast.io.models.models import BUNDLED_FOLDER, open_model
from holdfast.tasks.segmentation import Segmentation

DIGEST = "f7cb4e6ebfb647324d28ad479f669bff48270d1c2b380c4b34aea858e6f39770"


def test_scenes_of_a_seed_are_always_the_same() -> None:
    made = scenes(50)
    stored = (made.x.tobytes(), made.masks.astype("<i8").tobytes(), made.boxes.astype("<f4").tobytes())
    assert hashlib.sha256(b"".join(stored)).hexdigest() == DIGEST
    later = scenes(5, start=40)
    np.testing.assert_array_equal(later.x, made.x[40:45])
    np.testing.assert_array_equal(later.boxes, made.boxes[40:45])
    assert (scenes(5, split="train").x != made.x[:5]).any(axis=(1, 2, 3)).all()
    assert (scenes(5, seed=1).x != made.x[:5]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("size", [32, 64, 100])
def test_boxes_include_the_pixels_of_the_mask_exactly(size: int) -> None:
    made = scenes(100, seed=3, size=size)
    present = set[int]()
    for mask, objects in zip(made.masks, made.boxes, strict=True):
        covered = np.zeros(mask.shape, bool)
        for x1, y1, x2, y2, label, crowd in objects[objects[:, 4] >= 0].astype(int):
            inside = mask[y1:y2, x1:x2] == label
            assert crowd == 0 and inside.shape == (y2 - y1, x2 - x1)
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            covered[y1:y2, x1:x2] |= inside
            present.add(label)
        np.testing.assert_array_equal(covered, mask > 0)
    assert present == set(range(1, len(CLASSES)))


def test_written_scenes_are_those_that_are_generated(tmp_path: Path) -> None:
    holdfast.write_scenes(tmp_path, 3, seed=2)
    made = scenes(3, seed=2)
    with np.load(tmp_path / "scenes.npz") as file:
        np.testing.assert_array_equal(file["x"], made.x)
        np.testing.assert_array_equal(file["y"], made.masks)
        assert tuple(file["classes"]) == CLASSES
    for i, objects in enumerate(made.boxes):
        truth = json.loads((tmp_path / "boxes" / f"{i:05}.json").read_text())
        present = objects[objects[:, 4] >= 0]
        assert truth == {"boxes": present[:, :4].tolist(), "labels": present[:, 4].tolist()}
        with Image.open(tmp_path / "boxes" / f"{i:05}.png") as image:
            np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), made.x[i])


def test_the_data_set_of_scenes_is_opened_by_name() -> None:
    masks = DeclaredData(task=Segmentation())
    data = open_data("scenes", n=4, expected=masks)
    np.testing.assert_array_equal(data.read(0, 4).x.mul(255).round(), scenes(4).x)
    np.testing.assert_array_equal(data.read(0, 4).truth, scenes(4).masks)
    assert data.classes == CLASSES
    train = open_data("scenes", split="train", n=2, expected=masks).read(0, 2).x
    np.testing.assert_array_equal(train.mul(255).round(), scenes(2, split="train").x)
    with pytest.raises(NoSplit, match="'scenes' has no split 'val'; it has train, test"):
        open_data("scenes", split="val", expected=masks)
    with pytest.raises(UsageError, match="is not a table"):
        open_data("scenes", drop=("a",))
    with pytest.raises(UsageError, match="no class of each image"):
        open_data("scenes")
    with pytest.raises(UsageError, match="size 16; .*size 32 or more"):
        scenes(1, size=16)


def opened(name: str) -> torch.nn.Module:
    assert (BUNDLED_FOLDER / f"{name}.safetensors").stat().st_size <= 310_000
    card = (BUNDLED_FOLDER / f"{name}.md").read_text(encoding="utf-8")
    net = open_model(name).model.net
    assert isinstance(net, torch.nn.Module)
    n_parameters = sum(p.numel() for p in net.parameters())
    assert all(word in card for word in ("make bundled", "CC BY-SA 3.0", f"{n_parameters:,}"))
    return net.eval()


@torch.no_grad()
def test_the_bundled_unet_segments_scenes() -> None:
    made = scenes(64)
    masks = torch.from_numpy(made.masks)
    predicted = opened("scenes-unet")(torch.from_numpy(made.x) / 255).argmax(1)
    shares = [
        float(((predicted == c) & (masks == c)).sum() / ((predicted == c) | (masks == c)).sum())
        for c in range(len(CLASSES))
    ]
    assert sum(shares) / len(shares) > 0.75


def test_the_bundled_detector_finds_objects_and_has_gradients() -> None:
    made, net = scenes(64), opened("scenes-detector")
    x = (torch.from_numpy(made.x) / 255).requires_grad_()
    outputs = net(x)
    found, present = 0, 0
    for output, objects in zip(outputs, torch.from_numpy(made.boxes), strict=True):
        assert output["scores"].tolist() == sorted(output["scores"].tolist(), reverse=True)
        objects, sure = objects[objects[:, 4] >= 0], output["scores"] >= 0.5
        common, union = overlap(output["boxes"][sure][:, None], objects[:, :4])
        match = (common >= 0.5 * union) & (output["labels"][sure][:, None] == objects[:, 4])
        found, present = found + int(match.any(0).sum()), present + len(objects)
    assert found / present > 0.7
    (outputs[0]["scores"].sum() + outputs[0]["boxes"].sum()).backward()
    assert x.grad is not None and bool(x.grad[0].any()) and not bool(x.grad[1:].any())
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    with torch.no_grad():
        losses = net.train()([x[0], x[1]], [empty, empty])
    assert set(losses) == {"classification", "bbox_regression"} and losses["bbox_regression"] == 0
    with pytest.raises(ValueError, match="needs targets"):
        net(x)


def test_suppression_keeps_the_boxes_of_the_greedy_algorithm() -> None:
    draws = torch.Generator().manual_seed(0)
    corners = torch.rand(4, 60, 2, generator=draws) * 40
    boxes = torch.cat((corners, corners + 10 + 10 * torch.rand(4, 60, 2, generator=draws)), 2)
    scores = torch.rand(4, 60, 2, generator=draws)
    for output, candidates, score in zip(detections(boxes, scores, (64, 64)), boxes, scores, strict=True):
        kept: list[tuple[int, int]] = []
        for place in score.flatten().argsort(descending=True)[:100].tolist():
            cell, label = divmod(place, 2)
            others = candidates[[other for other, of in kept if of == label]]
            common, union = overlap(candidates[cell], others)
            if score.flatten()[place] >= 0.05 and not (common > 0.5 * union).any():
                kept.append((cell, label))
        assert output["labels"].tolist() == [label + 1 for _, label in kept]
        assert torch.equal(output["boxes"], candidates[[cell for cell, _ in kept]])
