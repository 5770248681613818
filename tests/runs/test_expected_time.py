"""The expected time of a run: the passes of each attack, and the message before the run."""

from dataclasses import replace

import pytest
import torch

from holdfast.attacks import APGD, FAB, PGD, DeepFool, Relay, Square
from holdfast.attacks.costs import expected_passes
from holdfast.core.constraints import L2, Linf
from holdfast.core.threat import ThreatModel
from holdfast.rotation.steps.admit import ExpectedTime
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.expected_time import (
    CountedAttack,
    StageTimes,
    StepTime,
    StepTimes,
    expected_seconds,
    step_times,
)
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import AssessRequest
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member
from holdfast.threats.transformations import Spatial
from runs.fakes import data, order, subject
from runs.provers import Interval

CPU, SPATIAL = torch.device("cpu"), Spatial(rotate=10)
USUAL = Plan((Member("Square", Square()),), ThreatModel(Linf(0.1)))


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (PGD(steps=40, restarts=3), 180, 120),
        (APGD(steps=100, targets=9), 600, 400),  # of five classes, four can be targeted
        (FAB(steps=10, targets=2), 30, 20),
        (DeepFool(steps=10, candidates=9), 40, 40),
        (Relay(steps=20, restarts=1, targets=3, searches=2, rounds=2, queries=150), 760, 160),
        (Square(queries=500), 500, 0),
    ],
)
def test_the_passes_of_an_attack_follow_from_its_settings(attack, forwards, backwards):
    threat = ThreatModel(L2(0.5) if isinstance(attack, DeepFool) else Linf(0.1))
    assert expected_passes(attack, threat, classes=5) == (forwards, backwards)
    few = expected_passes(attack, replace(threat, queries=25), classes=5)
    assert max(few) <= 25


@pytest.mark.slow
def test_an_assessment_states_its_expected_time_once_and_as_a_step_of_another_run_not_at_all(tmp_path):
    said = []
    wanted = order(doubts="all", time_budget_s=60.0)
    assess(subject(), data(), wanted, run=tmp_path / "run", notify=said.append)
    expected, budget = said
    assert expected.startswith("expected total time: about ")
    assert budget == "the attacks and proofs end after the time budget of 60 s"
    assess(subject(), data(), wanted, run=tmp_path / "run", resume=True, notify=said.append)
    assess(subject(), data(), wanted, notify=said.append, is_step=True)
    assert len(said) == 2
    assert str(ExpectedTime(0.1, 0.2)) == "about 1 s" and str(ExpectedTime(90, 7300)) == "about 90 s to 2 h"


@pytest.mark.parametrize(
    "changes",
    [
        {"proofs": (Interval(),)},
        {"threat": ThreatModel(Linf(0.1), access="labels")},
        {"threat": ThreatModel(Linf(0.1), goal=1)},
        {"threat": ThreatModel(SPATIAL)},
        {"workers": 2},
    ],
    ids=["proofs", "labels", "target class", "rotations", "workers"],
)
def test_no_time_is_stated_for_a_run_whose_steps_are_not_known_in_advance(changes):
    workers = changes.pop("workers", None)
    plan = Plan((Member("Square", Square()),), **{"threat": ThreatModel(Linf(0.1)), **changes})
    request = AssessRequest(plan, workers=workers)
    with readied(subject(), data(), CPU) as (target, _):
        assert expected_seconds(request, plan, target, data(), CPU) is None
        assert expected_seconds(AssessRequest(USUAL), USUAL, target, data(), CPU) > 0


STEPS = StepTimes(query=StepTime(0.5, 0.01), gradient=StepTime(1.0, 0.02))


def stages(*attacks, size=256, share=1.0, **changes):
    fields = {"on_all": (), "probed": False, "gradients": True, **changes}
    return StageTimes(STEPS, attacks, size=size, share=share, **fields)


def test_the_time_of_a_run_follows_from_its_batches_waves_and_surviving_examples():
    query, gradient, clean_s = (lambda n: 0.5 + 0.01 * n), (lambda n: 1 + 0.02 * n), 4 * 0.5 + 0.01 * 1000
    on_all, waves = CountedAttack((150.0, 100.0), 0), CountedAttack((60.0, 0.0), 4)
    full = 4 * (50 * query(250) + 100 * gradient(250))
    assert stages(on_all).of(1000) == pytest.approx(clean_s + full)
    # the broken half takes a fifth of the passes, and the first of four waves a sixteenth of the surviving half
    some = 3 * (50 * query(200) + 100 * gradient(200))
    assert stages(on_all, waves, share=0.5).of(1000) == pytest.approx(clean_s + some + 60 * query(32))
    idle = CountedAttack((60.0, 0.0), 4, after=True)
    assert stages(on_all, idle, share=0.5).of(1000) == pytest.approx(clean_s + some)
    assert stages(on_all, waves).of(1000, share=0.5) == stages(on_all, waves, share=0.5).of(1000)
    assert stages(on_all, on_all=((150.0, 100.0),)).of(1000, limit_s=7.0) == pytest.approx(7 + full)


def test_steps_are_timed_on_two_batches_or_on_few_examples_of_a_slow_model(clock):
    rows = []
    for each_s, batches in ((1e-4, {8, 128}), (1.0, {8})):

        def model(x, ids, each_s=each_s):
            rows.append(len(x))
            clock.now += 1e-3 + each_s * len(x)
            return torch.zeros(len(x), 3) - x.flatten(1)[:, :3]

        rows.clear()
        measured = step_times(model, ThreatModel(SPATIAL), data().read(0, 8), 256).query
        assert set(rows) == batches
        assert measured.of(8) == pytest.approx(1e-3 + each_s * 8)
        assert measured.of(128) == pytest.approx(1e-3 + each_s * 128, rel=1e-3)
