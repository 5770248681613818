"""Parses an `.onnx` file, with limits, and runs models in onnxruntime."""

import hashlib
import locale
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
from holdfast.io.files import OWN_FUNCTION, content_of_file, names_of, opened, refusing, sha256_of_file

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
    running: Any, outputs: list[str], file: "OnnxFile", batch: NDArray[Any]
) -> list[NDArray[Any]]:
    """Return the outputs with the names `outputs` of the session of a file on a batch (n, *features). States have their
    first values. Raises `TargetError` if onnxruntime rejects the batch.
    """
    feeds = {**file.feeds(batch), **first_states(file.states, len(batch))}
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


def some_inputs(described: "OnnxInput", n: int) -> NDArray[Any]:
    """Return `n` random inputs of a model: real numbers in [0, 1), whole numbers from 0 to 255, or texts of words of
    the model. Sizes that the model leaves open are 1. The inputs are the same in every call.
    """
    sizes = [n, *(size or 1 for size in described.shape[1:])]
    draws, dtype = np.random.default_rng(n), described.dtype
    if described.is_text:
        texts = [" ".join(draws.choice(described.words, 1 + k % _WORDS_OF_TEXT)) for k in range(n)]
        return np.array(texts, object).reshape(sizes)
    if dtype.kind in "iu":
        return draws.integers(0, 256, sizes).astype(dtype)
    return draws.random(sizes, np.float32).astype(dtype)


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
_WHOLE: dict[int, np.dtype[Any]] = {
    2: np.dtype(np.uint8),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
}
"""Types of inputs of models of bytes."""
_TEXTS: dict[int, np.dtype[Any]] = {8: np.dtype(object)}
"""Type of inputs of models of texts."""
_TOKENS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""Inputs of models of tokens in the exports of transformers, and their names in the package `tokenizers`."""
_TOKENIZER, _MOST_OF_TOKENIZER, _MOST_TOKENS = "tokenizer.json", 64_000_000, 512
"""File of the tokenizer beside the model, its largest number of bytes, and the number of tokens of a text that are read
if neither file states it.
"""
_LOCALE, _OTHER_LOCALE = "en_US.UTF-8", "C.UTF-8"
"""Default of StringNormalizer, and the locale with the same letters that is part of the C library."""
_WORDS_OF_TEXT = 8
"""largest number of words of a random text"""
_MOST_WORDS = 1_000
"""largest number of words from which random texts are drawn"""
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
    words: tuple[str, ...] = ()
    """words of an input of texts, from the strings in the file; empty for numbers"""

    @property
    def is_text(self) -> bool:
        """Whether an example is a text."""
        return self.dtype == object


@dataclass(frozen=True)
class OnnxColumns:
    """One of several inputs of a model of tables, which gets some columns of each row."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """shape of one example"""
    places: tuple[int, ...]
    """positions of its columns in the rows"""
    values: tuple[str, ...] = ()
    """names of the categories of an input of strings"""

    def of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the values of the input (n, *shape) for rows (n, columns) of numbers: whole numbers are rounded, and a
        position of a category becomes its name, which is empty if it is missing.
        """
        columns = rows[:, self.places].reshape(-1, *self.shape)
        if self.dtype == object:
            names = np.array((*self.values, ""), object)
            places = np.where(np.isnan(columns), len(self.values), columns.clip(0, len(self.values) - 1))
            return names[np.rint(places).astype(np.int64)]
        return (np.rint(columns) if self.dtype.kind in "iu" else columns).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class OnnxTokens:
    """The tokenizer of a model of texts, and the inputs that get its tokens."""

    tokenizer: Any
    """a tokenizer of the package `tokenizers`, with truncation and padding"""
    dtypes: Mapping[str, np.dtype[Any]]
    """types of the inputs by their names, which are in `_TOKENS`"""

    def of(self, texts: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return the inputs (n, tokens) of the model for texts."""
        rows = self.tokenizer.encode_batch(texts.reshape(-1).tolist())
        return {
            name: np.array([getattr(row, _TOKENS[name]) for row in rows], dtype).reshape(len(rows), -1)
            for name, dtype in self.dtypes.items()
        }


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
    notes: tuple[str, ...] = ()
    """notes for the report"""
    columns: tuple[OnnxColumns, ...] = ()
    """inputs of a model of tables with several inputs; `input` are their rows. Empty for a model with one input"""

    tokens: "OnnxTokens | None" = None
    """inputs of a model that reads the tokens of texts; `input` are the texts"""

    def feeds(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return the values of the inputs, without states, by their names for a batch of examples."""
        if self.tokens is not None:
            return self.tokens.of(batch)
        if not self.columns:
            return {self.input.name: batch}
        return {column.name: column.of(batch) for column in self.columns}

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
    whole_numbers: bool = False,
    texts: bool = False,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> OnnxFile:
    """Return the parsed and checked content of an ONNX file. Only this function reads tensors that are stored in other
    files.

    `input_shape` is the shape of one example, which is needed for a file with free sizes. `content` is the content of
    the file if it was already read; then the file is not opened again. `constants` are the values of further inputs;
    those of states are the values from which they start. With `whole_numbers` the input has the type uint8, int32 or
    int64, as in models of bytes, with `texts` it has a string for each example, and otherwise a float type. Raises
    `TargetError` for a file that is invalid or exceeds a limit, and `UsageError` if `input_shape` is missing or wrong,
    and for an input of another type with `texts`.

    A file with several inputs is a model of tables. `columns` are the columns of the rows in their order, with the
    names of the categories of those that are positions of categories.
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
    notes = _use_present_locales(proto.graph)
    _keep_tensors(proto.graph)
    states = _fill_constants(proto.graph, tensors, constants, path)
    split = (
        ()
        if texts or whole_numbers or states
        else _columns(proto.graph, {*tensors, *(each.name for each in states)}, path, columns)
    )
    if split:
        rows = OnnxInput("the columns", np.dtype(np.float32), (None, sum(len(each.places) for each in split)))
        return OnnxFile(proto, rows, tensors, _opset(proto, path), files, states, labels, notes, split)
    tokens = _tokens(proto.graph, {*tensors, *(each.name for each in states)}, path, files) if texts else None
    if tokens is not None:
        only = OnnxInput("the texts", np.dtype(object), (None,), ("a", "text"))
        return OnnxFile(
            proto, only, tensors, _opset(proto, path), files, states, labels, notes, tokens=tokens
        )
    types = _TEXTS if texts else _WHOLE if whole_numbers else _FLOATS
    only = _input(proto, tensors, path, input_shape, {state.name for state in states}, types)
    return OnnxFile(proto, only, tensors, _opset(proto, path), files, states, labels, notes)


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


def _use_present_locales(graph: Any) -> tuple[str, ...]:
    """Replace locales of StringNormalizer that this machine does not have, which onnxruntime refuses, by C.UTF-8, and
    return notes.
    """
    notes = []
    for node in graph.node:
        if node.op_type != "StringNormalizer":
            continue
        given = [each for each in node.attribute if each.name == "locale"]
        name = given[0].s.decode(errors="replace") if given else _LOCALE
        if name not in ("", "C") and not _is_present(name):
            for each in given:
                node.attribute.remove(each)
            node.attribute.append(onnx_module().helper.make_attribute("locale", _OTHER_LOCALE))
            notes.append(
                f"the locale {name[:_SHOWN]}, by which the file changes the case of letters, is not installed, and "
                f"{_OTHER_LOCALE} is used"
            )
    return tuple(dict.fromkeys(notes))


def _is_present(name: str) -> bool:
    current = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        return False
    finally:
        locale.setlocale(locale.LC_ALL, current)
    return True


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
    types: Mapping[int, np.dtype[Any]],
) -> OnnxInput:
    inputs = [value for value in proto.graph.input if value.name not in tensors and value.name not in states]
    listed = ", ".join(map(_described, inputs))
    has_text = any(value.type.tensor_type.elem_type in _TEXTS for value in inputs)
    if types is _FLOATS and (has_text or _reads_tokens(inputs)):
        raise UsageError(
            f"{str(path)!r} has the input {listed}, so that it is called with texts; assess it with a threat on texts, "
            "such as text:edits=2,words=3, or give the file of another model"
        )
    if types is _TEXTS:
        return _text_input(proto, inputs, path)
    if len(inputs) != 1:
        names = ", ".join(_described(value) for value in inputs) or "none"
        example = f"{inputs[-1].name}=0" if inputs else "NAME=0"
        raise TargetError(
            f"{str(path)!r} has {len(inputs)} inputs: {names}. Inputs of shapes such as N x 3, with a free batch size "
            "and otherwise fixed sizes, are columns or arrays of the data. A recurrent state, a length or a sampling "
            "rate must be a constant (constants in Python, as in --constant "
            f"{example}; a state then starts at 0): give all of them, or {OWN_FUNCTION}, here with zeros in place of "
            "your values"
        ).with_code(*_own_function(proto, inputs, path))
    kind = inputs[0].type.tensor_type
    dtype = types.get(kind.elem_type)
    if dtype is None and types is _WHOLE:
        raise TargetError(
            f"{str(path)!r} has the input {_described(inputs[0])}; a model of bytes has an input of whole numbers "
            f"(uint8, int32 or int64) of shape N x length. Otherwise {OWN_FUNCTION}"
        ).with_code(*_own_function(proto, inputs, path))
    if dtype is None:
        raise TargetError(
            f"{str(path)!r} has the input {_described(inputs[0])}. Attacks change real numbers: float16, float32 or "
            "float64 was expected. If it reads the bytes of files, give a threat such as bytes:change=16; otherwise "
            "export the model without its own scaling of bytes and without layers that read token numbers, or "
            f"{OWN_FUNCTION}"
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


def _columns(
    graph: Any, filled: Collection[str], path: Path, columns: Mapping[str, Sequence[str]] | None
) -> tuple[OnnxColumns, ...]:
    """Return the inputs of a model with several of them, none for another one: one with a single input, or with an
    input of which another axis than the first one is free.

    An input with one value for each example is the column of this name, and one with several values is the columns
    `NAME_0`, `NAME_1` and so on. Raises `TargetError` if `columns` lacks one of them.
    """
    inputs = [value for value in graph.input if value.name not in filled]
    kinds = {**_FLOATS, **_WHOLE, **_TEXTS}
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs]
    is_table = all(shape and shape[0] <= 0 and all(size > 0 for size in shape[1:]) for shape in shapes)
    if (
        len(inputs) < 2
        or not is_table
        or _reads_tokens(inputs)
        or any(value.type.tensor_type.elem_type not in kinds for value in inputs)
    ):
        return ()
    names = {
        value.name: [value.name]
        if prod(shape[1:]) == 1
        else [f"{value.name}_{k}" for k in range(prod(shape[1:]))]
        for value, shape in zip(inputs, shapes, strict=True)
    }
    order = list(columns or [name for each in names.values() for name in each])
    split = []
    for value, shape in zip(inputs, shapes, strict=True):
        missing = next((name for name in names[value.name] if name not in order), None)
        if missing is not None:
            raise TargetError(
                f"{str(path)!r} has the input {_described(value)}, and there is no column {missing!r}; the columns are "
                f"{names_of(order)}"
            )
        values = tuple((columns or {}).get(value.name, ()))
        if value.type.tensor_type.elem_type in _TEXTS and not values:
            raise UsageError(
                f"{str(path)!r} has the input {_described(value)}; the values of a column of strings are in the rules "
                "of the table, with type: category: give a threat such as table:rules.yaml"
            )
        places = tuple(order.index(name) for name in names[value.name])
        split.append(
            OnnxColumns(value.name, kinds[value.type.tensor_type.elem_type], tuple(shape[1:]), places, values)
        )
    further = [name for name in order if name not in {name for each in names.values() for name in each}]
    if further:
        raise TargetError(
            f"{str(path)!r} has the inputs {names_of(list(names))}, and none for the column {further[0]!r} of the "
            "rules; remove it from them"
        )
    return tuple(split)


def _reads_tokens(inputs: Sequence[Any]) -> bool:
    """Return whether inputs are those of a model of transformers that reads the tokens of texts."""
    return bool(inputs) and all(
        value.name in _TOKENS and value.type.tensor_type.elem_type in _WHOLE for value in inputs
    )


def _tokens(graph: Any, filled: Collection[str], path: Path, files: dict[str, str]) -> OnnxTokens | None:
    """Return the tokenizer beside a model whose inputs are tokens, and add its digest to `files`. Return None for
    another model, or without the file of a tokenizer.
    """
    inputs = [value for value in graph.input if value.name not in filled]
    beside = path.parent / _TOKENIZER
    if not _reads_tokens(inputs) or not beside.is_file():
        return None
    kinds = {value.name: value.type.tensor_type for value in inputs}
    content = content_of_file(beside, "tokenizer", most=_MOST_OF_TOKENIZER, advice="save it again")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked after the first call
    missing = f"{str(path)!r} reads the tokens of {str(beside)!r} with a package that is missing"
    tokenizers = importing("tokenizers", missing, "text")
    with refusing(f"{str(beside)!r} is no tokenizer", Exception, "save it again with save_pretrained"):
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    files[str(beside)] = hashlib.sha256(content).hexdigest()
    length = max(kind.shape.dim[1].dim_value if len(kind.shape.dim) > 1 else 0 for kind in kinds.values())
    if length or tokenizer.truncation is None:
        tokenizer.enable_truncation(length or _MOST_TOKENS)
    padding = tokenizer.padding or {
        "pad_id": next(filter(None, map(tokenizer.token_to_id, ("[PAD]", "<pad>"))), 0)
    }
    tokenizer.enable_padding(**(padding | {"length": length or None}))
    return OnnxTokens(tokenizer, {name: _WHOLE[kind.elem_type] for name, kind in kinds.items()})


def _text_input(proto: Any, inputs: Sequence[Any], path: Path) -> OnnxInput:
    """Return the input of a model of texts. Raises `UsageError` for numbers, and `TargetError` for several texts."""
    kinds = [value.type.tensor_type for value in inputs]
    if [kind.elem_type for kind in kinds] != list(_TEXTS):
        listed = ", ".join(map(_described, inputs)) or "none"
        raise UsageError(
            f"{str(path)!r} has the input {listed}, so that it is called with numbers, and the inputs are texts. If "
            f"it reads the tokens of a text, put the {_TOKENIZER} of its tokenizer beside it, or "
            f"{OWN_FUNCTION}: a function from a list of strings, which calls the tokenizer and the model"
        )
    (value,), (kind,) = inputs, kinds
    sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
    if len(sizes) > 2 or any(size not in (None, 1) for size in sizes[1:]):
        raise TargetError(
            f"{str(path)!r} has the input {_described(value)}; one text for each example was expected: export it for "
            "inputs of shape N or N x 1"
        )
    strings = [text for node in proto.graph.node for each in node.attribute for text in each.strings]
    words = tuple(text.decode(errors="replace") for text in strings[:_MOST_WORDS] if text) or ("a", "text")
    return OnnxInput(
        value.name, _TEXTS[kind.elem_type], ((sizes or [None])[0], *(1 for _ in sizes[1:])), words
    )


def _own_function(proto: Any, inputs: Sequence[Any], path: Path) -> tuple[str, ...]:
    """Return lines of a file that calls a model in onnxruntime and returns scores: the first output of real numbers. Of
    three axes, the largest value of each class on the last one is taken, as over the boxes of a detector; of more axes,
    that of each class on the second one, as over the pixels of an image.
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
        unit = "window of a clip, which the documentation of the model states" if has_states else "example"
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
