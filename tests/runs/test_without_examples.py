"""Runs that store no examples: neither columns, nor documents, nor reports contain an input."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import holdfast
from holdfast.attacks import FGSM
from holdfast.cli.app import run as command
from holdfast.core.catalogue import names
from holdfast.core.errors import UsageError
from runs import fakes, stored

SHAPE = (1, 6, 6)
X = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
NET = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
with torch.no_grad():
    NET[1].weight.copy_(torch.randn(3, 36, generator=torch.Generator().manual_seed(2)))
    Y = NET(X).argmax(1)
SETTINGS = {"threat": "linf:0.2", "n": 20}


def inputs_in(folder):
    """The names of all columns of a run folder that contain an input, whole or changed."""
    return [
        f"{file.relative_to(folder)}: {name}"
        for file in folder.rglob("*.safetensors")
        for name, values in load_file(file).items()
        if len(values) and values[0].numel() == 36
    ]


def assessed(run, **settings):
    return holdfast.assess(NET, (X, Y), suite=FGSM(), run=run, **SETTINGS, **settings)


def certified(run, **settings):
    return holdfast.certify(NET, (X, Y), run=run, **SETTINGS, **settings)


@pytest.mark.parametrize("verb", [assessed, pytest.param(certified, marks=pytest.mark.slow)])
def test_a_run_stores_no_example_and_its_reports_state_so(verb, tmp_path):
    usual = verb(tmp_path / "usual")
    assert inputs_in(tmp_path / "usual") and usual.summary()["examples"]
    result = verb(tmp_path / "run", examples=False)
    assert not inputs_in(tmp_path / "run")
    assert result.summary()["examples"] == [] and result.metrics.keys() == usual.metrics.keys()
    assert result.metrics["robust_accuracy"] == usual.metrics["robust_accuracy"]
    for suffix in names("reports"):
        text = result.write(tmp_path / f"report{suffix}").read_text()
        assert "data:image" not in text
        assert suffix not in (".html", ".json") or "he run stores no examples" in text
    stored = holdfast.report(tmp_path / "run")
    assert "--no-examples" in stored.summary()["reproduce"] and holdfast.verify(tmp_path / "run").complete
    assert verb(tmp_path / "run", examples=False, resume=True).summary() == result.summary()
    with pytest.raises(UsageError, match=r"another configuration \(examples: false"):
        verb(tmp_path / "run", resume=True)


def test_probes_and_passes_outside_the_suite_store_no_example(tmp_path):
    run = tmp_path / "run"
    result = holdfast.assess("mnist-cnn", "mnist-mini", "linf:0.3", "quick", n=5, examples=False, run=run)
    stages = {file.stem: load_file(file) for file in run.glob("*.safetensors")}
    assert "fixed-pgd" in stages and result.evidence.passes
    assert not [
        values
        for columns in stages.values()
        for values in columns.values()
        if values.shape[1:].numel() == 784 and len(values)
    ]


def test_a_hardening_stores_no_example(tmp_path):
    run = stored.hardened(tmp_path / "run", shown=False)
    shapes = [
        (file, name)
        for side in ("before", "after")
        for file in (run / side).glob("*.safetensors")
        for name, values in load_file(file).items()
        if len(values) and values.shape[1:].numel() == fakes.FEATURES
    ]
    assert not shapes
    assert "--no-examples" in holdfast.report(run).summary()["reproduce"]


def test_examples_are_shown_or_stored_only_without_the_option(tmp_path, capsys):
    words = ["mnist-cnn", "mnist-mini", "--threat", "linf:0.3", "-n", "5", "--no-examples"]
    assert command(["assess", *words, "--save-adversarial"]) == 2
    assert "leave out --save-adversarial, or leave out --no-examples" in capsys.readouterr().err
    assert command(["explain", *words, "--index", "3"]) == 2
    assert "the explanation of an example shows it; leave out --no-examples" in capsys.readouterr().err


def test_the_explanation_of_a_model_shows_no_example(tmp_path):
    settings = {"model": "mnist-cnn", "data": "mnist-mini", "threat": "linf:0.3", "n": 20}
    shown = {value: holdfast.Explain(**settings, examples=value).run() for value in (True, False)}
    assert shown[True]["clusters"].pictures and not shown[False]["clusters"].pictures
    assert shown[False].names == shown[True].names
    assert "Pictures and words of examples are left out, as requested." in shown[False].notes
    assert json.loads(shown[False].to_json())["figures"]
