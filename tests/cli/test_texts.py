"""A threat on texts from the command line and from Python: models, data, reports, runs and bad input."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import holdfast
from holdfast.cli.app import run
from holdfast.core.batch import encoded
from holdfast.core.errors import HoldfastError, TargetError
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.models.adapting import TextFunction, adapted_text_model
from holdfast.io.models.estimators import contents
from holdfast.io.models.transformers_folders import TokenisedTexts, unknown_notes
from holdfast.threats.text_edits import TextEdits

sklearn = pytest.importorskip("sklearn")

MODEL = """
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

HAM = ["nice lunch today", "see you at home", "thanks for lunch", "home by seven ok"] * 3
SPAM = ["free prize now", "win cash now", "call free cash", "claim prize call"] * 3


def make():
    return make_pipeline(CountVectorizer(binary=True), LogisticRegression()).fit(
        HAM + SPAM, ["ham"] * 12 + ["spam"] * 12
    )


def scores(texts):
    return make().predict_log_proba(texts)


def function():
    model = make()
    return lambda texts: model.predict_log_proba(texts)
"""
TEXTS = [
    "nice lunch today",
    "See you\tat home",
    "free prize now",
    "Win cash now",
    "claim prize, call http://x.com/y",
]
LABELS = ["ham", "ham", "spam", "spam", "spam"]
EDITS = "text:edits=1,words=3"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, in_this_process):
    """A folder with a model and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("spam.py").write_text(MODEL)
    pd.DataFrame({"label": LABELS, "text": TEXTS, "length": range(5)}).to_csv("sms.csv", index=False)
    Path("words.json").write_text(json.dumps({"insert": ["home", "lunch"], "synonyms": {"cash": ["money"]}}))


def model():
    namespace = {}
    exec(MODEL, namespace)
    return namespace["make"]()


def robust(subject, data, threat=EDITS, **settings):
    result = holdfast.assess(subject, data, threat=threat, **settings)
    return result.summary()["metrics"]["robust_accuracy"]["value"]


@pytest.mark.parametrize("factory", ["make", "function"])
def test_an_assessment_of_a_pipeline_is_stored_verified_and_reported(factory):
    flags = ["assess", f"spam.py:{factory}", "sms.csv", "--label", "label", "--threat", EDITS]
    assert (
        run(
            [
                *flags,
                "--class-names",
                "ham,spam",
                "--run",
                "first",
                "-o",
                "a.json",
                "-o",
                "a.html",
                "-o",
                "a.md",
            ]
        )
        == 0
    )
    assert run(["verify", "first"]) == 0
    assert run(["report", "first", "-o", "again.json"]) == 0
    content, again = (json.loads(Path(name).read_text()) for name in ("a.json", "again.json"))
    assert content["threat"] == again["threat"] and content["metrics"] == again["metrics"]
    assert content["threat"]["constraint"] == EDITS and content["noun"] == "texts"
    assert "at most 3 words" in content["threat"]["description"][0]
    assert any("the column text" in note for note in content["notes"])
    example = content["examples"][0]
    assert (
        example["kind"] == "text" and example["clean"] in TEXTS and example["clean"] != example["perturbed"]
    )
    assert (
        "".join(part["text"] for part in example["parts"]).replace("[U+200B]", "\u200b")
        == example["perturbed"]
    )
    assert (
        "<mark" in Path("a.html").read_text() and "<summary>Adversarial examples" in Path("a.md").read_text()
    )
    assert run([*flags, "--class-names", "ham,spam", "--run", "first", "--resume"]) == 0


def test_a_run_is_not_resumed_with_another_file_of_words(capsys):
    flags = [
        "assess",
        "spam.py:make",
        "sms.csv",
        "--label",
        "label",
        "--threat",
        "text:inserts=2,file=words.json",
    ]
    assert run([*flags, "--run", "first"]) == 0
    assert run([*flags, "--run", "first", "--resume"]) == 0
    Path("words.json").write_text(json.dumps({"insert": ["home", "now"]}))
    assert run([*flags, "--run", "first", "--resume"]) == 2
    assert "another content of the file words.json" in capsys.readouterr().err


