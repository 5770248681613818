"""Monitoring of generated samples: copies and repeats beside their rates in the reference, folders, and errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import holdfast
from holdfast.cli.app import run
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.monitoring.stream_tests import Copies, SampleTests, Threshold


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, power_of_tests):
    """A folder of its own, and a power without simulations, which test_monitoring.py has."""
    monkeypatch.chdir(tmp_path)


def points(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 8, generator=torch.Generator().manual_seed(seed))


REFERENCE = points(400, 0)


def states(stream: torch.Tensor) -> list[str]:
    tests = SampleTests(REFERENCE, Draws(0))
    for batch in torch.split(stream, 70):
        tests.update(batch)
    return [result.state for result in tests.results()]


def test_the_threshold_is_the_first_percentile_of_distances_to_the_nearest_other_example():
    distances = torch.cdist(REFERENCE.double(), REFERENCE.double()).fill_diagonal_(torch.inf).min(1).values
    found = Threshold.of(REFERENCE, Draws(0))
    assert distances.min() <= found.distance <= torch.quantile(distances, 0.05)
    assert 0.01 <= found.rate <= 0.06


def test_new_samples_are_neither_copies_nor_repeats():
    assert states(points(600, 1)) == ["no alarm", "no alarm"]
    assert states(points(0, 1)) == ["too few samples", "too few samples"]


def test_copies_and_repeats_raise_an_alarm_of_their_own():
    assert states(torch.cat((points(100, 1), REFERENCE[:100]))) == ["alarm", "no alarm"]
    assert states(points(30, 1).repeat(4, 1)) == ["no alarm", "alarm"]


def test_the_alarm_does_not_depend_on_the_batches_and_a_few_copies_raise_none():
    test, found = Copies(0.05), torch.arange(200) % 4 == 0
    test.update(found)
    other = Copies(0.05)
    for part in torch.split(found, 7):
        other.update(part)
    assert test.alarm == other.alarm is not None and test.alarm.after < 200
    rare = Copies(0.05)
    rare.update(torch.arange(2000) % 25 == 0)
    assert rare.alarm is None


def save(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray((255 * image).round().astype(np.uint8)).save(folder / f"{number}.png")


def test_a_folder_of_samples_is_compared_in_the_order_of_numbers(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.random((320, 4, 4), dtype=np.float32)
    reference = (255 * images[:200]).round().astype(np.uint8)
    np.savez("train.npz", x=reference, y=np.zeros(200, int))
    save(tmp_path / "new", images[200:])
    save(tmp_path / "copies", np.concatenate((images[200:230], images[:30])))
    assert run(["monitor", "new", "--reference", "train.npz"]) == 0
    assert "The tests martingale, copies and repeats found no difference" in capsys.readouterr().err
    assert run(["monitor", "copies", "--reference", "train.npz", "-o", "r.json", "-o", "r.md"]) == 1
    shown = capsys.readouterr().err
    assert "in the share of copies of the reference: alarm of the test copies after 37 of 60 samples" in shown
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [test["name"] for test in report["tests"]][-2:] == ["copies", "repeats"]
    assert report["next"][-1].startswith("Audit the generator")
    assert "copies" in (tmp_path / "r.md").read_text(encoding="utf-8")


def test_features_of_a_network_are_compared_without_labels(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), "
        "nn.Linear(4, 2))\n",
        encoding="utf-8",
    )
    settings = {"generated": True, "features": f"{tmp_path / 'net.py'}:make", "trust_code": True}
    labelled = (REFERENCE, torch.arange(400) % 2)
    found = holdfast.monitor((points(300, 1), torch.zeros(300, dtype=torch.int64)), labelled, **settings)
    assert not found.alarmed and found.layer == "1" and found.measured is None and not found.stream.labelled
    with pytest.raises(UsageError, match="which is for generated samples"):
        holdfast.monitor(points(300, 1), labelled, features=settings["features"], trust_code=True)
    with pytest.raises(UsageError, match="have no labels, and model is"):
        holdfast.monitor(points(300, 1), labelled, settings["features"], generated=True, trust_code=True)


@pytest.mark.parametrize("generator", ["gen.py:make", "mnist-gan"])
def test_a_generator_is_not_adapted(generator):
    with pytest.raises(UsageError, match="which a generator does not have"):
        holdfast.adapt(generator, "mnist-mini")
