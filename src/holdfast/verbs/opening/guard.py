"""Makes a guard from its settings, its calibration, its key and its state, and states what an operator should know
about its rules.
"""

import os
import shlex
from dataclasses import dataclass, replace
from math import inf, nextafter, sqrt
from pathlib import Path

import torch
from torch import Tensor

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import HoldfastError, UsageError, model_argument
from holdfast.core.estimate import Estimate
from holdfast.guard.calibration import Calibration, read_calibration, refuse_stale, with_calibration
from holdfast.guard.detectors.queries import (
    QueryDetector,
    QuerySettings,
    QueryState,
    StateLimits,
    covered_eps,
    for_cameras,
    radius_for,
)
from holdfast.guard.guard import GuardPipeline, QueryScorer
from holdfast.guard.query_rule import QueryRule, QueryTrials, derived_key, guard_key, rejecting, scaled
from holdfast.guard.rules import (
    QUERIES,
    RANGE,
    SCHEMA,
    Action,
    Basis,
    InputDefence,
    InputSchema,
    Mode,
    ObservedRate,
    Rule,
)
from holdfast.guard.state_in_memory import MemoryState
from holdfast.guard.state_in_redis import RedisState
from holdfast.guard.state_in_sqlite import SQLiteState
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.reports.charts import rounded_up
from holdfast.reports.words import strict
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.store.encryption import Seal, refuse_unready
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import InputSpace
from holdfast.settings.guard_settings import (
    ENVIRONMENT,
    SQLITE,
    GuardSettings,
    QueriesSettings,
    RuleSettings,
    ScoredSettings,
    detectors_of,
    is_state,
    read_guard_settings,
)


def open_guard(path: Path, model: str | None = None, *, logits: bool = True) -> GuardPipeline:
    """Return the guard that a guard.yaml describes, with its calibration and the state of its query detector, for a
    server whose model is a `Classifier`: its outputs are logits, also if the network returns probabilities.

    Without `logits` the outputs are those that the settings state, as behind a proxy. `model` is the
    `served_digest` of the model, with which the calibration is compared. Raises `UsageError` for invalid settings,
    and for a calibration with other settings or another model. Rules that are neither calibrated nor have a given
    threshold only report.
    """
    settings = read_guard_settings(path)
    calibration = stored_calibration(settings, path, model)
    pipeline = ready_guard(settings, path, calibration)
    return replace(pipeline, outputs="logit") if logits else pipeline


def stored_calibration(settings: GuardSettings, path: Path, model: str | None = None) -> Calibration | None:
    """Return the calibration of the guard in a file, or None if there is none. Raises `UsageError` if it was made with
    other settings or, if `model` is given, with another model.
    """
    place = calibration_path(settings, path)
    if not place.exists():
        return None
    calibration = read_calibration(place)
    refuse_stale(calibration, guard_digest(settings), model, str(place))
    return calibration


def refuse_unusable(path: Path) -> None:
    """Raise `UsageError` for a guard that a server would refuse before it opens its model: of rules that contradict its
    inputs, or with a calibration that was made with other settings.

    No state and no key is created.
    """
    settings = read_guard_settings(path)
    calibration, queries = stored_calibration(settings, path), None
    if settings.rules.queries is not None:
        radius = query_radius(settings.rules.queries, calibration)
        queries = query_rule(settings, radius, bytes(32), MemoryState())  # any key
    guard_pipeline(settings, queries, calibration)


def ready_guard(settings: GuardSettings, path: Path | None, calibration: Calibration | None) -> GuardPipeline:
    """Return the guard with its calibration and with the state of its query detector."""
    queries = None
    if settings.rules.queries is not None:
        radius, key = query_radius(settings.rules.queries, calibration), derived_key(guard_key(path), QUERIES)
        queries = query_rule(settings, radius, key, open_state(settings, path, key))
    pipeline = guard_pipeline(settings, queries, calibration)
    if calibration is not None:
        pipeline = replace(pipeline, observed=ObservedRate(calibration.false_positives))
    return replace(pipeline, stored=input_storage(settings, path))


