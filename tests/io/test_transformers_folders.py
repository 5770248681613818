"""Folders of transformers: opened offline, identified by their files, assessed from the command line, and refused."""

import json
import shutil
import socket
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from holdfast.cli.app import run
from holdfast.core.batch import encoded
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.io.models.models import Declared, open_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *SPECIAL,
    "good",
    "bad",
    "film",
    "a",
    "the",
    "very",
    "fine",
    "dull",
    "plot",
    "acting",
    "##s",
    "##ing",
]
LETTERS = [letter for each in "abcdefghijklmnopqrstuvwxyz" for letter in (each, f"##{each}")]
TEXTS = ["a good film", "the plot", "very very dull acting and a bad film", "a " * 60]
EDITS = "text:edits=1,words=2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random BERT of one layer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*WORDS, *LETTERS])))
    config = transformers.BertConfig(
        vocab_size=len({*WORDS, *LETTERS}),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        initializer_range=1.0,
        id2label={0: "neg", 1: "pos"},
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        net = transformers.BertForSequenceClassification(config)
    net.save_pretrained(folder)
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may reach a network."""

    def refused(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)


def opened(folder):
    return open_model(str(folder), declared=Declared(texts=True))


def test_logits_are_those_of_transformers_for_texts_of_any_length(tiny):
    transformers = sys.modules["transformers"]
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = opened(tiny).model
    assert model.classes == 2 and model.class_names == ("neg", "pos") and model.access == "scores"
    assert model.net.longest == 24
    with torch.no_grad():
        logits = model(encoded(TEXTS, 200))
        for text, row in zip(TEXTS, logits, strict=True):
            single = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
            torch.testing.assert_close(row, net(**single).logits[0])
        model.net.longest = 5
        assert torch.equal(model(encoded(["a good film"], 30)), model(encoded(["a good film plot"], 30)))


def test_a_copy_computes_in_double_precision_and_leaves_the_model(tiny):
    net, x = opened(tiny).model.net, encoded(TEXTS, 200)
    double = deepcopy(net).double()
    assert double(x.double()).dtype == torch.float64 and net(x).dtype == torch.float32
    torch.testing.assert_close(double(x.double()).float(), net(x))


def test_every_file_identifies_the_model(copy):
    first = opened(copy)
    assert {Path(name).name for name in first.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    (copy / "README.md").write_text("not read")
    assert opened(copy).digest == first.digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert opened(copy).digest != first.digest


def test_opening_draws_nothing_from_the_global_generator(tiny):
    state = torch.random.get_rng_state()
    opened(tiny)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_assessment_of_a_folder_is_stored_and_verified(copy, monkeypatch, in_this_process):
    monkeypatch.chdir(copy.parent)
    Path("films.csv").write_text("label,text\npos,a good film\nneg,a bad film\npos,fine acting\nneg,dull\n")
    flags = ["assess", "model", "films.csv", "--label", "label"]
    assert run([*flags, "--threat", EDITS, "--run", "first", "-o", "a.json"]) == 0
    assert run(["verify", "first"]) == 0
    content = json.loads(Path("a.json").read_text())
    assert content["model"]["how"] == "transformers"
    assert any("the model does not know" in note for note in content["notes"])
    flags_of_training = ["--fit", "films.csv", "--threat", EDITS, "--recipe", "masked-words"]
    assert run(["harden", *flags[1:], *flags_of_training]) == 3
    assert run([*flags, "--threat", "linf:0.1"]) == 2


def damaged(name):
    """Damage the folder in the named way; return the words that the error must contain."""

    def edit(folder, file, **changes):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def split(folder):
        (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")

    def without_tokenizer(folder):
        for file in ("vocab.txt", "tokenizer.json"):
            (folder / file).unlink()

    return {
        "pickled": (pickled, "only pickled weights", "save_pretrained"),
        "split": (split, "weights in several files", "max_shard_size"),
        "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is empty"),
        "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        "no tokenizer": (without_tokenizer, "no tokenizer", "save_pretrained"),
        "code": (lambda folder: edit(folder, "config.json", auto_map={"AutoConfig": "a.B"}), "auto_map"),
        "code of the tokenizer": (
            lambda folder: edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
            "auto_map",
        ),
        "other library": (lambda folder: edit(folder, "config.json", model_type="mine"), "'mine'", "factory"),
        "no head": (
            lambda folder: edit(folder, "config.json", architectures=["BertModel"]),
            "BertModel",
            "classification head",
        ),
        "larger": (lambda folder: edit(folder, "config.json", num_hidden_layers=10**9), "do not fit"),
        "wider": (lambda folder: edit(folder, "config.json", hidden_size=2**20), "do not fit"),
        "labels": (
            lambda folder: edit(folder, "config.json", id2label={"0": "a", "1": "a"}),
            "distinct name",
        ),
        "no object": (lambda folder: (folder / "config.json").write_text("[1]"), "JSON object"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "pickled",
        "split",
        "no weights",
        "empty weights",
        "no config",
        "no tokenizer",
        "code",
        "code of the tokenizer",
        "other library",
        "no head",
        "larger",
        "wider",
        "labels",
        "no object",
    ],
)
def test_a_folder_that_is_not_as_expected_is_refused_with_the_reason(copy, name):
    change, *words = damaged(name)
    change(copy)
    with pytest.raises(TargetError) as caught:
        opened(copy)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_without_a_threat_on_texts_or_transformers_the_remedy_is_stated(tmp_path, monkeypatch):
    with pytest.raises(TargetError, match="has no config.json, but nothing"):
        open_model(str(tmp_path))
    for file in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(UsageError, match="text:edits=2,words=3"):
        open_model(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HoldfastError) as caught:
        opened(tmp_path)
    assert caught.value.on_command_line().endswith('pip install "holdfast-ml[text]"')
