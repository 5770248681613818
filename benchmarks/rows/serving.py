"""Throughput of `holdfast serve` beside bare FastAPI and uvicorn, and latency while parameter sets are swapped."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import httpx
import torch

from benchmarks.load import Seen, cpu_s, paced, prepared, saturated
from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.model import Classifier
from holdfast.rotation.live import canary
from holdfast.serving.app import ConnectionLimits
from holdfast.serving.audit_chain import AuditKey
from holdfast.serving.audit_folder import verify_audit
from holdfast.serving.live_pool import LivePool
from holdfast.serving.loaded_model import LoadedModel
from holdfast.serving.supervisor import ServerSetup, Supervisor
from holdfast.serving.worker import ServingSetup
from holdfast.serving.worker_processes import bound_socket
from holdfast.store.pool import Pool

WHAT = "holdfast serve, ResNet-20 on CIFAR-10: throughput beside bare FastAPI, and latency while sets are swapped"
NAME, SHAPE = "cifar_resnet20", (3, 32, 32)
CONNECTIONS, IMAGES, ROUNDS, SECONDS = 16, 32, 6, 6.0
PATH = f"/v2/models/{NAME}/infer"
SETS, SWAPS, SWAP_SECONDS = 101, 100, 300.0
LEAST, MOST_P99 = 0.95, 1.5
_SAME = 1e-4  # of the largest score; sets of other seeds differ by far more


def measured() -> Outcome:
    return outcome(SECONDS, ROUNDS, SWAPS, SWAP_SECONDS)


def outcome(seconds: float, rounds: int, swaps: int, swap_seconds: float) -> Outcome:
    """The row with rounds of so many seconds, and so many swaps within `swap_seconds`."""
    x, _ = images("cifar10", IMAGES)
    detail: Cells = {}
    table, claims = [], []
    with tempfile.TemporaryDirectory() as folder, _bare() as bare, _ours(Path(folder)) as (port, pid):
        for form in ("JSON", "binary"):
            messages = [prepared(image[None], PATH, binary=form == "binary") for image in x]
            found = _alternated(
                {"bare FastAPI": bare, "holdfast serve": (port, pid)}, messages, seconds, rounds
            )
            detail[form] = found
            ratios = [
                ours / theirs
                for ours, theirs in zip(
                    found["holdfast serve"]["per_second"], found["bare FastAPI"]["per_second"], strict=True
                )
            ]
            for who, numbers in found.items():
                table.append(
                    {
                        "who": f"{who}, {form}",
                        "requests / s": round(median(numbers["per_second"]), 1),
                        "server CPU ms a request": round(median(numbers["cpu_ms"]), 3),
                        "p50 ms": round(median(numbers["p50_ms"]), 1),
                        "p99 ms": round(median(numbers["p99_ms"]), 1),
                        "failed": sum(numbers["failed"]),
                    }
                )
            claims.append(
                Claim(f"{form}: throughput / bare FastAPI >= {LEAST:g}", median(ratios), LEAST, least=True)
            )
        audited = verify_audit(Path(folder) / "audit")
    swapped = _swapping(swaps, swap_seconds)
    detail["swaps"] = swapped
    table.append({"who": "holdfast serve, pool, no swaps", **swapped["still"]})
    table.append({"who": f"holdfast serve, pool, {swapped['swaps']} swaps", **swapped["swapping"]})
    claims += [
        Claim(f"swaps >= {swaps}", swapped["swaps"], swaps, least=True),
        Claim("failed requests during swaps <= 0", swapped["swapping"]["failed"], 0),
        Claim("answers of a wrong set <= 0", swapped["wrong"], 0),
        Claim(
            f"p99 with swaps / without <= {MOST_P99:g}",
            swapped["swapping"]["p99 ms"] / swapped["still"]["p99 ms"],
            MOST_P99,
        ),
    ]
    config: Cells = {
        "network": NAME, "connections": CONNECTIONS, "images a request": 1, "rounds": rounds,
        "seconds a round": seconds, "workers": 1, "threads a worker": 1, "audit": "on, fsync twice a second",
        "guard": "without rules", "load during swaps": "half of the throughput", "sets": SETS,
        "swap seconds": swap_seconds,
    }  # fmt: skip
    notes = [
        f"the audit of the rounds has {audited.records:,} records, which holdfast verify confirms",
        "bare FastAPI uses the batches of Holdfast and checks nothing; rounds of both alternate",
    ]
    return Outcome(table, claims, config, detail, notes)


def _alternated(
    servers: dict[str, tuple[int, int]], messages: list[bytes], seconds: float, rounds: int
) -> dict[str, Cells]:
    found: dict[str, Cells] = {
        who: {key: [] for key in ("per_second", "cpu_ms", "p50_ms", "p99_ms", "failed")} for who in servers
    }
    for port, _ in servers.values():
        _loaded(saturated, port, messages, connections=CONNECTIONS, seconds=1.0)
    for k in range(rounds):
        for who in list(servers) if k % 2 == 0 else list(servers)[::-1]:
            port, pid = servers[who]
            before = cpu_s(pid)
            seen = _loaded(saturated, port, messages, connections=CONNECTIONS, seconds=seconds)
            numbers = found[who]
            numbers["cpu_ms"].append(1000 * (cpu_s(pid) - before) / len(seen.taken_s))
            numbers["per_second"].append(seen.per_second)
            numbers["p50_ms"].append(seen.quantile(0.5))
            numbers["p99_ms"].append(seen.quantile(0.99))
            numbers["failed"].append(seen.failed)
    return found


def _loaded(load: Callable[..., Seen], *arguments: object, **settings: object) -> Seen:
    """What `load` returns in a process of its own, because the supervisor runs in this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(load, *arguments, **settings).result()


