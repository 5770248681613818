"""Traffic and latency of a server in the last minutes, and the time of the parts of a request."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock

from holdfast.server.messages import Generation, WorkerProcess
from holdfast.server.telemetry import METRICS, MetricTotals, Telemetry

PARTS = ("parsing", "guard before", "model", "guard after", "audit", "response")
"""parts that are measured: reading the body, the guard before and after the model, the model, the audit chain with the
digests of inputs, and writing the body of the response"""
OTHER = "other"
"""everything else that the process computes: HTTP, sockets, the event loop, threads and reports"""
PROFILED = "holdfast_profiled_total"
CPU, WALL = "holdfast_part_cpu_seconds_total", "holdfast_part_seconds_total"
"""names of the metrics"""
_NOTHING = nullcontext()

Timing = Callable[[str], AbstractContextManager[None]]
"""Function that returns a context manager in which the time of a part is measured."""


def no_timing(part: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return _NOTHING


@dataclass(eq=False)
class Profile:
    """CPU time and wall-clock time of each part in this process.

    The CPU time is that of the thread that runs the part. A part within another one, such as a forward pass within a
    detector, counts for itself alone.
    """

    _totals: dict[str, list[float]] = field(default_factory=lambda: {part: [0.0, 0.0] for part in PARTS})
    _requests: int = 0
    _threads: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cpu_s: float = field(default_factory=time.process_time)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure a part, which one thread runs without waiting for another task of its event loop."""
        outer: list[float] | None = getattr(self._threads, "within", None)
        within = self._threads.within = [0.0, 0.0]
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        try:
            yield
        finally:
            taken = time.thread_time() - cpu_s, time.perf_counter() - wall_s
            self._threads.within = outer
            with self._lock:
                self._requests += part == "parsing"
                for clock, seconds in enumerate(taken):
                    self._totals[part][clock] += seconds - within[clock]
                    if outer is not None:
                        outer[clock] += seconds

    def report(self, telemetry: Telemetry) -> None:
        """Add what was measured since the last report to the metrics."""
        with self._lock:
            totals, self._totals = self._totals, {part: [0.0, 0.0] for part in PARTS}
            requests, self._requests = self._requests, 0
        parts_s = sum(cpu for cpu, _ in totals.values())
        other_s = max(0.0, time.process_time() - self._cpu_s - parts_s)
        self._cpu_s += parts_s + other_s  # a part that has not ended yet was counted as another one
        for part, (cpu, wall) in totals.items():
            telemetry.count(CPU, part, n=cpu)
            telemetry.count(WALL, part, n=wall)
        telemetry.count(CPU, OTHER, n=other_s)
        telemetry.count(PROFILED, n=requests)


def profile_text(totals: MetricTotals) -> str:
    """Return the mean time of each part of a request in one line."""
    n = totals.value(PROFILED)
    if not n:
        return "profile: no request was answered"
    cpu, wall = (
        {part: 1000 * totals.value(name, part) / n for part in (*PARTS, OTHER)} for name in (CPU, WALL)
    )
    parts = ", ".join(f"{part} {cpu[part]:.3f} ({wall[part]:.3f})" for part in PARTS)
    return (
        f"profile: {n:,.0f} requests; milliseconds of CPU (wall clock) per request: {parts}, {OTHER} "
        f"{cpu[OTHER]:.3f}; total {sum(cpu.values()):.3f}"
    )


SAMPLE_S, KEPT_S = 5.0, 900.0
"""seconds between two samples, and seconds for which they are kept"""
REQUESTS, REFUSED, SECONDS = "holdfast_requests_total", "holdfast_refused_total", "holdfast_request_seconds"
_RECENT = 12
"""number of intervals over which current values are computed, which is a minute"""


@dataclass(frozen=True)
class Sample:
    """Counters of the server at one time."""

    time_s: float
    """seconds since the start of the machine"""
    requests: float
    refused: float
    latencies: tuple[float, ...]
    """number of requests in each bucket of the histogram of latencies"""


@dataclass(frozen=True)
class Interval:
    """Traffic between two samples. The quantiles are None if no request was measured."""

    requests_per_s: float
    refused_per_s: float
    p50_s: float | None
    p95_s: float | None


class Traffic:
    """Samples of the last 15 minutes, one each 5 seconds. All methods may be called by any thread."""

    def __init__(self, totals: MetricTotals, clock: Callable[[], float] = time.monotonic) -> None:
        self._totals, self._clock, self._lock = totals, clock, Lock()
        self._samples: deque[Sample] = deque(maxlen=round(KEPT_S / SAMPLE_S) + 1)

    def sample(self) -> None:
        """Take a sample if the last one is 5 seconds old."""
        now = self._clock()
        with self._lock:
            if self._samples and now - self._samples[-1].time_s < SAMPLE_S:
                return
            latencies = self._totals.values(SECONDS).get((), [0.0] * (len(METRICS[SECONDS].buckets) + 2))
            self._samples.append(
                Sample(now, self._sum(REQUESTS), self._sum(REFUSED), tuple(map(_finite, latencies[:-1])))
            )

    def intervals(self) -> list[Interval]:
        """Return the traffic between consecutive samples, the oldest first."""
        with self._lock:
            samples = list(self._samples)
        return [_between(a, b) for a, b in pairwise(samples)]

    def recent(self) -> Interval | None:
        """Return the traffic of the last minute; None before the second sample."""
        with self._lock:
            samples = list(self._samples)[-_RECENT - 1 :]
        return _between(samples[0], samples[-1]) if len(samples) > 1 else None

    def by_label(self, name: str) -> Mapping[tuple[str, ...], float]:
        """Return the values of a counter by its labels, without those that are 0."""
        values = {labels: _finite(value[0]) for labels, value in self._totals.values(name).items()}
        return {labels: value for labels, value in sorted(values.items()) if value}

    def _sum(self, name: str) -> float:
        return sum(_finite(value[0]) for value in self._totals.values(name).values())


