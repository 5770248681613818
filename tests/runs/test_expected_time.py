"""The expected time of a run: the passes of each attack, and the message before the run."""

from dataclasses import replace

import pytest

from holdfast.attacks import APGD, FAB, PGD, DeepFool, Relay, Square
from holdfast.attacks.costs import expected_passes
from holdfast.core.constraints import L2, Linf
from holdfast.core.threat import ThreatModel
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.expected_time import ExpectedTime
from runs.fakes import data, order, subject


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
    (message,) = said
    assert message.startswith("expected total time: about ") and "the time budget of 60 s" in message
    assess(subject(), data(), wanted, run=tmp_path / "run", resume=True, notify=said.append)
    assess(subject(), data(), wanted, notify=said.append, is_step=True)
    assert len(said) == 1
    assert str(ExpectedTime(0.1, 0.2)) == "about 1 s" and str(ExpectedTime(90, 7300)) == "about 90 s to 2 h"
