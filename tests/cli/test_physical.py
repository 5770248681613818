"""Patches, turns, colours, what is learned and what is seen through: from the command line to the reports."""

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.cli.app import run
from holdfast.doubts.probing import doubt_test
from holdfast.runs.store import columns

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)


def assessed(*flags):
    assert run(["assess", *flags, "--run", "first", "-o", "x.json", "-o", "x.html"]) == 0
    assert run(["verify", "first"]) == 0
    assert run(["report", "first", "-o", "again.json"]) == 0
    content = json.loads(Path("x.json").read_text())
    again = json.loads(Path("again.json").read_text())
    assert {name: again[name] for name in ("metrics", "threat")} == {
        name: content[name] for name in ("metrics", "threat")
    }
    return content


@pytest.mark.parametrize(
    ("threat", "attacks", "says"),
    [
        (
            "patch:7x7",
            ["PatchAttack"],
            "The attacker may replace 7x7 pixels of an image with any values, anywhere",
        ),
        ("patch:7x7,at=centre,jitter=2", ["PatchAttack"], "in its centre, within 2 pixels of that"),
        (
            "patch:7x7,within=4:4-23:23",
            ["PatchAttack"],
            "anywhere, inside the rectangle from pixel 4:4 to 23:23",
        ),
        (
            "spatial:rotate=30,shift=3",
            ["TransformPGD"],
            "may rotate an image by at most 30 degrees in either direction, and",
        ),
        (
            "spatial:flow=0.7",
            ["Flow"],
            "may move each pixel of an image by at most 0.7 pixels in any direction",
        ),
        ("colour:brightness=0.4", ["TransformPGD"], "change the brightness by at most 0.4"),
    ],
)
def test_a_threat_that_is_no_ball(threat, attacks, says):
    content = assessed("mnist-cnn", "mnist-mini", "-n", "20", "--threat", threat, "-s", "quick")
    assert content["threat"]["constraint"] == threat
    assert says in content["threat"]["description"][0]
    assert [attack["name"] for attack in content["attacks"]] == attacks
    assert content["metrics"]["robust_accuracy"]["value"] < 1
    assert all(doubt_test(doubt["name"]).free for doubt in content["doubts"])


@pytest.mark.slow
def test_a_patch_is_learned_once_and_its_cost_is_reported():
    patch = ["--set", "attacks=[{use: AdversarialPatch, steps: 30, batch: 50, examples: 200}]"]
    content = assessed("mnist-cnn", "mnist-mini", "-n", "50", "--threat", "patch:9x9,at=centre", *patch)
    (attack,) = content["attacks"]
    chosen = "the best of 3 fits, chosen on 100 others, with 4,800 queries"  # 3 x (30 x 50 + 100)
    assert f"learned on 100 examples that are not judged, {chosen}" in attack["notes"]
    doubts = content["doubts_cost"]["queries"]
    assert content["cost"]["queries"] == 50 + 50 + 4800 + doubts  # clean, at its place, learning
    assert content["metrics"]["robust_accuracy"]["value"] < 0.95
    learned_on = columns.read(Path("first/fit-1-adversarialpatch.safetensors")).columns["id"]
    assert len(learned_on) == 200
    assert int(learned_on.max()) > 300  # a sample, and not the first, which may be of few classes
    before = Path("first/1-adversarialpatch.safetensors").read_bytes()
    Path("first").rename("second")
    assert run(["assess", "mnist-cnn", "mnist-mini", "-n", "50", "--threat", "patch:9x9,at=centre", *patch,
                "--run", "third"]) == 0  # fmt: skip
    assert Path("third/1-adversarialpatch.safetensors").read_bytes() == before


@pytest.mark.slow
def test_what_is_learned_needs_other_examples(capsys):
    x, y = np.random.default_rng(0).random((8, 1, 28, 28), np.float32), np.arange(8)
    np.savez("only.npz", x=x, y=y)
    learned = ["--threat", "linf:0.2", "--set", "attacks=[{use: Universal}]"]
    assert run(["assess", "mnist-cnn", "only.npz", *learned]) == 2
    assert "--fit DATA" in capsys.readouterr().err
    assert run(["assess", "mnist-cnn", "only.npz", *learned, "--fit", "only.npz"]) == 2
    assert run(["assess", "mnist-cnn", "mnist-mini", "-n", "8", *learned, "--split", "train"]) == 2
    assert "which is also evaluated" in capsys.readouterr().err
    short = ["--threat", "linf:0.2", "--set", "attacks=[{use: Universal, steps: 2}]"]
    assert run(["assess", "mnist-cnn", "only.npz", *short, "--fit", "mnist-mini"]) == 0


