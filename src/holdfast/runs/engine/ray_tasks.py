"""Executor that measures the shards of a stage as tasks of a Ray cluster.

The process of the run sends each task and stores the returned columns; workers write no files. A worker keeps the model
open from one shard to the next (`ray_worker.py`).
"""

import ctypes
import json
import math
import pickle
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError

from holdfast.core.errors import RESUME, Remedy, TargetError, failure_from_json
from holdfast.core.evidence import Columns, Seconds
from holdfast.runs.engine import ray_node
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.runs.engine.ray_cluster import NODES, Cluster, RayOptions, connected, full
from holdfast.runs.engine.ray_worker import LENGTH
from holdfast.runs.engine.run import DEATHS, ERRORS, Moved, Run, Stopwatch, Task

_RECORDED = ("torch build", "threads", "device", "code")
_INLINE = 100_000
"""Largest number of bytes of examples that are part of the task itself."""
_TRIMMED = 64_000_000
"""Bytes of examples after which freed memory is returned to the operating system."""
_WAIT_S = 0.5
_NOTICED_S = 20.0
"""Seconds after which Ray has noticed that a node is dead: 5 s and then five checks every 3 s."""
_FETCHED_S = 30.0
"""Seconds in which a node must be able to fetch an object of this process."""
_REACH = "look whether all nodes of the cluster reach this machine and have the same token, or remove those that do not"
_LOOKED_S = 10.0
"""Interval in seconds at which the CPUs of the cluster are counted while no shard is finished."""


Dumps = Callable[[Any], bytes]
"""Function that pickles an object."""


_MIXED_NODES = Remedy(
    "mixed_nodes",
    True,
    function="Ray",
    reason="(the last bits of results may then depend on the node, which the evidence states)",
)


def _longer(timeout_s: float) -> Remedy:
    """Return the argument with which a cluster is waited for longer."""
    return Remedy("timeout", f"{2 * timeout_s:g}s", function="Ray")


