"""A model of another server of the Open Inference Protocol v2, the upstream server, as the model of this server.

One thread of a worker sends one request for each batch, so that the guard sees inputs in the order of the upstream
server.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Batches, Bounds, Classifier
from holdfast.core.remedies import UPSTREAM_KEY, Placeholder, Remedy, model_argument
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.server.protocol_v2 import BINARY, EXTENSIONS, JSON, LENGTH_HEADER, TYPES, Signature, compact
from holdfast.server.requests import FORWARDED, Refused
from holdfast.server.upstream import METADATA_BYTES, Connection, KeyRefused, UpstreamAddress, unusable

_NUMBER_BYTES, _REST_BYTES = 64, 1 << 16
"""largest number of bytes of a number in the JSON of a response, and of everything else in a response"""
_OTHER_BYTES = 1 << 20
"""largest number of bytes for each input in the outputs that are not returned"""
_MOST_VALUES = 1 << 24
"""largest number of values in the first request; its size comes from the metadata of the server"""
_MOST_SIZES = 64
"""largest number of dimensions of a tensor"""
_FLOATS = ("FP32", "FP64")
_UNNAMED = "input-0"
"""name of an input that the metadata do not describe"""


@dataclass(frozen=True)
class UpstreamModel:
    """A model of an upstream server, as its metadata and the response to a first request describe it."""

    address: UpstreamAddress
    path: str
    """path of its requests, with `/infer`"""
    signature: Signature
    batch: int | None = None
    """number of inputs of each request if it is fixed"""
    binary: bool = False
    """whether tensors are sent as bytes"""
    probabilities: bool | None = None
    """whether the scores of the first input are probabilities; None if that cannot be known"""

    @property
    def of_labels(self) -> bool:
        """Whether the outputs are class numbers, and not scores."""
        return self.signature.output_type not in _FLOATS

    @property
    def input_dtype(self) -> torch.dtype:
        """Data type of the inputs."""
        dtype = np.dtype(TYPES[self.signature.input_type]).newbyteorder("=")
        return torch.from_numpy(np.zeros(1, dtype)).dtype

    def opened(self) -> "ProxiedModel":
        """Return the model with a connection of its own."""
        return ProxiedModel(self, self.address.connect())


class ProxiedModel(Classifier):
    """A classifier that sends inputs to an upstream server, and returns the scores of its response unchanged."""

    def __init__(self, upstream: UpstreamModel, connection: Connection) -> None:
        super().__init__(_not_called, bounds=upstream.signature.bounds)
        self.remote = True
        self._upstream, self._connection = upstream, connection

    def forward(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the output (n, classes) of the upstream server for inputs `x` (n, *shape).

        Raises `Refused`, see `Connection.request`.
        """
        size = self._upstream.batch
        return self._sent(x) if size is None else Batches(size).through(self._sent, x)

    def _sent(self, x: Tensor) -> Tensor:
        upstream = self._upstream
        signature = upstream.signature
        most = len(x) * (_OTHER_BYTES + signature.classes * _NUMBER_BYTES) + _REST_BYTES
        outputs = _infer(self._connection, upstream, x, most)
        output = next((each for each in outputs if each.name == signature.output_name), None)
        if output is None:
            raise unusable("returned no output of the requested name")
        if output.datatype != signature.output_type:
            raise unusable(f"returned {output.datatype}, and {signature.output_type} before")
        return _rows(output.values, len(x), signature.classes)


def _not_called(x: Tensor) -> Tensor:
    raise AssertionError("a proxied model has no network")


@dataclass(frozen=True, eq=False)
class _Output:
    name: str
    datatype: str
    values: np.ndarray[Any, Any]
    """the values in the shape that the response states; empty for types that are no numbers"""


def _infer(connection: Connection, upstream: UpstreamModel, x: Tensor, most: int) -> list[_Output]:
    signature = upstream.signature
    values = x.detach().cpu().numpy().astype(TYPES[signature.input_type], copy=False)
    tensor: dict[str, Any] = {
        "name": signature.input_name,
        "shape": list(values.shape),
        "datatype": signature.input_type,
    }
    # A server may send a second response to a request, which the next request on the connection would then receive.
    request_id = secrets.token_hex(8)
    content: dict[str, Any] = {"id": request_id, "inputs": [tensor]}
    if signature.output_name:
        content["outputs"] = [{"name": signature.output_name}]
    headers = [*FORWARDED.get()]
    if upstream.binary:
        tail = values.tobytes()
        tensor["parameters"] = {"binary_data_size": len(tail)}
        if signature.output_name:
            content["outputs"][0]["parameters"] = {"binary_data": True}
        else:
            content["parameters"] = {"binary_data_output": True}
        head = compact(content)
        headers += [("content-type", BINARY), (LENGTH_HEADER, str(len(head)))]
        body = head + tail
    else:
        tensor["data"] = values.flatten().tolist()
        headers.append(("content-type", JSON))
        body = compact(content)
    response = connection.request(upstream.path, body, headers=headers, most=most)
    try:
        return _outputs(*response, request_id)
    except Refused:
        connection.close()
        raise


