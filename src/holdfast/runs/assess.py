"""The assess verb: refuses what cannot be measured, then measures in a folder or in memory."""

import tempfile
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.corruptions import Corruptions
from holdfast.core.errors import UsageError
from holdfast.harness import Plan, Target, on_detector, refuse_unfitted, refuse_what_is_hidden
from holdfast.runs.carrying import with_others
from holdfast.runs.entry import (
    refuse_batch,
    refuse_data,
    refuse_threat,
)
from holdfast.runs.foresight import refuse_gates
from holdfast.runs.making import Making
from holdfast.runs.order import Notify, Opening, Order, Progress, Subject, ignore, silent
from holdfast.runs.preparing import readied
from holdfast.runs.repeating import resumable, way_out
from holdfast.runs.result import Result
from holdfast.runs.seconding import with_surrogates
from holdfast.runs.served import attach, opening_rows, served_by
from holdfast.runs.signals import Stopper, stoppable
from holdfast.sources.served import Served
from holdfast.store.folder import opened, planned


def assess(
    subject: Subject,
    data: Data,
    order: Order,
    *,
    run: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    opening: Opening | None = None,
    again: str = "",
    notify: Notify = ignore,
) -> Result:
    """Measure how robust a model is, and judge its gates.

    With `run`, all results are written to that folder; an interrupted run is continued with `resume`, and a finished
    run is reported again. `again` is the command that resumes the run that contains this one. Workers open the model
    and the data with `opening`; without it they receive copies of those given here. `notify` receives the largest
    number of rows that a server is sent. Raises `UsageError`, `TargetError`, or `Interrupted` with the command to
    resume.
    """
    refuse_data(data)
    device = torch.device(order.device)
    adaptive, served = bool(order.plan.adaptive), served_by(subject.model)
    _begin(served, subject, order)
    again = again or ("" if run is None else way_out(order.command, run))
    with (
        nullcontext() if run is None else resumable(again, partial(way_out, order.command, run)),
        readied(subject, data, device, adaptive=adaptive) as (target, sample),
        ExitStack() as stack,
    ):
        plan = agreed(subject, data, order, target, sample, stack)
        refuse_gates(order.gates, plan, target, sample)
        shape = tuple(sample.x.shape[1:])
        opening = opening or partial(_as_given, subject, data, order.surrogates)
        made = Making(subject, data, order, plan, target, device, shape, progress, opening, served, notify)
        if run is None:
            return _unkept(made)
        with stoppable(again) as stopper:
            manifest = made.manifest(planned(run))
            secret = "pool" in subject.card  # adversarial inputs of a serving set are secret
            kept = opened(run, manifest, made.about(), resume=resume, secret=secret)
            with kept as folder:
                attach(served)
                return made.result(folder.manifest, stopper, folder)


def _unkept(made: Making) -> Result:
    """The result of a run that is not kept. Workers need a folder, so a temporary one is used for them."""
    manifest = made.manifest(None)
    if made.order.workers is None:
        return made.result(manifest, Stopper())
    with (
        tempfile.TemporaryDirectory(prefix="holdfast-") as place,
        opened(Path(place), manifest, made.about(), resume=False) as folder,
    ):
        return made.result(manifest, Stopper(), folder, lasting=False)


def _begin(served: Served | None, subject: Subject, order: Order) -> None:
    """Record the rows that opening the data has sent to a server, and refuse early what can be refused early.

    A served model computes on its server: with several processes, none would know what the others send.
    """
    if served is None:
        return
    served.opening = opening_rows(served.sent)
    if not order.surrogates:
        refuse_what_is_hidden(order.plan, subject.model.access, subject.model.hides)
    if order.workers is not None:
        raise UsageError(
            f"--workers is {order.workers}, and the model is behind a server, which computes for it; leave --workers "
            f"out, and give --http-concurrency {order.workers} to have so many requests under way at once"
        )


def agreed(
    subject: Subject, data: Data, order: Order, target: Target, sample: Batch, stack: ExitStack
) -> Plan:
    """Return the plan as it is measured on this model and data; surrogates stay open until `stack` is closed.

    Raises an error for what cannot be measured. Gates are not tested.
    """
    _refuse(target, sample, order, data)
    held = with_surrogates(order.plan, stack, order.surrogates, sample, target)
    held = with_others(held, order.across, sample, target)
    seen = refuse_what_is_hidden(held, subject.model.access, subject.model.hides)
    plan = on_detector(seen, rejects=target.rejects)
    refuse_unfitted(plan, fit=order.fit is not None)
    return plan


def _as_given(
    subject: Subject, data: Data, surrogates: tuple[Subject, ...]
) -> tuple[Subject, Data, tuple[Subject, ...]]:
    return subject, data, surrogates


def _refuse(target: Target, sample: Batch, order: Order, data: Data) -> None:
    """Raise an error for data or threat models that cannot be measured, before any measurement."""
    bare = target.bare
    refuse_batch(sample, bare.bounds, target.classes, data.name, whole=data, remote=bare.remote)
    if target.rejects and isinstance(order.plan.threat.constraint, Corruptions):
        raise UsageError(
            "common corruptions are drawn, not chosen against a detector, and this model rejects; "
            "measure the network without its detector, or give a norm, as in --threat linf:8/255"
        )
    refuse_threat(order.plan.threat, bare.bounds, sample.x, target.classes)
