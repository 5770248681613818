"""A budget of time is used: plans are made again as the training proceeds, by a clock that the tests set."""

from dataclasses import replace

import pytest
import torch

from holdfast.core.errors import Interrupted, UsageError
from holdfast.recipes import PGDTraining, SingleStep
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.overfitting import MOST_RAISED, RAISED, OverfittingGuard
from holdfast.runs.harden import attempt_training
from holdfast.runs.harden.candidates import announced
from holdfast.runs.harden.checkpoints import LAST, saved
from holdfast.runs.harden.harden import harden
from holdfast.runs.harden.pace import Pace, epochs_fitting, seconds_for_an_epoch
from holdfast.testing.recipes import same
from runs import fakes
from runs.test_hardening import training, wish

BUDGET_S = 64.0
LONG_S = 128.0  # where an update takes so long that few fit into the other one
TICK = 1 / 4096  # sums of such seconds are exact, so that a resumed run reads the same times
HOW = Training(batch=64, lr=0.01)


JUDGE = fakes.order(fakes.FAST, gates=(), attacked=False, doubts="none", shard_size=fakes.N)


class Clock:
    """Seconds that pass with each call of a network: `cost(calls, now)` ticks for each example."""

    def __init__(self, cost):
        self.cost, self.calls, self.ticks = cost, 0, 0

    def __call__(self):
        return self.ticks * TICK

    def call(self, n):
        self.calls += 1
        self.ticks += n * self.cost(self.calls, self())


class Timed(torch.nn.Sequential):
    """A network whose calls take the time that the clock says, in every copy of it."""

    clock = None

    def forward(self, x):
        type(self).clock.call(len(x))
        return super().forward(x)


def hardened(cost, recipe, n=600, budget_s=BUDGET_S, kind=Timed, **more):
    class Network(kind):
        clock = Clock(cost)

    subject = fakes.subject(Network(*fakes.network(1)).requires_grad_())
    asked = wish(recipe, budget_s=budget_s, assessment=JUDGE)
    return harden(subject, training(n=n), fakes.data(), asked, clock=Network.clock, **more)


def steady(calls, now):
    return 30


def slow_at_first(calls, now):
    return 512 if calls < 12 else 32


def loaded_for_a_while(calls, now):
    return 80 if 30 < now < 45 else 20


def slower_and_slower(calls, now):
    return 8 + int(now) // 2


