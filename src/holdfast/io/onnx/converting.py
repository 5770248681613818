"""Converts a checked ONNX file to a `torch.fx.GraphModule` of ordinary modules and functions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from holdfast.io.onnx.building import Builder, GraphStep, Operator, Unsupported, Value
from holdfast.io.onnx.layers import LAYERS
from holdfast.io.onnx.pointwise import POINTWISE
from holdfast.io.onnx.reading import OnnxFile, onnx_module
from holdfast.io.onnx.shaping import SHAPING, as_tensor

OPERATORS: dict[str, Operator] = {**LAYERS, **POINTWISE, **SHAPING}
"""Functions that convert the supported operators, by their ONNX names."""
_SHOWN = 200
"""number of characters of the name of a node that is shown"""
_FREE_SIZES = (2, 3)
"""Batch sizes of the two examples. Sizes that differ between them depend on the batch size."""


def refuse_unknown_operators(file: OnnxFile) -> None:
    """Raise `Unsupported` if an ONNX file has operators that the importer does not support, with the first node of
    each. Operators that are not part of ONNX itself are named with their domain.
    """
    first: dict[str, str] = {}
    for node in file.proto.graph.node:
        operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        first.setdefault(operator, name_of(node))
    unknown = [
        f"{operator} (node {first[operator]!r})" for operator in sorted(first.keys() - OPERATORS.keys())
    ]
    if unknown:
        raise Unsupported(f"the operator{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}")


def convert(file: OnnxFile, output: str, *, batch_size: int | None) -> fx.GraphModule:
    """Convert the part of an ONNX network that computes `output` to torch. Raises `Unsupported` if it uses unsupported
    settings.

    If `batch_size` is None, the network accepts any batch size, even if the file specifies one. Otherwise it accepts
    only that size.
    """
    sizes = _FREE_SIZES if batch_size is None else (batch_size, batch_size)
    examples = (random_batch(file, sizes[0]), random_batch(file, sizes[1]))
    builder = Builder(examples)
    values = {name: builder.constant(as_tensor(array)) for name, array in file.tensors.items()}
    values[file.input.name] = builder.input
    fixed = file.input.shape[0] if batch_size is None else None
    for node, spent in _needed(file.proto.graph, output):
        step = GraphStep(
            builder,
            node.op_type,
            tuple(values[name] if name else None for name in node.input),
            {attribute.name: _setting(attribute) for attribute in node.attribute},
            file.opset,
            len([name for name in node.output if name]),
            fixed,
        )
        builder.place = f'  File "{file.path}", node {name_of(node)!r}\n    {node.op_type}\n'
        values.update(zip(node.output, _results(step, node), strict=False))
        for name in spent:  # a file may compute more than memory holds at once
            values.pop(name, None)
    if values[output].node is None:
        raise Unsupported(f"an output {output!r} that does not depend on the input")
    return builder.finish(values[output])


def _needed(graph: Any, output: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield the nodes that an output depends on, in order, each with the names of values that no later node uses."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        last = [name for name in dict.fromkeys((*node.input, *node.output)) if name and name not in needed]
        needed.update(filter(None, node.input))
        nodes.append((node, last))
    yield from reversed(nodes)


def name_of(node: Any) -> str:
    """Return the name of a node of an ONNX file, or that of its first output for one without a name."""
    name: str = node.name or next(iter(node.output), "")
    return name[:_SHOWN]


def _results(step: GraphStep, node: Any) -> tuple[Value, ...]:
    try:
        results = OPERATORS[step.op](step)
    except Unsupported as error:
        raise Unsupported(f"{error}, in the node {name_of(node)!r},") from error
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        # torch refused the example; its message is the best reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unsupported(f"{step.op} of the node {name_of(node)!r}: {reason}") from error
    return results if isinstance(results, tuple) else (results,)


def _setting(attribute: Any) -> Any:
    value = onnx_module().helper.get_attribute_value(attribute)
    return onnx_module().numpy_helper.to_array(value) if attribute.HasField("t") else value


def random_batch(file: OnnxFile, n: int) -> Tensor:
    """Return a batch of `n` random inputs in [0, 1) with the shape and type that an ONNX file declares. The inputs are
    the same in every call.
    """
    dtype = as_tensor(np.zeros(1, file.input.dtype)).dtype
    sizes = [n, *(size or 1 for size in file.input.shape[1:])]
    return torch.rand(sizes, generator=torch.Generator().manual_seed(n)).to(dtype)
