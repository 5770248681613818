"""Translation of recorded ATen operations into operations of a graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.graph import Graph, Node, Operation
from holdfast.core.errors import NoBounds, UsageError

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
"""folders of code that is not the user's"""
LAYER = "holdfast.layer"
"""key of a recorded operation for the class of the layer or of the custom function in which it ran"""
MASKED = torch.finfo(torch.float32).min
"""numbers up to this one mark values that a softmax leaves out, such as minus infinity"""


@dataclass(frozen=True)
class TracedValue:
    """A value during the translation: an index of a node of the graph, or a constant tensor or number."""

    node: int | None
    constant: Any = None
    shape: torch.Size = torch.Size()
    """shape of the value of a node as it was recorded"""
    absent: Tensor | None = None
    """mask of this shape of the values of a node that are minus infinity in the recording, and finite in the graph"""

    @property
    def rank(self) -> int:
        """Number of dimensions as recorded."""
        return len(self.shape)


def shape_of_example(shape: Sequence[int]) -> torch.Size:
    """Return the shape of a value in the graph, which was recorded with the given shape on a batch of one example.

    A first dimension of 1 is left out, unless it is the only one. A number gets one dimension.
    """
    return torch.Size(shape[1:] if leads(shape) else shape or (1,))


def leads(shape: Sequence[int]) -> bool:
    """Return whether a recorded shape begins with a dimension that is left out in the graph."""
    return len(shape) > 1 and shape[0] == 1


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
        self.magnitudes: dict[int | None, int | None] = {}
        """the node x of each node |x|"""
        self.current: fx.Node | None = None

    def graph(self, output: fx.Node) -> Graph:
        """Return the graph of all recorded operations on which a node with the logits depends."""
        for node in self.recorded.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self.values[node] = TracedValue(0, shape=torch.Size((1, *self.shape)))
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
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise self.refused(f"the random operation {operation_name(node.target)}")
            given = [constant_of(arg) for arg in args]
            constant = node.target(*given, **{name: constant_of(arg) for name, arg in kwargs.items()})  # type: ignore[operator]
            return TracedValue(None, constant)
        name = operation_name(node.target)
        if name == "getitem":
            source, index = args
            chosen: TracedValue = source.constant[index.constant]
            return chosen
        if name not in _FOR_ABSENT and any(arg.absent is not None for arg in (*args, *kwargs.values())):
            raise self.refused(f"the operation {name} on values of minus infinity other than softmax")
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

    def add(
        self, operation: Operation, *inputs: TracedValue, shape: Sequence[int] | None = None
    ) -> TracedValue:
        """Add an operation to the graph, and return its value, which has the given shape in the recording: by default
        that of the present operation.
        """
        out = self.out if shape is None else torch.Size(shape)
        indices = tuple(value.node for value in inputs if value.node is not None)
        inexact = self.name not in _KNOWN_ERRORS
        self.nodes.append(
            Node(operation, indices, shape_of_example(out), self.place(), name=self.name, inexact=inexact)
        )
        return TracedValue(len(self.nodes), shape=out)

    @property
    def name(self) -> str:
        """Name of the present operation without its overload."""
        assert self.current is not None
        return operation_name(self.current.target)

    @property
    def out(self) -> torch.Size:
        """Shape of the result of the present operation, as recorded; of the first result of several."""
        return self._result.shape

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the result of the present operation."""
        return self._result.dtype

    @property
    def _result(self) -> Tensor:
        assert self.current is not None
        value = self.current.meta["val"]
        result: Tensor = value if isinstance(value, Tensor) else value[0]
        return result

    def shape_of(self, value: TracedValue) -> torch.Size:
        """Return the shape of a value of the graph for one example."""
        return shape_of_example(value.shape)

    def reshaped(self, value: TracedValue, shape: Sequence[int]) -> TracedValue:
        """Return a value in another shape, which is that of the recording, without a node if nothing changes."""
        if shape_of_example(shape) == self.shape_of(value):
            return TracedValue(value.node, shape=torch.Size(shape))
        function = partial(with_shape, shape=tuple(shape_of_example(shape)))
        return self.add(operations.Nonnegative(function), value, shape=shape)

    def aligned(self, value: TracedValue, out: Sequence[int]) -> TracedValue:
        """Return a value in a shape that broadcasts to a result of the given recorded shape in the graph, where the
        batch is a further dimension before all others.
        """
        padded = (*(1,) * (len(out) - value.rank), *value.shape)
        return self.exactly(value, padded[1:] if leads(out) else padded)

    def exactly(self, value: TracedValue, shape: Sequence[int]) -> TracedValue:
        """Return a value in exactly the given shape in the graph; a number has one dimension there."""
        wanted = torch.Size(shape or (1,))
        if wanted == self.shape_of(value):
            return value
        # recorded with one more dimension, which is left out
        return self.add(
            operations.Nonnegative(partial(with_shape, shape=tuple(wanted))), value, shape=(1, *wanted)
        )

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
        assert self.current is not None
        place, layer = self.place(), self.current.meta.get("custom", {}).get(LAYER)
        within = f" in {layer}" if layer else ""
        register = ", or register its bounds with holdfast.certifiers.register" if registrable else ""
        return NoBounds(
            f"no sound bounds are known for {what}{within}{f', at {place}' if place else ''}; replace it{register}"
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
        tuple(replace(n, inputs=tuple(places[i] for i in n.inputs)) for n in nodes),
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


def constant(to: Translator, value: TracedValue) -> Tensor:
    """A constant as a tensor of floating-point numbers that broadcasts to the result of the present operation for one
    example in the graph.
    """
    if not isinstance(value.constant, Tensor):
        return scalar(to, value.constant)
    tensor = value.constant if value.constant.is_floating_point() else value.constant.to(to.dtype)
    return tensor[0] if tensor.dim() == len(to.out) and leads(to.out) else tensor


def scalar(to: Translator, value: float) -> Tensor:
    """A number as a tensor in the data type of the result of the present operation."""
    return torch.tensor(float(value), dtype=to.dtype)


def shifted(to: Translator, x: TracedValue, offset: Tensor) -> TracedValue:
    """The sum of a value and a constant, in which minus infinity marks values that a softmax leaves out."""
    # where scores are large enough to make up for such a number, the exponentials of their rounding errors overflow
    absent = offset <= MASKED
    if not bool(absent.any()):
        return scaled(to, x, None, offset)
    value = scaled(to, x, None, offset.masked_fill(absent, 0.0))
    return replace(value, absent=absent.expand(to.shape_of(value)).reshape(to.out))


def scaled(to: Translator, x: TracedValue, scale: Tensor | None, offset: Tensor | None) -> TracedValue:
    """The present operation as scale * x + offset."""
    return to.add(operations.Scaled(scale, offset), to.aligned(x, to.out))


_FOR_ABSENT = {
    f"aten.{name}"
    for name in ("_softmax", "_safe_softmax", "_log_softmax", "view", "_unsafe_view", "reshape", "clone")
}
"""operations on values of which some are minus infinity"""
_KNOWN_ERRORS = frozenset(
    f"aten.{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "clone", "alias", "detach", "add", "sub", "rsub",
        "mul", "div", "neg", "addmm", "mm", "mv", "bmm", "baddbmm", "pow", "square", "exp", "log", "reciprocal", "sqrt",
        "rsqrt", "convolution", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training",
        "expand", "permute", "transpose", "t", "slice", "select", "flip", "split", "split_with_sizes", "unsafe_split",
        "unbind", "pixel_shuffle", "pixel_unshuffle", "mean", "sum", "avg_pool2d", "avg_pool3d",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest2d", "cat", "stack", "zeros_like",
        "constant_pad_nd", "relu", "threshold", "leaky_relu", "_prelu_kernel", "clamp", "clamp_min", "clamp_max",
        "hardtanh", "hardsigmoid", "abs", "maximum", "minimum", "where", "masked_fill", "tanh", "sigmoid",
        "gelu", "silu", "softplus", "elu", "celu", "log_sigmoid_forward", "hardswish", "mish", "erf", "sin", "cos",
        "atan", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "amax", "amin", "max", "min", "new_empty", "new_zeros", "empty_like", "fill", "copy", "slice_scatter",
        "select_scatter", "roll", "repeat", "gather", "index", "index_select", "im2col",
        *(f"{kind}_pad{dims}d" for kind in ("reflection", "replication") for dims in (1, 2, 3)),
    )
)  # fmt: skip
"""operations whose nodes in the graph have at least the error of the operation in float32 (`network_error`). Others are
computed in another way than by their nodes, such as a softmax; weights of a bilinear interpolation are differences of
places; and registered functions may be computed in any way"""


def with_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return values (n, ...) in the shape (n, *shape)."""
    return x.reshape(len(x), *shape)


