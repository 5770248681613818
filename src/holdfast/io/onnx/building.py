"""Builds a `torch.fx` graph from an ONNX model operator by operator, and computes each intermediate value on two
example batches.

Two example batches of different sizes pass through the network while it is built. Therefore shapes are known numbers,
values that depend only on constants and shapes are computed once, and a size that differs between the two is the batch
size.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

MAX_ELEMENTS = 2**28
"""Largest number of elements of one value on the examples; a larger one is an attack or an error."""
MAX_COMPUTED = 2**30
"""Largest number of bytes of all computed constants that are not in the file; each is three times in memory."""


class Unsupported(Exception):
    """Error for an ONNX operator or setting that the importer does not support. The model then runs in onnxruntime."""


@dataclass(frozen=True, eq=False)
class Value:
    """An intermediate value of an ONNX network: its node in the `torch.fx` graph, and its values on two example
    batches.

    The node is None if the value does not depend on the input.
    """

    node: fx.Node | None
    at: tuple[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value on the first of the two example batches."""
        return tuple(self.at[0].shape)

    @property
    def rank(self) -> int:
        """Number of dimensions of the value."""
        return len(self.shape)

    def varies(self, dim: int) -> bool:
        """Return whether the size of the dimension `dim` of the value depends on the batch size."""
        return bool(self.at[0].shape[dim] != self.at[1].shape[dim])

    @property
    def is_static(self) -> bool:
        """Whether the value is a constant tensor that depends neither on the input nor on the batch size."""
        first, second = self.at
        return self.node is None and first.shape == second.shape and bool(torch.equal(first, second))


@dataclass(frozen=True)
class Ints:
    """A vector of integers that is an argument of an ONNX operator, on two example batches. Integers that differ are
    multiples of the batch size.
    """

    at: tuple[tuple[int, ...], tuple[int, ...]]


