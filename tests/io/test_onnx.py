"""The importer against onnxruntime: every operator, whole networks with their gradients, and hostile files."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import holdfast
from benchmarks.field.strings import compared
from holdfast.cli.app import run
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.models import Declared, open_model
from holdfast.io.remote.probing import HWC_NOTE

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from holdfast.io.onnx.opening import OPERATORS, Runtime, WholeNumbers, open_onnx  # noqa: E402
from holdfast.io.onnx.reading import read_onnx  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_this_process")
RNG = np.random.default_rng(0)
N, C, H, W = "n", 3, 6, 7
IMAGE = (N, C, H, W)


def floats(*shape: int) -> np.ndarray:
    return RNG.uniform(0.2, 1, shape).astype(np.float32)


def write(
    path: Path,
    nodes: Sequence[Any],
    constants: dict[str, np.ndarray] | None = None,
    *,
    shape: Sequence[Any] = IMAGE,
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("y",),
) -> str:
    """A model around some nodes, from `x` to `y`, whose shape is left to the runtime."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    inferred = onnx.shape_inference.infer_shapes(model)
    for value, name in zip(inferred.graph.output, outputs, strict=True):
        if not value.type.HasField("tensor_type"):
            value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "columns"]))
    onnx.save(inferred, str(path))
    return str(path)


def op(
    name: str, *constants: np.ndarray, shape: Sequence[Any] = IMAGE, opset: int = 20, **settings: Any
) -> dict[str, Any]:
    """One operator on the input and some constants, its result flattened to a row an example."""
    return {"name": name, "constants": constants, "shape": shape, "opset": opset, "settings": settings}


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


