"""Calibration of a guard: thresholds with which its rules together fire on at most a given share of benign inputs."""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.guard.detectors.outputs import Fitted, Observation
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.rules import QUERIES, RANGE, Basis, InputSchema, Rule
from holdfast.io.files import content_of_file
from holdfast.reports.charts import rounded_up
from holdfast.runs.store.files import mode_of, write_atomically
from holdfast.statistics.intervals import clopper_pearson, combined_thresholds, fewest_examples

_CONSTANT = 1e-6
"""relative spread of scores up to which they count as equal"""

_MOST_BYTES = 2**28
"""Largest size of the file, which contains the parameters of detectors, such as the features of clean inputs."""
FORMAT = 1
"""version of the format of calibration files"""


@dataclass(frozen=True)
class Calibration:
    """Thresholds of the rules of a guard, with what they depend on."""

    false_positives: float
    """share of benign inputs on which the rules together may fire"""
    n: int
    """number of calibration inputs"""
    fired: int
    """number of calibration inputs on which a rule with its threshold fires"""
    thresholds: Mapping[str, float]
    """threshold of each calibrated rule"""
    guard: str
    """digest of the settings of the guard"""
    models: tuple[str, ...] = ()
    """digests of the models whose outputs were used; several for the parameter sets of a pool"""
    data: str = ""
    """digest of the calibration inputs"""
    scales: Mapping[str, float] = field(default_factory=dict)
    """standard deviation of the score of each stateless detector on the calibration inputs"""
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """parameters of fitted detectors, by the names of their rules"""
    fired_by: Mapping[str, int] = field(default_factory=dict)
    """number of calibration inputs on which each rule fires"""

    @property
    def measured(self) -> Estimate:
        """Share of the calibration inputs on which a rule fires, with a 95 % interval of the share of new inputs.

        How often `queries` fires depends on how many inputs arrive in a half-life, and production may have more or less
        than the calibration. With this rule, the interval therefore extends to `false_positives`, the rate to which the
        radius is fitted, and its lower end is that of the other rules.
        """
        if QUERIES not in self.fired_by:
            return self._share(self.fired)
        others = (count for name, count in self.fired_by.items() if name != QUERIES)
        return self._widened(self._share(self.fired), max(others, default=0))

    def measured_of(self, rule: str) -> Estimate | None:
        """Return the same share for one rule, or None if it was not measured."""
        if rule not in self.fired_by:
            return None
        share = self._share(self.fired_by[rule])
        return self._widened(share, 0) if rule == QUERIES else share

    def _share(self, fired: int) -> Estimate:
        # The interval also holds for fitted thresholds. The share of new inputs above the k-th largest of n values is
        # distributed as Beta(k, n + 1 - k). Its upper quantile is the upper end for k - 1 of n, and its lower one is
        # above the lower end.
        return Estimate(fired / self.n, *clopper_pearson(fired, self.n), self.n)

    def _widened(self, share: Estimate, fewest: int) -> Estimate:
        low, _ = clopper_pearson(fewest, self.n)
        return replace(share, low=low, high=max(share.high, self.false_positives))


def calibrated(
    pipeline: GuardPipeline,
    stream: Iterable[tuple[Tensor, Observation]],
    false_positives: float,
    fit: Observation | None = None,
    labels: Tensor | None = None,
    *,
    fitted_on: int = 0,
) -> tuple[GuardPipeline, Calibration]:
    """Return the guard with thresholds at which its rules fire on at most the share `false_positives` of inputs like
    those of `stream`, and the calibration without digests. Rules with a given threshold are measured, too.

    The stream contains batches of benign inputs as clients send them, each with what the stateless detectors observe:
    the inputs after the defence, with the outputs of the model. The query detector receives them in this order.
    Detectors that need a fit are fitted on `fit` and its `labels`, which must be other inputs; `fitted_on` is their
    number, for messages. Raises `UsageError` if there are too few inputs, if the scores do not depend on them, or if
    rules with a given threshold fire more often.
    """
    names, pipeline = pipeline.calibrated, _fitted(pipeline, fit, labels)
    if not names:
        raise UsageError("the guard has no rule to calibrate; add one, as in rules: {energy: {}}")
    batches = [_scores(pipeline, x, seen) for x, seen in stream]
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in names} if batches else {}
    n = len(columns[names[0]]) if columns else 0
    free = [name for name in names if not pipeline.rules[name].fixed]
    given = {
        name: columns[name] > rule.threshold
        for name, rule in pipeline.rules.items()
        if name in columns and rule.fixed
    }
    already = torch.stack([*given.values()]).any(0) if given else None
    n_rules = len(free) + (already is not None)
    refuse_too_few(n, false_positives, n_rules, fitted_on)
    for name in free:
        _refuse_constant(name, columns[name])
    thresholds = combined_thresholds([columns[name] for name in free], false_positives, already)
    if thresholds is None:
        if already is not None and int(already.sum()) + 1 > false_positives * (n + 1):
            raise UsageError(_fires_too_often(pipeline, given, already, false_positives, len(free)))
        raise UsageError(_no_threshold(false_positives, n_rules, _counted(n, fitted_on)))
    by_name = dict(zip(free, thresholds, strict=True))
    ready = with_thresholds(pipeline, by_name)
    above = {name: columns[name] > ready.rules[name].threshold for name in names}
    scales = {name: float(columns[name].std()) or 1.0 for name in names if name in pipeline.detectors}
    return ready, Calibration(
        false_positives,
        n,
        int(torch.stack([*above.values()]).any(0).sum()),
        by_name,
        "",
        scales=scales,
        parameters=_parameters(pipeline),
        fired_by={name: int(fired.sum()) for name, fired in above.items()},
    )


