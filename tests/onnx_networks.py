"""Small ONNX networks with random weights, and their exact extrema by mixed-integer programming."""

from itertools import pairwise

import numpy as np
import onnx
from onnx import helper, numpy_helper
from scipy.optimize import LinearConstraint, milp


def random_layers(sizes, seed):
    """Weights and biases of a fully connected network, float32."""
    rng = np.random.default_rng(seed)
    return [
        (
            (1.5 * rng.standard_normal((out, into)) / np.sqrt(into)).astype(np.float32),
            rng.normal(0, 0.3, out).astype(np.float32),
        )
        for into, out in pairwise(sizes)
    ]


def write_mlp(path, layers, *, shape=None, activation="Relu", dtype=np.float32):
    """Write a fully connected network to an ONNX file; `shape` is the shape of its input, (1, inputs) by default."""
    nodes, tensors, value = [helper.make_node("Flatten", ["x"], ["flat"])], [], "flat"
    for i, (weight, bias) in enumerate(layers):
        tensors += [
            numpy_helper.from_array(weight.astype(dtype), f"w{i}"),
            numpy_helper.from_array(bias.astype(dtype), f"b{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], [f"z{i}"], transB=1))
        value = f"z{i}"
        if i < len(layers) - 1:
            nodes.append(helper.make_node(activation, [value], [f"a{i}"]))
            value = f"a{i}"
    return write_graph(
        path, nodes, tensors, shape or (1, layers[0][0].shape[1]), value, (1, len(layers[-1][1])), dtype
    )


def write_graph(path, nodes, tensors, shape, output, output_shape, dtype=np.float32):
    """Write a network with the input `x` to an ONNX file, and return the path."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(output, kind, output_shape)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def exact_maximum(layers, low, high, row):
    """The largest value of row . y over a box of inputs of a ReLU network, by scipy's mixed-integer solver."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    # variables: inputs, then for each hidden layer its values and its signs
    bounds_low, bounds_high, integer = list(low), list(high), [0] * len(low)
    constraints, below, above = [], low, high
    start, width = 0, len(low)
    for weight, bias in layers[:-1]:
        weight, bias = weight.astype(float), bias.astype(float)
        centre, radius = weight @ (below + above) / 2 + bias, np.abs(weight) @ (above - below) / 2
        low_z, high_z = np.minimum(centre - radius, -0.1), np.maximum(centre + radius, 0.1)
        values, signs = len(bounds_low), len(bounds_low) + len(bias)
        bounds_low += [0.0] * (2 * len(bias))
        bounds_high += [*high_z, *np.ones(len(bias))]
        integer += [0] * len(bias) + [1] * len(bias)
        for i in range(len(bias)):
            z = {start + j: weight[i, j] for j in range(width)}
            minus = {key: -value for key, value in z.items()}
            constraints += [
                ({**minus, values + i: 1.0}, bias[i], np.inf),
                ({**minus, values + i: 1.0, signs + i: -low_z[i]}, -np.inf, bias[i] - low_z[i]),
                ({values + i: 1.0, signs + i: -high_z[i]}, -np.inf, 0.0),
            ]
        below, above, start, width = np.maximum(low_z, 0), np.maximum(high_z, 0), values, len(bias)
    matrix = np.zeros((len(constraints), len(bounds_low)))
    for k, (terms, _, _) in enumerate(constraints):
        for key, value in terms.items():
            matrix[k, key] = value
    weight, bias = (each.astype(float) for each in layers[-1])
    cost = np.zeros(len(bounds_low))
    cost[start : start + width] = -(np.asarray(row) @ weight)
    solved = milp(
        cost,
        constraints=LinearConstraint(matrix, [c[1] for c in constraints], [c[2] for c in constraints]),
        integrality=integer,
        bounds=(bounds_low, bounds_high),
        options={"mip_rel_gap": 1e-7},
    )
    assert solved.status == 0, solved.message
    return -solved.fun + float(np.asarray(row) @ bias)


def replayed(layers, x):
    """The outputs of a ReLU network for an input, with 64 bits."""
    for i, (weight, bias) in enumerate(layers):
        x = weight.astype(float) @ x + bias
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def query_text(inputs, outputs, box, *conditions):
    """The text of a query of VNN-LIB 1.0; `box` has a lower and an upper bound for each input."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    for i, (low, high) in enumerate(box):
        lines += [f"(assert (>= X_{i} {low!r}))", f"(assert (<= X_{i} {high!r}))"]
    return "\n".join((*lines, *(f"(assert {condition})" for condition in conditions))) + "\n"
