"""A model of another server of the Open Inference Protocol v2, the upstream server, whose responses are limited in size
and time.
"""

import json
import os
import queue
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from urllib.parse import quote

import httpcore
import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import UPSTREAM_KEY, Placeholder, Remedy, TargetError, UsageError, model_argument
from holdfast.core.model import Batches, Bounds, Classifier
from holdfast.core.types import Ids, Inputs, Logits
from holdfast.io.remote.remote import header_variable
from holdfast.server.protocol_v2 import BINARY, EXTENSIONS, JSON, LENGTH_HEADER, TYPES, Signature, compact
from holdfast.server.requests import FORWARDED, Refused, is_sendable, wait_first

METADATA_BYTES = 1 << 22
"""largest number of bytes of metadata"""
_HEAD_BYTES = 96 * 1024
"""largest number of bytes before the body of a response, with informational responses"""
_FRAMED = 2
"""largest number of received bytes for each byte of a body, which may be sent in chunks"""
_IN_PATH = "/%:@!$&'()*+,;=~"
_REFUSED = frozenset({400, 413, 415, 422})
"""status codes with which a server refuses the content of a request"""
_BUSY = frozenset({429, 503})
_NO_KEY = frozenset({401, 403})


class KeyRefused(Refused):
    """A request to which the upstream server answers that its key is missing or not valid."""


def _lost(reason: str) -> Refused:
    return wait_first(f"the upstream server {reason}", 0.0, cause="upstream")


def unusable(reason: str) -> Refused:
    """Return the refusal of a request whose response cannot be used, with status 502."""
    return Refused(502, f"the upstream server {reason}", (), "upstream")


@dataclass(frozen=True)
class UpstreamAddress:
    """Where requests are sent: the address of the server, further headers, and the time for one response."""

    url: str
    """address of the server, without a path of a model"""
    headers: tuple[str, ...] = ()
    """headers of each request, each `NAME: env:VARIABLE`"""
    timeout_s: float = 10.0
    """seconds from the beginning of a request, with its connection, until the whole response must have arrived"""

    def connect(self) -> "Connection":
        """Return a connection with the headers, whose values are read from the environment.

        Raises `UsageError` for a variable that is not set, or whose value cannot be that of a header.
        """
        headers = {}
        for name, variable in map(header_variable, self.headers):
            if variable not in os.environ:
                raise UsageError(f"the variable {variable} of the header {name} is not set; set it")
            headers[name] = os.environ[variable].strip()
            if not is_sendable(headers[name]):
                raise UsageError(
                    f"the variable {variable} of the header {name} contains other characters than printable ASCII; "
                    "correct it"
                )
        return Connection(self, headers)


@dataclass(eq=False)
class _Allowance:
    """What the response to the current request may take: the end of its time, and a number of bytes."""

    end: float = 0.0
    left: int = 0

    @property
    def remaining_s(self) -> float:
        """Seconds that are left. Raises `TimeoutException` if there are none."""
        remaining_s = self.end - time.monotonic()
        if remaining_s <= 0:
            raise httpcore.TimeoutException
        return remaining_s

    def take(self, n_bytes: int) -> None:
        """Count received bytes."""
        self.left -= n_bytes
        if self.left < 0:
            raise unusable("returned a response that is too large")