def _outputs(body: bytes, length: int | None, request_id: str) -> list[_Output]:
    """Return the outputs in a response to the request with this id, which a server may leave out of its response.

    Raises `Refused` with status 502 for a response that does not follow the protocol.
    """
    text, tail = (body, b"") if length is None else (body[:length], body[length:])
    outputs, start = [], 0
    try:
        content = json.loads(text)
        if content.get("id", request_id) not in (request_id, ""):
            raise unusable("returned the response to another request")
        for entry in content["outputs"]:
            name, datatype, shape = str(entry["name"]), str(entry["datatype"]), entry["shape"]
            size = (entry.get("parameters") or {}).get("binary_data_size")
            if datatype not in TYPES:
                values = np.empty(0)
            elif size is None:
                values = np.array(entry["data"], np.float64).reshape(_lengths(shape))
            else:
                values = np.frombuffer(tail[start : start + size], TYPES[datatype]).reshape(_lengths(shape))
            start += size or 0
            outputs.append(_Output(name, datatype, values))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise unusable("returned an invalid response") from error
    return outputs


def _rows(values: np.ndarray[Any, Any], n: int, classes: int | None) -> Tensor:
    """Return the scores (n, classes) float64. Raises `Refused` if there is not one row for each input."""
    if values.shape[:1] != (n,) or values.ndim > 2 or (classes is not None and values.size != n * classes):
        raise unusable(f"returned an output of shape {list(values.shape)[:4]} for {n} inputs")
    return torch.from_numpy(values.reshape(n, -1).astype(np.float64))


def read_upstream(
    address: UpstreamAddress,
    model: str | None,
    *,
    shape: tuple[int, ...] | None = None,
    bounds: Bounds | None = None,
    output: str | None = None,
    max_rows: int = 64,
) -> UpstreamModel:
    """Return the model of an upstream server after a request for its metadata and one for the scores of an input.

    `model` is `NAME` or `NAME/versions/V`; None for the only model of the server. `shape` is that of one input if the
    metadata leave sizes open, `bounds` the valid range (any finite number by default), and `output` the name of the
    output that is returned; by default the first one with scores, or else with class numbers. Raises `TargetError` if
    the server does not answer, and `UsageError` for a model that the proxy cannot pass on.
    """
    try:
        connection = address.connect()
        name = model or _only_model(connection, address.url)
        upstream = _described(connection, address, name, shape, bounds, max_rows)
        signature = upstream.signature
        x = signature.bounds.clamp(torch.zeros(upstream.batch or 1, *signature.shape)).to(
            upstream.input_dtype
        )
        outputs = _infer(connection, upstream, x, _OTHER_BYTES * len(x) + METADATA_BYTES)
    except KeyRefused as error:
        reason = "with a key that the server accepts, if it requires one"
        raise TargetError(f"{address.url}: {error.reason}", replace(UPSTREAM_KEY, reason=reason)) from error
    except Refused as error:
        raise TargetError(
            f"{address.url}: {error.reason}; check that the server runs, and that it serves this model over the Open "
            "Inference Protocol v2"
        ) from error
    return _with_output(upstream, outputs, output, len(x))


def _only_model(connection: Connection, url: str) -> str:
    """Return the name of the only model of a server, from the list of KServe or the index of Triton and MLServer."""
    names: list[str] = []
    for path, body in (("/v2/models", None), ("/v2/repository/index", b"{}")):
        try:
            content = connection.json(path, body)
        except KeyRefused:
            raise
        except Refused as error:
            if error.status == 503:
                raise
            continue
        entries = content.get("models") if isinstance(content, dict) else content
        if isinstance(entries, list):
            found = [each.get("name") if isinstance(each, dict) else each for each in entries]
            names = [each for each in found if isinstance(each, str)]
            break
    if len(names) == 1:
        return names[0]
    shown = (
        f"the server has the models {', '.join(names[:20])}"
        if names
        else "the server does not list its models"
    )
    raise UsageError(
        f"{url} names no model, and {shown}", Remedy("proxy", Placeholder(f"{url}/v2/models/NAME"))
    )


