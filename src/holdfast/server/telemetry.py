"""Metrics of a server in the format of Prometheus. Workers count; the supervisor adds the counts of all workers up.

The values of a process are in memory that it shares with the supervisor, so that those of a killed worker are kept.
"""

import json
import struct
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any, Literal

from holdfast.guard.rules import Action, Rule

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """Definition of a metric: its help text, its labels and, for a histogram, the upper bounds of its buckets."""

    help: str
    kind: Kind
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

METRICS: Mapping[str, Metric] = {
    "holdfast_requests_total": Metric(
        "Responses to POST requests, which are all but probes and metadata, by status code.",
        "counter",
        ("status",),
    ),
    "holdfast_refused_total": Metric(
        "Refused POST requests, and all requests with an invalid key, by cause: request, key, rate, budget, quota, "
        "guard, state (the query detector could not reach its state), overload, audit, model, upstream, workers (none "
        "has started).",
        "counter",
        ("cause",),
    ),
    "holdfast_inputs_total": Metric("Inputs that the model answered.", "counter"),
    "holdfast_request_seconds": Metric(
        "Time from the arrival of the headers of an infer request to its response, without refused requests.",
        "histogram",
        buckets=_SECONDS,
    ),
    "holdfast_batch_rows": Metric("Inputs in a batch.", "histogram", buckets=_ROWS),
    "holdfast_batch_seconds": Metric("Time of a batch.", "histogram", buckets=_SECONDS),
    "holdfast_profiled_total": Metric("Requests whose parts were measured, with --profile.", "counter"),
    "holdfast_part_cpu_seconds_total": Metric(
        "CPU time of the parts of requests, with --profile: parsing, guard before, model, guard after, audit, "
        "response, and other (the rest of the process).",
        "counter",
        ("part",),
    ),
    "holdfast_part_seconds_total": Metric(
        "Wall-clock time of the parts of requests, with --profile. What a batch shares counts once.",
        "counter",
        ("part",),
    ),
    "holdfast_connections": Metric("Open connections.", "gauge"),
    "holdfast_waiting_inputs": Metric("Inputs that wait for a batch.", "gauge"),
    "holdfast_decisions_total": Metric("Requests by the action of the guard.", "counter", ("action",)),
    "holdfast_rule_fired_total": Metric("Inputs for which a rule fired.", "counter", ("rule", "mode")),
    "holdfast_guard_inputs_total": Metric("Inputs that the calibrated rules of the guard judged.", "counter"),
    "holdfast_guard_alarms_total": Metric(
        "Inputs for which a calibrated rule fired, in any mode.", "counter"
    ),
    "holdfast_guard_failures_total": Metric("Batches for which the guard raised an error.", "counter"),
    "holdfast_guard_unchecked_total": Metric(
        "Inputs that the query detector could not judge because its state could not be reached.", "counter"
    ),
    "holdfast_audit_lost_total": Metric("Audit records that could not be written.", "counter"),
    "holdfast_audit_failing": Metric("Number of workers whose audit chain cannot be written.", "gauge"),
    "holdfast_keys_failing": Metric("1 while the file of keys cannot be read, else 0.", "gauge"),
    "holdfast_ready": Metric("1 if requests are answered, as /v2/health/ready states it, else 0.", "gauge"),
    "holdfast_not_ready": Metric(
        "Number of processes that refuse every request, by reason: audit (the audit chain cannot be written), state "
        "(the state of the query detector cannot be reached), quota (the limits of keys cannot be checked), model (it "
        "fails on every input), workers (none has started), draining.",
        "gauge",
        ("reason",),
    ),
    "holdfast_monitor_alarm": Metric(
        "1 after an alarm of a test of the monitor, until it begins again, else 0.", "gauge", ("test",)
    ),
    "holdfast_monitor_samples_total": Metric(
        "Inputs that the monitor compared with its reference.", "counter"
    ),
    "holdfast_monitor_dropped_total": Metric(
        "Sampled inputs that the monitor left out because it was behind.", "counter"
    ),
    "holdfast_workers": Metric("Worker processes that have started.", "gauge"),
    "holdfast_worker_restarts_total": Metric("Worker processes that were replaced.", "counter"),
    "holdfast_worker_hangs_total": Metric(
        "Worker processes that were killed because they made no progress.", "counter"
    ),
    "holdfast_interrupted_total": Metric("Requests that a worker did not answer before it died.", "counter"),
    "holdfast_swaps_total": Metric("Swaps of the serving set, and reloads of a model.", "counter"),
    "holdfast_reload_failing": Metric(
        "1 if the last reload failed, or while no worker can be started with the model in its file, else 0.",
        "gauge",
    ),
    "holdfast_pool_epoch": Metric("Number of parameter sets that have served so far.", "gauge"),
    "holdfast_pool_waiting": Metric("Admitted parameter sets that wait to serve.", "gauge"),
    "holdfast_pool_alarm": Metric(
        "1 while a swap is due that cannot be made, by reason: empty, limit, error.", "gauge", ("reason",)
    ),
}
"""All metrics of a server by name."""

