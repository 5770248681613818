"""The same assessment with worker processes and on a Ray cluster: time, driver, memory, and a node that is killed."""

import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import holdfast
from benchmarks.absent import Absent
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.batch import Batch
from holdfast.io.models.models import open_model
from holdfast.runs.engine.processes import Processes
from holdfast.runs.engine.ray_cluster import imported_ray
from holdfast.runs.engine.ray_tasks import RayTasks
from holdfast.runs.store.leases import TIMES

WHAT = (
    "the same assessment with two worker processes and with two tasks of Ray: columns that differ, time, the driver, "
    "memory, and a node that is killed"
)
HOW = {"threat": "linf:0.1", "n": 300, "batch_size": 50, "workers": 2}
MODEL, DATA, PAIRS = "mnist-cnn", "mnist-mini", 3
MB = 1_000_000
_ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)])}
_LARGE, _SMALL = 150, 1
"""Sizes in MB of the two models, and of the shards of two data sets, from which memory is computed."""


_BUSY = b"ray::measured"
"""Title that Ray gives a process while it measures a shard."""


def measured() -> Outcome:
    try:
        imported_ray()
        from ray.cluster_utils import Cluster
    except (holdfast_error(), ImportError) as error:
        raise Absent(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="holdfast-") as place, patch.dict(os.environ, _ENVIRONMENT):
        nodes = Cluster()
        try:
            nodes.add_node(num_cpus=2, object_store_memory=400 * MB, include_dashboard=False)
            return _measured(nodes, Path(place))
        finally:
            import ray

            ray.shutdown()
            nodes.shutdown()


def holdfast_error() -> type[Exception]:
    from holdfast.core.errors import HoldfastError

    return HoldfastError


def _measured(nodes: Any, place: Path) -> Outcome:
    import ray

    ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
    driver = _driver()
    killed = _killed(nodes, place)
    worker, shard = _worker_memory(place, "ray")
    own_model, own_shard = _worker_memory(place, "local")
    growth = _driver_memory()
    seconds, ratios = {"local": list[float](), "ray": list[float]()}, list[float]()
    for pair in range(PAIRS):
        for on in ("local", "ray") if pair % 2 == 0 else ("ray", "local"):
            begun = time.perf_counter()
            holdfast.assess(MODEL, DATA, suite="standard", on=on, run=place / f"{on}-{pair}", **HOW)
            seconds[on].append(time.perf_counter() - begun)
        ratios.append(seconds["ray"][-1] / seconds["local"][-1])
    equal = _columns(place / "local-0") == _columns(place / "ray-0")
    beside = killed["repeated shards"] - killed["shards that it was measuring"]
    table: list[Cells] = [
        {"what": "wall s, local", "value": [round(s, 1) for s in seconds["local"]]},
        {"what": "wall s, Ray", "value": [round(s, 1) for s in seconds["ray"]]},
        {"what": "CPU of the driver a shard of 0.0125 MB, local, ms", "value": round(driver["local"], 2)},
        {"what": "CPU of the driver a shard of 0.0125 MB, Ray, ms", "value": round(driver["ray"], 2)},
        {"what": "CPU of the driver a MB, Ray, ms", "value": round(driver["per MB"], 2)},
        *({"what": f"killed node: {name}", "value": value} for name, value in killed.items()),
        {
            "what": f"MB of a worker for each MB of a model of {_LARGE} MB, local",
            "value": round(own_model, 2),
        },
        {"what": f"MB of a worker for each MB of a model of {_LARGE} MB, Ray", "value": round(worker, 2)},
        {
            "what": f"MB of a worker for each MB of a shard of {_LARGE} MB, local",
            "value": round(own_shard, 2),
        },
        {"what": f"MB of a worker for each MB of a shard of {_LARGE} MB, Ray", "value": round(shard, 2)},
        {"what": "memory of the driver, four times the examples, MB more", "value": round(growth, 1)},
    ]
    claims = [
        Claim("median of Ray / local wall time <= 1.15", statistics.median(ratios), 1.15),
        Claim("differing files of columns <= 0", int(not equal), 0),
        Claim("driver's CPU a small shard beyond local, ms <= 5", driver["ray"] - driver["local"], 5.0),
        Claim("driver's CPU a MB, ms <= 1", driver["per MB"], 1.0),
        Claim("killed node: differing files <= 0", killed["differing files"], 0),
        Claim(
            "killed node: shards that it was measuring >= 1",
            killed["shards that it was measuring"],
            1,
            least=True,
        ),
        Claim("killed node: repeated shards beside those <= 0", beside, 0),
        Claim("killed node: repeated shards >= 1", killed["repeated shards"], 1, least=True),
        Claim("memory of a worker for the model, Ray / local <= 1.05", worker / own_model, 1.05),
        Claim("memory of a worker for its shard, Ray / local <= 1.05", shard / own_shard, 1.05),
        Claim("MB of the driver for four times the examples <= 20", growth, 20.0),
    ]
    return Outcome(
        table, claims, {**HOW, "model": MODEL, "data": DATA, "suite": "standard"}, {"seconds": seconds}
    )


