"""Servers beside each other: Holdfast with and without a guard, bare FastAPI, and LitServe."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import numpy as np
from torch import Tensor

from benchmarks.load import Seen, cpu_s, posted, prepared, saturated
from benchmarks.networks import ROOT
from benchmarks.peers import server_python
from benchmarks.record import Cells
from benchmarks.retrying import collage
from holdfast.server.messages import bound_socket

PATH_OF_LITSERVE = "/infer"
MOST_PER_SECOND = {"JSON": 900, "binary": 1500}
"""Different requests to ResNet-20 that are prepared for each second of a round."""
_RAW = {"content-type": "application/octet-stream"}
Loaded = Callable[..., Seen]


@dataclass(frozen=True)
class Contestant:
    """A running server: its port, the processes whose CPU time counts, and its form of requests."""

    port: int
    pids: tuple[int, ...]
    path: str
    raw: bool = False
    """whether a binary request is the bytes of an image alone"""

    def message(self, image: Tensor, form: str) -> bytes:
        """A request with an image (channels, height, width)."""
        if form == "binary" and self.raw:
            return posted(self.path, image.numpy().astype("<f4").tobytes(), _RAW)
        return prepared(image[None], self.path, binary=form == "binary")


def alternated(
    servers: dict[str, Contestant],
    x: Tensor,
    form: str,
    *,
    seconds: float,
    rounds: int,
    connections: int,
    loaded: Loaded,
    most_per_second: Mapping[str, int] = MOST_PER_SECOND,
) -> dict[str, Cells]:
    """Numbers of each round of each server. All servers receive the same images in a round, and none twice; the order
    of the servers is that of the dictionary and the reverse in turn.
    """
    rng = np.random.default_rng(0)
    found: dict[str, Cells] = {
        who: {key: [] for key in ("per_second", "cpu_ms", "p50_ms", "p99_ms", "failed")} for who in servers
    }
    for k in range(-1, rounds):  # the first one is not counted
        length = seconds if k >= 0 else min(1.0, seconds)
        sent = collage(x, rng, round(most_per_second[form] * length))
        prepared_for: dict[tuple[str, bool], list[bytes]] = {}
        for who in list(servers) if k % 2 == 0 else list(servers)[::-1]:
            server, numbers = servers[who], found[who]
            kind = server.path, server.raw
            if kind not in prepared_for:
                prepared_for[kind] = [server.message(image, form) for image in sent]
            messages = prepared_for[kind]
            before = sum(map(cpu_s, server.pids))
            seen = loaded(saturated, server.port, messages, connections=connections, seconds=length)
            if k < 0:
                continue
            numbers["cpu_ms"].append(1000 * (sum(map(cpu_s, server.pids)) - before) / len(seen.taken_s))
            numbers["per_second"].append(seen.per_second)
            numbers["p50_ms"].append(seen.quantile(0.5))
            numbers["p99_ms"].append(seen.quantile(0.99))
            numbers["failed"].append(seen.failed)
    return found


def cells(who: str, numbers: Cells) -> Cells:
    """A line of the table with the medians of the rounds."""
    return {
        "who": who,
        "requests / s": round(median(numbers["per_second"]), 1),
        "server CPU ms a request": round(median(numbers["cpu_ms"]), 3),
        "p50 ms": round(median(numbers["p50_ms"]), 1),
        "p99 ms": round(median(numbers["p99_ms"]), 1),
        "failed": sum(numbers["failed"]),
    }


def ratio(numbers: Cells, others: Cells) -> float:
    """Median over the rounds of the throughput of a server divided by that of another one."""
    pairs = zip(numbers["per_second"], others["per_second"], strict=True)
    return median(mine / theirs for mine, theirs in pairs)


def cpu_ratio(numbers: Cells, others: Cells) -> float:
    """Median over the rounds of the requests per CPU second of a server divided by that of another one."""
    pairs = zip(numbers["cpu_ms"], others["cpu_ms"], strict=True)
    return median(theirs / mine for mine, theirs in pairs)


@contextmanager
def bare(name: str, path: str, calls: str = "batches") -> Iterator[Contestant]:
    """Bare FastAPI with a network, which is called with `batches` or with single `requests`."""
    words = [sys.executable, "-m", "benchmarks.bare_server", name]
    with _started(words, (calls,), "/docs") as (port, process):
        yield Contestant(port, (process.pid,), path)


@contextmanager
def litserve(name: str, form: str) -> Iterator[Contestant]:
    """LitServe with a network, which answers requests of one form. Raises `Absent` where it is not installed."""
    words = [str(server_python("litserve")), "-m", "benchmarks.lit_server", name]
    last = ("json" if form == "JSON" else "raw",)
    with _started(words, last, "/health") as (port, process):
        yield Contestant(port, _of_session(process.pid), PATH_OF_LITSERVE, raw=True)


@contextmanager
def _started(
    words: list[str], last: tuple[str, ...], ready: str
) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """A server that is started with `words`, a free port and `last`, in a session of its own, once it answers."""
    listener = bound_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([*words, str(port), *last], cwd=ROOT, env=environment, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}{ready}", process)
        yield port, process
    finally:
        for pid in _of_session(process.pid):
            os.kill(pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in _of_session(process.pid):
                os.kill(pid, 9)
            process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server of {url} does not answer")


def _of_session(session: int) -> tuple[int, ...]:
    """The processes of a session, from Linux's /proc."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended since
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                pids.append(int(folder.name))
    return tuple(pids)
