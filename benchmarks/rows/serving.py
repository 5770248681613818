"""Throughput of `holdfast serve` without and with the default guard, beside bare FastAPI and LitServe, and latency
while parameter sets are swapped.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.absent import Absent
from benchmarks.guarded import calibrate, fill
from benchmarks.load import Seen, paced, prepared, saturated
from benchmarks.networks import images
from benchmarks.peers import server_python, server_version
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.serving_setups import Loading, loop_and_parser, model, ours, running, setup
from benchmarks.throughput import Contestant, alternated, bare, cells, litserve, ratio
from holdfast.rotation.pool import Pool
from holdfast.rotation.rotating_model import canary
from holdfast.server.audit_folder import verify_audit
from holdfast.server.server_setup import LivePool
from holdfast.server.supervisor import Supervisor
from holdfast.verbs.opening.guard import open_guard

WHAT = "holdfast serve, ResNet-20 on CIFAR-10: throughput beside other servers, and latency while sets are swapped"
NAME, SHAPE = "cifar_resnet20", (3, 32, 32)
CONNECTIONS, IMAGES, ROUNDS, SECONDS = 16, 32, 6, 6.0
PATH = f"/v2/models/{NAME}/infer"
SETS, SWAPS, SWAP_SECONDS = 101, 100, 300.0
SEEN, SENT = 20_000, 50_000
"""Inputs that the guard has seen before, and training images of which the requests are made."""
MOST_P99 = 1.5
BARE, EMPTY, GUARDED, LITSERVE = "bare FastAPI", "holdfast serve", "holdfast serve with guard", "LitServe"
BESIDE = ((EMPTY, BARE, 0.95), (EMPTY, LITSERVE, 1.0), (GUARDED, EMPTY, 0.8))
"""Pairs of servers, and the least ratio of their throughputs."""
_SAME = 1e-4  # of the largest score; sets of other seeds differ by far more


def measured() -> Outcome:
    return outcome(SECONDS, ROUNDS, SWAPS, SWAP_SECONDS, SEEN)


def outcome(seconds: float, rounds: int, swaps: int, swap_seconds: float, seen: int) -> Outcome:
    """The row with rounds of so many seconds, so many swaps within `swap_seconds`, and a guard that has seen so many
    inputs before.
    """
    detail: Cells = {}
    table: list[Cells] = []
    notes: list[str] = []
    claims = _throughput(seconds, rounds, seen, table, detail, notes)
    if swaps:
        claims += _swapped(swaps, swap_seconds, table, detail)
    config: Cells = {
        "network": NAME, "connections": CONNECTIONS, "images a request": 1, "rounds": rounds,
        "seconds a round": seconds, "workers": 1, "threads a worker": 1, "audit": "on, fsync twice a second",
        "default guard": "schema, queries (SQLite), energy; mode enforce", "inputs seen by the guard before": seen,
        "load during swaps": "half of the throughput", "guard during swaps": "without rules", "sets": SETS,
        "swap seconds": swap_seconds,
    }  # fmt: skip
    return Outcome(table, claims, config, detail, notes)


def _throughput(
    seconds: float, rounds: int, seen: int, table: list[Cells], detail: Cells, notes: list[str]
) -> list[Claim]:
    """Throughput of all servers in both forms of requests."""
    x, claims = images("cifar10", SENT, "train")[0], []
    with tempfile.TemporaryDirectory() as name, bare(NAME, PATH) as plain:
        folder = Path(name)
        guard = folder / "guard"
        guard.mkdir()
        calibrate(guard, NAME)
        fill(guard, x, seen)
        opening = partial(open_guard, guard / "guard.yaml")
        with (
            ours(folder / "empty", NAME, SHAPE) as empty,
            ours(folder / "guarded", NAME, SHAPE, guard=opening) as guarded,
            Loading() as loading,
        ):
            servers = {BARE: plain, EMPTY: empty, GUARDED: guarded}
            for form in ("JSON", "binary"):
                with _with_litserve(servers, form, notes) as contestants:
                    rows = alternated(
                        contestants, x, form, seconds=seconds, rounds=rounds, connections=CONNECTIONS,
                        loaded=loading,
                    )  # fmt: skip
                detail[form] = rows
                table += [cells(f"{who}, {form}", numbers) for who, numbers in rows.items()]
                claims += [
                    Claim(
                        f"ResNet-20, {form}: throughput of {who} / {other} >= {least:g}",
                        ratio(rows[who], rows[other]),
                        least,
                        least=True,
                    )
                    for who, other, least in BESIDE
                    if other in rows
                ]
        for audit in (folder / "empty", folder / "guarded"):
            records = verify_audit(audit / "audit").records
            notes.append(f"the audit of {audit.name} has {records:,} records, which holdfast verify confirms")
    notes += [
        "bare FastAPI uses the batches of Holdfast and checks nothing; rounds of all servers alternate",
        "each image is sent once to a server, so that no request is an exact repeat of an earlier one",
    ]
    return claims


@contextmanager
def _with_litserve(
    servers: dict[str, Contestant], form: str, notes: list[str]
) -> Iterator[dict[str, Contestant]]:
    """The servers, with LitServe where it is installed."""
    with ExitStack() as stack:
        try:
            other = stack.enter_context(litserve(NAME, form))
        except Absent as why:
            notes.append(f"LitServe: {why}")
            yield servers
            return
        python = server_python("litserve")
        versions = ", ".join(
            f"{name} {server_version(name, python) or 'absent'}"
            for name in ("litserve", "uvicorn", "uvloop", "httptools")
        )
        notes.append(
            f"{versions}: an API process and a model process, both counted as CPU of the server; Holdfast and FastAPI "
            f"use {loop_and_parser()}; LitServe has no binary form, so a binary request is the bytes of an image alone"
        )
        yield {**servers, LITSERVE: other}


def _swapped(swaps: int, seconds: float, table: list[Cells], detail: Cells) -> list[Claim]:
    """Latency and answers while sets are swapped."""
    swapped = detail["swaps"] = _swapping(swaps, seconds)
    table.append({"who": "holdfast serve, pool, no swaps", **swapped["still"]})
    table.append({"who": f"holdfast serve, pool, {swapped['swaps']} swaps", **swapped["swapping"]})
    return [
        Claim(f"swaps >= {swaps}", swapped["swaps"], swaps, least=True),
        Claim("failed requests during swaps <= 0", swapped["swapping"]["failed"], 0),
        Claim("answers of a wrong set <= 0", swapped["wrong"], 0),
        Claim(
            f"p99 with swaps / without <= {MOST_P99:g}",
            swapped["swapping"]["p99 ms"] / swapped["still"]["p99 ms"],
            MOST_P99,
        ),
    ]


def _swapping(swaps: int, seconds: float) -> Cells:
    """Latency at half of the throughput without swaps and with them, and whether each answer is that of a set that
    served while the request was in progress.
    """
    x, _ = images("cifar10", IMAGES)
    messages = [prepared(image[None], PATH, binary=True) for image in x]
    with tempfile.TemporaryDirectory() as folder:
        live, expected = _pool(Path(folder) / "pool", x, swaps + 1)
        with running(setup(Path(folder), NAME, SHAPE, pool=live)) as server, Loading() as loading:
            port = server.address[1]
            loading(saturated, port, messages, connections=CONNECTIONS, seconds=1.0)
            full = loading(saturated, port, messages, connections=CONNECTIONS, seconds=seconds / 10)
            load = partial(loading, paced, port, messages, connections=CONNECTIONS, rate=full.per_second / 2)
            still = load(seconds=seconds / 2)
            over = threading.Event()
            served: list[tuple[float, str]] = [(0.0, server.status()["pool"]["set"])]
            thread = threading.Thread(target=_swap, args=(server, swaps, seconds, over, served))
            thread.start()
            swapping = load(seconds=seconds)
            over.set()
            thread.join()
            again = load(seconds=seconds / 2)
        verify_audit(Path(folder) / "audit")
    still.taken_s += again.taken_s
    still.failed, still.wall_s = still.failed + again.failed, still.wall_s + again.wall_s
    return {
        "swaps": len(served) - 1,
        "wrong": _wrong(swapping, expected, served),
        "still": _latency(still),
        "swapping": _latency(swapping),
        "load per second": full.per_second / 2,
    }


def _latency(seen: Seen) -> Cells:
    return {
        "requests / s": round(seen.per_second, 1),
        "p50 ms": round(seen.quantile(0.5), 2),
        "p99 ms": round(seen.quantile(0.99), 2),
        "failed": seen.failed,
    }


def _pool(path: Path, x: torch.Tensor, n: int) -> tuple[LivePool, dict[str, torch.Tensor]]:
    """A pool of networks that differ from the trained one by noise, and the scores of each set for the images."""
    pool = Pool.create(path, {})
    canaries = images("cifar10", 256, first=1000)[0]
    pool.keep("canaries", {"x": canaries}, {})
    expected = {}
    for seed in range(n):
        noisy = model(NAME).eval().requires_grad_(False)
        torch.manual_seed(seed)
        for weight in noisy.net.parameters():
            weight.add_(0.05 * weight.std(correction=0) * torch.randn_like(weight))
        name = pool.add(dict(noisy.net.state_dict()), {})
        pool.admit(name, canary=canary(noisy, canaries))
        with torch.inference_mode():
            expected[name] = noisy(x)
    return LivePool(pool, partial(model, NAME), swaps_per_hour=10 * n), expected


def _swap(
    server: Supervisor, swaps: int, seconds: float, over: threading.Event, served: list[tuple[float, str]]
) -> None:
    """Request so many swaps at an even pace, and note when each set began to serve."""
    begin = time.perf_counter()
    for k in range(swaps):
        over.wait(max(0.0, begin + k * seconds / swaps * 0.95 - time.perf_counter()))
        if over.is_set():
            return
        before = server.status()["pool"]["epoch"]
        server.request_swap("the benchmark")
        while server.status()["pool"]["epoch"] == before and not over.wait(0.002):
            pass
        if server.status()["pool"]["epoch"] != before:
            served.append((time.time(), server.status()["pool"]["set"]))


def _wrong(seen: Seen, expected: dict[str, torch.Tensor], served: list[tuple[float, str]]) -> int:
    """Number of answers that are not those of a set that served between the beginning and the end of the request."""
    wrong = 0
    ends = [at for at, _ in served[1:]] + [float("inf")]
    for image, sent, answered, body in seen.bodies:
        scores = torch.frombuffer(bytearray(body[-40:]), dtype=torch.float32)
        possible = [
            name
            # the moment at which a swap is noticed is up to a tenth of a second late
            for (begin, name), end in zip(served, ends, strict=True)
            if begin - 0.1 <= answered and end + 0.1 >= sent
        ]
        wrong += not any(_equal(scores, expected[name][image]) for name in possible)
    return wrong


def _equal(scores: torch.Tensor, known: torch.Tensor) -> bool:
    return float((scores - known).abs().max()) <= _SAME * float(known.abs().max())