_CAUSES = (
    *("request", "key", "rate", "guard", "state"),
    *("overload", "audit", "model", "upstream", "workers"),
)
LABELS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "holdfast_requests_total": (("200",), ("400",), ("422",), ("500",), ("503",)),
    "holdfast_refused_total": tuple((cause,) for cause in _CAUSES),
    "holdfast_decisions_total": tuple((str(action),) for action in Action),
}
"""Labels with which counters begin at 0, since Prometheus does not see how a counter got to its first value."""

_Key = tuple[str, tuple[str, ...]]
MEMORY_BYTES = 1 << 20
"""size of the memory with the values of one process, which is enough for 10,000 of them"""
_USED = struct.Struct("@Q")
"""format of the number of used bytes, with which the memory begins"""
_ENTRY = struct.Struct("@II")
"""format of the beginning of an entry: the lengths of its key, which follows, and of its values"""
_VALUE_BYTES = 8


class Telemetry:
    """Counters, gauges and histograms of one process. All methods may be called by any thread.

    A value is written to `memory` at once. Entries are only appended: the number of used bytes is written last.
    """

    def __init__(self, memory: mmap | None = None) -> None:
        self.memory = memory or mmap(-1, MEMORY_BYTES)
        self._lock = threading.Lock()
        self._cells: dict[_Key, memoryview[float]] = {}
        self._used = _USED.size

    def begin(self, rules: Mapping[str, Rule]) -> None:
        """Begin counters at 0 for the labels of `LABELS`, and for the rules of a guard."""
        for name, values in LABELS.items():
            for labels in values:
                self.count(name, *labels, n=0.0)
        for rule in rules.values():
            self.count("holdfast_rule_fired_total", rule.name, rule.mode.value, n=0.0)

    def count(self, name: str, *labels: str, n: float = 1.0) -> None:
        """Add `n` to a counter."""
        with self._lock:
            self._cell(name, labels)[0] += n

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._cell(name, labels)[0] = value

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        buckets = METRICS[name].buckets
        with self._lock:
            counts = self._cell(name, (), len(buckets) + 2)
            counts[bisect_left(buckets, value)] += 1
            counts[-1] += value

    def value(self, name: str, *labels: str) -> float:
        """Return a counter or a gauge of this process."""
        with self._lock:
            cell = self._cells.get((name, labels))
            return 0.0 if cell is None else float(cell[0])

    def _cell(self, name: str, labels: tuple[str, ...], n: int = 1) -> "memoryview[float]":
        """Return the `n` values of a metric in the memory, which begin at 0."""
        cell = self._cells.get((name, labels))
        if cell is None:
            text = json.dumps([name, labels]).encode()
            text += b" " * (-len(text) % _VALUE_BYTES)
            first = self._used + _ENTRY.size + len(text)
            self.memory[self._used : first] = _ENTRY.pack(len(text), n) + text
            self._used = first + n * _VALUE_BYTES
            cell = self._cells[name, labels] = memoryview(self.memory)[first : self._used].cast("d")
            self.memory[: _USED.size] = _USED.pack(self._used)
        return cell


