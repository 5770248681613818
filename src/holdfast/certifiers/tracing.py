"""Tracing of a model: its operations on tensors become a graph with bounds.

The model is run once on example inputs, and each ATen operation that torch executes is recorded. Code that depends on
the values of tensors cannot be recorded, and operations without sound bounds are refused. After tracing, the graph is
compared with the model on random inputs.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from holdfast.certifiers.graph import Graph, Node, Operation
from holdfast.certifiers.linear import Convolution, Dense, Nonnegative, Scaled, Sum
from holdfast.certifiers.nonlinear import MaxPool, Piecewise, ReLU, Smooth
from holdfast.core.errors import UsageError

_ROWS = 3
"""number of example inputs; a size that no network is likely to have inside, so that other sizes are not the batch's"""
_SAME = 1e-4
"""largest difference between graph and model, relative to the largest logit"""
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def traced(model: Callable[[Tensor], Tensor], sample: Tensor) -> Graph:
    """Return the graph of a model in evaluation mode, traced on the first of the inputs `sample` (n, *shape).

    Raises `UsageError` with the operation and its place in the user's code if the model contains an operation without
    sound bounds, or if its operations depend on the values of its inputs.
    """
    with torch.no_grad():
        return recording(model, sample).graph()


@dataclass(frozen=True, eq=False)
class Recording:
    """The recorded operations of a model, from which its graph is translated with the present weights."""

    module: fx.GraphModule
    """the operations; its parameters and buffers are those of the model"""
    shape: torch.Size
    """shape of one input"""

    def graph(self) -> Graph:
        """Return the graph with constants computed from the present parameters and buffers of the model. If gradients
        are enabled, they pass through the constants to the parameters.
        """
        return _Translator(self.module, self.shape).graph()


def recording(model: Callable[[Tensor], Tensor], sample: Tensor) -> Recording:
    """Return the operations of a model in evaluation mode, recorded on the first of the inputs `sample` (n, *shape).

    Raises the errors of `traced`.
    """
    x = sample[:1].expand(_ROWS, *sample.shape[1:]).clone()
    recorded = Recording(_recorded(model, x), sample.shape[1:])
    with torch.no_grad():
        _compare(recorded.graph(), model, sample)
    return recorded


