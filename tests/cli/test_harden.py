"""Hardening from the command line, end to end: what a user types, and what is said, written and returned."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from holdfast.cli.app import run

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ["--set", "recipe.training.epochs=2"]
JUDGED = ["-n", "40", "--suite", "quick", "--no-doubts"]
PGD = [
    "harden",
    "mnist-cnn",
    "mnist-mini",
    "--threat",
    "linf:0.1",
    "--recipe",
    "pgd",
    "--set",
    "recipe.steps=2",
    *SHORT,
]


def test_a_new_model_is_made_judged_and_opened_by_its_path(capsys):
    assert run([*PGD, *JUDGED, "--run", "r", "-o", "hardened/"]) == 0
    said = capsys.readouterr()
    assert "robust_accuracy" in said.err
    assert sorted(path.name for path in Path("hardened").iterdir()) == [
        "card.json",
        "card.md",
        "curve.svg",
        "model.safetensors",
    ]
    card = json.loads(Path("hardened/card.json").read_text())
    assert card["recipe"] == "pgd"
    assert card["settings"]["steps"] == 2
    assert (
        card["before"]["metrics"]["robust_accuracy"]["value"]
        < card["after"]["metrics"]["robust_accuracy"]["value"]
    )
    assert (
        run(
            [
                "assess",
                "hardened/model.safetensors",
                "mnist-mini",
                "--threat",
                "linf:0.1",
                *JUDGED,
                "-o",
                "a.json",
            ]
        )
        == 0
    )
    again = json.loads(Path("a.json").read_text())
    assert (
        again["metrics"]["robust_accuracy"]["value"] == card["after"]["metrics"]["robust_accuracy"]["value"]
    )


def test_a_run_that_is_told_again_is_the_same(capsys):
    assert run([*PGD, *JUDGED, "--run", "r"]) == 0
    first = capsys.readouterr().err
    assert run([*PGD, *JUDGED, "--run", "r"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run([*PGD, *JUDGED, "--run", "r", "--resume"]) == 0
    assert capsys.readouterr().err == first


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_comes_to_the_same_weights():
    words = [sys.executable, "-m", "holdfast", *PGD, "--set", "recipe.training.epochs=6", *JUDGED]
    subprocess.run([*words, "--run", "whole"], check=True, capture_output=True)
    for _ in range(10):
        started = subprocess.Popen([*words, "--run", "killed", "--resume"], stderr=subprocess.DEVNULL)
        time.sleep(6)
        started.send_signal(signal.SIGKILL)
        started.wait()
    subprocess.run([*words, "--run", "killed", "--resume"], check=True, capture_output=True)
    one, other = (
        safetensors.torch.load_file(f"{place}/checkpoints/last.safetensors") for place in ("whole", "killed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "trade"], "there is no recipe 'trade'; did you mean 'trades'"),
        (["--set", "recipe.betas=3", "--recipe", "trades"], "has no setting 'betas'"),
        (["--set", "recipe.beta=-1", "--recipe", "trades"], "beta"),
        (["--budget", "1s"], "one epoch takes about"),
        (["--budget", "soon"], "expected a duration"),
    ],
)
def test_what_cannot_be_is_refused(capsys, words, said):
    assert run(["harden", "mnist-cnn", "mnist-mini", "--threat", "linf:0.1", *JUDGED, *words]) == 2
    assert said in capsys.readouterr().err


def test_an_eps_beyond_the_box_is_refused(capsys):
    assert run(["harden", "mnist-cnn", "mnist-mini", "--threat", "linf:2", *JUDGED]) == 2
    assert "no two inputs inside the bounds are further apart" in capsys.readouterr().err


def test_attacks_that_are_learned_learn_on_the_training_examples():
    learned = ["-n", "20", "--no-doubts", "--set", "attacks=[{use: Universal, steps: 2}]"]
    assert run([*PGD, *learned, "--set", "recipe.training.epochs=1", "--run", "r"]) == 0
    assert run(["report", "r", "-o", "r.json"]) == 0
    (attack,) = json.loads(Path("r.json").read_text())["attacks"]
    assert attack["forwards"] > 20  # more than the judged examples ask for
