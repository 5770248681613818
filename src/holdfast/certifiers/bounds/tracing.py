"""Tracing of a model: its operations on tensors become a graph with bounds.

The model is run once on example inputs, and each ATen operation that torch executes is recorded. Code that depends on
the values of tensors cannot be recorded, and operations without sound bounds are refused. After tracing, the graph is
compared with the model on random inputs.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.bounds.translation import LIBRARIES, ROWS, Translator, operation_name
from holdfast.core.errors import NoBounds, TargetError, UsageError

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
    module = _recorded(model, x)
    output, tail = _without_softmax(module)
    recorded = Recording(module, output, sample.shape[1:])
    with torch.no_grad():
        _compare(recorded.graph(), tail, model, sample)
    return recorded


def _recorded(model: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # late: it imports sympy, which takes a second

    def logits(inputs: Tensor) -> Tensor:
        return model(inputs)

    try:
        with torch.no_grad():
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
        place = _place_of(traceback.extract_tb(cause.__traceback__))
        raise NoBounds(
            f"the operations of the model cannot be recorded{place} ({_reason(cause)}). "
            "Bounds for all inputs of a threat model need operations on tensors that do not depend on the values: "
            "write the network without `if` and `item()` on its values and without numpy"
        ) from error


Tail = Callable[[Tensor], Tensor]
"""the last operations of a model, which do not change the order of its outputs"""


def _without_softmax(recorded: fx.GraphModule) -> tuple[fx.Node, Tail]:
    """The node with the logits, before a softmax and logarithms at the end of the model, and these last operations.

    The order of the classes is that of the logits, so that a margin is positive after the softmax if it is before.
    """
    (output,) = (node for node in recorded.graph.nodes if node.op == "output")
    last = node = output.args[0]
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and operation_name(node.target) in (
        "aten.log",
        "aten.clamp_min",
        "aten.clamp",
    ):
        if operation_name(node.target) != "aten.log" and not _harmless_clamp(node):
            return last, _unchanged
        steps.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or operation_name(node.target) not in (
        "aten._softmax",
        "aten._log_softmax",
    ):
        return last, _unchanged
    if node.args[1] not in (1, -1) or node.meta["val"].dim() != 2:
        return last, _unchanged
    steps.append(node)
    logits: Any = node.args[0]

    def tail(x: Tensor) -> Tensor:
        for step in reversed(steps):
            x = step.target(x, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        return x

    return logits, tail


def _harmless_clamp(node: fx.Node) -> bool:
    """Whether a clamp of probabilities changes neither the largest one nor makes another one equal to it."""
    source = node.args[0]
    limits: tuple[Any, ...] = (*node.args[1:], *node.kwargs.values(), None, None)
    low, high = limits[:2]
    if not isinstance(source, fx.Node) or operation_name(source.target) != "aten._softmax":
        return False
    if any(isinstance(limit, fx.Node) for limit in (low, high)):
        return False
    classes = source.meta["val"].shape[-1]
    return (low is None or low < 1 / classes) and (high is None or high >= 1)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _reason(error: BaseException) -> str:
    """Why the operations cannot be recorded. Messages of torch about values that are not known name its own symbols."""
    kind = type(error).__name__
    return "it reads the values of a tensor" if "DataDependent" in kind else f"{kind}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]


def _place_of(frames: traceback.StackSummary) -> str:
    own = [
        frame for frame in frames if not frame.filename.startswith(LIBRARIES) and "<" not in frame.filename
    ]
    return f" in {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""


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


def _compare(graph: Graph, tail: Tail, model: Callable[[Tensor], Tensor], sample: Tensor) -> None:
    """Raise an error if the graph and the model differ on the examples, or between batch sizes."""
    with torch.no_grad():
        expected, actual = model(sample), tail(graph(sample))
    _refuse_not_finite(expected, model)
    scale = expected.abs().amax().clamp(min=1.0)
    differs = not bool(((expected - actual).abs() <= _SAME * scale).all())
    if expected.shape != actual.shape or differs:
        raise NoBounds(
            "the operations of the model depend on its inputs or on the batch size, so that no bounds can be computed "
            "for all inputs of the threat model: the recorded operations return other logits than the model"
        )
