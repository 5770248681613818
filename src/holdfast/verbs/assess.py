"""Opens the model and the data of an assessment or a certification, makes its request, and estimates its cost."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from holdfast.certifiers.patch_masks import PatchMasks
from holdfast.certifiers.protocol import Prover, StatisticalProver
from holdfast.core.batch import Batch
from holdfast.core.catalogue import LATE, MASKING, PATCH_MASKS, SMOOTHING, load
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.evidence import Evidence
from holdfast.gates.grammar import look_sizes, parse_until
from holdfast.io.data.data import in_random_blocks, selected
from holdfast.io.remote.remote import SCHEMES
from holdfast.io.remote.served_model import inspection_counter
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.certify import (
    certify_request,
    masked_subject,
    reads_trees,
    smoothed_subject,
    with_short_attacks,
    without_attacks,
)
from holdfast.runs.assess.expected_time import ExpectedCost, Rehearsed, expected_seconds, rehearsed
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import AssessRequest, DescribedModel, Keep, MeasureAttackers, Opened
from holdfast.runs.assess.result import Result
from holdfast.runs.assess.served_runs import journaled
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.settings.grammar import seconds
from holdfast.settings.values import address_of
from holdfast.threats.domains import CONTROL
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.opening.arguments import gradients
from holdfast.verbs.opening.declared import note_on_padding, with_found_properties, with_numbered_goal
from holdfast.verbs.opening.models import pool_of
from holdfast.verbs.opening.plans import (
    assess_request,
    baseline_run,
    listed_attacks,
    methods,
    prover,
    with_stored_inputs,
)
from holdfast.verbs.opening.resolve import (
    device_of_model,
    folder_of,
    open_all,
    open_examples,
    open_fit,
    open_others,
    open_subject,
    open_surrogates,
)
from holdfast.verbs.settings import Assess, Certify, RotateSettings

if TYPE_CHECKING:
    from holdfast.audits.audit import AuditResult
    from holdfast.explanation.case import Explained

_TRIED = 8
"""Number of examples that an estimate measures; the cost of the others is extrapolated."""


def measured(
    settings: Assess | Certify,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
    command: str = "",
) -> "Result | AuditResult":
    """Open the model and the data of an assessment or a certification, and take the steps of the run. The result for a
    policy is that of an audit.
    """
    if settings.threat.change.domain is CONTROL:
        from holdfast.verbs import control  # late, as few models are policies

        return control.measured(
            settings, folder, resume=resume, progress=progress, notify=notify, command=command
        )
    place = folder_of(folder, resume=resume)
    settings.refuse_unusable_cluster()
    listed_attacks(settings)  # before the model is opened
    baseline = baseline_run(settings)
    with gradients(), journaled(place, resume=resume, keep=settings.keep_answers):
        subject, data, surrogates = settings.open()
        request = replace(
            _request(settings, (subject, data, surrogates), baseline),
            attackers=_attackers(settings),
            command=command,
        )
        result = assess(
            subject,
            data,
            request,
            run=place,
            resume=resume,
            progress=progress,
            opening=settings.open,
            notify=notify,
            detail=detail,
        )
    return replace(result, explaining=partial(_explained, settings))


def _explained(settings: Assess | Certify, result: Result, index: int | None) -> "Explained":
    """Explain an example of a run, or its model."""
    from holdfast.verbs.explain import explained_run  # late, as few runs are explained

    return explained_run(settings, result, index)


def estimated(settings: Assess | Certify) -> ExpectedCost | Rehearsed:
    """Return the expected cost of a run, from a few examples: for a model behind a server, the number of rows that the
    run would send to it, otherwise the numbers of passes and the time.
    """
    if settings.threat.change.domain is CONTROL:
        raise UsageError(
            f"the threat {settings.threat} is for a policy, whose cost is not estimated", Remedy("dry_run")
        )
    baseline = baseline_run(settings)
    if isinstance(settings.model, str) and settings.model.partition(":")[0] in SCHEMES:
        return _estimated_rows(settings, baseline)
    with gradients():
        subject, data, surrogates = settings.open()
        request = _request(settings, (subject, data, surrogates), baseline)
        examples = selected(data, n=min(_TRIED, len(data)), sample=None, seed=settings.seed)
        # an earlier run may have none of the first examples
        tried = replace(
            request, plan=replace(request.plan, baseline=None), gates=(), until=None, workers=None, ray=None
        )
        result = assess(subject, examples, tried)
        with readied(subject, data, torch.device(request.device)) as (target, sample):
            seconds = expected_seconds(request, request.plan, target, data, sample.x.device)
    cost, factor = result.cost, len(data) / len(examples)
    return ExpectedCost(
        len(data),
        len(result.attacks),
        cost.forwards * factor,
        cost.backwards * factor,
        len(examples),
        seconds,
    )


def _estimated_rows(settings: Assess | Certify, baseline: Result | None) -> Rehearsed:
    """Return the expected number of rows. At most 64, or one larger batch, are sent to the server for it."""
    subject = open_subject(settings, transform=settings.transform)
    sent = inspection_counter(subject.model)
    assert sent is not None
    surrogates = open_surrogates(settings, subject.model)
    data = open_examples(settings, subject.model)
    subject = with_found_properties(subject, surrogates, data)
    return rehearsed(subject, data, _request(settings, (subject, data, surrogates), baseline), sent)


def opened(settings: Assess | Certify) -> Opened:
    """Open the model, the data and the surrogates of an assessment or a certification, whose model may be the smoothed
    classifier of the opened one, or the vote over masks.
    """
    subject, data, surrogates = open_all(settings)
    if subject.model.task is not None and (isinstance(settings, Certify) or settings.certify):
        methods(
            settings, trees=reads_trees(subject.model), task=subject.model.task
        )  # before anything is measured
    if isinstance(settings, Assess) and settings.until is not None and len(data):
        data = in_random_blocks(data, look_sizes(len(data)), settings.seed)
    if isinstance(settings, Certify):
        subject = replace(subject, notes=(*subject.notes, *note_on_padding(settings, data)))
    smoothing, masks = _statistical(settings), _patch_masks(settings)
    if smoothing is not None:
        subject = smoothed_subject(subject, smoothing)
    if masks is not None:
        vote = masks.net(subject.model, data.read(0, 1).x, settings.threat.opened())
        subject = masked_subject(subject, vote)
    return subject, data, surrogates


def _patch_masks(settings: Assess | Certify) -> PatchMasks | None:
    """Return the method of a certification if it certifies the vote over masks of the model; otherwise None."""
    if not isinstance(settings, Certify) or settings.chosen_method != PATCH_MASKS:
        return None
    return PatchMasks() if settings.masks is None else PatchMasks(settings.masks)


def _statistical(settings: Assess | Certify) -> StatisticalProver | None:
    """Return the method of a certification if it certifies the smoothed classifier of the model; otherwise None."""
    if not isinstance(settings, Certify) or settings.method not in (SMOOTHING, MASKING):
        return None
    own = ("sigma", "clip") if settings.method == SMOOTHING else ("keep", "mask")
    chosen = {name: getattr(settings, name) for name in (*own, "draws", "failure_probability")}
    given = {name: value for name, value in chosen.items() if value is not None}
    cls = load("certifiers", settings.method, type)
    method: StatisticalProver = cls(**given, seed=settings.seed)
    return method


def _request(
    settings: Assess | Certify,
    opened: Opened,
    baseline: Result | None,
) -> AssessRequest:
    """Return the request of an assessment of the opened model and surrogates. It does not contain the measurement
    of attackers of a rotation pool.
    """
    subject, data, surrogates = opened
    settings, masks = with_numbered_goal(settings, subject.model, data), _patch_masks(settings)
    request = assess_request(
        settings,
        baseline=None if baseline is None else baseline.evidence,
        device=device_of_model(settings, subject),
        # no suite attacks patches without gradients; such a request is then without attacks
        target="gradients" if masks is not None else subject.model.access,
        trees=reads_trees(subject.model),
        task=subject.model.task,
    )
    if not settings.threat.constraint.changes_inputs:
        from holdfast.certifiers.partitions import refuse_unpartitioned  # late, as few threats need it

        refuse_unpartitioned(subject.model)
    smoothing, guard = _statistical(settings), settings.guard
    if smoothing is not None:
        request = certify_request(request, [smoothing], [])
        request = request if subject.model.access == "gradients" else without_attacks(request)
    elif masks is not None:
        request = certify_request(request, [masks], [])
        attacked = subject.model.access == "gradients"
        request = with_short_attacks(request) if attacked else without_attacks(request)
    elif isinstance(settings, Certify):
        request = certify_request(request, *_provers(settings, subject), settings.geometry)
        request = request if request.plan.members else without_attacks(request)
    elif guard is not None:
        request = _with_trials(request, guard, subject)
    request = replace(
        request,
        fit=open_fit(settings, subject.model, request.plan, data),
        surrogates=surrogates,
        until=None
        if isinstance(settings, Certify) or settings.until is None
        else parse_until(settings.until),
        across=open_others(settings, subject.model, data),
    )
    if baseline is not None and isinstance(settings, Assess):
        request = with_stored_inputs(request, baseline, data)
    return request


def _attackers(settings: Assess | Certify) -> MeasureAttackers | None:
    """Return a function that measures the success of attackers with different knowledge of the rotation pool that is
    assessed.

    Returns None if the model is not a pool or the setting `adaptive` is false.
    """
    address = address_of(settings.model)
    if address is None or not settings.adaptive or not pool_of(address):
        return None
    own_settings = {key: getattr(settings, key) for key in ("device", "trust_code", "follow_links")}
    return partial(_table, address, own_settings)


def _table(
    address: str,
    own_settings: Mapping[str, Any],
    evidence: Evidence,
    judged_on: Batch,
    *,
    known: Mapping[str, Any] | None,
    keep: Keep,
    progress: Progress,
) -> Mapping[str, Any]:
    """Open the training data of the pool only when the table is measured, because they may be large."""
    from holdfast.rotation.steps.attackers import AttackerTable
    from holdfast.verbs import rotate

    pool = pool_of(address)
    assert pool is not None
    request = rotate.reopened(pool, check_settings(own_settings, address, kind=RotateSettings))
    return AttackerTable(pool, request)(evidence, judged_on, known=known, keep=keep, progress=progress)


def _with_trials(request: AssessRequest, guard: str, subject: DescribedModel) -> AssessRequest:
    """Return the request of an assessment with the black-box attacks that measure the detectors of a guard, if it has
    any and the threat model supports them.
    """
    from holdfast.guard.query_rule import measurable
    from holdfast.verbs.opening.guard import query_trials

    trials = query_trials(guard)
    if trials is None or not measurable(request.plan.threat, subject.model.access):
        return request
    return replace(request, plan=replace(request.plan, trials=trials))


def _provers(settings: Certify, subject: DescribedModel) -> tuple[list[Prover], list[Prover]]:
    """The methods that run before the attacks, and those that run after them."""
    names = methods(settings, trees=reads_trees(subject.model), task=subject.model.task)
    limit = seconds(settings.timeout, "timeout")
    return (
        [prover(name, limit, settings.arithmetic) for name in names if name not in LATE],
        [prover(name, limit, settings.arithmetic) for name in names if name in LATE],
    )
