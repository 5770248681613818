"""Opens a classifier behind HTTP. Requests follow the Open Inference Protocol v2 or a JSON template of the user.

KServe, "Open Inference Protocol (V2 Inference Protocol)", REST: `GET /v2/models/NAME[/versions/V]` returns a
description of the inputs and outputs of the model, and `POST …/infer` sends inputs. The model returns scores or labels,
without gradients.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from urllib.parse import SplitResult

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import Placeholder, TargetError, TargetLost, UsageError, model_argument
from holdfast.core.model import Batches
from holdfast.core.types import Access
from holdfast.io.files import similar_name
from holdfast.io.remote import payloads
from holdfast.io.remote.http_client import Client
from holdfast.io.remote.remote import Remote, allowed_address
from holdfast.io.remote.served_model import Served

_MODEL = re.compile(r"(?P<model>.*/v2/models/[^/]+(?:/versions/[^/]+)?)(?:/infer)?/?")
_MOST_VALUES = 1 << 24
"""Largest number of values of a request, or of a batch whose size the server prescribes."""
_MOST_CLASSES = 1_000_000  # metadata of a server may name any number; the logits of one example must fit
_SHOWN = 80
"""Number of characters of a shape that an error message contains."""
_OTHER_SERVICE = model_argument(
    "http_request",
    '{"instances": $x}',
    also=(model_argument("http_response", "predictions"),),
    reason="with the names of your service, if it has another protocol",
)
_UNNAMED = "input-0"
"""Name of an input that has no name in the metadata; servers without names ignore it."""


@dataclass(frozen=True)
class HttpModel:
    """A model behind HTTP, with its properties and notes for the report."""

    net: Served
    access: Access
    hides: str
    classes: int | None
    batches: Batches | None
    digest: str
    """digest of the address, the server's metadata and the request format; the weights are not accessible"""
    notes: tuple[str, ...]


def open_http(
    address: str,
    remote: Remote,
    classes: int | None,
    names: Sequence[str] | None = None,
    *,
    declared: bool = False,
) -> HttpModel:
    """Request the properties of a served model from the server at a URL, and return the model.

    `names` are the class names in the order of the classes. `declared` is True if the user declared that the model
    returns scores. Raises `UsageError` if the host is not allowed.
    """
    parts = _parts(address, remote)
    client = Client(parts, remote)
    endpoint = _endpoint(client, parts, remote, address, declared=declared)
    expected = _expected(classes, names)
    labels = _number_of_labels(expected) if endpoint.labels else None
    if endpoint.classes is not None:
        payloads.refuse_too_many_classes("the output that the server describes", endpoint.classes, expected)
    size = (
        endpoint.form.shape[0] if isinstance(endpoint.form, payloads.Shaped) and endpoint.form.shape else -1
    )
    answers_with: Access = "labels" if endpoint.labels else "scores"
    answers = payloads.ServerAnswers(
        endpoint.form,
        labels=labels,
        names=names,
        declared=declared,
        masked=client.masked,
        expected=expected or endpoint.classes,
    )
    remote = replace(remote, max_rows=1) if endpoint.form.one else remote
    return HttpModel(
        Served(client, endpoint.path, endpoint.form, answers, remote),
        answers_with,
        f"the model is behind HTTP and returns only {answers_with}",
        endpoint.classes or expected,
        Batches(size) if size > 0 else None,
        _digest(address, endpoint, remote, names),
        (
            f"the model is behind HTTP at {address}: no digest of its weights can be computed, and it may change",
            *endpoint.notes,
        ),
    )


def _parts(address: str, remote: Remote) -> SplitResult:
    parts = allowed_address(address, remote.hosts)
    if parts.fragment:
        raise UsageError(
            f"{address!r} has a fragment, which is never sent to a server; omit #{parts.fragment}"
        )
    return parts