class Builder:
    """The `torch.fx` graph of an ONNX model under construction, with the modules and constants that it uses."""

    def __init__(self, examples: tuple[Tensor, Tensor]) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.input = Value(self.graph.placeholder("x"), examples)
        self._sizes = (len(examples[0]), len(examples[1]))
        self._constants: dict[int, fx.Node] = {}
        self._kept: list[Value] = []
        self._computed = 0
        self._count = 0
        self._batch: fx.Node | None = None
        self.place = ""
        """file and node of the present operator, in the form of a stack trace of torch"""

    def module(self, name: str, module: nn.Module, *inputs: Value) -> Value:
        """Add a torch module to the graph and return its output.

        Modules without parameters are added too, so that their settings are visible.
        """
        self._count += 1
        target = f"{name.lower()}_{self._count}"
        module.eval()
        at = self._examples(module, inputs, {})
        if all(value.node is None for value in inputs):
            return Value(None, at)
        self.root.add_module(target, module)
        return self._placed(self.graph.call_module(target, tuple(map(self._argument, inputs))), at)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """Add the call of a torch function to the graph and return its result.

        No call is added if no argument depends on the input or on the batch size; then the result is a constant.
        """
        at = self._examples(function, args, kwargs)
        used = (*args, *kwargs.values())
        folds = all(value.node is None for value in _values(used))
        sized = any(isinstance(arg, Ints) and arg.at[0] != arg.at[1] for arg in used)
        if folds and not (sized and isinstance(at[0], Tensor) and at[0].is_floating_point()):
            return Value(None, at)
        node = self.graph.call_function(
            function,
            tuple(map(self._argument, args)),
            {name: self._argument(value) for name, value in kwargs.items()},
        )
        return self._placed(node, at)

    def _placed(self, node: fx.Node, at: tuple[Any, Any]) -> Value:
        """Return a node that was added for the present operator as a value, with the place of the operator."""
        node.meta["stack_trace"] = self.place
        return Value(node, at)

    def constant(self, tensor: Tensor) -> Value:
        """Return a tensor that does not depend on the input as a constant value of the graph."""
        return Value(None, (tensor, tensor))

    def item(self, values: Value, index: int) -> Value:
        """Return the output number `index` of an operator with several outputs."""
        return self.call(operator.getitem, values, index)

    def finish(self, output: Value) -> fx.GraphModule:
        """Return the finished graph as a module. Nodes on which `output` does not depend are removed."""
        self.graph.output(self._argument(output))
        built = fx.GraphModule(self.root, self.graph, "Imported")
        built.graph.eliminate_dead_code()
        built.graph.lint()
        built.recompile()
        built.delete_all_unused_submodules()
        return built.eval()

    def _examples(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        with torch.no_grad():
            first, second = (
                function(
                    *(_at(arg, i) for arg in args), **{name: _at(arg, i) for name, arg in kwargs.items()}
                )
                for i in (0, 1)
            )
        if isinstance(first, Tensor) and first.numel() > MAX_ELEMENTS:
            raise Unsupported(f"a value of {first.numel()} elements")
        return first, second

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return self._constant_node(arg) if arg.node is None else arg.node
        if isinstance(arg, Ints):
            return tuple(self._size(a, b) for a, b in zip(*arg.at, strict=True))
        if isinstance(arg, (tuple, list)):
            return type(arg)(self._argument(inner) for inner in arg)
        return arg

    def _constant_node(self, value: Value) -> fx.Node:
        if not value.is_static:
            raise Unsupported("a number that depends on the batch size, used as data")
        if id(value) not in self._constants:
            self._computed += 0 if value.at[0] is value.at[1] else value.at[0].nbytes
            if self._computed > MAX_COMPUTED:
                raise Unsupported(f"computed constants of more than {MAX_COMPUTED:,} bytes")
            name = f"constant_{len(self._constants)}"
            self.root.register_buffer(name, value.at[0].clone())
            self._kept.append(value)  # keeps the id in the table above valid
            self._constants[id(value)] = self.graph.get_attr(name)
        return self._constants[id(value)]

    def _size(self, first: int, second: int) -> int | fx.Node:
        if first == second:
            return first
        if first % self._sizes[0] or first // self._sizes[0] * self._sizes[1] != second:
            raise Unsupported("a size that is no multiple of the batch size")
        if self._batch is None:
            with self.graph.inserting_after(self.input.node):
                self._batch = self.graph.call_function(torch.Tensor.size, (self.input.node, 0))
        return (
            self._batch
            if first == self._sizes[0]
            else self.graph.call_function(operator.mul, (self._batch, first // self._sizes[0]))
        )


@dataclass(frozen=True)
class GraphStep:
    """An operator of an ONNX file that is to be converted: its inputs, its attributes and its number of outputs."""

    builder: Builder
    op: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 0
    n_outputs: int = 1
    fixed_batch: int | None = None
    """fixed batch size in the file; None if it is free"""

    @property
    def x(self) -> Value:
        """The first input of the ONNX operator."""
        return self.input(0)

    def given(self, index: int) -> bool:
        """Return whether the optional input number `index` of the ONNX operator is present."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int) -> Value:
        """Return the required input number `index` of the ONNX operator. Raises `Unsupported` if it is missing."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise Unsupported(f"{self.op} without its input {index}")
        return value

    def tensor(self, index: int) -> Tensor:
        """Return an input of the ONNX operator that must be constant. Raises `Unsupported` if it is not."""
        value = self.input(index)
        if not value.is_static:
            raise Unsupported(f"{self.op} whose input {index} is computed from the data")
        tensor: Tensor = value.at[0]
        return tensor

    def ints(self, index: int) -> Ints:
        """Return an integer input of the ONNX operator. It may depend on the batch size, but not on the data."""
        value = self.input(index)
        if value.node is not None:
            raise Unsupported(f"{self.op} whose input {index} is computed from the data")
        first, second = (tuple(int(number) for number in example.flatten().tolist()) for example in value.at)
        return Ints((first, second))

    def axes(self, index: int) -> tuple[int, ...] | None:
        """Return the axes to which the ONNX operator applies, or None if it has none. They are an attribute in older
        operators and an input in newer ones.
        """
        if "axes" in self.attributes:
            return tuple(self.attributes["axes"])
        return tuple(self.tensor(index).flatten().tolist()) if self.given(index) else None

    def setting(self, name: str, default: Any) -> Any:
        """Return the attribute `name` of the ONNX operator, or `default` if the operator does not have it."""
        return self.attributes.get(name, default)


Operator = Callable[[GraphStep], Value | tuple[Value, ...]]


def _at(arg: Any, i: int) -> Any:
    if isinstance(arg, (Value, Ints)):
        return arg.at[i]
    if isinstance(arg, (tuple, list)):
        return type(arg)(_at(inner, i) for inner in arg)
    return arg


def _values(args: tuple[Any, ...]) -> list[Value]:
    values = [arg for arg in args if isinstance(arg, Value)]
    for arg in args:
        if isinstance(arg, (tuple, list)):
            values += _values(tuple(arg))
    return values
