"""The monitor of a running server: it compares samples of the requests with a reference, and predictions with labels
that arrive later.
"""

import math
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from holdfast.core.catalogue import DRIFT_TESTS
from holdfast.core.errors import HoldfastError
from holdfast.core.estimate import Estimate
from holdfast.core.names import line
from holdfast.monitoring.accuracy import (
    Accuracy,
    Predictions,
    Reference,
    expected_accuracy,
    measured_accuracy,
)
from holdfast.monitoring.monitored import Monitored, Source
from holdfast.monitoring.signals import Signals
from holdfast.monitoring.watching import Power, Watch
from holdfast.runs.engine.progress import Notify
from holdfast.server.messages import Observations
from holdfast.server.served_weights import Record, lower_priority
from holdfast.server.telemetry import Telemetry

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
