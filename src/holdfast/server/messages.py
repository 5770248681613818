"""The messages between the supervisor of a server and its workers.

Those to a worker are pickled, as its setup is. Those of a worker are JSON with checked types, because the supervisor
must not unpickle what a worker sends, which parses the requests of clients.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from holdfast.core.errors import HoldfastError, failure_from_json
from holdfast.runs.engine.executor import ERRORS
from holdfast.runs.engine.processes import Send

# --- to a worker


class Serve(Struct, frozen=True):
    """Serve the opened model under this name."""

    name: str
    epoch: int


class Prepare(Struct, frozen=True):
    """Load a parameter set beside the serving one."""

    name: str
    epoch: int
    weights: bytes
    """parameters in the format of safetensors"""


class Activate(Struct, frozen=True):
    """Serve the prepared parameter set of an epoch from the next batch on."""

    epoch: int


class SampleInputs(Struct, frozen=True):
    """Keep sampled inputs of at most so many bytes; 0 ends the sampling."""

    most_bytes: int


class SendSamples(Struct, frozen=True):
    """Send the sampled inputs, with the number of this question."""

    number: int


class AnnounceEnd(Struct, frozen=True):
    """Answer probes that the server is not ready, since it ends soon."""


class Drain(Struct, frozen=True):
    """Answer what was received, and end."""

    last: bool
    """whether the whole server ends, and not only this worker, which another one replaces"""


ToWorker = Serve | Prepare | Activate | SampleInputs | SendSamples | AnnounceEnd | Drain


# --- to the supervisor

Seconds = Annotated[float, Meta(ge=0)]


class FailingCheck(Struct, frozen=True):
    """A check of readiness that fails."""

    failure: str
    """what is wrong, for the operator"""
    refuses: bool
    """whether every request is refused while it fails"""


class Opened(Struct, tag=True, frozen=True):
    """The model is opened."""

    digest: str
    classes: int


class Ready(Struct, tag=True, frozen=True):
    """Requests are answered."""


class Loaded(Struct, tag=True, frozen=True):
    """The parameter set of an epoch is prepared."""

    epoch: int


class Unusable(Struct, tag=True, frozen=True):
    """The parameter set of an epoch cannot be loaded."""

    epoch: int
    reason: str


class Report(Struct, tag=True, frozen=True):
    """What was answered since the last report, and the state of the worker."""

    answers: Sequence[tuple[str, int, Mapping[str, int]]]
    """name of a set, its epoch, and the numbers of its answers by principal; only of a pool"""
    stalled: str
    """what makes no progress; empty if everything does"""
    patience_s: Seconds
    """seconds without progress after which the worker is to be replaced"""
    chain: tuple[int, str] | None
    """length and head of the audit chain"""
    checks: Mapping[str, FailingCheck]
    """failing checks by reason"""
    unprobed_s: Seconds | None
    """seconds since the last probe of readiness; None before the first one"""


Prediction = tuple[str, Sequence[int], Sequence[float], bool]
"""name of a request, its predicted classes, their confidences, and whether the guard flagged it"""


class Observations(Struct, tag=True, frozen=True):
    """What the monitor compares with its reference and with labels."""

    signals: bytes
    """signals of sampled inputs, row by row, as 64-bit numbers: 32 bits round probabilities near 1"""
    predictions: Sequence[Prediction]
    left_out: int = 0
    """number of further requests"""


class Samples(Struct, tag=True, frozen=True):
    """The sampled inputs, with one value in each sequence for each input."""

    number: int
    """that of the question"""
    shape: Sequence[int]
    """shape of all inputs (n, *features)"""
    x: bytes
    """their values as 32-bit numbers"""
    principals: Sequence[str]
    ages: Sequence[float]
    """seconds since they arrived"""
    requests: Sequence[tuple[str, int]]
    """name of the request, and row of the input in it"""
    sets: Sequence[str]
    """name of the set that answered"""
    failed: Sequence[bool]
    """whether the model failed"""


class Drained(Struct, tag=True, frozen=True):
    """All requests are answered, and the worker ends."""


FromWorker = Opened | Ready | Loaded | Unusable | Report | Observations | Samples | Drained
Notice = FromWorker | HoldfastError
"""what the supervisor receives: a message, or the error with which a worker ends"""
_MESSAGE, _ERROR = b"M", b"E"
_FROM_WORKER = msgspec.json.Decoder(FromWorker)


def send_to_supervisor(send: Send, message: FromWorker) -> None:
    """Send a message over the pipe of a worker."""
    send(_MESSAGE, msgspec.to_builtins(message))


def decoded_by_supervisor(content: bytes) -> Notice:
    """Return a message of a worker. Raises `ValueError`, `LookupError` or `TypeError` if it is not valid."""
    if content[:1] == _ERROR:
        return failure_from_json(json.loads(content[1:]), ERRORS)
    message: FromWorker = _FROM_WORKER.decode(content[1:])
    return message
