"""Traffic and latency of a server in the last minutes, sampled from its metrics and kept in memory."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

from holdfast.server.telemetry import METRICS, MetricTotals

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
