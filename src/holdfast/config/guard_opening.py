"""Makes the guard from its settings and its calibration."""

from pathlib import Path

import torch

from holdfast.config.grammar import seconds
from holdfast.config.groups import InputSpace
from holdfast.config.guard_settings import (
    EnergySettings,
    GuardSettings,
    MahalanobisSettings,
    RuleSettings,
    ScoredSettings,
    SqueezingSettings,
    StabilitySettings,
)
from holdfast.core.chain import canonical, digest
from holdfast.detectors.energy import Energy
from holdfast.detectors.mahalanobis import Mahalanobis
from holdfast.detectors.protocol import Detector
from holdfast.detectors.squeezing import FeatureSqueezing
from holdfast.detectors.stability import NoiseStability
from holdfast.reports.numbers import strict
from holdfast.serving.decisions import Action, Mode
from holdfast.serving.guard import GuardPipeline, QueryScorer
from holdfast.serving.observed import ObservedRate
from holdfast.serving.rules import QUERIES, RANGE, SCHEMA, InputDefence, InputSchema, Rule
from holdfast.verbs.request import Subject


def guard_pipeline(settings: GuardSettings, *, queries: QueryScorer | None = None) -> GuardPipeline:
    """Return the guard that the settings describe, before calibration.

    A rule without a threshold in the settings never fires until `serving.calibration` has set its threshold.
    """
    groups = rules_of(settings)
    low, high = settings.inputs.low, settings.inputs.high
    defence = settings.defence
    return GuardPipeline(
        schema=InputSchema(settings.inputs.shape, getattr(torch, settings.inputs.dtype), low, high),
        rules={name: _rule(name, group, settings.mode) for name, group in groups.items()},
        detectors={
            name: _detector(group, min(low), max(high))
            for name, group in groups.items()
            if name not in (SCHEMA, RANGE, QUERIES)
        },
        defence=(
            InputDefence(defence.bits, defence.median, min(low), max(high))
            if defence.bits or defence.median
            else None
        ),
        queries=queries if QUERIES in groups else None,
        outputs=settings.outputs,
        delay_s=seconds(settings.delay, "delay"),
        observed=ObservedRate(settings.false_positives),
    )


def rules_of(settings: GuardSettings) -> dict[str, RuleSettings]:
    """Return the settings of the rules that are evaluated, by name, in the order of their evaluation."""
    rules = settings.rules
    named = {
        SCHEMA: rules.schema_,
        RANGE: rules.range,
        QUERIES: rules.queries,
        "energy": rules.energy,
        "squeezing": rules.squeezing,
        "mahalanobis": rules.mahalanobis,
        "stability": rules.stability,
    }
    return {name: group for name, group in named.items() if group is not None}


def guard_digest(settings: GuardSettings) -> str:
    """Return the SHA-256 of all settings that change a score or a given threshold. Modes and actions may change without
    a new calibration.
    """
    without = {"mode", "action"}
    rules = {
        name: {key: value for key, value in group.model_dump(mode="json").items() if key not in without}
        for name, group in rules_of(settings).items()
    }
    parts = [settings.inputs, settings.defence]
    return digest(canonical([rules, settings.outputs, *(part.model_dump(mode="json") for part in parts)]))


def _rule(name: str, group: RuleSettings, mode: str) -> Rule:
    action = Action[group.action.upper()]
    if name in (SCHEMA, RANGE):
        return Rule(name, Mode(group.mode or mode), action, 0.0, fixed=True)
    threshold = group.threshold if isinstance(group, ScoredSettings) else None
    return Rule(
        name,
        Mode(group.mode or mode),
        action,
        torch.inf if threshold is None else threshold,
        threshold is not None,
    )


def _detector(group: RuleSettings, low: float, high: float) -> Detector:
    match group:
        case EnergySettings():
            return Energy(group.temperature)
        case SqueezingSettings():
            return FeatureSqueezing(group.bits, group.median, low, high)
        case MahalanobisSettings():
            return Mahalanobis(group.on, group.shrinkage)
        case StabilitySettings():
            return NoiseStability(group.sigma, group.draws, group.seed)
    raise AssertionError(f"{type(group).__name__} has no detector")


def served_digest(subject: Subject) -> str:
    """Return the SHA-256 of a model with its preprocessing, which a calibration names. The bounds are not part of it,
    as the guard has its own.
    """
    model = subject.model
    return digest(
        canonical(strict([subject.card["digest"], model.mean, model.std, model.output, model.layout]))
    )


def bounds_of(settings: GuardSettings) -> InputSpace:
    """Return the settings that read data in the range of the inputs of a guard."""
    return InputSpace(bounds=(min(settings.inputs.low), max(settings.inputs.high)))


def calibration_path(settings: GuardSettings, path: Path) -> Path:
    """Return the path of the calibration of the guard in a file, relative to the folder of the file."""
    if settings.calibration is not None:
        return path.parent / settings.calibration
    return path.with_suffix(".calibration.json")
