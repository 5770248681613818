"""How many examples the gates need: equal sets pass with that many, worse ones do not, and fewer are said."""

from dataclasses import replace

import pytest
import torch

from holdfast.gates.judging import AtMost
from holdfast.rotation.steps.admission_gates import NO_DOUBTS, gate_results
from holdfast.rotation.steps.set_measuring import (
    CONFIDENCE,
    MEASURED_LATER,
    POWER,
    NeededExamples,
    changed,
    measured_needs,
    planned_needs,
    statement,
    sufficient,
)
from holdfast.statistics.intervals import bonferroni, paired_difference
from runs.test_admission import N, seen, verdicts


def passing(need, loss, n, turns=300):
    """How often a set passes that loses so much, and differs from the other on `changed` of the examples besides."""
    passed, g = 0, torch.Generator().manual_seed(1)
    for _ in range(turns):
        drawn = torch.rand(n, generator=g)
        lost, won = drawn < (need.changed + loss) / 2, drawn > 1 - (need.changed - loss) / 2
        found = paired_difference(~won, ~lost, bonferroni(CONFIDENCE, need.looks))
        passed += AtMost(need.tolerance)(found, NO_DOUBTS) == "pass"
    return passed / turns


@pytest.mark.parametrize("share", [0.03, 0.1])
@pytest.mark.parametrize("held", [300, 1_000, 3_000])
def test_an_equal_set_passes_as_often_as_it_should_and_a_worse_one_seldom(share, held):
    need = NeededExamples("clean accuracy", share, held, 2)
    assert passing(need, 0.0, held) > POWER - 0.08
    assert passing(need, need.tolerance, held) < 0.05


def test_as_many_as_are_needed_are_not_widened_and_one_less_is():
    one = NeededExamples("robust accuracy", 0.1, 10**6, 3)
    assert not one.widened and one.tolerance == 0.02
    assert not NeededExamples("robust accuracy", 0.1, one.needed, 3).widened
    less = NeededExamples("robust accuracy", 0.1, one.needed // 4, 3)
    assert less.widened and less.tolerance == pytest.approx(0.04, rel=0.01)


def test_needed_time_is_announced_before_and_stated_after():
    before = statement(planned_needs(1_000, judged=500), 500, planned=True)
    assert (
        before.startswith("the gates need at least ")
        and MEASURED_LATER in before
        and "there are 1,000" in before
    )
    assert "Tolerances are widened" in before and "training examples" in before
    enough = statement(planned_needs(8_000), 2_000, planned=True)
    assert "widened" not in enough
    right = [torch.arange(100) < k for k in (90, 92, 94)]
    assert changed(right) == pytest.approx((0.02 + 0.02 + 0.04) / 3) and changed(right[:1]) == 0.0
    clean, white = measured_needs(right, right[:2], 100, 100)
    assert (clean.changed, white.changed) == (changed(right), pytest.approx(0.02))
    assert (clean.looks, white.looks) == (1, 2)


@pytest.mark.parametrize("judged", [500, 2_000])
def test_the_advised_number_of_examples_widens_nothing(judged):
    n = sufficient(planned_needs(280, judged), judged)
    assert not any(need.widened for need in planned_needs(n, judged))
    assert any(need.widened for need in planned_needs(n // 2, judged))


def test_a_wider_tolerance_is_used_and_reported():
    found = seen(white=108, before=100)
    need = NeededExamples("robust accuracy", 0.1, N, 3)
    wide = replace(found, needs={"robust accuracy": need})
    assert verdicts(found)["robust accuracy"] == "unclear" and verdicts(wide)["robust accuracy"] == "pass"
    (gate,) = [one for one in gate_results(wide, NO_DOUBTS, ()) if one.name == "robust accuracy"]
    assert "widened from 2 points, which needs" in gate.bound and "there are 400" in gate.bound
