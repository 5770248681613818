"""A worker process that measures shards of a run, posted by the main process (`team.py`) under its lease.

It ends when its standard input is closed, which happens at any end of the main process.
"""

import contextlib
import json
import math
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.core.batch import Data
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.harness import Plan, Seconds, Target, ready
from holdfast.runs.assembling import counted
from holdfast.runs.course import Course, OutOfTime
from holdfast.runs.keeping import InFolder
from holdfast.runs.order import Opening, silent
from holdfast.runs.preparing import model_digest, readied
from holdfast.runs.seconding import with_surrogates
from holdfast.runs.signals import Stopper
from holdfast.store.folder import RunFolder, joined
from holdfast.store.leases import Task
from holdfast.store.processes import Owner

_LOOKS_AGAIN_S = 0.02


@dataclass(frozen=True)
class Job:
    """The settings that a worker receives."""

    opening: Opening
    """opens the model, the data and the surrogates"""
    digests: Mapping[str, Any]
    """digests of these in the run"""
    plan: Plan
    """without surrogates, which the worker prepares itself"""
    device: str
    run: Path
    owner: Owner
    """identity of the process with the lease"""


@dataclass(frozen=True)
class _Shared(InFolder):
    """A run folder that does not record wall time, which the main process records once for all workers."""

    def spend(self, stage: str, shard: int, seconds: Seconds, *, done: bool) -> None:
        """Add to the CPU time of a shard."""
        super().spend(stage, shard, Seconds(seconds.cpu, 0.0), done=done)


@dataclass
class Lifeline:
    """Ends the process when its standard input is closed: at once inside a shard, otherwise after the last message."""

    busy: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.read(0, 4096):
            pass
        self._ended.set()
        if self.busy:
            os._exit(1)

    def holds(self) -> bool:
        """Whether the main process is still alive; waits a short time."""
        return not self._ended.wait(_LOOKS_AGAIN_S)


def main(path: str) -> int:
    """Measure posted shards. An error is written to standard output as JSON."""
    with _report() as say:
        lifeline = Lifeline()
        try:
            serve(_job(Path(path)), lifeline)
        except HoldfastError as error:
            say({"error": type(error).__name__, "message": str(error)})
        except Exception:  # noqa: BLE001 - the other process raises it
            say({"error": "HoldfastError", "message": f"a worker failed:\n{traceback.format_exc()}"})
        else:
            return 0
    return 1


@contextmanager
def _report() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes to the original standard output; output of the model goes to standard error."""
    # unbuffered, since a buffer would be written again when it is closed
    with os.fdopen(os.dup(1), "wb", buffering=0) as pipe:
        os.dup2(2, 1)

        def say(content: Mapping[str, Any]) -> None:
            with contextlib.suppress(BrokenPipeError):
                pipe.write(f"{json.dumps(content)}\n".encode())

        yield say


def _job(path: Path) -> Job:
    with path.open("rb") as file:
        try:
            job: Job = pickle.load(file)  # noqa: S301 - written by the process that started this one
        except Exception as error:
            raise unshared(error) from error
    return job


def unshared(error: Exception) -> UsageError:
    """The error for a model or data that cannot be pickled for another process."""
    return UsageError(
        f"a worker cannot take the model, the data or an attack over ({type(error).__name__}: {error}); define them in "
        f"a file that can be imported, or give addresses such as file.py:factory, or leave workers out"
    )


def serve(job: Job, lifeline: Lifeline) -> None:
    """Measure posted shards until the main process ends."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    subject, data, surrogates = job.opening()
    device, adaptive = torch.device(job.device), bool(job.plan.adaptive)
    with (
        readied(subject, data, device, adaptive=adaptive) as (target, sample),
        joined(job.run, job.owner) as folder,
        ExitStack() as stack,
    ):
        plan = with_surrogates(job.plan, stack, surrogates, sample, target)
        found = {
            "model": model_digest(subject, target),
            "data": data.digest,
            "surrogates": [surrogate.digest for surrogate in surrogates],
        }
        for what, known in job.digests.items():
            if found[what] != known:
                raise TargetError(
                    f"the {what} changed while a worker opened it; repeat the run with --resume"
                )
        course = _course(job, plan, target, data, folder)
        by_stage: dict[str, Columns] = {}
        while lifeline.holds():
            while (task := folder.leases.claim(os.getpid())) is not None:
                lifeline.busy = True
                _measure(course, task, by_stage, folder)
                lifeline.busy = False


def _course(job: Job, plan: Plan, target: Target, data: Data, folder: RunFolder) -> Course:
    shared = folder.manifest["plan"]
    return Course(
        plan,
        target,
        data,
        torch.device(job.device),
        tuple((start, stop) for start, stop in shared["shards"]),
        shared["batch_size"],
        _Shared(folder),
        Stopper(),
        silent,
        math.inf,
        tuple(shared["stages"]),
    )


def _measure(course: Course, task: Task, by_stage: dict[str, Columns], folder: RunFolder) -> None:
    """Measure one shard; adds the columns of all earlier stages to `by_stage`."""
    stages = course.plan.stages()
    place = next(k for k, stage in enumerate(stages) if stage.name == task.stage)
    folder.look_again()
    for earlier in stages[:place]:
        if earlier.name not in by_stage:
            kept = folder.stage(earlier.name)
            columns = None if kept is None else counted(earlier.kind, kept, by_stage)
            if columns is not None:
                by_stage[earlier.name] = columns
    rows = 0

    def said(finished: int) -> None:
        nonlocal rows
        folder.leases.tell(task, rows=finished - rows)
        rows = finished

    stage = ready(stages[place], by_stage)
    course = replace(course, deadline=time.perf_counter() + task.until - time.time())
    try:
        course.shard(stage, task.shard, course.due(stage, by_stage), by_stage, said)
    except OutOfTime:
        folder.leases.tell(task, state="late")
    else:
        folder.leases.tell(task, state="done")
