"""Files of strangers: what a parser raises is an error of the file, and sizes are bounded before anything is made."""

import gzip
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fuzzing.encodings import chunks, png
from holdfast.core.errors import TargetError
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model
from holdfast.io.onnx.reading import MOST_ROUNDS

onnx = pytest.importorskip("onnx")
helper = onnx.helper
SETS = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]


def test_a_damaged_table_and_a_locked_archive_are_refused_with_the_reason_of_their_parser(tmp_path):
    table = bytearray(gzip.compress(b"a,label\n" + b"0.1,0\n0.2,1\n" * 1000))
    table[13] ^= 0x55
    (tmp_path / "t.csv.gz").write_bytes(table)
    with pytest.raises(
        TargetError, match=r"t\.csv\.gz' cannot be read \(error: Error -3 while decompressing"
    ):
        open_data(str(tmp_path / "t.csv.gz"), label="label")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, values in (("x", np.zeros((2, 3))), ("y", np.zeros(2, dtype=int))):
            array = io.BytesIO()
            np.save(array, values)
            file.writestr(f"{name}.npy", array.getvalue())
    locked = bytearray(out.getvalue())
    for magic, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = locked.find(magic)
        while place >= 0:
            locked[place + at] |= 1
            place = locked.find(magic, place + 4)
    (tmp_path / "d.npz").write_bytes(locked)
    with pytest.raises(TargetError, match=r"d\.npz' cannot be read \(RuntimeError: .* is encrypted"):
        open_data(str(tmp_path / "d.npz"))


def test_whatever_a_decoder_raises_when_an_image_is_read_is_an_error_of_the_image(tmp_path):
    whole = io.BytesIO()
    Image.new("RGB", (4, 4)).save(whole, "PNG")
    *before, end = chunks(whole.getvalue())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png([*before, (b"iCCP", b""), end]))
    (tmp_path / "b" / "0.png").write_bytes(whole.getvalue())
    data = open_data(str(tmp_path))
    with pytest.raises(TargetError, match=r"0\.png' is damaged or truncated: IndexError: index out"):
        data.read(0, 2)


def saved(path, nodes, *, functions=(), tensors=()):
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], list(tensors))
    made = helper.make_model(graph, opset_imports=SETS, functions=list(functions))
    made.ir_version = 8
    path.write_bytes(made.SerializeToString())
    return str(path)


def doubling(depth):
    """Functions of which each calls the one before it twice."""

    def made(name, nodes):
        return helper.make_function("own", name, ["a"], ["b"], nodes, SETS)

    found = [made("F0", [helper.make_node("Neg", ["a"], ["b"])])]
    for k in range(1, depth + 1):
        inner = [
            helper.make_node(f"F{k - 1}", [one], [other], domain="own")
            for one, other in (("a", "t"), ("t", "b"))
        ]
        found.append(made(f"F{k}", inner))
    return [helper.make_node(f"F{depth}", ["x"], ["y"], domain="own")], found


@pytest.mark.slow
def test_functions_of_an_onnx_model_are_put_in_place_where_they_stand_for_few_nodes(tmp_path):
    nodes, functions = doubling(1)
    found = open_model(saved(tmp_path / "two.onnx", nodes, functions=functions)).model
    x = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    np.testing.assert_array_equal(found(torch.from_numpy(x)), x)
    nodes, functions = doubling(30)
    with pytest.raises(TargetError, match="has 1,073,741,824 nodes; 1 to 50,000 were expected"):
        open_model(saved(tmp_path / "many.onnx", nodes, functions=functions))
    itself = helper.make_function(
        "own", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="own")], SETS
    )
    calls = [helper.make_node("F", ["x"], ["y"], domain="own")]
    with pytest.raises(TargetError, match="the function 'F' calls itself"):
        open_model(saved(tmp_path / "itself.onnx", calls, functions=[itself]))


@pytest.mark.parametrize("rounds", [None, MOST_ROUNDS + 1], ids=["none", "many"])
def test_a_loop_without_a_small_constant_number_of_rounds_is_refused(tmp_path, rounds):
    info, kinds = helper.make_tensor_value_info, onnx.TensorProto
    whole, flag, real = kinds.INT64, kinds.BOOL, kinds.FLOAT
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Neg", ["v"], ["w"])],
        "body",
        [info("i", whole, []), info("c", flag, []), info("v", real, None)],
        [info("d", flag, []), info("w", real, None)],
    )
    tensors = [onnx.numpy_helper.from_array(np.array(True), "yes")]
    if rounds is not None:
        tensors.append(onnx.numpy_helper.from_array(np.array(rounds, dtype=np.int64), "n"))
    nodes = [helper.make_node("Loop", ["" if rounds is None else "n", "yes", "x"], ["y"], body=body)]
    with pytest.raises(TargetError, match="is not read, because the loop '' has"):
        open_model(saved(tmp_path / "loop.onnx", nodes, tensors=tensors))
