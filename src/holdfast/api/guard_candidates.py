"""Calibrates the guard of a server for a candidate that may replace the served model."""

from dataclasses import replace
from pathlib import Path

import torch

from holdfast.api.guard_opening import (
    bounds_of,
    guard_pipeline,
    query_radius,
    query_rule,
    served_digest,
    stored_calibration,
)
from holdfast.api.guards import calibration_stream
from holdfast.api.resolve import open_examples, open_subject
from holdfast.api.verb_settings import Calibrate
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.guard.calibration import Calibration, calibrated
from holdfast.guard.detectors.mahalanobis import Fitted, Mahalanobis
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.query_rule import derived_key, guard_key
from holdfast.guard.rules import QUERIES
from holdfast.guard.states.memory import MemoryState
from holdfast.reports.words import amount
from holdfast.runs.assess.preparation import readied
from holdfast.settings.groups import ExampleSelection
from holdfast.settings.guard_settings import GuardSettings, read_guard_settings
from holdfast.statistics.intervals import fewest_examples


def candidate_calibrations(settings: Calibrate) -> tuple[Calibration, Calibration] | None:
    """Return the calibration of the guard of the settings for the served model and the candidate `model` together, and
    the one for the candidate alone; None if the guard has no calibration or accepts the candidate already.

    What does not depend on the model, such as the radius of the query detector, stays the same. The other rules get
    thresholds at which all rules together fire on at most the share `false_positives` of benign inputs; those for both
    models are the larger ones, so that the share holds for each. Raises `UsageError` for a rule that is fitted on the
    outputs of the served model, because no other model can share its parameters.
    """
    path = Path(settings.guard or "guard.yaml")
    guard = read_guard_settings(path)
    before = stored_calibration(guard, path)
    if before is None:
        return None
    alone = _for_candidate(guard, path, before, _in_range(settings, guard).model_copy(update={"guard": None}))
    if alone is None:
        return None
    thresholds = {name: max(alone.thresholds[name], value) for name, value in before.thresholds.items()}
    both = replace(alone, models=(*before.models, *alone.models), thresholds=thresholds)
    return both, alone


def refuse_uncalibratable(settings: Calibrate) -> None:
    """Raise the error with which `candidate_calibrations` would fail for any candidate: for a rule that is fitted on
    outputs, for examples that the guard does not accept, or for so few that thresholds may not exist. `model` is the
    served model, for which the guard is calibrated as a test.
    """
    path = Path(settings.guard or "guard.yaml")
    guard = read_guard_settings(path)
    before = stored_calibration(guard, path)
    if before is None:
        return
    settings = _in_range(settings, guard).model_copy(update={"guard": None})
    pipeline = _shared(guard, path, before)
    fixed = [pipeline.rules[name].fixed for name in pipeline.calibrated]
    if all(fixed):
        return
    subject = open_subject(settings)
    examples = open_examples(settings, subject.model)
    n_rules, rate = fixed.count(False) + any(fixed), before.false_positives
    if len(examples) < (enough := fewest_examples(rate, n_rules)):
        raise UsageError(
            f"the guard is calibrated for the candidate on {len(examples):,} inputs; {enough:,} suffice for its "
            f"{amount(n_rules, 'rules')} at a false-positive rate of {100 * rate:g} %, and fewer may be too few; give "
            "data with more test examples, or calibrate the guard at a higher rate before",
            *_more_examples(settings, subject.model, enough),
        )
    with readied(subject, examples, torch.device("cpu")) as (target, _):
        calibrated(pipeline, calibration_stream(pipeline, target.logits, examples), rate)


def _more_examples(settings: Calibrate, model: Classifier, enough: int) -> tuple[Remedy, ...]:
    """Return the option that chooses the examples with a larger number, if the data have so many."""
    if settings.n is None and settings.sample is None:
        return ()
    everything = open_examples(settings, model, selection=ExampleSelection())
    if len(everything) < enough:
        return ()
    return (Remedy("sample", enough) if settings.n is None else Remedy("n", enough, option="-n"),)


def _in_range(settings: Calibrate, guard: GuardSettings) -> Calibrate:
    """Return the settings with the range of the inputs of the guard if they give none."""
    if "bounds" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"bounds": bounds_of(guard).bounds})


def _for_candidate(
    guard: GuardSettings, path: Path, before: Calibration, settings: Calibrate
) -> Calibration | None:
    subject = open_subject(settings)
    model = served_digest(subject)
    if model in before.models:
        return None
    pipeline = _shared(guard, path, before)
    if all(pipeline.rules[name].fixed for name in pipeline.calibrated):
        return replace(before, models=(model,))
    examples = open_examples(settings, subject.model)
    with readied(subject, examples, torch.device("cpu")) as (target, _):
        stream = calibration_stream(pipeline, target.logits, examples)
        _, found = calibrated(pipeline, stream, before.false_positives)
    return replace(
        found,
        guard=before.guard,
        models=(model,),
        data=examples.digest,
        thresholds={**before.thresholds, **found.thresholds},
        parameters=before.parameters,
    )


def _shared(guard: GuardSettings, path: Path, before: Calibration) -> GuardPipeline:
    """Return the guard whose fitted rules have a given threshold. Raises `UsageError` for a rule that is fitted on the
    outputs of the served model.
    """
    queries = None
    if guard.rules.queries is not None:
        radius, key = query_radius(guard.rules.queries, before), derived_key(guard_key(path), QUERIES)
        queries = query_rule(guard, radius, key, MemoryState())
    pipeline = guard_pipeline(guard, queries, before)
    rules = dict(pipeline.rules)
    for name, detector in pipeline.detectors.items():
        if isinstance(detector, Fitted):
            if not isinstance(detector, Mahalanobis) or detector.on != "inputs":
                raise UsageError(
                    f"the rule {name} of {path.name} is fitted on outputs of the served model, so that a candidate "
                    "cannot be served beside it; set its setting on to inputs, or remove the rule"
                )
            rules[name] = replace(rules[name], fixed=True)
    return replace(pipeline, rules=rules)
