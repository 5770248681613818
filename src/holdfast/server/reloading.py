"""Reloads of a model from its file while its server runs.

A reload replaces the workers one after another: a new one opens the file and, when it is ready, an old one answers what
it received and ends. Each process thus has one model, and there is at most one process more than before. The first new
worker opens and tests the file; if that fails, it ends, and the old ones continue to serve. A worker reports the digest
of the model that it has opened before it answers requests. A digest that was not announced is refused, so that no
worker answers with other parameters under the recorded name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.core.errors import TargetError
from holdfast.runs.engine.progress import Notify
from holdfast.server.swapping import Record
from holdfast.server.telemetry import Telemetry
from holdfast.server.worker_processes import WorkerProcess

State = Literal["none", "running", "done", "failed"]
NAME_DIGITS = 16
"""number of digits of the digest of a model that are its name in audit records"""


@dataclass(frozen=True)
class ServedVersion:
    """A model from a file as it is announced: its name in audit records, its digest, and how many served before it."""

    name: str
    digest: str = ""
    """SHA-256 of the model with its settings; empty for a model without a file"""
    epoch: int = 1
    classes: int | None = None
    """number of classes; None before a worker has opened it"""


class Reloading:
    """The version that serves and the reload in progress. `begin_worker` starts a worker."""

    def __init__(
        self,
        version: ServedVersion,
        workers: list[WorkerProcess],
        telemetry: Telemetry,
        record: Record,
        notify: Notify,
        warn: Notify,
        *,
        begin_worker: Callable[[], WorkerProcess],
    ) -> None:
        self.version, self._workers = version, workers
        self._telemetry, self._record = telemetry, record
        self._notify, self._warn = notify, warn
        self._begin_worker = begin_worker
        self.generation = 0
        """number of reloads that have begun to replace workers; older workers are to be replaced"""
        self._following: ServedVersion | None = None
        """the announced version of the reload in progress before its first worker is ready"""
        self._joining: WorkerProcess | None = None
        self._state: State = "none"
        self._reason = self._requested = ""

    @property
    def requested(self) -> bool:
        """Whether a reload is requested that has not begun."""
        return bool(self._requested)

    @property
    def running(self) -> bool:
        """Whether a reload is in progress."""
        return self._state == "running"

    @property
    def testing(self) -> bool:
        """Whether it is not yet known if the file can be served."""
        return self.running and self._joining is not None and self._joining.generation > self.generation

    def request(self, why: str) -> None:
        """Reload the model as soon as possible. May be called by any thread."""
        self._requested = why

    # --- steps

    def poll(self) -> None:
        """Begin a requested reload, or replace the next worker."""
        if self._joining is not None or any(worker.retiring for worker in self._workers):
            return
        if self._requested and not self.running:
            self._notify(f"the model is reloaded: {self._requested}")
            self._state, self._reason, self._requested = "running", "", ""
            self._join(self.generation + 1)
        elif self.running and self.old:
            self._join(self.generation)
        elif self.running:
            self._state = "done"
            self._telemetry.count("holdfast_swaps_total")
            self._telemetry.set("holdfast_reload_failing", 0)
            self._notify(f"all workers serve {self.version.name}")

    @property
    def old(self) -> list[WorkerProcess]:
        """Workers that are to be replaced."""
        return [each for each in self._workers if each.generation < self.generation and not each.canary]

    def _join(self, generation: int) -> None:
        try:
            self._joining = self._begin_worker()
        except (TargetError, OSError) as error:  # as on a full disk
            self._fail(str(error), tested=generation == self.generation)
        else:
            self._joining.generation = generation

    def opened(self, worker: WorkerProcess, content: Mapping[str, Any]) -> None:
        """Compare the model that a worker has opened with the announced one, and let the worker serve it. The first
        worker of a reload announces it.
        """
        digest, classes = str(content["digest"]), int(content["classes"])
        # only the additional worker of a reload may open the next version before it is tested
        version = (self._following if worker is self._joining else None) or self.version
        if worker is self._joining and self.testing and self._following is None:
            version = self._announced(digest, classes)
        fault = fault_of(version, digest, classes)
        if fault:
            worker.error = TargetError(fault)
            worker.child.process.kill()
            return
        if version is self.version:
            self.version = replace(version, classes=classes)
        elif self._following is None:
            self._following = version
            self._record("set", set=version.name, epoch=version.epoch, model=digest, why="reloaded")
        worker.set_name = version.name
        worker.child.send(b"G" + json.dumps({"set": version.name, "epoch": version.epoch}).encode())

    def _announced(self, digest: str, classes: int) -> ServedVersion:
        """Return the version that the first worker of a reload has opened; the present one if the file is unchanged."""
        now = self.version
        return (
            now
            if digest == now.digest
            else ServedVersion(digest[:NAME_DIGITS], digest, now.epoch + 1, now.classes)
        )

    def ready(self, worker: WorkerProcess) -> bool:
        """Note that a worker is ready, and return whether it is the additional one of a reload, so that an old one may
        end.
        """
        if worker is not self._joining:
            if self._state != "failed":
                self._reason = ""
                self._telemetry.set("holdfast_reload_failing", 0)
            return False
        self._joining = None
        if worker.generation > self.generation:
            self.generation = worker.generation
            if self._following is not None:
                self.version, self._following = self._following, None
                self._notify(f"{self.version.name} serves as epoch {self.version.epoch}: reloaded")
        return True

    def awaits(self, worker: WorkerProcess) -> bool:
        """Return whether a worker is the additional one of a reload, and not ready."""
        return worker is self._joining

    def left(self, worker: WorkerProcess, why: str) -> bool:
        """Note that a worker has ended, and return whether it was the additional one of a reload, which then failed."""
        if worker is not self._joining:
            return False
        tested = not self.testing
        self._joining = self._following = None
        self._fail(why, tested=tested)
        return True

    def _fail(self, reason: str, *, tested: bool) -> None:
        self._state = "failed"
        self.cannot_start(reason)
        left = f"{len(self.old)} of {len(self._workers)} workers serve" if tested else "all workers serve"
        self._warn(f"note: the reload failed: {reason}; {left} the model from before")

    def give_up(self) -> None:
        """Replace no further workers, because the server ends."""
        if self.running or self._requested:
            self._state, self._requested, self._reason = "failed", "", "the server ends"
            self._warn("note: the reload was given up, because the server ends")

    def cannot_start(self, reason: str) -> None:
        """Raise the alarm that the model in the file cannot be served by new workers."""
        self._reason = reason
        self._telemetry.set("holdfast_reload_failing", 1)

    def status(self) -> dict[str, Any]:
        """Return the state for the operator."""
        return {
            "set": self.version.name,
            "epoch": self.version.epoch,
            "digest": self.version.digest,
            "reload": "running" if self._requested else self._state,
            "reason": self._reason,
        }


def fault_of(version: ServedVersion, digest: str, classes: int) -> str:
    """Return why a worker must not serve the model that it has opened, or an empty text."""
    if version.classes not in (None, classes):
        return (
            f"the file has a model with {classes} classes, and {version.classes} are served; start another server for "
            "it, as clients expect the outputs that the metadata state"
        )
    if digest != version.digest:
        return (
            f"the model that was opened has the digest {digest[:NAME_DIGITS]}, and {version.digest[:NAME_DIGITS]} "
            "serves: its file has changed, or its code returns another model each time; restore the file, or reload "
            "the model (SIGHUP)"
        )
    return ""
