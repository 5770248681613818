"""Requests and responses of the Open Inference Protocol v2, in JSON and with the binary tensor extension.

KServe, "Open Inference Protocol (V2 Inference Protocol)", REST. Triton, "Binary Tensor Data Extension": the header
`Inference-Header-Content-Length` is the length of the JSON, after which the tensors follow as little-endian bytes.

JSON is read by msgspec, which converts the numbers of the inputs without an object of Python for each value's type
check. What it does not accept, or what is refused afterwards, is read again by the module json of the standard library,
which decides: a request is accepted or refused, and with the same reason, as if json had read it.
"""

import base64
import io
import json
import struct
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from math import isfinite, prod
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.core.batch import encoded as encoded_texts
from holdfast.core.batch import encoded_files
from holdfast.core.model import Bounds
from holdfast.io.sandbox.clips import NO_SIZE
from holdfast.server.requests import Refused
from holdfast.settings.values import InputKind

INPUT, OUTPUT, CERTIFIED = "input", "scores", "certified"
"""names of the only input and of the outputs of a served model; only a vote over masks has the second output"""
JSON, BINARY = "application/json", "application/octet-stream"
LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ("binary_tensor_data",)
_SHOWN = 60
"""number of characters of a client's text that a message repeats"""
_NUMBER_BYTES, _HEADER_BYTES = 32, 16_384
"""largest number of bytes of one number in JSON with its separator, and of everything else in a request"""
TYPES = {
    "FP32": "<f4",
    "FP64": "<f8",
    "UINT8": "|u1",
    "INT8": "|i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
}
"""Data types of inputs and outputs by their names in the protocol, as numpy writes them. Only a proxy has others than
FP32."""


