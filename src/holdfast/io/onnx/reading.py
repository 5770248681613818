"""Parses an `.onnx` file, with limits, and runs models in onnxruntime."""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import FreeSizes, Placeholder, TargetError, UsageError, importing, model_argument
from holdfast.core.names import did_you_mean
from holdfast.io.files import OWN_FUNCTION, content_of_file, opened, refusing, sha256_of_file

MISSING = "an .onnx model is opened with packages that are missing"


def session(content: bytes, threads: int) -> Any:
    """Return an onnxruntime session of a model on the CPU. Raises `TargetError` if onnxruntime rejects the model."""
    onnxruntime = importing("onnxruntime", MISSING, "onnx")
    options = onnxruntime.SessionOptions()
    # Only fatal errors: onnxruntime would print warnings to the terminal besides the exception that is reported here.
    options.log_severity_level = 4
    # By default onnxruntime uses all cores, also in each of several worker processes.
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common public class
        raise TargetError(
            f"onnxruntime rejects the model: {_first_line(error)}. Export it in float32, and from scikit-learn with "
            "options={'zipmap': False}"
        ) from error


@dataclass(frozen=True)
class OnnxState:
    """A recurrent state of an ONNX model: an input, and the output that is its next value."""

    name: str
    output: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    """sizes of the axes; None for the number of examples"""
    start: float = 0.0
    """value from which the state starts"""


def run_session(
    running: Any, outputs: list[str], name: str, batch: NDArray[Any], states: Sequence[OnnxState] = ()
) -> list[NDArray[Any]]:
    """Return the outputs of an onnxruntime session on a batch (n, *features). Raises `TargetError` if onnxruntime
    rejects the batch.

    `name` is the name of the input, and `outputs` lists the names of the outputs. The `states` have their first values.
    """
    feeds = {name: batch, **first_states(states, len(batch))}
    return run_with_feeds(running, outputs, feeds, batch.shape)


def first_states(states: Sequence[OnnxState], n: int) -> dict[str, NDArray[Any]]:
    """Return the first values of the states of `n` examples, by the names of their inputs."""
    return {
        state.name: np.full([size or n for size in state.shape], state.start, state.dtype) for state in states
    }


def run_with_feeds(
    running: Any, outputs: list[str], feeds: Mapping[str, NDArray[Any]], shape: tuple[int, ...]
) -> list[NDArray[Any]]:
    """Return the outputs of an onnxruntime session on all its inputs. `shape` is that of the batch, for the error."""
    try:
        outputs_of_batch: list[NDArray[Any]] = running.run(outputs, feeds)
    except Exception as error:  # as above
        raise TargetError(
            f"onnxruntime rejects inputs of shape {shape}: {_first_line(error)}; check the shape of the data"
        ) from error
    return outputs_of_batch


