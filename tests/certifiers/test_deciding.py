"""Verdicts about networks compared with exact solutions, and what a witness is."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper

from holdfast.certifiers.vnnlib.deciding import BoxSearch, JoinedNetworks, Prover, decide, problems_of
from holdfast.certifiers.vnnlib.query import (
    Affine,
    AtMostZero,
    DeclaredNetwork,
    Query,
    Variable,
    alternatives,
    compared,
)
from holdfast.certifiers.vnnlib.reading import read_query
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.io.onnx.opening import open_network
from onnx_networks import exact_maximum, query_text, random_layers, replayed, write_graph, write_mlp

FEW = (3, 8, 8, 3)
"""sizes of a network whose inputs are divided"""
MANY = (24, 12, 12, 4)
"""sizes of a network whose ReLUs are divided"""
UNIT = (0.0, 1.0)
OPENED = {}
"""networks by the contents of their files"""


def verdict(tmp_path, layers, text, seconds=120.0, **options):
    """The verdict about a network and the text of a query."""
    query = tmp_path / "query.vnnlib"
    query.write_text(text)
    path = write_mlp(tmp_path / "net.onnx", layers, **options)
    # the file is read in a process of its own, which takes longer than many of the proofs
    contents = path.read_bytes()
    network = OPENED[contents] if contents in OPENED else OPENED.setdefault(contents, open_network(path))
    return decide(read_query(query), {"": network}, deadline=time.perf_counter() + seconds)


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [
        (FEW, 1),
        (MANY, 2),
        *(pytest.param(s, k, marks=pytest.mark.slow) for s in (FEW, MANY) for k in (3, 4)),
    ],
)
def test_verdicts_agree_with_the_exact_maximum(tmp_path, sizes, seed):
    layers, box = random_layers(sizes, seed), [UNIT] * sizes[0]
    row = np.zeros(sizes[-1])
    row[[0, 1]] = 1, -1
    most = exact_maximum(layers, *zip(*box, strict=True), row)
    for excess, expected in ((-1e-3, "sat"), (1e-3, "unsat")):
        text = query_text(sizes[0], sizes[-1], box, f"(>= (- Y_0 Y_1) {most + excess!r})")
        result = verdict(tmp_path, layers, text)
        assert result.answer == expected, (most, excess)
        if expected == "sat":
            x = result.witness.inputs.numpy()
            assert (x >= 0).all() and (x <= 1).all() and (x == x.astype(np.float32)).all()
            y = replayed(layers, x)
            assert y[0] - y[1] >= most + excess
            assert np.allclose(y, result.witness.outputs, atol=1e-4)


def test_each_case_of_a_disjunction_counts(tmp_path):
    layers, box = random_layers(FEW, 7), [UNIT] * 3
    peaks = [exact_maximum(layers, *zip(*box, strict=True), row) for row in np.eye(3)]
    beyond = [f"(>= Y_{k} {peak + 0.01!r})" for k, peak in enumerate(peaks)]
    assert verdict(tmp_path, layers, query_text(3, 3, box, f"(or {' '.join(beyond)})")).answer == "unsat"
    beyond[1] = f"(>= Y_1 {peaks[1] - 0.01!r})"
    result = verdict(tmp_path, layers, query_text(3, 3, box, f"(or {' '.join(beyond)})"))
    assert result.answer == "sat" and result.witness.outputs[1] >= peaks[1] - 0.01
    # the point of the maximum of Y_1 is in the half x_0 <= h or in the other one
    at = float(result.witness.inputs[0])
    halves = [f"(and (<= X_0 {at / 2!r}) {beyond[1]})", f"(and (>= X_0 {at / 2!r}) {beyond[0]})"]
    inside = query_text(3, 3, box, f"(or {' '.join(halves)})")
    half = exact_maximum(layers, [0, 0, 0], [at / 2, 1, 1], [0, 1, 0])
    assert verdict(tmp_path, layers, inside).answer == ("sat" if half >= peaks[1] - 0.01 else "unsat")


def test_a_conjunction_is_excluded_although_each_part_is_possible(tmp_path):
    layers = [
        (np.array([[1.0], [-1.0]], np.float32), np.zeros(2, np.float32)),
        (np.eye(2, dtype=np.float32), np.zeros(2, np.float32)),
    ]
    both = query_text(1, 2, [(-1.0, 1.0)], "(>= Y_0 0.25)", "(>= Y_1 0.25)")  # y = (relu(x), relu(-x))
    assert verdict(tmp_path, layers, both).answer == "unsat"
    assert verdict(tmp_path, layers, query_text(1, 2, [(-1.0, 1.0)], "(>= Y_1 0.25)")).answer == "sat"


def test_a_boundary_that_is_touched_is_sat_only_if_equality_is_allowed(tmp_path):
    layers = [(np.ones((1, 1), np.float32), np.zeros(1, np.float32))] * 2  # y = relu(x)
    assert verdict(tmp_path, layers, query_text(1, 1, [UNIT], "(>= Y_0 1.0)")).answer == "sat"
    assert verdict(tmp_path, layers, query_text(1, 1, [UNIT], "(> Y_0 1.0)"), seconds=1).answer != "sat"
    assert verdict(tmp_path, layers, query_text(1, 1, [UNIT], "(<= X_0 Y_0)", "(< X_0 0.5)")).answer == "sat"


def test_constraints_may_relate_inputs_and_outputs(tmp_path):
    layers = [
        (np.array([[2.0, 0.0]], np.float32), np.zeros(1, np.float32)),
        (np.ones((1, 1), np.float32), np.zeros(1, np.float32)),
    ]
    box = [(0.0, 1.0), (0.0, 1.0)]  # y = relu(2 x_0)
    possible = query_text(2, 1, box, "(>= (+ X_0 X_1) 1.5)", "(<= Y_0 (+ (* 2 X_1) 0.0))")
    result = verdict(tmp_path, layers, possible)
    x = result.witness.inputs
    assert result.answer == "sat" and x.sum() >= 1.5 and 2 * x[0] <= 2 * x[1]
    assert verdict(tmp_path, layers, query_text(2, 1, box, "(>= (- Y_0 (* 2 X_0)) 0.01)")).answer == "unsat"


def test_a_query_without_constraints_on_outputs_is_sat_and_an_empty_box_unsat(tmp_path):
    layers = random_layers(FEW, 0)
    assert verdict(tmp_path, layers, query_text(3, 3, [UNIT] * 3)).answer == "sat"
    empty = query_text(3, 3, [UNIT] * 3, "(>= X_1 2.0)")
    assert verdict(tmp_path, layers, empty).answer == "unsat"


def test_inputs_that_are_no_float32_numbers_are_replayed_at_the_nearest_one(tmp_path):
    layers = random_layers(FEW, 1)
    result = verdict(tmp_path, layers, query_text(3, 3, [(0.1, 0.1), UNIT, UNIT], "(>= Y_0 -100.0)"))
    assert result.answer == "sat" and float(result.witness.inputs[0]) == float(np.float32(0.1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (3, 1), (3,)])
def test_shapes_of_the_file_do_not_matter(tmp_path, shape):
    layers = random_layers(FEW, 2)
    if len(shape) == 4:
        path = write_mlp(tmp_path / "net.onnx", layers, shape=shape)
    elif shape == (3,):  # vectors, which matrices multiply from the left
        nodes, tensors, value = [], [], "x"
        for i, (weight, bias) in enumerate(layers):
            tensors += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
            nodes.append(helper.make_node("MatMul", [f"w{i}", value], [f"m{i}"]))
            nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"z{i}"]))
            nodes.append(helper.make_node("Relu", [f"z{i}"], [f"a{i}"]))
            value = f"a{i}"
        path = write_graph(tmp_path / "net.onnx", nodes[:-1], tensors, shape, f"z{i}", (3,))
    else:  # the whole input is one example, without a batch
        weight = numpy_helper.from_array(layers[0][0].T.copy(), "w")
        nodes = [
            helper.make_node("Flatten", ["x"], ["flat"], axis=0),
            helper.make_node("MatMul", ["flat", "w"], ["z"]),
            helper.make_node("Relu", ["z"], ["y"]),
        ]
        path = write_graph(tmp_path / "net.onnx", nodes, [weight], shape, "y", (1, 8))
        layers = [
            (layers[0][0], np.zeros(8, np.float32)),
            (np.eye(8, dtype=np.float32), np.zeros(8, np.float32)),
        ]
    network, box = open_network(path), [UNIT] * 3
    row = np.eye(len(layers[-1][1]))[0]
    most = exact_maximum(layers, [0] * 3, [1] * 3, row)
    for excess, expected in ((-0.01, "sat"), (0.01, "unsat")):
        query = tmp_path / "query.vnnlib"
        query.write_text(query_text(3, len(row), box, f"(>= Y_0 {most + excess!r})"))
        assert decide(read_query(query), {"": network}, deadline=time.perf_counter() + 60).answer == expected


def test_an_input_of_one_number_is_no_batch(tmp_path):
    """As test_nano of VNN-COMP 2021: y = relu(2 x) for one x."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    weight = numpy_helper.from_array(np.full((1, 1), 2, np.float32), "w")
    network = open_network(write_graph(tmp_path / "net.onnx", nodes, [weight], (1,), "y", (1,)))
    query = tmp_path / "query.vnnlib"
    for condition, expected in (
        ("(<= Y_0 -1.0)", "unsat"),
        ("(>= Y_0 1.9)", "sat"),
        ("(>= Y_0 2.1)", "unsat"),
    ):
        query.write_text(query_text(1, 1, [(-1.0, 1.0)], condition))
        assert decide(read_query(query), {"": network}, deadline=time.perf_counter() + 60).answer == expected


