"""PGD on images of 224 x 224 with 1,000 classes: CPU time over a plain loop, and by the size of the batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from unittest.mock import patch

import torch

from benchmarks import ours
from benchmarks.alone import timed_alone
from benchmarks.large_networks import SIDE, large
from benchmarks.meter import naive_floor
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.side_by_side import FLOOR, ratio
from holdfast.attacks import PGD
from holdfast.core.meter import batch_size_for

WHAT = "PGD-10 on images of 224 x 224 with 1,000 classes, n = 16, one thread of two cores: CPU time over a plain loop"
STEPS, N, ROUNDS, EPS = 10, 16, 2, 0.5 / 255
NETWORKS = ("MobileNetV2",)
SIZES = (8, 16)
"""numbers of examples in a batch"""
RETURNED, KEPT = "holdfast, freed memory returned", "holdfast"


def measured() -> Outcome:
    table: list[Cells] = []
    claims, detail = [], {}
    default = batch_size_for(3 * SIDE * SIDE, "cpu")
    for name in NETWORKS:
        contestants = {FLOOR: partial(_floor, name)}
        contestants[RETURNED] = partial(_ours, name, default, returned=True)
        contestants |= {_in_batches(size, default): partial(_ours, name, size) for size in SIZES}
        seconds = timed_alone(contestants, ROUNDS)
        table += [
            {
                "network": name,
                "who": who,
                "CPU ms of an example and step": 1000 * median(seconds[who]) / (N * STEPS),
                "cost / loop": ratio(seconds, who),
            }
            for who in seconds
        ]
        fastest = min(median(seconds[_in_batches(size, default)]) for size in SIZES)
        claims += [
            Claim(f"{name}: ours / plain loop <= 0.90", ratio(seconds, KEPT), 0.9),
            Claim(
                f"{name}: batches of {default} / fastest size <= 1.10",
                median(seconds[KEPT]) / fastest,
                1.1,
            ),
            Claim(f"{name}: freed memory kept / returned <= 1.00", ratio(seconds, KEPT, RETURNED), 1.0),
        ]
        detail[name] = seconds
    config: Cells = {
        "steps": STEPS,
        "n": N,
        "rounds": ROUNDS,
        "eps": EPS,
        "drop": False,
        "batch size": default,
    }
    return Outcome(table, claims, config, detail)


def _in_batches(size: int, default: int) -> str:
    return KEPT if size == default else f"holdfast, batches of {size}"


def _floor(name: str) -> Callable[[], object]:
    net, x, y = large(name, N)
    torch.set_num_threads(1)
    return partial(naive_floor, net, x, y, STEPS)


def _ours(name: str, size: int, *, returned: bool = False) -> Callable[[], object]:
    net, x, y = large(name, N)
    torch.set_num_threads(1)
    if returned:
        patch("holdfast.runs.harness.target.freed_memory_kept", _nothing).start()
    return partial(ours.assessed, net, x, y, [PGD(steps=STEPS, drop=False)], "Linf", EPS, size=size)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
