"""Reads an `.onnx` file within bounds: its size, its nodes, and data beside it only inside its own folder."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.sources.files import megabytes, readable_file, sha256_of_file

MAX_BYTES = 1_900_000_000
"""of the model with its data; protobuf itself ends at 2 GiB"""
MAX_NODES = 50_000
_EXTERNAL = 1
"""TensorProto.DataLocation.EXTERNAL"""


@dataclass(frozen=True)
class OnnxInput:
    """The one input that a classifier takes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    """None where the size is free"""


@dataclass(frozen=True)
class OnnxFile:
    """A checked model with its tensors inside."""

    proto: Any
    input: OnnxInput
    tensors: dict[str, NDArray[Any]]
    opset: int
    files: dict[str, str]
    """SHA-256 of the file and of the files with its data, by their paths"""
    labels: tuple[str, ...] | tuple[int, ...] = ()
    """of the classes in the order of the scores, where the file names them, as converters of scikit-learn do"""

    @property
    def content(self) -> bytes:
        """The model as one piece, for a runtime."""
        serialised: bytes = self.proto.SerializeToString()
        return serialised

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(value.name for value in self.proto.graph.output)


def onnx_module() -> ModuleType:
    """The `onnx` package, or how to get it."""
    try:
        import onnx
    except ImportError as error:
        raise UsageError('opening an .onnx model needs pip install "holdfast[onnx]"') from error
    module: ModuleType = onnx
    return module


def read_onnx(path: Path) -> OnnxFile:
    """Parse, bound and check a model; its external data are read here, and nowhere else."""
    readable_file(path, "model")
    onnx = onnx_module()
    if path.stat().st_size > MAX_BYTES:
        raise TargetError(
            f"{str(path)!r} has {megabytes(path.stat().st_size)}; at most {megabytes(MAX_BYTES)} is read"
        )
    content = path.read_bytes()
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own error class is not part of what onnx promises
        raise TargetError(
            f"{str(path)!r} is no ONNX model, or is damaged or truncated: {error}; export it again"
        ) from error
    n_nodes = len(proto.graph.node) + sum(len(function.node) for function in proto.functions)
    if not n_nodes or n_nodes > MAX_NODES:
        raise TargetError(
            f"{str(path)!r} is no ONNX model that is read: it has {n_nodes} nodes, 1 to {MAX_NODES} are"
        )
    files = {str(path): hashlib.sha256(content).hexdigest()}
    for tensor in _tensors(proto.graph):
        if tensor.data_location == _EXTERNAL:
            beside = _take_external(tensor, path, len(content))
            files.setdefault(str(beside), sha256_of_file(beside))
    try:
        onnx.checker.check_model(proto)
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    except (onnx.checker.ValidationError, ValueError, TypeError, RuntimeError) as error:
        raise TargetError(f"{str(path)!r} is no valid ONNX model: {str(error).splitlines()[0]}") from error
    labels = _labels(proto.graph)
    _keep_tensors(proto.graph)
    return OnnxFile(proto, _input(proto, tensors, path), tensors, _opset(proto, path), files, labels)


def _labels(graph: Any) -> tuple[str, ...] | tuple[int, ...]:
    """Labels of the classes, from the last operator that has some."""
    for node in reversed(graph.node):
        for attribute in node.attribute:
            if attribute.name == "classlabels_strings" and attribute.strings:
                return tuple(label.decode(errors="replace") for label in attribute.strings)
            if attribute.name in ("classlabels_int64s", "classlabels_ints") and attribute.ints:
                return tuple(attribute.ints)
    return ()


def _keep_tensors(graph: Any) -> None:
    """Leave the scores a tensor where ZipMap, with which the converter of scikit-learn ends, makes dicts of them."""
    helper = onnx_module().helper
    zipped = {}
    for node in graph.node:
        if (node.domain, node.op_type) == ("ai.onnx.ml", "ZipMap"):
            zipped[node.output[0]] = node
            node.CopyFrom(helper.make_node("Identity", node.input, node.output))
    for value in graph.output:
        if value.name in zipped:
            value.CopyFrom(helper.make_tensor_value_info(value.name, onnx_module().TensorProto.FLOAT, None))


def _tensors(graph: Any) -> Iterator[Any]:
    """All tensors of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(inner)


def _take_external(tensor: Any, model: Path, n_bytes: int) -> Path:
    """Put the data of one tensor into it, from a file that lies inside the model's folder; returns that file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = PurePosixPath(location.replace("\\", "/"))
    beside: Path = model.parent / location
    roots = (
        model.parent.resolve(),
        model.resolve().parent,
    )  # two, for caches link both files to one folder of blobs
    leads_out = name.is_absolute() or ".." in name.parts or not location
    if leads_out or not any(beside.resolve().is_relative_to(root) for root in roots):
        raise TargetError(
            f"{str(model)!r} takes data from {location!r}, which lies outside its folder; it was refused"
        )
    readable_file(beside, "data of the model")
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", beside.stat().st_size - offset))
    except ValueError as error:
        raise TargetError(
            f"{str(model)!r} places {tensor.name} with numbers that are none: {entries}"
        ) from error
    if offset < 0 or length < 0 or offset + length > beside.stat().st_size or n_bytes + length > MAX_BYTES:
        raise TargetError(
            f"{str(model)!r} takes {length} bytes at {offset} from {location!r}, which does not hold them"
        )
    with beside.open("rb") as file:
        file.seek(offset)
        tensor.raw_data = file.read(length)
    tensor.data_location = 0
    del tensor.external_data[:]
    return beside


def _input(proto: Any, tensors: dict[str, NDArray[Any]], path: Path) -> OnnxInput:
    inputs = [value for value in proto.graph.input if value.name not in tensors]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise TargetError(
            f"{str(path)!r} takes {len(inputs)} inputs ({names}); a classifier takes one batch of inputs"
        )
    kind = inputs[0].type.tensor_type
    dtype = np.dtype(onnx_module().helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if dtype not in (np.float32, np.float64, np.float16):
        raise TargetError(
            f"{str(path)!r} takes {dtype} inputs; float32 was expected. Export it without its own scaling"
        )
    shape = tuple(dim.dim_value or None for dim in kind.shape.dim)
    free = [i for i, size in enumerate(shape) if size is None and i > 0]
    if not shape or free or prod(size or 1 for size in shape) > 2**28:
        raise TargetError(
            f"{str(path)!r} takes inputs of shape {shape or 'unknown'}; only the first size, the batch, may be free. "
            "Export it with the size of its inputs fixed"
        )
    return OnnxInput(inputs[0].name, dtype, shape)


def _opset(proto: Any, path: Path) -> int:
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            version: int = entry.version
            return version
    raise TargetError(f"{str(path)!r} imports no operators of ONNX itself")
