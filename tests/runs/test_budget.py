"""A budget of time is used: plans are made again as the training proceeds, by a clock that the tests set."""

from dataclasses import replace

import pytest
import torch

from holdfast.core.constraints import Linf
from holdfast.core.errors import Interrupted, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.recipes import PGDTraining, SingleStep
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.follow_up import MOST_RAISED, RAISED
from holdfast.runs.harden import attempt_training, candidates, checkpoints
from holdfast.runs.harden.candidates import Evaluation
from holdfast.runs.harden.checkpoints import LAST, saved
from holdfast.runs.harden.harden import harden
from holdfast.runs.harden.pace import Pace, Pacer, pace, too_small
from holdfast.settings.grammar import seconds
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


def hardened(cost, recipe, n=600, budget_s=BUDGET_S, kind=Timed, *, anyway=False, every=None, **more):
    class Network(kind):
        clock = Clock(cost)

    subject = fakes.subject(Network(*fakes.network(1)).requires_grad_())
    asked = wish(recipe, budget_s=budget_s, assessment=JUDGE, anyway=anyway, checkpoint_every=every)
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
    "busy in most trials": (
        lambda calls, now: 400 if calls < 120 and calls % 9 >= 3 else 60,
        {"batch": 4},
        LONG_S,
    ),
    "one epoch and a part": (lambda calls, now: 120, {"batch": 8}, LONG_S),
}


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(
            name, marks=() if name in ("slow at first", "one epoch and a part") else pytest.mark.slow
        )
        for name in MACHINES
    ],
)
def test_training_and_planning_use_the_budget(machine):
    cost, how, budget_s = MACHINES[machine]
    recipe = PGDTraining(steps=2, training=replace(HOW, **how))
    found = hardened(cost, recipe, budget_s=budget_s, anyway=machine == "an epoch longer than the budget")
    # the last update and evaluation of a machine that gets slower take longer than those that the plan is made from
    most = 1.01 if machine == "slower and slower" else 1.0
    assert 0.85 <= found.card["cost"]["budget_used"] <= most
    assert found.card["ended_by"] == "budget"
    assert found.curve[-1].share > 0.95 and found.curve[-1].lr < 0.2 * HOW.lr
    assert all(point.part == 1 for point in found.curve[:-1])
    assert found.card["epochs"] == pytest.approx(found.curve[-1].epoch - 1 + found.curve[-1].part)
    if machine == "an epoch longer than the budget":
        assert 0 < found.card["epochs"] < 1


class Killed(BaseException):
    """What ends a run here without any clean-up."""


class Stored(Timed):
    """A network of which a checkpoint within an epoch takes half a second, except the third one."""


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_plans_are_made_again_between_the_checkpoints_within_an_epoch(monkeypatch, tmp_path, resumed):
    save_within, dies, plans = checkpoints.save_within, [], []

    def slow(place, checkpoint, *rest):
        save_within(place, checkpoint, *rest)
        plans.append(checkpoint.plans)
        Stored.__subclasses__()[-1].clock.ticks += 0 if len(plans) == 3 else int(0.5 / TICK)
        if len(plans) == 3 and dies:
            raise Killed

    def run(name):
        recipe = PGDTraining(steps=2, training=replace(HOW, batch=4))
        more = {"budget_s": LONG_S, "kind": Stored, "anyway": True, "every": 1, "resume": True}
        return hardened(lambda calls, now: 400, recipe, run=tmp_path / name, **more)

    monkeypatch.setattr(checkpoints, "save_within", slow)
    whole = run("whole")
    assert 0.85 <= whole.card["cost"]["budget_used"] <= 1.0 and whole.card["epochs"] < 1
    assert plans[2][-1].at == 3  # a plan was due, and the checkpoint has it
    if resumed:
        plans.clear()
        dies.append(True)
        with pytest.raises(Killed):
            run("killed")
        assert run("killed").weights == whole.weights
        assert last_of(tmp_path / "killed").plans == last_of(tmp_path / "whole").plans


@pytest.mark.slow
def test_evaluations_of_short_epochs_take_a_tenth_of_the_time_and_the_last_one_is_made(tmp_path):
    found = hardened(lambda calls, now: 8, *RECIPES["short epochs"], run=tmp_path / "r")
    first, *others = [point.epoch for point in found.curve]
    plans = last_of(tmp_path / "r").plans
    looks_s = sum(plan.look_s for plan in plans if plan.at == plan.looked and plan.at)
    assert first == 1 and len(others) < others[-1] / 2
    assert looks_s < 0.12 * BUDGET_S
    assert found.card["ended_by"] == "budget" and found.card["cost"]["budget_used"] >= 0.85
    n_passes = 2 * 33 * 16 / 540  # of an example in an epoch
    assert sum(point.forwards for point in found.curve) == pytest.approx(n_passes * found.card["epochs"])