def _columns(run: Path) -> dict[str, bytes]:
    """The columns of every stage."""
    return {path.name: path.read_bytes() for path in sorted(run.glob("*.safetensors"))}


@contextmanager
def _timed(kind: type, spent: list[float]) -> Iterator[None]:
    """Add the CPU time of this process in an executor, and the number of its shards, to `spent`."""
    original = kind.measure

    def measure(self: Any, *arguments: Any) -> Iterator[Any]:
        found, before = original(self, *arguments), time.process_time()
        for each in found:
            spent[0] += time.process_time() - before
            spent[1] += 1
            yield each
            before = time.process_time()
        spent[0] += time.process_time() - before

    with patch.object(kind, "measure", measure):
        yield


def _driver() -> dict[str, float]:
    """CPU of the driver for each shard in ms, and for each MB that is sent."""
    x, y = torch.rand(600, 1, 28, 28), torch.zeros(600, dtype=torch.int64)
    net = Flat()
    found = {}
    how = {"threat": "linf:0.1", "suite": [holdfast.attacks.PGD(steps=1)], "doubts": False, "workers": 2}
    for on, kind in (("local", Processes), ("ray", RayTasks)):
        spent = [0.0, 0.0]
        with _timed(kind, spent):
            holdfast.assess(net, (x, y), on=on, batch_size=4, **how)
        found[on] = 1000 * spent[0] / spent[1]
    spent, n = [0.0, 0.0], 20
    large = torch.rand(n * 4, 3, 724, 724)  # 25 MB a shard
    with _timed(RayTasks, spent):
        holdfast.assess(Flat(), (large, torch.zeros(n * 4, dtype=torch.int64)), on="ray", batch_size=4, **how)
    megabytes = spent[1] * 4 * 3 * 724 * 724 * 4 / MB
    found["per MB"] = max(0.0, (1000 * spent[0] - spent[1] * found["ray"]) / megabytes)
    return found


