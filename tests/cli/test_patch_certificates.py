"""Certificates against patches from the command line: reports, stored runs, training with masks, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.cli.app import run

MODEL = """
import torch


def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))
    with torch.no_grad():
        net[1].weight[0], net[1].weight[1], net[1].bias[0], net[1].bias[1] = -0.1, 0.1, 3.96, 0.0
    return net


def function():
    import numpy
    net = make()
    return lambda x: net(torch.as_tensor(numpy.asarray(x))).detach().numpy()
"""
PATCH = ("--threat", "patch:2x2")
CERTIFY = ["certify", "bright.py:make", "images.npz"]
USUAL = [*CERTIFY, *PATCH, "--masks", "3"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, in_this_process):
    """A folder with a model of bright and dark images, and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("bright.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    share = np.linspace(0.3, 0.7, 600)
    x = (0.1 * rng.random((600, 1, 6, 6)) + 0.9 * share[:, None, None, None]).astype(np.float32)
    y = (0.05 + 0.9 * share > 0.55).astype(np.int64)
    order = rng.permutation(600)
    test = np.linspace(0, 599, 12).astype(int)
    train = np.setdiff1d(order, test)
    np.savez("images.npz", x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])


def test_the_vote_over_masks_is_certified_by_default_and_its_run_is_verified_and_reported(capsys):
    assert run([*USUAL, "--run", "first", "-o", "a.json", "-o", "a.html"]) == 0
    assert "are certified under patch:2x2, for the vote over masks" in capsys.readouterr().err
    assert run(["verify", "first"]) == 0
    content = json.loads(Path("a.json").read_text())
    results = content["certification"]
    assert content["model"]["name"] == "vote over 9 masks on top of bright.py:make"
    assert [row["name"] for row in results["rows"]] == ["patch-masks", "attacks"]
    assert results["statistical"] is None and results["attacked_certified"] == results["certified"]
    assert 0 < results["certified"] < 12 and results["broken"]
    assert content["metrics"]["certified_accuracy"]["value"] == results["certified"] / 12
    (note,) = (note for note in content["notes"] if "vote over masks" in note)
    assert "9 masks of at most 3x3 pixels" in note and "the middle of the valid range" in note
    assert run([*USUAL, "--run", "first", "--resume"]) == 0
    assert run(["report", "first", "-o", "b.json"]) == 0
    assert json.loads(Path("b.json").read_text())["certification"] == results


def test_a_function_of_arrays_is_certified_by_the_same_masks():
    assert run([*USUAL, "-o", "net.json"]) == 0
    words = [word.replace(":make", ":function") for word in USUAL]
    assert run([*words, "-o", "function.json"]) == 0
    net, function = (
        json.loads(Path(f"{name}.json").read_text())["certification"] for name in ("net", "function")
    )
    assert net["certified"] == function["certified"] and not function["attacked_certified"]


BAD = [
    (["--threat", "patch:7x2"], "does not fit into images of 6x6"),
    (["--threat", "patch:6x6"], "as large as the image"),
    (["--threat", "patch:30%"], "no size in pixels"),
    ([*PATCH, "--masks", "1"], "hides the whole image; give --masks 6"),
    ([*PATCH, "--method", "crown"], "--method patch-masks"),
    (["--threat", "linf:0.1", "--masks", "3"], "concerns patch-masks"),
    (["--threat", "linf:0.1", "--method", "patch-masks"], "--threat patch:4x4"),
    (["--threat", "patch:2x2,goal=targeted:1"], "about every wrong class"),
    ([*PATCH, "--geometry", "2"], "the method is patch-masks, which has none"),
    ([*PATCH, "--sigma", "0.5"], "concerns randomised smoothing"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_what_is_not_covered_is_refused_with_what_to_do(flags, message, capsys):
    assert run([*CERTIFY, *flags]) in (2, 3)
    assert message in capsys.readouterr().err


def test_rows_of_a_table_and_proofs_beside_an_assessment_are_refused(capsys):
    np.savez("rows.npz", x_test=np.zeros((4, 36), np.float32), y_test=np.zeros(4, np.int64))
    assert run(["certify", "bright.py:make", "rows.npz", "--threat", "patch:2x2"]) == 2
    assert "needs images" in capsys.readouterr().err
    assert run(["assess", "bright.py:make", "images.npz", "--threat", "patch:2x2", "--certify"]) == 2
    assert "the vote over masks" in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_is_trained_with_masks_and_then_certified():
    words = ["bright.py:make", "images.npz", "--threat", "patch:2x2"]
    settings = [
        word
        for text in ("masks=3", "tries=2", "cutout=0.3", "training.epochs=2")
        for word in ("--set", f"recipe.{text}")
    ]
    recipe = ["--recipe", "masked-patches", *settings]
    assert run(["harden", *words, *recipe, "--run", "run", "-o", "new/"]) == 0
    card = json.loads(Path("new/card.json").read_text())
    assert card["recipe"] == "masked-patches" and card["settings"]["cutout"] == 0.3
    assert card["change"]["metric"] == "robust_accuracy" and card["advice"]["recipe"] is None
    new = ["new/model.safetensors", "--arch", "bright.py:make"]
    assert run(["certify", *new, "images.npz", *PATCH, "--masks", "3"]) == 0


def test_the_recipe_is_for_patches_only(capsys):
    words = ["harden", "bright.py:make", "images.npz", "--recipe", "masked-patches"]
    assert run([*words, "--threat", "linf:0.1"]) == 2
    assert "the recipe masked-patches is for threats such as patch:" in capsys.readouterr().err
