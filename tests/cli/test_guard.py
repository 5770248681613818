"""`holdfast init --guard`, `calibrate` and `assess --guard`: from an empty folder to a measured detector."""

import json
from pathlib import Path

import pytest
import yaml

from holdfast.cli.app import run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_guard_is_written_checked_calibrated_and_assessed(capsys):
    assert run(["init", "--guard"]) == 0
    assert run(["init", "--guard"]) == 2
    assert run(["validate", "guard.yaml"]) == 0
    assert "guard.yaml is valid for guard\nnote: not checked" in capsys.readouterr().err
    Path("enforced.yaml").write_text(Path("guard.yaml").read_text().replace("mode: observe", "mode: enforce"))
    assert run(["validate", "enforced.yaml"]) == 0
    shown = capsys.readouterr().err
    assert "note: the rule queries only reports" in shown and "note: the rule energy only reports" in shown
    content = yaml.safe_load(Path("guard.yaml").read_text())
    assert "holdfast calibrate mnist-cnn mnist-mini --guard guard.yaml" in Path("guard.yaml").read_text()
    assert run(["calibrate", "mnist-cnn", "mnist-mini", "--false-positives", "0.001"]) == 2
    assert (
        "are too few for a false-positive rate of 0.1 %, which needs at least 999" in capsys.readouterr().err
    )
    assert run(["calibrate", "mnist-cnn", "mnist-mini", "--guard", "guard.yaml", "-n", "300"]) == 0
    assert (
        "warning: queries: the radius " in (shown := capsys.readouterr().err) and "% (95 % interval" in shown
    )
    del content["rules"]["queries"]
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    calibrated = ["calibrate", "mnist-cnn", "mnist-mini", "--guard", "mine.yaml", "-n", "200"]
    assert run([*calibrated, "--false-positives", "0.05"]) == 0
    shown = capsys.readouterr().err
    assert "energy: fires above " in shown and "wrote mine.calibration.json: " in shown
    assessed = [
        "assess",
        "mnist-cnn",
        "mnist-mini",
        "-n",
        "8",
        "--threat",
        "linf:0.1,queries=50",
        "--suite",
        "fgsm",
        "--no-doubts",
        "-o",
        "r.json",
    ]
    assert run([*assessed, "--guard", "mine.yaml"]) == 0
    summary = json.loads(Path("r.json").read_text())
    assert summary["model"]["guard"] == {"file": "mine.yaml", "rules": ["energy"]}
    assert "rejection_rate" in summary["metrics"]


def test_a_wrong_guard_is_refused_with_its_place(capsys):
    Path("guard.yaml").write_text("rules: {energi: {}}\ninputs: {shape: [1]}\n")
    for command in (["validate", "guard.yaml"], ["calibrate", "mnist-cnn", "mnist-mini"]):
        assert run(command) == 2
        assert "rules: unknown key 'energi'; did you mean 'energy'" in capsys.readouterr().err
    assert run(["calibrate", "mnist-cnn", "mnist-mini", "--guard", "none.yaml"]) == 3
    assert "configuration 'none.yaml' does not exist" in capsys.readouterr().err
