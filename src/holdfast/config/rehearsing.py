"""Estimates the cost of an assessment, for settings of the command line or a configuration file."""

from dataclasses import replace
from pathlib import Path

from holdfast.config import expecting, ordering
from holdfast.config.settings import AssessSettings
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.sources.counting import look_at
from holdfast.sources.selection import selected
from holdfast.verbs import assess as assessing
from holdfast.verbs.rehearsal import Rehearsed, rehearsed
from holdfast.verbs.result import Result
from holdfast.verbs.stored_runs import open_run


def rehearse(settings: AssessSettings, n: int) -> tuple[Result, int]:
    """Run the first `n` examples without storing anything. Returns the result and the total number of examples."""
    subject, data, surrogates = ordering.open_all(settings)
    planned = ordering.order(settings, baseline=_baseline(settings), target=subject.model.access)
    fit = ordering.opened_fit(settings, subject.model, planned.plan)
    across = ordering.opened_across(settings, subject.model)
    order = replace(planned, gates=(), workers=None, fit=fit, surrogates=surrogates, across=across)
    few = selected(data, n=min(n, len(data)), sample=None, seed=settings.seed)
    return assessing.assess(subject, few, order), len(data)


def rehearse_served(settings: AssessSettings) -> Rehearsed:
    """Compute what a run would send to a server. At most 64 rows, or one larger batch, are sent for this."""
    subject = ordering.opened_subject(settings)
    sent = look_at(subject.model)
    if sent is None:
        raise UsageError(
            f"{settings.model} is not a model behind a server; its cost is estimated on a few examples"
        )
    surrogates = ordering.opened_surrogates(settings, subject.model)
    data = ordering.opened_data(settings, subject.model)
    subject = expecting.with_found_properties(subject, surrogates, data)
    order = ordering.order(settings, baseline=_baseline(settings), target=subject.model.access)
    fit = ordering.opened_fit(settings, subject.model, order.plan)
    across = ordering.opened_across(settings, subject.model)
    order = replace(order, fit=fit, surrogates=surrogates, across=across)
    return rehearsed(subject, data, order, sent)


def _baseline(settings: AssessSettings) -> Evidence | None:
    return None if settings.baseline is None else open_run(Path(settings.baseline)).evidence
