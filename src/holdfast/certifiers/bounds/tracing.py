"""Tracing of a model: its operations on tensors become a graph with bounds.

The model is run once on example inputs, and each ATen operation that torch executes is recorded. Code that depends on
the values of tensors cannot be recorded, and operations without sound bounds are refused. After tracing, the graph is
compared with the model on random inputs.
"""

import operator
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import annotate, get_current_meta, preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.bounds.translator import LAYER, LIBRARIES, Translator, operation_name
from holdfast.core.errors import NoBounds, TargetError, UsageError
from holdfast.core.outputs import of_classes, without_values

_SAME = 1e-4
"""largest difference between graph and model, relative to the largest logit"""
_OTHERS = 3
"""number of further inputs on which graph and model are compared"""


def traced(model: Callable[[Tensor], Tensor], sample: Tensor, *, simple: bool = False) -> Graph:
    """Return the graph of a model in evaluation mode, traced on the first of the inputs `sample` (n, *shape).

    With `simple`, as for networks of ONNX files, the code of the model is known not to read the values of tensors and
    not to change them in place, and most such models are recorded without the tools of torch for any code, whose import
    takes a second.

    Raises `NoBounds` with the operation and its place in the user's code if the model contains an operation without
    sound bounds, or if its operations depend on the values of its inputs, and `TargetError` if its logits are not
    finite.
    """
    with torch.no_grad():
        if simple:
            with suppress(NoBounds):
                return _recording(model, sample, _directly_recorded).graph()
        return recording(model, sample).graph()


@dataclass(frozen=True, eq=False)
class Recording:
    """The recorded operations of a model, from which its graph is translated with the present weights."""

    module: fx.GraphModule
    """the operations; its parameters and buffers are those of the model"""
    output: fx.Node
    """the operation that returns the logits"""
    shape: torch.Size
    """shape of one input"""
    probabilities: bool
    """whether probabilities of the logits, or their logarithms, follow"""

    def graph(self) -> Graph:
        """Return the graph with constants computed from the present parameters and buffers of the model. If gradients
        are enabled, they pass through the constants to the parameters.
        """
        graph = Translator(self.module, self.shape, TRANSLATIONS).graph(self.output)
        return replace(graph, probabilities=self.probabilities)


def recording(model: Callable[[Tensor], Tensor], sample: Tensor) -> Recording:
    """Return the operations of a model in evaluation mode, recorded on the first of the inputs `sample` (n, *shape).

    Raises the errors of `traced`.
    """
    return _recording(model, sample, _recorded)


def _recording(
    model: Callable[[Tensor], Tensor],
    sample: Tensor,
    record: Callable[[Callable[[Tensor], Tensor], Tensor], fx.GraphModule],
) -> Recording:
    with torch.no_grad():
        expected = model(sample)  # before the operations are recorded, because it checks values
    _refuse_not_finite(expected, model)
    module = record(model, sample[:1].clone())
    output, tail = _without_final_probabilities(module)
    recorded = Recording(module, output, sample.shape[1:], probabilities=tail is not _unchanged)
    with torch.no_grad():
        graph = recorded.graph()
        _compare(expected, tail(graph(sample)))
        others = _others(sample)
        _compare(model(others), tail(graph(others)))
    return recorded


def _others(sample: Tensor) -> Tensor:
    """Several different inputs near the first one. With them, a model in which examples depend on each other returns
    other outputs than its graph, which was recorded on one example.
    """
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(_OTHERS, *sample.shape[1:], generator=generator).to(sample)
    first = sample[:1]
    # inputs of zeros differ in nothing after a multiplication
    return first * (1 - 0.1 * share) if bool((first.abs() > 0.01).any()) else first + 0.1 * share