def with_calibration(pipeline: GuardPipeline, calibration: Calibration) -> GuardPipeline:
    """Return the guard with the thresholds and the fitted detectors of a calibration."""
    detectors = dict(pipeline.detectors)
    for name, parameters in calibration.parameters.items():
        if isinstance(detectors.get(name), Fitted):
            tensors = {key: _tensor(stored) for key, stored in parameters.items()}
            detectors[name] = replace(detectors[name], **tensors)  # type: ignore[type-var]  # a dataclass
    return with_thresholds(replace(pipeline, detectors=detectors), calibration.thresholds)


def with_thresholds(pipeline: GuardPipeline, thresholds: Mapping[str, float]) -> GuardPipeline:
    """Return the guard with other thresholds of some rules, by name."""
    rules: dict[str, Rule] = dict(pipeline.rules)
    for name, threshold in thresholds.items():
        rules[name] = replace(rules[name], threshold=threshold)
    return replace(pipeline, rules=rules)


def write_calibration(calibration: Calibration, path: Path, mode: int | None = None) -> None:
    """Write a calibration to a JSON file with a digest of its content. Without `mode`, an existing file keeps its
    mode.
    """
    content = {"format": FORMAT, **asdict(calibration), "models": list(calibration.models)}
    content["thresholds"] = {name: _text(value) for name, value in calibration.thresholds.items()}
    text = json.dumps({**content, "digest": digest(canonical(content))}, indent=2)
    write_atomically(path, text.encode() + b"\n", mode_of(path) if mode is None else mode)