def test_the_digest_of_a_vectoriser_does_not_depend_on_addresses_in_memory():
    one, other = model(), model()
    other[0]._stop_words_id += 1
    assert contents(one) == contents(other) != contents(one[1])


def test_texts_are_read_from_lists_frames_and_files():
    y = np.array([0, 0, 1, 1, 1])
    np.savez("sms.npz", x=np.array(TEXTS), y=y)
    pd.DataFrame({"label": LABELS, "text": TEXTS}).to_parquet("sms.parquet")
    frame = holdfast.open_data(pd.DataFrame({"label": LABELS, "text": TEXTS}), label="label")
    values = {
        robust(model(), (TEXTS, y)),
        robust(model(), (TEXTS, LABELS)),
        robust(model(), frame),
        robust(model(), "sms.npz"),
        robust(model(), holdfast.open_data("sms.parquet", label="label")),
        robust(model(), holdfast.open_data("sms.csv", label="label", x="text")),
        robust(lambda texts: model().decision_function(texts), (TEXTS, y)),
        robust(lambda texts: model().predict_log_proba(texts).tolist(), (TEXTS, y)),
    }
    assert len(values) == 1 and values.pop() < 1


def test_an_attack_returns_texts():
    result = holdfast.attack(model(), TEXTS, LABELS, "TextSearch", EDITS)
    assert result.x_adv.shape == (5,) and result.x_adv.dtype.kind == "U" and result.success.any()
    assert all(changed.split() for changed in result.x_adv)
    assert (result.distance <= 1).all()


