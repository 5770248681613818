"""A threat on files from the command line and from Python: models, data, rules, runs and bad input."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli.app import run
from holdfast.core.errors import HoldfastError
from holdfast.threats.parsing import parse_threat

onnx = pytest.importorskip("onnx")

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(257, 2)
        with torch.no_grad():
            self.embedding.weight[:] = torch.eye(2)[(torch.arange(257) < 128).long()]

    def forward(self, files):
        rows = [list(content[:24]) + [256] * (24 - len(content[:24])) for content in files]
        return self.embedding(torch.tensor(rows)).mean(1)


def make():
    return Net()


def by_path():
    return lambda files: [[0.0, 1.0] for content in files if open(content)]


def labels():
    return lambda files: ["text" for content in files]
"""
CONTENTS = {
    "high": [bytes(range(160, 200)), b"\xff" * 30],
    "low": [b"a text of low bytes only", b"-" * 33 + b"\0\n"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    for name, contents in CONTENTS.items():
        for number, content in enumerate(contents):
            path = tmp_path / "files" / name / f"{number}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return tmp_path


def onnx_file(path, length=16):
    """A model that counts the bytes below 128 among the first `length` bytes."""
    table = torch.eye(2)[(torch.arange(257) < 128).long()].numpy()
    nodes = [
        onnx.helper.make_node("Gather", ["table", "bytes"], ["rows"]),
        onnx.helper.make_node("ReduceMean", ["rows"], ["scores"], axes=[1], keepdims=0),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "bytes",
        [onnx.helper.make_tensor_value_info("bytes", onnx.TensorProto.INT32, ["n", length])],
        [onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 2])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def config(path, **other):
    sizes = {"beg_size": 8, "mid_size": 0, "end_size": 8, "block_size": 64, "padding_token": 256}
    path.write_text(json.dumps({**sizes, "target_labels_space": ["high", "low"], **other}))


def assess(capsys, *arguments):
    code = run(["assess", *arguments])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_a_model_with_an_embedding_is_broken_by_exactly_as_many_bytes_as_it_takes(folder, capsys):
    code, text = assess(capsys, "net.py:make", "files", "--threat", "bytes:change=13", "--run", "run")
    assert code == 0 and "0.0 % of 4 files survive" in text
    assert (
        "100.0 % of 4 files survive"
        in assess(capsys, "net.py:make", "files", "--threat", "bytes:change=11")[1]
    )
    fixed = [{"starts": "[ -~]", "change": [[0, 4]]}, {"append": True}]
    (folder / "rules.json").write_text(json.dumps(fixed))
    text = assess(capsys, "net.py:make", "files", "--threat", "bytes:change=13,append=9,file=rules.json")[1]
    assert "100.0 % of 4 files survive" in text
    assert run(["verify", "run"]) == 0


def test_an_onnx_model_reads_both_ends_of_files_as_its_configuration_states(folder, capsys):
    onnx_file(folder / "model.onnx")
    config(folder / "config.min.json")
    threat = "bytes:append=8,change=1"
    code, text = assess(capsys, "model.onnx", "files", "--threat", threat, "--workers", "2")
    assert code == 0 and "states that the model reads the first 8 and the last 8 bytes" in text
    assert "0.0 % of 4 files survive" in text
    text = assess(capsys, "model.onnx", "files", "--threat", "bytes:append=7")[1]
    assert "100.0 % of 4 files survive" in text


def test_files_are_attacked_from_python(folder):
    def scores(files):
        return [[float(content[0] > 127), float(content[0] <= 127)] for content in files]

    files = [b"\xff\0\0", b"a\0"]  # zeros at the end are kept
    attacked = holdfast.attack(scores, files, [0, 1], "ByteSearch", "bytes:change=1")
    assert attacked.success.all() and [len(content) for content in attacked.x_adv] == [3, 2]
    assert [content[1:] for content in attacked.x_adv] == [b"\0\0", b"\0"]
    assert np.allclose(attacked.distance, 1)


def test_a_threat_in_a_worker_process_has_the_same_domain():
    for text in ("bytes:change=1", "text:edits=1,words=1"):
        threat = parse_threat(text)
        assert pickle.loads(pickle.dumps(threat)).change.domain is threat.change.domain


RULES = [
    ([{"starts": "nothing", "append": True}], "allow no place in any of the 4 files"),
    ([{"starts": ".", "values": "[a-f]"}], "rule 0 of 'rules.json' allows no place"),
    ([{"start": "PK", "append": True}], "did you mean 'starts'"),
    ([{"format": "zap"}], "one of .*zip.* was expected"),
    ([{"format": "zip", "append": True}], "a format, which states the places, and places of its own"),
    ([{"format": "zip"}], "is not opened by the reader of its format, zip"),
    ([{"change": "(a"}], "no regular expression on bytes"),
    ([{"change": [1, 2]}], "offsets such as"),
    ([{"append": True, "values": "zz"}], "which matches no byte"),
    ("rules", "rules such as"),
    ([], "contains 0 rules"),
    ([{"format": ["zip"]}], "the format of rule 0 of 'rules.json' is"),
    ([{"change": [[-4, 0]]}], "which contains no byte"),
]


@pytest.mark.parametrize(("rules", "error"), RULES)
def test_rules_that_cannot_be_used_are_refused(folder, rules, error):
    (folder / "rules.json").write_text(json.dumps(rules))
    with pytest.raises(HoldfastError, match=error):
        holdfast.assess("net.py:make", "files", threat="bytes:change=1,append=1,file=rules.json")


@pytest.mark.parametrize(
    ("model", "threat", "error"),
    [
        ("net.py:make", "bytes:", "expected any of change, append, insert, file"),
        ("net.py:make", "bytes:file=rules.json", "file"),
        ("net.py:by_path", "bytes:change=1", "if it takes paths, write each content to a temporary file"),
        ("net.py:labels", "bytes:change=1", "return a row for each input"),
        ("mnist-cnn", "bytes:change=1", "a function from a list of bytes to scores"),
        ("model.onnx", "linf:0.1", "give a threat such as bytes:change=16"),
        ("model.onnx", "bytes:change=1", "a file has 24 bytes, and the model reads 32"),
    ],
)
def test_models_and_threats_that_do_not_fit_are_refused(folder, model, threat, error):
    onnx_file(folder / "model.onnx", 32)
    with pytest.raises(HoldfastError, match=error):
        holdfast.assess(model, "files", threat=threat)


def test_empty_files_and_a_configuration_of_another_model_are_refused(folder):
    onnx_file(folder / "model.onnx")
    config(folder / "config.min.json", beg_size=9)
    with pytest.raises(
        HoldfastError, match="states 9 first, 0 middle and 8 last bytes, and the model reads 16"
    ):
        holdfast.assess("model.onnx", "files", threat="bytes:change=1")
    (folder / "config.min.json").write_text("{}")
    with pytest.raises(HoldfastError, match="does not state beg_size"):
        holdfast.assess("model.onnx", "files", threat="bytes:change=1")
    (folder / "files" / "low" / "0.bin").write_bytes(b"")
    with pytest.raises(HoldfastError, match="is empty"):
        holdfast.assess("net.py:make", "files", threat="bytes:change=1")
    shutil.rmtree(folder / "files" / "low")
    with pytest.raises(HoldfastError, match="not available for files"):
        holdfast.harden("net.py:make", "files", fit="files", threat="bytes:change=1")
