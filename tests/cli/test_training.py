"""Recipes that need more than a model and its data, from the command line."""

import json
from pathlib import Path

import pytest

from cli.few import FEW, write_few
from holdfast.cli.app import run

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a few training images."""
    monkeypatch.chdir(tmp_path)
    write_few()
    return tmp_path


HARDEN = ["harden", "mnist-cnn", "mnist-mini", "--threat", "linf:0.1", *FEW, "-n", "40", "--suite", "quick"]
SHORT = ["--no-doubts", "--set", "recipe.training.epochs=1", "--set", "recipe.training.lr=0.01"]


@pytest.mark.slow
def test_vat_learns_from_examples_without_labels_and_counts_the_others():
    assert run([*HARDEN, *SHORT, "--recipe", "vat", "--unlabelled", "few.npz", "--run", "r"]) == 0
    (point,) = json.loads(Path("r/card.json").read_text())["curve"]
    assert point["accuracy"] > 0.5  # of those with a label: the others would halve it


@pytest.mark.slow
def test_a_run_states_the_norms_of_its_training():
    others = ["--recipe", "multi-norm", "--set", "recipe.others=l2:1.5,l1:10", "--set", "recipe.steps=1"]
    assert run([*HARDEN, *SHORT, *others, "--run", "r"]) == 0
    config = json.loads(Path("r/run.json").read_text())["config"]
    assert config["settings"]["multi-norm"]["others"] == [
        "l2:1.5",
        "l1:10.0",
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "pgd", "--unlabelled", "mnist-mini"], "uses only labelled ones"),
        (["--recipe", "multi-norm"], "give --set recipe.others=l2:1.5,l1:10"),
        (["--recipe", "mart", "--set", "recipe.training.cutmix=0.5"], "not linear in the label"),
        (
            ["--recipe", "atta", "--set", "recipe.training.cutmix=0.5"],
            "replace a part of the image by another one",
        ),
    ],
)
def test_what_a_recipe_cannot_take_is_refused_before_anything_is_measured(capsys, words, said):
    assert run([*HARDEN, *SHORT, *words, "--run", "r"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("r").exists()
