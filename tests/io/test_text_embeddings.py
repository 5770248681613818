"""Synonyms from the embeddings of a folder: nearest whole words within the similarity, stored with the constraint."""

import json

import pytest
import torch
from safetensors.torch import save_file

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.texts_of_users import text_edits
from holdfast.threats.parsing import parse_threat
from holdfast.threats.text_edits import TextEdits

ANGLES = {
    "[CLS]": 0.0,
    "good": 0.0,
    "great": 0.2,
    "fine": 0.5,
    "bad": 3.0,
    "Good": 0.01,
    "##ish": 0.0,
    "x": 0.0,
}
"""Angle of the embedding of each token; the cosine of 0.2 is 0.98, that of 0.5 is 0.88."""


def folder(path, vocab, model="WordPiece", tensor="bert.embeddings.word_embeddings.weight"):
    path.mkdir(exist_ok=True)
    angles = torch.tensor(list(ANGLES.values()))
    rows = torch.stack((angles.cos(), angles.sin()), 1) * torch.arange(1.0, 1 + len(angles))[:, None]
    save_file({tensor: rows}, path / "model.safetensors")
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": model, "vocab": vocab}}))
    return path


@pytest.fixture
def words(tmp_path):
    return folder(tmp_path / "model", {token: place for place, token in enumerate(ANGLES)})


def synonyms(path, similarity=None):
    return text_edits(synonyms=2, file=str(path), similarity=similarity).lists["synonyms"]


def test_words_within_the_similarity_are_synonyms_the_nearest_first(words):
    listed = synonyms(words)
    assert listed["good"] == ["great", "fine"] and listed["great"] == ["Good", "good", "fine"]
    assert "bad" not in listed and "x" not in listed and not {"[CLS]", "##ish", "ish"} & {*listed}
    assert synonyms(words, 0.97) == {"good": ["great"], "great": ["Good", "good"], "Good": ["great"]}


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_words_begin_with_the_mark_of_the_tokenizer(tmp_path, mark):
    tokens = [mark + token if token != "fine" else token for token in ANGLES]
    listed = synonyms(folder(tmp_path / "model", [[token, 0.0] for token in tokens], "Unigram"))
    assert listed["good"] == ["great"]


def test_the_synonyms_are_stored_with_the_threat_and_allow_its_texts(words, tmp_path):
    text = f"text:synonyms=1,similarity=0.9,file={words}"
    constraint = parse_threat(text).opened().constraint
    assert constraint.similarity == 0.9 and constraint.lists["synonyms"]["good"] == ["great"]
    (words / "model.safetensors").unlink()
    assert TextEdits(**json.loads(json.dumps(dict(constraint.limits)))) == constraint


def test_changed_files_give_changed_synonyms(words):
    assert "great" in synonyms(words)["good"]
    folder(words, {token.replace("great", "nicest"): place for place, token in enumerate(ANGLES)})
    assert "nicest" in synonyms(words)["good"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda path: (path / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda path: folder(path, {"good": 9}), "no matrix"),
        (lambda path: folder(path, {"good": 1, "bad": 4}), "smaller similarity"),
        (lambda path: folder(path, {"good": 1}, tensor="head.weight"), "JSON file"),
    ],
)
def test_a_folder_without_synonyms_is_refused(words, change, expected):
    change(words)
    with pytest.raises(TargetError, match=expected):
        synonyms(words)


def test_a_similarity_needs_a_folder_and_synonyms(words, tmp_path):
    (tmp_path / "w.json").write_text('{"synonyms": {"good": ["great"]}}')
    for limits in ({"synonyms": 1, "file": str(tmp_path / "w.json")}, {"edits": 1, "words": 1}):
        with pytest.raises(UsageError, match="file=FOLDER"):
            text_edits(**limits, similarity=0.8)
    for similarity in ("0", "1.5", "high"):
        with pytest.raises(UsageError, match="at most 1"):
            parse_threat(f"text:synonyms=1,similarity={similarity},file={words}")