def _recorded(model: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # late: it imports sympy, which takes a second

    def logits(inputs: Tensor) -> Tensor:
        return model(inputs)

    try:
        with torch.no_grad():
            return make_fx(logits, record_stack_traces=True)(x)
    except UsageError:
        raise
    except Exception as error:
        place = _place_of(traceback.extract_tb(error.__traceback__))
        raise UsageError(
            f"the operations of the model depend on the values of its inputs{place}, so that no bounds can be computed "
            "for all inputs of the threat model; replace `if` and `item()` on tensors by operations such as "
            f"torch.where, or use --method smoothing ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]


def _place_of(frames: traceback.StackSummary) -> str:
    own = [
        frame for frame in frames if not frame.filename.startswith(_LIBRARIES) and "<" not in frame.filename
    ]
    return f" in {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""


def _compare(graph: Graph, model: Callable[[Tensor], Tensor], sample: Tensor) -> None:
    """Raise an error if the graph and the model differ on the examples, or between batch sizes."""
    with torch.no_grad():
        expected, actual = model(sample), graph(sample)
    scale = expected.abs().amax().clamp(min=1.0)
    differs = not bool(((expected - actual).abs() <= _SAME * scale).all())
    if expected.shape != actual.shape or differs:
        raise UsageError(
            "the operations of the model depend on its inputs or on the batch size, so that no bounds can be computed "
            "for all inputs of the threat model: the recorded operations return other logits than the model; use "
            "--method smoothing, which only needs the predictions"
        )


@dataclass(frozen=True)
class _Value:
    """A value during the translation: an index of a node of the graph, or a constant tensor or number."""

    node: int | None
    constant: Any = None


class _Translator:
    """Translates the recorded operations into those of a graph."""

    def __init__(self, recorded: fx.GraphModule, shape: torch.Size) -> None:
        self.recorded = recorded
        self.shape = shape
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, _Value] = {}
        self.current: fx.Node | None = None

    def graph(self) -> Graph:
        """Return the graph of all recorded operations on which the logits depend."""
        for node in self.recorded.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self.values[node] = _Value(0)
            elif node.op == "get_attr":
                self.values[node] = _Value(None, _attribute(self.recorded, node.target))
            elif node.op == "call_function":
                self.values[node] = self._called(node)
            elif node.op == "output":
                return self._finished(node.args[0])
        raise AssertionError("a recorded graph has an output")

    def _finished(self, output: Any) -> Graph:
        value = self.values.get(output) if isinstance(output, fx.Node) else None
        if value is None or value.node is None:
            raise UsageError(
                "the outputs of the model do not depend on its inputs; check with holdfast doctor that the model is "
                "the trained one"
            )
        return _pruned(Graph(self.shape, tuple(self.nodes[: value.node])))

    def _called(self, node: fx.Node) -> _Value:
        args = [self._value(arg) for arg in node.args]
        kwargs = {name: self._value(arg) for name, arg in node.kwargs.items()}
        if not any(_varies(arg) for arg in (*args, *kwargs.values())):
            plain = [_plain(arg) for arg in args]
            constant = node.target(*plain, **{name: _plain(arg) for name, arg in kwargs.items()})  # type: ignore[operator]
            return _Value(None, constant)
        name = _name(node.target)
        if name == "getitem":
            source, index = args
            chosen: _Value = source.constant[index.constant]
            return chosen
        translate = TRANSLATIONS.get(name)
        if translate is None:
            raise self.refused(f"the operation {name}")
        return translate(self, *args, **kwargs)

    def _value(self, arg: Any) -> _Value:
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, list | tuple) and any(isinstance(each, fx.Node) for each in arg):
            return _Value(None, [self._value(each) for each in arg])
        return _Value(None, arg)

    def add(self, operation: Operation, *inputs: _Value) -> _Value:
        """Add an operation to the graph, and return its value."""
        assert self.current is not None
        value = self.current.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else self.current.meta["val"][0].shape
        if len(shape) < 1 or shape[0] != _ROWS:
            raise self.refused("an operation that does not keep the batch as its first dimension")
        indices = tuple(value.node for value in inputs if value.node is not None)
        self.nodes.append(Node(operation, indices, torch.Size(shape[1:]), self.place()))
        return _Value(len(self.nodes))

    def shape_of(self, value: _Value) -> torch.Size:
        """Return the shape of a value of the graph for one example."""
        assert value.node is not None
        return self.shape if value.node == 0 else self.nodes[value.node - 1].shape

    def place(self) -> str:
        """Return the place in the user's code of the present operation."""
        assert self.current is not None
        lines = (self.current.meta.get("stack_trace") or "").splitlines()
        places = [
            (line.strip(), code.strip())
            for line, code in zip(lines, lines[1:], strict=False)
            if line.strip().startswith("File ") and not any(library in line for library in _LIBRARIES)
        ]
        if not places:
            return ""
        where, code = places[-1]
        return f"{where.removeprefix('File ')}: {code}"

    def refused(self, what: str) -> UsageError:
        """Return the error for an operation without sound bounds, with its place in the user's code."""
        place = self.place()
        return UsageError(
            f"no sound bounds are known for {what}{f', at {place}' if place else ''}; replace it, register it with "
            "holdfast.certifiers.register, or use --method smoothing, which only needs the predictions"
        )


def _attribute(module: nn.Module, target: str) -> Tensor:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    tensor: Tensor = value
    return tensor


def _varies(value: _Value) -> bool:
    if value.node is not None:
        return True
    content = value.constant
    return isinstance(content, list | tuple) and any(
        isinstance(each, _Value) and _varies(each) for each in content
    )


def _plain(value: _Value) -> Any:
    content = value.constant
    if isinstance(content, list | tuple) and any(isinstance(each, _Value) for each in content):
        return [_plain(each) for each in content]
    return content


def _name(target: Any) -> str:
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


Translation = Callable[..., _Value]
"""function of a translator and the arguments of an operation that adds it to the graph and returns its value"""


def _without_batch(constant: Any, shape: torch.Size) -> Tensor:
    """A constant as a tensor that broadcasts to a value of the given shape for one example."""
    tensor = torch.as_tensor(constant)
    if tensor.dim() == len(shape) + 1:
        if tensor.shape[0] != 1 and not bool((tensor == tensor[:1]).all()):
            raise ValueError("constant differs between the examples of a batch")
        return tensor[0]
    return tensor


