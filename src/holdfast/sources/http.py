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
from holdfast.core.errors import TargetError, TargetLost, UsageError
from holdfast.core.model import Batches
from holdfast.core.types import Access
from holdfast.sources.answers import ServerAnswers, first_characters, refuse_too_many_classes
from holdfast.sources.asking import Client
from holdfast.sources.files import similar_name
from holdfast.sources.payloads import FLOATS, TEXT, WHOLE, Shaped, Template
from holdfast.sources.remote import Remote, allowed_address
from holdfast.sources.served import Served

_MODEL = re.compile(r"(?P<model>.*/v2/models/[^/]+(?:/versions/[^/]+)?)(?:/infer)?/?")
_MOST_VALUES = 1 << 24
"""Largest number of values of a request, or of a batch whose size the server prescribes."""
_MOST_CLASSES = 1_000_000
_SHOWN = 80
"""Number of characters of a shape that an error message contains."""
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
    way = _way(client, parts, remote, address, declared=declared)
    expected = _expected(classes, names)
    labels = _number_of_labels(expected) if way.labels else None
    if way.classes is not None:
        refuse_too_many_classes("the output that the server describes", way.classes, expected)
    size = way.form.shape[0] if isinstance(way.form, Shaped) and way.form.shape else -1
    what: Access = "labels" if way.labels else "scores"
    answers = ServerAnswers(
        way.form,
        labels=labels,
        names=names,
        declared=declared,
        masked=client.masked,
        expected=expected or way.classes,
    )
    remote = replace(remote, max_rows=1) if way.form.one else remote
    return HttpModel(
        Served(client, way.path, way.form, answers, remote),
        what,
        f"the model answers over HTTP with {what} alone",
        way.classes or expected,
        Batches(size) if size > 0 else None,
        _digest(address, way, remote, names),
        (
            f"the model answers over HTTP at {address}: its weights cannot be digested, and it may change",
            *way.said,
        ),
    )


def _parts(address: str, remote: Remote) -> SplitResult:
    parts = allowed_address(address, remote.hosts)
    if parts.fragment:
        raise UsageError(f"{address!r} has a fragment, which no server is sent; leave #{parts.fragment} out")
    return parts


@dataclass(frozen=True)
class _Way:
    """The request format of a model behind HTTP, and the properties that its server declares."""

    path: str
    form: Shaped | Template
    known: Mapping[str, Any]
    labels: bool
    classes: int | None = None
    said: tuple[str, ...] = ()


def _digest(address: str, way: _Way, remote: Remote, names: Sequence[str] | None) -> str:
    identity: list[Any] = [address, way.known, remote.request, remote.response, way.labels]
    # a template may find scores by class name
    named = way.labels or isinstance(way.form, Template)
    return digest(canonical([*identity, list(names)] if named and names is not None else identity))


def _way(client: Client, parts: SplitResult, remote: Remote, address: str, *, declared: bool) -> _Way:
    query = f"?{parts.query}" if parts.query else ""
    if remote.request is not None:
        form = Template.of(remote.request, remote.response)
        return _Way((parts.path or "/") + query, form, {}, remote.labels)
    own = _own_path(parts.path, address)
    answer = client.ask(own + query)
    try:
        known = _metadata(answer, client.masked_name)
    except TargetLost as error:
        begins = first_characters(answer, client.masked)
        raise TargetLost(
            f"{error}; ask another kind of service with --http-request. The answer begins: {begins}"
        ) from None
    shaped, labels, classes, said = _shaped(known, remote, declared=declared)
    return _Way(f"{own}/infer{query}", shaped, known, labels, classes, said)


def _own_path(path: str, address: str) -> str:
    """Return the path of a model of the Open Inference Protocol, without `/infer`. Raises `UsageError` for
    other paths.
    """
    named = _MODEL.fullmatch(path)
    if named is None:
        raise UsageError(
            f"{address!r} names no model of the Open Inference Protocol, as .../v2/models/NAME does; for another "
            """service say how it is asked, as in --http-request '{"instances": $x}' --http-response predictions"""
        )
    return named["model"]


def _expected(classes: int | None, names: Sequence[str] | None) -> int | None:
    """Return the declared number of classes, or None if neither it nor names are declared."""
    if classes is not None and names is not None and len(names) != classes:
        raise UsageError(
            f"--classes is {classes}, and --class-names names {len(names)}; give one name for each class, or leave "
            "--classes out"
        )
    return classes if names is None else len(names)


def _number_of_labels(expected: int | None) -> int:
    if expected is None:
        raise UsageError(
            "a model that answers with labels does not say how many there are; give --classes N, or --class-names "
            "A,B,C in the order of the model's classes where the labels are text"
        )
    return expected