def read_calibration(path: Path) -> Calibration:
    """Return the calibration in a file. Raises `TargetError` if it cannot be read or was changed."""
    way_out = "calibrate the guard again with holdfast calibrate"
    try:
        content = json.loads(content_of_file(path, "calibration", most=_MOST_BYTES, advice=way_out))
        stored = content.pop("digest")
        if content["format"] != FORMAT:
            raise TargetError(
                f"{str(path)!r} is a calibration of format {content['format']}; this version reads {FORMAT}; {way_out}"
            )
        if digest(canonical(content)) != stored:
            raise TargetError(f"{str(path)!r} was changed after the calibration; {way_out}")
        del content["format"]
        content["thresholds"] = {name: float(value) for name, value in content["thresholds"].items()}
        return Calibration(**{**content, "models": tuple(content["models"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(f"{str(path)!r} is not a calibration of a guard; {way_out}") from error


def refuse_stale(calibration: Calibration, guard: str, model: str | None, where: str) -> None:
    """Raise `UsageError` if a calibration was made with other settings of the guard or with another model.

    `guard` and `model` are the present digests; without `model` only the settings are compared.
    """
    way_out = "run holdfast calibrate again"
    if calibration.guard != guard:
        raise UsageError(
            f"{where} was calibrated with other settings of the guard, so that its rate of false positives is "
            f"unknown; {way_out}"
        )
    if model is not None and model not in calibration.models:
        known = ", ".join(each[:12] for each in calibration.models)
        raise UsageError(
            f"{where} was calibrated with the model {known}, and this model is {model[:12]}, so that its rate of "
            f"false positives is unknown; {way_out}, or give the model as it was given there: a file and the network "
            "that was loaded from it have different digests"
        )


def _fitted(pipeline: GuardPipeline, fit: Observation | None, labels: Tensor | None) -> GuardPipeline:
    detectors = dict(pipeline.detectors)
    for name, detector in pipeline.detectors.items():
        if isinstance(detector, Fitted) and not detector.fitted:
            if fit is None or labels is None:
                raise UsageError(
                    f"the detector {name} is fitted on clean examples with labels, which must differ from the "
                    "calibration inputs; give them, as in guard.calibrate(model, data, fit=...)"
                )
            detectors[name] = detector.fit(fit, labels)  # type: ignore[assignment]  # the same class
    return replace(pipeline, detectors=detectors)


def _scores(pipeline: GuardPipeline, x: Tensor, seen: Observation) -> dict[str, Tensor]:
    """The scores of all calibrated rules on one batch of benign inputs."""
    refuse_other_inputs(pipeline.schema, x)
    rule = pipeline.rules.get(RANGE)
    if rule is not None and bool((pipeline.schema.excess(x) > rule.threshold).any()):
        raise UsageError(
            f"calibration inputs have values from {float(x.min()):g} to {float(x.max()):g}, and the guard "
            f"expects values {pipeline.schema.range_text}; correct inputs: of the guard"
        )
    scores = pipeline.detected(seen)
    if QUERIES in pipeline.rules and pipeline.queries is not None:
        scores[QUERIES] = pipeline.queries.score(x, [""] * len(x)).scores
    return {name: score.detach().double().cpu() for name, score in scores.items()}


def refuse_other_inputs(schema: InputSchema, x: Tensor) -> None:
    """Raise `UsageError` for calibration inputs of another shape or data type than those of the guard."""
    fault = schema.fault(x)
    if fault:
        raise UsageError(
            f"a calibration input does not match the guard: {fault}; correct inputs: of the guard"
        )


def refuse_too_few(n: int, false_positives: float, rules: int, fitted_on: int = 0) -> None:
    """Raise `UsageError` if `n` calibration inputs are too few for the rate, whatever their scores are."""
    least = fewest_examples(false_positives)
    if n < least:
        raise UsageError(
            f"{_counted(n, fitted_on)} are too few for a false-positive rate of {100 * false_positives:g} %, which "
            f"needs at least {least:,}; {fewest_examples(false_positives, rules):,} suffice for the rules of this "
            "guard. Give more, or a higher rate"
        )


def _counted(n: int, fitted_on: int) -> str:
    besides = f", besides {fitted_on:,} for the fit of detectors," if fitted_on else ""
    return f"{n:,} calibration inputs{besides}"


def _no_threshold(false_positives: float, rules: int, counted: str) -> str:
    return (
        f"{counted} are too few to combine {rules} rules at a false-positive rate of {100 * false_positives:g} %; "
        f"{fewest_examples(false_positives, rules):,} suffice; give more, remove a rule, or give a higher rate"
    )


def _fires_too_often(
    pipeline: GuardPipeline, given: Mapping[str, Tensor], already: Tensor, false_positives: float, free: int
) -> str:
    """The message about rules with a given threshold or radius that alone exceed a rate, with what corrects it."""
    counts = {name: int(fires.sum()) for name, fires in given.items()}
    fired, n = int(already.sum()), len(already)
    each = ", ".join(f"{name} on {count:,}" for name, count in counts.items())
    firing = [name for name, count in counts.items() if count]
    refits = QUERIES in firing and pipeline.rules[QUERIES].basis is not Basis.GIVEN
    ways = []
    if any(name != QUERIES for name in firing):
        ways.append("raise their thresholds, or leave them out, so that they are calibrated")
    if refits:
        ways.append("raise the threshold of queries, or give a smaller radius")
    elif QUERIES in firing:
        ways.append("leave the radius of queries out, so that it is fitted, or lower it")
    if fired < false_positives * n:
        ways.append("give more inputs")
    least = (fired + free + 1) / (n + 1)
    if least < 1 and not refits:  # the radius is fitted to the rate
        ways.append(f"give a rate of {rounded_up(least, 2)} or more")
    return (
        f"rules that a calibration does not change fire on {fired:,} of {n:,} calibration inputs ({each}), so that a "
        f"false-positive rate of {100 * false_positives:g} % cannot be shown; {'; or '.join(ways)}"
    )


def _refuse_constant(name: str, scores: Tensor) -> None:
    spread = float(scores.max() - scores.min())
    # float32 rounds the energy of log probabilities, which is 0, to about 1e-7
    if name != QUERIES and spread <= _CONSTANT * max(1.0, float(scores[0].abs())):
        hint = (
            "; the outputs may be log probabilities, whose energy is 0 at temperature 1: give the logits, or another "
            "temperature"
            if name == "energy"
            else ""
        )
        raise UsageError(
            f"the score of {name} is {float(scores[0]):g} for all {len(scores):,} calibration inputs, so that it "
            f"distinguishes nothing{hint or '; remove the rule or change its settings'}"
        )


def _parameters(pipeline: GuardPipeline) -> dict[str, dict[str, Any]]:
    return {
        name: {
            f.name: _stored(getattr(detector, f.name))
            for f in fields(detector)  # type: ignore[arg-type]  # a dataclass
            if not f.metadata.get("written", True)
        }
        for name, detector in pipeline.detectors.items()
        if isinstance(detector, Fitted) and detector.fitted
    }


def _stored(tensor: Tensor) -> dict[str, Any]:
    values = tensor.cpu().numpy().astype("<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def _tensor(stored: Mapping[str, Any]) -> Tensor:
    values = np.frombuffer(base64.b64decode(stored["float32"]), dtype="<f4")
    return torch.from_numpy(values.reshape(stored["shape"]).copy())


def _text(value: float) -> str:
    """An exact text of a threshold, which may be infinite."""
    return repr(float(value))