def quantile(counts: Sequence[float], bounds: Sequence[float], share: float) -> float | None:
    """Return a quantile of a histogram, interpolated linearly within its bucket; the largest bound for values above it,
    and None for an empty histogram.

    >>> quantile([0, 4, 0], [1.0, 2.0], 0.5)
    1.5
    """
    remaining = share * sum(counts)
    if remaining <= 0:
        return None
    low = 0.0
    for count, high in zip(counts, bounds, strict=False):
        if count >= remaining:
            return low + (high - low) * remaining / count
        remaining, low = remaining - count, high
    return bounds[-1]


def _between(first: Sample, last: Sample) -> Interval:
    seconds = last.time_s - first.time_s
    counts = [max(0.0, b - a) for a, b in zip(first.latencies, last.latencies, strict=True)]
    p50, p95 = (quantile(counts, METRICS[SECONDS].buckets, share) for share in (0.5, 0.95))
    requests, refused = (
        max(0.0, after - before) / seconds
        for before, after in ((first.requests, last.requests), (first.refused, last.refused))
    )
    return Interval(requests, refused, p50, p95)


def _finite(value: float) -> float:
    """The value, or 0 if it is not finite, as a worker that is not trusted could have written."""
    return value if math.isfinite(value) else 0.0


_COUNTED: Mapping[str, tuple[str, Callable[[tuple[str, ...]], bool]]] = {
    "requests": (REQUESTS, lambda labels: True),
    "inputs": ("holdfast_inputs_total", lambda labels: True),
    "model_failures": (REFUSED, lambda labels: labels == ("model",)),
    "refused": (REFUSED, lambda labels: labels != ("model",)),
}
"""What is counted for each served set: the metric, and which of its labels"""
Counts = dict[str, float]
_MOST_SETS = 50
"""largest number of sets of a pool whose counts are kept after they served"""


class SetCounts:
    """What the workers of each served set have counted: since the last canary began or, for the newest sets of a pool,
    since they served. `sums` may be called by any thread.
    """

    def __init__(self, totals: MetricTotals, workers: Sequence[WorkerProcess]) -> None:
        self._totals, self._workers = totals, workers
        self._before: dict[str, Counts] = {}
        """counts of each worker when it began to be counted"""
        self._left: dict[str, Counts] = {}
        """counts since then of workers that have ended or serve another set, by served set"""

    def begin(self) -> None:
        """Count from now on."""
        self._before, self._left = {worker.name: self._counts(worker) for worker in self._workers}, {}

    def left(self, worker: WorkerProcess) -> None:
        """Keep the counts of a worker for the set that it serves, as the newest one."""
        if worker.set_name:
            before = self._left.pop(worker.set_name, {})
            self._left[worker.set_name] = _sum(before, self._since(worker))
        while len(self._left) > _MOST_SETS:
            del self._left[next(iter(self._left))]

    def follow(self, generation: Generation) -> None:
        """Count what the workers answer from now on for another set of a pool, which they serve.

        A worker reports its counts within a fraction of a second, so that a few requests are counted for the next set.
        """
        for worker in self._workers:
            self.left(worker)
            self._before[worker.name], worker.generation = self._counts(worker), generation

    def sums(self) -> dict[str, Counts]:
        """Return the counts by served set."""
        # a copy first, because another thread than that of the supervisor may ask
        sums = {name: dict(counts) for name, counts in dict(self._left).items()}
        for worker in list(self._workers):
            if worker.set_name:
                sums[worker.set_name] = _sum(sums.get(worker.set_name, {}), self._since(worker))
        return sums

    def _since(self, worker: WorkerProcess) -> Counts:
        before = self._before.get(worker.name, {})
        return {key: max(0.0, n - before.get(key, 0.0)) for key, n in self._counts(worker).items()}

    def _counts(self, worker: WorkerProcess) -> Counts:
        values = self._totals.of(worker.name)
        counts = {}
        for key, (metric, counted) in _COUNTED.items():
            found = (n for (name, labels), (n, *_) in values.items() if name == metric and counted(labels))
            counts[key] = math.fsum(found)
        return counts


def _sum(counts: Counts, more: Counts) -> Counts:
    return {key: counts.get(key, 0.0) + n for key, n in more.items()}
