"""The command certify, and assess with --certify, end to end."""

import csv
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli.app import run
from holdfast.core.errors import UsageError
from holdfast.reports.json_schemas import summary_schema

pytestmark = pytest.mark.usefixtures("elsewhere")


NET = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
"""
FEW = ["net.py:make", "few.npz", "--threat", "linf:0.01"]
SMOOTH = ["mnist-cnn", "mnist-mini", "--method", "smoothing"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a small network and six examples that it classifies correctly."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    np.savez("few.npz", x_test=x.numpy(), y_test=scope["make"]()(x).argmax(1).numpy())
    return tmp_path


@pytest.mark.slow
def test_a_certification_is_printed_stored_and_reported_again(capsys):
    outputs = [word for name in ("r.html", "r.json", "r.md", "r.csv") for word in ("-o", name)]
    gate = ["--gate", "certified_accuracy >= 0.2", "--method", "ibp"]
    assert run(["certify", *FEW, *gate, "--run", "run", *outputs]) == 0
    printed = capsys.readouterr()
    assert "certification: 6 examples, linf:0.01" in printed.out
    assert "are certified under linf:0.01" in printed.err
    content = json.loads(Path("r.json").read_text())
    results = content["certification"]
    assert [row["name"] for row in results["rows"]] == ["ibp", "attacks"]
    assert results["certified"] + results["broken"] + results["unknown"] == 6
    assert content["metrics"]["certified_accuracy"]["value"] == results["certified"] / 6
    assert content["verb"] == "certify"
    with Path("r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["certified"] == "true" for row in rows) == results["certified"]
    assert sum(row["certification"] == "unknown" for row in rows) == results["unknown"]
    assert {row["certified_by"] for row in rows if row["certified"] == "true"} == {"ibp"}
    assert 'id="certification"' in Path("r.html").read_text()
    assert "### Certification" in Path("r.md").read_text()
    assert run(["verify", "run"]) == 0
    assert run(["report", "run", "-o", "again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["certification"] == results
    assert run(["certify", *FEW, *gate, "--run", "run", "--resume"]) == 0


@pytest.mark.slow
def test_the_geometry_of_the_first_examples_is_in_the_report(capsys):
    few = ["certify", *FEW, "--method", "ibp", "--geometry", "2", "--run", "geo"]
    assert run([*few, "-o", "g.json", "-o", "g.html"]) == 0
    geometry = json.loads(Path("g.json").read_text())["geometry"]
    assert [len(row["slices"]) for row in geometry["rows"]] == [2, 2]
    assert all(0 < row["lower"] <= row["upper"] for row in geometry["rows"])
    assert 'id="geometry"' in Path("g.html").read_text()
    jsonschema.validate(json.loads(Path("g.json").read_text()), summary_schema())
    assert run(["report", "geo", "-o", "again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["geometry"] == geometry
    assert run(["verify", "geo"]) == 0
    capsys.readouterr()
    assert run([*few[:-3], "3", "--run", "geo", "--resume"]) == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_smoothing_certifies_the_smoothed_classifier(capsys):
    few = [*FEW[:2], "--threat", "l2:0.05", "--method", "smoothing", "--sigma", "0.1", "--draws", "200"]
    assert run(["certify", *few, "--run", "smooth", "-o", "s.json"]) == 0
    assert "for the smoothed classifier" in capsys.readouterr().err
    content = json.loads(Path("s.json").read_text())
    jsonschema.validate(content, summary_schema())
    assert content["model"]["name"] == "smoothed classifier, σ = 0.1, on top of net.py:make"
    assert content["certification"]["statistical"]["draws"] == 200


def test_an_assessment_shows_certified_beside_robust_accuracy(capsys):
    assert run(["assess", *FEW, "--certify", "--suite", "quick", "--no-doubts", "-o", "a.json"]) == 0
    printed = capsys.readouterr()
    assert "≤ robust accuracy" in printed.out
    content = json.loads(Path("a.json").read_text())
    assert [row["name"] for row in content["certification"]["rows"][:2]] == ["ibp", "crown"]
    assert content["metrics"]["certified_accuracy"]["value"] <= content["metrics"]["robust_accuracy"]["value"]
    assert content["verb"] == "assess"


@pytest.mark.slow
def test_the_python_function_has_the_same_result():
    result = holdfast.certify("net.py:make", "few.npz", "linf:0.01", "ibp", gates=["clean_accuracy >= 0.1"])
    assert result.gates[0]
    assert result.evidence["certified"].any()
    with pytest.raises(UsageError, match="there is no method 'crow'; did you mean 'crown'"):
        holdfast.certify("mnist-cnn", "mnist-mini", "linf:0.01", "crow")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["http://localhost:9/x", "mnist-mini"], "is a server, and bounds are computed from the operations"),
        (
            ["mnist-cnn", "mnist-mini", "--threat", "l0:3"],
            "proved under linf, l2, l1, patch, table, text, training-set and observations only",
        ),
        (
            ["mnist-cnn", "mnist-mini", "--threat", "l2"],
            "has no eps, which is to be proved; give --threat l2:0.1",
        ),
        (["mnist-cnn", "mnist-mini", "--threat", "linf:0"], "under eps 0 there is nothing to prove"),
        (["mnist-cnn", "mnist-mini", "--threat", "linf:0.1,goal=targeted:3"], "leave goal=targeted:3 out"),
        (["mnist-cnn", "mnist-mini", "--method", "crwon"], "did you mean 'crown'?"),
        (["mnist-cnn", "mnist-mini", "--sigma", "0.5"], "--sigma concerns randomised smoothing"),
        ([*SMOOTH, "--threat", "l2:0.5"], "sigma is missing, the standard deviation of the noise"),
        ([*SMOOTH, "--threat", "l2:0.5", "--sigma", "0"], "--sigma is '0'; expected more than 0"),
        ([*SMOOTH, "--threat", "l2:0.5", "--sigma", "0.5", "--draws", "9"], "give --draws 41"),
        ([*SMOOTH, "--sigma", "0.5"], "certifies l2 only; give --threat l2:"),
        ([*SMOOTH, "--sigma", "0.5", "--geometry", "3"], "--geometry computes bounds of a network"),
        (["mnist-cnn", "mnist-mini", "--timeout", "0"], "timeout is '0'; expected a duration"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(arguments, message, capsys):
    assert run(["certify", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not Path("holdfast-runs").exists()