@dataclass(frozen=True)
class _Endpoint:
    """The request format of a model behind HTTP, and the properties that its server declares."""

    path: str
    form: payloads.Shaped | payloads.Template
    known: Mapping[str, Any]
    labels: bool
    classes: int | None = None
    notes: tuple[str, ...] = ()


def _digest(address: str, endpoint: _Endpoint, remote: Remote, names: Sequence[str] | None) -> str:
    identity: list[Any] = [address, endpoint.known, remote.request, remote.response, endpoint.labels]
    # a template may find scores by class name
    uses_names = endpoint.labels or isinstance(endpoint.form, payloads.Template)
    return digest(canonical([*identity, list(names)] if uses_names and names is not None else identity))


def _endpoint(
    client: Client, parts: SplitResult, remote: Remote, address: str, *, declared: bool
) -> _Endpoint:
    query = f"?{parts.query}" if parts.query else ""
    if remote.request is not None:
        form = payloads.Template.of(remote.request, remote.response)
        return _Endpoint((parts.path or "/") + query, form, {}, remote.labels)
    model_path = _own_path(parts.path, address)
    answer = client.request(model_path + query)
    try:
        metadata = _metadata(answer, client.masked_name)
    except TargetLost as error:
        beginning = payloads.first_characters(answer, client.masked)
        raise TargetLost(f"{error.message}. The response begins: {beginning}", _OTHER_SERVICE) from None
    shaped, labels, classes, notes = _shaped(metadata, remote, declared=declared)
    return _Endpoint(f"{model_path}/infer{query}", shaped, metadata, labels, classes, notes)


def _own_path(path: str, address: str) -> str:
    """Return the path of a model of the Open Inference Protocol, without `/infer`. Raises `UsageError` for
    other paths.
    """
    match = _MODEL.fullmatch(path)
    if match is None:
        raise UsageError(
            f"{address!r} is not the address of a model of the Open Inference Protocol, such as .../v2/models/NAME",
            _OTHER_SERVICE,
        )
    return match["model"]


def _expected(classes: int | None, names: Sequence[str] | None) -> int | None:
    """Return the declared number of classes, or None if neither it nor names are declared."""
    if classes is not None and names is not None and len(names) != classes:
        raise UsageError(
            f"classes is {classes}, but class_names has {len(names)} names; one name for each class was expected",
            model_argument("classes"),
        )
    return classes if names is None else len(names)


def _number_of_labels(expected: int | None) -> int:
    if expected is None:
        raise UsageError(
            "the number of classes of a model that returns labels is unknown",
            model_argument("classes", Placeholder("N")),
            model_argument(
                "class_names",
                payloads.NAMES,
                reason="in the order of the model's classes, if the labels are text",
            ),
        )
    return expected


def _metadata(answer: Any, masked: Callable[[str], str]) -> dict[str, Any]:
    """Return the names and the tensors of a model from the server's metadata, with secrets removed."""
    if not isinstance(answer, Mapping):
        raise TargetLost(
            "the server's description of the model is not a JSON object, as the Open Inference Protocol requires"
        )
    metadata = {key: masked(str(answer.get(key))) for key in ("name", "versions", "platform")}
    return {**metadata, **{key: _tensors(answer, key, masked) for key in ("inputs", "outputs")}}


def _tensors(answer: Mapping[str, Any], key: str, masked: Callable[[str], str]) -> list[dict[str, Any]]:
    entries = answer.get(key) or []
    try:
        return [
            {
                "name": masked(str(entry["name"])),
                "datatype": masked(str(entry["datatype"])),
                "shape": [int(size) for size in entry["shape"]],
            }
            for entry in entries
        ]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise TargetLost(
            f"the server describes the {key} of the model in an unknown format; name, datatype and shape were "
            "expected: check the server"
        ) from error