def guarded_subject(subject: DescribedModel, guard: str) -> DescribedModel:
    """Return the model with the calibrated stateless detectors of a guard, `FILE` or `FILE:RULE`, as a part of it.

    Raises `UsageError` for a guard that was not calibrated with this model.
    """
    path, name = _file_and_rule(guard)
    settings = read_guard_settings(path)
    if settings.inputs.kind != "numbers":
        raise UsageError(
            f"guard is {guard}, whose inputs are {settings.inputs.kind}, and inputs of numbers are attacked with it",
            model_argument("guard"),
        )
    if subject.model.remote:
        raise UsageError(
            f"guard is {guard}, which becomes a part of the model, and this model is behind a server, whose own guard "
            "answers the attacks",
            model_argument("guard"),
        )
    calibration = stored_calibration(settings, path, served_digest(subject))
    if name == QUERIES or (name is None and set(rules_of(settings)) <= {SCHEMA, RANGE, QUERIES}):
        return subject  # the stateful rule is measured apart, see `query_trials`
    pipeline = guard_pipeline(settings_without_queries(settings), None, calibration)
    scales = {} if calibration is None else dict(calibration.scales)
    model = rejecting(subject.model, pipeline, scales, name)
    thresholds = {
        each: rule.threshold
        for each, rule in pipeline.rules.items()
        if each in pipeline.detectors and name in (None, each)
    }
    identity = digest(
        canonical([subject.digest, guard_digest(settings), {k: repr(v) for k, v in thresholds.items()}])
    )
    rate = (
        ""
        if calibration is None
        else (f"; together they fire on at most {100 * calibration.false_positives:g} % of benign inputs")
    )
    note = f"the guard {path.name} rejects inputs by {', '.join(thresholds)}{rate}"
    card = {**subject.card, "guard": {"file": path.name, "rules": [*thresholds]}}
    return DescribedModel(model, identity, card, (*subject.notes, note))


def query_trials(guard: str) -> QueryTrials | None:
    """Return the black-box attacks that measure the detectors of a guard, `FILE` or `FILE:RULE`; None without any.

    Raises `UsageError` for a query detector whose radius is neither given nor calibrated.
    """
    path, name = _file_and_rule(guard)
    settings = read_guard_settings(path)
    rule = settings.rules.queries
    if rule is None or name not in (None, QUERIES):
        return QueryTrials(None) if set(rules_of(settings)) - {SCHEMA, RANGE, QUERIES} else None
    radius = query_radius(rule, stored_calibration(settings, path))
    if radius is None:
        raise UsageError(
            f"the rule {QUERIES} of the guard has no radius; run holdfast calibrate first, or give a radius"
        )
    return QueryTrials(_query_settings(rule, radius))


def _file_and_rule(guard: str) -> tuple[Path, str | None]:
    file, colon, rule = guard.rpartition(":")
    return (Path(file), rule) if colon and not Path(guard).exists() else (Path(guard), None)


def settings_without_queries(settings: GuardSettings) -> GuardSettings:
    """Return the settings of a guard without its stateful rule, for measurements that have no sequence of queries."""
    return settings.model_copy(update={"rules": settings.rules.model_copy(update={"queries": None})})


def input_storage(settings: GuardSettings, path: Path | None) -> StoredInputs | None:
    """Return the storage of inputs that the settings describe, or None if no inputs are stored.

    Raises `UsageError` for a guard without a file, whose key would be lost with the process.
    """
    store = settings.store
    if store.inputs == "none":
        return None
    if path is None:
        raise UsageError(
            "store.inputs is flagged, and a guard without a file has no lasting key; read it from a file"
        )
    refuse_unready()
    seal = Seal(derived_key(guard_key(path), "inputs"), str(path))
    return StoredInputs(
        path.parent / store.folder, seal, 86_400.0 * store.retention_days, 2**20 * store.max_mb
    )


def guard_to_calibrate(
    settings: GuardSettings, path: Path | None, x: Tensor | None, rate: float
) -> tuple[GuardPipeline, float | None]:
    """Return the guard before calibration, with a query detector with an empty state, and the radius of that detector
    that was fitted on inputs `x` (n, *shape) to a rate of false positives; None for a radius that is given or for no
    such detector.

    `path` is the file of the settings. The detector has the key of the guard, because how often it fires depends on the
    key; without a file, the key is random.
    """
    rule = settings.rules.queries
    if rule is None:
        return guard_pipeline(settings), None
    key, radius = derived_key(guard_key(path), QUERIES), None
    if fits_radius(settings):
        assert x is not None, "inputs are divided if a radius is to be fitted"
        inputs, limits = scaled(x, schema_of(settings)), _query_settings(rule, None)
        radius = radius_for(
            inputs,
            key,
            limits,
            false_positives=rate,
            eps=rule.eps,
            symbols=settings.inputs.kind != "numbers",
        )
    return guard_pipeline(settings, query_rule(settings, radius, key, MemoryState())), radius


