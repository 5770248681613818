"""Estimates the cost of an assessment, for settings of the command line or a configuration file."""

from dataclasses import replace
from pathlib import Path

from holdfast.config import expecting, resolve
from holdfast.config.planning import assess_request
from holdfast.config.references import Sources
from holdfast.config.settings import AssessSettings
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.sources.counting import look_at
from holdfast.sources.selection import selected
from holdfast.verbs import assess as assessing
from holdfast.verbs.rehearsal import Rehearsed, rehearsed
from holdfast.verbs.request import AssessRequest, Subject
from holdfast.verbs.result import Result
from holdfast.verbs.stored_runs import open_run


def rehearse(settings: AssessSettings, n: int) -> tuple[Result, int]:
    """Run the first `n` examples without storing anything. Returns the result and the total number of examples."""
    sources = resolve.sources_at(settings)
    subject, data, surrogates = resolve.open_all(
        sources,
        settings.suite.surrogates,
        transform=settings.options.transform,
        adaptive=settings.suite.adaptive,
    )
    request = replace(_request(settings, sources, subject, surrogates), gates=(), workers=None)
    few = selected(data, n=min(n, len(data)), sample=None, seed=sources.seed)
    return assessing.assess(subject, few, request), len(data)


def rehearse_served(settings: AssessSettings) -> Rehearsed:
    """Compute what a run would send to a server. At most 64 rows, or one larger batch, are sent for this."""
    sources = resolve.sources_at(settings)
    subject = resolve.open_subject(sources, transform=settings.options.transform)
    sent = look_at(subject.model)
    if sent is None:
        raise UsageError(
            f"{sources.model.address} is not a model behind a server; its cost is estimated on a few examples"
        )
    surrogates = resolve.open_surrogates(settings.suite.surrogates, sources, subject.model)
    data = resolve.open_examples(sources, subject.model)
    subject = expecting.with_found_properties(subject, surrogates, data)
    return rehearsed(subject, data, _request(settings, sources, subject, surrogates), sent)


def _request(
    settings: AssessSettings, sources: Sources, subject: Subject, surrogates: tuple[Subject, ...]
) -> AssessRequest:
    request = assess_request(settings, baseline=_baseline(settings), target=subject.model.access)
    fit = resolve.open_fit(sources, settings.others.fit, subject.model, request.plan)
    across = resolve.open_others(settings.options.across, sources, subject.model)
    return replace(request, fit=fit, surrogates=surrogates, across=across)


def _baseline(settings: AssessSettings) -> Evidence | None:
    return None if settings.reports.baseline is None else open_run(Path(settings.reports.baseline)).evidence
