"""Streams of numbers on which change detectors are compared. Only the standard library is used, so that an environment
with another library alone can make them.
"""

from collections.abc import Iterator
from random import Random

SHIFTED, STATIONARY, LENGTH, CHANGE = 200, 500, 2000, 2000


def shifted(k: int) -> list[float]:
    """Standard normal values whose mean is 1 from sample 2,001 on."""
    rng = Random(f"shifted {k}")
    return [rng.gauss(float(i >= CHANGE), 1) for i in range(CHANGE + 1000)]


def stationary(k: int, n: int = LENGTH) -> list[float]:
    """Standard normal values."""
    rng = Random(f"stationary {k}")
    return [rng.gauss(0, 1) for _ in range(n)]


def varied() -> Iterator[tuple[str, list[float]]]:
    """Name and values of streams of several kinds, most with several changes."""
    for k in range(12):
        rng = Random(f"varied {k}")
        yield f"ramp {k}", [rng.gauss(i / 1000, 1) for i in range(3000)]
        yield f"variance {k}", [rng.gauss(0, 1 + 3 * (i > 1000)) for i in range(3000)]
        yield f"errors {k}", [float(rng.random() < (0.1 if i < 1500 else 0.3)) for i in range(3000)]
        yield f"levels {k}", [rng.random() * (0.2 if i // 700 % 2 else 1.0) for i in range(3000)]


def streams() -> Iterator[tuple[str, list[float]]]:
    """Name and values of all streams on which detections are compared."""
    yield from varied()
    for k in range(SHIFTED):
        yield f"shifted {k}", shifted(k)
