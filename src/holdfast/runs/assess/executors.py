"""Chooses where the shards of an assessment are measured: in this process, in worker processes, or on a Ray cluster."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from holdfast.core.batch import Data
from holdfast.runs.assess.measuring import ShardMeasure, WorkerSetup
from holdfast.runs.assess.request import AssessRequest, Opening, Subject
from holdfast.runs.engine.children import import_path
from holdfast.runs.engine.executor import Executor, Inline, Task
from holdfast.runs.engine.processes import worker_processes
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.ray_cluster import RayOptions, connected
from holdfast.runs.harness import Plan

if TYPE_CHECKING:
    from holdfast.runs.assess.sending import Sendable
    from holdfast.runs.engine.ray_tasks import RayTasks


@contextmanager
def executor_for(
    request: AssessRequest,
    subject: Subject,
    measure: ShardMeasure,
    digests: Mapping[str, Any],
    opening: Opening | None,
    notify: Notify,
    detail: Notify,
) -> Iterator[Executor]:
    """Context manager that yields the executor that an assessment requests: this process, worker processes, or a
    cluster.

    `measure` measures a shard in this process. `digests` are those of the run, with which a worker compares what it
    opens. Worker processes open the model and the data with `opening`; without it they receive copies. `notify` and
    `detail` are called with messages on a cluster.
    """
    if request.ray is not None:
        with _cluster(request, request.ray, subject, measure, digests["model"], notify, detail) as tasks:
            yield tasks
    elif request.workers is None:
        yield Inline(measure)
    else:
        compared = {what: digests[what] for what in ("model", "data")}
        compared["surrogates"] = [surrogate.digest for surrogate in request.surrogates]
        opening = opening or partial(_as_given, subject, measure.data, request.surrogates)
        setup = WorkerSetup(
            opening, compared, _without_surrogates(measure.plan), request.device, request.batch_size
        )
        with worker_processes(setup, request.workers) as workers:
            yield workers


@contextmanager
def _cluster(
    request: AssessRequest,
    options: RayOptions,
    subject: Subject,
    measure: ShardMeasure,
    digest: str,
    notify: Notify,
    detail: Notify,
) -> "Iterator[RayTasks]":
    """Yield the executor on a Ray cluster. The opened model is sent to the workers."""
    from holdfast.runs.assess.sending import SentModel, known_rows, sender, shipment, shipped_files
    from holdfast.runs.engine.ray_tasks import ray_tasks

    assert request.workers is not None  # the request of a cluster without a number of workers is refused
    device = "cuda" if options.gpus_per_worker else request.device
    plan, data = _without_surrogates(measure.plan), measure.data
    model = SentModel(subject, request.surrogates, plan, known_rows(data, request.batch_size), digest, device)
    files = shipped_files(options.ship)
    with ray_tasks(
        partial(shipment, model, files),
        sender(data),
        request.workers,
        device,
        options,
        paths=tuple(import_path()),
        notify=notify,
        detail=detail,
    ) as tasks:
        if files:
            notify(f"sent to the nodes with --ship: {', '.join(files)}")
        yield tasks


@contextmanager
def executor_of(
    work: "Sendable", workers: int | None, options: RayOptions | None, device: str, notify: Notify
) -> Iterator[Executor]:
    """Context manager that yields the executor of other work than an assessment: this process, `workers` processes, or
    that many workers of a cluster. The work is sent to each of them once, and tasks as they are.
    """
    from holdfast.runs.assess.sending import process_shipment, shipment, shipped_files

    if workers is None:
        with work.opened() as measure:
            yield Inline(measure)
    elif options is None:
        with worker_processes(process_shipment(work), workers) as processes:
            yield processes
    else:
        from holdfast.runs.engine.ray_tasks import ray_tasks

        setup = partial(shipment, work, shipped_files(options.ship))
        paths = tuple(import_path())
        with ray_tasks(setup, _as_it_is, workers, device, options, paths=paths, notify=notify) as tasks:
            yield tasks


def _as_it_is(task: Task) -> Task:
    return task


@contextmanager
def cluster_for(request: AssessRequest, detail: Notify) -> Iterator[None]:
    """Context manager with one connection to the cluster that an assessment requests, for several assessments. It does
    nothing for a request without a cluster.
    """
    if request.ray is None or request.workers is None:
        yield
        return
    with connected(request.ray, request.workers, detail=detail):
        yield


def _without_surrogates(plan: Plan) -> Plan:
    """The plan without surrogates, which each worker prepares itself."""
    return replace(plan, threat=replace(plan.threat, surrogates=()))


def _as_given(
    subject: Subject, data: Data, surrogates: tuple[Subject, ...]
) -> tuple[Subject, Data, tuple[Subject, ...]]:
    return subject, data, surrogates
