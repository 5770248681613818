"""The program holdfast-vnn: its output, its errors and its time limit."""

import re
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import helper

from holdfast.cli.app import run
from holdfast.cli.vnn import vnn
from onnx_networks import query_text, random_layers, replayed, write_graph, write_mlp

LAYERS = random_layers((2, 6, 2), 4)
UNIT = [(0.0, 1.0)] * 2
POSSIBLE, IMPOSSIBLE = "(<= Y_0 100.0)", "(>= Y_0 100.0)"


@pytest.fixture
def network(tmp_path):
    return write_mlp(tmp_path / "net.onnx", LAYERS)


def called(capsys, *arguments):
    """Exit code, stdout and stderr of a command line."""
    code = run([str(each) for each in arguments], vnn, "holdfast-vnn")
    written = capsys.readouterr()
    return code, written.out, written.err


def query(tmp_path, *conditions, box=UNIT):
    path = tmp_path / "query.vnnlib"
    path.write_text(query_text(len(box), 2, box, *conditions))
    return path


def test_an_assignment_of_version_1_can_be_replayed(tmp_path, capsys, network):
    condition = "(or (<= Y_0 (- Y_1 0.25)) (>= Y_0 (+ Y_1 0.25)))"
    code, out, _ = called(capsys, "verify", query(tmp_path, condition), "--network", f"any={network}")
    assert code == 0 and out.startswith("sat\n((X_0 ") and out.endswith("))\n")
    values = dict(re.findall(r"\(([XY]_\d) ([^\s()]+)\)", out))
    assert list(values) == ["X_0", "X_1", "Y_0", "Y_1"]
    y = replayed(LAYERS, np.array([float(values["X_0"]), float(values["X_1"])]))
    assert abs(y[0] - y[1]) >= 0.25 and np.allclose(
        y, [float(values["Y_0"]), float(values["Y_1"])], atol=1e-5
    )


@pytest.mark.slow
def test_unsat_is_one_line_and_an_assignment_can_be_written_to_files(tmp_path, capsys, network):
    assert called(capsys, "verify", query(tmp_path, IMPOSSIBLE), "--network", f"f={network}")[:2] == (
        0,
        "unsat\n",
    )
    folder = tmp_path / "new" / "folder"
    arguments = ("--network", f"f={network}", "--serialise-assignments", folder, "--timeout", 100)
    assert called(capsys, "verify", query(tmp_path, POSSIBLE), *arguments)[:2] == (0, "sat\n")
    tensors = {}
    for path in folder.iterdir():
        tensors[path.name] = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
    assert {name: (each.dtype, each.shape) for name, each in tensors.items()} == {
        "X.pb": (np.float32, (2,)),
        "Y.pb": (np.float32, (2,)),
    }
    assert np.allclose(replayed(LAYERS, tensors["X.pb"].astype(float)), tensors["Y.pb"], atol=1e-5)


def test_an_assignment_of_version_2_has_names_types_and_shapes(tmp_path, capsys, network):
    pytest.importorskip("vnnlib", reason="the extra vnnlib is not installed")
    path = tmp_path / "query.vnnlib"
    path.write_text(
        "(vnnlib-version <2.0>)(declare-network f (declare-input A float32 [1,2]) (declare-output B float32 [1,2]))"
        "(assert (and (>= A[0,0] 0.0) (<= A[0,0] 1.0) (>= A[0,1] 0.0) (<= A[0,1] 1.0)))(assert (<= B[0,0] 100.0))"
    )
    code, out, _ = called(capsys, "verify", path, "--network", f"f={network}")
    number = r"-?\d+\.\d+(e-\d+)?\n"
    assert code == 0
    assert re.fullmatch(rf"sat\nA float32 \[1,2\]\n({number}){{2}}B float32 \[1,2\]\n({number}){{2}}", out)
    for networks, message in (
        ((), "no network is given"),
        (("--network", f"g={network}"), "no file is given for"),
    ):
        code, _, err = called(capsys, "verify", path, *networks)
        assert code == 2 and message in err
    both = ("--network", f"f={network}", "--network", f"g={network}")
    code, _, err = called(capsys, "verify", path, *both)
    assert code == 2 and "names g, but the query declares f" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--timeout", "0"), 2, "--timeout is 0; a number of seconds larger than 0"),
        (("--timeout", "-3"), 2, "--timeout is -3"),
        (("--timeout", "soon"), 2, "--timeout is soon"),
        (("--timeout", "nan"), 2, "--timeout is nan"),
        (("--network", "no-sign"), 2, "NAME=FILE was expected"),
        (("--network", "x=missing.onnx"), 3, "'missing.onnx' does not exist"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, network, arguments, code, message):
    path = query(tmp_path, POSSIBLE)
    result = called(capsys, "verify", path, "--network", f"f={network}", *arguments)
    assert result[:2] == (code, "") and message in result[2]


