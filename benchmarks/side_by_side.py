"""Several contestants timed in one process, the order turned round every round."""

from collections.abc import Callable, Mapping
from statistics import median

from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds

FLOOR = "floor"


def timed(
    contestants: Mapping[str, Callable[[], object]], rounds: int, *, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """CPU seconds of every contestant in every round, after one unmeasured call each; and who is absent, with why.

    Without `warm` that first call is left out (for what takes minutes), and all contestants must be there.

    The order is turned round from round to round, so that a drift of the machine falls on all alike.
    """
    absent: dict[str, str] = {}
    for name, work in contestants.items() if warm else ():
        try:
            work()
        except Absent as why:
            absent[name] = str(why)
    names = [name for name in contestants if name not in absent]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names if k % 2 == 0 else reversed(names):
            seconds[name].append(cpu_seconds(contestants[name]))
    return seconds, absent


def ratio(seconds: Mapping[str, list[float]], name: str, to: str = FLOOR) -> float:
    """Median over the rounds of one contestant's time over another's in the same round."""
    return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))
