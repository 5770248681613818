"""ONNX files with several inputs: rows of tables, and images beside further values."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.batch import encoded
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.models import Declared, open_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_this_process")
RNG = np.random.default_rng(0)
RULES = """columns:
  job: {type: category, values: [clerk, driver, nurse], change: none}
  age: {type: number, min: 20, max: 60, change: none}
  days: {type: whole, min: 1, max: 40, change: any}
  pay: {type: number, min: 0, max: 10, change: any}
budget: {norm: linf, eps: 0.1}
"""


def linear(path: Path, inputs: dict[str, tuple[int, tuple[int, ...]]], w: np.ndarray, b: np.ndarray) -> str:
    """A linear model of all inputs, given by their types and shapes. A string is 1 if it is `nurse`, else 0."""
    nodes, columns = [], []
    for name, (dtype, _) in inputs.items():
        if dtype == TensorProto.STRING:
            encoder = {"keys_strings": ["nurse"], "values_floats": [1.0], "default_float": 0.0}
            nodes.append(
                helper.make_node("LabelEncoder", [name], [f"{name}_n"], domain="ai.onnx.ml", **encoder)
            )
        else:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_n"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Flatten", [f"{name}_n"], [f"{name}_f"]))
        columns.append(f"{name}_f")
    nodes += [
        helper.make_node("Concat", columns, ["rows"], axis=1),
        helper.make_node("Gemm", ["rows", "w", "b"], ["y"]),
    ]
    values: list[Any] = [
        helper.make_tensor_value_info(name, dtype, ["n", *shape]) for name, (dtype, shape) in inputs.items()
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", w.shape[1]])]
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")]
    graph = helper.make_graph(nodes, "test", values, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return str(path)


def worst(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Whether the smallest margin of a linear model in a box is not positive."""
    broken = np.zeros(len(x), bool)
    for other in range(w.shape[1]):
        slope = (w[:, y] - w[:, [other] * len(y)]).T
        margin = np.where(slope > 0, low * slope, high * slope).sum(1) + b[y] - b[other]
        broken |= (margin <= 0) & (y != other)
    return broken


def table(path: Path, n: int = 80) -> tuple[str, dict[str, np.ndarray]]:
    columns = {
        "pay": RNG.uniform(0, 10, n).round(2),
        "days": RNG.integers(1, 40, n),
        "age": RNG.uniform(20, 60, n).round(1),
    }
    columns["label"] = (columns["pay"] + columns["days"] / 8 + columns["age"] / 8 > 12.5).astype(int)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path), columns


def test_columns_go_to_the_inputs_of_their_names_and_whole_numbers_do_not_change(tmp_path: Path) -> None:
    w = np.array([[0, 0.125], [0, 0.125], [0, 1]], np.float32)
    b = np.array([12.5, 0], np.float32)
    inputs = {
        "age": (TensorProto.FLOAT, (1,)),
        "days": (TensorProto.INT64, (1,)),
        "pay": (TensorProto.DOUBLE, ()),
    }
    address = linear(tmp_path / "m.onnx", inputs, w, b)
    data, columns = table(tmp_path / "t.csv")
    result = holdfast.assess(
        address, holdfast.open_data(data, label="label"), threat="linf:0.1,unit=range", suite=["PGD"]
    )
    x = np.stack([columns[name] for name in inputs], 1).astype(float)
    eps = 0.1 * (x.max(0) - x.min(0)) * [1, 0, 1]
    low, high = np.maximum(x - eps, x.min(0)), np.minimum(x + eps, x.max(0))
    y = columns["label"]
    assert result["clean_accuracy"].value == 1
    assert result.evidence["success"].tolist() == worst(x, y, w, b, low, high).tolist()
    assert any("attacks do not change the further inputs: days" in note for note in result.evidence.notes)
    with pytest.raises(TargetError, match=r"lacks 'days' \(its columns are 'pay', 'age'\)"):
        holdfast.assess(
            address, holdfast.open_data(data, label="label", drop=["days"]), threat="linf:0.1,unit=range"
        )


