"""The ATen operations that have sound bounds, and the translation of recorded ones into operations of a graph."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from holdfast.certifiers.bounds import operations
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


# default arguments of ATen operations
_ONE = TracedValue(None, 1)
_FIRST = TracedValue(None, 0)
_ZERO = TracedValue(None, 0.0)
_LEAK = TracedValue(None, 0.01)
_ABSENT = TracedValue(None)
_MINUS_ONE = TracedValue(None, -1.0)
_PLUS_ONE = TracedValue(None, 1.0)
_NO_PADDING = TracedValue(None, [0, 0])
_DENSE_WINDOW = TracedValue(None, [1, 1])
_NO = TracedValue(None, False)


def _without_batch(constant: Any, shape: torch.Size) -> Tensor:
    """A constant as a tensor that broadcasts to a value of the given shape for one example."""
    tensor = torch.as_tensor(constant)
    if tensor.dim() == len(shape) + 1:
        if tensor.shape[0] != 1 and not bool((tensor == tensor[:1]).all()):
            raise ValueError("constant differs between the examples of a batch")
        return tensor[0]
    return tensor


def _add(to: Translator, a: TracedValue, b: TracedValue, *, alpha: TracedValue = _ONE) -> TracedValue:
    factor = float(alpha.constant)
    if a.node is not None and b.node is not None:
        return to.add(operations.Sum(factor), a, b)
    if a.node is not None:
        return to.add(operations.Scaled(None, factor * _constant(to, b, a)), a)
    scale = None if factor == 1 else torch.tensor(factor, dtype=_dtype(a))
    return to.add(operations.Scaled(scale, _constant(to, a, b)), b)


def _dtype(value: TracedValue) -> torch.dtype:
    return value.constant.dtype if isinstance(value.constant, Tensor) else torch.float32


def _constant(to: Translator, value: TracedValue, beside: TracedValue) -> Tensor:
    try:
        tensor = _without_batch(value.constant, to.shape_of(beside))
    except ValueError as error:
        raise to.refused(
            "an operation with a constant that differs between the examples of a batch"
        ) from error
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _sub(to: Translator, a: TracedValue, b: TracedValue, *, alpha: TracedValue = _ONE) -> TracedValue:
    factor = float(alpha.constant)
    if a.node is not None and b.node is not None:
        return to.add(operations.Sum(-factor), a, b)
    if a.node is not None:
        return to.add(operations.Scaled(None, -factor * _constant(to, b, a)), a)
    return to.add(operations.Scaled(torch.tensor(-factor, dtype=_dtype(a)), _constant(to, a, b)), b)


def _mul(to: Translator, a: TracedValue, b: TracedValue) -> TracedValue:
    if a.node is not None and b.node is not None:
        raise to.refused("the product of two values that both depend on the input")
    varying, constant = (a, b) if a.node is not None else (b, a)
    return to.add(operations.Scaled(_constant(to, constant, varying), None), varying)


def _div(to: Translator, a: TracedValue, b: TracedValue, **kwargs: TracedValue) -> TracedValue:
    if b.node is not None or kwargs:
        raise to.refused("the division by a value that depends on the input")
    return to.add(operations.Scaled(1 / _constant(to, b, a), None), a)


def _neg(to: Translator, x: TracedValue) -> TracedValue:
    return to.add(operations.Scaled(torch.tensor(-1.0), None), x)


def _t(matrix: TracedValue) -> Tensor:
    tensor: Tensor = matrix.constant
    return tensor


def _addmm(
    to: Translator,
    bias: TracedValue,
    x: TracedValue,
    weight: TracedValue,
    *,
    beta: TracedValue = _ONE,
    alpha: TracedValue = _ONE,
) -> TracedValue:
    if x.node is None or weight.node is not None or bias.node is not None:
        raise to.refused("a matrix product of two values that both depend on the input")
    matrix, offset = _t(weight).t() * alpha.constant, _t(bias) * beta.constant
    if offset.dim() > 1:
        if not bool((offset == offset[:1]).all()):
            raise to.refused("an offset that differs between the examples of a batch")
        offset = offset[0]
    return to.add(operations.Dense(matrix.contiguous(), offset.expand(matrix.shape[0]).contiguous()), x)


def _mm(to: Translator, x: TracedValue, weight: TracedValue) -> TracedValue:
    if x.node is None or weight.node is not None:
        raise to.refused("a matrix product of two values that both depend on the input")
    return to.add(operations.Dense(_t(weight).t().contiguous(), None), x)


def _convolution(
    to: Translator, x: TracedValue, weight: TracedValue, bias: TracedValue, *settings: TracedValue
) -> TracedValue:
    stride, padding, dilation, transposed, _, groups = (each.constant for each in settings)
    if x.node is None or weight.node is not None:
        raise to.refused("a convolution with a kernel that depends on the input")
    if transposed:
        raise to.refused("a transposed convolution")
    kernel, offset = _t(weight), None if bias.constant is None else _t(bias)
    return to.add(
        operations.Convolution(kernel, offset, tuple(stride), tuple(padding), tuple(dilation), int(groups)), x
    )


def _batch_norm(
    to: Translator,
    x: TracedValue,
    weight: TracedValue,
    bias: TracedValue,
    mean: TracedValue,
    var: TracedValue,
    *settings: TracedValue,
) -> TracedValue:
    *training, _, eps = settings
    if any(bool(each.constant) for each in training):
        raise to.refused("batch norm in training mode")
    scale = torch.rsqrt(_t(var) + eps.constant)
    if weight.constant is not None:
        scale = scale * _t(weight)
    shape = (-1, *(1,) * (len(to.shape_of(x)) - 1))
    # in two steps, because the offset bias - mean * scale would have a rounding error that is not bounded
    centred = to.add(operations.Scaled(None, -_t(mean).reshape(shape)), x)
    offset = None if bias.constant is None else _t(bias).reshape(shape)
    value = to.add(operations.Scaled(scale.reshape(shape), offset), centred)
    return TracedValue(None, (value, None, None))


def _viewed(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """An operation that only changes the shape."""
    assert to.current is not None
    shape = to.current.meta["val"].shape
    if shape[0] != ROWS:
        raise to.refused(
            "a change of shape that joins the dimension of the batch with others, as in torch.einsum, or in a linear "
            "layer for inputs of shape (batch, tokens, features)"
        )
    return to.add(operations.Nonnegative(partial(_reshaped, shape=tuple(shape[1:]))), x)


def _reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(len(x), *shape)


def _moved(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """An operation that moves, copies or omits values, and keeps the batch as its first dimension."""
    assert to.current is not None
    name, rank = operation_name(to.current.target), len(to.shape_of(x)) + 1
    permuted = name == "aten.permute" and args[0].constant[0] % rank != 0
    if permuted or (name == "aten.transpose" and any(each.constant % rank == 0 for each in args)):
        raise to.refused("an operation that moves the batch dimension")
    return to.add(operations.Nonnegative(_called_with(to, args, kwargs)), x)


def _called_with(
    to: Translator, args: tuple[TracedValue, ...], kwargs: Mapping[str, TracedValue]
) -> Callable[[Tensor], Tensor]:
    assert to.current is not None
    return partial(
        _apply,
        function=to.current.target,
        args=tuple(constant_of(arg) for arg in args),
        kwargs={name: constant_of(arg) for name, arg in kwargs.items()},
    )


def _apply(x: Tensor, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    y: Tensor = function(x, *args, **kwargs)
    return y


def _of_features(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """An operation along one dimension, which must not be the batch."""
    dims = args[0].constant if args else 0
    rank = len(to.shape_of(x)) + 1
    if any(dim % rank == 0 for dim in (dims if isinstance(dims, list | tuple) else [dims])):
        raise to.refused("an operation along the batch dimension")
    return _moved(to, x, *args, **kwargs)


def _reduced(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """A sum or a mean over dimensions of the features."""
    rank = len(to.shape_of(x)) + 1
    dims = args[0].constant if args else None
    chosen = range(rank) if not dims else [dim % rank for dim in dims]
    if 0 in chosen:
        raise to.refused("a sum over the batch dimension")
    terms = 1
    for dim in chosen:
        terms *= to.shape_of(x)[dim - 1]
    return to.add(operations.Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _average_pool(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    window = args[0].constant
    terms = 1
    for size in window if isinstance(window, list | tuple) else [window]:
        terms *= size
    if len(args) > 5 and (args[5].constant or 1) < 0:
        raise to.refused("average pooling with a negative divisor")
    return to.add(operations.Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _adaptive_pool(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    terms = 1
    for size in to.shape_of(x)[1:]:
        terms *= size
    return to.add(operations.Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _resized(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """Images in another size by nearest or bilinear interpolation, whose weights are not negative."""
    assert to.current is not None
    sizes = zip(to.shape_of(x)[1:], to.current.meta["val"].shape[2:], strict=True)
    # each value is part of so many results at most
    terms = math.prod(2 * math.ceil(after / before) for before, after in sizes)
    return to.add(operations.Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _cat(to: Translator, tensors: TracedValue, dim: TracedValue = _FIRST) -> TracedValue:
    parts = tensors.constant
    rank = len(to.shape_of(next(part for part in parts if part.node is not None))) + 1
    if dim.constant % rank == 0:
        raise to.refused("a concatenation along the batch dimension")
    if any(part.node is None and not bool((part.constant == part.constant[:1]).all()) for part in parts):
        raise to.refused("a concatenation with a constant that differs between the examples of a batch")
    fixed = [None if part.node is not None else part.constant[:1] for part in parts]
    joined = to.add(
        operations.Nonnegative(
            partial(
                operations.joined_parts,
                fixed=[None if each is None else each * 0 for each in fixed],
                dim=dim.constant,
            )
        ),
        *(part for part in parts if part.node is not None),
    )
    if all(each is None for each in fixed):
        return joined
    zeros = [torch.zeros(1, *to.shape_of(part)) for part in parts if part.node is not None]
    offset = operations.joined_parts(*zeros, fixed=fixed, dim=dim.constant)[0]
    return to.add(operations.Scaled(None, offset), joined)


def _stack(to: Translator, tensors: TracedValue, dim: TracedValue = _FIRST) -> TracedValue:
    rank = len(to.shape_of(next(part for part in tensors.constant if part.node is not None))) + 1
    place = dim.constant % (rank + 1)
    if place == 0:
        raise to.refused("a stack along the batch dimension")
    parts = []
    for part in tensors.constant:
        if part.node is None:
            parts.append(TracedValue(None, part.constant.unsqueeze(place)))
            continue
        shape = [*to.shape_of(part)]
        shape.insert(place - 1, 1)
        to.nodes.append(
            Node(
                operations.Nonnegative(partial(_reshaped, shape=tuple(shape))),
                (part.node,),
                torch.Size(shape),
                to.place(),
            )
        )
        parts.append(TracedValue(len(to.nodes)))
    return _cat(to, TracedValue(None, parts), TracedValue(None, place))


def _zeros_like(to: Translator, x: TracedValue, **kwargs: TracedValue) -> TracedValue:
    return TracedValue(None, torch.zeros(ROWS, *to.shape_of(x)))


def _pad(to: Translator, x: TracedValue, widths: TracedValue, value: TracedValue = _ZERO) -> TracedValue:
    if len(widths.constant) // 2 > len(to.shape_of(x)):
        raise to.refused("padding along the batch dimension")
    padded = to.add(operations.Nonnegative(partial(F.pad, pad=list(widths.constant))), x)
    if not value.constant:
        return padded
    filled = F.pad(torch.zeros(to.shape_of(x)), list(widths.constant), value=float(value.constant))
    return to.add(operations.Scaled(None, filled), padded)


def _relu(to: Translator, x: TracedValue) -> TracedValue:
    return to.add(operations.ReLU(), x)


def _leaky(to: Translator, x: TracedValue, slope: TracedValue = _LEAK) -> TracedValue:
    return _kinked(to, x, float(slope.constant), 1.0)


def _kinked(to: Translator, x: TracedValue, below: float, above: float) -> TracedValue:
    """A function with one slope below zero and another one above: below * x + (above - below) * relu(x).

    Written with a ReLU, its sign can be assumed in branch and bound; the linear bounds are the same.
    """
    positive = to.add(operations.Scaled(torch.tensor(above - below), None), to.add(operations.ReLU(), x))
    return to.add(operations.Sum(below), positive, x)


def _clamp(
    to: Translator, x: TracedValue, low: TracedValue = _ABSENT, high: TracedValue = _ABSENT
) -> TracedValue:
    if isinstance(low.constant, Tensor) or isinstance(high.constant, Tensor):
        raise to.refused("a clamp with a tensor as its limit")
    limits = tuple(float(each) for each in (low.constant, high.constant) if each is not None)
    least, most = (None if each.constant is None else float(each.constant) for each in (low, high))
    return to.add(operations.Piecewise(partial(torch.clamp, min=least, max=most), limits, (0.0, 1.0)), x)


def _abs(to: Translator, x: TracedValue) -> TracedValue:
    return _kinked(to, x, -1.0, 1.0)


def _smooth(function: Callable[..., Tensor], curvature: float, defaults: tuple[Any, ...] = ()) -> Translation:
    """Translation of a smooth function. Its further arguments must be the given defaults, if there are any."""

    def translate(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
        settings = {name: constant_of(arg) for name, arg in kwargs.items()}
        given = tuple(constant_of(arg) for arg in args)
        if given and given != defaults:
            raise to.refused(f"{function.__name__} with the settings {given}")
        return to.add(
            operations.Smooth(partial(function, **settings) if settings else function, curvature), x
        )

    return translate


def _max_pool(
    to: Translator,
    x: TracedValue,
    kernel: TracedValue,
    stride: TracedValue = _ABSENT,
    padding: TracedValue = _NO_PADDING,
    dilation: TracedValue = _DENSE_WINDOW,
    ceil_mode: TracedValue = _NO,
) -> TracedValue:
    if ceil_mode.constant:
        raise to.refused("max pooling with ceil_mode")
    shape = to.shape_of(x)
    size = tuple(kernel.constant)
    settings = {
        "kernel_size": size,
        "stride": tuple(stride.constant or size),
        "padding": tuple(padding.constant),
        "dilation": tuple(dilation.constant),
    }
    assert to.current is not None
    out = tuple(to.current.meta["val"][0].shape[2:])
    windows = partial(operations.pooling_windows, out=out, settings=settings)
    value = to.add(operations.MaxPool(windows, windows(torch.ones(1, *shape))[0] == 0), x)
    return TracedValue(None, (value, None))


def _threshold(to: Translator, x: TracedValue, at: TracedValue, value: TracedValue) -> TracedValue:
    if at.constant != 0 or value.constant != 0:
        raise to.refused("a threshold other than zero")
    return to.add(operations.ReLU(), x)


_VIEWS = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "clone", "alias", "detach")
TRANSLATIONS: dict[str, Translation] = {
    "aten.add": _add,
    "aten.sub": _sub,
    "aten.rsub": lambda to, a, b, alpha=_ONE: _sub(to, b, a, alpha=alpha),
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.neg": _neg,
    "aten.addmm": _addmm,
    "aten.mm": _mm,
    "aten.convolution": _convolution,
    "aten.native_batch_norm": _batch_norm,
    "aten.cudnn_batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_no_training": _batch_norm,
    **dict.fromkeys((f"aten.{name}" for name in _VIEWS), _viewed),
    "aten.permute": _moved,
    "aten.transpose": _moved,
    "aten.slice": _of_features,
    "aten.select": _of_features,
    "aten.flip": _of_features,
    "aten.pixel_shuffle": _moved,
    "aten.pixel_unshuffle": _moved,
    "aten.mean": _reduced,
    "aten.sum": _reduced,
    "aten.avg_pool2d": _average_pool,
    "aten._adaptive_avg_pool2d": _adaptive_pool,
    "aten.upsample_nearest2d": _resized,
    "aten.upsample_bilinear2d": _resized,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.zeros_like": _zeros_like,
    "aten.constant_pad_nd": _pad,
    "aten.relu": _relu,
    "aten.threshold": _threshold,
    "aten.leaky_relu": _leaky,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.hardtanh": lambda to, x, low=_MINUS_ONE, high=_PLUS_ONE: _clamp(to, x, low, high),
    "aten.abs": _abs,
    "aten.tanh": _smooth(torch.tanh, 0.77),
    "aten.sigmoid": _smooth(torch.sigmoid, 0.0963),
    "aten.gelu": _smooth(F.gelu, 0.9),
    "aten.silu": _smooth(F.silu, 0.5),
    "aten.softplus": _smooth(F.softplus, 0.25, (1, 20)),
    "aten.max_pool2d_with_indices": _max_pool,
}
"""Translation of each operation that has sound bounds, by name."""


def register(name: str, function: Callable[[Tensor], Tensor], curvature: float) -> None:
    """Give sound bounds to a function of single values that the tracer does not know, such as `aten.erf`.

    `name` is the ATen operation without its overload, as the error message of the tracer prints it. `function` computes
    it, and `curvature` is a Lipschitz constant of its derivative: the bounds are sound only if it is not too small.
    Raises `UsageError` if the curvature is not a positive number.
    """
    if not 0 < curvature < float("inf"):
        raise UsageError(
            f"curvature is {curvature}; expected a positive number, a Lipschitz constant of the derivative"
        )
    TRANSLATIONS[name] = _smooth(function, curvature)
