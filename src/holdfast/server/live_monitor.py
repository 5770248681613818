"""The monitor of a running server: samples of the requests, their comparison with a reference, and predictions with
labels.
"""

import io
import math
import queue
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import randrange
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.errors import HoldfastError
from holdfast.core.estimate import Estimate
from holdfast.core.names import line
from holdfast.guard.rules import Action
from holdfast.monitoring.signals import (
    Accuracy,
    Observed,
    Predictions,
    Reference,
    Signals,
    expected_accuracy,
    measured_accuracy,
)
from holdfast.monitoring.watching import Monitored, Power, Source, Watch
from holdfast.runs.engine.progress import Notify
from holdfast.server.answering_requests import Outcome, ServedSet
from holdfast.server.messages import Observations, Prediction, Samples
from holdfast.server.served_weights import Record, lower_priority
from holdfast.server.telemetry import Telemetry

_MOST_PER_S = 40.0
"""sampled inputs per second, so that the monitor takes little time from the requests"""
_MOST_REPORTED = 2000
"""requests of one report, whose predictions are compared with labels that arrive later"""
Sample = tuple[Tensor, Tensor]
"""an input and the scores for it"""
_Answered = tuple[list[str], list[int], list[Tensor], list[bool]]
"""the names, numbers of inputs, and scores of the requests of a batch, and whether the guard flagged each"""


class Reservoir:
    """The sample and the predictions of one worker. `add` is called by the thread that answers requests, and the others
    by the one that reports.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._lock = threading.Lock()
        self._tokens, self._filled_s = 1.0, time.monotonic()
        self._new: list[tuple[Sample, Tensor | None]] = []
        """samples with the outputs of the layer of the embeddings"""
        self._answered: list[_Answered] = []
        self._n_answered = self._left_out = 0
        self._random = random.Random()  # noqa: S311 - a sample, no secret

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Note the answers of a batch."""
        answered = [each for each in outcomes if each.answer is not None]
        if not answered:
            return
        now = time.monotonic()
        with self._lock:
            self._tokens = min(_MOST_PER_S, self._tokens + _MOST_PER_S * (now - self._filled_s))
            self._filled_s = now
            if self._n_answered < _MOST_REPORTED:
                self._n_answered += len(answered)
                self._answered.append(
                    (
                        [each.job.incoming.request for each in answered],
                        [len(each.job.incoming.x) for each in answered],
                        [each.answer.scores for each in answered if each.answer is not None],
                        [each.action is not Action.ALLOW for each in answered],
                    )
                )
            else:
                self._left_out += len(answered)
            if self._reference.layer is not None:
                answered = [each for each in answered if each.features is not None]
            n = min(int(self._tokens), len(answered))
            self._tokens -= n
            for each in answered if n == len(answered) else self._random.sample(answered, n):
                assert each.answer is not None
                row = self._random.randrange(len(each.job.incoming.x))
                sample = each.job.incoming.x[row], each.answer.scores[row]
                features, first = each.features or (None, 0)
                self._new.append((sample, None if features is None else features[first + row].cpu()))

    def taken(self) -> Observations | None:
        """Return the signals of inputs and the predictions since the last call; None without any."""
        with self._lock:
            new, self._new = self._new, []
            answered, self._answered = self._answered, []
            left_out, self._left_out, self._n_answered = self._left_out, 0, 0
        if not answered:
            return None
        return Observations(self._signals(new), _predictions(answered), left_out)

    def _signals(self, new: Sequence[tuple[Sample, Tensor | None]]) -> bytes:
        """The signals of samples, row by row."""
        rows = [_pooled(features) for _, features in new if features is not None]
        features = None
        if self._reference.layer is not None:
            if any(len(row) != self._reference.n_features for row in rows):  # another model was reloaded
                return b""
            features = torch.stack(rows) if rows else None
        samples = [sample for sample, _ in new]
        if not samples:
            return b""
        x = torch.stack([x for x, _ in samples])
        logits = None if self._reference.model is None else torch.stack([scores for _, scores in samples])
        values = self._reference.observer(Observed(x, logits, features)).values
        return values.astype("<f8").tobytes()