def test_categories_of_the_rules_go_to_inputs_of_strings(tmp_path: Path) -> None:
    w = np.array([[0, 0.125], [0, 0.125], [0, 1], [0, -3]], np.float32)
    inputs = {
        "age": (TensorProto.FLOAT, (1,)),
        "days": (TensorProto.INT64, (1,)),
        "pay": (TensorProto.FLOAT, (1,)),
        "job": (TensorProto.STRING, (1,)),
    }
    address = linear(tmp_path / "m.onnx", inputs, w, np.array([12.5, 0], np.float32))
    with pytest.raises(UsageError, match=r"has the input job .string, N x 1.; .* threat such as table:rules"):
        open_model(address)
    rows = [("clerk", 40, 20, 5.5), ("nurse", 40, 20, 6.5), ("driver", 40, 40, 9.9), ("nurse", 40, 40, 8)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("job", "age", "days", "pay", "label"), *((*row, 1) for row in rows)])
    (tmp_path / "rules.yaml").write_text(RULES)
    result = holdfast.assess(
        address,
        holdfast.open_data(str(tmp_path / "t.csv"), label="label"),
        threat=f"table:{tmp_path / 'rules.yaml'}",
    )
    # the sum is 13, 11, 19.9 and 15 at first; 3 days fewer and 1 less pay reduce it by 1.375
    assert result.evidence["correct"].tolist() == [True, False, True, True]
    assert result.evidence["success"].tolist() == [True, False, False, False]
    (tmp_path / "rules.yaml").write_text(
        RULES.replace("  days: {type: whole, min: 1, max: 40, change: any}\n", "")
    )
    with pytest.raises(TargetError, match="has the input days .* no column 'days'; the columns are job, age"):
        holdfast.assess(address, str(tmp_path / "t.csv"), threat=f"table:{tmp_path / 'rules.yaml'}")


def token_model(path: Path, inputs: dict[str, int]) -> str:
    """A model that counts the words `good` and `bad` by their tokens, of texts with `[PAD]` behind them."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["y"], keepdims=0),
    ]
    table = np.array([[9, 9], [0, 0.1], [0, 1], [1.5, 0]], np.float32)  # [PAD], others, good, bad
    axes = {"last": np.array([2]), "middle": np.array([1])}
    constants = [numpy_helper.from_array(value, name) for name, value in {"table": table, **axes}.items()]
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["n", size]) for name, size in inputs.items()
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])]
    graph = helper.make_graph(nodes, "test", values, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return str(path)


@pytest.mark.parametrize("size", ["tokens", 4])
def test_texts_are_tokenised_by_the_file_beside_the_model(tmp_path: Path, size: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    address = token_model(tmp_path / "m.onnx", {"input_ids": size, "attention_mask": size})
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match=r"on texts. If it reads the tokens .* put the tokenizer.json"):
        open_model(address, declared=Declared(texts=True))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="so that it is called with texts; assess it with a threat on texts"):
        open_model(address)
    opened = open_model(address, declared=Declared(texts=True))
    texts = ["a good day", "bad", "good good bad film ever bad"]
    last = [1.5, 2.1] if size == 4 else [3, 2.2]  # with four tokens, the last two words are not read
    scores = [[0, 1.2], [1.5, 0], last]
    np.testing.assert_allclose(opened.model(encoded(texts, 30)), scores, rtol=1e-6)
    assert any(name.endswith("tokenizer.json") for name in opened.files)
    result = holdfast.assess(address, (texts[:2], [1, 0]), threat="text:edits=1,words=1")
    assert result.evidence["success"].tolist() == [False, True]


@pytest.mark.parametrize("threat", ["linf:0.1", "l0:2"])
def test_values_beside_an_image_are_arrays_of_the_data_and_do_not_change(tmp_path: Path, threat: str) -> None:
    w, b = RNG.normal(size=(17, 3)).astype(np.float32), np.zeros(3, np.float32)
    w[16] /= 100
    inputs = {"image": (TensorProto.FLOAT, (1, 4, 4)), "age": (TensorProto.FLOAT, (1,))}
    address = linear(tmp_path / "m.onnx", inputs, w, b)
    image, age = RNG.uniform(size=(60, 1, 4, 4)).astype(np.float32), RNG.uniform(20, 60, (60, 1))
    x = np.concatenate((image.reshape(60, -1), age), 1)
    y = (x @ w).argmax(1)
    data = tmp_path / "d.npz"
    np.savez(data, image=image, age=age, y=y)
    result = holdfast.assess(address, str(data), threat=threat, suite=["PGD"])
    if threat == "linf:0.1":
        eps = np.array([0.1] * 16 + [0])
        low, high = np.maximum(x - eps, 0), np.minimum(x + eps, [1] * 16 + [100])
        assert result.evidence["success"].tolist() == worst(x, y, w, b, low, high).tolist()
    assert 0 < int(result.evidence["success"].sum()) < 60
    np.savez(data, image=image, y=y)
    with pytest.raises(
        TargetError, match="the model has the input 'age', and .* no such array; it has image, y"
    ):
        holdfast.assess(address, str(data), threat=threat)