def _add(to: _Translator, a: _Value, b: _Value, *, alpha: _Value = _Value(None, 1)) -> _Value:
    factor = float(alpha.constant)
    if a.node is not None and b.node is not None:
        return to.add(Sum(factor), a, b)
    if a.node is not None:
        return to.add(Scaled(None, factor * _constant(to, b, a)), a)
    scale = None if factor == 1 else torch.tensor(factor, dtype=_dtype(a))
    return to.add(Scaled(scale, _constant(to, a, b)), b)


def _dtype(value: _Value) -> torch.dtype:
    return value.constant.dtype if isinstance(value.constant, Tensor) else torch.float32


def _constant(to: _Translator, value: _Value, beside: _Value) -> Tensor:
    try:
        tensor = _without_batch(value.constant, to.shape_of(beside))
    except ValueError as error:
        raise to.refused(
            "an operation with a constant that differs between the examples of a batch"
        ) from error
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _sub(to: _Translator, a: _Value, b: _Value, *, alpha: _Value = _Value(None, 1)) -> _Value:
    factor = float(alpha.constant)
    if a.node is not None and b.node is not None:
        return to.add(Sum(-factor), a, b)
    if a.node is not None:
        return to.add(Scaled(None, -factor * _constant(to, b, a)), a)
    return to.add(Scaled(torch.tensor(-factor, dtype=_dtype(a)), _constant(to, a, b)), b)


def _rsub(to: _Translator, a: _Value, b: _Value, alpha: _Value = _Value(None, 1)) -> _Value:
    return _sub(to, b, a, alpha=alpha)


def _mul(to: _Translator, a: _Value, b: _Value) -> _Value:
    if a.node is not None and b.node is not None:
        raise to.refused("the product of two values that both depend on the input")
    varying, constant = (a, b) if a.node is not None else (b, a)
    return to.add(Scaled(_constant(to, constant, varying), None), varying)


def _div(to: _Translator, a: _Value, b: _Value, **kwargs: _Value) -> _Value:
    if b.node is not None or kwargs:
        raise to.refused("the division by a value that depends on the input")
    return to.add(Scaled(1 / _constant(to, b, a), None), a)


def _neg(to: _Translator, x: _Value) -> _Value:
    return to.add(Scaled(torch.tensor(-1.0), None), x)


def _t(matrix: _Value) -> Tensor:
    tensor: Tensor = matrix.constant
    return tensor


def _addmm(
    to: _Translator,
    bias: _Value,
    x: _Value,
    weight: _Value,
    *,
    beta: _Value = _Value(None, 1),
    alpha: _Value = _Value(None, 1),
) -> _Value:
    if x.node is None or weight.node is not None or bias.node is not None:
        raise to.refused("a matrix product of two values that both depend on the input")
    matrix, offset = _t(weight).t() * alpha.constant, _t(bias) * beta.constant
    if offset.dim() > 1:
        offset = offset[0]
    return to.add(Dense(matrix.contiguous(), offset.expand(matrix.shape[0]).contiguous()), x)


def _mm(to: _Translator, x: _Value, weight: _Value) -> _Value:
    if x.node is None or weight.node is not None:
        raise to.refused("a matrix product of two values that both depend on the input")
    return to.add(Dense(_t(weight).t().contiguous(), None), x)


def _convolution(to: _Translator, x: _Value, weight: _Value, bias: _Value, *settings: _Value) -> _Value:
    stride, padding, dilation, transposed, output_padding, groups = (each.constant for each in settings)
    if x.node is None or weight.node is not None:
        raise to.refused("a convolution with a kernel that depends on the input")
    if transposed:
        raise to.refused("a transposed convolution")
    kernel, offset = _t(weight), None if bias.constant is None else _t(bias)
    return to.add(Convolution(kernel, offset, tuple(stride), tuple(padding), tuple(dilation), int(groups)), x)


def _batch_norm(
    to: _Translator, x: _Value, weight: _Value, bias: _Value, mean: _Value, var: _Value, *settings: _Value
) -> _Value:
    *training, _, eps = settings
    if any(bool(each.constant) for each in training):
        raise to.refused("batch norm in training mode")
    scale = torch.rsqrt(_t(var) + eps.constant)
    if weight.constant is not None:
        scale = scale * _t(weight)
    offset = -_t(mean) * scale
    if bias.constant is not None:
        offset = offset + _t(bias)
    shape = (-1, *(1,) * (len(to.shape_of(x)) - 1))
    value = to.add(Scaled(scale.reshape(shape), offset.reshape(shape)), x)
    return _Value(None, (value, None, None))


