"""Patches that can be printed: colours, shapes, what is learned in them, and the sheet."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from holdfast.attacks import AdversarialPatch, PatchAttack
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.reports.print_sheet import PrintedPatch, write_sheet
from holdfast.threats.parsing import parse_threat

WIDE = Bounds(torch.tensor([-2.0, -1.0, 0.0])[:, None, None], torch.tensor([2.0, 1.0, 4.0])[:, None, None])


def opened(text, bounds=WIDE):
    return parse_threat(text).opened().constraint.in_bounds(bounds)


def off_the_table(pixels, patch):
    """The largest distance of pixels (m, channels) from the nearest printable colour."""
    return float((pixels[:, None] - patch.colours).abs().amax(2).amin(1).max())


@pytest.fixture
def images():
    torch.manual_seed(0)
    low, high = WIDE.like(torch.zeros(1))
    return low + torch.rand(4, 3, 12, 12) * (high - low)


def test_a_changed_pixel_outside_of_the_colours_or_the_shape_is_outside_of_the_threat(images):
    patch = opened("patch:6x6,printable=default,shape=circle")
    batch = Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4))
    x = patch.sample(batch, WIDE, Draws(0))
    changed = (x != images).any(1)
    assert changed.flatten(1).sum(1).tolist() == [int(patch.pixels.sum())] * 4
    assert patch.distance(x, images).tolist() == [1] * 4
    assert off_the_table(x.movedim(1, -1)[changed], patch) == 0
    tinted = torch.where(changed[:, None], x * 0.97, x)
    assert patch.distance(tinted, images).tolist() == [torch.inf] * 4
    assert patch.distance(patch.as_stored(tinted, images, WIDE), images).tolist() == [1] * 4
    square = opened("patch:6x6").project(-images, images, WIDE)
    assert patch.distance(square, images).tolist() == [torch.inf] * 4


def test_colours_keep_their_units_when_bounds_are_applied_twice():
    once = opened("patch:6x6,printable=default")
    assert once.in_bounds(WIDE) == once
    assert once.colours.amin(0).ge(torch.tensor([-2.0, -1.0, 0.0])).all()
    assert once.colours.amax(0).tolist() == [2, 1, 4]  # the paper is white


@pytest.mark.parametrize("channels", [1, 3])
def test_learned_patches_have_printable_colours(channels):
    torch.manual_seed(0)
    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 64, 3))).eval()
    patch = opened("patch:4x4,at=2:2,printable=default,shape=bars", model.bounds)
    x = torch.rand(30, channels, 8, 8)
    batch, threat = Batch(x, model(x).argmax(1), torch.arange(30)), ThreatModel(patch)
    attack = AdversarialPatch(fits=1, steps=20, batch=10)
    learned = attack.fit(model, batch, threat, rng=Draws(0))
    for attacked in (
        attack.fitted(learned)(model, batch, threat, rng=Draws(1)),
        PatchAttack(steps=3)(model, batch, threat, rng=Draws(1)),
    ):
        assert (attacked != x).any()
        assert patch.distance(attacked, x).max() == 1


@pytest.mark.parametrize(
    ("threat", "message"),
    [
        ("patch:4x4,printable=@wrong.csv", "has the line '300,0,0'; a table of colours has a line"),
        ("patch:4x4,printable=@none.csv", "'none.csv' does not exist"),
        ("patch:4x4,printable=blue", "printable is 'blue'; expected default, or @ and a table"),
        (
            "patch:4x4,shape=@shape.png",
            "has 6x5 pixels, and the patch 4x4; give an image of the size of the patch",
        ),
        ("patch:5x5,shape=@dark.png", "has no pixel in a patch of 5x5; give an image with white pixels"),
        ("patch:3x9,shape=bars", "has no pixel in a patch of 3x9; give a larger patch"),
        ("patch:5x5,shape=@wrong.csv", "'wrong.csv' is no image"),
    ],
)
def test_colours_and_shapes_that_cannot_be_read_are_refused(threat, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.csv").write_text("red,green,blue\n300,0,0\n")
    Image.new("L", (5, 6), 255).save("shape.png")
    Image.new("L", (5, 5), 0).save("dark.png")
    with pytest.raises(HoldfastError, match=re.escape(message)):
        parse_threat(threat).opened()


@pytest.mark.parametrize(
    ("threat", "shape", "message"),
    [
        ("patch:12x12", (2, 3, 12, 12), "covers the whole image"),
        ("patch:4x4,printable=default", (2, 4, 12, 12), "images have 4 channels; 1 or 3 were expected"),
    ],
)
def test_patches_that_do_not_fit_the_images_are_refused(threat, shape, message):
    with pytest.raises(HoldfastError, match=message):
        parse_threat(threat).opened().constraint.refuse_unfit(torch.zeros(shape))


def test_a_shape_of_an_image_and_colours_of_a_file_are_used(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    light = np.zeros((4, 5), np.uint8)
    light[1, 2] = light[3, 4] = 255
    Image.fromarray(light).save("shape.png")
    (tmp_path / "colours.csv").write_text("255,0,0\n0,0,255\n")
    patch = opened("patch:4x5,printable=@colours.csv,shape=@shape.png")
    x = patch.project(-images, images, WIDE)
    changed = (x != images).any(1)
    assert (changed.flatten(1).sum(1) == 2).all()
    assert {tuple(colour) for colour in x.movedim(1, -1)[changed].tolist()} <= {(2, -1, 0), (-2, -1, 4)}


def test_a_sheet_has_the_true_size_of_the_patch(tmp_path):
    patch = opened("patch:8x8,at=centre,printable=default", Bounds())
    values = patch.colours[:64].T.reshape(1, 3, 8, 8)
    path = write_sheet(PrintedPatch(patch, values, (32, 32)), tmp_path / "sheet.pdf", 120)
    boxes = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", path.read_bytes())
    assert len(boxes) == 2
    width_cm, height_cm = (float(points) / 72 * 2.54 for points in boxes[0])
    assert width_cm == pytest.approx(30 + 2 * 2.5, abs=0.02)  # 8 of 32 pixels of 120 cm, and the margins
    assert height_cm == pytest.approx(30 + 2 * 2.5, abs=0.02)
    with pytest.raises(UsageError, match="0.1 to 1,000 cm are printed"):
        write_sheet(PrintedPatch(patch, values, (32, 32)), tmp_path / "small.pdf", 0.2)
