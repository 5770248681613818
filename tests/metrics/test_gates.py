"""The grammar of gates, the judgement on the interval, and the one exit code."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate, Goal
from holdfast.core.evidence import Doubt
from holdfast.gates.grammar import parse
from holdfast.gates.judging import AtLeast, AtMost, Before, Doubts, exit_code, judge, training_verdict
from holdfast.metrics.names import AT_EPS, DIFFERENCES, METRICS, PAIRED, SHARES
from metrics.test_metrics import evidence

NONE = Doubts()
RAISED = Doubts((Doubt("scale", "raised"), Doubt("noise", "clear")))


def test_a_gate_is_taken_apart():
    claim = parse(" robust_accuracy@8/255>=0.40 ")
    assert (claim.metric, claim.relation, claim.bound) == ("robust_accuracy", ">=", 0.4)
    assert claim.eps == pytest.approx(8 / 255)
    assert claim.text == "robust_accuracy@8/255>=0.40"
    assert parse("regression <= 0.01 vs baseline").versus == "baseline"
    assert parse("clean_error_rate <= 1/10").bound == pytest.approx(0.1)
    assert parse("defensive_entropy_rise >= -1e-2").bound == -0.01


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_may_be_gated(metric):
    assert parse(f"{metric} <= 1{' vs baseline' if metric in PAIRED else ''}").metric == metric
    if metric in AT_EPS:
        assert parse(f"{metric}@0.5 <= 1").eps == 0.5


@pytest.mark.parametrize(
    "text, says",
    [
        ("robust_acuracy >= 0.4", "did you mean 'robust_accuracy'"),
        ("Robust-Accuracy >= 0.4", "did you mean 'robust_accuracy'"),
        ("robust_accuracy vs baseline >= -0.02", 'as in "regression <= 0.01 vs baseline"'),
        ("zzz >= 0.4", "expected one of accepted_right_at_0_1_percent"),
        ("robust_accuracy >= 40%", "write the share 0.4"),
        ("robust_accuracy >= 40 %", "write the share 0.4"),
        ("robust_accuracy > 40%", "write >=; it also gives '40%'"),
        ("robust_accuracy < 40 %", "write the share 0.4"),
        ("robust_accuracy >= 40", "40 is not a share; did you mean 0.40?"),
        ("worst_class@8/255 >= 12.5", "did you mean 0.125?"),
        ("f1 >= 1.5", "1.5 is not a share; f1 is from 0 to 1"),
        ("calibration_error <= -0.1", "is from 0 to 1"),
        ("clean_accuracy >= inf", "'inf' is not a number"),
        ("regression <= 5 vs baseline", "5 is not a difference of shares; did you mean 0.05?"),
        ("regression <= -2 vs baseline", "is from -1 to 1"),
        ("robust_accuracy > 0.4", "write >="),
        ("robust_accuracy == 0.4", "METRIC >= NUMBER"),
        ("robust_accuracy", "cannot be read"),
        ("", "cannot be read"),
        ("robust_accuracy >= high", "'high' is not a number"),
        ("robust_accuracy >= nan", "'nan' is not a number"),
        ("robust_accuracy >= 1/0", "'1/0' is not a number"),
        ("robust_accuracy@-1 >= 0.4", "eps is -1"),
        ("clean_accuracy@0.1 >= 0.4", "no value at another eps"),
        ("robust_accuracy >= 0.4 of static", "of ensemble_transfer, sibling_transfer, transfer_success"),
        ("transfer_success of static <= 0.5", 'as in "transfer_success <= 0.5 of static"'),
        ("churn <= 3", "3 is not a share; did you mean 0.03?"),
        ("robust_accuracy >= 0.4 vs baseline", "measured on one run"),
        ("robust_accuracy >= 0.4 please", "'please'"),
        ("regression <= 0.01", "regression <= 0.01 vs baseline"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused_with_a_way_out(text, says):
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert says in str(refused.value)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_without_a_largest_value_may_be_gated_above_one(metric):
    text = f"{metric} <= 40{' vs baseline' if metric in PAIRED else ''}"
    if metric in SHARES | DIFFERENCES:
        with pytest.raises(UsageError, match="did you mean 0.40"):
            parse(text)
    else:
        assert parse(text).bound == 40


@given(text=st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        parse(text)
    except UsageError:
        return


def test_gates_are_read_without_torch():
    heavy = "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    code = f"import sys, holdfast.gates.grammar as g; g.parse('f1 >= .5'); {heavy}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "low, high, at_least, at_most",
    [(0.5, 0.7, "pass", "fail"), (0.4, 0.6, "unclear", "unclear"), (0.2, 0.4, "fail", "pass")],
)
def test_the_interval_is_judged_and_not_the_point(low, high, at_least, at_most):
    for value in (low, high):
        seen = Estimate(value, low, high, 100)
        assert AtLeast(0.5 if low == 0.5 else 0.45)(seen, NONE) == at_least
        assert AtMost(0.4 if high == 0.4 else 0.45)(seen, NONE) == at_most


def test_a_bound_that_the_interval_touches_is_met():
    assert AtLeast(0.5)(Estimate(0.6, 0.5, 0.7, 9), NONE) == "pass"
    assert AtMost(0.7)(Estimate(0.6, 0.5, 0.7, 9), NONE) == "pass"


def test_an_open_doubt_turns_pass_into_unclear_and_leaves_fail_alone():
    high, low = Estimate(0.8, 0.7, 0.9, 100), Estimate(0.2, 0.1, 0.3, 100)
    assert AtLeast(0.5)(high, RAISED) == "unclear"
    assert AtMost(0.5)(low, RAISED) == "unclear"
    assert AtLeast(0.5)(low, RAISED) == "fail"
    assert AtMost(0.5)(high, RAISED) == "fail"


@pytest.mark.parametrize(
    ("text", "name", "verdict"),
    [
        ("robust_accuracy <= 1", "scale", "pass"),
        ("robust_error_rate >= 0", "scale", "pass"),
        ("robust_accuracy >= 0", "scale", "unclear"),
        ("robust_error_rate <= 1", "scale", "unclear"),
        ("robust_accuracy <= 1", "chance", "unclear"),
        ("clean_accuracy <= 1", "scale", "unclear"),
    ],
)
def test_a_doubt_that_the_true_value_is_lower_leaves_an_upper_bound_alone(text, name, verdict):
    judged = judge(parse(text), evidence(), Doubts((Doubt(name, "raised"),)))
    assert judged.verdict == verdict
    assert judged.open_doubts == (() if verdict == "pass" else (name,))


def test_an_accepted_doubt_is_not_open():
    accepted = Doubts(RAISED.results, {"scale": "logits are scaled on purpose"})
    assert RAISED.open == ("scale",)
    assert accepted.open == ()
    assert AtLeast(0.5)(Estimate(0.8, 0.7, 0.9, 100), accepted) == "pass"


@pytest.mark.parametrize("state", ["clear", "not measured", "not applicable"])
def test_only_raised_doubts_are_open(state):
    assert Doubts((Doubt("transfer", state),)).open == ()


@pytest.mark.parametrize(
    "verdicts, code",
    [
        ([], 0),
        (["pass", "pass"], 0),
        (["pass", "unclear"], 4),
        (["unclear", "fail", "pass"], 1),
        (["fail"], 1),
    ],
)
def test_one_function_decides_the_exit_code(verdicts, code):
    assert exit_code(verdicts) == code


def test_a_judgement_has_a_reason():
    run = evidence(success=torch.zeros(60, dtype=torch.bool))
    passed = judge(parse("robust_accuracy >= 0.5"), run, NONE)
    assert passed.verdict == "pass"
    assert "n = 60: all of it meets 0.5" in passed.because
    assert passed
    assert str(passed) == f"pass: {passed.because}"
    doubted = judge(parse("robust_accuracy >= 0.5"), run, RAISED)
    assert doubted.verdict == "unclear"
    assert doubted.because.endswith("doubts are open: scale")
    assert not doubted
    assert judge(parse("robust_accuracy <= 0.5"), run, RAISED).verdict == "fail"
    assert "the interval contains 0.8" in judge(parse("robust_accuracy >= 0.8"), run, RAISED).because


def test_a_gate_on_an_absent_metric_names_what_would_bring_it():
    with pytest.raises(UsageError, match=r"gate 'robust_accuracy@0.1 >= 0.4' cannot be judged: .*curve=True"):
        judge(parse("robust_accuracy@0.1 >= 0.4"), evidence(), NONE)


def test_a_gate_on_mce_names_the_corruptions_under_which_the_baseline_makes_no_error():
    right = torch.ones(60, dtype=torch.bool)
    wrong = right.clone()
    wrong[:9] = False
    baseline, run = (
        evidence(**{"fog.right": fog, "frost.right": wrong, "snow.right": fog}) for fog in (right, wrong)
    )
    claim = parse("mce <= 1.5 vs baseline")
    with pytest.raises(UsageError, match=r"cannot be judged: mce .* no error under snow, fog, .*skip"):
        judge(claim, run, NONE, baseline=baseline)
    assert judge(claim, run, NONE, baseline=run).estimate.value == 1


@pytest.mark.parametrize(
    "text", ["transfer_success <= 0.5 of static", "churn <= 0.03", "sibling_transfer <= 0.2"]
)
def test_gates_on_rotated_sets_belong_to_admissions(text):
    claim = parse(text)
    assert claim.versus == ("static" if "static" in text else None)
    with pytest.raises(UsageError, match="holdfast rotate admit POOL"):
        judge(claim, evidence(), NONE)


def test_a_gate_against_a_baseline():
    before, after = evidence(200, success=torch.zeros(200, dtype=torch.bool)), evidence(200)
    claim = parse("regression <= 0.01 vs baseline")
    assert judge(claim, after, NONE, baseline=before).verdict == "fail"
    assert judge(claim, before, NONE, baseline=after).verdict == "pass"
    with pytest.raises(UsageError, match="baseline=RUN"):
        judge(claim, after, NONE)


def test_a_verdict_is_a_gate_by_its_bare_name():
    claim = parse(" improved ")
    assert (claim.text, claim.versus) == ("improved", "before")
    with pytest.raises(UsageError, match="'imporved' cannot be read; did you mean 'improved'"):
        parse("imporved")
    with pytest.raises(
        UsageError, match="gate 'improved' is a verdict on a training, and nothing is trained here"
    ):
        judge(claim, evidence(), NONE)


@pytest.mark.parametrize(
    ("broken", "verdict", "gate", "doubted"),
    [
        ((200, 0), "improved", "pass", "unclear"),
        ((100, 98), "no difference shown", "unclear", "unclear"),
        ((0, 200), "worse", "fail", "fail"),
    ],
)
def test_the_verdict_on_a_training_is_that_of_the_paired_interval(broken, verdict, gate, doubted):
    before, after = (evidence(200, success=torch.arange(200) < n) for n in broken)
    given = Before(before, Goal())
    assert training_verdict(given.improvement(after)) == verdict
    assert judge(parse("improved"), after, NONE, before=given).verdict == gate
    assert judge(parse("improved"), after, RAISED, before=given).verdict == doubted
    lower = Before(before, Goal(better="lower"))
    assert lower.improvement(after).value == -given.improvement(after).value