def some_inputs(shape: tuple[int | None, ...], dtype: np.dtype[Any], n: int) -> NDArray[Any]:
    """Return `n` random inputs in [0, 1) with the given shape. Sizes that the model leaves open are 1. The inputs are
    the same in every call.
    """
    sizes = [n, *(size or 1 for size in shape[1:])]
    return np.random.default_rng(n).random(sizes, np.float32).astype(dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


MOST_ROUNDS = 1 << 16
"""Largest number of iterations of a loop."""
_DEFAULT = ("", "ai.onnx")
"""Names of the domain of the standard operators."""


class UnboundedGraph(ValueError):
    """Error for an ONNX file whose functions call each other in a cycle, or that has a loop without a limit."""


def n_nodes(proto: Any) -> int:
    """Return the number of nodes of an ONNX graph after every function call is expanded.

    Functions may call functions, so that a small file can describe more nodes than fit in memory. Raises
    `UnboundedGraph` for a cycle.
    """
    functions = {(function.domain, function.name): function for function in proto.functions}
    counts: dict[tuple[str, str], int] = {}
    open_: set[tuple[str, str]] = set()

    def called(name: tuple[str, str]) -> int:
        if name in open_:
            raise UnboundedGraph(f"the function {name[1]!r} calls itself")
        if name not in counts:
            open_.add(name)
            counts[name] = counted(functions[name].node)
            open_.remove(name)
        return counts[name]

    def counted(nodes: Iterable[Any]) -> int:
        total = 0
        for node in nodes:
            name = (node.domain, node.op_type)
            total += called(name) if name in functions else 1
            total += sum(counted(graph.node) for graph in _inner_graphs(node))
        return total

    return counted(proto.graph.node)


def refuse_unbounded(graph: Any, constants: Mapping[str, NDArray[Any]]) -> None:
    """Raise `UnboundedGraph` if an ONNX graph has a loop whose number of iterations is not limited by a constant.

    `constants` contains the tensors of the file by name; constants of the graph and of graphs inside its nodes are
    added.
    """
    constants = {**constants, **_constants(graph)}
    for node in graph.node:
        if node.op_type == "Loop" and node.domain in _DEFAULT:
            rounds = constants.get(node.input[0]) if node.input else None
            if rounds is None:
                raise UnboundedGraph(f"the loop {node.name!r} has no constant number of iterations")
            if rounds.size != 1 or int(rounds.reshape(-1)[0]) > MOST_ROUNDS:
                raise UnboundedGraph(f"the loop {node.name!r} has more than {MOST_ROUNDS:,} iterations")
        for inner in _inner_graphs(node):
            refuse_unbounded(inner, constants)


def _inner_graphs(node: Any) -> Iterable[Any]:
    """Yield the graphs inside a node, such as the body of a loop."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _constants(graph: Any) -> dict[str, NDArray[Any]]:
    """Return the initial values of a graph, and the constant tensors and integers of its nodes, by name."""
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _DEFAULT:
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = numpy_helper.to_array(attribute.t)
                elif attribute.name == "value_int":
                    constants[node.output[0]] = np.array(attribute.i)
    return constants


MAX_BYTES = 1_900_000_000
"""Largest number of bytes of the model with its data; protobuf itself is limited to 2 GiB."""
MAX_NODES = 50_000
MAX_VALUES = 2**28
"""Largest number of values of one example, or of a batch if the batch size is fixed."""
_FLOATS: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
}
"""Types in TensorProto.DataType that inputs may have, because attacks can change their values."""
_SHOWN = 200
"""number of characters of a text in the file that a message repeats"""
_EXTERNAL = 1
"""Value of TensorProto.DataLocation.EXTERNAL."""


@dataclass(frozen=True)
class OnnxInput:
    """Name, type and shape of the only input of an ONNX classifier."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    """sizes of the axes; None for a free size"""


@dataclass(frozen=True)
class OnnxFile:
    """The parsed and checked content of an ONNX file, including its tensors."""

    proto: Any
    input: OnnxInput
    tensors: dict[str, NDArray[Any]]
    opset: int
    files: dict[str, str]
    """SHA-256 of the file and of its data files, by path"""
    states: tuple[OnnxState, ...] = ()
    """recurrent states, which start again for each example"""
    labels: tuple[str, ...] | tuple[int, ...] = ()
    """labels of the classes in the order of the scores, if the file has them, as files from scikit-learn do;
    else empty
    """

    @property
    def path(self) -> str:
        """Path of the file, as the user wrote it."""
        return next(iter(self.files))

    @property
    def content(self) -> bytes:
        """The ONNX model as serialised bytes, for onnxruntime."""
        serialised: bytes = self.proto.SerializeToString()
        return serialised

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of the ONNX model."""
        return tuple(value.name for value in self.proto.graph.output)


def onnx_module() -> ModuleType:
    """Import and return the `onnx` package. Raises `UsageError` with the install command if it is missing."""
    module: ModuleType = importing("onnx", MISSING, "onnx")
    return module


def onnx_content(path: Path) -> bytes:
    """Return the bytes of an ONNX file. Raises `TargetError` if it is too large."""
    return content_of_file(path, "model", most=MAX_BYTES, advice="give the network as file.py:factory")


def bytes_beside(path: Path) -> int:
    """Return the total size in bytes of the other files in the folder of an ONNX model, which may contain its tensors.
    The result is at most `MAX_BYTES`.
    """
    total = 0
    for file in path.parent.iterdir():
        if file.is_file() and file.name != path.name:
            total += file.stat().st_size
        if total >= MAX_BYTES:
            return MAX_BYTES
    return total


def read_onnx(
    path: Path,
    input_shape: Sequence[int] | None = None,
    *,
    content: bytes | None = None,
    constants: Mapping[str, float] = MappingProxyType({}),
) -> OnnxFile:
    """Return the parsed and checked content of an ONNX file. Only this function reads tensors that are stored in other
    files.

    `input_shape` is the shape of one example, which is needed for a file with free sizes. `content` is the content of
    the file if it was already read; then the file is not opened again. `constants` are the values of further inputs;
    those of states are the values from which they start. Raises `TargetError` for a file that is invalid
    or exceeds a limit, and `UsageError` if `input_shape` is missing or wrong.
    """
    content = onnx_content(path) if content is None else content
    onnx = onnx_module()
    fault = f"{str(path)!r} is not an ONNX model, or is damaged or truncated"
    # the error class of protobuf is not part of onnx's documented interface
    with refusing(fault, Exception, "export it again"):
        proto = onnx.load_model_from_string(content)
    # onnxruntime may be newer than onnx, and would interpret fields that are not checked here.
    proto.DiscardUnknownFields()
    # Counted before the functions are expanded below, because a small file can describe more nodes than fit in memory.
    _refuse_size(proto, path)
    files = {str(path): hashlib.sha256(content).hexdigest()}
    for tensor in _tensors(proto):
        if tensor.data_location == _EXTERNAL:
            data_file = _load_external(tensor, path, len(content))
            if str(data_file) not in files:
                files[str(data_file)] = sha256_of_file(data_file)
    try:
        onnx.checker.check_model(proto)
        if proto.functions:
            proto = import_module("onnx.inliner").inline_local_functions(proto)
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        refuse_unbounded(proto.graph, tensors)
    except UnboundedGraph as error:
        raise TargetError(
            f"{str(path)!r} is not read, because {error}; export it without such loops and functions, or unrolled"
        ) from error
    except (onnx.checker.ValidationError, ValueError, TypeError, RuntimeError) as error:
        raise TargetError(f"{str(path)!r} is no valid ONNX model: {str(error).splitlines()[0]}") from error
    labels = _labels(proto.graph)
    _keep_tensors(proto.graph)
    states = _fill_constants(proto.graph, tensors, constants, path)
    only = _input(proto, tensors, path, input_shape, {state.name for state in states})
    return OnnxFile(proto, only, tensors, _opset(proto, path), files, states, labels)


def _fill_constants(
    graph: Any, tensors: dict[str, NDArray[Any]], constants: Mapping[str, float], path: Path
) -> tuple[OnnxState, ...]:
    """Replace inputs of a graph, and of `tensors`, by constants, and return its recurrent states: the further inputs of
    real numbers if there is one output for each after the first, in the same order. There are none without `constants`.
    """
    if not constants:
        return ()
    inputs = {value.name: value for value in graph.input if value.name not in tensors}
    unknown = next((name for name in constants if name not in inputs), None)
    if unknown is not None:
        raise UsageError(
            f"constants has {unknown!r}, and {str(path)!r} has no such input{did_you_mean(unknown, inputs)}"
        )
    floats = [name for name, value in inputs.items() if value.type.tensor_type.elem_type in _FLOATS]
    carried, nexts = floats[1:], [output.name for output in graph.output[1:]]
    carried = carried if len(carried) == len(nexts) else []
    for name, number in constants.items():
        if name in carried:
            continue
        kind = inputs[name].type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        if not all(sizes):
            raise UsageError(
                f"constants has {name!r}, and {str(path)!r} has the input {_described(inputs[name])}, whose sizes are "
                "not fixed; one with fixed sizes was expected"
            )
        dtype = onnx_module().helper.tensor_dtype_to_np_dtype(kind.elem_type)
        tensors[name] = np.full(sizes, number, dtype)
        graph.initializer.append(onnx_module().numpy_helper.from_array(tensors[name], name))
        graph.input.remove(inputs[name])
    return tuple(
        OnnxState(
            name,
            output,
            _FLOATS[inputs[name].type.tensor_type.elem_type],
            tuple(dim.dim_value or None for dim in inputs[name].type.tensor_type.shape.dim),
            constants.get(name, 0.0),
        )
        for name, output in zip(carried, nexts, strict=bool(carried))
    )


def _refuse_size(proto: Any, path: Path) -> None:
    with refusing(f"{str(path)!r} is no valid ONNX model", (UnboundedGraph, RecursionError)):
        size = n_nodes(proto)
    if not 1 <= size <= MAX_NODES:
        raise TargetError(
            f"{str(path)!r} has {size:,} nodes; 1 to {MAX_NODES:,} were expected: give the network as file.py:factory"
        )


def _labels(graph: Any) -> tuple[str, ...] | tuple[int, ...]:
    """Return the labels of the classes in the last operator that has labels, or an empty tuple."""
    for node in reversed(graph.node):
        for attribute in node.attribute:
            if attribute.name == "classlabels_strings" and attribute.strings:
                return tuple(label.decode(errors="replace") for label in attribute.strings)
            if attribute.name in ("classlabels_int64s", "classlabels_ints") and attribute.ints:
                return tuple(attribute.ints)
    return ()


def _keep_tensors(graph: Any) -> None:
    """Replace ZipMap, which converters of scikit-learn append, by Identity, so that the scores remain a tensor."""
    helper = onnx_module().helper
    zipped = {}
    for node in graph.node:
        if (node.domain, node.op_type) == ("ai.onnx.ml", "ZipMap"):
            zipped[node.output[0]] = node
            node.CopyFrom(helper.make_node("Identity", node.input, node.output))
    for value in graph.output:
        if value.name in zipped:
            value.CopyFrom(helper.make_tensor_value_info(value.name, onnx_module().TensorProto.FLOAT, None))


def _tensors(message: Any) -> Iterator[Any]:
    """Yield all tensors in a message of ONNX, whatever field contains them: initial values, attributes of nodes and
    functions, values and indices of sparse tensors, graphs inside nodes, training information.
    """
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) else (value,):
                yield from _tensors(inner)


