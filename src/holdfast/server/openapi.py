"""The OpenAPI document of a server. It is written by hand, because requests are parsed without a schema library."""

from collections.abc import Mapping
from typing import Any

from holdfast import __version__
from holdfast.server.protocol_v2 import BINARY, JSON, LENGTH_HEADER, Signature

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
    def tensors(datatype: str) -> dict[str, Any]:
        shape = {"type": "array", "items": {"type": "integer"}}
        tensor = _object({"name": _TEXT, "datatype": {"const": datatype}, "shape": shape})
        return _list(tensor, 1, 1)

    return _object(
        {
            "name": {"const": signature.name},
            "versions": _TEXTS,
            "platform": _TEXT,
            "inputs": tensors(signature.input_type),
            "outputs": tensors(signature.output_type),
        }
    )


def _infer(signature: Signature, suffix: str, errors: tuple[str, ...]) -> dict[str, Any]:
    """Return the description of `infer`. Its requests have one row or several, whose number the shape gives."""
    low, high = signature.bounds.low, signature.bounds.high
    value: dict[str, Any] = {"type": "number" if signature.input_type.startswith("FP") else "integer"}
    if isinstance(low, float | int) and isinstance(high, float | int):
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
            "outputs": _list(_scores(signature), 1, 1),
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
    output = _object({"name": {"const": signature.output_name}})
    return _object({"id": _TEXT, "inputs": _list(tensor, 1, 1), "outputs": _list(output, 0, 1)}, ("inputs",))


def _scores(signature: Signature) -> dict[str, Any]:
    axes = 1 if signature.flat else 2
    return _object(
        {
            "name": {"const": signature.output_name},
            "datatype": {"const": signature.output_type},
            "shape": _list({"type": "integer"}, axes, axes),
            "data": {"type": "array", "items": {"type": "number"}},
        }
    )