def query_radius(rule: QueriesSettings, calibration: Calibration | None) -> float | None:
    """Return the radius of the query detector that is given or calibrated; None for neither."""
    if rule.radius is not None or calibration is None:
        return rule.radius
    fitted: float | None = calibration.parameters.get(QUERIES, {}).get("radius")
    return fitted


def fits_radius(settings: GuardSettings) -> bool:
    """Return whether a calibration fits the radius of the query detector."""
    return settings.rules.queries is not None and settings.rules.queries.radius is None


def guard_pipeline(
    settings: GuardSettings, queries: QueryScorer | None = None, calibration: Calibration | None = None
) -> GuardPipeline:
    """Return the guard that the settings describe, with its calibration if there is one.

    A stateless detector without a threshold in the settings never fires until `guard.calibration` has set it.
    """
    groups = rules_of(settings)
    low, high = min(settings.inputs.low), max(settings.inputs.high)
    squeezes = settings.defence
    pipeline = GuardPipeline(
        schema=schema_of(settings),
        rules={name: _rule(name, group, settings.mode, calibration) for name, group in groups.items()},
        detectors=detectors_of(settings),
        defence=InputDefence(squeezes.bits, squeezes.median, low, high)
        if squeezes.bits or squeezes.median
        else None,
        queries=queries,
        outputs=settings.outputs,
        delay_s=seconds(settings.delay, "delay"),
        observed=ObservedRate(settings.false_positives),
    )
    return pipeline if calibration is None else with_calibration(pipeline, calibration)


def query_rule(settings: GuardSettings, radius: float | None, key: bytes, state: QueryState) -> QueryRule:
    """Return the query detector that the settings describe. `radius` is the calibrated one, used if none is given."""
    rule, shape = settings.rules.queries, settings.inputs.shape
    assert rule is not None, "called for a guard with this rule"
    sizes = _compared_shape(settings)
    if sizes is not None and len(sizes) < len(shape):
        raise UsageError(
            f"inputs.shape is {list(shape)}, and the query detector compares inputs of one shape; give all sizes, or "
            "remove the rule queries"
        )
    return QueryRule(QueryDetector(key, state, sizes, _query_settings(rule, radius)), schema_of(settings))


def _compared_shape(settings: GuardSettings) -> list[int] | None:
    """Return the known sizes of the inputs that the query detector compares; None for rows of symbols of any length."""
    inputs = settings.inputs
    return [size for size in inputs.shape if size is not None] if inputs.kind == "numbers" else None


def open_state(
    settings: GuardSettings, path: Path | None, key: bytes
) -> SQLiteState | MemoryState | RedisState:
    """Open the state of the query detector: a SQLite file next to the settings, a Redis server, or the memory of this
    process. States of guards with different keys are separate on one Redis server.
    """
    state, at = settings.state, _address(settings.state.at)
    limits = StateLimits(half_life_s=seconds(state.half_life, "half_life"))
    if at == "memory" or path is None:
        return MemoryState(limits)
    if at.startswith(SQLITE):
        return SQLiteState(path.parent / at.removeprefix(SQLITE), limits, fail=state.on_loss)
    name = f"holdfast-guard-{derived_key(key, 'state').hex()[:16]}"
    return RedisState(at, limits, fail=state.on_loss, name=name)


def _address(at: str) -> str:
    """The address of a state, which may be in an environment variable, as it may contain a password."""
    if not at.startswith(ENVIRONMENT):
        return at
    variable = at.removeprefix(ENVIRONMENT)
    address = os.environ.get(variable, "")
    if not is_state(address):
        raise UsageError(
            f"state.at is {at!r}, and the variable {variable} does not contain an address such as redis://HOST:6379/0; "
            "set it"
        )
    return address