def _described(
    connection: Connection,
    address: UpstreamAddress,
    name: str,
    shape: tuple[int, ...] | None,
    bounds: Bounds | None,
    max_rows: int,
) -> UpstreamModel:
    """Return the model with the input that the metadata describe, before its output is known."""
    metadata = connection.json(f"/v2/models/{name}")
    if not isinstance(metadata, dict) or not isinstance(inputs := metadata.get("inputs") or [], list):
        raise unusable("describes the model in an unknown form")
    where = f"{address.url}/v2/models/{name}"
    if len(inputs) > 1:
        raise UsageError(f"{where} has {len(inputs)} inputs; the proxy passes on models with one input")
    try:
        entry = inputs[0] if inputs else {"name": _UNNAMED, "datatype": "FP32", "shape": []}
        label, datatype = str(entry["name"]), str(entry["datatype"])
        sizes = _sizes(entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise unusable("describes the input of the model in an unknown form") from error
    if datatype not in TYPES:
        raise UsageError(f"the input of {where} is {datatype}; the proxy passes on {', '.join(TYPES)}")
    limit = torch.finfo(torch.float32).max
    signature = Signature(
        name.partition("/")[0],
        _input_shape(tuple(sizes[1:]), shape, where),
        0,
        bounds or Bounds(-limit, limit),
        _version(name, metadata),
        max_rows,
        input_name=label,
        output_name="",
        input_type=datatype,
        proxied=True,
    )
    batch = sizes[0] if sizes and sizes[0] > 0 else None
    if (batch or 1) * prod(signature.shape) > _MOST_VALUES:
        raise UsageError(
            f"the inputs of {where} have the shape {list(signature.shape)} in batches of {batch or 1}; at most "
            f"{_MOST_VALUES:,} values in a request were expected"
        )
    return UpstreamModel(address, f"/v2/models/{name}/infer", signature, batch, _takes_bytes(connection))


def _sizes(shape: Any) -> list[int]:
    """Return the sizes of a shape in metadata. Raises `ValueError` for another form, and for more sizes than a tensor
    can have.
    """
    # servers that convert messages of gRPC write integers of 64 bits as strings
    if not isinstance(shape, list) or any(type(size) not in (int, str) for size in shape):
        raise ValueError("no list of integers")
    if len(shape) > _MOST_SIZES:
        raise ValueError("too many sizes")
    return [int(size) for size in shape]


def _lengths(shape: Any) -> list[int]:
    """Return the sizes of an output. Raises `ValueError` for another form, and for sizes that are left open."""
    sizes = _sizes(shape)
    if min(sizes, default=0) < 0:
        raise ValueError("negative sizes")
    return sizes


def _version(name: str, metadata: Mapping[str, Any]) -> str:
    """Return the version in the path of a model, or else the only one of its metadata, or 1."""
    versions = metadata.get("versions")
    only = versions[0] if isinstance(versions, list) and len(versions) == 1 else "1"
    return name.partition("/versions/")[2] or str(only)


def _takes_bytes(connection: Connection) -> bool:
    """Return whether the server states that it supports the binary tensor extension."""
    try:
        server = connection.json("/v2")
    except Refused as error:
        if error.status == 503:
            raise
        return False
    extensions = server.get("extensions") if isinstance(server, dict) else None
    return isinstance(extensions, list) and EXTENSIONS[0] in extensions


def _input_shape(sizes: tuple[int, ...], given: tuple[int, ...] | None, where: str) -> tuple[int, ...]:
    """Return the shape of one input from the metadata and, where they leave sizes open, from the given one."""
    if given is not None:
        if sizes and (
            len(sizes) != len(given) or any(s not in (-1, g) for s, g in zip(sizes, given, strict=True))
        ):
            raise UsageError(
                f"the inputs of {where} have the shape {list(sizes)}, and {list(given)} was given; correct "
                "the declared input shape, or inputs.shape of the guard"
            )
        return given
    if not sizes or min(sizes) < 1:
        raise UsageError(
            f"the metadata of {where} give the shape {list(sizes)} for one input, which leaves sizes open",
            model_argument(
                "input_shape",
                Placeholder("C,H,W", "(C, H, W)"),
                reason="as in 3,32,32",
            ),
        )
    return sizes


def _with_output(
    upstream: UpstreamModel, outputs: list[_Output], name: str | None, rows: int
) -> UpstreamModel:
    """Return the model with the output that is returned, from the response to a first request."""
    found = ", ".join(f"{each.name} ({each.datatype})" for each in outputs) or "none"
    numbers = [each for each in outputs if each.datatype in TYPES and name in (None, each.name)]
    output = next((each for each in numbers if each.datatype in _FLOATS), next(iter(numbers), None))
    if output is None:
        raise UsageError(
            f"{upstream.address.url} returns the outputs {found}; an output with numbers "
            f"{'' if name is None else f'and the name {name} '}was expected",
            Remedy("upstream_output", Placeholder("NAME")),
        )
    try:
        scores = _rows(output.values, rows, None)
    except Refused as error:
        raise UsageError(
            f"{upstream.address.url}: {error.reason}; one row for each input was expected"
        ) from error
    signature = replace(
        upstream.signature,
        classes=prod(scores.shape[1:]),
        output_name=output.name,
        output_type=output.datatype,
        flat=output.values.ndim == 1,
    )
    return replace(upstream, signature=signature, probabilities=_probabilities(scores))


def _probabilities(scores: Tensor) -> bool | None:
    """Return whether scores are probabilities of several classes; None for one number of an input."""
    if scores.shape[1] < 2:
        return None
    return bool((scores >= 0).all() and ((scores.sum(1) - 1).abs() < 1e-3).all())
