"""CPU time of contestants in processes of their own, because the memory that one frees makes the next one faster."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.meter import cpu_seconds

Work = Callable[[], object]


def timed_alone(contestants: Mapping[str, Callable[[], Work]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contestant in every round, each in a new process with one thread.

    A contestant is a function of a module that opens what is needed and returns the work, which alone is timed. The
    order is turned round from round to round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for k in range(rounds):
        for name in contestants if k % 2 == 0 else reversed(contestants):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                seconds[name].append(process.submit(_spent, contestants[name]).result())
    return seconds


def _spent(opened: Callable[[], Work]) -> float:
    return cpu_seconds(opened())