def rules_of(settings: GuardSettings) -> dict[str, RuleSettings]:
    """Return the settings of the rules that are evaluated, by name, in the order of their evaluation."""
    rules = settings.rules
    named = {
        SCHEMA: rules.schema_,
        RANGE: rules.range,
        QUERIES: rules.queries,
        **rules.detectors,
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
    # so that guards of numbers, which had no kind before, keep their calibrations
    unchanged = {"kind"} if settings.inputs.kind == "numbers" else set()
    inputs = settings.inputs.model_dump(mode="json", exclude=unchanged)
    return digest(canonical([rules, settings.outputs, inputs, settings.defence.model_dump(mode="json")]))


def served_digest(subject: DescribedModel) -> str:
    """Return the SHA-256 of a model with its preprocessing, which a calibration names.

    The bounds are not part of it, as the guard has its own, and neither are layout and meaning of the outputs, which
    may be found after the model was opened.
    """
    return digest(canonical(strict([subject.card["digest"], subject.model.mean, subject.model.std])))


def bounds_of(settings: GuardSettings) -> InputSpace:
    """Return the settings that read data in the range of the inputs of a guard."""
    return InputSpace(bounds=(min(settings.inputs.low), max(settings.inputs.high)))


def calibration_path(settings: GuardSettings, path: Path) -> Path:
    """Return the path of the calibration of the guard in a file, relative to the folder of the file."""
    if settings.calibration is not None:
        return path.parent / settings.calibration
    return path.with_suffix(".calibration.json")


def schema_of(settings: GuardSettings) -> InputSchema:
    """Return what the guard of these settings accepts as inputs."""
    inputs = settings.inputs
    return InputSchema(inputs.shape, getattr(torch, inputs.dtype), inputs.low, inputs.high, inputs.kind)


def basis_of(name: str, group: RuleSettings, calibration: Calibration | None) -> Basis:
    """Return where the threshold of a rule comes from. Of the query detector it is the radius, without which the number
    of near duplicates means nothing.
    """
    match group:
        case QueriesSettings():
            given, fitted = group.radius, calibration is not None and name in calibration.parameters
        case ScoredSettings():
            given, fitted = group.threshold, calibration is not None and name in calibration.thresholds
        case _:
            return Basis.GIVEN
    if given is not None:
        return Basis.GIVEN
    return Basis.FITTED if fitted else Basis.UNFITTED


def _rule(name: str, group: RuleSettings, mode: str, calibration: Calibration | None) -> Rule:
    mode_of_rule, action = Mode(group.mode or mode), Action[group.action.upper()]
    basis = basis_of(name, group, calibration)
    if basis is Basis.UNFITTED and mode_of_rule is Mode.ENFORCE:
        mode_of_rule = Mode.SHADOW  # its false-positive rate may be near 1
    if name in (SCHEMA, RANGE):
        return Rule(name, mode_of_rule, action, 0.0, fixed=True)
    if isinstance(group, QueriesSettings):  # a query detector rejects from the threshold on, a rule above it
        threshold = nextafter(_query_settings(group, None).threshold, 0.0)
        return Rule(name, mode_of_rule, action, threshold, fixed=True, basis=basis)
    given = group.threshold if isinstance(group, ScoredSettings) else None
    return Rule(name, mode_of_rule, action, inf if given is None else given, given is not None, basis)


def _query_settings(rule: QueriesSettings, radius: float | None) -> QuerySettings:
    usual, fitted = QuerySettings(), radius if rule.radius is None else rule.radius
    settings = replace(
        usual,
        threshold=usual.threshold if rule.threshold is None else rule.threshold,
        radius=usual.radius if fitted is None else fitted,
    )
    return for_cameras(settings) if rule.cameras else settings


_ROUNDED = 1e-6  # so that a radius that was computed from eps covers it


@dataclass(frozen=True)
class GuardNote:
    """A note about a rule of a guard."""

    rule: str
    basis: Basis
    """where the threshold or the radius of the rule comes from"""
    warns: bool
    """whether the rule does not do what the settings state, or what it does was not measured"""
    text: str

    def __str__(self) -> str:
        return self.text


def guard_notes(settings: GuardSettings, calibration: Calibration | None) -> tuple[GuardNote, ...]:
    """Return the notes about the rules of a guard that are to act or to record what they would do."""
    notes = []
    for name, group in rules_of(settings).items():
        mode = Mode(group.mode or settings.mode)
        if name in (SCHEMA, RANGE) or mode is Mode.OBSERVE:
            continue
        basis = basis_of(name, group, calibration)
        value = "radius" if name == QUERIES else "threshold"
        if basis is Basis.UNFITTED:
            text = (
                f"the rule {name} only reports, although its mode is {mode}: its {value} was neither calibrated nor "
                f"given; run holdfast calibrate MODEL DATA --guard FILE, or give {value}: in the settings"
            )
            notes.append(GuardNote(name, basis, warns=True, text=text))
        elif basis is Basis.GIVEN:
            rate = None if calibration is None else calibration.measured_of(name)
            measured = (
                "and its false-positive rate was not measured; holdfast calibrate measures it"
                if rate is None
                else f"and it fires on {rate_text(rate)} of {rate.n:,} benign inputs"
            )
            text = f"the {value} of the rule {name} is that of the settings, {measured}"
            notes.append(GuardNote(name, basis, warns=rate is None, text=text))
        covered = coverage(settings, calibration) if name == QUERIES else None
        if covered is not None:
            notes.append(GuardNote(name, basis, warns=covered.short, text=covered.text))
    return tuple(notes)


def unchecked_of_file(path: Path) -> str:
    """Return a sentence with what is known about the guard in a file only after its model was opened."""
    settings = read_guard_settings(path)
    place, calibration = calibration_path(settings, path), stored_calibration(settings, path)
    shape = f"whether the model accepts inputs of shape {list(settings.inputs.shape)}"
    if calibration is None:
        return f"not checked, because no model was opened: {shape}. There is no calibration {str(place)!r}"
    models = ", ".join(each[:12] for each in calibration.models)
    return (
        f"not checked, because no model was opened: {shape}, and whether it is the model {models}, with which "
        f"{str(place)!r} was calibrated. holdfast serve MODEL --guard {shlex.quote(str(path))} checks both"
    )


def notes_of_file(path: Path) -> tuple[str, ...]:
    """Return the notes about the guard in a file, and why its calibration cannot be used if this is so."""
    settings, calibration, faults = read_guard_settings(path), None, []
    try:
        calibration = stored_calibration(settings, path)
    except HoldfastError as error:
        faults.append(error.on_command_line())
    return (*faults, *(note.text for note in guard_notes(settings, calibration)))


@dataclass(frozen=True)
class Coverage:
    """Size of the changes of attacks that the radius of a query detector covers."""

    radius: float
    eps: float
    """largest change that it covers"""
    stated: float
    """largest change that the settings state"""
    of: str = ""
    """what changes are a share of; empty for changes of values"""

    @property
    def short(self) -> bool:
        """Whether it covers less than the settings state."""
        return self.eps < self.stated * (1 - _ROUNDED)

    @property
    def text(self) -> str:
        """What the radius covers, in a sentence."""
        text = f"queries: the radius {self.radius:.3g} covers changes up to eps {self.eps:.2g}{self.of}"
        if not self.short:
            return text
        ratio = self.stated / self.eps
        larger = rounded_up(self.radius * (sqrt(ratio) if self.of else ratio), 3)
        return (
            f"{text}, less than eps {self.stated:.3g} of the settings. Attacks with larger changes may not be seen. "
            f"`radius: {larger}` covers them, and may fire on more benign inputs. holdfast calibrate measures this "
            "rate, and refuses a radius that fires more often than the stated rate"
        )


def coverage(settings: GuardSettings, calibration: Calibration | None) -> Coverage | None:
    """Return which changes the radius of the query detector covers; None without one that is given or calibrated."""
    rule, sizes = settings.rules.queries, _compared_shape(settings)
    if rule is None or (sizes is not None and len(sizes) < len(settings.inputs.shape)):
        return None
    radius, of = query_radius(rule, calibration), ""
    if sizes is None:
        unit = "bytes" if settings.inputs.kind == "files" else "characters"
        of = f" (the share of the runs of three {unit})"
    return None if radius is None else Coverage(radius, covered_eps(radius, sizes), rule.eps, of)


def rate_text(rate: Estimate) -> str:
    """Return a share of inputs in percent with its interval."""
    low, high = (f"{100 * end:.2g}" for end in (rate.low, rate.high))
    return f"{100 * rate.value:.2g} % (95 % interval: {low} to {high} %)"