def _viewed(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
    """An operation that only changes the shape."""
    assert to.current is not None
    shape = to.current.meta["val"].shape
    if shape[0] != _ROWS:
        raise to.refused("a change of shape that mixes the examples of a batch")
    return to.add(Nonnegative(partial(_reshaped, shape=tuple(shape[1:]))), x)


def _reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(len(x), *shape)


def _moved(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
    """An operation that moves, copies or omits values, and keeps the batch as its first dimension."""
    return to.add(Nonnegative(_called_with(to, args, kwargs)), x)


def _called_with(
    to: _Translator, args: tuple[_Value, ...], kwargs: Mapping[str, _Value]
) -> Callable[[Tensor], Tensor]:
    assert to.current is not None
    return partial(
        _apply,
        function=to.current.target,
        args=tuple(_plain(arg) for arg in args),
        kwargs={name: _plain(arg) for name, arg in kwargs.items()},
    )


def _apply(x: Tensor, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    y: Tensor = function(x, *args, **kwargs)
    return y


def _of_features(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
    """An operation along one dimension, which must not be the batch."""
    dims = args[0].constant if args else 0
    rank = len(to.shape_of(x)) + 1
    if any(dim % rank == 0 for dim in (dims if isinstance(dims, list | tuple) else [dims])):
        raise to.refused("an operation along the batch dimension")
    return _moved(to, x, *args, **kwargs)


def _reduced(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
    """A sum or a mean over dimensions of the features."""
    rank = len(to.shape_of(x)) + 1
    dims = args[0].constant if args else None
    chosen = range(rank) if not dims else [dim % rank for dim in dims]
    if 0 in chosen:
        raise to.refused("a sum over the batch dimension")
    terms = 1
    for dim in chosen:
        terms *= to.shape_of(x)[dim - 1]
    return to.add(Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _average_pool(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
    window = args[0].constant
    terms = 1
    for size in window if isinstance(window, list | tuple) else [window]:
        terms *= size
    return to.add(Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _adaptive_pool(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
    terms = 1
    for size in to.shape_of(x)[1:]:
        terms *= size
    return to.add(Nonnegative(_called_with(to, args, kwargs), terms + 2), x)


def _cat(to: _Translator, tensors: _Value, dim: _Value = _Value(None, 0)) -> _Value:
    parts = tensors.constant
    if dim.constant % (len(to.shape_of(next(p for p in parts if p.node is not None))) + 1) == 0:
        raise to.refused("a concatenation along the batch dimension")
    if any(part.node is None for part in parts):
        raise to.refused("a concatenation with a constant")
    return to.add(Nonnegative(partial(_concatenated, dim=dim.constant)), *parts)


def _concatenated(*x: Tensor, dim: int) -> Tensor:
    return torch.cat(x, dim)


def _pad(to: _Translator, x: _Value, widths: _Value, value: _Value = _Value(None, 0.0)) -> _Value:
    if len(widths.constant) // 2 > len(to.shape_of(x)):
        raise to.refused("padding along the batch dimension")
    padded = to.add(Nonnegative(partial(F.pad, pad=list(widths.constant))), x)
    if not value.constant:
        return padded
    filled = F.pad(torch.zeros(to.shape_of(x)), list(widths.constant), value=float(value.constant))
    return to.add(Scaled(None, filled), padded)


def _relu(to: _Translator, x: _Value) -> _Value:
    return to.add(ReLU(), x)


def _leaky(to: _Translator, x: _Value, slope: _Value = _Value(None, 0.01)) -> _Value:
    factor = float(slope.constant)
    return to.add(Piecewise(partial(F.leaky_relu, negative_slope=factor), (0.0,), (factor, 1.0)), x)


def _clamp(to: _Translator, x: _Value, low: _Value = _Value(None), high: _Value = _Value(None)) -> _Value:
    if isinstance(low.constant, Tensor) or isinstance(high.constant, Tensor):
        raise to.refused("a clamp with a tensor as its limit")
    limits = tuple(float(each) for each in (low.constant, high.constant) if each is not None)
    least, most = (None if each.constant is None else float(each.constant) for each in (low, high))
    return to.add(Piecewise(partial(torch.clamp, min=least, max=most), limits, (0.0, 1.0)), x)


def _hardtanh(
    to: _Translator, x: _Value, low: _Value = _Value(None, -1.0), high: _Value = _Value(None, 1.0)
) -> _Value:
    return _clamp(to, x, low, high)


def _abs(to: _Translator, x: _Value) -> _Value:
    return to.add(Piecewise(torch.abs, (0.0,), (-1.0, 1.0)), x)


def _smooth(function: Callable[..., Tensor], curvature: float) -> Translation:
    def translate(to: _Translator, x: _Value, *args: _Value, **kwargs: _Value) -> _Value:
        settings = {name: _plain(arg) for name, arg in kwargs.items()}
        given = tuple(_plain(arg) for arg in args)
        if given:
            raise to.refused(f"{function.__name__} with the settings {given}")
        return to.add(Smooth(partial(function, **settings) if settings else function, curvature), x)

    return translate


def _max_pool(
    to: _Translator,
    x: _Value,
    kernel: _Value,
    stride: _Value = _Value(None),
    padding: _Value = _Value(None, [0, 0]),
    dilation: _Value = _Value(None, [1, 1]),
    ceil_mode: _Value = _Value(None, False),
) -> _Value:
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
    windows = partial(_windows, out=out, settings=settings)
    value = to.add(MaxPool(windows, windows(torch.ones(1, *shape))[0] == 0), x)
    return _Value(None, (value, None))


def _windows(x: Tensor, out: tuple[int, ...], settings: Mapping[str, Any]) -> Tensor:
    channels = x.shape[1]
    unfolded = F.unfold(x, **settings).unflatten(1, (channels, -1))
    return unfolded.transpose(2, 3).unflatten(2, out)


TRANSLATIONS: dict[str, Translation] = {
    "aten.add": _add,
    "aten.sub": _sub,
    "aten.rsub": _rsub,
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.neg": _neg,
    "aten.addmm": _addmm,
    "aten.mm": _mm,
    "aten.convolution": _convolution,
    "aten.native_batch_norm": _batch_norm,
    "aten.cudnn_batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_no_training": lambda to, x, w, b, m, v, *s: _batch_norm(
        to, x, w, b, m, v, *s
    ),
    "aten.view": _viewed,
    "aten._unsafe_view": _viewed,
    "aten.reshape": _viewed,
    "aten.squeeze": _viewed,
    "aten.unsqueeze": _viewed,
    "aten.clone": _viewed,
    "aten.alias": _viewed,
    "aten.detach": _viewed,
    "aten.dropout": _viewed,
    "aten.permute": _moved,
    "aten.transpose": _moved,
    "aten.slice": _of_features,
    "aten.select": _of_features,
    "aten.flip": _of_features,
    "aten.mean": _reduced,
    "aten.sum": _reduced,
    "aten.avg_pool2d": _average_pool,
    "aten._adaptive_avg_pool2d": _adaptive_pool,
    "aten.cat": _cat,
    "aten.constant_pad_nd": _pad,
    "aten.relu": _relu,
    "aten.relu_": _relu,
    "aten.threshold": lambda to, x, at, value: _threshold(to, x, at, value),
    "aten.leaky_relu": _leaky,
    "aten.leaky_relu_": _leaky,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.hardtanh": _hardtanh,
    "aten.hardtanh_": _hardtanh,
    "aten.abs": _abs,
    "aten.tanh": _smooth(torch.tanh, 0.77),
    "aten.sigmoid": _smooth(torch.sigmoid, 0.0963),
    "aten.gelu": _smooth(F.gelu, 0.9),
    "aten.silu": _smooth(F.silu, 0.5),
    "aten.softplus": _smooth(F.softplus, 0.25),
    "aten.max_pool2d_with_indices": _max_pool,
}
"""Translation of each operation that has sound bounds, by name."""


def _threshold(to: _Translator, x: _Value, at: _Value, value: _Value) -> _Value:
    if at.constant != 0 or value.constant != 0:
        raise to.refused("a threshold other than zero")
    return to.add(ReLU(), x)