@dataclass(frozen=True)
class Signature:
    """Name, version, and shapes of a served model, as its metadata describe them."""

    name: str
    shape: tuple[int, ...]
    """shape of one input, without the axis of the rows"""
    classes: int
    bounds: Bounds = field(default_factory=Bounds)
    version: str = "1"
    max_rows: int = 64
    """largest number of inputs in a request"""
    input_name: str = INPUT
    output_name: str = OUTPUT
    input_type: str = "FP32"
    output_type: str = "FP32"
    flat: bool = False
    """whether the output has one number for each input and no axis of classes"""
    proxied: bool = False
    """whether the model is that of another server"""
    sampling_rate: int | None = None
    """sampling rate of a model of clips, which may also be sent as `.wav` files in base64"""
    certified_patch: str | None = None
    """patch for which a vote over masks states whether it can have changed the class; None for another model"""
    kind: InputKind = "numbers"
    """kind of the inputs; files and texts are sent as BYTES, and their `shape` has no sizes"""
    lengths: tuple[int, int] = (1, 1)
    """smallest and largest number of bytes of a file, or of characters of a text"""

    @property
    def values(self) -> int:
        """Number of values of one input."""
        return prod(self.shape)

    @property
    def most_bytes(self) -> int:
        """Largest number of bytes of a valid request body, in JSON with 32 bytes for each number, four for three bytes
        of a file, and twelve for each character of a text, which may be written as two escapes.
        """
        per_row = {"numbers": 0, "files": 4 * self.lengths[1] // 3, "texts": 12 * self.lengths[1]}[self.kind]
        return _HEADER_BYTES + self.max_rows * (self.values * _NUMBER_BYTES + per_row)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the model in the form that the protocol defines."""
        certified = [{"name": CERTIFIED, "datatype": "BOOL", "shape": [-1]}]
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": "holdfast_proxy" if self.proxied else "holdfast_torch",
            "inputs": [{"name": self.input_name, "datatype": self.input_type, "shape": [-1, *self.shape]}],
            "outputs": [
                {
                    "name": self.output_name,
                    "datatype": self.output_type,
                    "shape": [-1] if self.flat else [-1, self.classes],
                },
                *(certified if self.certified_patch is not None else []),
            ],
        }


@dataclass(frozen=True, eq=False)
class InferRequest:
    """The content of a valid request to `infer`."""

    x: Tensor
    """inputs (n, *shape) in the data type of the signature"""
    id: str | None = None
    outputs: tuple[tuple[str, bool], ...] = ()
    """names of the outputs to return, and whether each is returned as bytes after the JSON"""
    sent: Tensor | None = None
    """inputs in float64, if numbers in JSON may have been rounded to the data type of the signature"""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_EXACT = 2.0**53
"""size from which msgspec and numpy may convert an integer to different floating-point numbers"""


@lru_cache
def _float_decoder(depth: int) -> "msgspec.json.Decoder[dict[str, Any]]":
    """Return a decoder of requests whose data are numbers in lists that are nested `depth` times."""
    data: Any = float
    for _ in range(depth):
        data = list[data]
    typed: Any = TypedDict  # which type checkers accept with literal keys and types only
    keys = {"name": Any, "shape": Any, "datatype": Any, "parameters": Any, "data": data}
    inputs: Any = list[typed("Input", keys, total=False)]  # type: ignore[misc]
    content = typed("Content", {"inputs": inputs, "id": Any, "outputs": Any, "parameters": Any}, total=False)
    return msgspec.json.Decoder(content)


def read_request(body: bytes, header_length: int | None, signature: Signature) -> InferRequest:
    """Return the content of a request to `infer`. `header_length` is the number of bytes of its JSON if tensors follow
    as bytes, else None.

    Raises `Refused` with status 400 and the first mistake.
    """
    if header_length is None:
        text, tail = body, memoryview(b"")
    else:
        if header_length > len(body):
            raise _wrong(
                f"the header states {header_length} bytes of JSON, and the body has {len(body)} bytes"
            )
        text, tail = body[:header_length], memoryview(body)[header_length:]
    # msgspec does not check the encoding of text that it skips
    if signature.input_type.startswith("FP") and text.isascii():
        for depth in (1, len(signature.shape) + 1):
            try:
                return _request(_float_decoder(depth).decode(text), text, tail, signature, depth)
            except (msgspec.ValidationError, Refused):
                continue
            except (msgspec.DecodeError, RecursionError):
                break
    return _request(_object(text), text, tail, signature, None)


def _request(
    content: Mapping[str, Any], text: bytes, tail: memoryview, signature: Signature, depth: int | None
) -> InferRequest:
    """Return a request from its JSON. `depth` is the number of nested lists of its data, which are then floating-point
    numbers; None if they may be anything.
    """
    tensor = _only_input(content.get("inputs"), signature.input_name)
    kind = signature.input_type
    if tensor.get("datatype") == "BYTES" and signature.sampling_rate is not None and not tail:
        n = _shape(tensor.get("shape"), replace(signature, shape=()))[0]
        return _answerable(content, _clips(tensor.get("data"), n, signature), None, signature)
    shape = _shape(tensor.get("shape"), signature)
    if tensor.get("datatype") != kind:
        raise _wrong(f"the datatype of the input is {_shown(tensor.get('datatype'))}; {kind} was expected")
    size, sent = _parameters(tensor).get("binary_data_size"), None
    if signature.kind != "numbers":
        elements = _symbols(tensor, tail, size, shape[0], signature)
        return _answerable(content, elements, None, signature)
    dtype = np.dtype(TYPES[kind])
    if size is not None:
        values = _binary_values(tensor, tail, size, prod(shape), dtype)
    elif tail:
        raise _wrong(f"{len(tail)} bytes follow the JSON; no input has the parameter binary_data_size")
    else:
        if depth is None:
            exact = _json_values(tensor.get("data"), text, prod(shape), shape, dtype).reshape(shape)
        else:
            exact = _float_values(tensor.get("data"), shape if depth > 1 else (prod(shape),)).reshape(shape)
        values = _rounded(exact, dtype)
        if dtype.kind == "f":
            sent = torch.from_numpy(exact.astype(np.float64, copy=False))
    x = torch.from_numpy(values.reshape(shape))
    least, most = map(float, torch.aminmax(x))
    if depth is not None and sent is not None and not max(-least, most) < _EXACT:
        raise _wrong("data may contain an integer that is no floating-point number")
    _refuse_range(x, least, most, signature.bounds)
    return _answerable(content, x, sent, signature)


def _answerable(
    content: Mapping[str, Any], x: Tensor, sent: Tensor | None, signature: Signature
) -> InferRequest:
    """Return a request for the scores of `x`. Raises `Refused` for another id than text, or an unknown output."""
    name = content.get("id", "")
    if not isinstance(name, str):
        raise _wrong("the id of a request must be text")
    return InferRequest(x, name if "id" in content else None, _requested_outputs(content, signature), sent)


def _object(text: bytes) -> dict[str, Any]:
    try:
        content = _DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise _wrong("the body is not valid JSON") from error
    if not isinstance(content, dict):
        raise _wrong("the body is not a JSON object")
    return content


def _only_input(inputs: object, name: str) -> Mapping[str, Any]:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _wrong("inputs must be a list with one object, the input of the model")
    tensor: dict[str, Any] = inputs[0]
    if tensor.get("name") != name:
        raise _wrong(f"the name of the input is {_shown(tensor.get('name'))}; {name!r} was expected")
    return tensor


def _shape(shape: object, signature: Signature) -> tuple[int, ...]:
    """Return the shape of the inputs with the number of rows. Raises `Refused` if the model does not accept it."""
    expected = ["n", *signature.shape]
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise _wrong(f"shape must be a list of integers, [{', '.join(map(str, expected))}]")
    if tuple(shape[1:]) != signature.shape or not shape:
        raise _wrong(f"shape is {_shown(shape)}; [{', '.join(map(str, expected))}] was expected")
    if not 1 <= shape[0] <= signature.max_rows:
        raise _wrong(f"the request has {_shown(shape[0])} rows; 1 to {signature.max_rows} were expected")
    return tuple(shape)


def _parameters(content: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = content.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _wrong("parameters must be an object")
    return parameters


def _binary_values(
    tensor: Mapping[str, Any], tail: memoryview, size: object, count: int, dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    if type(size) is not int or size != count * dtype.itemsize:
        raise _wrong(
            f"binary_data_size is {_shown(size)}; {count * dtype.itemsize} was expected for this shape"
        )
    _refuse_other_tail(tensor, tail, size)
    # a copy: a tensor must not share the read-only memory of the body
    return np.frombuffer(bytearray(tail), dtype).astype(dtype.newbyteorder("="), copy=False)


def _refuse_other_tail(tensor: Mapping[str, Any], tail: memoryview, size: object) -> None:
    """Raise `Refused` if the input has data in JSON, too, or if other than `size` bytes follow the JSON."""
    if "data" in tensor:
        raise _wrong("the input has data and the parameter binary_data_size; one of them was expected")
    if len(tail) != size:
        raise _wrong(f"{len(tail)} bytes follow the JSON; {_shown(size)} were expected")


def _symbols(
    tensor: Mapping[str, Any], tail: memoryview, size: object, count: int, signature: Signature
) -> Tensor:
    """Return the files or texts of a tensor of BYTES as rows (n, longest); see `core/batch.py`.

    In JSON, `data` are texts, or files in base64. Otherwise the length of each element, in four bytes, precedes it, and
    texts are UTF-8.
    """
    files, (least, most) = signature.kind == "files", signature.lengths
    elements: Sequence[str | bytes]
    if size is not None:
        _refuse_other_tail(tensor, tail, size)
        elements = _elements(tail, count)
    elif tail:
        raise _wrong(f"{len(tail)} bytes follow the JSON; no input has the parameter binary_data_size")
    else:
        elements = _texts(tensor.get("data"), count, ", files in base64" if files else "")
    unit, rows = "bytes" if files else "characters", [*map(_file if files else _text, elements)]
    for place, row in enumerate(rows):
        if row is None:
            what = "no file in base64" if files else "no valid text without the character 0"
            raise _wrong(f"row {place} of data is {what}")
        if not least <= len(row) <= most:
            raise _wrong(f"row {place} of data has {len(row)} {unit}; {least} to {most} were expected")
        if not files and not row.strip():
            raise _wrong(f"row {place} of data has {len(row)} characters, all of them whitespace")
    return (encoded_files if files else encoded_texts)(rows, most)


def _file(element: str | bytes) -> bytes | None:
    """Return the content of a file, or None if it is not in base64."""
    try:
        return base64.b64decode(element, validate=True) if isinstance(element, str) else element
    except ValueError:
        return None


def _text(element: str | bytes) -> str | None:
    """Return a text, or None if it is no UTF-8 or has characters that a row of code points cannot contain."""
    try:
        text = (element.encode() if isinstance(element, str) else element).decode()
    except ValueError:  # of half a surrogate pair, too
        return None
    return None if "\0" in text else text


def _elements(tail: memoryview, count: int) -> list[bytes]:
    """Return the elements of a tensor of BYTES, each of which follows its length in four bytes."""
    elements, place = list[bytes](), 0
    while place < len(tail) and len(elements) < count:
        (length,) = struct.unpack_from("<I", tail, place) if place + 4 <= len(tail) else (len(tail),)
        elements.append(bytes(tail[place + 4 : place + 4 + length]))
        place += 4 + length
    if place != len(tail) or len(elements) != count:
        raise _wrong(
            f"the bytes after the JSON are not {count} elements, each after its length in four bytes, little-endian"
        )
    return elements


def _texts(data: object, count: int, of: str) -> list[str]:
    if not isinstance(data, list) or len(data) != count or not all(isinstance(each, str) for each in data):
        raise _wrong(f"data must be a list of {count} texts{of}")
    return data


def _clips(data: object, count: int, signature: Signature) -> Tensor:
    """Return the clips (n, *shape) of `.wav` files of 16 bits in base64, padded with zeros at the end."""
    texts = _texts(data, count, ", .wav files in base64")
    *leading, n = signature.shape
    channels = prod(leading)
    rows = np.zeros((count, channels, n), np.float32)
    for place, text in enumerate(texts):
        try:
            with wave.open(io.BytesIO(base64.b64decode(text, validate=True)), "rb") as file:
                found = (file.getsampwidth(), file.getnchannels(), file.getframerate())
                stated = file.getnframes()
                # one more than is allowed, so that no more are read of a longer clip
                samples = np.frombuffer(file.readframes(n + 1), np.uint8)
        except (wave.Error, struct.error, EOFError, ValueError) as error:
            raise _wrong(f"row {place} of data is no .wav file of 16 bits in base64") from error
        if found != (2, channels, signature.sampling_rate):
            raise _wrong(
                f"row {place} of data is a .wav file of {8 * found[0]} bits, {found[1]} channels and {found[2]} Hz; 16 "
                f"bits, {channels} channels and {signature.sampling_rate} Hz were expected"
            )
        whole = samples[: len(samples) // (2 * channels) * 2 * channels]
        clip = whole.view("<i2").reshape(-1, channels).T
        if not 1 <= clip.shape[1] <= n:
            length = f"more than {n}" if clip.shape[1] else "no"
            raise _wrong(f"row {place} of data has {length} samples; 1 to {n} were expected")
        # a file that was written to a pipe states no number of samples
        if clip.shape[1] < min(stated, n) and stated < NO_SIZE // (2 * channels):
            raise _wrong(f"row {place} of data has {clip.shape[1]} samples, and its header states {stated}")
        rows[place, :, : clip.shape[1]] = clip / np.float32(32768)
    return torch.from_numpy(rows.reshape(count, *signature.shape))


def _float_values(data: Any, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return floating-point numbers in lists that are nested like the shape as a flat array."""
    lists: list[Any] = [data or ()]
    for size in shape:
        if any(len(part) != size for part in lists):
            raise _wrong("data is not nested like shape")
        lists = list(chain.from_iterable(lists))
    return np.frombuffer(bytearray(struct.pack(f"{len(lists)}d", *lists)))


def _json_values(
    data: object, text: bytes, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Return the numbers of `data`, which is flat or nested like the shape, as they were sent."""
    if not isinstance(data, list):
        raise _wrong("data must be a list of numbers")
    if not _is_numeric(data, len(shape)):
        raise _wrong("data must contain numbers only, in a flat list or nested like shape")
    try:
        # without a type first, so that text is not converted to numbers
        values = np.array(data)
    except ValueError as error:
        raise _wrong("data is neither a flat list of numbers nor nested like shape") from error
    if values.dtype.kind not in "iuf" or ((b"true" in text or b"false" in text) and _has_booleans(data)):
        raise _wrong("data must contain numbers only")
    if values.size != count or (values.ndim > 1 and values.shape != shape):
        raise _wrong(f"data has {values.size} values in {values.ndim} dimensions; {count} were expected")
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        if values.dtype.kind == "f" or values.min() < ends.min or values.max() > ends.max:
            raise _wrong(f"data must contain whole numbers from {ends.min} to {ends.max} only")
    return values


def _rounded(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    # values beyond the range of float32 become infinite, and are refused as such
    with np.errstate(over="ignore"):
        return values.astype(dtype.newbyteorder("="))


def _is_numeric(data: list[Any], depth: int) -> bool:
    """Return whether lists nested at most `depth` times contain only numbers and booleans.

    Without this check, numpy would give each value of a list with one text the size of that text.
    """
    if data and isinstance(data[0], list):
        return depth > 1 and all(isinstance(part, list) and _is_numeric(part, depth - 1) for part in data)
    try:
        sum(data)  # the fastest check of the types
    except (TypeError, OverflowError):
        return False
    return True


def _has_booleans(data: object) -> bool:
    if isinstance(data, list):
        return any(map(_has_booleans, data))
    return isinstance(data, bool)


def _refuse_range(x: Tensor, least: float, most: float, bounds: Bounds) -> None:
    """Raise `Refused` for values outside of the range of the model, which includes NaN. `least` and `most` are the
    smallest and the largest value, or NaN.
    """
    low, high = bounds.low, bounds.high
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        lows, highs = bounds.like(x)
        inside = bool(((x >= lows) & (x <= highs)).all())
        span = "the range that the model declares"
    else:
        inside = low <= least and most <= high
        span = f"{low:g} to {high:g}"
    if not inside:
        raise _wrong(f"data contains a value outside of {span}, or one that is not a number")


def _requested_outputs(content: Mapping[str, Any], signature: Signature) -> tuple[tuple[str, bool], ...]:
    """Return the names of the requested outputs, by default all, and whether each is requested as bytes. Raises
    `Refused` for an unknown or a repeated output.
    """
    names = [signature.output_name, *([] if signature.certified_patch is None else [CERTIFIED])]
    default = _parameters(content).get("binary_data_output", False)
    requested = dict.fromkeys(names, default)
    outputs, most = content.get("outputs", []), len(names)
    if not isinstance(outputs, list) or len(outputs) > most or any(not isinstance(o, dict) for o in outputs):
        raise _wrong(f"outputs must be a list with at most {'one object' if most == 1 else 'two objects'}")
    if outputs:
        requested = {}
    for output in outputs:
        name = output.get("name")
        if name not in names:
            expected = " or ".join(map(repr, names))
            raise _wrong(f"the output {_shown(name)} does not exist; {expected} was expected")
        if name in requested:
            raise _wrong(f"the output {name!r} is requested twice")
        parameters = _parameters(output)
        if parameters.get("classification") is not None:
            raise _wrong("the classification extension is not supported")
        requested[name] = parameters.get("binary_data", default)
    if any(not isinstance(binary, bool) for binary in (default, *requested.values())):
        raise _wrong("binary_data and binary_data_output must be true or false")
    return tuple(requested.items())


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _wrong(reason: str) -> Refused:
    return Refused(400, reason)


@dataclass(frozen=True)
class Encoded:
    """A response body with its content type and further headers."""

    body: bytes
    media_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """All headers of the response, as ASGI has them."""
        values = (("content-length", str(len(self.body))), ("content-type", self.media_type), *self.headers)
        return [(name.encode(), value.encode()) for name, value in values]


def encoded(
    scores: Tensor, request: InferRequest, signature: Signature, certified: Tensor | None = None
) -> Encoded:
    """Return the response with the requested outputs: the scores (n, classes) and, of a vote over masks, whether each
    input is certified (n,). Each is in JSON, or in bytes after the JSON.
    """
    values = scores.numpy().astype(TYPES[signature.output_type], copy=False)
    if signature.flat:
        values = values.reshape(len(values))
    arrays: dict[str, tuple[str, NDArray[Any], dict[str, Any]]] = {
        signature.output_name: (signature.output_type, values, {})
    }
    if certified is not None:
        arrays[CERTIFIED] = ("BOOL", certified.numpy(), {"patch": signature.certified_patch})
    content: dict[str, Any] = {"model_name": signature.name, "model_version": signature.version}
    if request.id is not None:
        content["id"] = request.id
    content["outputs"] = outputs = []
    numbers: Sequence[float] = ()
    tail = b""
    for name, binary in request.outputs:
        datatype, array, parameters = arrays[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            data = array.tobytes()
            parameters = {**parameters, "binary_data_size": len(data)}
            tail += data
        if parameters:
            output["parameters"] = parameters
        if not binary:
            output["data"] = listed = array.ravel().tolist()
            numbers = numbers if name == CERTIFIED else listed
        outputs.append(output)
    head = _compact(content, numbers)
    if not any(binary for _, binary in request.outputs):
        return Encoded(head)
    return Encoded(head + tail, BINARY, ((LENGTH_HEADER, str(len(head))),))


def _compact(content: object, numbers: Sequence[float] = ()) -> bytes:
    """Return the same as `compact` in less time. `numbers` are those of the content that may be NaN or infinite."""
    if isfinite(sum(numbers)):
        try:
            return msgspec.json.encode(content)
        except UnicodeEncodeError:  # half of a surrogate pair, which json escapes
            pass
    return compact(content)


def compact(content: object) -> bytes:
    """Return content as JSON without spaces. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
