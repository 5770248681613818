"""Translation of recorded ATen operations into the operations of a graph with bounds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from holdfast.certifiers.bounds.graph import Graph, Node, Operation
from holdfast.core.errors import NoBounds, UsageError

ROWS = 3
"""number of example inputs with which a model is traced; no value but the batch is likely to have this size"""
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
"""folders of code that is not the user's"""


@dataclass(frozen=True)
class TracedValue:
    """A value during the translation: an index of a node of the graph, or a constant tensor or number."""

    node: int | None
    constant: Any = None


class Translator:
    """Translates recorded operations into those of a graph, with a table of the known operations."""

    def __init__(
        self, recorded: fx.GraphModule, shape: torch.Size, table: "Mapping[str, Translation]"
    ) -> None:
        self.table = table
        self.recorded = recorded
        self.shape = shape
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, TracedValue] = {}
        self.current: fx.Node | None = None

    def graph(self, output: fx.Node) -> Graph:
        """Return the graph of all recorded operations on which a node with the logits depends."""
        for node in self.recorded.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self.values[node] = TracedValue(0)
            elif node.op == "get_attr":
                self.values[node] = TracedValue(None, _attribute(self.recorded, node.target))
            elif node.op == "call_function":
                self.values[node] = self._called(node)
            if node is output:
                break
        value = self.values[output]
        if value.node is None:
            raise UsageError(
                "the outputs of the model do not depend on its inputs; check with holdfast doctor that the model is "
                "the trained one"
            )
        if value.node == 0:
            raise UsageError(
                "the model has no operation, so that nothing is to be proved; check it with holdfast doctor"
            )
        return _pruned(Graph(self.shape, tuple(self.nodes[: value.node])))

    def _called(self, node: fx.Node) -> TracedValue:
        args = [self._value(arg) for arg in node.args]
        kwargs = {name: self._value(arg) for name, arg in node.kwargs.items()}
        if not any(_varies(arg) for arg in (*args, *kwargs.values())):
            given = [constant_of(arg) for arg in args]
            constant = node.target(*given, **{name: constant_of(arg) for name, arg in kwargs.items()})  # type: ignore[operator]
            return TracedValue(None, constant)
        name = operation_name(node.target)
        if name == "getitem":
            source, index = args
            chosen: TracedValue = source.constant[index.constant]
            return chosen
        translate = self.table.get(name)
        if translate is None:
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            raise self.refused(f"the operation {name}", registrable=pointwise)
        return translate(self, *args, **kwargs)

    def _value(self, arg: Any) -> TracedValue:
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, list | tuple) and any(isinstance(each, fx.Node) for each in arg):
            return TracedValue(None, [self._value(each) for each in arg])
        return TracedValue(None, arg)

    def add(self, operation: Operation, *inputs: TracedValue) -> TracedValue:
        """Add an operation to the graph, and return its value."""
        assert self.current is not None
        value = self.current.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else self.current.meta["val"][0].shape
        if shape == (ROWS,):
            raise self.refused(
                "an operation whose result is one number for each example and has no dimension for features, as "
                "x[:, 0] (x[:, :1] has one)"
            )
        if len(shape) < 2 or shape[0] != ROWS:
            raise self.refused(
                "an operation whose result does not have the batch as its first and features as further dimensions"
            )
        indices = tuple(value.node for value in inputs if value.node is not None)
        self.nodes.append(Node(operation, indices, torch.Size(shape[1:]), self.place()))
        return TracedValue(len(self.nodes))

    def shape_of(self, value: TracedValue) -> torch.Size:
        """Return the shape of a value of the graph for one example."""
        assert value.node is not None
        return self.shape if value.node == 0 else self.nodes[value.node - 1].shape

    def place(self) -> str:
        """Return the place in the user's code of the present operation."""
        assert self.current is not None
        lines = (self.current.meta.get("stack_trace") or "").splitlines()
        places = [
            (line.strip(), code.strip())
            for line, code in pairwise(lines)
            if line.strip().startswith("File ") and not any(other in line for other in (*LIBRARIES, '"<'))
        ]
        if not places:
            return ""
        where, code = places[-1]
        return f"{where.removeprefix('File ')}: {code}"

    def refused(self, what: str, *, registrable: bool = False) -> NoBounds:
        """Return the error for an operation without sound bounds, with its place in the user's code. Functions of
        single values are `registrable`.
        """
        place = self.place()
        register = ", or register its bounds with holdfast.certifiers.register" if registrable else ""
        return NoBounds(
            f"no sound bounds are known for {what}{f', at {place}' if place else ''}; replace it{register}"
        )


def _attribute(module: nn.Module, target: str) -> Tensor:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    tensor: Tensor = value
    return tensor


def _varies(value: TracedValue) -> bool:
    if value.node is not None:
        return True
    content = value.constant
    return isinstance(content, list | tuple) and any(
        isinstance(each, TracedValue) and _varies(each) for each in content
    )


def operation_name(target: Any) -> str:
    """Name of an operation without its overload, such as `aten.add`."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.partition('::')[2]}"
    return str(getattr(target, "__name__", target))


def _pruned(graph: Graph) -> Graph:
    """The graph without operations on which the logits do not depend."""
    needed = {graph.output}
    for index in range(graph.output, 0, -1):
        if index in needed:
            needed.update(graph.node(index).inputs)
    kept = [index for index in range(1, graph.output + 1) if index in needed]
    places = {0: 0} | {index: place for place, index in enumerate(kept, 1)}
    nodes = (graph.node(index) for index in kept)
    return Graph(
        graph.shape,
        tuple(Node(n.operation, tuple(places[i] for i in n.inputs), n.shape, n.place) for n in nodes),
    )


Translation = Callable[..., TracedValue]
"""function of a translator and the arguments of an operation, which adds the operation to the graph and returns its
value"""


def constant_of(value: TracedValue) -> Any:
    """Return the constant of a value, with the constants of the values in a list."""
    content = value.constant
    if isinstance(content, list | tuple) and any(isinstance(each, TracedValue) for each in content):
        return [constant_of(each) for each in content]
    return content
