"""The ASGI application of a worker: health, metadata and `infer` of the Open Inference Protocol v2, and its OpenAPI
document.
"""

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast import __version__
from holdfast.guard.rules import Incoming
from holdfast.server.answering_requests import Answer, Job
from holdfast.server.audit_chain import AuditKey
from holdfast.server.connections import Readiness
from holdfast.server.keys import ApiKey, KeyFile
from holdfast.server.protocol_v2 import (
    BINARY,
    CERTIFIED,
    EXTENSIONS,
    JSON,
    LENGTH_HEADER,
    Encoded,
    Signature,
    compact,
    encoded,
    read_request,
)
from holdfast.server.requests import Batcher, ErrorLog, HostNames, Refused, is_sendable
from holdfast.server.telemetry import Telemetry
from holdfast.server.traffic import Timing, no_timing
from holdfast.settings.grammar import seconds
from holdfast.settings.serve_settings import RequestLimits

_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "the reason"}},
    "required": ["error"],
    "additionalProperties": False,
}
_DESCRIPTIONS = {
    "400": "The request is not valid.",
    "401": "The key is missing, wrong or expired.",
    "403": "The key does not permit the request.",
    "404": "There is no such model or version.",
    "405": "The method is not supported.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, or the request has more rows than the key allows at once.",
    "415": "The content type or the encoding of the body is not accepted.",
    "422": "The guard refuses the request, or returns no prediction for an input.",
    "429": "The rate or the budget of the key is exceeded.",
    "500": "The model failed.",
    "502": "The upstream server failed.",
    "503": "The server is overloaded, drains, or cannot write its audit log or check requests.",
}


def openapi_document(signature: Signature, *, keys: bool, max_body: int) -> dict[str, Any]:
    """Return the OpenAPI document of a server for the model with a signature. `keys` states whether a key is needed."""
    of_model = ("404", *(("401", "403") if keys else ()))
    model = f"/v2/models/{signature.name}"
    version = f"{model}/versions/{signature.version}"
    open_paths = {
        "/v2/health/live": {"get": _get("isLive", "Whether the process runs.", _object({"live": _FLAG}), ())},
        "/v2/health/ready": {
            "get": _get("isReady", "Whether requests are answered.", _object({"ready": _FLAG}), ("503",))
        },
    }
    of_server = {
        "/v2": {"get": _get("serverMetadata", "Metadata of the server.", _SERVER, of_model[1:])},
        "/v2/models": {"get": _get("models", "Names of the models.", _MODELS, of_model[1:])},
        "/openapi.json": {"get": _get("document", "This document.", {"type": "object"}, of_model[1:])},
    }
    models: dict[str, Any] = {}
    for path, suffix in ((model, ""), (version, "OfVersion")):
        models[path] = {
            "get": _get(f"metadata{suffix}", "Metadata of the model.", _metadata(signature), of_model)
        }
        models[f"{path}/ready"] = {
            "get": _get(
                f"isModelReady{suffix}", "Whether the model is ready.", _MODEL_READY, (*of_model, "503")
            )
        }
        models[f"{path}/infer"] = {"post": _infer(signature, suffix, of_model)}
    content: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Holdfast",
            "version": __version__,
            "description": f"Open Inference Protocol v2. A body has at most {max_body} bytes.",
        },
        "paths": {**open_paths, **of_server, **models},
        "components": {"schemas": {"Error": _ERROR}},
    }
    if keys:
        content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path in (*of_server, *models):
            for operation in content["paths"][path].values():
                operation["security"] = [{"key": []}]
    return content


