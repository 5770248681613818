"""Calibrations of a guard for the served model and a candidate together."""

from pathlib import Path

import pytest

import holdfast
from holdfast.core.errors import UsageError
from holdfast.guard.calibration import write_calibration
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.verbs.adapt_served import candidate_calibrations
from holdfast.verbs.opening.guard import calibration_path, open_guard
from holdfast.verbs.settings import Calibrate

BUNDLED = Path(holdfast.__file__).parent / "bundled"
CANDIDATE = str(BUNDLED / "mnist-cnn-hardened.safetensors")
GUARD = """\
schema_version: 1
mode: enforce
inputs: {shape: [1, 28, 28], low: 0, high: 1}
false_positives: 0.02
rules: {queries: {action: flag}, energy: {action: flag}RULE}
"""


@pytest.fixture
def guard(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text(GUARD.replace("RULE", ""))
    Calibrate(model="mnist-cnn", data="mnist-mini", guard=str(path)).run()
    return path


def test_a_guard_accepts_the_candidate_and_the_served_model_at_the_larger_thresholds(guard):
    before = open_guard(guard)
    settings = Calibrate(model=CANDIDATE, data="mnist-mini", guard=str(guard))
    both, alone = candidate_calibrations(settings)
    assert len(both.models) == 2 and alone.models == both.models[1:]
    assert both.thresholds["energy"] == max(alone.thresholds["energy"], before.rules["energy"].threshold)
    assert both.parameters == alone.parameters and both.parameters["queries"]["radius"] > 0
    assert both.fired <= 0.02 * both.n
    with pytest.raises(UsageError, match="and this model is"):
        open_guard(guard, both.models[1])
    place = calibration_path(read_guard_settings(guard), guard)
    write_calibration(both, place)
    for model in both.models:
        open_guard(guard, model)
    assert candidate_calibrations(settings) is None
    write_calibration(alone, place)
    open_guard(guard, both.models[1])
    with pytest.raises(UsageError, match="and this model is"):
        open_guard(guard, both.models[0])


def test_a_rule_that_is_fitted_on_outputs_and_a_guard_without_a_calibration(guard, tmp_path):
    settings = Calibrate(model=CANDIDATE, data="mnist-mini", guard=str(guard))
    guard.write_text(GUARD.replace("RULE", ", mahalanobis: {action: flag}"))
    Calibrate(model="mnist-cnn", data="mnist-mini", guard=str(guard), false_positives=0.03).run()
    with pytest.raises(
        UsageError, match="the rule mahalanobis of guard.yaml is fitted on outputs of the served model"
    ):
        candidate_calibrations(settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "guard.yaml").write_text(GUARD.replace("RULE", ""))
    other = settings.model_copy(update={"guard": str(tmp_path / "other" / "guard.yaml")})
    assert candidate_calibrations(other) is None