def _recorded(model: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # late: it imports sympy, which takes a second

    def logits(inputs: Tensor) -> Tensor:
        return model(inputs)

    try:
        with torch.no_grad(), without_values(), _node_by_node(model), _in_single_operations(model):
            # fake tensors have no values, so that code that reads some fails; inside functionalize it would not
            how: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
            make_fx(logits, **how)(x)
            # without mutations, no value changes after its use
            function: Callable[[Tensor], Any] = logits
            for _ in range(2):
                recorded = make_fx(
                    torch.func.functionalize(function, remove="mutations"), record_stack_traces=True, **how
                )(x)
                recorded.graph.eliminate_dead_code()
                if not any(map(_mutates, recorded.graph.nodes)):
                    break
                # operations of torch that consist of others, such as recurrent layers, change values inside
                function = fx.Interpreter(recorded).run
            return recorded
    except UsageError:
        raise
    except Exception as error:  # a network may fail in any way
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise NoBounds(
            f"the operations of the model cannot be recorded: {_reason(cause)}"
            f"{_place_of(traceback.extract_tb(cause.__traceback__))}. Bounds for all inputs of a threat model need "
            "operations on tensors that do not depend on the values, without `if` and `item()` on them and without "
            "numpy; the method smoothing needs no bounds"
        ) from error


_UNCHANGED = {
    getattr(torch.ops.aten.squeeze_, name): getattr(torch.ops.aten.squeeze, name)
    for name in ("default", "dim", "dims")
}
"""operations that change the shape of a tensor in place, which occur in products with vectors, with others that return
the same value
"""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that records the operations on tensors as the nodes of a graph."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root, self.graph = torch.nn.Module(), fx.Graph()
        self.known: dict[int, tuple[Tensor, fx.Node]] = {}
        """values by their ids, which stay valid because the values are kept"""
        self._put(x, self.graph.placeholder("x"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that torch does not import its compiler to exclude this class from compilation."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and record an operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, named = tree_map_only(Tensor, self.node_of, (args, kwargs))
        node = self.graph.call_function(_UNCHANGED.get(func, func), given, named)
        node.meta["stack_trace"] = get_current_meta().get("stack_trace", "")
        if isinstance(result, Tensor):
            self._put(result, node)
        else:
            node.meta["val"] = result
            for i, each in enumerate(result if isinstance(result, tuple | list) else ()):
                if isinstance(each, Tensor):
                    self._put(each, self.graph.call_function(operator.getitem, (node, i)))
        return result

    def node_of(self, value: Tensor) -> fx.Node:
        """Return the node of a value; one that is not known is a constant."""
        if id(value) not in self.known:
            name = f"constant_{len(self.known)}"
            self.root.register_buffer(name, value)
            self._put(value, self.graph.get_attr(name))
        return self.known[id(value)][1]

    def _put(self, value: Tensor, node: fx.Node) -> None:
        node.meta["val"] = value.detach()  # whose shape remains that of the value
        self.known[id(value)] = value, node


def _directly_recorded(model: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    """The recorded operations of a simple model."""
    recorder = _Recorder(x)
    with torch.no_grad(), without_values(), _node_by_node(model), _in_single_operations(model), recorder:
        y = model(x)
    recorder.graph.output(recorder.node_of(y))
    recorder.graph.eliminate_dead_code()
    return fx.GraphModule(recorder.root, recorder.graph)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _NoContext:
    """Context of a custom function that is computed without gradients."""

    def __init__(self, arguments: int) -> None:
        self.needs_input_grad = (False,) * arguments

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _BatchKept(TorchFunctionMode):
    """Mode in which `squeeze` without a dimension keeps the first one, which has more than one example in a batch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the result of a function of torch."""
        if func in (torch.squeeze, Tensor.squeeze) and len(args) == 1 and not kwargs:
            return args[0].squeeze(tuple(range(1, args[0].dim()))) if args[0].dim() else args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_single_operations(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context manager in which attention, recurrent layers and custom functions consist of single operations, each of
    which is recorded with the layer or custom function in which it runs.
    """
    running: list[Any] = []
    removed: list[Callable[[], None]] = []

    def begin(name: str) -> None:
        running.append(annotate({LAYER: name}))
        running[-1].__enter__()

    def end() -> None:
        running.pop().__exit__(None, None, None)

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own_context = cls.setup_context is torch.autograd.Function.setup_context
        begin(cls.__name__)
        try:
            return cls.forward(*([_NoContext(len(args))] if own_context else []), *args, **kwargs)
        finally:
            end()

    layers = model.modules() if isinstance(model, torch.nn.Module) else ()
    for layer in (each for each in layers if not type(each).__module__.startswith("holdfast.")):
        name = type(layer).__name__
        removed += [
            layer.register_forward_pre_hook(lambda *_, name=name: begin(name), prepend=True).remove,
            layer.register_forward_hook(lambda *_: end(), always_call=True).remove,
        ]
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    apply = torch.autograd.Function.__dict__["apply"]
    detect = transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # torch's context manager warns about other flags that it sets
    torch.autograd.Function.apply = classmethod(applied)  # type: ignore[method-assign,assignment]
    # reads the values of the mask, to choose a faster kernel
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        with sdpa_kernel(SDPBackend.MATH), _BatchKept():
            yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        torch._C._set_mkldnn_enabled(onednn)
        torch.backends.mha.set_fastpath_enabled(fast)
        for remove in removed:
            remove()


@contextmanager
def _node_by_node(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context manager in which graphs inside a model, such as those of ONNX files, are run node by node, so that each
    recorded operation gets the place of its node.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    graphs = [module for module in modules if isinstance(module, fx.GraphModule)]
    try:
        for graph in graphs:
            graph.forward = fx.Interpreter(graph).run
        with preserve_node_meta():
            yield
    finally:
        for graph in graphs:
            del graph.forward


_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
"""folders of Python and of installed packages"""

Tail = Callable[[Tensor], Tensor]
"""the last operations of a model, which do not change the order of its outputs"""

_SHAPES = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "select", "clone", "alias")
"""operations that return values of their input unchanged"""
_LEAST = torch.finfo(torch.float32).tiny
"""probabilities are replaced by at least this number before their logarithm"""


def _without_final_probabilities(recorded: fx.GraphModule) -> tuple[fx.Node, Tail]:
    """The node with the logits, before probabilities of them and their logarithms at the end of the model, and these
    last operations.

    The order of the classes is that of the logits, so that a margin is positive after the last operations if it is
    before. Several sigmoids remain: probabilities that are rounded to one are equal where their logits are not.
    """
    (output,) = (node for node in recorded.graph.nodes if node.op == "output")
    last: Any = output.args[0]
    if _is(last, "stack") and len(last.args[0]) == 2:
        return _of_one_output(recorded, last) or (last, _unchanged)
    steps: list[fx.Node] = []
    node = last
    while _is(node, "log", "clamp_min", "clamp"):
        if not _is(node, "log") and not _harmless_clamp(node):
            return last, _unchanged
        steps.append(node)
        node = node.args[0]
    if _is(node, "_softmax", "_log_softmax"):
        if node.args[1] not in (1, -1) or node.meta["val"].dim() != 2:
            return last, _unchanged
        steps.append(node)
        node = node.args[0]
    elif not _is(node, "sigmoid"):
        return last, _unchanged

    def tail(x: Tensor) -> Tensor:
        for step in reversed(steps):
            x = step.target(x, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        return x

    return node, tail


def _is(node: Any, *names: str) -> bool:
    """Whether a value is the result of an ATen operation with one of the names."""
    return isinstance(node, fx.Node) and operation_name(node.target) in [f"aten.{name}" for name in names]


def _of_one_output(recorded: fx.GraphModule, last: Any) -> tuple[fx.Node, Tail] | None:
    """The node with the logits (0, z) of a model with one output, and its last operations. The recorded outputs are
    those of `holdfast.core.outputs.of_classes`: (0, z), or the logarithms of 1 - p and p for a sigmoid p of z.

    Returns None for other outputs. Changes of the shape are left out, so that z has a dimension for features.
    """
    first, second = last.args[0]
    tail: Tail = _unchanged
    if _is(second, "log"):
        rest, second = _before_logarithm(first), _source(_before_logarithm(second))
        if not (_is(rest, "rsub") and _source(rest.args[0]) is second and rest.args[1:] == (1,)):
            return None
        if not _is(second, "sigmoid"):
            return None
        second, tail = second.args[0], _probabilities_of_one
    elif not _is(first, "zeros_like"):
        return None
    logit = _source(second)
    if not isinstance(logit, fx.Node) or logit.meta["val"].shape != (1, 1):
        return None
    with recorded.graph.inserting_before(last):
        zeros = recorded.graph.call_function(torch.ops.aten.zeros_like.default, (logit,))
        both = recorded.graph.call_function(torch.ops.aten.cat.default, ([zeros, logit], 1))
    zeros.meta["val"], both.meta["val"] = torch.zeros(1, 1), torch.zeros(1, 2)
    last.replace_all_uses_with(both)
    recorded.graph.eliminate_dead_code()
    return both, tail


def _before_logarithm(node: Any) -> Any:
    """The value of which a node is the logarithm, before the clamp in between."""
    clamp: Any = node.args[0] if _is(node, "log") else None
    return clamp.args[0] if _is(clamp, "clamp_min") else None


def _source(node: Any) -> Any:
    """The first value with one number for each example from which only changes of its shape lead to a node."""
    while _is(node, *_SHAPES) and node.args[0].meta["val"].numel() == 1:
        node = node.args[0]
    return node


def _probabilities_of_one(logits: Tensor) -> Tensor:
    return of_classes(logits[:, 1].sigmoid(), "probability")


def _harmless_clamp(node: fx.Node) -> bool:
    """Whether a clamp of probabilities changes neither the largest one nor makes another one equal to it, unless it is
    too small for a number with full precision.
    """
    source: Any = node.args[0]
    limits: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values(), None, None)
    low, high = limits[:2]
    if _is(source, "sigmoid"):
        return low is not None and low <= _LEAST and high is None
    if not _is(source, "_softmax"):
        return False
    if any(isinstance(limit, fx.Node) for limit in (low, high)):
        return False
    classes = source.meta["val"].shape[-1]
    return (low is None or low < 1 / classes) and (high is None or high >= 1)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _reason(error: BaseException) -> str:
    """Why the operations cannot be recorded. Messages of torch about values that are not known name its own symbols."""
    kind, first_line = type(error).__name__, (str(error).strip() or "no message").splitlines()[0][:200]
    return "it reads the values of a tensor" if "DataDependent" in kind else f"{kind}: {first_line}"


def _place_of(frames: traceback.StackSummary) -> str:
    """File and line at which an operation failed, and whether they are the user's or those of a library."""
    outside = [
        frame for frame in frames if not frame.filename.startswith(LIBRARIES) and "<" not in frame.filename
    ]
    own = [frame for frame in outside if not frame.filename.startswith(_INSTALLED)]
    if not outside:
        return f" in {_line(frames[-1])}, which is not your code" if frames else ""
    if not own:
        return f" in {_line(outside[-1])}, which is the code of a library and not yours"
    if own[-1] is outside[-1]:
        return f" in your code, {_line(own[-1])}"
    return (
        f" in {_line(outside[-1])}, which is the code of a library that your code calls in {_line(own[-1])}"
    )


def _line(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}, line {frame.lineno}: {frame.line}"


def _refuse_not_finite(logits: Tensor, model: Callable[[Tensor], Tensor]) -> None:
    """Raise `TargetError` if logits of clean inputs are NaN or infinite, with the names of such weights."""
    rows = (~logits.isfinite()).flatten(1).any(1)
    if not rows.any():
        return
    weights = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    wrong = [name.removeprefix("net.") for name, weight in weights if not weight.isfinite().all()]
    because = f"; its weights contain NaN or infinite values, in {', '.join(wrong[:5])}" if wrong else ""
    raise TargetError(
        f"the model returns NaN or infinite logits for {int(rows.sum())} of {len(rows)} clean inputs{because}. Nothing "
        "can be proved about such outputs; check the weights and the normalisation (mean and std), or load the weights "
        "again from their source"
    )


def _compare(expected: Tensor, actual: Tensor) -> None:
    """Raise an error if the outputs of the model and of its graph differ on examples, where they are finite."""
    known = expected.isfinite()
    scale = expected.where(known, 0.0).abs().amax().clamp(min=1.0)
    same = expected.shape == actual.shape
    if not same or not bool(((expected - actual).abs()[known] <= _SAME * scale).all()):
        raise NoBounds(
            "the operations of the model depend on the values of its inputs, or on the other examples of a batch, as a "
            "normalisation over the batch does, so that no bounds can be computed for all inputs of the threat model: "
            "the operations that were recorded on one example return other logits than the model"
        )