class Flat(torch.nn.Module):
    """A linear network on the first 784 inputs, with `extra` MB of weights that it does not use.

    It appends the anonymous memory of its process to the file `mark`, in MB.
    """

    def __init__(self, extra: int = 0, mark: str = "") -> None:
        super().__init__()
        self.linear = torch.nn.Linear(784, 10)
        with torch.no_grad():
            self.linear.bias[0] += (
                100  # no attack breaks an example, so that no adversarial inputs are columns
            )
        self.extra = torch.nn.Parameter(torch.ones(extra * MB // 4), requires_grad=False)
        self.mark = mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mark:
            with Path(self.mark).open("a") as file:
                file.write(f"{anonymous_mb()}\n")
        return self.linear(x.flatten(1)[:, :784])


def anonymous_mb() -> float:
    """Anonymous memory of this process in MB."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024 / MB


def _worker_memory(place: Path, on: str) -> tuple[float, float]:
    """MB of a worker for each MB of the model and of its shard, from two sizes of each."""

    def last(extra: int, side: int) -> float:
        mark = place / f"memory-{on}-{extra}-{side}"
        net = Flat(extra, str(mark))
        x, y = torch.zeros(2, side), torch.zeros(2, dtype=torch.int64)
        suite = [holdfast.attacks.PGD(steps=1)]
        how = {"threat": "linf:0.1", "suite": suite, "doubts": False, "workers": 1, "batch_size": 2}
        holdfast.assess(net, (x, y), on=on, **how)
        return min(float(line) for line in mark.read_text().split()[-3:])

    base = last(_SMALL, 1000)
    model = last(_LARGE, 1000)
    shard = last(_SMALL, _LARGE * MB // 8)
    return (model - base) / (_LARGE - _SMALL), (shard - base) / _LARGE


class Generated:
    """Examples that are computed when they are read, 3 MB a shard."""

    name, classes, digest = "generated", None, "0" * 64

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def read(self, start: int, stop: int) -> Batch:
        x = torch.full((stop - start, 3, 250, 250), 0.5)
        return Batch(x, torch.zeros(stop - start, dtype=torch.int64), torch.arange(start, stop))


def _driver_memory() -> float:
    """MB by which the largest memory of the driver grows if there are four times as many examples."""

    def most(n: int) -> float:
        found: list[float] = []
        original = RayTasks._tell

        def tell(self: RayTasks, *arguments: Any) -> None:
            found.append(anonymous_mb())
            original(self, *arguments)

        how = {"threat": "linf:0.1", "doubts": False, "workers": 2, "batch_size": 4}
        with patch.object(RayTasks, "_tell", tell):
            holdfast.assess(Flat(), Generated(n), suite=[holdfast.attacks.PGD(steps=1)], on="ray", **how)
        return max(found)

    most(100)
    few = most(200)
    return most(800) - few


class Fatal(torch.nn.Module):
    """A network that kills the node of the process `raylet` while it measures a shard there.

    It does so once the file `armed` exists in `folder`. From then on, workers of other nodes wait until the node is
    killed, so that a shard is certainly measured on it. The file `killed` then has the number of workers of the node
    that were measuring a shard.
    """

    def __init__(self, net: torch.nn.Module, raylet: int, folder: Path) -> None:
        super().__init__()
        self.net, self.raylet, self.folder, self.home = net, raylet, folder, os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        armed, killed = self.folder / "armed", self.folder / "killed"
        if os.getpid() != self.home and armed.exists() and not killed.exists():
            if os.getppid() == self.raylet:
                self.kill(killed)
            until = time.monotonic() + 60
            while not killed.exists() and time.monotonic() < until:
                time.sleep(0.02)
        return self.net(x)

    def kill(self, killed: Path) -> None:
        """Kill the node, its workers and this process, which is one of them."""
        workers = children(self.raylet)
        busy = [
            process for process in workers if Path(f"/proc/{process}/cmdline").read_bytes().startswith(_BUSY)
        ]
        killed.write_text(str(len(busy)))
        for process in (self.raylet, *(each for each in workers if each != os.getpid()), os.getpid()):
            os.kill(process, signal.SIGKILL)


def _killed(nodes: Any, place: Path) -> Cells:
    """What a run leaves on a cluster of three nodes of which one is killed while it measures a shard."""
    others = [nodes.add_node(num_cpus=1, object_store_memory=80 * MB) for _ in range(2)]
    nodes.wait_for_nodes()
    run, whole = place / "killed-run", place / "whole"
    net = Fatal(open_model(MODEL).model.net, others[0].all_processes["raylet"][0].process.pid, place)
    suite = [holdfast.attacks.PGD(steps=200)]
    how = {**HOW, "suite": suite, "doubts": False, "workers": 4, "batch_size": 20}
    original = RayTasks._tell

    def tell(self: RayTasks, stage: str, done: int, running: int) -> None:
        original(self, stage, done, running)
        if stage != "clean" and done == 3:
            (place / "armed").touch()

    with patch.object(RayTasks, "_tell", tell):
        holdfast.assess(net, DATA, on="ray", run=run, **how)
    holdfast.assess(net, DATA, on="local", run=whole, **{**how, "workers": 2})
    for node in others:
        nodes.remove_node(node, allow_graceful=False)
    one, other = _bytes(run), _bytes(whole)
    return {
        "shards": len(attempts(run)),
        "shards that it was measuring": int((place / "killed").read_text()),
        "repeated shards": repeated(run),
        "differing files": sum(one.get(name) != other.get(name) for name in one.keys() | other.keys()),
    }


def children(process: int) -> list[int]:
    """Processes that a process has started, such as the workers of a node."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == process:
                found.append(int(folder.name))
    return found


def _bytes(run: Path) -> dict[str, bytes]:
    beside = {"about.json", "times.jsonl", "lease.lock"}
    return {
        path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name not in beside
    }


def attempts(run: Path) -> dict[tuple[str, int], int]:
    """Number of attempts at each shard."""
    found = Counter[tuple[str, int]]()
    for line in filter(None, (run / TIMES).read_text().split("\n")):
        content = json.loads(line)
        found[content["stage"], content["shard"]] += content["attempts"]
    return found


def repeated(run: Path) -> int:
    """Number of attempts beyond the first of each shard."""
    return sum(n - 1 for n in attempts(run).values())