UNARY = [
    *(
        "Abs",
        "Ceil",
        "Celu",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
    ),
    *(
        "Log",
        "Mish",
        "Neg",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
    ),
    *("Tanh", "Dropout"),
]
CASES: dict[str, dict[str, Any]] = {name: op(name) for name in UNARY} | {
    "Gelu tanh": op("Gelu", approximate="tanh"),
    "Elu alpha": op("Elu", alpha=0.3),
    "LeakyRelu alpha": op("LeakyRelu", alpha=0.3),
    "HardSigmoid set": op("HardSigmoid", alpha=0.5, beta=0.1),
    "PRelu": op("PRelu", floats(3, 1, 1)),
    "PRelu one": op("PRelu", floats(1)),
    "Add": op("Add", floats(3, 1, 1)),
    "Sub": op("Sub", floats(1)),
    "Mul": op("Mul", floats(7)),
    "Div": op("Div", floats(3, 6, 7)),
    "Pow": op("Pow", np.array(2.5, np.float32)),
    "Mod": op("Mod", np.array(-0.3, np.float32), fmod=1),
    "Max": op("Max", floats(7), floats(6, 1)),
    "Min": op("Min", floats(7)),
    "Sum": op("Sum", floats(7), floats(3, 1, 1)),
    "Mean": op("Mean", floats(7), floats(3, 1, 1)),
    "Clip": op("Clip", np.array(0.3, np.float32), np.array(0.6, np.float32)),
    "Clip attributes": op("Clip", opset=6, min=0.3, max=0.6),
    "Softmax": op("Softmax", axis=1),
    "Softmax old": op("Softmax", shape=(N, 5), opset=11),
    "LogSoftmax": op("LogSoftmax"),
    "Conv": op("Conv", floats(4, 3, 3, 2), floats(4)),
    "Conv strided": op("Conv", floats(4, 3, 3, 3), strides=[2, 1], pads=[1, 1, 1, 1], dilations=[1, 2]),
    "Conv uneven": op("Conv", floats(4, 3, 3, 3), pads=[0, 1, 2, 1]),
    "Conv grouped": op("Conv", floats(6, 1, 3, 3), floats(6), group=3),
    "Conv same upper": op("Conv", floats(4, 3, 2, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    "Conv same lower": op("Conv", floats(4, 3, 2, 3), auto_pad="SAME_LOWER"),
    "Conv valid": op("Conv", floats(4, 3, 2, 3), auto_pad="VALID"),
    "Conv 1d": op("Conv", floats(4, 3, 3), floats(4), shape=(N, 3, 9), pads=[1, 1]),
    "ConvTranspose": op("ConvTranspose", floats(3, 4, 3, 3), floats(4), strides=[2, 2], pads=[1, 1, 1, 1]),
    "ConvTranspose out": op("ConvTranspose", floats(3, 4, 3, 3), strides=[2, 2], output_padding=[1, 1]),
    "ConvTranspose uneven": op("ConvTranspose", floats(3, 2, 3, 3), pads=[0, 1, 1, 1], group=3),
    "BatchNormalization": op("BatchNormalization", floats(3), floats(3), floats(3), floats(3), epsilon=1e-3),
    "BatchNormalization rows": op("BatchNormalization", *[floats(5)] * 4, shape=(N, 5)),
    "InstanceNormalization": op("InstanceNormalization", floats(3), floats(3)),
    "LayerNormalization": op("LayerNormalization", floats(7), floats(7)),
    "LayerNormalization wide": op("LayerNormalization", floats(3, 6, 7), axis=1),
    "GroupNormalization": op(
        "GroupNormalization", floats(6), floats(6), shape=(N, 6, 4), opset=21, num_groups=2
    ),
    "LRN": op("LRN", shape=(N, 6, 4, 4), size=3, alpha=0.5, beta=0.6, bias=1.5),
    "MaxPool": op("MaxPool", kernel_shape=[3, 2], strides=[2, 2]),
    "MaxPool padded": op("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], ceil_mode=1),
    "MaxPool uneven": op("MaxPool", kernel_shape=[3, 3], pads=[0, 1, 2, 1], dilations=[1, 2]),
    "MaxPool same": op("MaxPool", kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]),
    "AveragePool": op("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    "AveragePool padded": op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "AveragePool counted": op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "AveragePool uneven": op("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1),
    "AveragePool ceil": op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "GlobalAveragePool": op("GlobalAveragePool"),
    "GlobalMaxPool": op("GlobalMaxPool"),
    "Gemm": op("Gemm", floats(5, 4), floats(4), shape=(N, 5)),
    "Gemm transposed": op("Gemm", floats(4, 5), floats(4), shape=(N, 5), transB=1, alpha=0.5, beta=2.0),
    "Gemm scalar bias": op("Gemm", floats(4, 5), floats(1), shape=(N, 5), transB=1),
    "MatMul": op("MatMul", floats(7, 4)),
    "MatMul stacked": op("MatMul", floats(3, 7, 4)),
    "ReduceMean": op("ReduceMean", axes=[2, 3], keepdims=0, opset=13),
    "ReduceMean input": op("ReduceMean", ints(2, -1), keepdims=1),
    "ReduceSum": op("ReduceSum", ints(1)),
    "ReduceMax": op("ReduceMax", ints(2), keepdims=0),
    "ReduceMin": op("ReduceMin", ints(2), keepdims=0),
    "ReduceL1": op("ReduceL1", ints(1)),
    "ReduceL2": op("ReduceL2", ints(1)),
    "ReduceSumSquare": op("ReduceSumSquare", ints(1)),
    "ReduceSum nothing": op("ReduceSum", noop_with_empty_axes=1),
    "Reshape": op("Reshape", ints(0, -1)),
    "Reshape allowzero": op("Reshape", ints(-1, C * H * W), allowzero=1),
    "Reshape parts": op("Reshape", ints(-1, 3, 2, 21)),
    "Flatten": op("Flatten"),
    "Flatten late": op("Flatten", shape=(N, 1, 6, 7), axis=2),
    "Transpose": op("Transpose", perm=[0, 2, 3, 1]),
    "Squeeze": op("Squeeze", ints(1), shape=(N, 1, 5)),
    "Squeeze attribute": op("Squeeze", shape=(N, 1, 5), opset=11, axes=[1]),
    "Unsqueeze": op("Unsqueeze", ints(1, -1)),
    "Unsqueeze attribute": op("Unsqueeze", opset=11, axes=[2]),
    "Slice": op("Slice", ints(1, 0), ints(3, 2**62), ints(1, 2), ints(1, 2)),
    "Slice back": op("Slice", ints(-1), ints(-(2**62)), ints(3), ints(-2)),
    "Slice attributes": op("Slice", opset=9, starts=[1, -3], ends=[2, 100], axes=[1, 3]),
    "Pad": op("Pad", ints(0, 0, 1, 2, 0, 0, 0, 1), np.array(0.5, np.float32)),
    "Pad axes": op("Pad", ints(1, 2), np.array(0.5, np.float32), ints(3)),
    "Pad reflect": op("Pad", ints(0, 0, 1, 2, 0, 0, 0, 1), mode="reflect"),
    "Pad edge": op("Pad", ints(0, 0, 1, 2, 0, 0, 0, 1), mode="edge"),
    "Pad attributes": op("Pad", opset=10, pads=[0, 1, 0, 0, 0, 0, 0, 0], value=0.25),
    "Gather": op("Gather", ints(2, 0, -1), axis=1),
    "Gather one": op("Gather", np.array(-2, np.int64), axis=3),
    "Expand": op("Expand", ints(1, 4, 5), shape=(N, 4, 1)),
    "Tile": op("Tile", ints(1, 2, 1, 2)),
    "Upsample": op("Upsample", np.array([1, 1, 2, 3], np.float32), opset=9),
    "Cast": op("Cast", to=TensorProto.FLOAT),
}


def case_model(path: Path, case: dict[str, Any]) -> str:
    constants = {f"c{i}": array for i, array in enumerate(case["constants"])}
    nodes = [
        helper.make_node(case["name"], ["x", *constants], ["z"], **case["settings"]),
        helper.make_node("Flatten", ["z"], ["y"], axis=1),
    ]
    return write(path, nodes, constants, shape=case["shape"], opset=case["opset"])


@pytest.mark.parametrize("name", CASES)
def test_an_operator_agrees_with_onnxruntime_and_has_gradients(tmp_path: Path, name: str) -> None:
    # open_model itself compares with onnxruntime on batches of one and three, and serves scores where it cannot import.
    opened = open_model(case_model(tmp_path / "m.onnx", CASES[name]))
    assert opened.notes == ()
    assert opened.access == "gradients"
    shape = [2, *CASES[name]["shape"][1:]]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(opened.model(x).square().sum(), x)
    assert torch.isfinite(gradient).all()


def node(name: str, inputs: str, outputs: str, **settings: Any) -> Any:
    return helper.make_node(name, [i.strip(",") for i in inputs.split()], outputs.split(), **settings)


GRAPHS: dict[str, tuple[list[Any], dict[str, np.ndarray], dict[str, Any]]] = {
    "shape arithmetic, as exporters write a flatten": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n", axis=0),
            node("Unsqueeze", "n axis", "n1"),
            node("Concat", "n1 rest", "to", axis=0),
            node("Reshape", "x to", "y"),
        ],
        {"zero": np.array(0, np.int64), "axis": ints(0), "rest": ints(-1)},
        {},
    ),
    "a class token, repeated for the batch": (
        [
            node("Shape", "x", "s"),
            node("Slice", "s zero one", "n"),
            node("Concat", "n size", "to", axis=0),
            node("Expand", "token to", "tokens"),
            node("Concat", "tokens x", "z", axis=1),
            node("Flatten", "z", "y"),
        ],
        {"zero": ints(0), "one": ints(1), "size": ints(1, 5), "token": floats(1, 1, 5)},
        {"shape": (N, 4, 5)},
    ),
    "zeros of the batch's size": (
        [
            node("Shape", "x", "s"),
            node(
                "ConstantOfShape", "s", "zeros", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])
            ),
            node("Add", "x zeros", "y"),
        ],
        {},
        {"shape": (N, 5)},
    ),
    "comparisons and a choice": (
        [
            node("Greater", "x half", "large"),
            node("Less", "x third", "small"),
            node("Or", "large small", "edge"),
            node("Not", "edge", "middle"),
            node("Equal", "x half", "same"),
            node("And", "middle middle", "both"),
            node("Where", "both x half", "a"),
            node("Where", "same a a", "b"),
            node("GreaterOrEqual", "x half", "c"),
            node("LessOrEqual", "x half", "d"),
            node("Where", "c a b", "e"),
            node("Where", "d a e", "y"),
        ],
        {"half": np.array(0.5, np.float32), "third": np.array(0.3, np.float32)},
        {"shape": (N, 5)},
    ),
    "a split and constants inside": (
        [
            node("Split", "x", "a b c", axis=1, num_outputs=3),
            node("Constant", "", "two", value_float=2.0),
            node("Constant", "", "more", value=numpy_helper.from_array(floats(2))),
            node("Mul", "a two", "a2"),
            node("Add", "b more", "b2"),
            node("Concat", "c b2 a2", "y", axis=1),
        ],
        {},
        {"shape": (N, 6)},
    ),
    "an uneven split": (
        [node("Split", "x sizes", "a b", axis=-1), node("Concat", "b a", "y", axis=1)],
        {"sizes": ints(1, 4)},
        {"shape": (N, 5)},
    ),
    "a range and a position": (
        [
            node("Range", "zero five one", "places"),
            node("Cast", "places", "floats", to=TensorProto.FLOAT),
            node("Add", "x floats", "y"),
        ],
        {"zero": np.array(0, np.int64), "five": np.array(5, np.int64), "one": np.array(1, np.int64)},
        {"shape": (N, 5)},
    ),
    "attention": (
        [
            node("MatMul", "x wq", "q"),
            node("MatMul", "x wk", "k"),
            node("Transpose", "k", "kt", perm=[0, 2, 1]),
            node("MatMul", "q kt", "scores"),
            node("Softmax", "scores", "weights"),
            node("MatMul", "weights x", "z"),
            node("Flatten", "z", "y"),
        ],
        {"wq": floats(5, 5), "wk": floats(5, 5)},
        {"shape": (N, 4, 5)},
    ),
    "the place of the smallest, marked on another axis": (
        [
            node("ArgMin", "x", "place", axis=1, keepdims=0),
            node("OneHot", "place five values", "marks", axis=0),
            node("Transpose", "marks", "rows", perm=[1, 0]),
            node("Add", "x rows", "y"),
        ],
        {"five": ints(5), "values": np.array([0.5, 2.0], np.float32)},
        {"shape": (N, 5)},
    ),
    "a one written to the place of the largest": (
        [
            node("ArgMax", "x", "place", axis=1, keepdims=1),
            node("Shape", "place", "s"),
            node("Expand", "one s", "ones"),
            node("Shape", "x", "all"),
            node("ConstantOfShape", "all", "zeros"),
            node("ScatterElements", "zeros place ones", "marks", axis=1),
            node("Add", "x marks", "y"),
        ],
        {"one": np.array(1, np.float32)},
        {"shape": (N, 5)},
    ),
    "the place of the largest": (
        [
            node("ArgMax", "x", "place", axis=1, keepdims=1),
            node("Cast", "place", "float", to=TensorProto.FLOAT),
            node("Add", "x float", "y"),
        ],
        {},
        {"shape": (N, 5)},
    ),
    "an embedding of rounded inputs": (
        [
            node("Round", "x", "r"),
            node("Cast", "r", "i", to=TensorProto.INT64),
            node("Gather", "table i", "e", axis=0),
            node("ReduceMean", "x axis", "m"),
            node("Flatten", "e", "f"),
            node("Add", "f m", "y"),
        ],
        {"table": floats(3, 4), "axis": ints(1)},
        {"shape": (N, 5)},
    ),
    "a number of elements": (
        [node("Size", "c", "n"), node("Cast", "n", "f", to=TensorProto.FLOAT), node("Div", "x f", "y")],
        {"c": floats(5)},
        {"shape": (N, 5)},
    ),
    "resized images": (
        [
            node(
                "Resize",
                "x , scales",
                "a",
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            node("Resize", "x , , sizes", "b", mode="linear", coordinate_transformation_mode="half_pixel"),
            node("Resize", "x , , sizes", "c", mode="linear", coordinate_transformation_mode="align_corners"),
            node("Resize", "x , scales", "d", mode="nearest"),
            node("Sum", "a b c d", "z"),
            node("Flatten", "z", "y"),
        ],
        {"scales": np.array([1, 1, 2, 2], np.float32), "sizes": ints(2, 3, 12, 14)},
        {"shape": (2, 3, 6, 7)},
    ),
    "a batch size written into the file": (
        [node("Conv", "x w", "a"), node("Reshape", "a to", "b"), node("Gemm", "b m", "y")],
        {"w": floats(2, 3, 3, 3), "to": ints(1, 40), "m": floats(40, 4)},
        {"shape": (1, C, H, W)},
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_agrees_with_onnxruntime(tmp_path: Path, name: str) -> None:
    nodes, constants, settings = GRAPHS[name]
    opened = open_model(write(tmp_path / "m.onnx", nodes, constants, **settings))
    assert opened.notes == ()
    assert opened.access == "gradients"
    shape = [5, *settings.get("shape", IMAGE)[1:]]
    assert opened.model(torch.rand(shape)).shape[0] == 5
    assert opened.model(torch.rand(0, *shape[1:])).shape[0] == 0


def test_every_operator_of_the_importer_is_tested() -> None:
    tested = {case["name"] for case in CASES.values()}
    tested |= {step.op_type for nodes, *_ in GRAPHS.values() for step in nodes}
    assert set(OPERATORS) == tested


BYTES: dict[str, tuple[list[Any], dict[str, np.ndarray], int]] = {
    "compared with 0, 1, 2, …": (
        [
            node("Unsqueeze", "x last", "a"),
            node("Expand", "a whole", "b"),
            node("Equal", "b numbers", "c"),
            node("Cast", "c", "marks", to=TensorProto.FLOAT),
        ],
        {"last": ints(-1), "whole": ints(1, 6, 257), "numbers": np.arange(257, dtype=np.int32)[None, None]},
        TensorProto.INT32,
    ),
    "OneHot": (
        [node("OneHot", "x depth marks01", "marks", axis=-1)],
        {"depth": ints(257), "marks01": np.array([-1, 2], np.float32)},
        TensorProto.INT64,
    ),
    "rows of a table": (
        [node("Cast", "x", "i", to=TensorProto.INT64), node("Gather", "table i", "marks")],
        {"table": floats(257, 257)},
        TensorProto.UINT8,
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_whole_numbers_are_looked_up_by_embeddings_with_gradients(tmp_path: Path, name: str) -> None:
    nodes, constants, dtype = BYTES[name]
    nodes = [*nodes, node("MatMul", "marks w", "v"), node("ReduceMax", "v axis", "y", keepdims=0)]
    constants = {**constants, "w": floats(257, 3), "axis": ints(1)}
    path = tmp_path / "m.onnx"
    write(path, nodes, constants, shape=(N, 6), dtype=dtype)
    opened = open_onnx(path, whole_numbers=True)
    assert (opened.access, opened.notes) == ("gradients", ())
    assert isinstance(opened.net, WholeNumbers)
    imported = opened.net.net
    assert isinstance(imported, fx.GraphModule)
    calls = [step for step in imported.graph.nodes if step.target is nn.functional.embedding]
    x = torch.arange(24).reshape(4, 6) * 11  # up to 253
    if name == "compared with 0, 1, 2, …":
        x = torch.cat((x, torch.full((1, 6), 257), torch.full((1, 6), -1)))  # equal to none of the numbers
    file = read_onnx(path, whole_numbers=True)
    for inputs in (x, x.float()):
        assert torch.allclose(opened.net(inputs), Runtime(file)(inputs), atol=1e-5)
    table = imported.get_buffer(calls[0].args[1].target).requires_grad_()
    opened.net(x).sum().backward()
    assert table.grad is not None
    assert bool((table.grad != 0).any())
    with pytest.raises(TargetError, match="has the input x .* float16, float32 or float64 was expected"):
        open_onnx(path)


@pytest.mark.parametrize("rate", [7, 8])
def test_a_condition_that_constants_decide_is_replaced_by_its_branch(tmp_path: Path, rate: int) -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(w, "w") for w in (floats(4, 3), floats(4, 3))]
    branches = [helper.make_graph([node("MatMul", "r w", "z")], "branch", [], [value], [w]) for w in weights]
    nodes = [
        node("Relu", "x", "r"),
        node("Equal", "rate seven", "is_seven"),
        node("If", "is_seven", "y", then_branch=branches[0], else_branch=branches[1]),
    ]
    constants = {"rate": np.array(rate, np.int64), "seven": np.array(7, np.int64)}
    opened = open_model(write(tmp_path / "m.onnx", nodes, constants, shape=(N, 4)))
    assert (opened.access, opened.notes) == ("gradients", ())
    # a condition on the data is not replaced
    nodes[1] = node("Greater", "total zero", "is_seven")
    nodes.insert(1, node("ReduceSum", "x", "total", keepdims=0))
    address = write(tmp_path / "m.onnx", nodes, {"zero": np.array(0, np.float32)}, shape=(N, 4))
    assert open_model(address).access == "scores"


# whole networks ----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block, as a reference."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
        )
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.short = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.short(x) + self.nb(self.b(torch.relu(self.na(self.a(x))))))


def residual() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        Block(3, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


class Written:
    """Writes modules as ONNX by hand, as an exporter would."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(
        self, name: str, x: str, *tensors: torch.Tensor, extra: Sequence[str] = (), **settings: Any
    ) -> str:
        out = f"v{len(self.nodes)}"
        names = [f"{out}_{i}" for i in range(len(tensors))]
        self.constants.update({n: t.detach().numpy() for n, t in zip(names, tensors, strict=True)})
        self.nodes.append(helper.make_node(name, [x, *names, *extra], [out], **settings))
        return out

    def conv(self, layer: nn.Conv2d, x: str) -> str:
        pads = [*layer.padding, *layer.padding]
        return self.add("Conv", x, layer.weight, strides=list(layer.stride), pads=pads)

    def norm(self, layer: nn.BatchNorm2d, x: str) -> str:
        return self.add(
            "BatchNormalization", x, layer.weight, layer.bias, layer.running_mean, layer.running_var
        )

    def block(self, block: Block, x: str) -> str:
        inner = self.add("Relu", self.norm(block.na, self.conv(block.a, x)))
        total = self.add(
            "Add", self.conv(block.short, x), extra=[self.norm(block.nb, self.conv(block.b, inner))]
        )
        return self.add("Relu", total)


def test_a_residual_network_and_its_gradients_agree_with_the_original(tmp_path: Path) -> None:
    net, out = residual(), Written()
    assert isinstance(net, nn.Sequential)
    y = out.add("GlobalAveragePool", out.block(net[1], out.block(net[0], "x")))
    y = out.add("Gemm", out.add("Flatten", y), net[4].weight, net[4].bias, transB=1)
    opened = open_model(
        write(tmp_path / "net.onnx", out.nodes, out.constants, shape=(N, 3, 16, 16), outputs=[y])
    )
    assert opened.model.classes == 5 and opened.notes == ()
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    torch.testing.assert_close(opened.model(x), net(x), rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (opened.model, net))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    modules = [type(module) for module in opened.model.net.modules()]
    assert isinstance(opened.model.net, fx.GraphModule)
    assert (modules.count(nn.Conv2d), modules.count(nn.BatchNorm2d), modules.count(nn.Linear)) == (6, 4, 1)


class Transformer(nn.Module):
    """Patches, a class token, positions and attention, as a reference."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
            nn.Linear(16, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        rows = torch.cat((self.token.expand(x.shape[0], -1, -1), patches), 1) + self.places
        return self.head(self.encoder(rows)[:, 0])


@pytest.mark.filterwarnings("ignore")  # the exporter that needs no further package is deprecated
@pytest.mark.parametrize("free", [True, False], ids=["free batch", "batch of one"])
@pytest.mark.parametrize("make", [residual, Transformer])
def test_what_torch_exports_agrees_with_the_original(
    tmp_path: Path, make: Callable[[], nn.Module], *, free: bool
) -> None:
    net = make().eval()
    example = torch.rand(2 if free else 1, 3, 16, 16)
    axes = {"x": {0: "n"}, "y": {0: "n"}} if free else None
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
    torch.onnx.export(net, (example,), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17, **names)
    opened = open_model(str(tmp_path / "m.onnx"))
    assert opened.access == "gradients"
    x = torch.rand(5, 3, 16, 16, requires_grad=True)
    torch.testing.assert_close(opened.model(x), net(x), rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (opened.model, net))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def linear_model(path: Path, **settings: Any) -> str:
    return write(path, [node("Gemm", "x w", "y")], {"w": floats(5, 3)}, shape=(N, 5), **settings)


def test_channels_last_models_take_channels_first(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t w", "c"),
        node("Flatten", "c", "y"),
    ]
    address = write(tmp_path / "m.onnx", nodes, {"w": floats(2, 3, 3, 3)}, shape=(N, 8, 8, 3))
    x, y = np.random.default_rng(0).random((9, 8, 8, 3), np.float32), np.arange(9)
    forms = (x, x.transpose(0, 3, 1, 2), torch.from_numpy(x), torch.from_numpy(x).permute(0, 3, 1, 2))
    found = [holdfast.assess(address, (form, y), "linf:0.01", "quick", doubts=False) for form in forms]
    assert len({tuple(one.evidence["margin"].tolist()) for one in found}) == 1
    assert [HWC_NOTE in one.evidence.notes for one in found] == [True, True, False, True]


def test_an_unknown_operator_is_named_and_served_without_gradients(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", "x w", "a"),
        node("Sinh", "a", "b"),
        node("Atan", "b", "c"),
        node("Add", "a c", "y"),
    ]
    opened = open_model(write(tmp_path / "m.onnx", nodes, {"w": floats(5, 3) + 1}, shape=(N, 5)))
    assert opened.access == "scores"
    why = "the operators Atan (node 'c'), Sinh (node 'b') cannot be imported"
    assert why in opened.notes[0]
    data = (np.random.default_rng(0).random((4, 5), np.float32), np.zeros(4, np.int64))
    with pytest.raises(
        UsageError,
        match="Sprint needs gradients, and the model gives scores only .the operators Atan .node 'c'., Si",
    ):
        holdfast.assess(str(tmp_path / "m.onnx"), data, "linf:0.1", "quick")
    gradients = next(f for f in holdfast.doctor(str(tmp_path / "m.onnx"), data) if f.check == "gradients")
    assert gradients.message == f"the model gives scores only ({why}): the default suite is black-box"
    x = torch.rand(4, 5, requires_grad=True)
    assert opened.model(x).shape == (4, 3)
    assert not opened.model(x).requires_grad
    assert torch.equal(copy.deepcopy(opened.model)(x), opened.model(x))


def test_unknown_settings_are_named_too(tmp_path: Path) -> None:
    nodes = [node("Resize", "x , scales", "a", mode="cubic"), node("Flatten", "a", "y")]
    opened = open_model(write(tmp_path / "m.onnx", nodes, {"scales": np.array([1, 1, 2, 2], np.float32)}))
    assert opened.access == "scores"
    assert "Resize of mode cubic, half_pixel, round_prefer_floor, in the node 'a', cannot" in opened.notes[0]


def test_one_of_several_outputs_is_chosen_and_reported(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w", "y"), node("ArgMax", "y", "label", axis=1, keepdims=0)]
    opened = open_model(
        write(tmp_path / "m.onnx", nodes, {"w": floats(5, 3)}, shape=(N, 5), outputs=["label", "y"])
    )
    assert opened.model(torch.rand(2, 5)).shape == (2, 3)
    assert opened.notes == ("the output y is used as the scores (outputs: label, y)",)


@pytest.mark.parametrize(
    "nodes, outputs, message",
    [
        (
            [node("Gemm", "x w", "y"), node("Gemm", "x v", "z")],
            "y z",
            r"y \(3, 3\), z \(3, 4\), and it is not clear",
        ),
        (
            [node("ReduceMax", "x", "y", keepdims=0), node("ReduceMin", "x", "z", keepdims=0)],
            "y z",
            r"y \(3,\), z \(3,\), and it is not clear .*'zipmap': False",
        ),
        (
            [node("Gemm", "x w", "y"), node("ArgMin", "y", "label", axis=1, keepdims=0)],
            "label y",
            "returns label, which is not the index of the largest value of y, as a clustering does",
        ),
    ],
    ids=["two widths", "a column a class", "a clustering"],
)
def test_outputs_that_are_no_scores_of_one_classifier_are_refused(
    tmp_path: Path, nodes: list[Any], outputs: str, message: str
) -> None:
    weights = {"w": floats(5, 3), "v": floats(5, 4)}
    if "ReduceMax" in {each.op_type for each in nodes}:
        weights = {"axis": ints(1)}
        nodes = [helper.make_node(each.op_type, ["x", "axis"], each.output, keepdims=0) for each in nodes]
    address = write(tmp_path / "m.onnx", nodes, weights, shape=(N, 5), outputs=outputs.split())
    with pytest.raises(TargetError, match=message):
        open_model(address)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("limit", "most", "message"),
    [("MAX_NODES", 2, "has 2 nodes"), ("MAX_VALUES", 20, r"inputs of shape \(4, 5\); at most 19 values")],
)
def test_nodes_and_input_values_are_limited(
    tmp_path: Path, accepted_up_to, limit: str, most: int, message: str
) -> None:
    nodes = [node("Gemm", "x w", "z"), node("Relu", "z", "y")]
    address = write(tmp_path / "m.onnx", nodes, {"w": floats(5, 3)}, shape=(4, 5))

    def opened() -> None:
        assert open_model(address).model(torch.rand(4, 5)).shape == (4, 3)

    accepted_up_to(f"onnx.reading.{limit}", most, opened, message)


def test_a_regressor_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node(
            "LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[0.1] * 5, targets=1
        )
    ]
    graph = helper.make_graph(
        nodes,
        "regressor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(tmp_path / "m.onnx"))
    with pytest.raises(
        TargetError, match="returns y of a LinearRegressor, which is a number and not the scores of classes"
    ):
        open_model(str(tmp_path / "m.onnx"))


def test_inputs_of_another_shape_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = open_model(linear_model(tmp_path / "m.onnx"))
    with pytest.raises(TargetError, match=r"has shape \(4,\), but the ONNX file requires \(5,\)"):
        opened.model(torch.rand(2, 4))
    assert capfd.readouterr().err == ""


def test_an_import_that_disagrees_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "Gemm", lambda step: step.builder.call(torch.mul, step.x, 2.0))
    nodes = [node("Gemm", "x w", "y")]
    path = write(tmp_path / "m.onnx", nodes, {"w": np.eye(5, dtype=np.float32)}, shape=(N, 5))
    with pytest.raises(
        TargetError, match=r"differs from onnxruntime by 0\.\d+ on a batch of 1; at most 0\.0001"
    ):
        open_model(path)


def test_double_precision_is_kept(tmp_path: Path) -> None:
    w = floats(5, 3).astype(np.float64)
    path = write(
        tmp_path / "m.onnx", [node("Gemm", "x w", "y")], {"w": w}, shape=(N, 5), dtype=TensorProto.DOUBLE
    )
    x = torch.rand(2, 5, dtype=torch.float64)
    torch.testing.assert_close(open_model(path).model(x), x @ torch.from_numpy(w))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE], ids=["half", "double"])
