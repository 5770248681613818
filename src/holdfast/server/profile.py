"""Time of the parts of a request, which `holdfast serve --profile` measures."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from holdfast.server.telemetry import MetricTotals, Telemetry

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
