"""The pytest plugin, in pytest runs of its own."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "holdfast.testing.plugin", "--import-mode=importlib")

FAKE = """
import torch
from holdfast.testing.fakes import Constant, examples, labelled, network

MODEL = network()
BATCH = labelled(MODEL, examples(n=60))
DATA = (BATCH.x, BATCH.y)
"""


def run(folder, text, *options):
    (folder / "test_it.py").write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", *OPTIONS, *options, "test_it.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_starting_pytest_imports_no_torch(tmp_path):
    text = """
import sys

def test_it(assert_robust):
    assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
"""
    done = run(tmp_path, text)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_is_found_by_its_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"holdfast": "holdfast.testing.plugin"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    text = f"""{FAKE}
from holdfast.attacks import PGD

SUITE = [PGD(steps=3, restarts=2)]

def test_holds(assert_robust):
    result = assert_robust(MODEL, DATA, threat="linf:0.001", at_least=0.8, suite=SUITE)
    assert len(result.evidence) == 60
    assert result.metrics["robust_accuracy"].low >= 0.8

def test_broken(assert_robust):
    assert_robust(MODEL, DATA, threat="linf:0.3", at_least=0.5, suite=SUITE)

def test_few(assert_robust):
    assert_robust(MODEL, DATA, threat="linf:0.0001", at_least=0.9, n=20, suite=SUITE)

CONSTANT = Constant((3.0, 1.0, 0.0))
ZEROS = (BATCH.x, torch.zeros(60).long())

def test_doubtful(assert_robust):
    assert_robust(CONSTANT, ZEROS, threat="linf:0.1", at_least=0.5, suite=SUITE)

def test_accepted(assert_robust):
    why = {{name: "a constant" for name in ("zero-gradient", "whole-box", "constant")}}
    assert_robust(CONSTANT, ZEROS, threat="linf:0.1", at_least=0.5, suite=SUITE, accept_doubts=why)
"""
    return run(tmp_path_factory.mktemp("outcome"), text, "--tb=short").stdout


def message(outcome, test):
    """What pytest printed of one failed test."""
    assert f"FAILED test_it.py::{test}" in outcome, outcome
    return outcome.split(f"_ {test} _")[1].split("\n____")[0].split("\n=====")[0]


@pytest.mark.slow
def test_a_robust_model_passes_and_its_result_is_returned(outcome):
    assert "3 failed, 2 passed" in outcome, outcome


def test_the_attack_that_broke_a_model_is_named(outcome):
    said = message(outcome, "test_broken")
    assert "AssertionError: robust accuracy under linf:0.3 is 0, 95 % interval 0 to" in said
    assert "n = 60: none of it meets 0.5 (fail)" in said
    assert "clean accuracy: 1" in said
    assert "PGD: broke 60 of the 60 that survived the attacks before" in said
    assert "broken examples: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 50 more" in said
    assert "plugin.py" not in said  # the way through the plugin is nobody's concern


def test_too_few_examples_are_unclear_with_a_reason(outcome):
    said = message(outcome, "test_few")
    assert "(unclear)" in said
    assert "more examples than 20 narrow the interval" in said


def test_an_open_doubt_fails_until_it_is_accepted(outcome):
    said = message(outcome, "test_doubtful")
    assert "but doubts are open: zero-gradient" in said
    assert "to accept it: accept_doubts={'zero-gradient': 'why'}" in said
    assert "narrow the interval" not in said