def test_mistakes_in_the_query_are_reported_and_give_no_verdict(tmp_path, capsys, network):
    for condition, message in (("(<= Y_7 1.0)", "line 9, column 13"), ("(<= (* Y_0 Y_1) 1.0)", "not linear")):
        code, out, err = called(capsys, "verify", query(tmp_path, condition), "--network", f"f={network}")
        assert (code, out) == (3, "") and message in err
    code, out, err = called(
        capsys, "verify", query(tmp_path, POSSIBLE, box=[*UNIT, (0.0, 1.0)]), "--network", f"f={network}"
    )
    assert (code, out) == (3, "") and "[3], but the network has [1, 2]" in err


def test_capabilities_are_those_of_the_standard(capsys):
    for spelling in ("vnnlib-versions", "--vnnlib-versions"):
        assert called(capsys, "supports", spelling) == (0, "1.0\n2.0\n", "")
    assert called(capsys, "supports", "--serialise-assignments")[1] == "true\n"
    assert called(capsys, "supports", "--onnx-element-types")[1].split() == ["real", "float32", "float64"]
    operators = called(capsys, "supports", "--onnx-operators")[1].split()
    assert {"Conv", "Gemm", "Relu"} <= set(operators) and "Hardmax" not in operators
    code, _, err = called(capsys, "supports", "--onnx-opset-version")
    assert code == 2 and "did you mean 'onnx-opset-versions'?" in err
    assert called(capsys, "--name")[1] == "Holdfast\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", called(capsys, "--version")[1])


def test_networks_and_queries_that_cannot_be_used_end_in_exit_code_3(tmp_path, capsys, network):
    files = {
        "floor": [helper.make_node("Floor", ["x"], ["y"])],
        "identity": [helper.make_node("Identity", ["x"], ["y"])],
    }
    for name, nodes in files.items():
        write_graph(tmp_path / f"{name}.onnx", nodes, [], (1, 2), "y", (1, 2))
    write_graph(
        tmp_path / "free.onnx", [helper.make_node("Relu", ["x"], ["y"])], [], ("n", "k"), "y", ("n", "k")
    )
    for name, message in (
        ("floor", "aten.floor"),
        ("identity", "no operation"),
        ("free", "for inputs of one size"),
    ):
        code, out, err = called(
            capsys, "verify", query(tmp_path, POSSIBLE), "--network", f"f={tmp_path / name}.onnx"
        )
        assert (code, out) == (3, "") and message in err and "--" not in err


def test_a_trivial_query_imports_neither_the_compiler_of_torch_nor_scipy(tmp_path, network):
    """They take more time than the rest of such a query."""
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from holdfast.cli.vnn import main; main()"
    command = ["verify", query(tmp_path, IMPOSSIBLE), "--network", f"f={network}"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    answer, loaded = done.stdout.splitlines()
    assert answer == "unsat"
    assert not {"torch._dynamo", "torch._inductor", "scipy", "pandas", "sklearn"} & set(loaded.split())


@pytest.mark.slow
def test_the_time_limit_is_that_of_the_whole_call(tmp_path):
    layers = random_layers((5, 60, 60, 60, 60, 60, 2), 3)  # too hard for a few seconds
    network = write_mlp(tmp_path / "net.onnx", layers)
    x = np.random.default_rng(0).uniform(0, 1, (2000, 5))
    most = max(replayed(layers, row)[0] for row in x)
    path = query(tmp_path, f"(>= Y_0 {2 * abs(float(most)) + 1!r})", box=[(0.0, 1.0)] * 5)
    code = "from holdfast.cli.vnn import main; main()"
    command = ["verify", path, "--network", f"f={network}", "--timeout", "2"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stdout == "timed-out\n" and time.perf_counter() - start < 2 + 60
