"""The messages between the supervisor of a server and its workers, a generation of weights, and a worker process as the
supervisor sees it.
"""

import json
import math
import os
import pickle
import queue
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import IO, Annotated, Literal

import msgspec
import safetensors.torch
import torch
from msgspec import Meta, Struct
from torch import Tensor

from holdfast.core.errors import HoldfastError, TargetError, UsageError, failure_from_json
from holdfast.core.model import Bounds, Classifier
from holdfast.guard.rules import NoRules, RequestGuard
from holdfast.runs.engine.processes import Child, Send
from holdfast.runs.engine.run import ERRORS
from holdfast.runs.store.encryption import KEY_VARIABLE
from holdfast.server.asgi import handled_signals
from holdfast.server.telemetry import MEMORY_BYTES

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


_PROBES = 8
"""number of inputs on which a model is tested before it serves"""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that a worker has opened."""

    model: Classifier
    digest: str = ""
    """SHA-256 of the model with its settings; empty for the network of a pool, and for an upstream server"""
    guard_digest: str | None = None
    """digest that a calibration of a guard must name; None if any calibration is accepted"""


def no_rules(model: str | None) -> RequestGuard:
    """Return the guard without rules."""
    return NoRules()


def refuse_damaged(
    model: Classifier, shape: tuple[int, ...], device: torch.device, *, symbols: bool = False
) -> None:
    """Raise `TargetError` for a model with parameters that are NaN, or without any finite score for random inputs of
    this shape, which are rows of letters for `symbols`. Costs 8 forward passes of one input.
    """
    names = [name for name, value in model.named_parameters() if bool(value.isnan().any())]
    if names:
        raise TargetError(
            f"{len(names)} parameters of the model contain NaN, such as {names[0]}; restore its file"
        )
    x = torch.rand(_PROBES, *shape, generator=torch.Generator().manual_seed(0))
    low, high = (Bounds(FIRST_LETTER, FIRST_LETTER + 25) if symbols else model.bounds).like(x)
    x = low + x * (high - low) if bool((high - low).isfinite().all()) else model.bounds.clamp(x)
    with torch.inference_mode():  # one by one, because a file may accept batches of one input only
        finite = [bool(model(row.to(device)).isfinite().any()) for row in torch.split(x, 1)]
    if not any(finite):
        raise TargetError(
            f"all scores of the model for {_PROBES} random inputs are NaN or infinite; restore its file, or correct "
            "bounds, mean and std"
        )


FIRST_LETTER = 97.0
"""number of a letter in rows of files and of texts, after which 25 others follow"""
State = Literal["prepared", "serving", "canary", "retired", "refused"]
"""`prepared`: opened and tested by a worker, or loaded by all; `serving`; `canary`: serving a share of the requests
beside the serving generation; `retired`: has served; `refused`: cannot serve, or died as a canary"""
NAME_DIGITS = 16
"""number of digits of the digest of a model that are its name in audit records"""


@dataclass(frozen=True)
class Candidate:
    """The model of a canary: the run that requests it, its file, and the digest that the worker must report."""

    run: str
    model: str
    digest: str


@dataclass(frozen=True, eq=False)
class PoolSet:
    """What the pool states about a parameter set, with its parameters."""

    weights: Mapping[str, Tensor] = field(repr=False)
    canary: str = ""
    """its fingerprint on the canary inputs"""
    recorded: bool = False
    """whether the ledger records already that it serves, because another process swapped"""
    unjudged: bool = False
    """whether it was not judged against all stolen sets, and replaces a stolen one"""


@dataclass(eq=False)
class Generation:
    """Weights that serve, have served or are to serve, under one name and number in the audit."""

    name: str
    epoch: int = 1
    """number of the generations that have served up to this one"""
    digest: str = ""
    """SHA-256 of the model with its settings; empty for a parameter set, and for a model without a file"""
    classes: int | None = None
    """number of classes; None before a worker has opened it"""
    why: str = ""
    state: State = "prepared"
    announced: bool = True
    """whether name and digest are known; otherwise the first worker that opens the file states them"""
    reason: str = ""
    """why it was refused"""
    candidate: Candidate | None = None
    """the model of a canary"""
    pooled: PoolSet | None = None
    """the parameter set of a pool"""

    @cached_property
    def prepare(self) -> bytes:
        """The message that sends the parameter set of a pool to a worker."""
        assert self.pooled is not None, "a parameter set of a pool"
        tensors = {name: value.contiguous() for name, value in self.pooled.weights.items()}
        return pickle.dumps(Prepare(self.name, self.epoch, safetensors.torch.save(tensors)))

    def fault(self, digest: str, classes: int) -> str:
        """Return why a worker must not serve the model that it has opened as this one, or an empty text."""
        if self.classes not in (None, classes):
            return (
                f"the file has a model with {classes} classes, and {self.classes} are served; start another server for "
                "it, as clients expect the outputs that the metadata state"
            )
        if digest != self.digest:
            return (
                f"the model that was opened has the digest {digest[:NAME_DIGITS]}, and {self.digest[:NAME_DIGITS]} "
                "serves: its file has changed, or its code returns another model each time; restore the file, or "
                "reload the model (SIGHUP)"
            )
        return ""


@contextmanager
def hang_up_signals(stop: Callable[[], object], swap: Callable[[], object]) -> Iterator[None]:
    """Context manager in which SIGHUP calls `swap`.

    SIGHUP also reports that the terminal of a process in its foreground was closed. It then calls `stop`, unless it was
    ignored, as `nohup` has it. A process in the background receives no such report.
    """
    foreground, ignored = in_foreground(), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def hung_up() -> None:
        nonlocal foreground
        if not foreground or has_terminal():
            swap()
            return
        foreground = False
        if not ignored:
            stop()

    with handled_signals(hung_up, signal.SIGHUP):
        yield


def has_terminal() -> bool:
    """Return whether this process has a terminal."""
    return _foreground_group() is not None


def in_foreground() -> bool:
    """Return whether this process is in the foreground of a terminal."""
    return _foreground_group() == os.getpgrp()


def _foreground_group() -> int | None:
    """Return the process group in the foreground of the terminal of this process; None without a terminal."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.tcgetpgrp(terminal)
    except OSError:
        return None
    finally:
        os.close(terminal)


