"""The checks of the adaptive attack itself, of which none may fail for its results to answer a doubt."""

import pytest
import torch
from torch import nn

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.doubts.answering import (
    BUDGET,
    SEARCH,
    agreeing,
    answer_checks,
    arms,
    larger_sizes,
    with_answers,
    within,
)

N = 20


def columns(**changes):
    """The columns of 20 examples that pass every check, with `changes` in the first rows. Five survive, of which three
    are broken with a larger eps.
    """
    rows = torch.arange(N)
    passed = {
        "ran": rows >= 0,
        "survived": (rows < 5).long(),
        "searched": torch.ones(N, dtype=torch.int64),
        "box": torch.zeros(N, dtype=torch.int64),
        "larger": (rows < 3).long(),
        "success": torch.zeros(N, dtype=torch.bool),
        "agrees": torch.ones(N, dtype=torch.int64),
        "changed": torch.zeros(N, dtype=torch.int64),
        "chooses": torch.zeros(N, dtype=torch.int64),
    }
    for name, (value, n) in changes.items():
        passed[name] = passed[name].clone()
        passed[name][:n] = value
    return passed


def states(**changes):
    return {check.name: check.state for check in answer_checks(columns(**changes))}


@pytest.mark.parametrize(
    "failing, changes",
    [
        ("whole-box", {"box": (1, 2)}),
        ("larger-eps", {"larger": (0, 1)}),  # two of the five survivors are left
        ("labels-only", {"success": (True, 1)}),
        ("gradient", {"agrees": (0, 6)}),
        ("same-output", {"changed": (1, 1)}),
        ("choices", {"chooses": (1, N)}),  # a quarter survives
    ],
)
def test_each_check_fails_by_itself(failing, changes):
    assert {name for name, state in states().items() if state != "passed"} == {"choices"}
    assert (
        states()["choices"] == "not applicable"
        and states(chooses=(1, N), survived=(0, N))["choices"] == "passed"
    )
    assert [name for name, state in states(**changes).items() if state == "failed"] == [failing]


def test_no_survivor_needs_no_larger_eps_and_no_gradient_is_not_checked():
    assert states(survived=(0, N), larger=(0, N))["larger-eps"] == "passed"
    assert states(agrees=(-1, N))["gradient"] == "not applicable"
    assert states(box=(1, 1))["whole-box"] == "passed"  # 5 % of 20


def test_an_output_that_changed_during_the_attack_counts():
    checks = {check.name: check.state for check in answer_checks(columns(), changed=1)}
    assert checks["same-output"] == "failed"


@pytest.mark.parametrize("check, column", [("labels-only", ("searched", 0)), ("whole-box", ("box", -1))])
def test_a_search_that_was_not_made_is_no_passed_check_and_answers_nothing(check, column):
    name, value = column
    others = {each: state for each, state in states(**{name: (value, N)}).items() if each != "choices"}
    assert [each for each, state in others.items() if state != "passed"] == [check]
    assert states(**{name: (value, N)})[check] == "not measured"
    ran = {
        "ran": torch.ones(4, dtype=torch.bool), "success": torch.zeros(4, dtype=torch.bool),
        "dead": torch.zeros(4, dtype=torch.bool), "backwards": torch.full((4,), 5)
    }  # fmt: skip
    checks = answer_checks(columns(**{name: (value, N)}))
    doubts, because = (Doubt("black-box", "raised", message="odd"),), {SEARCH: ("black-box",)}
    (doubt,) = with_answers(
        doubts, {SEARCH: ran}, because, bypassed=True, survivor_broken=False, checks=checks
    )
    assert doubt.state == "raised"


def test_no_example_is_no_passed_check():
    assert set(states(ran=(False, N)).values()) == {"not measured"}


def test_a_failed_check_leaves_the_doubt_raised_and_is_named():
    rows = torch.arange(4)
    ran = {
        "ran": rows >= 0, "success": rows < 2, "dead": rows < 0, "backwards": torch.full((4,), 5)
    }  # fmt: skip
    doubts, because = (Doubt("black-box", "raised", message="odd"),), {SEARCH: ("black-box",)}
    settings = {"bypassed": True, "survivor_broken": False}
    for checked, state in ((columns(), "answered"), (columns(box=(1, 9)), "raised")):
        (doubt,) = with_answers(doubts, {SEARCH: ran}, because, **settings, checks=answer_checks(checked))
        assert doubt.state == state
    assert doubt.message == "odd; the adaptive attack did not pass every check of it (whole-box)"


def test_larger_eps_are_below_half_of_the_box_and_there_is_one():
    batch = Batch(torch.rand(2, 5), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert larger_sizes(Linf(0.1), batch, Bounds(), 3) == (0.2, 0.4)
    assert larger_sizes(Linf(0.001), batch, Bounds(), 3) == (0.002, 0.004, 0.008)
    assert larger_sizes(Linf(0.7), batch, Bounds(), 3) == (1.0,)


class Linear(nn.Module):
    def __init__(self, *, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, x):
        value = x.sum(1) - 2.5
        # the same output with a gradient of the wrong sign
        value = value - 2 * x.sum(1) + 2 * x.sum(1).detach() if self.hidden else value
        return torch.stack([-value, value], 1)


def test_a_gradient_agrees_if_a_step_along_it_lowers_the_margin():
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, torch.arange(8) % 2, torch.arange(8))
    honest, wrong = (
        agreeing(Classifier(Linear(hidden=hidden)), batch, Linf(0.1), Draws(0), 1) for hidden in (False, True)
    )
    assert honest.all() and not wrong.any()


@pytest.mark.parametrize("randomised", [False, True])
def test_all_adaptive_attacks_and_checks_stay_within_the_budget(randomised):
    threat = ThreatModel(Linf(0.1))
    available = [arm for arm in arms(threat.constraint) if arm.weight is None]
    whole = within(BUDGET, available, threat, randomised=randomised)
    assert [arm.name for arm in whole] == [arm.name for arm in available]
    assert 3000 < whole[-1].attack.passes < BUDGET / 2
    (alone,) = within(4000, available, threat, randomised=randomised)
    assert (alone.name, alone.attack.passes) == (SEARCH, 3000)
    (least,) = within(1, available, threat, randomised=randomised)
    assert least.attack.passes == 1
