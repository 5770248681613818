"""The settings of a guard are checked, and faults are reported with the place and the valid values."""

import re

import pytest

from holdfast.core.errors import UsageError
from holdfast.guard.calibration import Calibration, write_calibration
from holdfast.guard.rules import Action, Mode
from holdfast.settings.guard_settings import check_guard_settings, read_guard_settings
from holdfast.settings.texts import parse_yaml
from holdfast.verbs.configuration import init, validate
from holdfast.verbs.opening.guard import calibration_path, guard_digest, guard_pipeline, unchecked_of_file

INPUTS = {"shape": [1, 4, 4]}


def settings(**rules):
    return check_guard_settings({"inputs": INPUTS, "rules": rules}, "guard.yaml")


def test_the_written_file_is_valid_and_has_the_order_of_the_rules(tmp_path):
    path = init(tmp_path / "guard.yaml", guard=True)
    assert validate(path) == ("guard",)
    parsed = read_guard_settings(path)
    assert {name for name, rule in parsed.rules if rule is not None} == {
        "schema_",
        "range",
        "queries",
        "energy",
    }
    assert calibration_path(parsed, path) == tmp_path / "guard.calibration.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rules": {"energy": {}}}, "inputs is missing; give it, as in inputs:"),
        ({"inputs": INPUTS}, "rules is missing"),
        ({"inputs": INPUTS, "rules": {}}, "rules is empty"),
        ({"inputs": INPUTS, "rules": {"enrgy": {}}}, "rules: unknown key 'enrgy'; did you mean 'energy'"),
        (
            {"inputs": INPUTS, "rules": {"energy": {"mood": 1}}},
            "rules.energy: unknown key 'mood'; did you mean 'mode'",
        ),
        (
            {"inputs": INPUTS, "rules": {"energy": {"mode": "enforced"}}},
            "rules.energy.mode is 'enforced'; did you mean",
        ),
        (
            {"inputs": INPUTS, "rules": {"energy": {"temperature": 0}}},
            "temperature is 0; expected more than 0",
        ),
        ({"inputs": INPUTS, "rules": {"schema": {"threshold": 1}}}, "rules.schema: unknown key 'threshold'"),
        ({"inputs": {"shape": [0]}, "rules": {"energy": {}}}, "inputs.shape.0 is 0; expected at least 1"),
        ({"inputs": {"shape": [4], "low": 1}, "rules": {"energy": {}}}, "low must be below high"),
        (
            {"inputs": {"shape": [4]}, "rules": {"squeezing": {}}},
            "rules.squeezing.median is 2, and inputs of shape",
        ),
        ({"inputs": INPUTS, "rules": {"squeezing": {"bits": 0, "median": 0}}}, "at least one of them"),
        ({"inputs": INPUTS, "rules": {"queries": {"eps": "8/0"}}}, "eps is '8/0'"),
        (
            {"inputs": INPUTS, "rules": {"energy": {}}, "delay": "soon"},
            "delay is 'soon'; expected a duration",
        ),
        (
            {"inputs": INPUTS, "rules": {"energy": {}}, "false_positives": 1},
            "false_positives is 1; expected less than 1",
        ),
        (
            {"inputs": INPUTS, "rules": {"energy": {}}, "state": {"at": "mysql:x"}},
            "state.at is 'mysql:x'; expected",
        ),
        (
            {"inputs": INPUTS, "rules": {"energy": {}}, "state": {"at": "env:"}},
            "state.at is 'env:'; expected",
        ),
        (
            {"inputs": {**INPUTS, "dtype": "uint8"}, "rules": {"stability": {}}},
            "rules.stability changes values of the",
        ),
        ({"inputs": INPUTS, "rules": {"energy": {}}, "stor": {}}, "unknown key 'stor'; did you mean 'store'"),
    ],
)
def test_a_fault_is_reported_with_its_place(content, message):
    with pytest.raises(UsageError) as raised:
        check_guard_settings(content, "guard.yaml")
    assert str(raised.value).startswith("guard.yaml: ") and message in str(raised.value)


def test_the_guard_has_the_rules_of_its_settings():
    pipeline = guard_pipeline(
        settings(schema=None, energy={"mode": "shadow", "action": "abstain", "threshold": 3})
    )
    schema, energy = pipeline.rules["schema"], pipeline.rules["energy"]
    assert (schema.mode, schema.action, schema.threshold) == (Mode.OBSERVE, Action.BLOCK, 0.0)
    assert (energy.mode, energy.action, energy.threshold) == (
        Mode.SHADOW,
        Action.ABSTAIN,
        3.0,
    ) and energy.fixed
    assert pipeline.calibrated == ("energy",)


def test_modes_and_actions_do_not_change_the_digest_and_all_that_changes_scores_does():
    plain = guard_digest(settings(energy={}))
    assert guard_digest(settings(energy={"mode": "enforce", "action": "block"})) == plain
    others = [
        settings(energy={"temperature": 2}),
        settings(energy={"threshold": 2}),
        settings(energy={}, stability={}),
        check_guard_settings({"inputs": INPUTS, "rules": {"energy": {}}, "defence": {"bits": 4}}, ""),
        check_guard_settings({"inputs": INPUTS, "rules": {"energy": {}}, "outputs": "probability"}, ""),
        check_guard_settings({"inputs": {**INPUTS, "high": 2}, "rules": {"energy": {}}}, ""),
    ]
    assert len({plain, *map(guard_digest, others)}) == 1 + len(others)


def test_every_commented_setting_of_the_written_file_is_valid(tmp_path):
    written = init(tmp_path / "guard.yaml", guard=True).read_text(encoding="utf-8")
    content = parse_yaml(re.sub(r"(?m)^(\s*)# (\w+: (\{|1s))", r"\1\2", written), "guard.yaml")
    assert {"defence", "state", "delay", "store"} <= set(content)
    assert {"squeezing", "mahalanobis", "stability"} <= set(content["rules"])
    check_guard_settings(content, "guard.yaml")


def test_validate_refuses_what_a_server_refuses_before_it_opens_the_model(tmp_path):
    path = init(tmp_path / "guard.yaml", guard=True)
    parsed = read_guard_settings(path)
    calibration = Calibration(0.01, 100, 0, {"energy": 0.0}, guard_digest(parsed), ("f" * 64,))
    write_calibration(calibration, calibration_path(parsed, path))
    assert validate(path) == ("guard",)
    assert "shape [1, 28, 28], and whether it is the model ffffffffffff" in unchecked_of_file(path)
    text = path.read_text()
    path.write_text(text.replace("shape: [1, 28, 28]", "shape: [3, 28, 28]"))
    with pytest.raises(UsageError, match="calibrated with other settings of the guard"):
        validate(path)
    calibration_path(parsed, path).unlink()
    path.write_text(text.replace("shape: [1, 28, 28]", "shape: [null, 28, 28]"))
    with pytest.raises(UsageError, match="give all sizes, or remove the rule queries"):
        validate(path)
    assert [each.name for each in tmp_path.iterdir()] == ["guard.yaml"]