BACKLOG = 2048
"""largest number of connections that the system accepts before a worker does"""
_SHOWN = 300
"""largest number of characters of a reason that is shown"""


@dataclass(eq=False)
class WorkerProcess:
    """A worker process, and what the supervisor knows about it."""

    number: int
    listener: InitVar[socket.socket]
    """listening socket, which the process inherits"""
    inbox: "Inbox"
    """where its messages are put"""
    chain: Path | None
    memory: mmap = field(init=False)
    """values of its metrics, which outlast the process"""
    generation: Generation
    """the weights that it serves, or opens to serve them"""
    opened: bool = False
    """whether it has opened them"""
    ready: bool = False
    sampling: bool = False
    """whether it samples inputs for `holdfast adapt`"""
    error: HoldfastError | None = None
    drained: bool = False
    """whether it has answered all requests, and ends"""
    retired_s: float = math.inf
    """time at which the supervisor let it drain, because another worker has its place"""
    begun_s: float = field(default_factory=time.monotonic)
    heard_s: float = field(default_factory=time.monotonic)
    """time of its last message"""
    patience_s: float = math.inf
    """seconds without progress after which it is replaced"""
    chain_head: tuple[int, str] | None = None
    """length and head of its audit chain, as it last reported them"""
    checks: Mapping[str, FailingCheck] = field(default_factory=dict)
    """failing checks by reason"""
    probed_s: float = -math.inf
    """time of the last probe of its readiness"""
    stalled: str = ""
    """what makes no progress, as the worker itself reports it"""
    _suspected: bool = False
    killed: str = ""
    """why the supervisor killed it"""

    def __post_init__(self, listener: socket.socket) -> None:
        with _memory_file() as counters:
            self.memory = mmap(counters.fileno(), MEMORY_BYTES)
            passed = (listener.fileno(), counters.fileno())
            self.child = Child(
                "holdfast.server.server_worker",
                lambda message: self.inbox.put((self, message)),
                *passed,
                pass_fds=passed,
                # a worker parses what clients send, so it must not have the key of the pool
                env={name: value for name, value in os.environ.items() if name != KEY_VARIABLE},
            )

    @property
    def name(self) -> str:
        """Name of the worker in metrics."""
        return f"worker-{self.number}"

    @property
    def set_name(self) -> str:
        """Name of the weights that it serves; empty before it has opened them."""
        return self.generation.name if self.opened else ""

    @property
    def failures(self) -> dict[str, str]:
        """Why it refuses every request, by reason."""
        return {reason: check.failure for reason, check in self.checks.items() if check.refuses}

    def send(self, message: ToWorker) -> None:
        """Send a message to it."""
        self.child.send(pickle.dumps(message))

    def reported(self, report: Report) -> None:
        """Note its state. What makes no progress counts if the report before stated it too: after a pause of the
        machine, the first report may be too early.
        """
        self.stalled = report.stalled if self._suspected else ""
        self._suspected, self.patience_s = bool(report.stalled), report.patience_s
        self.chain_head = report.chain or self.chain_head
        self.checks = {
            reason: FailingCheck(check.failure[:_SHOWN], check.refuses)
            for reason, check in report.checks.items()
        }
        if report.unprobed_s is not None:
            self.probed_s = time.monotonic() - report.unprobed_s

    def retire(self) -> None:
        """Let it answer what it received and end, because another worker has its place."""
        self.retired_s = time.monotonic()
        self.send(Drain(last=False))

    @property
    def retiring(self) -> bool:
        """Whether it drains because another worker has its place."""
        return self.retired_s < math.inf

    def kill(self, why: str) -> None:
        """Kill the process, and keep the reason for the audit."""
        self.killed = self.killed or why
        self.child.process.kill()


def _memory_file() -> IO[bytes]:
    """Return an open file without a name for the metrics of a worker, in memory where the system supports it. The
    worker cannot shorten it then, which would end the supervisor with SIGBUS.
    """
    if sys.platform == "linux":
        import fcntl

        handle = os.memfd_create("holdfast-metrics", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(handle, MEMORY_BYTES)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    else:
        handle, name = tempfile.mkstemp()
        os.unlink(name)  # noqa: PTH108
        os.ftruncate(handle, MEMORY_BYTES)
    return os.fdopen(handle, "r+b")


Inbox = queue.SimpleQueue[tuple[WorkerProcess | None, bytes]]
"""messages of all workers; one without a worker only wakes the supervisor"""


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `UsageError` if the address is in use or invalid."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"the address {host}:{port} cannot be used: {error.strerror or error}; choose another port, or end the "
            "program that uses it"
        ) from error
    return listener