def _get(name: str, summary: str, schema: Mapping[str, Any], errors: tuple[str, ...]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": {JSON: {"schema": schema}}},
            **_errors(errors),
        },
    }


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    return {
        status: {
            "description": _DESCRIPTIONS[status],
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status in sorted(statuses)
    }


def _object(properties: Mapping[str, Any], required: tuple[str, ...] | None = None) -> dict[str, Any]:
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": dict(properties), "required": names}


def _list(items: Mapping[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_TEXT, _FLAG = {"type": "string"}, {"type": "boolean"}
_TEXTS = {"type": "array", "items": _TEXT}
_SERVER = _object({"name": _TEXT, "version": _TEXT, "extensions": _TEXTS})
_MODELS = _object({"models": _TEXTS})
_MODEL_READY = _object({"name": _TEXT, "ready": _FLAG})


def _metadata(signature: Signature) -> dict[str, Any]:
    def tensors(*datatypes: str) -> dict[str, Any]:
        shape = {"type": "array", "items": {"type": "integer"}}
        tensor = _object({"name": _TEXT, "datatype": {"enum": [*datatypes]}, "shape": shape})
        return _list(tensor, len(datatypes), len(datatypes))

    certified = () if signature.certified_patch is None else ("BOOL",)

    return _object(
        {
            "name": {"const": signature.name},
            "versions": _TEXTS,
            "platform": _TEXT,
            "inputs": tensors(signature.input_type),
            "outputs": tensors(signature.output_type, *certified),
        }
    )


def _infer(signature: Signature, suffix: str, errors: tuple[str, ...]) -> dict[str, Any]:
    """Return the description of `infer`. Its requests have one row or several, whose number the shape gives."""
    low, high = signature.bounds.low, signature.bounds.high
    value: dict[str, Any] = {"type": "number" if signature.input_type.startswith("FP") else "integer"}
    if signature.kind != "numbers":
        least, most = signature.lengths
        encoding = {
            "contentEncoding": "base64",
            "minLength": 4 * -(-least // 3),
            "maxLength": 4 * -(-most // 3),
        }
        value = {"type": "string", "minLength": least, "maxLength": most}
        value |= encoding if signature.kind == "files" else {}
    elif isinstance(low, float | int) and isinstance(high, float | int):
        value |= {"minimum": low, "maximum": high}
    request = {
        "oneOf": [_request(signature, value, rows) for rows in range(1, min(signature.max_rows, 4) + 1)],
        "description": f"One request with 1 to {signature.max_rows} rows; the forms with more than 4 are alike.",
    }
    response = _object(
        {
            "model_name": {"const": signature.name},
            "model_version": {"const": signature.version},
            "id": _TEXT,
            "outputs": _outputs(signature),
        },
        ("model_name", "model_version", "outputs"),
    )
    refused = ("400", "408", "413", "415", "422", "429", "500", "503")
    of_upstream = ("502",) if signature.proxied else ()
    return {
        "operationId": f"infer{suffix}",
        "summary": "Scores of inputs.",
        "description": f"Binary tensor extension: with the header {LENGTH_HEADER}, the number of bytes of the JSON, "
        f"tensors follow the JSON as bytes, and the content type is {BINARY}.",
        "requestBody": {"required": True, "content": {JSON: {"schema": request}}},
        "responses": {
            "200": {
                "description": "OK",
                "content": {
                    JSON: {"schema": response},
                    BINARY: {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **_errors((*errors, *refused, *of_upstream)),
        },
    }


def _request(signature: Signature, value: Mapping[str, Any], rows: int) -> dict[str, Any]:
    n_values = rows * signature.values
    tensor = _object(
        {
            "name": {"const": signature.input_name},
            "shape": {"const": [rows, *signature.shape]},
            "datatype": {"const": signature.input_type},
            "data": _list(value, n_values, n_values),
        }
    )
    names = [signature.output_name, *([] if signature.certified_patch is None else [CERTIFIED])]
    outputs = _list(_object({"name": {"enum": names}}), 0, len(names))
    return _object({"id": _TEXT, "inputs": _list(tensor, 1, 1), "outputs": outputs}, ("inputs",))


def _outputs(signature: Signature) -> dict[str, Any]:
    """Return the description of the outputs: the scores and, of a vote over masks, whether inputs are certified."""
    axes = 1 if signature.flat else 2
    scores = _object(
        {
            "name": {"const": signature.output_name},
            "datatype": {"const": signature.output_type},
            "shape": _list({"type": "integer"}, axes, axes),
            "data": {"type": "array", "items": {"type": "number"}},
        }
    )
    if signature.certified_patch is None:
        return _list(scores, 1, 1)
    certified = _object(
        {
            "name": {"const": CERTIFIED},
            "datatype": {"const": "BOOL"},
            "shape": _list({"type": "integer"}, 1, 1),
            "parameters": _object({"patch": {"const": signature.certified_patch}}),
            "data": {"type": "array", "items": _FLAG},
        }
    )
    return _list({"anyOf": [scores, certified]}, 1, 2)


Jobs = Batcher[Job, Answer]
_DISCARD_S = 0.5
"""seconds for which the body of a refused request is read"""
REQUEST_HEADER = "holdfast-request"
"""header of a response with the name of the request in the audit chain, under which labels are sent"""
_DISCARDED = 4
"""largest size of what is read of it, in multiples of the largest body"""
_READ = "read"
"""key in the state of a request whose body was read"""
REASONS = {404: "there is nothing at this path", 405: "this method is not supported at this path"}


@dataclass(eq=False)
class ServedModel:
    """What the application of a worker needs: the model's signature, the queue of batches, keys, limits, metrics."""

    signature: Signature
    batcher: Jobs
    keys: KeyFile | None = None
    audit_key: AuditKey | None = None
    """key of the digests in the audit chain; None without an audit"""
    limits: RequestLimits = field(default_factory=RequestLimits)
    telemetry: Telemetry = field(default_factory=Telemetry)
    forwards: tuple[str, ...] = ()
    """names of the headers, in lower case, that a proxy passes on"""
    errors: ErrorLog = field(default_factory=ErrorLog)
    """log of errors for the operator"""
    hosts: HostNames = field(default_factory=HostNames)
    """host names under which requests are answered"""
    readiness: Readiness = field(default_factory=Readiness)
    """whether requests can be answered"""
    closing: bool = False
    """whether each connection is closed after its next response, because this process ends"""
    timing: Timing = no_timing
    """function that measures the time of each part of a request"""

    @cached_property
    def max_body(self) -> int:
        """Largest number of bytes of a request body."""
        return self.limits.max_body or self.signature.most_bytes

    @cached_property
    def body_timeout_s(self) -> float:
        """Seconds in which the body of a request must arrive."""
        return seconds(self.limits.body_timeout, "body_timeout")

    # --- endpoints

    async def live(self, request: Request) -> Response:
        """Answer that the process runs."""
        return json_response({"live": True})

    async def is_ready(self, request: Request) -> Response:
        """Answer whether requests are answered."""
        return self._probed({"ready": True})

    async def server(self, request: Request) -> Response:
        """Return the metadata of the server."""
        self._principal(request)
        return json_response({"name": "holdfast", "version": __version__, "extensions": list(EXTENSIONS)})

    async def models(self, request: Request) -> Response:
        """Return the names of the models, as servers of KServe do."""
        self._principal(request)
        return json_response({"models": [self.signature.name]})

    async def document(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        self._principal(request)
        return json_response(
            openapi_document(self.signature, keys=self.keys is not None, max_body=self.max_body)
        )

    async def metadata(self, request: Request) -> Response:
        """Return the metadata of the model."""
        self._principal(request)
        self._refuse_other_model(request)
        return json_response(self.signature.metadata())

    async def model_ready(self, request: Request) -> Response:
        """Answer whether the model answers requests."""
        self._principal(request)
        self._refuse_other_model(request)
        return self._probed({"name": self.signature.name, "ready": True})

    def _probed(self, ready: object) -> Response:
        """Return the response to a probe: `ready`, or why requests are not answered. It is no refused request."""
        reason = self.readiness.probe()
        return json_response({"error": reason}, 503, {"retry-after": "1"}) if reason else json_response(ready)

    async def infer(self, request: Request) -> Response:
        """Return the scores of the inputs in a request, if it is for this model."""
        self._principal(request)
        self._refuse_other_model(request)
        content = await self.scores(request.scope, request.receive)
        response = Response(content.body)
        response.raw_headers = content.raw_headers
        return response

    async def scores(self, scope: Scope, receive: Receive) -> Encoded:
        """Return the scores of the inputs in a request, as its response contains them."""
        begin = time.perf_counter()
        headers = dict(reversed(scope["headers"]))  # of several headers with one name, the first one counts
        key = None if self.keys is None else self.keys.authenticated(headers.get(b"authorization"), "infer")
        header_length = self._header_length(headers)
        body = await self._body(receive)
        scope.setdefault("state", {})[_READ] = True
        with self.timing("parsing"):
            content = read_request(body, header_length, self.signature)
        incoming = Incoming(content.x, "" if key is None else key.name, secrets.token_hex(16), content.sent)
        with self.timing("audit"):
            # here and not in the thread of the batches, for which the digest of a large input would cost a switch
            digest = "" if self.audit_key is None else self.audit_key.digest(content.x.numpy().tobytes())
        forwarded = self._forwarded(scope) if self.forwards else ()
        charge = None if key is None else key.charge(len(content.x))
        job = Job(incoming, charge, digest, forwarded, begin)
        answer = await self.batcher.submit(job, len(content.x))
        if answer.delay_s:
            await asyncio.sleep(answer.delay_s)
        with self.timing("response"):
            response = encoded(answer.scores, content, self.signature, answer.certified)
            response = replace(response, headers=(*response.headers, (REQUEST_HEADER, incoming.request)))
        self.telemetry.observe("holdfast_request_seconds", time.perf_counter() - begin)
        return response

    # --- checks

    def _principal(self, request: Request) -> ApiKey | None:
        if self.keys is None:
            return None
        headers = dict(reversed(request.scope["headers"]))
        return self.keys.authenticated(headers.get(b"authorization"), "infer")

    def _forwarded(self, scope: Scope) -> tuple[tuple[str, str], ...]:
        """Return the headers that a proxy passes on. Raises `Refused` for a value that cannot be sent."""
        names = {name.encode(): name for name in self.forwards}
        passed = [(names[k], v.decode("latin-1").strip()) for k, v in scope["headers"] if k in names]
        for name, value in passed:
            if not is_sendable(value):
                raise Refused(400, f"the header {name} contains other characters than printable ASCII")
        return tuple(passed)

    def _refuse_other_model(self, request: Request) -> None:
        if request.path_params["model"] != self.signature.name:
            raise Refused(404, "there is no model of this name")
        if request.path_params.get("version", self.signature.version) != self.signature.version:
            raise Refused(404, "there is no such version of the model")

    def _header_length(self, headers: Mapping[bytes, bytes]) -> int | None:
        """Check the headers of a request with a body, and return the number of bytes of its JSON if tensors follow."""
        coding = headers.get(b"content-encoding")
        if coding is not None and coding.strip().lower() not in (b"", b"identity"):
            raise Refused(415, "compressed bodies are not accepted; send the body without Content-Encoding")
        length = headers.get(b"content-length")
        if length is not None and headers.get(b"transfer-encoding") is not None:
            # a reverse proxy that uses the other one would see other requests on the connection
            raise Refused(400, "the request has both Content-Length and Transfer-Encoding")
        if length is not None and (not length.isdigit() or int(length) > self.max_body):
            raise Refused(413, f"the body is too large; at most {self.max_body} bytes are accepted")
        media = (headers.get(b"content-type") or b"").split(b";")[0].strip().lower().decode("latin-1")
        header = headers.get(LENGTH_HEADER.encode())
        if not media and headers.get(b"origin") is None:
            # tritonclient states no type; a page of another site, which may omit it, states its origin
            media = JSON
        if header is None:
            if media != JSON:
                raise Refused(415, f"the content type must be {JSON}, or {BINARY} with {LENGTH_HEADER}")
            return None
        if media not in (BINARY, JSON):
            raise Refused(415, f"the content type must be {BINARY} with the header {LENGTH_HEADER}")
        if not header.isdigit() or len(header) > 12:
            raise Refused(400, f"the header {LENGTH_HEADER} must be a number of bytes")
        return int(header)

    async def _body(self, receive: Receive) -> bytes:
        """Return the body of a request. Raises `Refused` if it is too large or does not arrive in time, and
        `ClientDisconnect`.
        """
        parts, size, complete = list[bytes](), 0, False
        with _BodyTime(self.body_timeout_s):
            while not complete:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.max_body:
                    raise Refused(413, f"the body is too large; at most {self.max_body} bytes are accepted")
                complete = not message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # --- errors

    async def refused(self, request: Request, error: Exception) -> Response:
        """Return the response for a refused request."""
        assert isinstance(error, Refused)
        if request.method == "POST" or error.cause == "key":  # keys are guessed with other methods, too
            self.telemetry.count("holdfast_refused_total", error.cause)
        headers = dict(error.headers)
        if request.method == "POST" and not getattr(request.state, _READ, False):
            headers["connection"] = "close"
            await self._discard(request)
        return json_response({"error": error.reason}, error.status, headers)

    async def _discard(self, request: Request) -> None:
        """Read the body of a refused request for a short time, because a client that is still sending would see a reset
        connection instead of the response. A client that waits for `100 Continue` reads the response first.
        """
        size = 0
        if "expect" not in request.headers:
            with suppress(TimeoutError, ClientDisconnect):
                async with asyncio.timeout(_DISCARD_S):
                    async for part in request.stream():
                        size += len(part)
                        if size > _DISCARDED * self.max_body:
                            break

    async def of_http(self, request: Request, error: Exception) -> Response:
        """Return the response for a path or a method that does not exist."""
        assert isinstance(error, HTTPException)
        reason = REASONS.get(error.status_code, "the request is not valid")
        headers = tuple((error.headers or {}).items())
        return await self.refused(request, Refused(error.status_code, reason, headers))

    async def failed(self, request: Request, error: Exception) -> Response:
        """Return the response for an internal error, which discloses nothing about it."""
        if not isinstance(error, ClientDisconnect):
            self.errors("an internal error", error)
        return await self.refused(request, Refused(500, "internal error", (), "model"))


class _BodyTime:
    """Context manager that raises `Refused` after a number of seconds. `asyncio.timeout` takes several times as long to
    enter and leave, which each request does.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._expired = seconds, False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.cancel()
        if self._expired and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise Refused(408, "the body did not arrive in time") from error


class Watched:
    """ASGI middleware that counts responses.

    Requests for scores of the served model are answered without the router, which costs as much as their parsing.
    """

    def __init__(self, app: ASGIApp, served: ServedModel) -> None:
        self._app, self._served = app, served
        model = f"/v2/models/{served.signature.name}"
        self._paths = frozenset((f"{model}/infer", f"{model}/versions/{served.signature.version}/infer"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        served = self._served

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if scope["method"] == "POST":
                    served.telemetry.count("holdfast_requests_total", str(message["status"]))
                if served.closing:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            served.hosts.refuse_other(scope["headers"])
            if scope["method"] != "POST" or scope["path"] not in self._paths:
                await self._app(scope, receive, counted)
                return
            content = await served.scores(scope, receive)
        except Refused as error:
            response = await served.refused(Request(scope, receive), error)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - an error discloses nothing to the client
            response = await served.failed(Request(scope, receive), error)
        else:
            await counted({"type": "http.response.start", "status": 200, "headers": content.raw_headers})
            await counted({"type": "http.response.body", "body": content.body})
            return
        await response(scope, receive, counted)


def application(served: ServedModel) -> ASGIApp:
    """Return the ASGI application of a worker."""
    model = "/v2/models/{model}"
    version = f"{model}/versions/{{version}}"
    routes = [
        Route("/v2/health/live", served.live, methods=["GET"]),
        Route("/v2/health/ready", served.is_ready, methods=["GET"]),
        Route("/v2", served.server, methods=["GET"]),
        Route("/v2/models", served.models, methods=["GET"]),
        Route("/openapi.json", served.document, methods=["GET"]),
        *(Route(path, served.metadata, methods=["GET"]) for path in (model, version)),
        *(Route(f"{path}/ready", served.model_ready, methods=["GET"]) for path in (model, version)),
        *(Route(f"{path}/infer", served.infer, methods=["POST"]) for path in (model, version)),
    ]
    handlers: dict[Any, Any] = {
        Refused: served.refused,
        HTTPException: served.of_http,
        ClientDisconnect: served.failed,
        Exception: served.failed,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Watched(app, served)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with content as JSON."""
    return Response(compact(content), status, headers, JSON)