class Lengths(nn.Module):
    """A network that is called with a list of strings."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, texts):
        return self.linear(torch.tensor([[float(len(text))] for text in texts]))


def test_a_network_may_be_called_with_strings():
    assert 0 <= robust(Lengths(), (TEXTS, [0, 0, 1, 1, 1])) <= 1


def test_a_pipeline_of_transformers_gives_the_probabilities_of_all_classes(monkeypatch):
    class Pipeline:
        """Answers as `pipeline("text-classification")` does."""

        def __init__(self):
            self.model = SimpleNamespace(config=SimpleNamespace(id2label={0: "NEG", 1: "POS"}))

        def __call__(self, texts, top_k=1, truncation=None):
            assert top_k is None and truncation
            share = [0.9 if "win" in text else 0.2 for text in texts]
            return [[{"label": "POS", "score": p}, {"label": "NEG", "score": 1 - p}] for p in share]

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(Pipeline=Pipeline))
    adapted = adapted_text_model(Pipeline())
    assert adapted.class_names == ("NEG", "POS") and adapted.output == "probability"
    assert robust(Pipeline(), (["win it", "lose it"], ["POS", "NEG"]), "text:edits=1,words=1") == 0.5


@pytest.mark.parametrize(("most", "noted"), [(60, True), (500, False)])
def test_a_model_that_truncates_texts_is_noted(most, noted):
    def scores(texts):
        words = [text.split()[:most] for text in texts]
        return np.array([[sum(k * len(word) for k, word in enumerate(each)), 40.0] for each in words])

    long = " ".join("word" * (1 + k * k % 5) for k in range(100))
    notes = holdfast.assess(scores, ([long, "a b"], [0, 1]), threat="text:edits=1,words=1").summary()["notes"]
    assert any("after the first 60" in note for note in notes) == noted, notes


@pytest.mark.parametrize(("threat", "noted"), [(EDITS, True), ("text:inserts=1,file=words.json", False)])
def test_edited_words_that_a_vectoriser_does_not_know_are_noted(threat, noted):
    notes = holdfast.assess(model(), (TEXTS, LABELS), threat=threat).summary()["notes"]
    found = [note for note in notes if "the model does not know" in note]
    assert len(found) == noted and all("'nice'" in note and "% of the words" in note for note in found)


@pytest.mark.parametrize(("unknown_id", "noted"), [(1, True), (None, False)])
def test_edited_words_that_a_tokenizer_maps_to_its_unknown_token_are_noted(unknown_id, noted):
    class Tokenizer:
        unk_token_id = unknown_id

        def __call__(self, word, *, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [2 if word.isascii() else 1]}

    model = SimpleNamespace(net=TokenisedTexts(None, Tokenizer(), 10, ""))
    edits = TextEdits(1, 1)
    data = as_data((TEXTS, [0, 0, 1, 1, 1]), expected=DeclaredData(edits=edits, lenient=True))
    notes = unknown_notes(model, data, edits)
    assert len(notes) == noted
    assert all("words it knows, such as" in note and "'\\u" in note for note in notes)


def test_doctor_checks_a_model_of_texts_without_the_range_of_its_code_points(capsys):
    assert (
        run(["doctor", "spam.py:make", "sms.csv", "--label", "label", "--x", "text", "--threat", EDITS]) == 0
    )
    printed = capsys.readouterr().out
    assert "accuracy is 100.0%" in printed
    assert "range" not in printed and "scale" not in printed


BAD = [
    (["--threat", "text:edits=0,words=1"], "edits is '0'"),
    (["--threat", "text:edits=1"], "words is the largest number of words"),
    (["--threat", "text:synonyms=2"], "give file=FILE.json"),
    (["--threat", "text:inserts=1,file=absent.json"], "does not exist"),
    (["--threat", EDITS, "--x", "label"], "is the label of"),
    (["--threat", EDITS, "--x", "absent"], "no such column of texts"),
    (["--threat", EDITS, "--drop", "text"], "no such column of texts"),
    (["--threat", EDITS, "--suite", "rand"], "no attack on texts"),
    (["--threat", EDITS, "--bounds", "0,1"], "the inputs are texts"),
    (["--threat", EDITS, "--curve"], "no eps"),
    (["--threat", f"{EDITS},access=labels"], "needs scores"),
    (["--threat", "linf:0.1"], "is not numbers"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_refused(flags, message, capsys):
    assert run(["assess", "spam.py:make", "sms.csv", "--label", "label", *flags]) in (2, 3)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "contains a list"),
        ('{"insrt": []}', "has the key 'insrt'"),
        ('{"insert": []}', "at least one word"),
        ('{"insert": ["a b"]}', "without whitespace"),
        ('{"insert": "ab"}', "at least one word"),
        ('{"synonyms": {"a": ["b"]}}', "has no insert"),
        ('{"synonyms": ["a"]}', "synonyms in"),
        ('{"insert": ["a"], "protect": ["("]}', "no regular expression"),
    ],
)
def test_bad_files_of_words_are_refused(content, message, capsys):
    Path("bad.json").write_text(content)
    flags = ["--label", "label", "--threat", "text:inserts=1,file=bad.json"]
    assert run(["assess", "spam.py:make", "sms.csv", *flags]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", " "], "row 1 of data in memory is empty"),
        (["a\0b", "c"], "contains the character 0"),
        (["a", "\ud800"], "a surrogate"),
        ([1.0, 2.0], "a list of strings"),
    ],
)
def test_bad_texts_are_refused(texts, message):
    with pytest.raises(HoldfastError, match=message):
        holdfast.assess(model(), (texts, [0, 1]), threat=EDITS)


@pytest.mark.parametrize("label", ["spam", 2])
def test_a_function_that_returns_labels_is_refused_with_the_expected_output(label):
    function = TextFunction(lambda texts: [label] * len(texts))
    with pytest.raises(TargetError, match=f"such as {label} .* return a row for each input"):
        function(encoded(["a", "b"], 1))


def test_two_columns_of_texts_need_a_choice(capsys):
    pd.DataFrame({"label": LABELS, "a": TEXTS, "b": TEXTS}).to_csv("two.csv", index=False)
    assert run(["assess", "spam.py:make", "two.csv", "--label", "label", "--threat", EDITS]) == 2
    assert "the columns of texts a, b" in capsys.readouterr().err


def test_rotate_refuses_a_threat_on_texts(capsys):
    assert run(["rotate", "collect", "spam.py:make", "sms.csv", "--threat", EDITS]) == 2
    assert "not available for texts" in capsys.readouterr().err


def test_code_points_are_no_values_that_may_have_another_scale():
    result = holdfast.assess(
        lambda texts: [[0.5, len(text) % 2] for text in texts], (TEXTS, LABELS), threat=EDITS
    )
    doubts = {doubt["name"]: doubt["state"] for doubt in result.summary()["doubts"]}
    assert result.summary()["metrics"]["clean_accuracy"]["value"] < 0.9 and doubts["input"] == "clear"