def _pooled(features: Tensor) -> Tensor:
    """Features (d,) of an input, averaged over the pixels of images of features."""
    return features.flatten(1).mean(1) if features.dim() > 1 else features


def _predictions(batches: Sequence[_Answered]) -> list[Prediction]:
    """The predictions of the requests of some batches."""
    # at once, because small calls of torch for each batch take longer than the rest
    scores = torch.cat([each for _, _, parts, _ in batches for each in parts])
    best = scores.double().softmax(1).max(1)
    classes, confidences = best.indices.tolist(), best.values.tolist()
    entries, start = list[Prediction](), 0
    for requests, rows, _, flagged in batches:
        for request, n, is_flagged in zip(requests, rows, flagged, strict=True):
            part = slice(start, start + n)
            entries.append((request, classes[part], [round(c, 6) for c in confidences[part]], is_flagged))
            start += n
    return entries


ALL_BYTES = 128 * 2**20
"""largest size of the sampled inputs of all workers, which one answer to the operator contains"""
_SPACING_S = 0.025
"""least time between two sampled inputs of a client, so that sampling takes little time from the requests"""
_EACH, _FAILED, _CLIENTS = 200, 20, 1000
"""largest numbers of inputs of a client, of those on which the model failed, and of clients"""
_ANSWERED_S = 10.0
"""seconds in which the workers must send their samples"""
_MOST_ANSWERS = 64
"""largest number of answers of workers that wait to be read"""


class _Sampled(NamedTuple):
    x: Tensor
    time_s: float
    request: str
    row: int
    set_name: str
    failed: bool


@dataclass(eq=False)
class _Client:
    """The newest inputs of one client, and the times from which on another one is sampled."""

    inputs: deque[_Sampled] = field(default_factory=lambda: deque(maxlen=_EACH))
    failed: deque[_Sampled] = field(default_factory=lambda: deque(maxlen=_FAILED))
    due_s: list[float] = field(default_factory=lambda: [0.0, 0.0])


