"""Requests at an even pace to a model whose parameters are swapped every second, beside one that is left alone.

A request is timed from the moment that it is due, so that a pause is seen by every request that it holds up.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.networks import two_conv_two_fc
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.model import Classifier
from holdfast.rotation.rotating_model import CANARIES, Live, RotatingModel, canary
from holdfast.rotation.steps.serving_set import next_set

WHAT = "swapping parameters under 200 requests a second, in process: failed, mixed, and the latency beside no swaps"
RATE, SECONDS, EVERY_S, ROUNDS = 200, 30.0, 1.0, 3
SETS, THREADS, IMAGES, BATCHES = 8, 4, 8, 16
SWAPS, STILL = "a swap every second", "no swaps"
_SAME = 1e-4  # of the largest logit; sets that were trained or drawn apart differ by far more


@dataclass
class Sets:
    """Parameter sets in memory, and which of them is to serve."""

    models: dict[str, Classifier]
    canaries: Tensor
    name: str = "set 0"
    epoch: int = 1
    known: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {name: canary(model, self.canaries) for name, model in self.models.items()}

    def swap(self) -> None:
        """Let another set serve."""
        self.name, self.epoch = next_set([name for name in self.models if name != self.name]), self.epoch + 1

    def __call__(self) -> Live:
        return Live(self.name, self.epoch, self.models[self.name].net.state_dict(), self.known[self.name])


@dataclass
class Arm:
    """What became of the requests with or without swaps."""

    late_ms: list[list[float]] = field(default_factory=list)
    """of each round, from the moment that a request was due to its answer"""
    failed: int = 0
    mixed: int = 0
    swaps_ms: list[float] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """sets that answered"""

    def quantile(self, q: float) -> float:
        return _quantile([late for every in self.late_ms for late in every], q)


def measured() -> Outcome:
    return outcome(SECONDS, ROUNDS)


def outcome(seconds: float, rounds: int) -> Outcome:
    """The row, with rounds of so many seconds."""
    sets, inputs = _sets(), torch.rand(BATCHES, IMAGES, 1, 28, 28)
    expected = {name: [model(x) for x in inputs] for name, model in sets.models.items()}
    model = RotatingModel(Classifier(_network()), sets, sets.canaries)
    arms = {STILL: Arm(), SWAPS: Arm()}
    for k in range(rounds):
        for name in (STILL, SWAPS) if k % 2 == 0 else (SWAPS, STILL):
            arm = arms[name]
            with _swapping(model, sets, arm.swaps_ms, name == SWAPS):
                asked = _asked(model, inputs, int(seconds * RATE))
            _book(arm, asked, expected)
    table: list[Cells] = [
        {
            "who": name, "requests": sum(map(len, arm.late_ms)), "swaps": len(arm.swaps_ms), "failed": arm.failed,
            "mixed": arm.mixed, "sets that answered": len(arm.used), "p50 ms": arm.quantile(0.5),
            "p99 ms": arm.quantile(0.99), "longest ms": arm.quantile(1.0),
        }
        for name, arm in arms.items()
    ]  # fmt: skip
    swapped, still = arms[SWAPS], arms[STILL]
    more = swapped.quantile(0.99) - still.quantile(0.99)
    claims = [
        Claim("requests that failed <= 0", swapped.failed + still.failed, 0),
        Claim("batches that mix sets <= 0", swapped.mixed + still.mixed, 0),
        Claim("p99 with swaps - without, ms <= 5", more, 5.0),
    ]
    config: Cells = {
        "network": "conv 16, conv 32, fc 32, fc 10", "parameters": sum(p.numel() for p in _network().parameters()),
        "requests a second": RATE, "images a request": IMAGES, "threads that answer": THREADS, "sets": SETS,
        "canaries": CANARIES, "seconds a round": seconds, "rounds": rounds, "seed": 0,
    }  # fmt: skip
    detail = {name: _rounds(arm) for name, arm in arms.items()}
    notes = [f"a swap takes {median(swapped.swaps_ms):.1f} ms beside the requests (median)"]
    return Outcome(table, claims, config, detail, notes)


def _network() -> nn.Module:
    """The network of the numbers that rotation is designed by: 59,034 parameters."""
    return two_conv_two_fc(hidden=32)


def _sets() -> Sets:
    """Sets of independent seeds; they need no training to be told apart by their answers."""
    models = {}
    for seed in range(SETS):
        torch.manual_seed(seed)
        models[f"set {seed}"] = Classifier(_network()).eval().requires_grad_(False)
    torch.manual_seed(SETS)
    return Sets(models, torch.rand(CANARIES, 1, 28, 28))


def _asked(model: RotatingModel, inputs: Tensor, n: int) -> list[tuple[int, Future[tuple[Tensor, float]]]]:
    """The requests of a round, each with the number of its inputs, when the last of them is answered."""

    def request(x: Tensor, due: float) -> tuple[Tensor, float]:
        logits = model.answer(x, principal="client")
        return logits, 1000 * (time.perf_counter() - due)

    asked = []
    with ThreadPoolExecutor(THREADS) as threads:
        begin = time.perf_counter()
        for k in range(n):
            due = begin + k / RATE
            time.sleep(max(0.0, due - time.perf_counter()))
            asked.append((k % BATCHES, threads.submit(request, inputs[k % BATCHES], due)))
    return asked


@contextmanager
def _swapping(model: RotatingModel, sets: Sets, took_ms: list[float], wanted: bool) -> Iterator[None]:
    """Within it another set is swapped in every second, in a thread beside the requests."""
    over = threading.Event()

    def swap() -> None:
        while not over.wait(EVERY_S):
            sets.swap()
            begin = time.perf_counter()
            model.refresh()
            took_ms.append(1000 * (time.perf_counter() - begin))
            model.collected()

    with ThreadPoolExecutor(1) as thread:
        swaps = [thread.submit(swap)] if wanted else []
        try:
            yield
        finally:
            over.set()
        for each in swaps:
            each.result()


def _book(
    arm: Arm, asked: list[tuple[int, Future[tuple[Tensor, float]]]], expected: dict[str, list[Tensor]]
) -> None:
    """Count who failed, and whose answer is that of no single set."""
    late = []
    for batch, future in asked:
        if future.exception() is not None:
            arm.failed += 1
            continue
        logits, ms = future.result()
        late.append(ms)
        by = [name for name, known in expected.items() if _same(logits, known[batch])]
        arm.mixed += len(by) != 1
        arm.used.update(by)
    arm.late_ms.append(late)


def _same(logits: Tensor, known: Tensor) -> bool:
    return float((logits - known).abs().max()) <= _SAME * float(known.abs().max())


def _rounds(arm: Arm) -> Cells:
    found = {
        f"p{100 * q:g} ms": [_quantile(late, q) for late in arm.late_ms] for q in (0.5, 0.9, 0.99, 0.999)
    }
    return {**found, "swaps ms": arm.swaps_ms}


def _quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))