def test_boxes_are_divided_where_the_bound_gains_most(tmp_path):
    """The linear bound of a wide box says little about which input to divide; its gradient does."""
    layers, box = random_layers((4, 10, 10, 10, 1), 2), [(-1.0, 1.0)] * 4
    most = exact_maximum(layers, *zip(*box, strict=True), np.ones(1))
    query = tmp_path / "query.vnnlib"
    query.write_text(query_text(4, 1, box, f"(>= Y_0 {most + 0.05 * abs(most) + 0.01!r})"))
    problems, _ = problems_of(read_query(query))
    networks = [open_network(write_mlp(tmp_path / "net.onnx", layers))]
    subject = JoinedNetworks.of(networks, problems[0], with_inputs=False)
    work = []
    for few in (True, False):
        search = BoxSearch(subject, problems[0], [subject.graph])
        search.few = few
        assert search.search(time.perf_counter() + 60) is None and search.finished
        work.append(search.work)
    assert work[0] < 0.7 * work[1]


def test_networks_of_64_bits_and_smooth_activations_are_decided(tmp_path):
    layers, box = random_layers((2, 5, 2), 3), [(-1.0, 1.0)] * 2
    for activation, dtype in (("Sigmoid", np.float32), ("Tanh", np.float64)):
        x = np.stack(np.meshgrid(*[np.linspace(-1, 1, 201)] * 2), -1).reshape(-1, 2)
        hidden = x @ layers[0][0].T + layers[0][1]
        hidden = np.tanh(hidden) if activation == "Tanh" else 1 / (1 + np.exp(-hidden))
        most = float((hidden @ layers[1][0].T + layers[1][1])[:, 0].max())
        for excess, expected in ((-0.01, "sat"), (0.02, "unsat")):
            text = query_text(2, 2, box, f"(>= Y_0 {most + excess!r})")
            assert verdict(tmp_path, layers, text, activation=activation, dtype=dtype).answer == expected