def featured(
    to: Translator,
    x: TracedValue,
    function: Callable[[int], Callable[[Tensor], Tensor]],
    terms: int = 0,
    *,
    keeps_first: bool,
    out: Sequence[int] | None = None,
) -> TracedValue:
    """Add an operation along dimensions of a value, whose weights are not negative.

    `function` returns the operation for a number of further dimensions before those of the recording: 0 if the batch
    takes the place of a first dimension of 1, which the operation must keep, otherwise 1.
    """
    out = to.out if out is None else out
    if keeps_first and leads(x.shape) and leads(out):
        return to.add(operations.Nonnegative(function(0), terms), x, shape=out)
    operation = partial(
        in_recorded_shape, function=function(1), before=tuple(x.shape), after=tuple(shape_of_example(out))
    )
    return to.add(operations.Nonnegative(operation, terms), x, shape=out)


def in_recorded_shape(
    x: Tensor, function: Callable[[Tensor], Tensor], before: tuple[int, ...], after: tuple[int, ...]
) -> Tensor:
    """Return the values (n, *after) of a function of values in the shape (n, *before)."""
    return function(x.reshape(len(x), *before)).reshape(len(x), *after)


def applied(x: Tensor, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the value of a function with further arguments."""
    y: Tensor = function(x, *args, **kwargs)
    return y
