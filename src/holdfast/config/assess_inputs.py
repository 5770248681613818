"""Opens the model and the data of an assessment, creates its request, and estimates its cost. The command line and the
Python interface both use these functions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.smoothing import Smoothing
from holdfast.config.clusters import refuse_unusable_cluster
from holdfast.config.expecting import with_found_properties
from holdfast.config.grammar import seconds
from holdfast.config.naming import AUTO
from holdfast.config.planning import assess_request, prover
from holdfast.config.pooled import pool_of
from holdfast.config.references import DataLike, Sources
from holdfast.config.resolve import (
    device_of_model,
    open_all,
    open_examples,
    open_fit,
    open_others,
    open_subject,
    open_surrogates,
    sources_at,
)
from holdfast.config.settings import AssessSettings, CertifySettings, RotateSettings, check_settings
from holdfast.config.suites import refuse_uncertifiable
from holdfast.core.batch import Batch, Data
from holdfast.core.catalogue import CASCADE, LATE, SMOOTHING
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.remedies import Remedy
from holdfast.engine.progress import Notify, Progress, ignore, silent
from holdfast.harness import Member
from holdfast.sources.counting import inspection_counter
from holdfast.sources.selection import selected
from holdfast.verbs import assess as assessing
from holdfast.verbs.certify import certify_request, smoothed_subject, without_attacks
from holdfast.verbs.expected_rows import Rehearsed, rehearsed
from holdfast.verbs.request import AssessRequest, Keep, MeasureAttackers, Opening, Subject
from holdfast.verbs.result import Result
from holdfast.verbs.served import journaled
from holdfast.verbs.stored_runs import open_run


def attackers(sources: Sources, device: str, *, adaptive: bool) -> MeasureAttackers | None:
    """Return a function that measures the success of attackers with different knowledge of the rotation pool that is
    assessed.

    Returns None if the model is not a pool or `adaptive` is false.
    """
    address = sources.model.address
    if address is None or not adaptive or not pool_of(address):
        return None
    return partial(_measured, address, device, trust_code=sources.model.source.trust_code)


def _measured(
    address: str,
    device: str,
    evidence: Evidence,
    judged_on: Batch,
    *,
    trust_code: bool,
    known: Mapping[str, Any] | None,
    keep: Keep,
    progress: Progress,
) -> Mapping[str, Any]:
    """Open the training data of the pool only when the table is measured, because they may be large."""
    from holdfast.config import rotating
    from holdfast.verbs.rotate.attackers import AttackerTable

    pool = pool_of(address)
    assert pool is not None
    trusted = {"device": device, "trust_code": trust_code}
    request = rotating.reopened(pool, check_settings(trusted, address, kind=RotateSettings))
    return AttackerTable(pool, request)(evidence, judged_on, known=known, keep=keep, progress=progress)


@dataclass(frozen=True)
class AssessInputs:
    """The settings of an assessment, with its model, data and surrogates as addresses or Python objects that are not
    opened yet.
    """

    settings: AssessSettings | CertifySettings
    sources: Sources
    surrogates: Sequence[Any]
    fit: DataLike | None
    across: Sequence[DataLike]
    members: tuple[Member, ...] | None
    """attacks that were given as objects; None if there are none"""
    baseline: Evidence | None
    command: str = ""

    @classmethod
    def of(cls, settings: AssessSettings | CertifySettings, command: str = "") -> "AssessInputs":
        """Return the inputs of a measurement from its settings, in which model and data are given as addresses.
        `command` is the command line that repeats the run.
        """
        run = settings.baseline
        baseline = None if run is None else open_run(Path(run)).evidence
        surrogates, fit, across = settings.surrogates, settings.fit, settings.across
        return cls(settings, sources_at(settings), surrogates, fit, across, None, baseline, command)

    @property
    def open_all(self) -> Opening:
        """Function without arguments that opens the model, the data and the surrogates. Worker processes call it as
        well.
        """
        settings = self.settings
        opening = partial(
            open_all,
            self.sources,
            self.surrogates,
            transform=settings.transform,
            adaptive=settings.adaptive,
        )
        return opening if self.smoothing is None else partial(_smoothed, opening, self.smoothing)

    @property
    def smoothing(self) -> Smoothing | None:
        """Randomised smoothing of the model, if that is the method of a certification; otherwise None."""
        settings = self.settings
        if not isinstance(settings, CertifySettings) or settings.method != SMOOTHING:
            return None
        chosen = {name: getattr(settings, name) for name in ("sigma", "draws", "failure_probability", "clip")}
        given = {name: value for name, value in chosen.items() if value is not None}
        return Smoothing(**given, seed=settings.seed)

    def request(self, subject: Subject, surrogates: tuple[Subject, ...]) -> AssessRequest:
        """Return the request of an assessment of the opened model and surrogates. It does not contain the measurement
        of attackers of a rotation pool.
        """
        sources = self.sources
        request = assess_request(
            self.settings,
            members=self.members,
            baseline=self.baseline,
            device=device_of_model(sources, subject, self.settings.device),
            target=subject.model.access,
            command=self.command,
        )
        if self.smoothing is not None:
            request = certify_request(request, [self.smoothing], [])
            request = request if subject.model.access == "gradients" else without_attacks(request)
        elif isinstance(self.settings, CertifySettings):
            request = certify_request(request, *_provers(self.settings), self.settings.geometry)
        guard = sources.model.inference.guard
        if guard is not None and not isinstance(self.settings, CertifySettings):
            request = with_trials(request, guard, subject)
        return replace(
            request,
            fit=open_fit(sources, self.fit, subject.model, request.plan),
            surrogates=surrogates,
            across=open_others(self.across, sources, subject.model),
        )


def with_trials(request: AssessRequest, guard: str, subject: Subject) -> AssessRequest:
    """Return the request of an assessment with the black-box attacks that measure the detectors of a guard, if it has
    any and the threat model supports them.
    """
    from holdfast.config.guard_opening import query_trials
    from holdfast.serving.query_trials import measurable

    trials = query_trials(guard)
    if trials is None or not measurable(request.plan.threat, subject.model.access):
        return request
    return replace(request, plan=replace(request.plan, trials=trials))


def _smoothed(opening: Opening, smoothing: Smoothing) -> tuple[Subject, Data, tuple[Subject, ...]]:
    """Open the inputs of a certification, whose model is the smoothed classifier of the opened one."""
    subject, data, surrogates = opening()
    return smoothed_subject(subject, smoothing), data, surrogates


def _provers(settings: CertifySettings) -> tuple[list[Prover], list[Prover]]:
    """The methods that run before the attacks, and those that run after them."""
    names = CASCADE if settings.method == AUTO else (settings.method,)
    limit = seconds(settings.timeout, "timeout")
    return (
        [prover(name, limit) for name in names if name not in LATE],
        [prover(name, limit) for name in names if name in LATE],
    )


@contextmanager
def opened_for_assess(
    inputs: AssessInputs, run: Path | None, *, resume: bool
) -> Iterator[tuple[Subject, Data, AssessRequest]]:
    """Context manager that opens the inputs of an assessment, and yields the model, the data and the request of the
    run.

    Answers of servers are stored in the folder of the run.
    """
    settings, sources = inputs.settings, inputs.sources
    if isinstance(settings, CertifySettings):
        refuse_uncertifiable(settings.threat)
    refuse_unusable_cluster(settings, sources.model.address)
    if sources.model.inference.guard is not None and settings.on != "local":
        raise UsageError(
            f"the guard {sources.model.inference.guard} is read on this machine only, and shards run on "
            f"{settings.on}",
            Remedy("on"),
        )
    with journaled(run, resume=resume, keep=sources.model.limits.keep_answers):
        subject, data, surrogates = inputs.open_all()
        table = attackers(sources, settings.device, adaptive=settings.adaptive)
        yield subject, data, replace(inputs.request(subject, surrogates), attackers=table)


def measured(
    inputs: AssessInputs,
    run: Path | None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
) -> Result:
    """Open the model and the data of an assessment or a certification, and take the steps of the run."""
    with opened_for_assess(inputs, run, resume=resume) as (subject, data, request):
        return assessing.assess(
            subject,
            data,
            request,
            run=run,
            resume=resume,
            progress=progress,
            opening=inputs.open_all,
            notify=notify,
            detail=detail,
        )


def rehearse(settings: AssessSettings, n: int) -> tuple[Result, int]:
    """Run an assessment on the first `n` examples without storing anything, as a basis for an estimate of its cost.

    Returns the result and the total number of examples.
    """
    inputs = AssessInputs.of(settings)
    subject, data, surrogates = inputs.open_all()
    request = replace(inputs.request(subject, surrogates), gates=(), workers=None, ray=None)
    examples = selected(data, n=min(n, len(data)), sample=None, seed=inputs.sources.seed)
    return assessing.assess(subject, examples, request), len(data)


def rehearse_served(settings: AssessSettings) -> Rehearsed:
    """Return an estimate of the number of inputs that an assessment would send to a model behind a server.

    At most 64 rows, or one larger batch, are sent to the server for the estimate.
    """
    inputs = AssessInputs.of(settings)
    sources = inputs.sources
    subject = open_subject(sources, transform=settings.transform)
    sent = inspection_counter(subject.model)
    if sent is None:
        raise UsageError(
            f"{sources.model.address} is not a model behind a server; its cost is estimated on a few examples"
        )
    surrogates = open_surrogates(inputs.surrogates, sources, subject.model)
    data = open_examples(sources, subject.model)
    subject = with_found_properties(subject, surrogates, data)
    return rehearsed(subject, data, inputs.request(subject, surrogates), sent)
