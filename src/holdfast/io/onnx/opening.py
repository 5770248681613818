"""Opens ONNX classifiers and networks for verification. They are converted to torch and compared with onnxruntime."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from holdfast.core.batch import decoded, encoded
from holdfast.core.errors import TargetError
from holdfast.core.outputs import OutputKind, is_single
from holdfast.core.types import Access
from holdfast.io.models.exported import SLICES, FixedBatch, rebatched
from holdfast.io.onnx.building import SHAPING, Builder, GraphStep, Operator, Unsupported, Value, as_tensor
from holdfast.io.onnx.layers import LAYERS, POINTWISE
from holdfast.io.onnx.reading import (
    OnnxColumns,
    OnnxFile,
    OnnxInput,
    bytes_beside,
    first_states,
    onnx_content,
    onnx_module,
    read_onnx,
    run_session,
    run_with_feeds,
    session,
    some_inputs,
)
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.sandbox_main import Limits

OPERATORS: dict[str, Operator] = {**LAYERS, **POINTWISE, **SHAPING}
"""Functions that convert the supported operators, by their ONNX names."""
_CONDITION = "If"
"""Operator with two graphs. It is replaced by one of them if its condition is constant."""
_SHOWN = 200
"""number of characters of the name of a node that is shown"""
_FREE_SIZES = (2, 3)
"""Batch sizes of the two examples. Sizes that differ between them depend on the batch size."""


def _operator(node: Any) -> str:
    """Return the name of the operator of a node, with its domain if it is not part of ONNX itself."""
    return str(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}")


def refuse_unknown_operators(file: OnnxFile) -> None:
    """Raise `Unsupported` if an ONNX file has operators that the importer does not support, with the first node of
    each. Operators that are not part of ONNX itself are named with their domain.
    """
    first: dict[str, str] = {}
    for node in file.proto.graph.node:
        first.setdefault(_operator(node), name_of(node))
    unknown = [
        f"{operator} (node {first[operator]!r})"
        for operator in sorted(first.keys() - OPERATORS.keys() - {_CONDITION})
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
    values |= _inputs(builder, file)
    fixed = file.input.shape[0] if batch_size is None else None
    _compute(builder, file, file.proto.graph, (output,), values, fixed)
    if values[output].node is None:
        raise Unsupported(f"an output {output!r} that does not depend on the input")
    return builder.finish(values[output])


def _compute(
    builder: Builder,
    file: OnnxFile,
    graph: Any,
    outputs: Sequence[str],
    values: dict[str, Value],
    fixed: int | None,
) -> None:
    """Add the part of a graph that computes `outputs` to the builder, and its results to `values`."""
    for node, spent in _needed(graph, outputs):
        if _operator(node) == _CONDITION:
            values.update(zip(node.output, _branch(builder, file, node, values, fixed), strict=True))
            continue
        if _operator(node) not in OPERATORS:
            raise Unsupported(f"the operator {_operator(node)} (node {name_of(node)!r})")
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


def _branch(
    builder: Builder, file: OnnxFile, node: Any, values: Mapping[str, Value], fixed: int | None
) -> list[Value]:
    """Return the outputs of that branch of a condition which its constant chooses."""
    condition = values[node.input[0]]
    if not condition.is_static:
        raise Unsupported(f"If of the node {name_of(node)!r} whose condition is computed from the data")
    name = "then_branch" if bool(condition.at[0]) else "else_branch"
    (graph,) = (attribute.g for attribute in node.attribute if attribute.name == name)
    tensors = {
        each.name: builder.constant(as_tensor(onnx_module().numpy_helper.to_array(each)))
        for each in graph.initializer
    }
    inner, outputs = {**values, **tensors}, [output.name for output in graph.output]
    _compute(builder, file, graph, outputs, inner, fixed)
    return [inner[output] for output in outputs]


def _inputs(builder: Builder, file: OnnxFile) -> dict[str, Value]:
    """Return the values of the inputs of a file by their names. Several inputs are columns of the rows."""
    if not file.columns:
        return {file.input.name: builder.input}
    values = {}
    for column in file.columns:
        if column.dtype == object:
            raise Unsupported(f"the input {column.name} of strings")
        first, n = column.places[0], len(column.places)
        if column.places == tuple(range(first, first + n)):  # for which bounds are known
            rows = builder.call(operator.getitem, builder.input, (slice(None), slice(first, first + n)))
        else:
            places = builder.constant(torch.tensor(column.places))
            rows = builder.call(torch.index_select, builder.input, 1, places)
        if column.dtype.kind in "iu":
            rows = builder.call(torch.round, rows)
        shaped = (
            builder.call(torch.unflatten, rows, 1, column.shape)
            if column.shape
            else builder.call(torch.flatten, rows)
        )
        dtype = as_tensor(np.zeros(1, column.dtype)).dtype
        values[column.name] = builder.call(torch.Tensor.to, shaped, dtype)
    return values


def _needed(graph: Any, outputs: Sequence[str]) -> Iterator[tuple[Any, list[str]]]:
    """Yield the nodes that outputs depend on, in order, each with the names of values that no later node uses."""
    needed, nodes = {*outputs}, list[tuple[Any, list[str]]]()
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        last = [name for name in dict.fromkeys((*node.input, *node.output)) if name and name not in needed]
        needed.update(filter(None, (*node.input, *_names_inside(node))))
        nodes.append((node, last))
    yield from reversed(nodes)


def _names_inside(node: Any) -> Iterator[str]:
    """Yield the names of the values that the graphs inside a node use, which may be values around it."""
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from (*inner.input, *_names_inside(inner))
        yield from (output.name for output in attribute.g.output)


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
    """Return a batch of `n` random inputs with the shape and type that an ONNX file declares: real numbers in [0, 1),
    whole numbers from 0 to 255, or code points of texts. The inputs are the same in every call.
    """
    if file.input.is_text:
        texts = some_inputs(file.input, n).reshape(n).tolist()
        return encoded(texts, max(map(len, texts)))
    dtype = as_tensor(np.zeros(1, file.input.dtype)).dtype
    sizes, draws = [n, *(size or 1 for size in file.input.shape[1:])], torch.Generator().manual_seed(n)
    if not dtype.is_floating_point:
        return torch.randint(256, sizes, generator=draws).to(dtype)
    return torch.rand(sizes, generator=draws).to(dtype)


TOLERANCES = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-4}
"""Largest difference between import and onnxruntime, in units of the largest output (at least 1), by float type
of the input. That of inputs of whole numbers is the one of float32."""
CHECKED_SIZES = (1, 3)
"""Batch sizes on which the import is compared with onnxruntime."""
LIMITS = Limits(copies=8, spare_bytes=2**31)
"""Limits of the process that first parses and runs a file."""

_COMPARED = 64
"""Number of random inputs on which scores and labels of a file are compared."""
_NUMBERS = frozenset(f"tensor({kind})" for kind in ("float16", "float", "double", "int32", "int64", "bool"))
"""Types of numeric outputs in onnxruntime; strings, maps and sequences are not scores."""


@dataclass(frozen=True)
class OnnxModel:
    """A network from an ONNX file, with its properties and notes for the report."""

    net: nn.Module
    access: Access
    hides: str
    """reason why the model gives no gradients; empty if it gives them"""
    classes: int
    files: Mapping[str, str]
    notes: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    """names of the classes, if the labels in the file are strings"""
    class_labels: tuple[int, ...] | None = None
    """labels of the classes, if they are integers other than 0, 1, 2, …"""
    output: OutputKind | None = None
    """"probability" if the output is one number of a sigmoid for each example, and None if it is unknown"""
    feature_names: tuple[str, ...] | None = None
    """names of the columns, if the file has several inputs"""
    inputs: Mapping[str, int] | None = None
    """number of columns of each input, if the file has several"""
    fixed: tuple[bool, ...] | None = None
    """whether each column is fixed under a threat without rules, if one is: it does not belong to the inputs of real
    numbers with the most values
    """
    example: tuple[int | None, ...] = ()
    """shape of one example"""


class Converted(nn.Module):
    """Wrapper of a network that computes in another float type than that of its inputs and outputs. Gradients are
    propagated.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the network, converted to the float type of the inputs."""
        y: Tensor = self.net(x.to(self.dtype))
        return y.to(x.dtype)


class WholeNumbers(nn.Module):
    """Wrapper of a network that reads whole numbers of one type, and returns float scores."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (n, classes) of whole numbers (n, length) of any type, also of floats without a fractional
        part. Gradients reach the rows of embeddings, and not the numbers.
        """
        y: Tensor = self.net(x.to(self.dtype))
        return y


class Runtime(nn.Module):
    """An ONNX model that runs in onnxruntime and returns scores without gradients."""

    def __init__(self, file: OnnxFile, output: str | None = None) -> None:
        super().__init__()
        self.file = file
        self.input: OnnxInput = file.input
        self.size = file.input.shape[0]
        """only batch size that the file accepts; None for any"""
        self.session = session(file.content, torch.get_num_threads())
        self.kinds = {value.name: value.type for value in self.session.get_outputs()}
        self.states = file.states
        self.counts_windows = self.size is None and not any(None in state.shape for state in file.states)
        """whether the first axis of the inputs is that of the windows, because the states have no axis of examples"""
        carried = {state.output for state in file.states}
        numbers = [name for name, kind in self.kinds.items() if kind in _NUMBERS and name not in carried]
        self.outputs = [output] if output else numbers

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of a batch. If the batch size of the file is fixed, the batch is processed in slices."""
        y = self.all(x)[0]
        return y.to(x.dtype) if x.is_floating_point() else y

    def __deepcopy__(self, memo: dict[int, object]) -> "Runtime":
        """Return the object itself, because a session cannot be copied and has no state that changes."""
        return self

    def all(self, x: Tensor) -> list[Tensor]:
        """Return all outputs of the ONNX model on a batch as tensors."""
        return [torch.from_numpy(values).to(x.device) for values in self.values(x)]

    def values(self, x: Tensor) -> list[np.ndarray[Any, Any]]:
        """Return all outputs of the ONNX model on a batch as arrays, which may contain strings."""
        if self.input.is_text:
            batch = np.array(decoded(x), object).reshape(len(x), *self.input.shape[1:])
        else:
            batch = x.detach().cpu().numpy().astype(self.input.dtype)
        size = self.size or len(batch)
        parts = [self._run(batch[start : start + size], size) for start in range(0, len(batch), max(size, 1))]
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _run(self, rows: np.ndarray[Any, Any], size: int) -> list[np.ndarray[Any, Any]]:
        missing = size - len(rows) if self.size else 0
        filled = np.concatenate((rows, np.repeat(rows[-1:], missing, axis=0))) if missing else rows
        outputs = (
            self._over_windows(filled)
            if self.states
            else run_session(self.session, self.outputs, self.file, filled)
        )
        return [values[: len(rows)] if missing else values for values in outputs]

    def _over_windows(self, batch: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Return the largest values of the outputs over the windows of a batch (n, samples), which have the size of the
        input of the file. The states are carried from each window to the next. The last one is filled up with zeros.
        """
        window, last = self.input.shape[-1] or batch.shape[-1], batch.ndim - 1
        if self.counts_windows and batch.ndim == 2:
            short = -batch.shape[1] % window
            clips = np.pad(batch, [(0, 0), (0, short)]).reshape(len(batch), -1, window)
            of_clips = [run_session(self.session, self.outputs, self.file, clip) for clip in clips]
            return [np.stack([values.max(0) for values in each]) for each in zip(*of_clips, strict=True)]
        feeds, names = first_states(self.states, len(batch)), [state.output for state in self.states]
        largest: list[np.ndarray[Any, Any]] = []
        for start in range(0, batch.shape[-1], window):
            part = batch[..., start : start + window]
            wide = [(0, window - part.shape[-1] if axis == last else 0) for axis in range(batch.ndim)]
            feeds[self.input.name] = np.pad(part, wide)
            answers = run_with_feeds(self.session, [*self.outputs, *names], feeds, batch.shape)
            scores, states = answers[: len(self.outputs)], answers[len(self.outputs) :]
            largest = [np.maximum(a, b) for a, b in zip(largest, scores, strict=True)] if largest else scores
            feeds |= {state.name: value for state, value in zip(self.states, states, strict=True)}
        return largest


class RuntimeLabels(nn.Module):
    """A module that returns the classes that an ONNX model predicts in onnxruntime as one-hot rows."""

    def __init__(self, runtime: Runtime, classes: Sequence[str | int]) -> None:
        super().__init__()
        self.runtime = runtime
        self.places = {label: place for place, label in enumerate(classes)}

    def forward(self, x: Tensor) -> Tensor:
        """Return the predicted class of each example as a one-hot row; the shape is (n, classes)."""
        rows = nn.functional.one_hot(self.of(x), len(self.places))
        return rows.to(x.dtype) if x.is_floating_point() else rows.float()

    def of(self, x: Tensor) -> Tensor:
        """Return the predicted class number (n,) of each example."""
        answers = self.runtime.values(x)[0].reshape(-1).tolist()
        return torch.tensor([self.places[answer] for answer in answers], dtype=torch.int64, device=x.device)


def open_onnx(
    path: Path,
    input_shape: Sequence[int] | None = None,
    constants: Mapping[str, float] | None = None,
    *,
    whole_numbers: bool = False,
    texts: bool = False,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> OnnxModel:
    """Return the classifier in an ONNX file: converted to torch and compared with onnxruntime, or run in onnxruntime.

    A model that cannot be imported gives only scores or labels, without gradients. `input_shape` is the shape of one
    example, which is needed for a file with free sizes, or that of a window for a file with a recurrent state, whose
    scores are the largest over the windows of an example. `constants` are the values of further inputs. With
    `whole_numbers` the input of the file has whole numbers, and the network takes a tensor (n, length) of them, of any
    type; the import calls `torch.nn.functional.embedding` for one-hot encodings and rows of tables. With `texts` the
    input of the file is a string, and the network takes rows of code points. Raises `TargetError` for a file that is
    not a classifier, or if the import differs from onnxruntime.

    The network of a file with several inputs takes rows of a table. `columns` are its columns in their order, with the
    names of categories; without it, they are in the order of the inputs.
    """
    file = _read(path, input_shape, constants or {}, columns, whole_numbers=whole_numbers, texts=texts)
    _refuse_regressor(file, path)
    output, classes, single, notes = _chosen_output(file, path)
    label_module = _differing_labels(file, output, path)
    if label_module is not None:
        hides = f"the largest value of {output} is not that of the class in {label_module.runtime.outputs[0]}"
        notes = (f"{hides}, so only the classes are used, without scores and gradients",)
        return OnnxModel(
            label_module, "labels", hides, classes, file.files, notes, *_class_names(file.labels, classes)
        )
    access: Access
    notes += file.notes
    if file.input.is_text:
        hides = f"the input {file.input.name} is a text, which has no gradients"
        names = _class_names(file.labels, classes)
        return OnnxModel(Runtime(file, output), "scores", hides, classes, file.files, notes, *names)
    states = {state.name for state in file.states}
    notes += tuple(
        f"the input {name} is {value:g}" for name, value in (constants or {}).items() if name not in states
    )
    if file.states:
        starts = ", ".join(f"{state.name} starts at {state.start:g}" for state in file.states)
        size = f"{file.input.shape[-1]:,} values"
        carried = f"the state {starts} for each example and is carried over its windows of {size}"
        notes += (f"{carried}; the scores are the largest over the windows",)
    try:
        if file.states:
            raise Unsupported(f"the recurrent state {file.states[0].name}")
        refuse_unknown_operators(file)
        net, import_notes = _imported(file, output)
        _compare(net, file, output, path)
        access, hides = "gradients", ""
        notes += import_notes
    except Unsupported as reason:
        net, access, hides = Runtime(file, output), "scores", f"{reason} cannot be imported"
        notes += (f"{hides}; the model runs in onnxruntime, with scores only and without gradients",)
        notes += () if net.size is None else (_fixed_note(net.size),)
    names = _class_names(file.labels, classes)
    kind: OutputKind | None = "probability" if single and _is_sigmoid(file.proto.graph, output) else None
    opened = OnnxModel(
        net, access, hides, classes, file.files, notes, *names, kind, example=file.input.shape[1:]
    )
    return _with_columns(opened, file.columns) if file.columns else opened


def _read(
    path: Path,
    input_shape: Sequence[int] | None,
    constants: Mapping[str, float],
    columns: Mapping[str, Sequence[str]] | None = None,
    *,
    whole_numbers: bool,
    texts: bool,
) -> OnnxFile:
    """Return the content of a file that a separate process has parsed and run without harm."""
    content = onnx_content(path)
    kinds = {"whole_numbers": whole_numbers, "texts": texts}
    request = {
        "input_shape": None if input_shape is None else list(input_shape),
        "constants": dict(constants),
        "columns": columns and {name: list(values) for name, values in columns.items()},
        **kinds,
    }
    beside = bytes_beside(path)
    with read_under_limits("onnx_files", path, LIMITS, content=content, n_bytes_beside=beside, **request):
        return read_onnx(path, input_shape, content=content, constants=constants, columns=columns, **kinds)


def _with_columns(opened: OnnxModel, columns: Sequence[OnnxColumns]) -> OnnxModel:
    """Return the model of a file with several inputs with the names of its columns, and which of them are fixed."""
    sizes = [math.prod(column.shape) if column.dtype.kind == "f" else 0 for column in columns]
    names: dict[int, tuple[str, bool]] = {}
    for column, size in zip(columns, sizes, strict=True):
        one = len(column.places) == 1
        for k, place in enumerate(column.places):
            names[place] = (column.name if one else f"{column.name}_{k}", size < max(sizes))
    listed, fixed = zip(*(names[place] for place in sorted(names)), strict=True)
    inputs = {column.name: len(column.places) for column in columns}
    return replace(opened, feature_names=listed, inputs=inputs, fixed=fixed if any(fixed) else None)


_SAME_RANGE = frozenset(
    ("Cast", "Flatten", "Identity", "ReduceMax", "ReduceMean", "Reshape", "Squeeze", "Unsqueeze")
)
"""Operators whose results are probabilities if their first inputs are."""


def _is_sigmoid(graph: Any, output: str, outside: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Return whether an output of a graph is that of a sigmoid, in all branches of its conditions. `outside` are the
    nodes around the graph by their outputs.
    """
    maker = {**outside, **{name: node for node in graph.node for name in node.output}}
    while output in maker:
        node = maker.pop(output)  # once, so that the search ends also in a file with a cycle
        if node.op_type == "If":
            place = list(node.output).index(output)
            return all(_is_sigmoid(branch.g, branch.g.output[place].name, maker) for branch in node.attribute)
        if node.op_type not in _SAME_RANGE:
            return bool(node.op_type == "Sigmoid")
        output = node.input[0]
    return False


def _refuse_regressor(file: OnnxFile, path: Path) -> None:
    """Raise `TargetError` if an output of the file is that of a regressor of ai.onnx.ml."""
    graph = file.proto.graph
    for node in graph.node:
        if node.op_type.endswith("Regressor") and {*node.output} & {value.name for value in graph.output}:
            raise TargetError(
                f"{str(path)!r} returns {node.output[0]} of a {node.op_type}, which is a number and not the scores of "
                "classes. Classifiers are supported: a float output of shape (N, classes)"
            )


def _differing_labels(file: OnnxFile, output: str, path: Path) -> RuntimeLabels | None:
    """Return the labels of the file as a module if they differ from the classes of the largest scores, or None.

    A support vector machine predicts by the votes of pairs of classes, so its labels are used. For other classifiers
    the largest score is used, because onnxruntime computes the labels of some small tree ensembles differently. Raises
    `TargetError` for a file without class labels whose integer output is not the class of the largest score, such as a
    clustering.
    """
    voting = any(node.op_type == "SVMClassifier" for node in file.proto.graph.node)
    if file.labels and not voting:
        return None
    runtime = Runtime(file, output)
    label_type = "tensor(string)" if file.labels and isinstance(file.labels[0], str) else "tensor(int64)"
    names = [name for name, kind in runtime.kinds.items() if kind == label_type and name != output]
    if not names:
        return None
    x = random_batch(file, file.input.shape[0] or _COMPARED)
    scores = runtime.all(x)[0]
    if scores.dim() != 2 or scores.shape[1] < 2 or (file.labels and len(file.labels) != scores.shape[1]):
        return None
    largest, second_largest = scores.topk(2, dim=1).values.T
    clear = largest > second_largest
    for name in names:
        labels = Runtime(file, name)
        if file.labels:
            answered = RuntimeLabels(labels, file.labels)
            if not torch.equal(answered.of(x)[clear], scores.argmax(1)[clear]):
                return answered
            continue
        predicted = labels.all(x)[0].reshape(len(x), -1)
        if predicted.shape[1] == 1 and not torch.equal(predicted[clear, 0], scores.argmax(1)[clear]):
            raise TargetError(
                f"{str(path)!r} returns {name}, which is not the index of the largest value of {output}, as a "
                "clustering does. Classifiers are supported: a float output of shape (N, classes), whose largest value "
                "is at the predicted class"
            )
    return None


def _class_names(
    labels: Sequence[str | int], classes: int
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Return the names of the classes and their labels, of which at least one is None.

    Strings are names. Integers are labels, unless they are 0, 1, 2, ….
    """
    if len(labels) != classes or tuple(labels) == tuple(range(classes)):
        return None, None
    if all(isinstance(label, str) for label in labels):
        return tuple(map(str, labels)), None
    return None, tuple(map(int, labels))


def _imported(file: OnnxFile, output: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the converted network, and notes.

    It accepts any batch size. If its operators need the batch size of the file, they are mapped over slices of that
    size, or else the slices are processed one after another.
    """
    net: nn.Module
    notes: tuple[str, ...] = ()
    try:
        net = convert(file, output, batch_size=None)
    except Unsupported:
        size = file.input.shape[0]
        if size is None:
            raise
        net = rebatched(convert(file, output, batch_size=size), size, file.input.shape[1:], _torch_type(file))
        notes = (_fixed_note(size),) if isinstance(net, FixedBatch) else ()
    net.register_forward_pre_hook(partial(_refuse_shape, file.input.shape[1:]))
    if file.input.dtype == np.float32:
        return net, notes
    if file.input.dtype.kind in "iu":
        return WholeNumbers(net, _torch_type(file)), notes
    return Converted(net, _torch_type(file)), (*notes, f"the model computes in {file.input.dtype}")


def _fixed_note(size: int) -> str:
    """Return the note for a model whose slices of the batch size of its file are processed one after another."""
    return (
        f"the model accepts only batches of {size} examples; {SLICES} "
        "torch.onnx.export(net, (x,), FILE, input_names=['x'], dynamic_axes={'x': {0: 'n'}})"
    )


def _refuse_shape(shape: tuple[int | None, ...], net: nn.Module, inputs: tuple[Tensor]) -> None:
    """Raise `TargetError` for inputs of another shape. The error of torch would refer to generated code."""
    if tuple(inputs[0].shape[1:]) != shape:
        raise TargetError(
            f"an input has shape {tuple(inputs[0].shape[1:])}, but the ONNX file requires {shape}. "
            "Reshape the data, or correct the input shape if the sizes in the file are free"
        )


def _torch_type(file: OnnxFile) -> torch.dtype:
    return random_batch(file, 1).dtype


def _chosen_output(file: OnnxFile, path: Path) -> tuple[str, int, bool, tuple[str, ...]]:
    """Return the name of the first output with a float for every class of every example, the number of classes, whether
    it has one float for two classes, and notes.
    """
    # Three rows reveal a file in which the size of one example is fixed.
    runtime, n = Runtime(file), file.input.shape[0] or 3
    answers = runtime.all(random_batch(file, n)) if runtime.outputs else []
    outputs = dict(zip(runtime.outputs, answers, strict=True))
    floats = {name: y for name, y in outputs.items() if y.is_floating_point() and y.dim() and len(y) == n}
    scores = {name: y for name, y in floats.items() if y.dim() == 2}
    scores = scores or {name: y for name, y in floats.items() if y.dim() == 1}
    _refuse_several(scores, path)
    if not scores:
        shapes = ", ".join(
            f"{name} {tuple(outputs[name].shape) if name in outputs else kind}"
            for name, kind in runtime.kinds.items()
        )
        expected = f"float logits of shape ({n}, classes) were expected"
        raise TargetError(f"{str(path)!r} returns {shapes} for {n} inputs; {expected}")
    name, logits = next(iter(scores.items()))
    several = len(runtime.kinds) > 1
    notes = (
        (f"the output {name} is used as the scores (outputs: {', '.join(runtime.kinds)})",) if several else ()
    )
    single = is_single(logits)
    return name, 2 if single else logits.shape[1], single, notes


def _refuse_several(scores: Mapping[str, Tensor], path: Path) -> None:
    """Raise `TargetError` if several outputs may be the scores and their largest values belong to different classes."""
    (first, *others) = scores.values() if scores else (torch.empty(0),)
    alike = all(y.shape == first.shape and torch.equal(y.argmax(-1), first.argmax(-1)) for y in others)
    if others and (first.dim() == 1 or not alike):
        listed = ", ".join(f"{name} {tuple(y.shape)}" for name, y in scores.items())
        columns = (
            "; of skl2onnx give options={'zipmap': False}, which writes one output for all classes"
            if first.dim() == 1
            else ""
        )
        raise TargetError(
            f"{str(path)!r} returns {listed}, and it is not clear which output contains the scores. Export the model "
            f"with one output of shape (N, classes){columns}"
        )


def _compare(net: nn.Module, file: OnnxFile, output: str, path: Path) -> None:
    runtime = Runtime(file, output)
    for n in CHECKED_SIZES:
        x = random_batch(file, n)
        with torch.no_grad():
            imported, reference = net(x), runtime(x)
        if imported.shape != reference.shape:
            raise TargetError(
                f"{str(path)!r}: the import returns {tuple(imported.shape)}, onnxruntime {tuple(reference.shape)}"
            )
        _refuse_different(imported, reference, file, path, f" on a batch of {n}")


def _refuse_different(
    imported: Tensor, reference: Tensor, file: OnnxFile, path: Path, where: str = ""
) -> None:
    """Raise `TargetError` if outputs of the import differ from those of onnxruntime by more than rounding."""
    alike = imported.shape == reference.shape
    difference = float((imported - reference).abs().max()) if alike else math.inf
    allowed = TOLERANCES.get(file.input.dtype.name, TOLERANCES["float32"]) * max(
        1.0, float(reference.abs().max())
    )
    if not difference <= allowed:  # a NaN is a difference too
        raise TargetError(
            f"{str(path)!r}: the import differs from onnxruntime by {difference:.3g}{where}; at most {allowed:.3g} was "
            "expected. Please report the model's operators"
        )


@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """A network with one input and one output from an ONNX file, as a torch module for batches, and as a function that
    runs the file in onnxruntime.
    """

    net: nn.Module
    """module from inputs (n, *example) to outputs, whose first dimension is n"""
    example: tuple[int, ...]
    """shape of one input of the module, without the batch"""
    input_shape: tuple[int, ...]
    """shape of the input in the file; a free batch size is 1"""
    output_shape: tuple[int, ...]
    """shape of the output of onnxruntime for an input of `input_shape`"""
    dtype: np.dtype[Any]
    """element type of the input in the file"""
    runtime: Callable[[NDArray[Any]], NDArray[Any]]
    """function from an input with as many elements as `input_shape`, in any shape, to the output of onnxruntime"""


class _Each(nn.Module):
    """Wrapper of a network whose file has no batch dimension, or a fixed one; it treats the rows of a batch one by
    one.
    """

    def __init__(self, net: nn.Module, inner: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.inner = net, inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for the rows of a batch."""

        def of_one(row: Tensor) -> Tensor:
            y: Tensor = self.net(row.reshape(self.inner))
            return y.reshape(-1)

        if len(x) == 1:
            return of_one(x[0])[None]
        y: Tensor = torch.vmap(of_one)(x)
        return y


def open_network(path: Path) -> OnnxNetwork:
    """Return the network in an ONNX file, converted to torch and compared with onnxruntime.

    The whole input is one example. Its first axis is that of the batch if it is free or has the size 1, and if others
    follow. Raises `TargetError` with the
    reason if the file cannot be converted: bounds need the operations of the network.
    """
    file = _read(path, None, {}, whole_numbers=False, texts=False)
    runtime = Runtime(file)
    if len(file.outputs) != 1 or len(runtime.outputs) != 1:
        raise TargetError(
            f"{str(path)!r} has the outputs {', '.join(runtime.kinds)}; one output of numbers was expected"
        )
    try:
        refuse_unknown_operators(file)
        net, example = _converted(file)
    except Unsupported as reason:
        raise TargetError(
            f"{str(path)!r} runs only in onnxruntime, because {reason} cannot be imported, and without its operations "
            "no bounds can be computed; export the network with other operators"
        ) from reason
    shape = tuple(size or 1 for size in file.input.shape)

    def run(x: NDArray[Any]) -> NDArray[Any]:
        y: NDArray[Any] = runtime.session.run(
            runtime.outputs, {file.input.name: x.reshape(shape).astype(file.input.dtype)}
        )[0]
        return y

    _compare_network(net, example, file, run, path)
    output = run(np.zeros(shape, file.input.dtype))
    return OnnxNetwork(net, example, shape, output.shape, file.input.dtype, run)


def _converted(file: OnnxFile) -> tuple[nn.Module, tuple[int, ...]]:
    """The module of a file, and the shape of one of its inputs, which has at least one axis."""
    shape = file.input.shape
    one_row = len(shape) > 1 and shape[0] in (None, 1)
    sizes = tuple(size or 1 for size in shape)
    if one_row:
        try:
            return convert(file, file.outputs[0], batch_size=None), sizes[1:]
        except Unsupported:
            if shape[0] is None:
                raise
    inner = convert(file, file.outputs[0], batch_size=sizes[0] if sizes else 1)
    return _Each(inner, sizes), sizes[1:] if one_row else sizes or (1,)


def _compare_network(
    net: nn.Module,
    example: tuple[int, ...],
    file: OnnxFile,
    run: Callable[[NDArray[Any]], NDArray[Any]],
    path: Path,
) -> None:
    """Raise an error if the module and onnxruntime differ on random inputs."""
    size = math.prod(example)
    rows = random_batch(file, file.input.shape[0] or 1).flatten()[:size]
    x = torch.stack((rows, 2 * rows - 1)).reshape(2, *example)
    with torch.no_grad():
        imported = net(x).flatten(1)
    reference = torch.from_numpy(np.stack([run(row.numpy()).reshape(-1) for row in x]))
    _refuse_different(imported, reference, file, path)
