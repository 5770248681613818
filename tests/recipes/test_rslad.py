"""Robust distillation: what is learned from a teacher, and how the teacher is opened."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks import PGD
from holdfast.cli.measure import refuse_functions_of_config
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Placeholder, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import RSLAD
from holdfast.recipes.rslad import SoftLabels
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner
from holdfast.testing import fakes
from holdfast.verbs.harden import _candidate
from holdfast.verbs.settings import Harden

NET = """
from torch import nn
from holdfast.core.model import Bounds, Classifier

def make(classes=3, high=1.0, features=12):
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(features), int(classes)))
    return net if float(high) == 1 else Classifier(net, bounds=Bounds(0.0, float(high)))
"""
HOW = Training(epochs=1, batch=32)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return "net.py:make"


def data(n=700):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 2, 2, generator=rng), torch.arange(n) % 3


def distilled(teacher, **settings):
    torch.manual_seed(0)
    recipe = {"use": "rslad", "teacher": teacher, "steps": 1, "training": {"batch": 32}}
    if "budget" not in settings:
        recipe["training"]["epochs"] = 1
    return holdfast.harden(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), data(60), "linf:0.1", recipe,
        fit=data(), suite=[PGD(steps=2)], doubts=False, n=60, **settings,
    )  # fmt: skip


def test_the_loss_is_the_divergence_from_the_teacher_at_attacked_and_clean_inputs():
    student, teacher, batch = fakes.network(1).requires_grad_(), fakes.network(0), fakes.examples(n=8)
    x_adv = (batch.x + 0.05).clamp(0, 1)
    recipe, learner = RSLAD(alpha=0.75), Learner(student, student, ThreatModel(Linf(0.1)))
    value, _ = recipe.taught_loss(learner, batch, x_adv, labels=SoftLabels(teacher))
    p = teacher(batch.x).softmax(1)
    attacked, clean = ((p * (p.log() - student(x).log_softmax(1))).sum(1).mean() for x in (x_adv, batch.x))
    torch.testing.assert_close(value, 0.75 * attacked + 0.25 * clean)


def test_no_label_changes_the_training_and_the_teacher_answers_once_for_a_batch():
    model, examples = fakes.network(1).requires_grad_(), fakes.examples(n=24)
    asked = []

    class Asked(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return fakes.network(0).net(x)

    recipe = RSLAD(steps=2, training=Training(epochs=2, batch=8), opened=Classifier(Asked()))
    ends = [
        list(recipe(model, replace(examples, y=y), ThreatModel(Linf(0.05)), rng=Draws(0)))[-1]
        for y in (examples.y, torch.full_like(examples.y, -1))
    ]
    assert asked == [8] * 12
    assert all(torch.equal(value, ends[1].tensors[name]) for name, value in ends[0].tensors.items())


def test_the_teacher_is_part_of_the_identity_of_the_run(teacher, tmp_path):
    result = distilled(teacher, run="first")
    assert result.card["settings"]["teacher"] == teacher and "opened" not in result.card["settings"]
    configs = [json.loads((tmp_path / "first" / "run.json").read_text())["config"]]
    (tmp_path / "net.py").write_text(NET.replace("nn.Flatten()", "nn.Flatten(1)"))
    distilled(teacher, run="second")
    configs.append(json.loads((tmp_path / "second" / "run.json").read_text())["config"])
    digests = [config.pop("teacher") for config in configs]
    assert digests[0] != digests[1] and configs[0] == configs[1]


@pytest.mark.parametrize(
    ("teacher_of", "message"),
    [
        ("net.py:make,classes=4", "the teacher net.py:make has 4 classes, but the model has 3"),
        ("net.py:make,high=255", "the teacher net.py:make takes inputs from 0 to 255, the model from 0 to 1"),
        ("net.py:make,features=27", r"fails on inputs of shape \(3, 2, 2\)"),
        ("http://localhost:1/predict", "the teacher .* is behind a server, and its answers are needed"),
        (",arch=net.py:make", "the teacher .* has no address"),
        ("net.py:make,classes=3,classes=4", "the teacher .* contains classes twice"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, teacher_of, message):
    with pytest.raises(UsageError, match=message):
        distilled(teacher_of)


def test_a_missing_teacher_is_refused(teacher):
    with pytest.raises(UsageError, match="learns from a robust teacher") as refused:
        distilled("")
    assert [remedy.argument for remedy in refused.value.remedies] == ["recipe.teacher", "recipe"]
    assert isinstance(refused.value.remedies[0].value, Placeholder)


def test_a_budget_below_an_epoch_is_refused_with_one_that_fits(teacher):
    with pytest.raises(UsageError, match="budget"):
        distilled(teacher, budget="0.01s")


def test_the_code_of_a_teacher_in_a_configuration_must_be_repeated():
    recipe = {"use": "rslad", "teacher": "t.safetensors,arch=net.py:make"}
    settings = Harden(model="mnist-cnn", data="mnist-mini", recipe=recipe)
    with pytest.raises(
        UsageError, match=r"refers to code \(recipe.teacher: t.safetensors,arch=net.py:make\)"
    ):
        refuse_functions_of_config(settings, ())
    refuse_functions_of_config(settings, ("recipe.teacher=t.safetensors,arch=net.py:make",))


def test_an_opened_teacher_is_refused_in_a_run_because_its_digest_is_unknown():
    with pytest.raises(UsageError, match="give its file instead"):
        _candidate("rslad", RSLAD(opened=Classifier(nn.Flatten())))