def two_copies(element_type="float32"):
    """The query whether a network has a smaller output at x + 0.1 than at x, in its two copies f and g."""
    first, second = (
        DeclaredNetwork(
            name,
            Variable(x, element_type, (1, 1)),
            Variable(y, element_type, (1, 1)),
            equal_to="f" * (name == "g"),
        )
        for name, x, y in (("f", "A", "B"), ("g", "C", "D"))
    )
    a, c, b, d = (Affine({key: 1.0}) for key in (0, 1, -1, -2))
    limits = [
        AtMostZero(Affine({key: sign}, -1.0 if sign > 0 else 0.0)) for key in (0, 1) for sign in (1.0, -1.0)
    ]
    far = compared(">=", c, a.plus(Affine({}, 0.1)))
    return Query("2.0", (first, second), alternatives([*limits, far, compared("<", d, b)]))


def test_a_query_may_compare_two_copies_of_a_network(tmp_path):
    increasing = [
        (np.array([[1.0], [2.0]], np.float32), np.array([0.0, -1.0], np.float32)),
        (np.ones((1, 2), np.float32), np.zeros(1, np.float32)),
    ]
    folded = [increasing[0], (np.array([[1.0, -2.0]], np.float32), np.zeros(1, np.float32))]
    for layers, expected in ((increasing, "unsat"), (folded, "sat")):
        network = open_network(write_mlp(tmp_path / "net.onnx", layers))
        result = decide(two_copies(), {"f": network}, deadline=time.perf_counter() + 60)
        assert result.answer == expected
    assert (
        result.witness.inputs[1] >= result.witness.inputs[0] + 0.1
        and result.witness.outputs[1] < result.witness.outputs[0]
    )