def _model() -> Classifier:
    return Classifier(network(NAME).module)


def _opened() -> LoadedModel:
    return LoadedModel(_model())


def _setup(folder: Path, **settings: object) -> ServerSetup:
    audit = folder / "audit"
    pool = settings.pop("pool", None)
    worker = ServingSetup(
        _opened,
        NAME,
        SHAPE,
        threads=1,
        limits=ConnectionLimits(max_latency_s=5.0),
        audit_key=AuditKey.of(audit),
        **settings,
    )
    return ServerSetup(worker, port=0, pool=pool, audit=audit)


@contextmanager
def _running(setup: ServerSetup) -> Iterator[Supervisor]:
    server = Supervisor(setup)
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@contextmanager
def _ours(folder: Path) -> Iterator[tuple[int, int]]:
    with _running(_setup(folder, set_name="file")) as server:
        yield server.address[1], server.status()["workers"][0]["pid"]


@contextmanager
def _bare() -> Iterator[tuple[int, int]]:
    listener = bound_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bare_server", NAME, str(port)], env=environment
    )
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/docs")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def _swapping(swaps: int, seconds: float) -> Cells:
    """Latency at half of the throughput without swaps and with them, and whether each answer is that of a set that
    served while the request was in progress.
    """
    x, _ = images("cifar10", IMAGES)
    messages = [prepared(image[None], PATH, binary=True) for image in x]
    with tempfile.TemporaryDirectory() as folder:
        live, expected = _pool(Path(folder) / "pool", x, swaps + 1)
        with _running(_setup(Path(folder), pool=live)) as server:
            port = server.address[1]
            _loaded(saturated, port, messages, connections=CONNECTIONS, seconds=1.0)
            full = _loaded(saturated, port, messages, connections=CONNECTIONS, seconds=seconds / 10)
            load = partial(_loaded, paced, port, messages, connections=CONNECTIONS, rate=full.per_second / 2)
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
        model = Classifier(network(NAME).module).eval().requires_grad_(False)
        torch.manual_seed(seed)
        for weight in model.net.parameters():
            weight.add_(0.05 * weight.std(correction=0) * torch.randn_like(weight))
        name = pool.add(dict(model.net.state_dict()), {})
        pool.admit(name, canary=canary(model, canaries))
        with torch.inference_mode():
            expected[name] = model(x)
    return LivePool(pool, _model, swaps_per_hour=10 * n), expected


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