def _values_in(memory: mmap) -> Iterator[tuple[_Key, list[float]]]:
    """Yield the values of a process. What is no value of a known metric is left out, as a worker is not trusted."""
    content = memory[:]
    at, used = _USED.size, min(*_USED.unpack_from(content), len(content))
    while at + _ENTRY.size <= used:
        length, n = _ENTRY.unpack_from(content, at)
        first = at + _ENTRY.size + length
        at = first + n * _VALUE_BYTES
        if at > used:
            return
        try:
            name, labels = json.loads(content[first - length : first])
            metric, key = METRICS[name], (name, tuple(map(str, labels)))
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
        expected = len(metric.buckets) + 2 if metric.kind == "histogram" else 1
        if len(labels) == len(metric.labels) and n == expected:
            yield key, list(struct.unpack_from(f"@{n}d", content, first))


class MetricTotals:
    """The sums of the metrics of all processes, which are read when they are needed. Counters of processes that have
    ended are kept; gauges are added up over those that run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memories: dict[str, mmap] = {}
        self._ended: dict[_Key, list[float]] = {}

    def follow(self, source: str, memory: mmap) -> None:
        """Include the metrics of a process, which are in its memory."""
        with self._lock:
            self._memories[source] = memory

    def forget(self, source: str) -> None:
        """Keep the counters of a process that has ended, and remove its gauges."""
        with self._lock:
            memory = self._memories.pop(source, None)
            if memory is not None:
                counters = ((k, v) for k, v in _values_in(memory) if METRICS[k[0]].kind != "gauge")
                _add(self._ended, counters)

    def value(self, name: str, *labels: str) -> float:
        """Return the sum of a counter or a gauge."""
        return self._sums().get((name, labels), [0.0])[0]

    def values(self, name: str) -> dict[tuple[str, ...], list[float]]:
        """Return the sums of a metric by its labels: one value, or counts and sum of a histogram."""
        return {labels: values for (each, labels), values in self._sums().items() if each == name}

    def _sums(self) -> dict[_Key, list[float]]:
        with self._lock:
            sums = dict(self._ended)
            for memory in self._memories.values():
                _add(sums, _values_in(memory))
        return sums

    def of(self, source: str) -> dict[tuple[str, tuple[str, ...]], list[float]]:
        """Return the values of one process that runs, by name and labels."""
        with self._lock:
            memory = self._memories.get(source)
            return {} if memory is None else dict(_values_in(memory))

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as families of the library `prometheus_client`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        sums = self._sums()
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels)
                zero = [0.0] * (len(metric.buckets) + 2)
                for labels, counts in _of(name, sums) or [((), zero)]:
                    histogram.add_metric(labels, _cumulated(metric.buckets, counts[:-1]), counts[-1])
                yield histogram
                continue
            family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
                name, metric.help, labels=metric.labels
            )
            for labels, (value,) in _of(name, sums) or ([] if metric.labels else [((), [0.0])]):
                family.add_metric(labels, value)
            yield family


def _add(sums: dict[_Key, list[float]], values: Iterable[tuple[_Key, list[float]]]) -> None:
    for key, more in values:
        sums[key] = [a + b for a, b in zip(sums[key], more, strict=True)] if key in sums else more


def _of(name: str, sums: Mapping[_Key, list[float]]) -> list[tuple[tuple[str, ...], list[float]]]:
    return sorted((labels, values) for (each, labels), values in sums.items() if each == name)


def _cumulated(bounds: Iterable[float], counts: Iterable[float]) -> list[tuple[str, float]]:
    total, pairs = 0.0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        pairs.append((bound, total))
    return pairs
