"""Tracing of a model: its operations on tensors become a graph with bounds.

The model is run once on example inputs, and each ATen operation that torch executes is recorded. Code that depends on
the values of tensors cannot be recorded, and operations without sound bounds are refused. After tracing, the graph is
compared with the model on random inputs.
"""

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import preserve_node_meta

from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.operators import LIBRARIES, ROWS, TRANSLATIONS, Translator, operation_name
from holdfast.core.errors import NoBounds, TargetError, UsageError
from holdfast.core.outputs import of_classes, without_values

_SAME = 1e-4
"""largest difference between graph and model, relative to the largest logit"""


def traced(model: Callable[[Tensor], Tensor], sample: Tensor) -> Graph:
    """Return the graph of a model in evaluation mode, traced on the first of the inputs `sample` (n, *shape).

    Raises `NoBounds` with the operation and its place in the user's code if the model contains an operation without
    sound bounds, or if its operations depend on the values of its inputs, and `TargetError` if its logits are not
    finite.
    """
    with torch.no_grad():
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

    def graph(self) -> Graph:
        """Return the graph with constants computed from the present parameters and buffers of the model. If gradients
        are enabled, they pass through the constants to the parameters.
        """
        return Translator(self.module, self.shape, TRANSLATIONS).graph(self.output)


def recording(model: Callable[[Tensor], Tensor], sample: Tensor) -> Recording:
    """Return the operations of a model in evaluation mode, recorded on the first of the inputs `sample` (n, *shape).

    Raises the errors of `traced`.
    """
    x = sample[:1].expand(ROWS, *sample.shape[1:]).clone()
    with torch.no_grad():
        expected = model(sample)  # before the operations are recorded, because it checks values
    _refuse_not_finite(expected, model)
    module = _recorded(model, x)
    output, tail = _without_final_probabilities(module)
    recorded = Recording(module, output, sample.shape[1:])
    with torch.no_grad():
        _compare(expected, tail(recorded.graph()(sample)))
    return recorded


def _recorded(model: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # late: it imports sympy, which takes a second

    def logits(inputs: Tensor) -> Tensor:
        return model(inputs)

    try:
        with torch.no_grad(), without_values(), _node_by_node(model):
            # fake tensors have no values, so that code that reads some fails; inside functionalize it would not
            how: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
            make_fx(logits, **how)(x)
            # without mutations, no value changes after its use
            recorded = make_fx(
                torch.func.functionalize(logits, remove="mutations"), record_stack_traces=True, **how
            )(x)
            recorded.graph.eliminate_dead_code()
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
    if not isinstance(logit, fx.Node) or logit.meta["val"].shape != (ROWS, 1):
        return None
    with recorded.graph.inserting_before(last):
        zeros = recorded.graph.call_function(torch.ops.aten.zeros_like.default, (logit,))
        both = recorded.graph.call_function(torch.ops.aten.cat.default, ([zeros, logit], 1))
    zeros.meta["val"], both.meta["val"] = torch.zeros(ROWS, 1), torch.zeros(ROWS, 2)
    last.replace_all_uses_with(both)
    recorded.graph.eliminate_dead_code()
    return both, tail


def _before_logarithm(node: Any) -> Any:
    """The value of which a node is the logarithm, before the clamp in between."""
    clamp: Any = node.args[0] if _is(node, "log") else None
    return clamp.args[0] if _is(clamp, "clamp_min") else None


def _source(node: Any) -> Any:
    """The first value with one number for each example from which only changes of its shape lead to a node."""
    while _is(node, *_SHAPES) and node.args[0].meta["val"].numel() == ROWS:
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
    """Raise an error if the outputs of the model and of its graph differ on the examples."""
    scale = expected.abs().amax().clamp(min=1.0)
    differs = expected.shape != actual.shape or bool(((expected - actual).abs() > _SAME * scale).any())
    if differs or not actual.isfinite().all():
        raise NoBounds(
            "the operations of the model depend on its inputs or on the batch size, so that no bounds can be computed "
            "for all inputs of the threat model: the recorded operations return other logits than the model"
        )