MACHINES = {
    "steady": (steady, {}, BUDGET_S),
    "slow at first": (slow_at_first, {}, BUDGET_S),
    "loaded for a while": (loaded_for_a_while, {}, BUDGET_S),
    "slower and slower": (slower_and_slower, {}, LONG_S),
    "an epoch longer than the budget": (lambda calls, now: 400, {"batch": 4}, LONG_S),
    "one epoch and a part": (lambda calls, now: 120, {"batch": 8}, LONG_S),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_training_and_planning_use_the_budget(machine):
    cost, how, budget_s = MACHINES[machine]
    found = hardened(cost, PGDTraining(steps=2, training=replace(HOW, **how)), budget_s=budget_s)
    assert 0.85 <= found.card["cost"]["budget_used"] <= 1.0
    assert found.card["ended_by"] == "budget"
    assert found.curve[-1].share > 0.95 and found.curve[-1].lr < 0.2 * HOW.lr
    assert all(point.part == 1 for point in found.curve[:-1])
    assert found.card["epochs"] == pytest.approx(found.curve[-1].epoch - 1 + found.curve[-1].part)
    if machine == "an epoch longer than the budget":
        assert 0 < found.card["epochs"] < 1


def test_what_a_guard_has_undone_counts_in_the_budget(monkeypatch):
    """As often as it may, a guard objects to the updates of a whole epoch."""

    def right(guard, steps):
        return 0.1 if steps > 1 and int(guard.learner.state[RAISED]) < MOST_RAISED else 0.9

    monkeypatch.setattr(OverfittingGuard, "_right", right)
    found = hardened(lambda calls, now: 150, SingleStep(training=replace(HOW, batch=16)), 1200, LONG_S)
    assert found.curve[-1].dearer == 2.5
    assert 0.85 <= found.card["cost"]["budget_used"] <= 1.0


class Small(Timed):
    """Runs out of memory for more examples than these."""

    def forward(self, x):
        if self.training and len(x) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def test_where_memory_runs_out_a_budget_is_planned_by_what_it_holds():
    recipe = PGDTraining(steps=1, training=HOW)
    found = hardened(lambda calls, now: 100, recipe, budget_s=LONG_S, kind=Small)
    assert {point.batch for point in found.curve} == {16}
    assert 0.85 <= found.card["cost"]["budget_used"] <= 1.0


def test_patience_ends_a_training_before_its_budget_and_is_recorded():
    patient = PGDTraining(steps=1, training=replace(HOW, lr=1e-9, patience=2, warmup=0))
    found = hardened(lambda calls, now: 10, patient)
    assert found.card["ended_by"] == "patience" and found.card["cost"]["budget_used"] < 0.5


def test_no_budget_is_refused_in_which_an_update_and_a_look_fit():
    with pytest.raises(UsageError, match=r"one update takes about 48 s .*give budget='\d+min' or more"):
        hardened(lambda calls, now: 1024, PGDTraining(steps=2, training=HOW))


RECIPES = {
    "mean of ends": (PGDTraining(steps=1, training=replace(HOW, averaging="swa", tail=0.5)), 600, BUDGET_S),
    "guarded": (SingleStep(training=HOW), 1200, LONG_S),
}


@pytest.fixture
def overfitting(monkeypatch):
    """Once eps has grown, a single step is overfitted to, until another one is added."""

    def right(guard, steps):
        raised, grown = (
            int(guard.learner.state[RAISED]),
            guard.learner.with_current_eps.threat.constraint.eps > 0.05,
        )
        return 0.1 if steps > 1 and not raised and grown else 0.9

    monkeypatch.setattr(OverfittingGuard, "_right", right)


def last_of(run):
    found = saved(run / "checkpoints", LAST)
    assert found is not None
    return found.checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("overfitting")
@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_goes_on_to_the_same_plans_and_weights(tmp_path, name):
    def stop(step):
        if step.stage.startswith("training") and step.done == 3:
            raise Interrupted("stopped", signal_number=2)

    whole = hardened(steady, *RECIPES[name], run=tmp_path / "whole")
    with pytest.raises(Interrupted):
        hardened(steady, *RECIPES[name], run=tmp_path / "r", progress=stop)
    again = hardened(steady, *RECIPES[name], run=tmp_path / "r", resume=True)
    assert len(whole.curve) > 4 and (name == "guarded") == (whole.curve[-1].dearer > 1)
    one, other = (last_of(tmp_path / run) for run in ("whole", "r"))
    assert one.plans == other.plans and one.updates == other.updates
    assert same(one, other) and again.weights == whole.weights


@pytest.mark.slow
@pytest.mark.usefixtures("overfitting")
@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_follow_from_the_plans_that_are_stored(tmp_path, monkeypatch, name):
    hardened(slow_at_first, *RECIPES[name], run=tmp_path / "r")
    found = last_of(tmp_path / "r")
    assert len({plan.end for plan in found.plans}) > 3
    plans = iter([plan for plan in found.plans if not plan.rewound])
    monkeypatch.setattr(attempt_training, "Pacer", lambda *rest: lambda *where: next(plans))
    hardened(steady, *RECIPES[name], run=tmp_path / "again")
    assert same(found, last_of(tmp_path / "again"))
    assert next(plans, None) is None


def test_a_budget_for_less_than_an_epoch_is_announced_with_one_that_suffices():
    attempt = {"recipe": "pgd", "reason": "requested", "epochs": 0.25, "epoch_s": 8.0}
    assert "does not suffice for one epoch; about 17 s would" in announced(attempt, 10.0)
    assert "suffice" not in announced({**attempt, "epochs": 1.0}, 10.0)


@pytest.mark.parametrize("fitting", [0.1, 0.9])
def test_the_announced_budget_suffices_for_an_epoch(fitting):
    timed = Pace(update=0.5, epoch=11.0)
    budget = 100.0
    while epochs_fitting(budget, timed, 20) > fitting:
        budget -= 0.5
    enough = seconds_for_an_epoch(budget, epochs_fitting(budget, timed, 20), timed.epoch)
    assert budget < enough and epochs_fitting(enough, timed, 20) >= 1