def _load_external(tensor: Any, model: Path, n_bytes: int) -> Path:
    """Load the external data of a tensor from a file inside the model's folder. Return the path of that file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = PurePosixPath(location.replace("\\", "/"))
    data_file: Path = model.parent / location
    roots = (
        model.parent.resolve(),
        model.resolve().parent,
    )  # two folders, because caches link both files to one folder
    leads_out = name.is_absolute() or ".." in name.parts or not location
    if leads_out or not any(data_file.resolve().is_relative_to(root) for root in roots):
        raise TargetError(
            f"{str(model)!r} refers to data in {location[:_SHOWN]!r}, which is outside its folder and is not read; put "
            "the data next to the model"
        )
    with opened(data_file, "data of the model") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size - offset))
        except ValueError as error:
            raise TargetError(
                f"{str(model)!r} specifies the position of {tensor.name[:_SHOWN]} by {str(entries)[:_SHOWN]}; numbers "
                "were expected: export it again"
            ) from error
        if offset < 0 or length < 0 or offset + length > size or n_bytes + length > MAX_BYTES:
            raise TargetError(
                f"{str(model)!r} refers to {length} bytes at {offset} of {location!r}, which are not there; export it "
                "again"
            )
        file.seek(offset)
        tensor.raw_data = file.read(length)
    # Marks the data as part of the model, so that neither onnx nor onnxruntime opens the file again.
    tensor.data_location = 0
    del tensor.external_data[:]
    return data_file


def _input(
    proto: Any,
    tensors: dict[str, NDArray[Any]],
    path: Path,
    input_shape: Sequence[int] | None,
    states: Collection[str],
) -> OnnxInput:
    inputs = [value for value in proto.graph.input if value.name not in tensors and value.name not in states]
    if len(inputs) != 1:
        names = ", ".join(_described(value) for value in inputs) or "none"
        example = f"{inputs[-1].name}=0" if inputs else "NAME=0"
        raise TargetError(
            f"{str(path)!r} has {len(inputs)} inputs: {names}. One is supported: a batch of float inputs. A "
            "recurrent state, a length or a sampling rate must be a constant (constants in Python, as in --constant "
            f"{example}; a state then starts at 0): give all of them, or {OWN_FUNCTION}, here with zeros in place of "
            "your values"
        ).with_code(*_own_function(proto, inputs, path))
    kind = inputs[0].type.tensor_type
    dtype = _FLOATS.get(kind.elem_type)
    if kind.elem_type == onnx_module().TensorProto.STRING:
        raise TargetError(
            f"{str(path)!r} has the input {_described(inputs[0])}, so that it is called with texts, and .onnx files "
            f"are opened for numbers alone. For a threat on texts, such as text:edits=2,words=3, {OWN_FUNCTION}"
        ).with_code(*_own_function(proto, inputs, path))
    if dtype is None:
        raise TargetError(
            f"{str(path)!r} has the input {_described(inputs[0])}. Attacks change real numbers: float16, float32 or "
            "float64 was expected. Export the model without its own scaling of bytes and without layers that read "
            f"token numbers, or {OWN_FUNCTION}"
        ).with_code(*_own_function(proto, inputs, path))
    _refuse_no_scores(proto, inputs, path)
    sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    shape = _filled(sizes, input_shape, inputs[0], path, has_states=bool(states))
    if prod(size or 1 for size in shape) > MAX_VALUES:
        raise TargetError(
            f"{str(path)!r} has inputs of shape {shape}; at most {MAX_VALUES:,} values are read: export it for "
            "smaller inputs or batches"
        )
    return OnnxInput(inputs[0].name, dtype, shape)


def _own_function(proto: Any, inputs: Sequence[Any], path: Path) -> tuple[str, ...]:
    """Return lines of a file that calls a model in onnxruntime and returns scores: the first output of real numbers. Of
    three axes, the largest value of each class on the last one is taken, as over the boxes of a detector; of more axes,
    that of each class on the second one, as over the pixels of an image. No lines are returned for rows of texts.
    """
    tensor = onnx_module().TensorProto
    floats = [value for value in inputs if value.type.tensor_type.elem_type in _FLOATS]
    attacked = (floats or list(inputs) or [None])[0]
    outputs = proto.graph.output
    output = next((each for each in outputs if each.type.tensor_type.elem_type in _FLOATS), outputs[0])
    feeds = []
    for value in inputs:
        kind = value.type.tensor_type
        is_text = kind.elem_type == tensor.STRING
        dtype = "object" if is_text else str(onnx_module().helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if value is not attacked:
            sizes = [str(dim.dim_value) if dim.dim_value > 0 else "len(x)" for dim in kind.shape.dim]
            given = f"numpy.zeros(({''.join(f'{size}, ' for size in sizes)}), {dtype!r})"
        elif is_text and len(kind.shape.dim) > 1 and kind.shape.dim[1].dim_value > 1:
            return ()
        elif is_text:
            given = f"numpy.array(x, object){'[:, None]' if len(kind.shape.dim) == 2 else ''}"
        elif kind.elem_type in _FLOATS:
            given = f"x.numpy().astype({dtype!r})"
        else:  # bytes are pixels, and other whole numbers are values of a table
            given = f"({'255 * ' if dtype == 'uint8' else ''}x.numpy()).round().astype({dtype!r})"
        feeds.append(f"{value.name!r}: {given}")
    rank = len(output.type.tensor_type.shape.dim)
    largest = {1: "", 2: "", 3: ".max(1)"}.get(rank, f".max({tuple(range(2, rank))})")
    return (
        "import numpy, onnxruntime",
        f"session = onnxruntime.InferenceSession({str(path)!r})",
        f"def make(): return lambda x: session.run([{output.name!r}], {{{', '.join(feeds)}}})[0]{largest}",
    )


def _refuse_no_scores(proto: Any, inputs: Sequence[Any], path: Path) -> None:
    """Raise `TargetError` if all outputs have more than two axes, according to the declared shapes."""
    outputs = proto.graph.output
    declared = [value.type.tensor_type.HasField("shape") for value in outputs]
    if all(declared) and all(len(value.type.tensor_type.shape.dim) > 2 for value in outputs):
        listed = ", ".join(_described(value) for value in outputs)
        raise TargetError(
            f"{str(path)!r} returns {listed}, as detectors and models of sequences do. Classifiers are supported: a "
            f"float output of shape (N, classes). For other models, {OWN_FUNCTION}, such as the largest value of each "
            "class"
        ).with_code(*_own_function(proto, inputs, path))


def _filled(
    sizes: tuple[int | None, ...],
    input_shape: Sequence[int] | None,
    value: Any,
    path: Path,
    *,
    has_states: bool = False,
) -> tuple[int | None, ...]:
    """Return the sizes in the file, with free sizes replaced by those of the declared shape of one example, or of one
    window of it if the model has states.
    """
    if input_shape is None:
        if sizes and None not in sizes[1:]:
            return sizes
        example = ",".join(str(size or "N") for size in sizes[1:]) or "N,…"
        unit = "window, of which a clip has many" if has_states else "example"
        raise (UsageError if has_states else FreeSizes)(
            f"{str(path)!r} has the input {_described(value)}, in which more sizes than the batch are free",
            model_argument(
                "input_shape",
                Placeholder(example, f"({example},)"),
                reason=f"for the shape of one {unit}, with a number in place of each N",
            ),
        )
    fits = len(input_shape) == len(sizes) - 1 or not sizes
    if not fits or any(
        declared not in (None, size) for declared, size in zip(sizes[1:], input_shape, strict=False)
    ):
        raise UsageError(
            f"input_shape is {','.join(map(str, input_shape))}, but {str(path)!r} has the input "
            f"{_described(value)}; give the shape of one example, without the batch"
        )
    return (sizes[0] if sizes else None, *input_shape)


def _described(value: Any) -> str:
    """Return the name, type and shape of an input or an output, for error messages."""
    kind = value.type.tensor_type
    if not kind.elem_type:
        return f"{value.name} (no tensor)"
    name = onnx_module().TensorProto.DataType.Name(kind.elem_type).lower()
    sizes = (str(dim.dim_value) if dim.dim_value > 0 else "N" for dim in kind.shape.dim)
    return f"{value.name} ({name}, {' x '.join(sizes) or 'one number'})"


def _opset(proto: Any, path: Path) -> int:
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            version: int = entry.version
            return version
    raise TargetError(f"{str(path)!r} declares no version of the standard operators of ONNX; export it again")