def test_data_are_converted_to_the_float_type_of_the_file_and_gradients_pass(
    tmp_path: Path, kind: int
) -> None:
    w = floats(5, 3).astype(helper.tensor_dtype_to_np_dtype(kind))
    opened = open_model(
        write(tmp_path / "m.onnx", [node("Gemm", "x w", "y")], {"w": w}, shape=(N, 5), dtype=kind)
    )
    assert opened.access == "gradients" and opened.notes == (f"the model computes in {w.dtype}",)
    x, known = torch.rand(2, 5, requires_grad=True), torch.from_numpy(w).float()
    y = opened.model(x)
    torch.testing.assert_close(y, x @ known, rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, known.sum(1).expand(2, -1), rtol=1e-2, atol=1e-2)


def tree(path: Path, *, maps: bool, labels: Sequence[Any] = (0, 1)) -> str:
    """A tree as the converter of scikit-learn writes it: it asks whether the first feature is at most a half."""
    named = {"classlabels_strings" if isinstance(labels[0], str) else "classlabels_int64s": list(labels)}
    nodes = [
        helper.make_node(
            "TreeEnsembleClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", post_transform="NONE",
            nodes_treeids=[0] * 3, nodes_nodeids=[0, 1, 2], nodes_featureids=[0] * 3, nodes_values=[0.5, 0.0, 0.0],
            nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
            class_treeids=[0] * 4, class_nodeids=[1, 1, 2, 2], class_ids=[0, 1, 0, 1],
            class_weights=[0.9, 0.1, 0.2, 0.8], **named,
        )
    ]  # fmt: skip
    label = TensorProto.STRING if isinstance(labels[0], str) else TensorProto.INT64
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 2])
    if maps:
        nodes.append(helper.make_node("ZipMap", ["scores"], ["maps"], domain="ai.onnx.ml", **named))
        each = helper.make_map_type_proto(label, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        scores = helper.make_value_info("maps", helper.make_sequence_type_proto(each))
    graph = helper.make_graph(
        nodes,
        "tree",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("label", label, [None]), scores],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return str(path)


@pytest.mark.parametrize("maps", [False, True], ids=["tensor", "maps"])
@pytest.mark.parametrize("labels", [(0, 1), ("no", "yes"), (3, 7)], ids=["numbers", "text", "other numbers"])
def test_the_scores_beside_labels_are_read(tmp_path: Path, labels: Sequence[Any], *, maps: bool) -> None:
    opened = open_model(tree(tmp_path / "m.onnx", maps=maps, labels=labels))
    x = torch.tensor([[0.4, 0, 0], [0.6, 0, 0]])
    torch.testing.assert_close(opened.model(x), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    assert opened.access == "scores"
    assert opened.model.class_names == (labels if isinstance(labels[0], str) else None)
    assert opened.model.class_labels == ((3, 7) if labels == (3, 7) else None)


# hostile and broken files --------------------------------------------------------------------------


def external(path: Path, location: str, **entries: str) -> str:
    """A model that takes its weights from a file beside it."""
    address = linear_model(path)
    model = onnx.load(address)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return address


def test_external_data_inside_the_folder_is_read_and_digested(tmp_path: Path) -> None:
    weights = floats(5, 3)
    (tmp_path / "w.bin").write_bytes(b"skip" + weights.tobytes())
    opened = open_model(external(tmp_path / "m.onnx", "w.bin", offset="4"))
    x = torch.rand(2, 5)
    torch.testing.assert_close(opened.model(x), x @ torch.from_numpy(weights))
    assert len(opened.files) == 2
    (tmp_path / "w.bin").write_bytes(b"skip" + (weights + 1).tobytes())
    assert open_model(str(tmp_path / "m.onnx")).digest != opened.digest


def sparse_of(tensor: Any) -> Any:
    """The three values of a tensor (3,) at the places 0, 1 and 2 of a sparse tensor of 5 values."""
    indices = numpy_helper.from_array(np.arange(3), f"{tensor.name}-indices")
    return helper.make_sparse_tensor(tensor, indices, [5])


def constant(name: str, place: str, tensor: Any) -> Any:
    """A node whose output is a vector, in the field `place` of the attribute of a constant."""
    value = tensor if place == "value" else sparse_of(tensor)
    return helper.make_node("Constant", [], [name], **{place: value})


def external_at(place: str) -> Any:
    """A model whose weights, at `place`, are three values of a file w.bin."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    size, nodes, functions, more = 5, [], [], {}
    if place == "a sparse constant":
        nodes = [constant("w", "sparse_value", tensor)]
    elif place == "a sparse initial value":
        more = {"sparse_initializer": [sparse_of(tensor)]}
    elif place == "a branch":
        inner = helper.make_graph(
            [constant("w_", "sparse_value", tensor)],
            "inner",
            [],
            [helper.make_tensor_value_info("w_", TensorProto.FLOAT, [5])],
        )
        true = numpy_helper.from_array(np.array(True), "true")
        nodes = [
            helper.make_node("Constant", [], ["true"], value=true),
            helper.make_node("If", ["true"], ["w"], then_branch=inner, else_branch=inner),
        ]
    elif place == "a function":
        size, body = 3, [constant("w", "value", tensor)]
        functions = [helper.make_function("own", "f", [], ["w"], body, [helper.make_opsetid("", 20)])]
        nodes = [helper.make_node("f", [], ["w"], domain="own")]
    elif place == "the fill of a constant":
        size, tensor.dims[:] = 3, [1]
        tensor.external_data.add(key="length", value="4")
        shape = numpy_helper.from_array(np.array([3]), "shape")
        nodes = [
            helper.make_node("Constant", [], ["shape"], value=shape),
            helper.make_node("ConstantOfShape", ["shape"], ["w"], value=tensor),
        ]
    nodes.append(helper.make_node("Mul", ["x", "w"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "test", [x], [y], **more),
        functions=functions,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("own", 1)],
    )
    model.ir_version = 10
    return model


@pytest.mark.parametrize(
    "place",
    ["a sparse constant", "a sparse initial value", "a branch", "a function", "the fill of a constant"],
)
def test_external_data_come_only_from_the_folder_of_the_model_wherever_a_tensor_is(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, current = tmp_path / "model", tmp_path / "current"
    for each in (folder, current):
        each.mkdir()
    monkeypatch.chdir(current)
    (current / "w.bin").write_bytes(floats(3).tobytes())
    path = folder / "m.onnx"
    path.write_bytes(external_at(place).SerializeToString())
    with pytest.raises(TargetError, match=r"model/w\.bin' does not exist"):
        open_model(str(path))
    if place == "a sparse initial value":
        return  # such a model cannot be opened with its data in place, either
    (folder / "w.bin").write_bytes(floats(3).tobytes())
    opened = open_model(str(path))
    assert {Path(name).name for name in opened.files} == {"m.onnx", "w.bin"}


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(60))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(TargetError, match="outside its folder"):
        open_model(external(folder / "m.onnx", location))


def test_external_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="does not exist"):
        open_model(external(tmp_path / "m.onnx", "gone.bin"))
    (tmp_path / "w.bin").write_bytes(bytes(60))
    with pytest.raises(TargetError, match="are not there"):
        open_model(external(tmp_path / "m.onnx", "w.bin", length="4000000000"))
    with pytest.raises(TargetError, match="numbers were expected"):
        open_model(external(tmp_path / "m.onnx", "w.bin", offset="four"))


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = Path(linear_model(tmp_path / "m.onnx")).read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "noise": b"\xff\xfe" * 50,
        "text": b"hello",
    }.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
        with pytest.raises(TargetError, match=r"(no valid|not an) ONNX model"):
            open_model(str(tmp_path / f"{name}.onnx"))
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(TargetError, match="empty"):
        open_model(str(tmp_path / "empty.onnx"))


@pytest.mark.parametrize(
    "nodes, settings, message",
    [
        (
            [node("Flatten", "x", "y")],
            {"shape": (N, 3, "h", "w")},
            r"has the input x \(float, N x 3 x N x N\), in which more sizes .*; give input_shape=\(3,N,N",
        ),
        (
            [node("Flatten", "x", "y")],
            {"dtype": TensorProto.UINT8},
            r"has the input x \(uint8, N x 3 x 6 x 7\). Attacks change real numbers",
        ),
        ([node("Identity", "x", "y")], {}, r"returns y \(float, N x 3 x 6 x 7\), as detectors"),
        ([node("Flatten", "x", "y", axis=2)], {}, r"returns y \(9, 42\) for 3 inputs; float logits"),
    ],
)
def test_what_is_no_classifier_is_refused(
    tmp_path: Path, nodes: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((TargetError, UsageError), match=message):
        open_model(write(tmp_path / "m.onnx", nodes, **settings))


def test_a_second_input_is_refused_with_what_each_is(tmp_path: Path) -> None:
    address = write(tmp_path / "m.onnx", [node("Flatten", "x", "y")])
    model = onnx.load(address)
    model.graph.input.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, None, 128]))
    onnx.save(model, address)
    with pytest.raises(
        TargetError, match=r"2 inputs: x .*, state \(float, 2 x N x 128\)\. Inputs of shapes such"
    ):
        open_model(address)


def with_inputs(path: Path, nodes: list[Any], inputs: list[Any], outputs: Sequence[str] = ("y",)) -> str:
    """A model of signals (n, size) with further inputs."""
    address = write(path, nodes, shape=(N, "size"), outputs=outputs)
    model = onnx.load(address)
    model.graph.input.extend(inputs)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [N, "size"]))
    onnx.save(model, address)
    return address


def test_a_constant_replaces_a_further_input_and_gradients_pass(tmp_path: Path) -> None:
    rate = helper.make_tensor_value_info("rate", TensorProto.INT64, [])
    nodes = [node("Cast", "rate", "r", to=TensorProto.FLOAT), node("Mul", "x r", "y")]
    address = with_inputs(tmp_path / "m.onnx", nodes, [rate])
    opened = open_model(address, declared=Declared(input_shape=(3,), constants={"rate": 7}))
    x = torch.rand(2, 3)
    assert opened.access == "gradients" and "the input rate is 7" in opened.notes
    torch.testing.assert_close(opened.model(x), 7 * x)
    with pytest.raises(UsageError, match=r"constants has 'rat', .* no such input; did you mean 'rate'"):
        open_model(address, declared=Declared(input_shape=(3,), constants={"rat": 7}))
    with pytest.raises(UsageError, match="constants are for further inputs of an .onnx file"):
        open_model("mnist-cnn", declared=Declared(constants={"rate": 7}))


def test_a_state_starts_at_zero_and_is_carried_over_the_windows_of_an_example(tmp_path: Path) -> None:
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, "n", 2])
    nodes = [
        node("Unsqueeze", "x first", "x1"),
        node("Add", "state x1", "next"),
        node("Squeeze", "next first", "y"),
    ]
    first = numpy_helper.from_array(ints(0), "first")
    address = with_inputs(tmp_path / "m.onnx", nodes, [state], ("y", "next"))
    model = onnx.load(address)
    model.graph.initializer.append(first)
    onnx.save(model, address)
    opened = open_model(address, declared=Declared(input_shape=(2,), constants={"state": 0}))
    x = torch.tensor([[1.0, 2, 3, 4, 9], [9, 2, -20, 4, 1]])
    assert opened.access == "scores"
    # windows 1 2, 3 4 and 9 0 of the first example: the sums so far are 1 2, 4 6 and 13 6
    assert opened.model(x).tolist() == [[13, 6], [9, 6]]


def test_a_state_without_an_axis_of_examples_belongs_to_the_windows_of_one_example(tmp_path: Path) -> None:
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [2])
    nodes = [
        node("Sum", "x state", "z"),
        node("CumSum", "z first", "y"),  # over the first axis, which is that of the windows
        node("Identity", "state", "next"),
    ]
    address = with_inputs(tmp_path / "m.onnx", nodes, [state], ("y", "next"))
    model = onnx.load(address)
    model.graph.output[1].CopyFrom(helper.make_tensor_value_info("next", TensorProto.FLOAT, [2]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "first"))
    onnx.save(model, address)
    opened = open_model(address, declared=Declared(input_shape=(2,), constants={"state": 0}))
    x = torch.tensor([[1.0, 2, 3, 4, 9], [9, 2, -20, 4, 1]])
    assert opened.model(x).tolist() == [[13, 6], [9, 6]]
    assert any("carried over its windows of 2 values" in note for note in opened.notes)


@pytest.mark.parametrize(("last", "n_outputs"), [("Sigmoid", 1), ("Sigmoid", 3), ("HardSwish", 1)])
def test_a_single_output_of_a_sigmoid_is_a_probability(tmp_path: Path, last: str, n_outputs: int) -> None:
    nodes = [node("Gemm", "x w", "a"), node(last, "a", "b"), node("Identity", "b", "y")]
    address = write(tmp_path / "m.onnx", nodes, {"w": floats(4, n_outputs)}, shape=(N, 4))
    is_probability = (last, n_outputs) == ("Sigmoid", 1)
    assert open_model(address).model.output == ("probability" if is_probability else None)


def test_free_sizes_are_declared(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "p"), node("Flatten", "p", "y")]
    weights = floats(4, 3, 3, 3)
    path = write(tmp_path / "m.onnx", nodes, {"w": weights}, shape=(N, 3, "height", "width"))
    opened = open_model(path, declared=Declared(input_shape=(3, 6, 7)))
    assert opened.access == "gradients" and opened.model.classes == 4
    x = torch.rand(2, 3, 6, 7)
    known = torch.nn.functional.conv2d(x, torch.from_numpy(weights)).mean((2, 3))
    torch.testing.assert_close(opened.model(x), known)
    for shape in ((1, 6, 7), (6, 7), (3, 3, 6, 7)):
        with pytest.raises(UsageError, match=r"x \(float, N x 3 x N x N\); give the shape of one example"):
            open_model(path, declared=Declared(input_shape=shape))
    with pytest.raises(UsageError, match=r"input_shape is for an \.onnx file"):
        open_model("mnist-cnn", declared=Declared(input_shape=(1, 28, 28)))


@pytest.mark.filterwarnings("ignore:Attribute `prob[AB]_`:FutureWarning")  # skl2onnx reads it
@pytest.mark.parametrize("labels", ["numbers", "text"])
@pytest.mark.parametrize(
    "kind", ["LogisticRegression", "RandomForest", "GradientBoosting", "SVC", "binary SVC"]
)
def test_default_exports_of_scikit_learn_answer_as_in_onnxruntime(
    tmp_path: Path, kind: str, labels: str
) -> None:
    skl2onnx, runtime = pytest.importorskip("skl2onnx"), pytest.importorskip("onnxruntime")
    from sklearn.datasets import load_iris
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    estimator = {
        "LogisticRegression": LogisticRegression(),
        "RandomForest": RandomForestClassifier(5, random_state=0),
        "GradientBoosting": GradientBoostingClassifier(n_estimators=3),
    }.get(kind, SVC())
    x, y = load_iris(return_X_y=True)
    x = (x / 8).astype(np.float32)
    if kind == "binary SVC":
        x, y = x[50:], y[50:] - 1
    names = np.array(["setosa", "versicolor", "virginica"][: y.max() + 1])
    estimator.fit(x, names[y] if labels == "text" else y)
    path = tmp_path / "m.onnx"
    path.write_bytes(skl2onnx.to_onnx(estimator, x[:1]).SerializeToString())
    opened = open_model(str(path))
    session = runtime.InferenceSession(str(path))
    answered, scores = session.run(None, {session.get_inputs()[0].name: x})
    ours = opened.model.net(torch.from_numpy(x)).numpy()
    found = ours.argmax(1)
    assert np.array_equal(names[found] if labels == "text" else found, answered)
    assert opened.model.class_names == (tuple(names) if labels == "text" else None)
    if opened.access == "scores":
        np.testing.assert_allclose(ours, [list(row.values()) for row in scores], rtol=1e-6)
    assert opened.access == ("labels" if kind == "binary SVC" else "scores")


def test_a_giant_made_of_nothing_is_refused(tmp_path: Path, process_limits) -> None:
    process_limits(False)
    nodes = [node("ConstantOfShape", "huge", "z"), node("ReduceSum", "z", "s"), node("Add", "x s", "y")]
    path = write(tmp_path / "m.onnx", nodes, {"huge": ints(2**20, 2**20)}, shape=(N, 5))
    with pytest.raises(TargetError, match="asks for far more memory than its size"):
        open_model(path)


def test_a_missing_extra_is_refused_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = linear_model(tmp_path / "m.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r'pip install "holdfast-ml\[onnx\]"'):
        open_model(address)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UsageError, match=r'pip install "holdfast-ml\[onnx\]"'):
        open_model(address)


def test_constants_that_the_file_computes_are_bounded(tmp_path: Path, set_limit) -> None:
    nodes = [
        node("Flatten", "x", "flat"),
        node("ConstantOfShape", "shape", "zeros"),
        node("Add", "flat zeros", "y"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"shape": np.array([1, 8])}, shape=(N, 8))
    set_limit("holdfast.io.onnx.building.MAX_COMPUTED", 32)
    assert open_model(str(path)).access == "gradients"
    set_limit("holdfast.io.onnx.building.MAX_COMPUTED", 31)
    assert (
        "computed constants of more than 31 bytes, in the node 'y', cannot be imported"
        in open_model(str(path)).notes[0]
    )


def test_a_slice_that_runs_backwards_names_few_places(tmp_path: Path, set_limit) -> None:
    whole = {
        name: np.array([number]) for name, number in (("from", -1), ("to", -(2**62)), ("axis", 1), ("by", -1))
    }
    path = write(tmp_path / "m.onnx", [node("Slice", "x from to axis by", "y")], whole, shape=(N, 8))
    set_limit("holdfast.io.onnx.building._MOST_PLACES", 8)
    assert open_model(str(path)).access == "gradients"
    set_limit("holdfast.io.onnx.building._MOST_PLACES", 7)
    assert (
        "Slice of 8 places from the end, in the node 'y', cannot be imported"
        in open_model(str(path)).notes[0]
    )


@pytest.mark.parametrize("name", ["rounding", ""])
def test_an_operation_without_bounds_is_named_by_its_node_of_the_file(tmp_path: Path, name: str) -> None:
    nodes = [
        node("Gemm", "x w", "a"),
        node("Relu", "a", "b"),
        helper.make_node("Ceil", ["b"], ["y"], name=name),
    ]
    address = write(tmp_path / "m.onnx", nodes, {"w": floats(5, 3)}, shape=(N, 5))
    data = (np.random.default_rng(0).random((4, 5), np.float32), np.zeros(4, np.int64))
    with pytest.raises(UsageError) as caught:
        holdfast.certify(address, data, "linf:0.01")
    assert f"aten.ceil, at \"{address}\", node '{name or 'y'}': Ceil; replace it" in str(caught.value)


def test_a_graph_that_needs_a_batch_of_one_runs_on_all_rows_at_once(tmp_path: Path, capfd) -> None:
    nodes = [
        node("Conv", "x k", "a"),
        node("Squeeze", "a zero", "b"),
        node("Reshape", "b flat", "c"),
        node("Gemm", "c w", "y"),
    ]
    constants = {"k": floats(2, 3, 3, 3), "zero": ints(0), "flat": ints(1, 40), "w": floats(40, 3)}
    opened = open_model(write(tmp_path / "m.onnx", nodes, constants, shape=(1, C, H, W)))
    assert opened.notes == () and opened.access == "gradients"
    calls: list[int] = []
    graph = next(module for module in opened.model.modules() if isinstance(module, fx.GraphModule))
    graph.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    x = torch.rand(5, C, H, W, requires_grad=True)
    logits = opened.model(x)
    assert calls == [1]  # once, mapped over the five rows
    kernel, weight = (torch.from_numpy(constants[name]) for name in "kw")
    torch.testing.assert_close(logits, torch.conv2d(x, kernel).flatten(1) @ weight)
    assert torch.autograd.grad(logits.sum(), x)[0].abs().flatten(1).amax(1).min() > 0
    assert opened.model(x[:0]).shape == (0, 3)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter
def test_a_note_states_how_a_file_for_onnxruntime_gets_a_free_batch_size(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w", "a"), node("Atan", "a", "y")]
    opened = open_model(write(tmp_path / "m.onnx", nodes, {"w": floats(5, 3)}, shape=(1, 5)))
    assert "accepts only batches of 1 examples" in opened.notes[1]
    assert "dynamic_axes={'x': {0: 'n'}}" in opened.notes[1]

    class Angle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ torch.ones(5, 3)).atan()

    file = str(tmp_path / "free.onnx")
    how = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(Angle(), (torch.rand(1, 5),), file, dynamo=False, **how)
    assert len(open_model(file).notes) == 1


def _detector(path: Path) -> tuple[str, dict[str, Any], Any]:
    """A file with a score of each class for each of 6 boxes, data, and the scores that its function returns."""
    address = write(path, [node("MatMul", "x w", "y")], {"w": (w := floats(5, 3))}, shape=(N, 6, 5))
    x = floats(8, 6, 5)
    return address, {"threat": "linf:0.01"}, (x, (x @ w).max(1))


def _bytes(path: Path) -> tuple[str, dict[str, Any], Any]:
    nodes = [
        node("Cast", "x", "f", to=TensorProto.FLOAT),
        node("Flatten", "f", "g"),
        node("MatMul", "g w", "y"),
    ]
    address = write(path, nodes, {"w": (w := floats(12, 3))}, shape=(N, 3, 2, 2), dtype=TensorProto.UINT8)
    x = floats(8, 3, 2, 2)
    return address, {"threat": "linf:0.01"}, (x, (255 * x).round().reshape(8, -1) @ w)


def _state(path: Path) -> tuple[str, dict[str, Any], Any]:
    nodes = [node("MatMul", "x w", "a"), node("ReduceSum", "state", "b", keepdims=0), node("Add", "a b", "y")]
    shapes = {"x": (N, 5), "state": (2, "rows", 4)}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, each) for name, each in shapes.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (N, 3))]
    w = floats(5, 3)
    graph = helper.make_graph(nodes, "test", inputs, outputs, [numpy_helper.from_array(w, "w")])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    x = floats(8, 5)
    return str(path), {"threat": "linf:0.01"}, (x, x @ w)


@pytest.mark.parametrize("make", [_detector, _bytes, _state])
def test_the_function_that_a_refusal_advises_returns_the_scores(
    tmp_path: Path, monkeypatch, capsys, make
) -> None:
    address, settings, (x, scores) = make(tmp_path / "m.onnx")
    data = (x, scores.argmax(1))
    with pytest.raises(
        TargetError, match=r"write a function that returns scores \(n, classes\) into scores.py"
    ) as caught:
        holdfast.assess(address, data, **settings)
    assert len(caught.value.code) == 3 and "called with numbers" not in str(caught.value)
    assert str(caught.value).endswith("\n    ".join(caught.value.code))
    monkeypatch.chdir(tmp_path)
    assert run(["doctor", address, "mnist-mini", "--threat", settings["threat"]]) == 3
    printed = capsys.readouterr().err.splitlines()[-3:]
    (tmp_path / "scores.py").write_text("\n".join(text.removeprefix("    ") for text in printed))
    module: dict[str, Any] = {}
    exec((tmp_path / "scores.py").read_text(), module)
    np.testing.assert_allclose(module["make"]()(torch.tensor(x)), scores, rtol=1e-5)
    result = holdfast.assess("scores.py:make", data, **settings, suite=["Square"])
    assert result["clean_accuracy"].value == 1


def text_model(path: Path, shape: Sequence[Any] = (N,)) -> str:
    """A linear model of the counts of words, in lower case, of texts."""
    words, rng = ["good", "bad", "god", "day", "dull"], np.random.default_rng(3)
    nodes = [
        node("Reshape", "x flat", "a"),
        node("StringNormalizer", "a", "b", case_change_action="LOWER", locale="xx_XX.UTF-8"),
        node("Tokenizer", "b", "c", domain="com.microsoft", mark=0, mincharnum=1, pad_value="#",
             tokenexp="[a-z]+"),
        node("TfIdfVectorizer", "c", "d", mode="TF", min_gram_length=1, max_gram_length=1, max_skip_count=0,
             ngram_counts=[0], ngram_indexes=list(range(5)), pool_strings=words),
        node("LinearClassifier", "d", "label y", domain="ai.onnx.ml", classlabels_strings=["no", "yes"],
             coefficients=rng.normal(size=10).tolist(), intercepts=[0.1, 0.0], post_transform="NONE"),
    ]  # fmt: skip
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.STRING, [N]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [N, 2]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.STRING, shape)]
    graph = helper.make_graph(nodes, "test", inputs, outputs, [numpy_helper.from_array(ints(-1), "flat")])
    domains = {"": 20, "ai.onnx.ml": 3, "com.microsoft": 1}
    opsets = [helper.make_opsetid(name, version) for name, version in domains.items()]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return str(path)


TEXTS = ["Good day", "a bad day", "dull", "GOD", "good good bad", "x"]


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1,)])
def test_the_verdict_on_a_file_of_texts_equals_exhaustive_search(
    tmp_path: Path, shape: Sequence[Any]
) -> None:
    address = text_model(tmp_path / "m.onnx", shape)
    opened = open_model(address, declared=Declared(texts=True))
    assert opened.model.class_names == ("no", "yes")
    assert any("locale xx_XX.UTF-8" in note and "C.UTF-8 is used" in note for note in opened.notes)
    survivors, robust = compared(address, TEXTS)
    assert survivors == robust
    assert 0 < sum(robust) < len(TEXTS)


@pytest.mark.slow  # starts a process
def test_a_file_of_texts_is_assessed_in_worker_processes(tmp_path: Path) -> None:
    address, y = text_model(tmp_path / "m.onnx"), [1, 0, 1, 0, 1, 0]
    here, there = (
        holdfast.assess(address, (TEXTS, y), threat="text:edits=1,words=1", workers=workers)
        for workers in (None, 1)
    )
    assert torch.equal(here.evidence["success"], there.evidence["success"])


def test_a_file_of_texts_needs_a_threat_on_texts_and_one_text_for_each_example(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="called with texts; assess it with a threat on texts, such as text:"
    ):
        open_model(text_model(tmp_path / "m.onnx"))
    with pytest.raises(TargetError, match="string, N x 2.; one text for each example was expected"):
        open_model(text_model(tmp_path / "m.onnx", (N, 2)), declared=Declared(texts=True))
    with pytest.raises(UsageError, match="called with numbers, and the inputs are texts"):
        open_model(linear_model(tmp_path / "m.onnx"), declared=Declared(texts=True))
