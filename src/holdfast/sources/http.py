"""A classifier behind HTTP: by the Open Inference Protocol v2, or by a JSON template of the user's own.

KServe, "Open Inference Protocol (V2 Inference Protocol)", REST: `GET /v2/models/NAME[/versions/V]` says what the model
takes and returns, `POST …/infer` asks it. Scores or labels come back, never gradients.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult

import numpy as np
import torch
from torch import Tensor

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import InputRefused, TargetError, TargetLost, TargetRefused, UsageError
from holdfast.core.model import Batches
from holdfast.core.types import Access
from holdfast.sources.asking import Client
from holdfast.sources.class_numbers import listed
from holdfast.sources.files import nearest
from holdfast.sources.payloads import Shaped, Template, Values
from holdfast.sources.remote import Remote, allowed_address

_MODEL = re.compile(r"(?P<model>.*/v2/models/[^/]+(?:/versions/[^/]+)?)(?:/infer)?/?")
_FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
_WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
_TEXT = frozenset({"BYTES"})
_SHOWN = 80
"""letters that are shown of a label that is not known"""
_UNNAMED = "input-0"
"""what an input is called that the metadata do not name; servers that name none ignore it"""


class Served:
    """Asks a server for the scores of a batch, or for one-hot labels, in requests of at most `max_rows` rows.

    `labels` is the number of classes of a server that answers with labels. Those that are text are looked up in
    `names`, which are in the order of the classes. With `declared` single numbers are scores, whatever their type.
    """

    def __init__(
        self,
        client: Client,
        path: str,
        form: Shaped | Template,
        *,
        max_rows: int,
        labels: int | None,
        names: Sequence[str] | None,
        declared: bool = False,
    ) -> None:
        self._client, self._path, self._form = client, path, form
        self._max_rows, self._labels, self._names = max_rows, labels, names
        self._declared = declared
        self._fixed = isinstance(form, Shaped) and form.shape is not None and form.shape[0] > 0
        self._refused_rows = 0
        """the last number of rows that was refused where fewer were taken"""
        self._classes: int | None = None
        self._split = False
        """whether a score that is no whole number was seen"""

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (n, classes) on the device of `x`."""
        rows = x.detach().cpu()
        parts, start = [torch.empty(0, self._classes or 2)] if not len(rows) else [], 0
        while start < len(rows):
            part = self._part(rows[start : start + self._max_rows])
            parts.append(part)
            start += len(part)
        return torch.cat(parts).to(x.device, x.dtype)

    def __deepcopy__(self, memo: dict[int, object]) -> "Served":
        """Itself: a connection cannot be copied."""
        return self

    def remarks(self) -> tuple[str, ...]:
        """What a reader must know of how the asking went."""
        found = []
        if self._refused_rows:
            found.append(
                f"the server refused a request of {self._refused_rows} rows and answered one of {self._max_rows}, the "
                f"most that each later request had; --http-max-rows {self._max_rows} begins with that"
            )
        again = self._client.again
        if again:
            kinds = ", ".join(f"{what} {n:,}" for what, n in sorted(again.items()))
            said = f"the target failed in passing, and {again.total():,} requests were sent again ({kinds})"
            found.append(f"{said}: queries count what the attacks asked, each once")
        return tuple(found)

    def _part(self, x: Tensor) -> Tensor:
        """Scores of the first rows of `x`: all of them, or half as often as it takes until the server answers."""
        try:
            return self._answered(x)
        except InputRefused:
            if len(x) == 1 or self._fixed:
                raise
        part = self._part(x[: len(x) // 2])
        if len(part) < self._max_rows:
            self._max_rows, self._refused_rows = len(part), len(x)
        return part

    def _answered(self, x: Tensor) -> Tensor:
        answer = self._client.ask(self._path, self._form.body(x))
        try:
            values = self._form.found(answer)
        except TargetLost as error:
            raise TargetLost(self._client.masked(str(error))) from None
        if len(values.shape) == 0 or len(values) != len(x):
            shape = f"shape {values.shape}" if values.shape else "one value"
            raise TargetRefused(
                f"the answer to {len(x)} rows has {shape}; one entry for each row was expected"
            )
        if self._labels is not None:
            return self._one_hot(values, x)
        return self._scores(values, x)

    def _scores(self, values: Values, x: Tensor) -> Tensor:
        if values.dtype.kind == "U":
            raise self._unread(
                values.flat[0], "scores were expected; if it is a class, give --http-labels and"
            )
        wide = values.reshape(len(values), -1)
        self._refuse_class_numbers(wide)
        if values.ndim > 2 or not wide.shape[1]:
            raise TargetRefused(
                f"the answer has shape {values.shape}; one row of scores for each of {len(x)} was expected"
            )
        if self._classes not in (None, wide.shape[1]):
            raise TargetRefused(
                f"the answer has {wide.shape[1]} scores a row, where earlier ones had {self._classes}"
            )
        self._classes = wide.shape[1]
        scores = torch.from_numpy(wide.astype(np.float64))
        if scores.to(x.dtype).isinf().any():
            raise TargetRefused(
                f"the answer holds an infinite score, or one too large for {str(x.dtype).removeprefix('torch.')}; "
                "a number for each class was expected"
            )
        return scores

    def _refuse_class_numbers(self, values: Values) -> None:
        """Raise `TargetLost` for one whole number a row, which is a class and no score unless it is declared as one."""
        if values.shape[1] != 1 or self._declared or not len(values):
            return
        written_as_whole = values.dtype.kind in "iu"
        # Some servers write class numbers as 3.0. A whole number outside [0, 1] would be read as a logit.
        whole = np.isfinite(values).all() and (values == values.round()).all()
        if written_as_whole or (whole and not self._split and ((values < 0) | (values > 1)).any()):
            raise TargetLost(
                f"the answer holds one whole number a row, such as {values.flat[0]:g}. If those are classes, give "
                "--http-labels and --classes N; if they are scores, declare them with --model-output logit, or name "
                "others with --http-response"
            )
        self._split = self._split or not whole

    def _one_hot(self, values: Values, x: Tensor) -> Tensor:
        assert self._labels is not None
        flat = values.reshape(len(values), -1)
        if flat.shape[1] != 1:
            raise TargetRefused(
                f"the answer has shape {values.shape}; one class for each of {len(x)} rows was expected"
            )
        classes = self._numbered(flat[:, 0]) if flat.dtype.kind == "U" else flat[:, 0]
        strange = (
            ~np.isfinite(classes) | (classes != classes.round()) | (classes < 0) | (classes >= self._labels)
        )
        if strange.any():
            raise TargetRefused(
                f"the answer holds the class {classes[strange][0]:g}; whole numbers from 0 to {self._labels - 1} were "
                "expected, so check --classes"
            )
        return torch.nn.functional.one_hot(torch.from_numpy(classes.astype(np.int64)), self._labels)

    def _numbered(self, labels: Values) -> Values:
        """The class number of each label that is text."""
        if self._names is None:
            raise self._unread(labels[0], "the order of the classes is not declared; give")
        numbers = {name: number for number, name in enumerate(self._names)}
        for label in labels:
            if label not in numbers:
                known = f"{listed(self._names)}{nearest(label[:_SHOWN], self._names)}"
                raise self._unread(label, f"the names of the classes are {known}; give all of them with")
        return np.array([numbers[label] for label in labels])

    def _unread(self, text: str, why: str) -> TargetRefused:
        said = f"the answer holds the text {text[:_SHOWN]!r}, and {why}"
        return TargetRefused(
            self._client.masked(f"{said} --class-names A,B,C in the order of the model's classes")
        )


@dataclass(frozen=True)
class HttpModel:
    """A model behind HTTP, and what is to be said of it."""

    net: Served
    access: Access
    hides: str
    classes: int | None
    batches: Batches | None
    digest: str
    """of its address, of what its server says of it and of how it is asked: more cannot be digested"""
    notes: tuple[str, ...]


def open_http(
    address: str,
    remote: Remote,
    classes: int | None,
    names: Sequence[str] | None = None,
    *,
    declared: bool = False,
) -> HttpModel:
    """Get to know the model at an address; `UsageError` unless its host is allowed.

    `names` are those of the classes, in their order. `declared` says that the model's output is declared as scores.
    """
    parts = allowed_address(address, remote.hosts)
    if parts.fragment:
        raise UsageError(f"{address!r} has a fragment, which no server is sent; leave #{parts.fragment} out")
    client = Client(parts, remote)
    way = _way(client, parts, remote, address)
    labels = _number_of_labels(classes, names) if way.labels else None
    size = way.form.shape[0] if isinstance(way.form, Shaped) and way.form.shape else -1
    identity: list[Any] = [address, way.known, remote.request, remote.response, way.labels]
    identity += [list(names)] if way.labels and names is not None else []
    what: Access = "labels" if way.labels else "scores"
    most = max(remote.max_rows, size)
    return HttpModel(
        Served(client, way.path, way.form, max_rows=most, labels=labels, names=names, declared=declared),
        what,
        f"the model answers over HTTP with {what} alone",
        way.classes or labels,
        Batches(size) if size > 0 else None,
        digest(canonical(identity)),
        (
            f"the model answers over HTTP at {address}: its weights cannot be digested, and it may change",
            *way.said,
        ),
    )


@dataclass(frozen=True)
class _Way:
    """How a model behind HTTP is asked, and what its server says of it."""

    path: str
    form: Shaped | Template
    known: Mapping[str, Any]
    labels: bool
    classes: int | None = None
    said: tuple[str, ...] = ()


def _way(client: Client, parts: SplitResult, remote: Remote, address: str) -> _Way:
    query = f"?{parts.query}" if parts.query else ""
    if remote.request is not None:
        form = Template.of(remote.request, remote.response)
        return _Way((parts.path or "/") + query, form, {}, remote.labels)
    own = _own_path(parts.path, address)
    known = _metadata(client.ask(own + query))
    shaped, labels, classes, said = _shaped(known, remote)
    return _Way(f"{own}/infer{query}", shaped, known, labels, classes, said)


def _own_path(path: str, address: str) -> str:
    """The path of a model of the Open Inference Protocol, without the verb."""
    named = _MODEL.fullmatch(path)
    if named is None:
        raise UsageError(
            f"{address!r} names no model of the Open Inference Protocol, as .../v2/models/NAME does; for another "
            """service say how it is asked, as in --http-request '{"instances": $x}' --http-response predictions"""
        )
    return named["model"]


def _number_of_labels(classes: int | None, names: Sequence[str] | None) -> int:
    n = classes or len(names or ())
    if not n:
        raise UsageError(
            "a model that answers with labels does not say how many there are; give --classes N, or --class-names "
            "A,B,C in the order of the model's classes where the labels are text"
        )
    return n


def _metadata(answer: Any) -> dict[str, Any]:
    """Of what a server says of a model, what names it and its tensors."""
    if not isinstance(answer, Mapping):
        raise TargetLost("the server describes the model by no JSON object; is it an Open Inference server?")
    known = {key: str(answer.get(key)) for key in ("name", "versions", "platform")}
    return {**known, "inputs": _tensors(answer, "inputs"), "outputs": _tensors(answer, "outputs")}


def _tensors(answer: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = answer.get(key) or []
    try:
        return [
            {
                "name": str(t["name"]),
                "datatype": str(t["datatype"]),
                "shape": [int(size) for size in t["shape"]],
            }
            for t in found
        ]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise TargetLost(f"the server describes the {key} of the model in no form that is known") from error


def _shaped(known: Mapping[str, Any], remote: Remote) -> tuple[Shaped, bool, int | None, tuple[str, ...]]:
    """How the model is asked, whether it answers with labels, with how many classes, and what is to be said of it."""
    inputs, output = known["inputs"], _output(known["outputs"], remote)
    front = "put a function in front of it with file.py:factory"
    if len(inputs) > 1:
        names = ", ".join(each["name"] for each in inputs)
        raise TargetError(f"the model takes the inputs {names}; one was expected: {front}")
    labels = remote.labels or (output is not None and output["datatype"] in _WHOLE | _TEXT)
    classes, said = None, []
    if output is not None and not labels and len(output["shape"]) == 2 and output["shape"][1] > 0:
        classes = max(output["shape"][1], 2)
    if output is not None and len(known["outputs"]) > 1:
        every = ", ".join(each["name"] for each in known["outputs"])
        said.append(f"of the outputs {every}, {output['name']} was taken")
    if not inputs:
        said.append(f"the server names no input of the model; it is sent {_UNNAMED} as FP32")
    mine: dict[str, Any] = inputs[0] if inputs else {"name": _UNNAMED, "datatype": "FP32", "shape": None}
    if mine["datatype"] not in ("FP32", "FP64"):
        raise TargetError(f"the model takes {mine['datatype']}; FP32 or FP64 was expected: {front}")
    shape = tuple(mine["shape"]) if mine["shape"] else None
    name = remote.response if output is None else output["name"]
    form = Shaped(mine["name"], mine["datatype"], shape, name)
    if form.channels_last:
        said.append("the model takes its channels last; inputs are transposed for it")
    return form, labels, classes, tuple(said)


def _output(outputs: list[dict[str, Any]], remote: Remote) -> dict[str, Any] | None:
    """The output that is asked for: the one named, else the first of scores, of class numbers, or of class names."""
    if not outputs:
        return None
    names = [each["name"] for each in outputs]
    if remote.response is not None:
        if remote.response not in names:
            raise UsageError(
                f"the model has no output {remote.response!r}{nearest(remote.response, names)}; "
                f"it has {', '.join(names)}"
            )
        return outputs[names.index(remote.response)]
    kinds = (_WHOLE, _TEXT) if remote.labels else (_FLOATS, _WHOLE, _TEXT)
    fitting = [each for kind in (*kinds, _FLOATS) for each in outputs if each["datatype"] in kind]
    if not fitting:
        kinds_found = ", ".join(f"{each['name']} ({each['datatype']})" for each in outputs)
        raise TargetError(
            f"the model returns {kinds_found}; scores (FP32), class numbers (INT64) or names (BYTES) were expected"
        )
    return fitting[0]