def test_what_a_guard_has_undone_counts_in_the_budget(set_guard_accuracy):
    """As often as it may, a guard objects to the updates of a whole epoch."""

    def right(guard, steps):
        return 0.1 if steps > 1 and int(guard.learner.state[RAISED]) < MOST_RAISED else 0.9

    set_guard_accuracy(right)
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
    "short epochs": (SingleStep(guard=False, training=replace(HOW, batch=16)), 600, BUDGET_S),
}


@pytest.fixture
def overfitting(set_guard_accuracy):
    """Once eps has grown, a single step is overfitted to, until another one is added."""

    def right(guard, steps):
        raised, grown = (
            int(guard.learner.state[RAISED]),
            guard.learner.with_current_eps.threat.constraint.eps > 0.05,
        )
        return 0.1 if steps > 1 and not raised and grown else 0.9

    set_guard_accuracy(right)


def last_of(run):
    found = saved(run / "checkpoints", LAST)
    assert found is not None
    return found.checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("overfitting")
@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_resumes_to_the_same_plans_and_weights(tmp_path, name):
    def stop(step):
        if step.stage.startswith("training") and step.done >= 3:
            raise Interrupted("stopped", signal_number=2)

    whole = hardened(steady, *RECIPES[name], run=tmp_path / "whole")
    with pytest.raises(Interrupted):
        hardened(steady, *RECIPES[name], run=tmp_path / "r", progress=stop)
    again = hardened(steady, *RECIPES[name], run=tmp_path / "r", resume=True)
    assert whole.curve[-1].epoch > 4 and (name == "guarded") == (whole.curve[-1].dearer > 1)
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


@pytest.mark.slow
def test_a_budget_below_an_epoch_is_refused_with_one_that_suffices_unless_it_is_wanted_anyway():
    recipe = PGDTraining(steps=2, training=replace(HOW, batch=4))

    def needed(budget_s):
        with pytest.raises(
            UsageError, match=r"is too small for one epoch of PGDTraining: .* of the 135"
        ) as caught:
            hardened(lambda calls, now: 400, recipe, budget_s=budget_s)
        budget, anyway = caught.value.remedies
        assert (anyway.argument, anyway.value) == ("anyway", True)
        return seconds(str(budget.value), "budget")

    enough_s = needed(LONG_S)
    assert hardened(lambda calls, now: 400, recipe, budget_s=enough_s).card["epochs"] >= 1
    found = hardened(lambda calls, now: 400, recipe, budget_s=LONG_S, anyway=True)
    assert 0 < found.card["epochs"] < 1


def test_fewer_steps_are_advised_only_for_a_recipe_with_several():
    several, one = (str(too_small("pgd", 0.1, Pace(1.0, 1), 0.1, n_steps=n)) for n in (2, 1))
    assert "; fewer steps take less time; give budget=" in several and "fewer steps" not in one


def test_a_first_update_and_a_first_evaluation_that_are_slow_are_not_part_of_the_plan():
    """As where constructing the optimiser imports a part of torch, which takes longer than any update."""

    def paced(calls_that_import):
        class Network(Timed):
            clock = Clock(lambda calls, now: 1 << 20 if calls <= calls_that_import else 30)

        model = fakes.subject(Network(*fakes.network(1)).requires_grad_()).model
        recipe = PGDTraining(steps=2, training=HOW)
        return pace(recipe, model, training(), ThreatModel(Linf(0.06)), LONG_S, Network.clock)

    assert paced(3) == paced(0)
    now = [0.0]

    def look(n):
        now[0] += 0.001 * n if now[0] else 17.0

    timed = candidates._timed_evaluation(Evaluation(129, look), 60.0, lambda: now[0])
    assert timed == (pytest.approx(0.129), 129)


def test_plans_are_made_again_soon_where_the_pace_changes_by_more_than_a_factor_of_two():
    now = [0.0]
    pacer = Pacer(100.0, 10.0, 0.0, 0.0, lambda: now[0])
    plan = pacer(0, 0, 100, None)
    for done, seconds_of_each in ((1, 0.1), (3, 0.1), (7, 0.1), (11, 0.5)):
        now[0] += seconds_of_each * (done - plan.at)
        plan = pacer(done, done, 100, plan)
    assert plan.update_s == pytest.approx(0.5) and plan.end < 0.3 * 970
    assert pacer(11, 11, 100, plan).look_s == 0.0
    now[0] += 3.0
    assert pacer(11, 0, 100, replace(plan, look_s=1.0)).look_s == 3.0
