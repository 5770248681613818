"""Hardening of models of texts from the command line: the recipe, the new model, its certificates, and refusals."""

import json
from pathlib import Path

import pandas as pd
import pytest

from holdfast.cli.app import run

sklearn = pytest.importorskip("sklearn")

MODEL = """
import torch


def make():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["nice lunch today", "see you home", "win cash prize", "cash prize now"] * 3
    return make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, ["ham", "ham", "spam", "spam"] * 3)


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 2)

    def forward(self, texts):
        rows = [[sum(map(ord, word)) % 64 for word in text.split()] for text in texts]
        return torch.stack([self.embedding(torch.tensor(row)).mean(0) for row in rows])


def network():
    torch.manual_seed(0)
    return Words()


def function():
    words = network()
    return lambda texts: words(texts).detach()
"""
WORDS = {"ham": ("see", "you", "home", "lunch", "nice"), "spam": ("win", "cash", "prize", "now", "claim")}
THREAT = "text:edits=1,words=1"
HARDEN = ("--fit", "train.csv", "--label", "label", "--threat", THREAT)
SETTINGS = ("recipe.keep=0.4", "recipe.training.epochs=2", 'recipe.mask=""')


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, in_this_process):
    """A folder with models and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("spam.py").write_text(MODEL)
    rows = []
    for k in range(506):
        label = ("ham", "spam")[k % 2]
        words = WORDS[label]
        rows.append((label, " ".join([*(words[(k // 2 + j) % 5] for j in range(7)), f"w{k}"])))
    frame = pd.DataFrame(rows, columns=["label", "text"])
    frame[:500].to_csv("train.csv", index=False)
    frame[500:].to_csv("sms.csv", index=False)


def harden(model, *flags):
    settings = (part for setting in SETTINGS for part in ("--set", setting))
    flags = flags or ("--recipe", "masked-words", *settings)
    return run(["harden", f"spam.py:{model}", "sms.csv", *HARDEN, *flags, "--run", "run", "-o", "new/"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["make", "network"])
def test_the_new_model_opens_again_and_its_run_is_verified_and_reported(model, capsys):
    assert harden(model) == 0
    assert run(["report", "run", "-o", "report.json"]) == 0
    card = json.loads(Path("new/card.json").read_text())
    assert card["recipe"] == "masked-words" and card["threat"] == THREAT
    assert card["advice"]["recipe"] is None and card["advice"]["eps"] is None
    command = card["opened_by"].split()[1:]
    assert run([*command, "-o", "again.json"]) == 0
    again = json.loads(Path("again.json").read_text())
    for metric in ("clean_accuracy", "robust_accuracy"):
        assert again["metrics"][metric]["value"] == card["after"]["metrics"][metric]["value"]
    assert not any("prefix" in note for note in again["notes"])
    flags = ["--method", "masking", "--keep", "0.4", "--mask", "", "--draws", "500", "-o", "proved.json"]
    assert run(["certify", *command[1:], *flags]) == 0
    assert json.loads(Path("proved.json").read_text())["certification"]["n"] == 6


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("function", (), "hides its weights"),
        ("network", ("--recipe", "pgd"), "models are trained by masked-words and standard"),
        ("network", ("--budget", "1min"), "the recipe is auto; against such a threat, models are trained by"),
        ("network", ("--recipe", "masked-words", "--set", "recipe.mask=a b"), "one word was expected"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(model, flags, message, capsys):
    assert harden(model, *flags) in (2, 3)
    assert message in capsys.readouterr().err


def test_the_recipe_needs_a_threat_on_texts(capsys):
    flags = ["--threat", "linf:0.1", "--recipe", "masked-words"]
    assert run(["harden", "mnist-cnn", "mnist-mini", *flags]) == 2
    assert "the recipe masked-words is for threats such as text:" in capsys.readouterr().err
