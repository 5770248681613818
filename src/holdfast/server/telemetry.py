"""Metrics of a server in the format of Prometheus. Workers count; the supervisor adds the counts of all workers up."""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from holdfast.guard.decisions import Action
from holdfast.guard.rules import Rule

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
    "holdfast_requests_total": Metric("Responses by status code.", "counter", ("status",)),
    "holdfast_refused_total": Metric(
        "Refused requests by cause: request, key, rate, budget, quota, guard, state (the query detector could not "
        "reach its state), overload, audit, model, upstream.",
        "counter",
        ("cause",),
    ),
    "holdfast_inputs_total": Metric("Inputs that the model answered.", "counter"),
    "holdfast_request_seconds": Metric(
        "Time from the arrival of the headers of an infer request to its response.",
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
    "holdfast_audit_failing": Metric(
        "1 while the audit chain of a worker cannot be written, else 0.", "gauge"
    ),
    "holdfast_keys_failing": Metric("1 while the file of keys cannot be read, else 0.", "gauge"),
    "holdfast_workers": Metric("Worker processes that are ready.", "gauge"),
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

LABELS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "holdfast_requests_total": (("200",), ("400",), ("422",), ("500",), ("503",)),
    "holdfast_refused_total": tuple(
        (cause,)
        for cause in ("request", "key", "rate", "guard", "state", "overload", "audit", "model", "upstream")
    ),
    "holdfast_decisions_total": tuple((str(action),) for action in Action),
}
"""Labels with which counters begin at 0, since Prometheus does not see how a counter got to its first value."""

_Key = tuple[str, tuple[str, ...]]
Report = list[list[Any]]
"""Changes of metrics since the last report, as JSON: name, labels, and a number or the counts of a histogram."""


class Telemetry:
    """Counters, gauges and histograms of one process. All methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[_Key, float] = {}
        self._histograms: dict[_Key, list[float]] = {}

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
            self._values[name, labels] = self._values.get((name, labels), 0.0) + n

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name, labels] = value

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        buckets = METRICS[name].buckets
        with self._lock:
            counts = self._histograms.setdefault((name, ()), [0.0] * (len(buckets) + 2))
            counts[bisect_left(buckets, value)] += 1
            counts[-1] += value

    def report(self) -> Report:
        """Return the changes of counters and histograms since the last report, and the values of gauges."""
        with self._lock:
            changes: Report = [[name, list(labels), value] for (name, labels), value in self._values.items()]
            changes += [[name, list(labels), counts] for (name, labels), counts in self._histograms.items()]
            self._histograms.clear()
            self._values = {
                key: value for key, value in self._values.items() if METRICS[key[0]].kind == "gauge"
            }
        return changes


class MetricTotals:
    """The sums of the reports of all processes. Gauges are added up over the processes that still run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[_Key, float] = {}
        self._histograms: dict[_Key, list[float]] = {}
        self._gauges: dict[str, dict[_Key, float]] = {}

    def add(self, source: str, report: Report) -> None:
        """Add the report of a process. Unknown names are ignored, because a worker is not trusted."""
        with self._lock:
            for name, labels, value in report:
                metric = METRICS.get(name)
                if metric is None or len(labels) != len(metric.labels):
                    continue
                key = (name, tuple(map(str, labels)))
                if metric.kind == "histogram":
                    sums = self._histograms.setdefault(key, [0.0] * len(value))
                    self._histograms[key] = [a + b for a, b in zip(sums, value, strict=True)]
                elif metric.kind == "counter":
                    self._totals[key] = self._totals.get(key, 0.0) + value
                else:
                    self._gauges.setdefault(source, {})[key] = value

    def forget(self, source: str) -> None:
        """Remove the gauges of a process that has ended."""
        with self._lock:
            self._gauges.pop(source, None)

    def value(self, name: str, *labels: str) -> float:
        """Return the sum of a counter or a gauge."""
        with self._lock:
            key = (name, labels)
            return self._totals.get(key, 0.0) + sum(g.get(key, 0.0) for g in self._gauges.values())

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as families of the library `prometheus_client`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        with self._lock:
            totals, histograms = dict(self._totals), dict(self._histograms)
            gauges: dict[_Key, float] = {}
            for each in self._gauges.values():
                for key, value in each.items():
                    gauges[key] = gauges.get(key, 0.0) + value
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels)
                zero = [0.0] * (len(metric.buckets) + 2)
                for labels, counts in _of(name, histograms) or [((), zero)]:
                    histogram.add_metric(labels, _cumulated(metric.buckets, counts[:-1]), counts[-1])
                yield histogram
                continue
            counter = metric.kind == "counter"
            family = (CounterMetricFamily if counter else GaugeMetricFamily)(
                name, metric.help, labels=metric.labels
            )
            for labels, value in _of(name, totals if counter else gauges) or (
                [] if metric.labels else [((), 0.0)]
            ):
                family.add_metric(labels, value)
            yield family


def _of(name: str, values: Mapping[_Key, Any]) -> list[tuple[tuple[str, ...], Any]]:
    return sorted((labels, value) for (each, labels), value in values.items() if each == name)


def _cumulated(bounds: Iterable[float], counts: Iterable[float]) -> list[tuple[str, float]]:
    total, pairs = 0.0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        pairs.append((bound, total))
    return pairs
