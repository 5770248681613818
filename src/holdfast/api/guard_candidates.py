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
from holdfast.guard.calibration import Calibration, calibrated
from holdfast.guard.detectors.detector_protocol import Fitted
from holdfast.guard.detectors.mahalanobis import Mahalanobis
from holdfast.guard.query_rule import derived_key, guard_key
from holdfast.guard.rules import QUERIES
from holdfast.guard.states.memory import MemoryState
from holdfast.runs.assess.preparation import readied
from holdfast.settings.guard_settings import GuardSettings, read_guard_settings


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
    if "bounds" not in settings.model_fields_set:
        settings = settings.model_copy(update={"bounds": bounds_of(guard).bounds})
    alone = _for_candidate(guard, path, before, settings.model_copy(update={"guard": None}))
    if alone is None:
        return None
    thresholds = {name: max(alone.thresholds[name], value) for name, value in before.thresholds.items()}
    both = replace(alone, models=(*before.models, *alone.models), thresholds=thresholds)
    return both, alone


def _for_candidate(
    guard: GuardSettings, path: Path, before: Calibration, settings: Calibrate
) -> Calibration | None:
    subject = open_subject(settings)
    model = served_digest(subject)
    if model in before.models:
        return None
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
    pipeline = replace(pipeline, rules=rules)
    if all(rules[name].fixed for name in pipeline.calibrated):
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
