"""Twenty minutes of `holdfast serve` with two workers, one of which is killed each minute.

`python -m benchmarks.rows.soak SECONDS` is a trial without a record, with shorter minutes and a smaller state.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from benchmarks.guarded import calibrate, environment, fill, holdfast
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.retrying import KINDS, Received, steady, traffic
from holdfast.guard.detectors.queries import StateLimits
from holdfast.server.audit_chain import AuditKey
from holdfast.server.audit_folder import VerifiedAudit, verify_audit
from holdfast.server.keys import add_key

WHAT = (
    "20 minutes of holdfast serve: clients that retry, a worker killed each minute, audit records and memory"
)
NAME, SHAPE, DATA = "cifar_resnet20", (3, 32, 32), "cifar10"
SECONDS, MINUTE, WORKERS, CLIENTS, CONNECTIONS, RATE, SEED = 1200.0, 60.0, 2, 20, 8, 40.0, 0
SENT = 50_000
"""training images of which the requests are made"""
FILLED = 420_000
"""inputs that the query detector has seen before, more than its state stores"""
SAMPLED_S, WARM, COMPARED = 5.0, 5, (0.5, 1.0)
"""Seconds between two samples of the memory, minutes after which the supervisor must not grow, and the age in minutes
at which early and late workers are compared."""
SETTLED, MOST_GROWTH, MOST_SLOPE = 2.0, 1.05, 1.5
"""Age of a worker in minutes from which it must not grow, as its cache of the state is then filled; the largest ratio
of late to early memory; and the largest growth in MiB a minute, which is 5 % in ten minutes."""
_ENDS = ("answered", "failed", "interrupted")


def measured() -> Outcome:
    return outcome(SECONDS, MINUTE, FILLED)


def outcome(seconds: float, minute: float, filled: int) -> Outcome:
    """The row with so many seconds, minutes of so many seconds, and so many inputs in the state before the first
    request.
    """
    x, _ = images(DATA, SENT, "train")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrate(folder, NAME)
        fill(folder, x, filled)
        keys = [
            add_key(folder / "keys.json", f"client {k}", ["infer"], rate=1000.0, budget=10**9)
            for k in range(CLIENTS)
        ]
        admin = add_key(folder / "keys.json", "operator", ["admin"])
        audit_key = AuditKey.of(folder / "audit")
        with _server(folder) as server:
            watch = _Watch(server, admin, folder, minute)
            watch.begin(seconds)
            load = steady(
                server.port,
                traffic(x, f"/v2/models/{NAME}/infer", keys, SEED),
                connections=CONNECTIONS,
                seconds=seconds,
                rate=RATE,
                digest=audit_key.digest,
            )
            received = asyncio.run(load)
            watch.end()
        verified, ends = verify_audit(folder / "audit"), _ends(folder / "audit")
        sizes = {"state MB": _megabytes(folder.glob("guard-state.sqlite*")),
                 "audit MB": _megabytes((folder / "audit").glob("*.jsonl"))}  # fmt: skip
        missing = Counter(received.answered) - ends.answered
    return _judged(received, watch, verified, ends, missing.total(), sizes, seconds, minute, filled, server)


# --- the server


@dataclass(eq=False)
class _Process:
    """A running `holdfast serve`."""

    process: "subprocess.Popen[str]"
    port: int = 0
    admin_port: int = 0
    messages: list[str] = field(default_factory=list)


@contextmanager
def _server(folder: Path) -> Iterator[_Process]:
    options = {"guard": "guard.yaml", "keys": "keys.json", "audit": "audit", "workers": WORKERS, "name": NAME,
               "port": 0, "admin-port": 0, "input-shape": ",".join(map(str, SHAPE))}  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(
        holdfast("serve", "net.py:make", *words),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = _Process(process)
    reader = threading.Thread(target=_read, args=(server,))
    reader.start()
    try:
        while not server.admin_port:
            if process.poll() is not None:
                raise RuntimeError("\n".join(server.messages))
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        reader.join()


def _read(server: _Process) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.messages.append(line.rstrip())
        if (served := re.search(r"serving http://[^/]*:(\d+)/", line)) is not None:
            server.port = int(served[1])
        elif (metrics := re.search(r"metrics: http://[^/]*:(\d+)/", line)) is not None:
            server.admin_port = int(metrics[1])


# --- memory, and workers that are killed


@dataclass(eq=False)
class _Watch:
    """Samples the memory of all processes, and kills one worker in each minute."""

    server: _Process
    key: str
    folder: Path
    minute: float
    killed: list[str] = field(default_factory=list)
    supervisor: list[tuple[float, float]] = field(default_factory=list)
    """seconds since the beginning, and resident MiB"""
    workers: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    """by name of a worker: seconds since the beginning, its age in seconds, and resident MiB"""
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, seconds: float) -> None:
        """Begin to sample and to kill for so many seconds."""
        self._begin = time.perf_counter()
        self._threads = [
            threading.Thread(target=self._sample),
            threading.Thread(target=self._kill, args=(seconds,)),
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """End both threads."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _get(self, path: str) -> httpx.Response:
        url = f"http://127.0.0.1:{self.server.admin_port}{path}"
        return httpx.get(url, headers={"authorization": f"Bearer {self.key}"}, timeout=30.0)

    def _ready(self) -> dict[str, int]:
        workers: list[dict[str, Any]] = self._get("/status").json()["workers"]
        return {worker["name"]: worker["pid"] for worker in workers if worker["started"]}

    def _sample(self) -> None:
        period = SAMPLED_S * self.minute / MINUTE
        while not self._over.wait(period):
            self._get("/metrics").raise_for_status()
            now = time.perf_counter() - self._begin
            self.supervisor.append((now, _resident(self.server.process.pid)))
            for name, pid in self._ready().items():
                with suppress(OSError):  # it was killed since
                    self.workers.setdefault(name, []).append((now, _age_s(pid), _resident(pid)))

    def _kill(self, seconds: float) -> None:
        rng = random.Random(SEED)
        for k in range(int(seconds / self.minute)):
            at = self._begin + (k + rng.random()) * self.minute
            if self._over.wait(max(0.0, at - time.perf_counter())):
                return
            while not (ready := self._ready()):
                time.sleep(0.1)
            name = rng.choice(sorted(ready))
            with suppress(ProcessLookupError):
                os.kill(ready[name], signal.SIGKILL)
                self.killed.append(name)