class _LimitedStream(httpcore.NetworkStream):
    """A connection whose operations together have the time of the request. The time limits of httpcore are those of
    single operations, of which a server can cause any number.
    """

    def __init__(self, stream: httpcore.NetworkStream, allowance: _Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return bytes that were received."""
        data = self._stream.read(max_bytes, self._allowance.remaining_s)
        self._allowance.take(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        sock, view = self._stream.get_extra_info("socket"), memoryview(buffer)
        while view:
            sock.settimeout(self._allowance.remaining_s)
            try:
                view = view[sock.send(view) :]
            except TimeoutError as error:
                raise httpcore.WriteTimeout from error
            except OSError as error:
                raise httpcore.WriteError from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Return the connection with TLS."""
        stream = self._stream.start_tls(ssl_context, server_hostname, self._allowance.remaining_s)
        return _LimitedStream(stream, self._allowance)

    def get_extra_info(self, info: str) -> Any:
        """Return a fact about the connection, such as its socket."""
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()


class _LimitedBackend(httpcore.NetworkBackend):
    """Opens connections in the time of the request."""

    def __init__(self, allowance: _Allowance) -> None:
        self._allowance, self._sockets = allowance, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to one of the addresses of a host; each gets an equal part of the time that is left."""
        failure: Exception = httpcore.ConnectError("the host has no address")
        addresses = _addresses(host, port, self._allowance.remaining_s)
        for number, address in enumerate(addresses):
            part_s = self._allowance.remaining_s / (len(addresses) - number)
            try:
                stream = self._sockets.connect_tcp(address, port, part_s, socket_options=socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            return _LimitedStream(stream, self._allowance)
        raise failure


def _addresses(host: str, port: int, timeout_s: float) -> list[str]:
    """Return the addresses of a host. A thread looks them up, because the resolver has time limits of its own."""
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(entry[4][0]) for entry in entries)))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = found.get(timeout=timeout_s)
    except queue.Empty:
        raise httpcore.ConnectTimeout from None
    if isinstance(addresses, Exception):
        raise httpcore.ConnectError(str(addresses)) from addresses
    return addresses


class Connection:
    """A connection to an upstream server that is kept open. It is used by one thread at a time."""

    def __init__(self, address: UpstreamAddress, headers: Mapping[str, str]) -> None:
        self._url, self._timeout_s = address.url, address.timeout_s
        self._headers = [("accept-encoding", "identity"), ("user-agent", "holdfast"), *headers.items()]
        self._allowance = _Allowance()
        self._connections = httpcore.ConnectionPool(
            ssl.create_default_context(), max_connections=1, network_backend=_LimitedBackend(self._allowance)
        )

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next request opens another one."""
        self._connections.close()

    def request(
        self,
        path: str,
        body: bytes | None = None,
        *,
        headers: Iterable[tuple[str, str]] = (),
        most: int = METADATA_BYTES,
    ) -> tuple[bytes, int | None]:
        """Return the body of the response to a GET, or to a POST of `body`, and the number of bytes of its JSON if
        tensors follow as bytes.

        A request whose connection was closed before the response is sent once more, within the same time. Raises
        `Refused` with status 400 if the server refuses the content, 502 for an unusable response and 503 if there is
        none.
        """
        url, sent = self._url + quote(path, _IN_PATH), [*self._headers, *headers]
        self._allowance.end = time.monotonic() + self._timeout_s
        for attempt in range(2):
            try:
                response, content = self._answer(url, body, sent, most)
                break
            except httpcore.TimeoutException as error:
                raise _lost("did not answer in time") from error
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError) as error:
                if attempt:
                    raise _lost("closed the connection") from error
            except (
                httpcore.ConnectError,
                httpcore.LocalProtocolError,
                httpcore.UnsupportedProtocol,
            ) as error:
                raise _lost("cannot be reached") from error
        _refuse_status(response.status)
        length = _header(response, LENGTH_HEADER.encode())
        if length is not None and not re.fullmatch(rb"[0-9]{1,12}", length):
            raise unusable("returned an invalid header")
        return content, None if length is None else int(length)

    def _answer(
        self, url: str, body: bytes | None, headers: list[tuple[str, str]], most: int
    ) -> tuple[httpcore.Response, bytes]:
        self._allowance.left = _HEAD_BYTES
        method = "GET" if body is None else "POST"
        with self._connections.stream(method, url, headers=headers, content=body) as response:
            if (_header(response, b"content-encoding") or b"identity").lower() != b"identity":
                raise unusable("returned a compressed response")
            self._allowance.left += _FRAMED * most
            parts, size = [], 0
            for part in response.iter_stream():
                size += len(part)
                if size > most:
                    raise unusable("returned a response that is too large")
                parts.append(part)
        return response, b"".join(parts)

    def json(self, path: str, body: bytes | None = None) -> Any:
        """Return the content of a response in JSON; see `request`."""
        try:
            return json.loads(self.request(path, body, headers=(("content-type", JSON),))[0])
        except (ValueError, RecursionError) as error:
            raise unusable("returned invalid JSON") from error


def _header(response: httpcore.Response, name: bytes) -> bytes | None:
    return next((value for key, value in response.headers if key.lower() == name), None)


def _refuse_status(status: int) -> None:
    if 200 <= status < 300:
        return
    if status in _REFUSED:
        raise Refused(400, "the upstream server refuses the request", (), "upstream")
    if status in _BUSY:
        raise _lost("is overloaded or not ready")
    if 300 <= status < 400:
        raise unusable("redirects the request, which is not followed")
    if status in _NO_KEY:
        raise KeyRefused(502, f"the upstream server answered with status {status}", (), "upstream")
    raise unusable(f"answered with status {status}")


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
