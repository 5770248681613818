"""What is declared of data and outputs, from flags and from a file alike, and what a run keeps of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.cli.app import run
from holdfast.io.data.data import open_data
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.settings import Assess, Harden, RotateSettings

pytestmark = pytest.mark.usefixtures("elsewhere")
QUICK = ["--threat", "linf:0.1", "--suite", "quick", "--no-doubts", "-n", "60"]
FACTORY = """
import torch
from torch import nn


def probability():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 1), nn.Sigmoid())
    torch.manual_seed(0)
    nn.init.normal_(net[1].weight)
    return net


def bare():
    from holdfast.io.models.models import open_model

    return open_model("mnist-cnn").model.net
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with digits that were normalised beforehand, and a file of factories."""
    monkeypatch.chdir(tmp_path)
    digits = open_data("mnist-mini", n=60).read(0, 60)
    z = ((digits.x - 0.1307) / 0.3081).numpy()
    np.savez("z.npz", x=z, y=digits.y.numpy())
    Path("net.py").write_text(FACTORY)
    return tmp_path


def robust(file: str) -> float:
    value: float = json.loads(Path(file).read_text())["metrics"]["robust_accuracy"]["value"]
    return value


@pytest.mark.slow
def test_flags_and_a_file_declare_the_same_and_the_run_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    declared = ["--mean", "0.1307", "--std", "0.3081", "-o", "raw.json"]
    assert run(["assess", "net.py:bare", "mnist-mini", *QUICK, *declared]) == 0
    flags = ["--data-normalised", "0.1307/0.3081", "--run", "runs/z"]
    assert (
        run(["assess", "net.py:bare", "z.npz", *QUICK, *flags, "-o", "z.json", "-o", "z.md", "-o", "z.html"])
        == 0
    )
    Path("holdfast.yaml").write_text(
        "data_normalised: 0.1307/0.3081\nclass_names: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    )
    assert run(["assess", "net.py:bare", "z.npz", *QUICK, "-c", "holdfast.yaml", "-o", "file.json"]) == 0
    assert robust("raw.json") == robust("z.json") == robust("file.json")
    unit = "units before the normalisation of the data, with legal values from 0 to 1"
    assert json.loads(Path("z.json").read_text())["threat"]["unit"] == unit
    assert unit in Path("z.md").read_text() and unit in Path("z.html").read_text()
    capsys.readouterr()
    assert run(["assess", "net.py:bare", "z.npz", *QUICK, *flags, "--resume"]) == 0
    assert run(["report", "runs/z", "-o", "again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["threat"]["unit"] == unit
    other = ["--bounds", "-0.5,3", "--run", "runs/z", "--resume"]
    assert run(["assess", "net.py:bare", "z.npz", *QUICK, *other]) == 2


def test_refusals_name_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["assess", "net.py:bare", "z.npz", *QUICK]) == 3
    refused = capsys.readouterr().err
    assert "--data-normalised MEAN/STD" in refused and "or give --bounds " in refused
    digits = open_data("mnist-mini", n=60).read(0, 60)
    np.savez("two.npz", x=digits.x.numpy(), y=(digits.y > 4).long().numpy())
    assert run(["assess", "net.py:probability", "two.npz", *QUICK]) == 3
    assert "--model-output probability" in capsys.readouterr().err
    assert run(["assess", "net.py:probability", "two.npz", *QUICK, "--model-output", "probability"]) == 0
    both = ["--data-normalised", "0.1/0.3", "--mean", "0.1"]
    assert run(["assess", "net.py:bare", "z.npz", *QUICK, *both]) == 2
    assert "not both" in capsys.readouterr().err
    assert run(["assess", "net.py:bare", "z.npz", *QUICK, "--class-names", "@none.txt"]) == 3
    assert "file of class names 'none.txt' does not exist" in capsys.readouterr().err


def test_a_rotation_opens_its_terms_again_with_what_was_declared() -> None:
    from holdfast.verbs.rotate import rotate_request

    digits = open_data("mnist-mini", split="train", n=1500)
    batch = digits.read(0, 1500)
    z = ((batch.x - 0.1307) / 0.3081).numpy()
    np.savez("all.npz", x_train=z[:1400], y_train=batch.y[:1400], x_test=z[1400:], y_test=batch.y[1400:])
    declared = {"data_normalised": "0.1307/0.3081", "class_names": ",".join("0123456789"), "layout": "chw"}
    asked = {"model": "net.py:bare", "data": "all.npz", "threat": "linf:0.1", **declared}
    first = rotate_request(check_settings(asked, "", kind=RotateSettings))
    second = rotate_request(check_settings(first.settings, "", kind=RotateSettings))
    assert first.settings.keys() >= declared.keys()
    assert first.about() == second.about()
    assert float(first.examples.train.x.min()) == 0


@pytest.mark.parametrize("kind", [Assess, Harden, RotateSettings])
def test_a_mean_and_a_deviation_are_read_in_every_form(kind: type[Assess]) -> None:
    forms = ["0.5/0.25", (0.5, 0.25), [[0.5], [0.25]], ((0.5,), (0.25,)), (np.array([0.5]), np.array([0.25]))]
    for form in forms:
        assert check_settings({"data_normalised": form}, "", kind=kind).data_normalised == (
            (0.5,),
            (0.25,),
        )