@dataclass
class RayTasks:
    """Executor with at most `size` tasks at a time, each with one CPU. `send` adds the examples to a task."""

    cluster: Cluster
    setup: bytes
    """the pickled setup, which each worker opens once"""
    size: int
    device: str
    options: RayOptions
    send: Callable[[Task], Any]
    """function that returns what is sent for a task"""
    paths: tuple[str, ...] = ()
    """import path of this process, if the workers are on the same machine"""
    notify: Notify = ignore
    detail: Notify = ignore
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """reports of the nodes, by name"""
    _expected: dict[str, str] = field(default_factory=dict)
    _reference: Any = None
    _lost: Counter[tuple[str, int]] = field(default_factory=Counter)
    _unfetched: dict[tuple[str, int], float] = field(default_factory=dict)
    """when a worker could not fetch the model for a shard for the first time"""
    _failed: int = 0
    _sent: int = 0
    """bytes of examples that were sent since freed memory was returned"""

    def prepare(self) -> None:
        """Wait for enough CPUs, compare the nodes with this process, and store the setup in the cluster."""
        here = ray_node.report((), self.device)
        self._expected = {name: str(here[name]) for name in (*ray_node.STRICT, "torch build", "code")}
        self._expected["threads"] = "1"
        if "device" in here:  # otherwise the first node that measures a shard determines it
            self._expected["device"] = here["device"]
        self._wait_for_cpus()
        self._compare_nodes()
        self._reference = self.cluster.put(self.setup)

    def measure(
        self, run: Run, stage: str, tasks: Mapping[int, Task], until: float, moved: Moved
    ) -> Iterator[tuple[int, Columns]]:
        """Yield each shard with its columns after a worker has measured it and it is stored.

        After the deadline `until`, no further shard is started. If the run ends, the running tasks are cancelled.
        """
        waiting, running, done = deque(tasks), dict[Any, int](), 0
        # wall time is that of all workers, and is stored once
        stopwatch = Stopwatch(run.store, stage, next(iter(tasks)), cpu=False)
        looked_at = time.monotonic()
        try:
            while True:
                if time.perf_counter() >= until:
                    waiting.clear()
                while waiting and len(running) < self.size:
                    shard = waiting.popleft()
                    running[self._submit(run, stage, shard, tasks[shard], until)] = shard
                if not running:
                    break
                for reference in self.cluster.finished([*running], _WAIT_S):
                    looked_at = time.monotonic()
                    shard = running.pop(reference)
                    columns, again = self._received(self.cluster.result(reference), run, stage, shard)
                    if again:
                        self._failed += 1
                        waiting.appendleft(shard)
                    done += columns is not None
                    self.detail(
                        f"{stage}: {done} shards done, {len(running)} running, {self._failed} failed and repeated"
                    )
                    if columns is not None:
                        run.keep(stage, shard, columns)
                        yield shard, columns
                stopwatch.tick()
                if time.monotonic() - looked_at > _LOOKED_S:
                    self._wait_for_cpus(least=1)
                    looked_at = time.monotonic()
        finally:
            self.cluster.cancel([*running])
        stopwatch.tick(least=0.0)

    def pause(self) -> None:
        """Do nothing. Other executors stop their worker processes here, but those of a cluster are managed by Ray."""

    def _submit(self, run: Run, stage: str, shard: int, task: Task, until: float) -> Any:
        run.store.begin(stage, shard)
        room, buffers = run.room(stage, shard), list[pickle.PickleBuffer]()
        left_s = until - time.perf_counter()
        sent = self.send(task), room.size, dict(room.known), left_s
        content = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
        arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        expected = {name: self._expected[name] for name in ray_node.STRICT}
        n_bytes = sum(array.nbytes for array in arrays)
        large = n_bytes > _INLINE
        self._sent += n_bytes
        if self._sent > _TRIMMED:
            self._sent = 0
            return_freed_memory()
        # an argument of Ray may live until the next collection of garbage, and an object only as long as its task
        sent_arrays = [self.cluster.put(arrays)] if large else arrays
        arguments = (expected, self.paths, self.device, [self._reference], content, sent_arrays, large)
        gpus = self.options.gpus_per_worker or 0
        return self.cluster.submit(
            ray_node.measured, arguments, num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD"
        )

    def _received(self, answer: bytes | str, run: Run, stage: str, shard: int) -> tuple[Columns | None, bool]:
        """Return the columns of a shard, or None and whether it is measured again.

        Raises the error that a worker reports, and `TargetError` if the shard cannot be measured.
        """
        first, last = run.shards[shard]
        place = f"shard {shard} of {stage} (examples {first} to {last - 1})"
        if isinstance(answer, str):
            return None, self._again(answer, run, stage, shard, place)
        try:
            kind, header, columns = _parsed(answer)
            if kind == b"N":
                self._refuse_node(header)
            self._refuse_node(header["node"])
            node, splits, cpu_s = header["node"]["node"], header["splits"], float(header["cpu_s"])
            start = f"{place}, on node {node}: "
            failure = failure_from_json(header, ERRORS, start) if kind == b"E" else None
        except (ValueError, KeyError, TypeError, struct.error, SafetensorError) as error:
            raise TargetError(
                f"a worker returned something else than a result of Holdfast for {place} ({type(error).__name__}: "
                f"{error}); look for a node with another version of Holdfast"
            ) from error
        if failure is not None:
            raise failure
        for split in splits:
            run.split(stage, shard, split["row"], split["size"])
        run.store.spend(stage, shard, Seconds(cpu_s, 0.0), done=False)
        if columns is not None:
            self._record(run, header["node"])
        return columns, False

    def _again(self, failure: str, run: Run, stage: str, shard: int, place: str) -> bool:
        """Return whether a shard whose task failed is measured again. Raises `TargetError` if not."""
        if failure == "memory":
            first, last = run.shards[shard]
            size = min(run.room(stage, shard).enter(0), last - first)
            if size == 1:
                raise TargetError(
                    f"memory of a node ran out on {place} with one example at a time; give the nodes more memory, or "
                    "start fewer workers on each"
                )
            run.split(stage, shard, 0, size // 2)
            return True
        if failure == "full":
            raise full()
        if failure == "cancelled":
            raise TargetError(f"{place} was cancelled in the cluster", RESUME)
        if failure == "error":
            raise TargetError(
                f"a worker ended {place} with an error; look for it in the logs of Ray on the node, and whether "
                "Holdfast is installed on all nodes"
            )
        if failure == "unfetched":
            self._store_again(stage, shard, place)
            return True
        self._lost[stage, shard] += 1
        if self._lost[stage, shard] >= DEATHS:
            raise TargetError(
                f"a worker was lost {DEATHS} times on {place}; if memory ran out, start fewer workers on each node, "
                "or use smaller batches"
            )
        return True

    def _store_again(self, stage: str, shard: int, place: str) -> None:
        """Store the setup again, after a worker could not fetch it. Raises `TargetError` if this takes too long."""
        begun = self._unfetched.setdefault((stage, shard), time.monotonic())
        if time.monotonic() - begun > _FETCHED_S:
            raise TargetError(f"workers could not fetch the model for {place} in {_FETCHED_S:g} s; {_REACH}")
        time.sleep(_WAIT_S)
        self._reference = self.cluster.put(self.setup)  # a node does not fetch the same object again

    def _refuse_node(self, report: dict[str, Any]) -> None:
        """Raise `TargetError` for a node that differs from this process, or from the nodes before it in its device.

        With `mixed_nodes`, only other versions are refused.
        """
        name = str(report["node"])
        if self.nodes.get(name) == report:
            return
        if "device" in report and "device" not in self._expected:
            self._expected["device"] = report["device"]
        # before the first task, a node with GPUs for workers reports no device, because the report has no GPU
        without_device = bool(self.options.gpus_per_worker) and "device" not in report
        differing = {
            key: report.get(key)
            for key, value in self._expected.items()
            if report.get(key) != value and not (key == "device" and without_device)
        }
        known = {key: value for key, value in differing.items() if key in ray_node.STRICT}
        refused = known if self.options.mixed_nodes else differing
        if refused:
            shown = "; ".join(f"{key} {value}, not {self._expected[key]}" for key, value in refused.items())
            way_out = "install the same versions on all nodes" if known else "remove it from the cluster"
            mixed = () if known else (_MIXED_NODES,)
            raise TargetError(f"node {name} differs ({shown}): {way_out}", *mixed)
        self.nodes[name] = report

    def _record(self, run: Run, report: Mapping[str, Any]) -> None:
        """Record the properties of a node that measured a shard, if they differ from those of this process."""
        properties = {name: str(report.get(name)) for name in _RECORDED}
        if all(properties[name] == self._expected.get(name) for name in _RECORDED):
            return
        stored = run.store.document(NODES)
        known = [] if stored is None else [*stored["nodes"]]
        if properties not in known:
            run.record(NODES, {"nodes": [*known, properties]})

    def _compare_nodes(self) -> None:
        """Compare the versions of all nodes with those of this process, before the first task.

        A node that does not report them is skipped if it is dead, and otherwise refused. A node that cannot fetch an
        object of this process is asked again for a while.
        """
        tasks = {self._report_of(node): node for node in self.cluster.nodes()}
        begun, failed_at = time.monotonic(), dict[str, float]()
        while tasks:
            for reference in self.cluster.finished([*tasks], _WAIT_S):
                node, answer = tasks.pop(reference), self.cluster.result(reference)
                if isinstance(answer, bytes):
                    self._refuse_node(json.loads(answer[1:]))
                    continue
                name = node["NodeID"]
                if not any(each["NodeID"] == name for each in self.cluster.nodes()):
                    continue
                patience_s = _FETCHED_S if answer == "unfetched" else _NOTICED_S
                if time.monotonic() - failed_at.setdefault(name, time.monotonic()) > patience_s:
                    shown = f"node {node.get('NodeManagerHostname', '')} ({name[:12]})"
                    if answer == "unfetched":
                        raise TargetError(
                            f"{shown} could not fetch an object of this process in {_FETCHED_S:g} s; {_REACH}"
                        )
                    raise TargetError(
                        f"{shown} does not report its versions (its task is {answer}); look at the logs of Ray on it, "
                        "or remove it from the cluster"
                    )
                time.sleep(1.0)
                tasks[self._report_of(node)] = node
            if tasks and time.monotonic() - begun > self.options.timeout_s:
                raise TargetError(
                    f"{len(tasks)} nodes did not report their versions in {self.options.timeout_s:g} s; look at the "
                    "logs of Ray",
                    _longer(self.options.timeout_s),
                )

    def _report_of(self, node: Mapping[str, Any]) -> Any:
        """Start the task that reports the versions of a node, and return its reference."""
        device = "" if self.options.gpus_per_worker else self.device  # a task without GPU sees none
        place = on_node(node["NodeID"])
        arguments = (self.paths, device, [self.cluster.put(b"")])
        return self.cluster.submit(ray_node.report_as_bytes, arguments, num_cpus=0, scheduling_strategy=place)

    def _wait_for_cpus(self, least: int | None = None) -> None:
        """Wait until the cluster has as many CPUs and GPUs as the workers need, or at least as many as `least`."""
        wanted = self.size if least is None else least
        needs = {"CPU": float(wanted), "GPU": wanted * (self.options.gpus_per_worker or 0.0)}
        begun, said = time.monotonic(), False
        while missing := {name: n for name, n in needs.items() if self.cluster.total(name) < n - 1e-6}:
            shown = ", ".join(f"{self.cluster.total(name):g} of {n:g} {name}s" for name, n in missing.items())
            left_s = self.options.timeout_s - (time.monotonic() - begun)
            if left_s <= 0:
                raise TargetError(
                    f"the Ray cluster has {shown} that {self.size} workers need, after {self.options.timeout_s:g} s; "
                    "use fewer workers, or add nodes",
                    _longer(self.options.timeout_s),
                )
            if not said:
                self.notify(
                    f"the Ray cluster has {shown} that {self.size} workers need; waiting for more, at most "
                    f"{math.ceil(left_s)} s"
                )
                said = True
            time.sleep(min(1.0, left_s))


def _parsed(answer: bytes) -> tuple[bytes, dict[str, Any], Columns | None]:
    """Return the letter, the header and the columns of a result. Raises errors of several classes for other bytes."""
    kind, content = answer[:1], answer[1:]
    if kind == b"N":
        return kind, dict(json.loads(content)), None
    head = LENGTH.size + LENGTH.unpack(content[: LENGTH.size])[0]
    header = dict(json.loads(content[LENGTH.size : head]))
    return kind, header, safetensors.torch.load(content[head:]) if kind == b"C" else None


def return_freed_memory() -> None:
    """Return memory that was freed to the operating system, where the C library is glibc.

    The columns of finished shards lie between the freed examples of others, so that glibc keeps and does not reuse that
    memory: this process grew by all examples that it had sent.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    trim(0)


def on_node(node: str) -> Any:
    """Return the scheduling strategy of a task that runs on one node only."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


@contextmanager
def ray_tasks(
    setup: Callable[[Dumps], bytes],
    send: Callable[[Task], Any],
    size: int,
    device: str,
    options: RayOptions,
    *,
    paths: tuple[str, ...] = (),
    notify: Notify = ignore,
    detail: Notify = ignore,
) -> Iterator[RayTasks]:
    """Context manager that yields an executor on a Ray cluster, after its nodes were compared with this process.

    `setup` is a function of the pickling function of Ray that returns what each worker opens.
    """
    with connected(options, size, detail=detail) as cluster:
        known = paths if cluster.local else ()
        content = setup(cluster.ray.cloudpickle.dumps)
        executor = RayTasks(cluster, content, size, device, options, send, known, notify, detail)
        executor.prepare()
        yield executor