@pytest.mark.slow
def test_time_that_is_too_short_gives_no_verdict_and_boxes_continue(tmp_path):
    layers, box = random_layers((4, 16, 16, 2), 5), [UNIT] * 4
    most = exact_maximum(layers, [0] * 4, [1] * 4, [1, 0])
    text = query_text(4, 2, box, f"(>= Y_0 {most + 1e-3!r})")
    assert verdict(tmp_path, layers, text, seconds=0.0).answer == "timed-out"
    (tmp_path / "query.vnnlib").write_text(text)
    problems, _ = problems_of(read_query(tmp_path / "query.vnnlib"))
    subject = JoinedNetworks.of([open_network(tmp_path / "net.onnx")], problems[0], with_inputs=False)
    search = BoxSearch(subject, problems[0], [subject.graph])
    rounds = 0
    while not search.finished:
        search.at_once = 16
        assert search.search(time.perf_counter() + 0.05) is None and not search.exhausted
        rounds += 1
    assert rounds > 1


def test_a_search_over_signs_is_continued(tmp_path):
    layers, box = random_layers(MANY, 2), [UNIT] * 24
    query, row = tmp_path / "query.vnnlib", np.array([1.0, -1, 0, 0])
    most = exact_maximum(layers, *zip(*box, strict=True), row)
    query.write_text(query_text(24, 4, box, f"(>= (- Y_0 Y_1) {most + 1e-3!r})"))
    problems, _ = problems_of(read_query(query))
    networks = [open_network(write_mlp(tmp_path / "net.onnx", layers))]
    prover = Prover(JoinedNetworks.of(networks, problems[0], with_inputs=False), problems[0], single=False)
    calls = 0
    while not prover.excluded and calls < 1000:
        prover.run(time.perf_counter() + 0.02)
        calls += 1
    assert prover.excluded and calls > 1


def test_bounds_with_32_bits_contain_what_the_network_returns_with_32_bits():
    # a sum of large numbers that cancel: the rounding of the network itself is larger than the margin
    from holdfast.certifiers.bounds.crown import relaxed
    from holdfast.certifiers.bounds.graph import Region
    from holdfast.certifiers.bounds.tracing import traced

    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
    with torch.no_grad():
        net[2].weight.copy_(1e4 * torch.randn(1, 512, generator=generator))
    x = torch.rand(64, 4, generator=generator)
    graph = traced(net.requires_grad_(requires_grad=False), x)
    hidden = net[1](net[0](x))
    low, high = relaxed(graph, Region(x, x, x), substituted=False).bound(graph.output)
    for order in (torch.arange(512), torch.arange(512).flip(0), hidden.mean(0).argsort()):
        y = torch.zeros(64)
        for i in order:  # one rounding after each term, the worst order of summation
            y = y + hidden[:, i] * net[2].weight[0, i]
        y = y + net[2].bias
        assert ((low[:, 0] <= y) & (y <= high[:, 0])).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"element_type": "int8"}, UsageError, "int8.*declare it as real"),
        ({"element_type": "float64"}, TargetError, "float64.*float32"),
    ],
)
def test_element_types_without_sound_proofs_are_refused(tmp_path, change, error, message):
    network = open_network(write_mlp(tmp_path / "net.onnx", random_layers((1, 2, 1), 0)))
    with pytest.raises(error, match=message):
        decide(two_copies(**change), {"f": network}, deadline=time.perf_counter() + 5)


def test_networks_that_do_not_fit_are_refused(tmp_path):
    layers = random_layers(FEW, 0)
    with pytest.raises(TargetError, match=r"input X with the shape \[4\].*\[1, 3\]"):
        verdict(tmp_path, layers, query_text(4, 3, [UNIT] * 4, "(<= Y_0 0.0)"))
    with pytest.raises(TargetError, match=r"output Y with the shape \[2\].*\[1, 3\]"):
        verdict(tmp_path, layers, query_text(3, 2, [UNIT] * 3, "(<= Y_0 0.0)"))


def test_networks_without_bounds_are_refused_with_the_reason(tmp_path):
    path = write_graph(
        tmp_path / "a.onnx", [helper.make_node("Hardmax", ["x"], ["y"])], [], (1, 3), "y", (1, 3)
    )
    with pytest.raises(TargetError, match="only in onnxruntime.*Hardmax"):
        open_network(path)
    path = write_graph(
        tmp_path / "b.onnx", [helper.make_node("Floor", ["x"], ["y"])], [], (1, 3), "y", (1, 3)
    )
    Path(tmp_path / "q.vnnlib").write_text(query_text(3, 3, [UNIT] * 3, "(<= Y_0 0.0)"))
    with pytest.raises(HoldfastError, match="no sound bounds are known for"):
        decide(read_query(tmp_path / "q.vnnlib"), {"": open_network(path)}, deadline=time.perf_counter() + 5)
