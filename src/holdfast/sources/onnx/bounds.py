"""Number of nodes of an ONNX model with its functions expanded, and limits of its loops."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_ROUNDS = 1 << 16
"""maximum number of iterations of a loop"""
_DEFAULT = ("", "ai.onnx")
"""domain of the standard operators"""


class Endless(ValueError):
    """Functions that call each other in a cycle, or a loop without a limit."""


def n_nodes(proto: Any) -> int:
    """Return the number of nodes of the graph after every function call is expanded.

    Functions may call functions, so that a small file can describe more nodes than fit in memory. Raises `Endless` for
    a cycle.
    """
    functions = {(each.domain, each.name): each for each in proto.functions}
    known: dict[tuple[str, str], int] = {}
    open_: set[tuple[str, str]] = set()

    def called(name: tuple[str, str]) -> int:
        if name in open_:
            raise Endless(f"the function {name[1]!r} calls itself")
        if name not in known:
            open_.add(name)
            known[name] = counted(functions[name].node)
            open_.remove(name)
        return known[name]

    def counted(nodes: Iterable[Any]) -> int:
        total = 0
        for node in nodes:
            name = (node.domain, node.op_type)
            total += called(name) if name in functions else 1
            total += sum(counted(graph.node) for graph in _inside(node))
        return total

    return counted(proto.graph.node)


def refuse_endless(graph: Any, known: Mapping[str, NDArray[Any]]) -> None:
    """Raise `Endless` for a loop whose number of iterations is not limited by a constant.

    `known` are the tensors of the file; those of graphs inside nodes are added.
    """
    known = {**known, **_constants(graph)}
    for node in graph.node:
        if node.op_type == "Loop" and node.domain in _DEFAULT:
            rounds = known.get(node.input[0]) if node.input else None
            if rounds is None:
                raise Endless(f"the loop {node.name!r} has no constant number of rounds")
            if rounds.size != 1 or int(rounds.reshape(-1)[0]) > MOST_ROUNDS:
                raise Endless(f"the loop {node.name!r} has more than {MOST_ROUNDS:,} rounds")
        for inner in _inside(node):
            refuse_endless(inner, known)


def _inside(node: Any) -> Iterable[Any]:
    """Graphs inside a node, such as the body of a loop."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _constants(graph: Any) -> dict[str, NDArray[Any]]:
    """Initial values of a graph, and constant tensors and integers of its nodes."""
    from onnx import numpy_helper

    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _DEFAULT:
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(attribute.t)
                elif attribute.name == "value_int":
                    found[node.output[0]] = np.array(attribute.i)
    return found