class SampledInputs:
    """The sample of one worker. `add` is called by the thread that answers requests, the others by another one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._bytes = 0

    def limit(self, n_bytes: int) -> None:
        """Set the largest size of all sampled inputs together, in bytes. With 0, the sampled inputs are deleted and no
        further ones are sampled.
        """
        with self._lock:
            self._bytes = n_bytes
            if not n_bytes:
                self._clients = {}

    def add(self, outcomes: Sequence[Outcome], served: ServedSet) -> None:
        """Sample one input of each request of a batch for which the model was called."""
        if not self._bytes:
            return
        now = time.time()
        with self._lock:
            for each in outcomes:
                if each.reached:
                    self._offer(each, served.name, now)

    def _offer(self, outcome: Outcome, set_name: str, now: float) -> None:
        incoming = outcome.job.incoming
        failed = outcome.refusal is not None and outcome.refusal.cause == "model"
        client = self._clients.get(incoming.principal)
        if client is not None and now < client.due_s[failed]:
            return
        most = self._bytes // max(1, incoming.x[0].nbytes)
        if client is None:
            client = self._clients[incoming.principal] = _Client()
            while len(self._clients) > max(1, min(_CLIENTS, most)):
                del self._clients[next(iter(self._clients))]
            for other in self._clients.values():  # there is less room for each
                self._shorten(other, most)
        client.due_s[failed] = now + _SPACING_S
        row = randrange(len(incoming.x))  # noqa: S311 - a sample, no secret
        # a copy, because a view would keep all inputs of the request in memory
        sampled = _Sampled(incoming.x[row].clone(), now, incoming.request, row, set_name, failed)
        (client.failed if failed else client.inputs).append(sampled)
        self._shorten(client, most)

    def _shorten(self, client: _Client, most: int) -> None:
        """Forget the oldest inputs of a client that has more than its part of the `most` inputs of all."""
        part = max(1, most // len(self._clients))
        while len(client.inputs) + len(client.failed) > part:
            (client.inputs or client.failed).popleft()

    def answer(self, number: int) -> Samples:
        """Return the sample as the answer to a question, the oldest input of each client first. Inputs of another shape
        than the newest one are left out.
        """
        now = time.time()
        with self._lock:
            kept = [
                (principal, each)
                for principal, client in self._clients.items()
                for each in sorted((*client.inputs, *client.failed), key=lambda each: each.time_s)
            ]
        shape = max(kept, key=lambda pair: pair[1].time_s)[1].x.shape if kept else (1,)
        kept = [pair for pair in kept if pair[1].x.shape == shape]
        x = torch.stack([each.x for _, each in kept]).float().numpy() if kept else np.zeros((0, 1))
        return Samples(
            number,
            x.shape,
            x.astype("<f4").tobytes(),
            [principal for principal, _ in kept],
            [max(0.0, now - each.time_s) for _, each in kept],
            [(each.request, each.row) for _, each in kept],
            [each.set_name for _, each in kept],
            [each.failed for _, each in kept],
        )


class CollectedSamples:
    """The samples of all workers, for the operator. `received` is called by the supervisor, and `collected` by any
    thread.
    """

    def __init__(self, pseudonym: Callable[[str], str]) -> None:
        self._pseudonym = pseudonym
        self._one_at_a_time = threading.Lock()
        self._number = 0
        self._answers: queue.Queue[Samples] = queue.Queue(_MOST_ANSWERS)

    def received(self, samples: Samples) -> None:
        """Take the answer of a worker. One to an earlier question is ignored."""
        with suppress(queue.Full):  # a worker sent samples without a question
            if samples.number == self._number:
                self._answers.put_nowait(samples)

    def collected(self, ask: Callable[[int], int], class_of: Callable[[str, int], int]) -> bytes:
        """Request the samples of all workers, and return them as the content of an .npz file.

        `ask` sends a number to the workers, which return it with their samples, and returns the number of workers. All
        samples that arrive within 10 seconds are used. `class_of` takes the name of a request and the row of an input
        in it, and returns the label that a client reported for this input, or -1 if there is none.

        The file has an array for each of these keys, with n inputs in the same order: `x` (n, *features) float32, `y`
        labels as from `class_of`, `principal` pseudonyms of the clients, `age` seconds since the input arrived, `set`
        names of the parameter sets that answered, and `failed` whether the model failed on the input. Workers whose
        inputs have another shape than those of the first one are left out.
        """
        with self._one_at_a_time:
            self._number += 1
            while not self._answers.empty():
                self._answers.get_nowait()
            found, until = [], time.monotonic() + _ANSWERED_S
            for _ in range(ask(self._number)):
                with suppress(queue.Empty):
                    found.append(self._answers.get(timeout=max(0.0, until - time.monotonic())))
        return _npz([each for each in found if each.principals], self._pseudonym, class_of)


def _npz(
    parts: Sequence[Samples], pseudonym: Callable[[str], str], class_of: Callable[[str, int], int]
) -> bytes:
    parts = [each for each in parts if each.shape[1:] == parts[0].shape[1:]]
    inputs = [np.frombuffer(each.x, "<f4").reshape(each.shape) for each in parts]
    file = io.BytesIO()
    np.savez(
        file,
        x=np.concatenate(inputs) if inputs else np.zeros((0, 1), np.float32),
        y=np.array([class_of(*request) for each in parts for request in each.requests], np.int64),
        principal=np.array([pseudonym(name) for each in parts for name in each.principals], str),
        age=np.array([age for each in parts for age in each.ages], np.float64),
        set=np.array([name for each in parts for name in each.sets], str),
        failed=np.array([failed for each in parts for failed in each.failed], bool),
    )
    return file.getvalue()


DECISIVE = ("martingale",)
"""tests whose alarm starts an adaptation"""
_REMEMBERED = 50_000
"""newest requests, and largest number of their inputs, whose predictions are compared with labels"""
_NEWEST = 10_000
"""newest predictions from which accuracies are computed"""
_LONGEST = 100_000
"""samples after which the tests begin again, because the martingale keeps its samples"""
_WAITING = 1000
"""largest number of reports that wait for the tests; further ones are dropped"""


class LiveMonitor:
    """The tests and the labelled predictions of a server. All methods may be called by any thread, as `record` is."""

    def __init__(
        self,
        reference: Reference,
        record: Record,
        telemetry: Telemetry,
        warn: Notify,
        renewed: Callable[[], Reference] | None = None,
    ) -> None:
        """Prepare the tests. `renewed` returns the reference with the model in the served file, with the same scales;
        None if the reference does not depend on the model.
        """
        self.reference, self._renewed = reference, renewed
        self._record, self._telemetry, self._warn = record, telemetry, warn
        self._lock = threading.Lock()
        self._inbox: queue.Queue[Signals | None] = queue.Queue(_WAITING)
        self._changing = self._renewing = False
        self._powers: dict[str, Power] = {}
        self._remembered: OrderedDict[str, tuple[Sequence[int], Sequence[float]]] = OrderedDict()
        """classes and confidences of the newest requests"""
        self._remembered_inputs = 0
        self._confidences: deque[float] = deque(maxlen=_NEWEST)
        self._classes: OrderedDict[str, Sequence[int]] = OrderedDict()
        """classes of the newest labelled requests"""
        self._labelled: deque[tuple[float, int, bool]] = deque(maxlen=_NEWEST)
        self._begin()
        self._closed, self._threads = False, list[threading.Thread]()

    def _begin(self) -> None:
        self._watch, self._since = Watch(self.reference.signals, 0), time.time()
        self._requests = self._flagged = 0
        for name in DRIFT_TESTS:
            self._telemetry.set("holdfast_monitor_alarm", 0.0, name)

    def start(self) -> None:
        """Start the threads, which `close` ends."""
        # not daemons: a thread that computes while the interpreter ends can abort the process
        self._threads = [
            threading.Thread(target=function, name="monitor")
            for function in (self._test, self._measure_power)
        ]
        for thread in self._threads:
            thread.start()

    # --- what workers report

    def received(self, seen: Observations, *, canary: bool) -> None:
        """Take the report of a worker. The samples of a canary are not tested."""
        with self._lock:
            for request, classes, confidences, flagged in seen.predictions:
                self._forget(request)
                self._remembered[request] = classes, confidences
                self._remembered_inputs += len(classes)
                self._requests += 1
                self._flagged += flagged
                if not canary:
                    self._confidences.extend(confidences)
            while max(len(self._remembered), self._remembered_inputs) > _REMEMBERED:
                self._forget(next(iter(self._remembered)))
        if seen.signals and not canary and not self._changing:
            names, views = self.reference.signals.names, self.reference.signals.views
            values = np.frombuffer(seen.signals, "<f8")
            try:
                self._inbox.put_nowait(Signals(names, values.reshape(-1, len(names)), views))
            except queue.Full:
                self._telemetry.count("holdfast_monitor_dropped_total", n=len(values) / len(names))

    def _forget(self, request: str) -> None:
        if (entry := self._remembered.pop(request, None)) is not None:
            self._remembered_inputs -= len(entry[0])

    def model_changes(self, *, done: bool) -> None:
        """Leave samples out while workers exchange the model, and when it is `done`, compare the next ones with the
        reference under the new model: a change of the model would be an alarm.
        """
        if self._renewed is None:
            return
        self._changing = True
        if done:
            self._renewing = True
            with suppress(queue.Full):  # else the thread has work, and looks after it
                self._inbox.put_nowait(Signals((), np.empty((0, 0)), {}))

    # --- threads

    def _renew(self) -> None:
        """Compute the reference with the new model, and restart the tests."""
        assert self._renewed is not None
        self._renewing = False
        try:
            reference = self._renewed()
        except (HoldfastError, OSError, ValueError, RuntimeError) as error:
            self._warn(
                f"note: the monitor stops, because its reference cannot be compared with the new model ({error}); "
                "restart the server"
            )
            return
        with suppress(queue.Empty):
            while self._inbox.get_nowait() is not None:
                pass
        with self._lock:
            self.reference, self._powers = reference, {}
        self.restart()
        self._changing = self._renewing
        thread = threading.Thread(target=self._measure_power, name="monitor")
        self._threads.append(thread)
        thread.start()

    def _test(self) -> None:
        """Give samples to the tests as they arrive."""
        lower_priority()
        while (batch := self._inbox.get()) is not None and not self._closed:
            if self._renewing:
                self._renew()
            if self._changing or not len(batch):
                continue
            with self._lock:
                watch = self._watch
                begin = watch.n >= _LONGEST
            if begin:
                self.restart()
                watch = self._watch
            raised = watch.update(batch)
            self._telemetry.count("holdfast_monitor_samples_total", n=len(batch))
            for name, alarm in raised.items():
                self._telemetry.set("holdfast_monitor_alarm", 1.0, name)
                where = f"{line(alarm.signal)} ({alarm.evidence})"  # with names of columns of a file
                text = f"alarm of {name} after {alarm.after} samples, on {where}"
                self._warn(f"note: {text}")
                self._record("alarm", test=name, after=alarm.after, signal=alarm.signal)

    def _measure_power(self) -> None:
        lower_priority()
        with self._lock:
            watch, powers = Watch(self.reference.signals, 0), self._powers
        for name in DRIFT_TESTS:
            if self._closed or powers is not self._powers:
                return
            powers[name] = watch.power(name)

    def close(self) -> None:
        """End the threads. May be called several times."""
        self._closed = True
        self._inbox.put(None)
        for thread in self._threads:  # the first one may add another
            thread.join()

    # --- requests of the operator

    def restart(self) -> None:
        """Restart all tests, as after a change of the model."""
        with self._lock:
            self._record("monitor", state="restarted", after=self._watch.n)
            self._begin()
            self._confidences.clear()

    def label(self, labels: Mapping[str, Any]) -> dict[str, Any]:
        """Compare predictions with the classes of requests, and return which were accepted."""
        accepted, unknown, invalid = 0, [], {}
        known = self.reference.class_names
        with self._lock:
            for request, classes in labels.items():
                if request not in self._remembered:
                    unknown.append(request)
                    continue
                predictions, confidences = self._remembered[request]
                if not isinstance(classes, list) or len(classes) != len(predictions):
                    invalid[request] = f"{len(predictions)} classes were expected, one for each input"
                elif not all(type(k) is int and 0 <= k < (len(known) if known else 2**31) for k in classes):
                    invalid[request] = "a class is no number of a class of the model"
                else:
                    self._forget(request)
                    self._classes[request] = classes
                    accepted += 1
                    for predicted, confidence, y in zip(predictions, confidences, classes, strict=True):
                        self._labelled.append((confidence, y, predicted == y))
            while len(self._classes) > _NEWEST:
                self._classes.popitem(last=False)
        return {"accepted": accepted, "unknown": unknown, "invalid": invalid}

    def class_of(self, request: str, row: int) -> int:
        """Return the class of an input of a request that was reported; -1 if there is none."""
        with self._lock:
            classes = self._classes.get(request, ())
        return classes[row] if row < len(classes) else -1

    def summary(self) -> dict[str, Any]:
        """Return the state as strict JSON, in the form of the report of a recorded stream, with further keys."""
        with self._lock:
            watch, since = self._watch, self._since
            requests, flagged = self._requests, self._flagged
            confidences, labelled = list(self._confidences), list(self._labelled)
            reference, powers = self.reference, dict(self._powers)
        monitored = Monitored(
            Source("the requests", watch.n, bool(labelled)),
            Source(reference.name, reference.n, reference.predictions.correct is not None),
            reference.model,
            reference.layer,
            DECISIVE,
            tuple(watch.result(name, powers.get(name)) for name in DRIFT_TESTS),
            self._measured(labelled),
            measured_accuracy(reference.predictions, reference.class_names),
            self._expected(confidences),
        )
        return {
            **monitored.summary(),
            "alarmed": [result.name for result in monitored.alarmed],
            "since": since,
            "requests": requests,
            "flagged": flagged,
        }

    def _measured(self, labelled: Sequence[tuple[float, int, bool]]) -> Accuracy | None:
        if not labelled:
            return None
        confidence, y, correct = zip(*labelled, strict=True)
        predictions = Predictions(np.array(confidence), np.array(y), np.array(correct))
        return measured_accuracy(predictions, self.reference.class_names)

    def _expected(self, confidences: Sequence[float]) -> Estimate | None:
        if not confidences or not all(map(math.isfinite, confidences)):
            return None
        stream = Predictions(np.array(confidences), None, None)
        return expected_accuracy(self.reference.predictions, stream)
