"""Certification of models of texts from the command line: reports, stored runs and refusals."""

import json
from pathlib import Path

import pandas as pd
import pytest

from holdfast.cli.app import run

sklearn = pytest.importorskip("sklearn")

MODEL = """
def keywords(texts):
    rows = []
    for text in texts:
        words = text.lower().split()
        spam = sum(word in ("win", "cash", "prize") for word in words)
        rows.append([0.5, float(spam)])
    return rows


def make():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["nice lunch today", "see you home", "win cash prize", "cash prize now"] * 3
    return make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, ["ham", "ham", "spam", "spam"] * 3)


def function():
    return keywords


def longest():
    return lambda texts: [[0.5, float(len(text.split()) > 8)] for text in texts]
"""
HAM = "see you at home and thanks for the nice lunch we had today"
SPAM = "win cash prize win cash prize win cash prize win cash prize"
MIXED = "win cash prize see you at home and thanks for the lunch"
SYNONYMS = {"synonyms": {"win": ["gain"], "cash": ["money"], "lunch": ["meal"]}, "insert": ["hello"]}
EDITS = "text:edits=1,words=1"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, in_this_process):
    """A folder with a model and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("spam.py").write_text(MODEL)
    pd.DataFrame({"label": ["ham", "spam", "spam"], "text": [HAM, SPAM, MIXED]}).to_csv(
        "sms.csv", index=False
    )
    Path("words.json").write_text(json.dumps(SYNONYMS))


def certify(model, threat, *flags):
    return run(["certify", f"spam.py:{model}", "sms.csv", "--label", "label", "--threat", threat, *flags])


@pytest.mark.parametrize("threat", [EDITS, "text:synonyms=1,file=words.json"])
def test_masking_certifies_the_smoothed_classifier_and_its_run_is_verified_and_reported(threat):
    flags = ["--method", "masking", "--keep", "0.2", "--draws", "500", "--run", "first", "-o", "a.json"]
    assert certify("function", threat, *flags, "-o", "a.html") == 0
    assert run(["verify", "first"]) == 0
    content = json.loads(Path("a.json").read_text())
    results = content["certification"]
    assert results["certified"] == 2 and results["n"] == 3
    assert results["statistical"]["method"] == "masking" and results["statistical"]["keep"] == 0.2
    assert content["model"]["name"].startswith("smoothed classifier, keep = 0.2, on top of")
    assert any("keep 20 % of the words" in note for note in content["notes"])
    assert certify("function", threat, *flags, "--resume") == 0


def test_substitutions_are_the_method_for_a_linear_model_under_synonyms():
    flags = ["--run", "first", "-o", "a.json"]
    assert certify("make", "text:synonyms=1,file=words.json", *flags) == 0
    assert run(["verify", "first"]) == 0
    results = json.loads(Path("a.json").read_text())["certification"]
    assert results["certified"] == 2 and results["statistical"] is None
    assert [row["name"] for row in results["rows"]] == ["substitutions", "attacks"]
    assert results["attacked_certified"] == 2
    assess = ["assess", "spam.py:make", "sms.csv", "--label", "label", "--certify"]
    assert run([*assess, "--threat", "text:synonyms=1,file=words.json"]) == 0


BAD = [
    ("make", EDITS, [], "--method masking"),
    ("function", "text:synonyms=1,file=words.json", [], "--method masking"),
    ("function", EDITS, [], "--method masking"),
    ("function", "linf:0.1", ["--method", "masking"], "certifies changed words of texts"),
    ("function", EDITS, ["--method", "crown"], "--method masking"),
    ("function", EDITS, ["--keep", "0.3"], "--method masking"),
    ("function", EDITS, ["--method", "masking", "--sigma", "1"], "sigma"),
    ("function", EDITS, ["--method", "masking", "--keep", "0.6"], "--keep 0.4"),
    ("function", EDITS, ["--method", "masking", "--mask", "two words"], "one word was expected"),
    ("function", EDITS, ["--method", "masking", "--geometry", "2"], "computes bounds of a network"),
    ("function", "text:edits=1,words=9", ["--method", "masking"], "allow fewer changed words"),
    ("function", "text:inserts=1,file=words.json", ["--method", "masking"], "appends words"),
    ("function", "text:inserts=1,file=words.json", [], "appends words"),
]


@pytest.mark.parametrize(("model", "threat", "flags", "message"), BAD)
def test_what_is_not_covered_is_refused_with_what_to_do(model, threat, flags, message, capsys):
    assert certify(model, threat, *flags) in (2, 3)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--method", "masking"]])
def test_a_server_is_refused_with_what_to_give_instead(flags, capsys):
    flags = ["--label", "label", "--threat", EDITS, "--allow-host", "localhost:1", *flags]
    assert run(["certify", "http://localhost:1/predict", "sms.csv", *flags]) == 2
    assert "a function from a list of strings" in capsys.readouterr().err
