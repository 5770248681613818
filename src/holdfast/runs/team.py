"""Worker processes that measure the shards of a run: started on demand, and replaced if they die.

The main process decides which examples each stage is run on, posts the shards in the index of the run, and waits;
the workers run `worker.py`. A shard of a worker that died is posted again.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.core.errors import HoldfastError, TargetError, TargetLost, TargetRefused, UsageError
from holdfast.core.evidence import Columns
from holdfast.harness import Stage
from holdfast.runs.course import Course, Watch
from holdfast.runs.worker import Job, unshared
from holdfast.store.folder import RunFolder

_DEATHS = 3
"""A shard, or the start of a worker, is not tried again after this many workers died in it."""
_LOOKS_AGAIN_S = 0.05
_PATIENCE_S = 10.0
"""Seconds that a worker may take to end when there is no more work."""
_ERRORS: Mapping[str, type[HoldfastError]] = {
    error.__name__: error for error in (HoldfastError, TargetError, TargetLost, TargetRefused, UsageError)
}

_START = """\
import sys
job, sys.path[:] = sys.argv[1], sys.argv[2:]
from holdfast.runs.worker import main
sys.exit(main(job))
"""
"""Code of a worker process: it sets `sys.path` before any import."""

Process = subprocess.Popen[str]


@dataclass
class Team:
    """At most `size` worker processes for one run folder."""

    folder: RunFolder
    job: Path
    size: int
    _crew: list[Process] = field(default_factory=list)
    _worked: set[int] = field(default_factory=set)
    _deaths: Counter[tuple[str, int]] = field(default_factory=Counter)

    def measure(
        self,
        course: Course,
        stage: Stage,
        left: Sequence[int],
        by_stage: Mapping[str, Columns],
        said: Callable[[int], None],
    ) -> Iterator[tuple[int, Columns]]:
        """Yield each shard when a worker has finished it."""
        leases, waiting = self.folder.leases, set(left)
        leases.post(stage.name, left, time.time() + course.deadline - time.perf_counter())
        watch = Watch(lambda seconds, _: leases.spend(stage.name, left[0], 0.0, seconds.wall, done=False))
        while waiting:
            self._look_after(min(self.size, len(waiting)))
            if stage.kind != "clean" and time.perf_counter() >= course.deadline:
                leases.withdraw()
            tasks = leases.tasks()
            for task in tasks:
                if task.worker is not None:
                    self._worked.add(task.worker)
                if task.state == "done" and task.shard in waiting:
                    waiting.remove(task.shard)
                    yield task.shard, self.folder.shard(stage.name, task.shard)
            said(sum(task.rows for task in tasks if task.state == "taken"))
            watch.tick()
            if all(task.state in ("done", "late") for task in tasks):
                break
            time.sleep(_LOOKS_AGAIN_S)
        watch.tick(done=True)

    def _look_after(self, wanted: int) -> None:
        """Replace workers that died, and start missing ones."""
        for process in [each for each in self._crew if each.poll() is not None]:
            self._crew.remove(process)
            self._bury(process)
        while len(self._crew) < wanted:
            command = [sys.executable, "-P", "-c", _START, str(self.job), *import_path()]
            # a separate session, since Ctrl-C is handled by the main process, which ends the workers
            self._crew.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def _bury(self, process: Process) -> None:
        """Raise the error that a worker reported, or count its death and post its shards again.

        Raises `TargetError` after three deaths in the same shard.
        """
        said = _last_word(process)
        if "error" in said:
            raise _ERRORS.get(said["error"], HoldfastError)(said["message"])
        taken = [
            task for task in self.folder.leases.tasks() if (task.worker, task.state) == (process.pid, "taken")
        ]
        for stage, shard in [(task.stage, task.shard) for task in taken] or [("", -1)]:
            self._deaths[stage, shard] += 1
            if self._deaths[stage, shard] >= _DEATHS:
                where = f"on shard {shard} of {stage}" if taken else "before it had begun"
                raise TargetError(
                    f"a worker died {_DEATHS} times {where}, the last time with status {process.returncode}; if memory "
                    f"ran out, take fewer --workers or a smaller --batch-size"
                )
        self.folder.leases.give_up(process.pid)

    def end(self) -> None:
        """Kill all workers and wait for their end."""
        for process in self._crew:
            process.kill()
        for process in self._crew:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
        self._crew.clear()


def import_path() -> list[str]:
    """The import path of a worker: that of this process without the current folder.

    If this process has imported a module from the current folder, as a script does, the folder is added at the end.
    """
    here = Path.cwd()
    known = [getattr(module, "__dict__", {}) for name, module in list(sys.modules.items()) if "." not in name]
    places = [each.get("__path__") or [each.get("__file__") or ""] for each in known]
    others = [entry for entry in sys.path if entry and Path(entry).absolute() != here]
    imported = any(Path(place).parent == here for of_one in places for place in of_one if place)
    return [*others, str(here)] if imported else others


def _last_word(process: Process) -> dict[str, Any]:
    """The error report of a worker that has ended; empty if it was killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    with process.stdout:
        text = process.stdout.read()
    said: dict[str, Any] = json.loads(text) if text.endswith("}\n") else {}
    return said


@contextmanager
def gathered(folder: RunFolder, job: Job, size: int) -> Iterator[Team]:
    """Yield a team of workers, which are always killed at the end."""
    with tempfile.TemporaryDirectory(prefix="holdfast-") as place:
        path = Path(place) / "job"
        try:
            path.write_bytes(pickle.dumps(job))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise unshared(error) from error
        team = Team(folder, path, size)
        try:
            yield team
        finally:
            team.end()
