"""Bounds over substitutes of words against the enumeration of all replacements."""

import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.certifiers.substitutions import EmbeddingModel, Substitutions
from holdfast.core.batch import Batch, decoded, encoded
from holdfast.core.errors import NoBounds
from holdfast.core.model import EVERY, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.adapting import TextFunction, adapted_text_model
from holdfast.threats.text_edits import TextEdits

VOCABULARY = [a + b for a in "abcd" for b in "xyz"]
SYNONYMS = {"ax": ["bx", "cx"], "ay": ["by"], "az": ["bz", "bx", "dz"], "cy": ["ay"]}
CONTENT = json.dumps({"synonyms": SYNONYMS})


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(VOCABULARY, rng.integers(3, 7))) for _ in range(n)]


def edits(changes):
    return TextEdits(synonyms=changes, file="words.json", content=CONTENT)


def replaced(text, changes):
    """All texts with at most a number of replaced words."""
    words = text.split()
    for places in combinations(range(len(words)), min(changes, len(words))):
        for choice in product(*((words[place], *SYNONYMS.get(words[place], ())) for place in places)):
            copy = words.copy()
            for place, word in zip(places, choice, strict=True):
                copy[place] = word
            yield " ".join(copy)


def pipeline(binary, kind="count", classes=3):
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    data, rng = texts(60, seed=1), np.random.default_rng(2)
    vectoriser = CountVectorizer(binary=binary) if kind == "count" else TfidfVectorizer(norm=None)
    return make_pipeline(vectoriser, LogisticRegression(C=10)).fit(data, rng.integers(classes, size=60))


class Network(nn.Module):
    """A small network over embeddings, with its mean over the words."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(len(VOCABULARY), 4)
        self.head = nn.Sequential(Mean(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)

    def words(self, text):
        return torch.tensor([VOCABULARY.index(word) for word in text.split()])

    def forward(self, batch):
        return torch.cat([self.head(self.embedding(self.words(text))[None]) for text in batch])


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def classifier(model):
    net = adapted_text_model(model).net if not isinstance(model, nn.Module) else TextFunction(model)
    return Classifier(net, access="scores", batches=EVERY)


def checked(model, changes, n=40):
    """The proofs of texts, compared with the classes of all texts with replaced words."""
    net, clean = classifier(model), texts(n)
    with torch.no_grad():
        labels = net(encoded(clean, 48)).argmax(1)
        batch = Batch(encoded(clean, 48), labels, torch.arange(n))
        found = Substitutions().ready(net, batch, ThreatModel(edits(changes)))(batch)
        robust = []
        for text, label in zip(clean, labels, strict=True):
            predictions = net(encoded(list(replaced(text, changes)), 48)).argmax(1)
            robust.append(bool((predictions == label).all()))
    robust = torch.tensor(robust)
    assert not (found.certified & ~robust).any()
    assert not (found.broken & robust).any()
    for text, x_adv, broken in zip(clean, decoded(found.x_adv), found.broken.tolist(), strict=True):
        assert broken == (text != x_adv) and x_adv in {text, *replaced(text, changes)}
    return found, robust


@pytest.mark.parametrize("changes", [1, 2])
@pytest.mark.parametrize("kind", ["count", "tfidf"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_worst_case_of_a_linear_model_is_exact(changes, kind, classes):
    found, robust = checked(pipeline(False, kind, classes), changes)
    assert torch.equal(found.certified, robust) and torch.equal(found.broken, ~robust)
    assert robust.any() and not robust.all()


@pytest.mark.parametrize("changes", [1, 3])
def test_a_linear_model_of_present_words_is_bounded(changes):
    found, robust = checked(pipeline(True), changes)
    assert (found.certified == robust).float().mean() >= 0.9


@pytest.mark.parametrize("changes", [1, 2, 6])
def test_a_network_over_embeddings_is_bounded(changes):
    assert isinstance(Network(), EmbeddingModel)
    found, _ = checked(Network(), changes)
    assert found.certified.any() and found.broken.any()


def test_fewer_changes_give_better_bounds():
    one, _ = checked(Network(), 1)
    six, _ = checked(Network(), 6)
    assert (one.bound >= six.bound - 1e-4).all() and (one.bound > six.bound + 0.1).any()


def test_a_run_certifies_and_breaks_texts_and_does_not_change_the_network(tmp_path):
    model, clean = Network(), texts(12)
    Path(tmp_path / "words.json").write_text(CONTENT)
    threat = f"text:synonyms=2,file={tmp_path / 'words.json'}"
    with torch.no_grad():
        labels = model(clean).argmax(1)
    result = holdfast.certify(model, (clean, labels), threat)
    evidence = result.evidence
    assert evidence["certified"].any() and evidence["success"].any()
    assert not (evidence["certified"] & evidence["success"]).any()
    assert [record.name for record in evidence.proofs] == ["substitutions"]
    assert evidence.proofs[0].confirmed > 0
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


class OtherIds(Network):
    def words(self, text):
        return super().words(text)[:2]


class OtherLogits(Network):
    def forward(self, batch):
        return super().forward(batch) + 1


@pytest.mark.parametrize(
    ("model", "message"), [(OtherIds, "one id was expected for each"), (OtherLogits, "logits must be head")]
)
def test_a_network_that_is_not_as_declared_is_refused(model, message):
    with pytest.raises(NoBounds, match=message):
        checked(model(), 1)


def test_other_models_and_threats_are_refused():
    net, batch = (
        classifier(lambda texts: [[0.0, 1.0]] * len(texts)),
        Batch(encoded(["ax"], 4), torch.tensor([1]), torch.tensor([0])),
    )
    with pytest.raises(NoBounds, match="bounds are computed for an EmbeddingModel"):
        Substitutions().ready(net, batch, ThreatModel(edits(1)))
    with pytest.raises(NoBounds, match="for synonyms only"):
        Substitutions().ready(net, batch, ThreatModel(TextEdits(edits=1, words=1)))