def _metadata(answer: Any, masked: Callable[[str], str]) -> dict[str, Any]:
    """Return the names and the tensors of a model from the server's metadata, with secrets removed."""
    if not isinstance(answer, Mapping):
        raise TargetLost(
            "the server describes the model by no JSON object, as the Open Inference Protocol does"
        )
    known = {key: masked(str(answer.get(key))) for key in ("name", "versions", "platform")}
    return {**known, **{key: _tensors(answer, key, masked) for key in ("inputs", "outputs")}}


def _tensors(answer: Mapping[str, Any], key: str, masked: Callable[[str], str]) -> list[dict[str, Any]]:
    found = answer.get(key) or []
    try:
        return [
            {
                "name": masked(str(t["name"])),
                "datatype": masked(str(t["datatype"])),
                "shape": [int(size) for size in t["shape"]],
            }
            for t in found
        ]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise TargetLost(f"the server describes the {key} of the model in no form that is known") from error


def _shaped(
    known: Mapping[str, Any], remote: Remote, *, declared: bool
) -> tuple[Shaped, bool, int | None, tuple[str, ...]]:
    """Return the request format, whether the model returns labels, its number of classes or None, and notes."""
    inputs, output = known["inputs"], _output(known["outputs"], remote)
    front = "put a function in front of it with file.py:factory"
    if len(inputs) > 1:
        names = ", ".join(each["name"] for each in inputs)
        raise TargetError(f"the model takes the inputs {names}; one was expected: {front}")
    labels = remote.labels or (output is not None and _of_labels(output, declared=declared))
    classes, said = None, []
    if output is not None and not labels and len(output["shape"]) == 2 and output["shape"][1] > 0:
        classes = _number_of_classes(output["shape"][1])
    if output is not None and len(known["outputs"]) > 1:
        every = ", ".join(each["name"] for each in known["outputs"])
        said.append(f"of the outputs {every}, {output['name']} was taken")
    if not inputs:
        said.append(f"the server names no input of the model; it is sent {_UNNAMED} as FP32")
    mine: dict[str, Any] = inputs[0] if inputs else {"name": _UNNAMED, "datatype": "FP32", "shape": None}
    if mine["datatype"] not in ("FP32", "FP64"):
        raise TargetError(f"the model takes {mine['datatype']}; FP32 or FP64 was expected: {front}")
    shape = tuple(mine["shape"]) if mine["shape"] else None
    if shape is not None and prod(max(size, 1) for size in shape) > _MOST_VALUES:
        raise TargetError(
            f"the server says that the model takes inputs of shape {str(shape)[:_SHOWN]}; at most {_MOST_VALUES:,} "
            "values are sent at once: let it take smaller batches"
        )
    name = remote.response if output is None else output["name"]
    form = Shaped(mine["name"], mine["datatype"], shape, name, labels)
    if form.channels_last:
        said.append("the model takes its channels last; inputs are transposed for it")
    return form, labels, classes, tuple(said)


def _number_of_classes(scores: int) -> int:
    """Return the number of classes for a number of scores: at least two, because a single score means two classes.

    Raises `TargetError` for an implausibly large number.
    """
    if scores > _MOST_CLASSES:
        raise TargetError(
            f"the server says that the model returns {str(scores)[:_SHOWN]} scores; at most {_MOST_CLASSES:,} were "
            "expected, so check the server"
        )
    return max(scores, 2)


def _of_labels(output: Mapping[str, Any], *, declared: bool) -> bool:
    """Return whether an output contains labels: strings, or one integer per row that is not declared as a score."""
    several = len(output["shape"]) == 2 and output["shape"][1] > 1
    return output["datatype"] in TEXT or (output["datatype"] in WHOLE and not several and not declared)


def _output(outputs: list[dict[str, Any]], remote: Remote) -> dict[str, Any] | None:
    """Return the requested output, else the first output with scores, with class numbers, or with class names."""
    if not outputs:
        return None
    names = [each["name"] for each in outputs]
    if remote.response is not None:
        if remote.response not in names:
            raise UsageError(
                f"the model has no output {remote.response!r}{similar_name(remote.response, names)}; "
                f"it has {', '.join(names)}"
            )
        return outputs[names.index(remote.response)]
    kinds = (WHOLE, TEXT) if remote.labels else (FLOATS, WHOLE, TEXT)
    fitting = [each for kind in (*kinds, FLOATS) for each in outputs if each["datatype"] in kind]
    if not fitting:
        kinds_found = ", ".join(f"{each['name']} ({each['datatype']})" for each in outputs)
        raise TargetError(
            f"the model returns {kinds_found}; scores (FP32), class numbers (INT64) or names (BYTES) were expected"
        )
    return fitting[0]