def _shaped(
    metadata: Mapping[str, Any], remote: Remote, *, declared: bool
) -> tuple[payloads.Shaped, bool, int | None, tuple[str, ...]]:
    """Return the request format, whether the model returns labels, its number of classes or None, and notes."""
    inputs, output = metadata["inputs"], _output(metadata["outputs"], remote)
    way_out = "give a function that calls it, as file.py:factory"
    if len(inputs) > 1:
        names = ", ".join(tensor["name"] for tensor in inputs)
        raise TargetError(f"the model has the inputs {names}; one input was expected: {way_out}")
    labels = remote.labels or (output is not None and _of_labels(output, declared=declared))
    classes, notes = None, []
    if output is not None and not labels and len(output["shape"]) == 2 and output["shape"][1] > 0:
        classes = _number_of_classes(output["shape"][1])
    if output is not None and len(metadata["outputs"]) > 1:
        names_of_outputs = ", ".join(tensor["name"] for tensor in metadata["outputs"])
        notes.append(f"of the outputs {names_of_outputs}, {output['name']} is used")
    if not inputs:
        notes.append(f"the server does not describe the input of the model; {_UNNAMED} is sent as FP32")
    model_input: dict[str, Any] = (
        inputs[0] if inputs else {"name": _UNNAMED, "datatype": "FP32", "shape": None}
    )
    if model_input["datatype"] not in ("FP32", "FP64"):
        raise TargetError(
            f"the input of the model is {model_input['datatype']}; FP32 or FP64 was expected: {way_out}"
        )
    shape = tuple(model_input["shape"]) if model_input["shape"] else None
    if shape is not None and prod(max(size, 1) for size in shape) > _MOST_VALUES:
        raise TargetError(
            f"according to the server, an input of the model has shape {str(shape)[:_SHOWN]}; at most {_MOST_VALUES:,} "
            "values are sent per request: configure smaller batches in the server"
        )
    name = remote.response if output is None else output["name"]
    form = payloads.Shaped(model_input["name"], model_input["datatype"], shape, name, labels)
    if form.channels_last:
        notes.append("the model has its channels last; inputs are transposed for it")
    return form, labels, classes, tuple(notes)


def _number_of_classes(scores: int) -> int:
    """Return the number of classes for a number of scores: at least two, because a single score means two classes.

    Raises `TargetError` for an implausibly large number.
    """
    if scores > _MOST_CLASSES:
        raise TargetError(
            f"according to the server, the model returns {str(scores)[:_SHOWN]} scores; at most {_MOST_CLASSES:,} were "
            "expected, so check the server"
        )
    return max(scores, 2)


def _of_labels(output: Mapping[str, Any], *, declared: bool) -> bool:
    """Return whether an output contains labels: strings, or one integer per row that is not declared as a score."""
    several = len(output["shape"]) == 2 and output["shape"][1] > 1
    return output["datatype"] in payloads.TEXT or (
        output["datatype"] in payloads.WHOLE and not several and not declared
    )


def _output(outputs: list[dict[str, Any]], remote: Remote) -> dict[str, Any] | None:
    """Return the requested output, else the first output with scores, with class numbers, or with class names."""
    if not outputs:
        return None
    names = [output["name"] for output in outputs]
    if remote.response is not None:
        if remote.response not in names:
            raise UsageError(
                f"the model has no output {remote.response!r}{similar_name(remote.response, names)}; "
                f"it has {', '.join(names)}"
            )
        return outputs[names.index(remote.response)]
    kinds = (
        (payloads.WHOLE, payloads.TEXT) if remote.labels else (payloads.FLOATS, payloads.WHOLE, payloads.TEXT)
    )
    matching = [
        output for kind in (*kinds, payloads.FLOATS) for output in outputs if output["datatype"] in kind
    ]
    if not matching:
        kinds_found = ", ".join(f"{output['name']} ({output['datatype']})" for output in outputs)
        raise TargetError(
            f"the model returns {kinds_found}; scores (FP32), class numbers (INT64) or names (BYTES) were expected"
        )
    return matching[0]