def test_a_model_seen_through_random_changes_is_one_that_draws(capsys):
    seen = ["--transform", "rotate=20,brightness=0.2", "--threat", "linf:0.1", "-s", "quick", "--no-doubts"]
    content = assessed("mnist-cnn", "mnist-mini", "-n", "10", *seen)
    assert content["model"]["seen_through"] == {"rotate": 20.0, "brightness": 0.2}
    assert any("in both directions by up to rotate 20, brightness 0.2" in note for note in content["notes"])
    assert any("outputs of the model are random" in note for note in content["notes"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--threat", "patch"], "as in patch:5x5"),
        (["--threat", "patch:0x5"], "as in patch:5x5"),
        (["--threat", "patch:5x5,at=3"], "ROW:COLUMN"),
        (["--threat", "patch:5x5,jitter=-1"], "number of pixels"),
        (["--threat", "patch:5x5,within=4:4"], "as in within=4:4-23:23"),
        (["--threat", "patch:5x5,within=4:4-28:28"], "does not fit into images of 28x28"),
        (["--threat", "patch:29x5"], "does not fit into images of 28x28"),
        (["--threat", "spatial"], "expected any of rotate, shift, scale"),
        (["--threat", "spatial:hue=3"], "expected any of rotate, shift, scale"),
        (["--threat", "spatial:flow=1,rotate=3"], "use each alone, as in spatial:flow=1"),
        (["--threat", "spatial:flow=1", "--set", "attacks=[{use: GridSearch}]"], "the threat model is spatial:flow=1"),
        (["--threat", "spatial:flow=1", "--set", "attacks=[{use: PGD}]"], "choose Flow"),
        (["--threat", "spatial:rotate=9", "--set", "attacks=[{use: Flow}]"], "such as spatial:flow=1.5"),
        (["--transform", "flow=1"], "expected any of rotate, shift"),
        (["--threat", "spatial:rotate=0"], "more than 0 and at most 180"),
        (["--threat", "colour:hue=10"], "three channels"),
        (["--threat", "patch:5x5", "--curve"], "leave out --curve"),
        (["--threat", "patch:5x5", "--suite", "minimum-norm"], "expected one of fast, quick, standard"),
        (["--threat", "linf:0.1", "--set", "attacks=[{use: GridSearch}]"], "such as spatial:rotate=30"),
        (["--threat", "spatial:rotate=30", "--set", "attacks=[{use: PGD}]"], "choose GridSearch or TransformPGD"),
        (["--threat", "patch:5x5", "--set", "attacks=[{use: Square}]"], "Choose another threat"),
        (["--fit", "mnist-mini"], "no attack of the suite is fitted"),
        (["--threat", "linf:0.1", "--set", "attacks=[{use: Universal}]", "--fit", "other.npz"], "of the same kind"),
        (["--transform", "rot=3"], "expected any of rotate, shift"),
        (["--transform", "noise=3"], "at most 1"),
    ],
)  # fmt: skip
def test_impossible_settings_are_one_clear_error(flags, said, capsys):
    np.savez("other.npz", x=np.zeros((4, 1, 8, 8), np.float32), y=np.arange(4))
    assert run(["assess", "mnist-cnn", "mnist-mini", "-n", "4", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_sheet_shows_the_learned_patch_of_a_run_with_one(capsys):
    learned = "{use: AdversarialPatch, steps: 1, fits: 1}"
    for n, name in ((1, "one"), (2, "two")):
        attacks = f"attacks=[{', '.join([learned] * n)}]"
        threat = "patch:5x5,at=centre,printable=default"
        assert run(["assess", "mnist-cnn", "mnist-mini", "-n", "2", "--threat", threat, "--set", attacks, "-q",
                    "--fit", "mnist-mini", "--run", name]) == 0  # fmt: skip
        capsys.readouterr()
        code = run(["report", name, "-o", f"{name}.pdf", "--print-size", "60cm"])
        assert (code, Path(f"{name}.pdf").exists()) == ((0, True) if n == 1 else (2, False))
    assert "has 2 learned patches" in capsys.readouterr().err
