"""Proofs for changes of the embeddings of one word."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast import Batch, Classifier, ThreatModel
from holdfast.certifiers.branching import BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, GraphProver
from holdfast.certifiers.word_embeddings import on_embeddings
from holdfast.cli.app import run
from holdfast.core.batch import decoded, encoded
from holdfast.core.errors import HoldfastError
from holdfast.core.model import EVERY
from holdfast.io.models.adapting import TextFunction
from holdfast.threats.parsing import parse_threat
from holdfast.threats.stored import threat_from_json, threat_to_json
from holdfast.threats.word_embeddings import WordEmbeddings

VOCABULARY = [a + b for a in "abcd" for b in "xyz"]
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Network(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(len(VOCABULARY), 4)
        self.head = nn.Sequential(*layers)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)

    def words(self, text: str) -> Tensor:
        return torch.tensor([VOCABULARY.index(word) for word in text.split()])

    def forward(self, texts: list[str]) -> Tensor:
        return torch.cat([self.head(self.embedding(self.words(text))[None]) for text in texts])


def certified(net: Network, prover: GraphProver, norm: str, eps: float, batch: Batch) -> Tensor:
    model = Classifier(TextFunction(net), access="scores", batches=EVERY)
    return on_embeddings(prover, model, WordEmbeddings(norm, eps))(batch).certified


def correct(net: Network) -> Batch:
    draws = torch.Generator().manual_seed(1)
    texts = [
        " ".join(VOCABULARY[k] for k in torch.randint(12, (3 + n % 3,), generator=draws)) for n in range(12)
    ]
    with torch.no_grad():
        y = net(texts).argmax(1)
    return Batch(encoded(texts, 20), y, torch.arange(len(texts)))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_text_of_a_linear_network_is_certified_up_to_its_distance(norm: str) -> None:
    net = Network(Mean(), nn.Linear(4, 3)).eval()
    batch, weight = correct(net), net.head[1].weight
    with torch.no_grad():
        logits = net(decoded(batch.x))
        leads = logits.gather(1, batch.y[:, None]) - logits
        sizes = (weight[batch.y][:, None] - weight).norm(p=DUAL[norm], dim=2)
        n_words = torch.tensor([len(text.split()) for text in decoded(batch.x)])
        distance = (leads / sizes).nan_to_num(nan=torch.inf).amin(1) * n_words
    for eps in distance.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist():
        found = certified(net, Crown(), norm, eps, batch)
        assert not (found & (distance < eps)).any()
        assert (found | (distance < 1.001 * eps + 1e-4)).all()


@pytest.mark.parametrize("prover", [IBP(), Crown(), Crown(arithmetic="float32"), BranchAndBound(timeout_s=2)])
def test_no_changed_embedding_of_a_certified_text_has_another_class(prover: GraphProver) -> None:
    net = Network(nn.Linear(4, 6), nn.Tanh(), Mean(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = correct(net)
    for eps in (0.1, 1.0):
        found = certified(net, prover, "l2", eps, batch)
        assert found.any() or eps > 0.5
        for text, y in zip(decoded(batch.take(found).x), batch.y[found], strict=True):
            x = net.embedding(net.words(text)).detach()
            for place in range(len(x)):
                changed = x.expand(500, -1, -1).clone()
                step = torch.randn(500, 4)
                changed[:, place] += eps * step / step.norm(dim=1, keepdim=True)
                assert (net.head(changed).argmax(1) == y).all()


MODEL = """
from tests.certifiers.test_word_embeddings import Mean, Network, nn


def make():
    return Network(Mean(), nn.Linear(4, 2)).eval()


def keywords():
    return lambda texts: [[0.5, float("ax" in text)] for text in texts]
"""


def test_the_command_certifies_embeddings_and_its_run_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.py").write_text(MODEL)
    net = Network(Mean(), nn.Linear(4, 2))
    texts = ["ax by cz", "dx dy", "ay az bx"]
    rows = [f"{int(net([text]).argmax(1))},{text}" for text in texts]
    Path("sms.csv").write_text("\n".join(("label,text", *rows)))
    given = [
        "certify",
        "text.py:make",
        "sms.csv",
        "--label",
        "label",
        "--threat",
        "l2:0.1,on=embeddings,words=1",
    ]
    assert run([*given, "--run", "first", "-o", "a.json"]) == 0
    assert run(["verify", "first"]) == 0
    content = json.loads(Path("a.json").read_text())
    assert content["certification"]["certified"] >= 1
    assert content["threat"]["constraint"] == "l2:0.1,on=embeddings,words=1"
    assert "attacked" not in capsys.readouterr().out
    given[1] = "text.py:keywords"
    assert run(given) == 2
    assert (
        "whose embeddings are not known; give an object with words, embedding and head"
        in capsys.readouterr().err
    )


def test_the_threat_is_read_and_stored() -> None:
    threat = parse_threat("linf:0.1,on=embeddings,words=1")
    assert threat.opened().constraint == WordEmbeddings("linf", 0.1)
    assert threat_from_json(threat_to_json(ThreatModel(WordEmbeddings("l1", 0.5)))).constraint.eps == 0.5
    assert parse_threat(threat.text).constraint == threat.constraint


@pytest.mark.parametrize(
    ("threat", "verb", "given", "message"),
    [
        (
            "l2:0.1,on=embeddings",
            "certify",
            {},
            "and the number of words whose embeddings change, as in l2:0.1,on=",
        ),
        ("l2:0.1,words=1", "certify", {}, "changes of embeddings have a size"),
        ("l2:0.1,on=embeddings,words=2", "certify", {}, "words is '2'; expected 1"),
        ("l2:0.1,on=inputs,words=1", "certify", {}, "on is 'inputs'; expected embeddings"),
        ("l2:0.1,on=embeddings,words=1,access=scores", "certify", {}, "for any attacker: leave access out"),
        (
            "l2:0.1,on=embeddings,words=1",
            "certify",
            {"method": "masking"},
            "method is masking, and the threat is",
        ),
        (
            "l2:0.1,on=embeddings,words=1",
            "assess",
            {},
            "nothing attacks them; prove robustness to them with holdfast",
        ),
    ],
)
def test_wrong_threats_on_embeddings_are_refused(
    threat: str, verb: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(HoldfastError, match=message):
        getattr(holdfast, verb)(lambda texts: [[0.0, 1.0]] * len(texts), (["a b"], [1]), threat, **given)