def _resident(pid: int) -> float:
    """Resident MiB of a process, from Linux's /proc."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line)
    return int(line.split()[1]) / 1024


def _age_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _megabytes(files: Iterator[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


# --- the audit


@dataclass
class _Ends:
    """How the requests in the audit ended."""

    started: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """number of requests by the kind of their end, and its status"""
    unended: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    """digests of the inputs of requests with status 200"""


def _ends(audit: Path) -> _Ends:
    """Count the ends of all started requests, independently of `verify_audit`."""
    ends = _Ends()
    for file in sorted(audit.glob("*.worker-*.jsonl")):
        pending: dict[str, str] = {}
        for line in file.read_text().splitlines():
            content = json.loads(line)["content"]
            if content["kind"] == "started":
                pending[content["request"]] = content["digest"]
                ends.started += 1
            elif content["kind"] in _ENDS:
                digest, status = pending.pop(content["request"]), content.get("status", "")
                ends.kinds[f"{content['kind']} {status}".strip()] += 1
                if status == 200:
                    ends.answered[digest] += 1
        ends.unended += len(pending)
    return ends


# --- the outcome


def _judged(
    received: Received, watch: _Watch, verified: VerifiedAudit, ends: _Ends, missing: int, sizes: dict[str, float],
    seconds: float, minute: float, filled: int, server: _Process,
) -> Outcome:  # fmt: skip
    kills = int(seconds / minute)
    failed = sum(n for kind, n in ends.kinds.items() if kind.startswith("failed"))
    claims = [
        Claim("requests without an expected response after retries <= 0", len(received.failures), 0),
        Claim(f"killed workers >= {kills}", len(watch.killed), kills, least=True),
        Claim("started audit records without an end <= 0", ends.unended + verified.open, 0),
        Claim("audit records that ended as failed <= 0", failed, 0),
        Claim("answers that the audit does not contain <= 0", missing, 0),
        Claim("responses 503 without Retry-After <= 0", received.without_retry_after, 0),
        Claim("exit code of the server <= 0", abs(server.process.returncode), 0),
    ]
    memory, memory_claims = _memory(watch, seconds, minute)
    requests = sum(received.statuses.values())
    table: list[Cells] = [
        {"what": "requests", "value": requests},
        *({"what": f"requests, {name}", "value": n} for name, n in sorted(received.statuses.items())),
        {"what": "connection errors, after which a request was sent again", "value": received.connection_errors},
        {"what": "no response in 30 s, after which a request was sent again", "value": received.timeouts},
        {"what": "503, after which a request was sent again", "value": received.unavailable},
        {"what": "latency with retries: p50, p99, largest, ms",
         "value": ", ".join(f"{received.quantile(q):.1f}" for q in (0.5, 0.99, 1.0))},
        {"what": "killed workers", "value": len(watch.killed)},
        {"what": "audit: requests started", "value": ends.started},
        *({"what": f"audit: {kind}", "value": n} for kind, n in sorted(ends.kinds.items())),
        {"what": "audit: chains, records", "value": f"{verified.chains}, {verified.records}"},
        *({"what": f"size at the end: {name}", "value": round(value, 1)} for name, value in sizes.items()),
        *memory,
    ]  # fmt: skip
    limits = StateLimits()
    config: Cells = {
        "network": NAME, "seconds": seconds, "minute": minute, "workers": WORKERS, "threads a worker": 1,
        "rules": "schema, queries (SQLite), energy; mode enforce", "audit": "on", "keys": CLIENTS,
        "requests a second": RATE, "connections": CONNECTIONS, "traffic": KINDS, "seed": SEED,
        "inputs in the state before": filled,
        "limits of the state": f"{limits.clusters} clusters, {limits.digests} digests",
    }  # fmt: skip
    detail: Cells = {
        "killed": watch.killed,
        "failures": received.failures,
        "messages of the server": server.messages,
        "supervisor": [[round(t, 1), round(m, 2)] for t, m in watch.supervisor],
        "workers": {
            name: [[round(v, 2) for v in each] for each in kept] for name, kept in watch.workers.items()
        },
    }
    notes = [
        "status 422: refused by the guard; 400: invalid content, which is refused before the audit",
        "the state of the query detector is full from the beginning, so that each new cluster replaces an old one",
    ]
    return Outcome(table, [*claims, *memory_claims], config, detail, notes)


def _memory(watch: _Watch, seconds: float, minute: float) -> tuple[list[Cells], list[Claim]]:
    """Growth of the supervisor, of workers of equal age, and of each worker with its age."""
    early = [m for t, m in watch.supervisor if WARM * minute <= t < (WARM + 1) * minute]
    late = [m for t, m in watch.supervisor if t >= seconds - minute]
    ages = [(age / minute, m, t) for kept in watch.workers.values() for t, age, m in kept]
    equal = [(t, m) for age, m, t in ages if COMPARED[0] <= age < COMPARED[1]]
    halves = [[m for t, m in equal if (t < seconds / 2) == first] for first in (True, False)]
    slope = slope_of(
        [[(age / 60, m) for _, age, m in kept if age >= SETTLED * minute] for kept in watch.workers.values()]
    )
    rows: list[Cells] = []
    claims: list[Claim] = []
    if early and late:
        rows.append(_compared(f"supervisor, MiB: minute {WARM}, last minute", early, late))
        claims.append(_growth(f"supervisor: last minute / minute {WARM}", early, late))
    if all(halves):
        what = f"{COMPARED[0]:g} to {COMPARED[1]:g} minutes old"
        rows.append(_compared(f"workers {what}, MiB: first half, second half", *halves))
        claims.append(_growth(f"workers {what}: second half / first half", *halves))
    if slope is not None:
        oldest = max(age for age, _, _ in ages)
        rows.append(
            {"what": f"growth of a worker after {SETTLED:g} minutes, MiB a minute", "value": round(slope, 3)}
        )
        rows.append({"what": "age of the oldest worker, minutes", "value": round(oldest, 1)})
        claims.append(
            Claim(
                f"growth of a worker after {SETTLED:g} minutes, MiB a minute <= {MOST_SLOPE:g}",
                slope,
                MOST_SLOPE,
            )
        )
    return rows, claims


def _compared(what: str, early: Sequence[float], late: Sequence[float]) -> Cells:
    return {"what": what, "value": f"{median(early):.1f}, {median(late):.1f}"}


def _growth(what: str, early: Sequence[float], late: Sequence[float]) -> Claim:
    return Claim(f"memory of {what} <= {MOST_GROWTH:g}", median(late) / median(early), MOST_GROWTH)


def slope_of(series: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """The common slope of several series of points, each with an intercept of its own, by least squares; None if no
    series has two points.
    """
    centred = [np.array(points) - np.mean(points, 0) for points in series if len(points) > 1]
    if not centred:
        return None
    x, y = np.concatenate(centred).T
    return float(x @ y / (x @ x))


def main() -> None:
    """Print the outcome of a trial with ten minutes in the given seconds."""
    seconds = float(sys.argv[1])
    found = outcome(seconds, seconds / 10, 5000)
    print(
        json.dumps([found.table, found.detail["messages of the server"], found.detail["failures"]], indent=1)
    )
    for claim in found.claims:
        print("met   " if claim.met else "MISSED", f"{claim.text}: {claim.value:.4g}")


if __name__ == "__main__":
    main()
