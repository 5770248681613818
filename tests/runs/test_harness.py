"""The harness: it alone judges, it checks what attacks return, and it cuts the work up without changing it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

from holdfast.attacks import DDN, NES, PGD, Square
from holdfast.attacks.parts.losses import cross_entropy, dlr
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.meter import Room, in_pieces
from holdfast.core.model import Batches, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.metrics.catalogue import estimate
from holdfast.runs.harness.assembly import Context, due_examples, evidence_from, join
from holdfast.runs.harness.measure import measure
from holdfast.runs.harness.plan import Plan, members_of, refuse_what_is_hidden, settings
from holdfast.runs.harness.stage import Member, Work
from holdfast.runs.harness.target import prepared
from holdfast.testing import fakes
from holdfast.testing.fakes import linear_problem
from holdfast.threats.transformations import Patch

MODEL = fakes.network()
BATCH = fakes.labelled(MODEL, fakes.examples(n=30))
THREAT = ThreatModel(Linf(0.05))
CONTEXT = Context()


@dataclass(frozen=True)
class Doing:
    """An attack that does what it is told, and keeps the ids of what it was given."""

    act: Callable
    seen: list = field(default_factory=list)
    needs: ClassVar = "gradients"

    def __call__(self, model, batch, threat, *, rng):
        self.seen.append(batch.ids.tolist())
        return self.act(model, batch, threat, rng)


def leave(model, batch, threat, rng):
    return batch.x


def noise(model, batch, threat, rng):
    return threat.constraint.sample(batch, model.bounds, rng)


def some_broken(n):
    """Half the space is class 1: an attack that moves the first `n` ids there."""
    model = Classifier(lambda x: torch.stack((0.5 - x[:, 0], x[:, 0] - 0.5), 1))
    batch = Batch(torch.full((6, 1), 0.45), torch.zeros(6).long(), torch.tensor([7, 3, 9, 1, 5, 8]))

    def act(model, batch, threat, rng):
        return torch.where((batch.ids <= n)[:, None], batch.x + 0.1, batch.x)

    return model, batch, act


def concluded(plan, model, batch, room=256, context=CONTEXT):
    """What `measure` does, for a plan of one's own."""
    with prepared(model, batch.take(torch.arange(1))) as target:
        columns = {}
        for stage in plan.stages():
            chosen, clean = due_examples(stage, plan, columns), columns.get("clean", {})
            work = Work(plan, target, (batch,), Room(room), clean, chosen)
            columns[stage.name] = stage.kind.run(stage, work)
        by_stage = {name: join([values]) for name, values in columns.items()}
        return evidence_from(
            plan.outline(target.classes), by_stage, {}, context, randomised=target.randomised
        )


# --- judging


def test_success_is_decided_by_the_plain_model_on_the_returned_inputs():
    def lose(model, batch, threat, rng):
        """Breaks everything on the way and returns the clean inputs."""
        model(threat.constraint.sample(batch, model.bounds, rng), batch.ids)
        PGD(steps=10)(model, batch, threat, rng=rng)
        return batch.x

    evidence = measure(MODEL, [BATCH], [Doing(lose)], THREAT)
    assert not evidence["success"].any()
    assert (evidence["first_success"] == 0).all()
    assert evidence.attacks[0].surviving_after == 30


def test_an_attack_does_not_decide_its_own_success():
    """It may call whatever it likes a success; there is nowhere to say so."""

    @dataclass(frozen=True)
    class Boastful:
        success: bool = True
        needs: ClassVar = "none"

        def __call__(self, model, batch, threat, *, rng):
            return batch.x

    assert isinstance(Boastful(), Attack)
    assert not measure(MODEL, [BATCH], [Boastful()], THREAT)["success"].any()


@pytest.mark.parametrize(
    "moved, says",
    [
        (
            lambda x: x + torch.eye(30)[:, 4].double().view(-1, 1, 1, 1) * 0.06,
            "on example {id}: distance 0.06, allowed 0.05",
        ),
        (lambda x: x - 0.05, "left the threat model on example"),
        (lambda x: x * torch.nan, "left the threat model on example"),
        (lambda x: x.float(), "returned torch.float32 of shape"),
        (lambda x: x[1:], r"of shape \(29, 3, 4, 4\) for inputs torch.float64 of shape \(30, 3, 4, 4\)"),
    ],
)
def test_what_leaves_the_threat_model_is_a_bug_of_the_attack_that_names_the_example(moved, says):
    inner = BATCH.at(BATCH.x.clamp(0.01, 0.9))
    inner = fakes.labelled(MODEL, inner)
    with pytest.raises(HoldfastError, match=says.format(id=int(inner.ids[4]))):
        measure(MODEL, [inner], [Doing(lambda m, b, t, r: moved(b.x))], THREAT)


def test_the_evidence_is_the_worst_case_of_each_example():
    model, batch, act = some_broken(3)
    _, _, more = some_broken(7)
    evidence = measure(model, [batch], [Doing(leave), Doing(act), Doing(more)], ThreatModel(Linf(0.2)))
    assert evidence["id"].tolist() == [7, 3, 9, 1, 5, 8]
    assert evidence["success"].tolist() == [True, True, False, True, True, False]
    assert evidence["broken_by"].tolist() == [2, 1, -1, 1, 2, -1]
    assert evidence["adversarial_prediction"].tolist() == [1, 1, 0, 1, 1, 0]
    assert [(a.surviving_before, a.surviving_after) for a in evidence.attacks] == [(6, 6), (6, 4), (4, 2)]
    assert evidence.gallery["id"].tolist() == [1, 3, 5, 7]


def test_later_attacks_get_only_the_surviving_examples():
    model, batch, act = some_broken(3)
    first, second = Doing(act), Doing(leave)
    measure(model, [batch], [first, second], ThreatModel(Linf(0.2)))
    assert first.seen == [[7, 3, 9, 1, 5, 8]]
    assert second.seen == [[7, 9, 5, 8]]


def test_a_full_plan_runs_every_attack_on_all_examples():
    model, batch, act = some_broken(3)
    first, second = Doing(act), Doing(leave)
    concluded(Plan(members_of([first, second]), ThreatModel(Linf(0.2)), full=True), model, batch)
    assert second.seen == first.seen


def test_misclassified_examples_are_not_attacked():
    wrong = Batch(BATCH.x, torch.where(BATCH.ids % 2 == 0, BATCH.y, (BATCH.y + 1) % 4), BATCH.ids)
    attack = Doing(leave)
    evidence = measure(MODEL, [wrong], [attack], THREAT)
    assert attack.seen == [[i for i in BATCH.ids.tolist() if i % 2 == 0]]
    assert torch.equal(evidence["correct"], BATCH.ids % 2 == 0)
    assert torch.equal(evidence["distance_linf"] == 0, BATCH.ids % 2 == 1)


def test_nan_and_a_tie_count_against_the_model():
    logits = {"NaN": (torch.nan, 0.0, 0.0), "tie": (1.0, 1.0, 0.0)}
    batch = Batch(BATCH.x, torch.zeros(30).long(), BATCH.ids)
    for name, values in logits.items():
        evidence = measure(Classifier(fakes.Constant(values)), [batch], [Doing(leave)], THREAT)
        assert not evidence["correct"].any(), name


# --- goals and distances


def test_a_goal_excludes_examples_of_its_class_and_must_be_predicted():
    seen = []

    def aim(model, batch, threat, rng):
        seen.append(batch.target.tolist())
        return PGD(steps=20)(model, batch, threat, rng=rng)

    wrong = Batch(BATCH.x, torch.where(torch.arange(30) < 5, 2, BATCH.y), BATCH.ids)
    evidence = measure(MODEL, [wrong], [Doing(aim)], ThreatModel(Linf(0.2), goal=2))
    prediction = MODEL(BATCH.x).argmax(1)
    assert torch.equal(evidence["eligible"], (wrong.y != 2) & (prediction != 2))
    attacked = evidence["eligible"] & evidence["correct"]
    assert seen == [[2] * int(attacked.sum())]
    assert not evidence["success"][~attacked].any()
    assert evidence["success"].any()
    assert (evidence["adversarial_prediction"][evidence["success"]] == 2).all()


def test_another_class_than_the_goal_is_no_success():
    model, batch, act = some_broken(9)
    three = Classifier(lambda x: torch.cat((model(x), x[:, :1] - 9), 1))
    evidence = measure(three, [batch], [Doing(act)], ThreatModel(Linf(0.2), goal=2))
    assert evidence["eligible"].all() and not evidence["success"].any()


def test_minimum_norm_plans_measure_all_examples_without_an_eps():
    oracle, batch = linear_problem(3)
    exact = oracle.distance(batch.x, batch.y, L2())
    eps = exact.median().item()
    plan = Plan(members_of([DDN(steps=60), Doing(leave)]), ThreatModel(L2(eps)), smallest=True)
    evidence = concluded(plan, oracle.classifier(), batch)
    ratio = evidence["distance"].double() / exact
    assert ratio.min() >= 1 - 1e-6 and ratio.median() <= 1.05
    assert torch.equal(evidence["success"], evidence["distance"] <= eps * (1 + 1e-6) + 1e-7)
    assert plan.members[1].attack.seen == [batch.ids.tolist()]


def test_the_smallest_distance_of_minimum_norm_attacks_counts_for_an_example():
    oracle, batch = linear_problem(3)
    far, near = DDN(steps=2), DDN(steps=60)
    for members, closest in (([far, near], 1), ([near, far], 0)):
        plan = Plan(members_of(members), ThreatModel(L2(torch.inf)), smallest=True)
        evidence = concluded(plan, oracle.classifier(), batch)
        gone = evidence["success"]
        both = torch.stack([evidence[f"{record.stage}.distance"] for record in evidence.attacks])
        assert torch.equal(evidence["broken_by"][gone], both[:, gone].argmin(0))
        assert (evidence["broken_by"][gone] == closest).double().mean() > 0.5
        shown = torch.isin(evidence["id"], evidence.gallery["id"])
        moved = L2().distance(evidence.gallery["x_adv"], evidence.gallery["x"])
        torch.testing.assert_close(moved.float(), evidence["distance"][shown])


def test_unsolved_examples_are_infinitely_far():
    plan = Plan((), THREAT, curve=(Member("nothing", Doing(leave)),))
    evidence = concluded(plan, MODEL, BATCH)
    assert (evidence["distance"] == torch.inf).all()


# --- budgets and access


def test_results_of_an_attack_before_its_budget_ran_out_count():
    threat = ThreatModel(Linf(0.2), queries=7)
    evidence = measure(MODEL, [BATCH], [PGD(steps=40, drop=False)], threat)
    assert evidence["success"].any()
    assert evidence["queries"].max() <= 7
    assert torch.equal(evidence["success"], evidence["first_success"] > 0)


def test_an_attack_that_needs_more_than_can_be_seen_is_refused_by_name():
    hidden = Classifier(MODEL.net, access="scores")
    for model, threat in ((MODEL, ThreatModel(access="scores")), (hidden, ThreatModel())):
        with pytest.raises(
            UsageError,
            match="PGD needs gradients, and the (threat model allows|model gives) scores only; ",
        ):
            measure(model, [BATCH], [PGD()], threat)
        measure(model, [BATCH], [Square(queries=2)], threat)


@pytest.mark.parametrize(
    "members, threat, target, says",
    [
        (
            [Square()],
            ThreatModel(Linf(0.1), access="labels"),
            "gradients",
            "can allow more, as in access=scores; give suite=",
        ),
        (
            [PGD(), Square()],
            ThreatModel(Linf(0.1)),
            "scores",
            "give skip=.'pgd',., or give suite='black-box' .Square.$",
        ),
        (
            [PGD(), DDN(), Square()],
            ThreatModel(L2(0.1), access="scores"),
            "gradients",
            (
                "can allow more, as in access=gradients; give skip=.'pgd', 'ddn'., or give suite='black-box' .Square.$"
            ),
        ),
        ([PGD()], ThreatModel(L0(3)), "scores", "suite='black-box' "),
        (
            [Square()],
            ThreatModel(L2(0.1)),
            "labels",
            "suite='black-box' ",
        ),
        (
            [Square()],
            ThreatModel(L1(0.1)),
            "labels",
            "^Square .*; no attack under l1 works with labels alone",
        ),
    ],
)
def test_the_remedy_for_a_hidden_gradient_works(members, threat, target, says):
    with pytest.raises(UsageError, match=says):
        refuse_what_is_hidden(Plan(members_of(members), threat), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_half_a_word_are_refused(dtype):
    few = Batch(BATCH.x.to(dtype), BATCH.y, BATCH.ids)
    with pytest.raises(UsageError, match=f"{dtype}.*give them as float32"):
        measure(MODEL, [few], [PGD(steps=2)], THREAT)


def test_a_curve_that_cannot_be_drawn_is_left_out():
    plan = Plan(members_of([Square()]), THREAT, curve=members_of([PGD()]))
    with pytest.raises(UsageError, match="; leave out curve"):
        refuse_what_is_hidden(plan, "scores")


def test_first_success_counts_the_queries_of_the_attacks_before():
    evidence = measure(
        MODEL, [BATCH], [Doing(lambda m, b, t, r: (m(b.x, b.ids), b.x)[1]), PGD(steps=20)], THREAT
    )
    won = evidence["success"]
    assert (evidence["first_success"][won] > 1).all()
    assert (evidence["first_success"] <= evidence["queries"]).all()


def test_a_point_without_queries_is_decided_after_all_queries():
    jump = Doing(lambda m, b, t, r: (m(b.x, b.ids), t.constraint.project(1 - b.x, b.x, m.bounds))[1])
    evidence = measure(MODEL, [BATCH], [jump], ThreatModel(Linf(0.5)))
    won = evidence["success"] & evidence["correct"]
    assert won.any()
    assert torch.equal(evidence["first_success"][won], evidence["queries"][won])


# --- cutting up


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_sizes_change_neither_draws_nor_verdicts(size):
    attacks = [Doing(noise), PGD(steps=8, restarts=2), Square(queries=40), NES(queries=60)]
    threat = ThreatModel(Linf(0.03))
    whole = measure(MODEL, [BATCH], attacks, threat, seed=5)
    cut = measure(MODEL, list(BATCH.split(11)), attacks, threat, seed=5, batch_size=size)
    assert 0 < whole["success"].sum() < 30
    for name in ("id", "success", "broken_by", "queries", "first_success", "adversarial_prediction"):
        assert torch.equal(cut[name], whole[name]), name
    torch.testing.assert_close(cut["distance_l2"], whole["distance_l2"], rtol=1e-6, atol=1e-7)


def test_another_seed_draws_other_points():
    one, other = (measure(MODEL, [BATCH], [Doing(noise)], ThreatModel(Linf(0.3)), seed=s) for s in (0, 1))
    assert not torch.equal(one["distance_l2"], other["distance_l2"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("9 GiB"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_tried_again(error):
    sizes, told = [], []

    def work(piece):
        sizes.append(len(piece))
        if len(piece) > 4:
            raise error
        return {"id": piece.ids}

    room = Room(16, halved=lambda row, size: told.append((row, size)))
    done = in_pieces(work, BATCH, room)
    assert torch.equal(done["id"], BATCH.ids)
    assert sizes == [16, 8, *[4] * 7, 2]
    assert told == [(0, 8), (0, 4)] and room.size == 4


def test_a_batch_size_of_an_earlier_attempt_that_does_not_fit_is_halved_too():
    def work(piece):
        if len(piece) > 2:
            raise MemoryError
        return {"id": piece.ids}

    room = Room(16, known={0: 4})
    assert torch.equal(in_pieces(work, BATCH, room)["id"], BATCH.ids)
    assert room.size == 2


def test_one_example_that_does_not_fit_and_other_errors_are_raised():
    cases = ((MemoryError("9 GiB"), 1, TargetError), (RuntimeError("shape"), 8, RuntimeError))
    for error, size, expected in cases:

        def work(piece, error=error):
            raise error

        with pytest.raises(expected, match=str(error)):
            in_pieces(work, BATCH, Room(size))


def test_nothing_to_measure_is_refused():
    with pytest.raises(TargetError, match="there are no examples to measure; expected at least one"):
        measure(MODEL, [BATCH.take(torch.zeros(0).long())], [PGD()], THREAT)


# --- the model


class Fickle(nn.Module):
    """Wrong in a share of its draws, by torch's own generator."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        wrong = (torch.rand(len(x)) < self.share).double()
        sure = 1 + 0.1 * torch.rand(len(x), dtype=x.dtype) + 0 * x.flatten(1).sum(1)
        return torch.stack((sure * (1 - 2 * wrong), sure * (2 * wrong - 1)), 1)


@pytest.mark.parametrize("share, holds", [(0.2, True), (0.8, False)])
def test_a_model_that_draws_is_judged_by_most_of_its_draws(share, holds):
    batch = Batch(BATCH.x, torch.zeros(30).long(), BATCH.ids)
    torch.manual_seed(3)
    evidence = measure(Classifier(Fickle(share)), [batch], [Doing(leave)], THREAT)
    stands = evidence["correct"] & ~evidence["success"]
    assert (stands.double().mean() > 0.95) == holds
    assert abs(evidence["right_probability"].mean().item() - (1 - share)) < 0.1


def test_a_model_that_draws_does_so_from_the_run_s_seed_and_puts_torch_s_state_back():
    model, batch = Classifier(Fickle(0.5)), Batch(BATCH.x, torch.zeros(30).long(), BATCH.ids)
    found = []
    for state in (3, 4):
        torch.manual_seed(state)
        evidence = measure(model, [batch], [Doing(leave)], THREAT, seed=9)
        found.append(evidence["right_probability"])
    assert torch.equal(*found)
    votes = found[0].double() * 20
    assert torch.equal(votes, votes.round()) and votes.unique().numel() > 2  # shares without rounding
    assert "right_probability" not in measure(MODEL, [BATCH], [], THREAT)


def test_the_model_is_unchanged_after_an_error():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.5)).double()
    net[1].weight.requires_grad_(False)
    model = Classifier(net).train()
    net[2].eval()

    def fail(m, batch, threat, rng):
        assert not any(module.training for module in model.modules())
        raise ValueError("of the attack")

    with pytest.raises(ValueError, match="of the attack"):
        measure(model, [fakes.labelled(model, BATCH)], [Doing(fail)], THREAT)
    assert [m.training for m in (model, net[1], net[2])] == [True, True, False]
    assert [w.requires_grad for w in net.parameters()] == [False, True]


def test_train_mode_is_named():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.5)).double()).train()
    with prepared(model, BATCH) as target:
        assert set(target.in_training) >= {"net.2"}
        assert not target.randomised
    assert model.training


@pytest.mark.parametrize("seed", range(10))
def test_a_model_that_seldom_draws_to_any_effect_is_seen_to_draw(seed):
    class Seldom(nn.Module):
        def forward(self, x):
            logits = x.flatten(1)[:, :4]
            return torch.where(torch.rand(len(x), 1) < 0.03, logits.roll(1, dims=1), logits)

    torch.manual_seed(seed)
    with prepared(Classifier(Seldom()), BATCH) as target:
        assert target.randomised


def test_a_model_that_draws_the_same_each_time_does_not_draw_at_random():
    class Seeded(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] + torch.manual_seed(0).initial_seed() + torch.rand(4)

    with prepared(Classifier(Seeded()), BATCH) as target:
        assert not target.randomised


# --- what is written down


def test_settings_are_plain_values():
    assert settings(PGD(steps=3))["loss"] == "scaled_cross_entropy"
    assert settings(PGD(steps=3))["steps"] == 3


def test_a_change_of_few_classes_is_noted():
    plan = Plan((Member("APGD-T", PGD(loss=dlr)), Member("PGD", PGD(loss=cross_entropy))), THREAT)
    notes = [step.notes for step in plan.outline(2).steps]
    assert notes == [(), ("DLR needs 3 classes; with 2 the margin is used instead",), ()]
    assert all(step.notes == () for step in plan.outline(3).steps)


def test_the_cost_adds_up():
    evidence = measure(MODEL, [BATCH], [PGD(steps=4, drop=False)], ThreatModel(Linf(1e-6)))
    (record,) = evidence.attacks
    assert (record.cost.queries, record.cost.backwards, record.cost.forwards) == (150, 120, 180)  # 30 judged
    assert evidence.cost.forwards == 210  # and the clean pass


# --- batches


class Fastidious(nn.Module):
    """A network that takes only some numbers of rows."""

    def __init__(self, takes):
        super().__init__()
        self.net, self.takes = MODEL.net, takes

    def forward(self, x):
        if not self.takes(len(x)):
            raise ValueError(f"no batch of {len(x)}")
        return self.net(x)


@pytest.mark.parametrize(
    ("takes", "size", "multiples"),
    [
        (lambda n: n % 2 == 0, 2, True),
        (lambda n: n > 1, 2, True),
        (lambda n: n == 8, 8, False),
        (lambda n: n == 1, 1, False),
        (lambda n: n % 32 == 0, 32, True),
    ],
)
def test_a_model_that_refuses_some_batch_sizes_has_its_batches_filled_up(takes, size, multiples):
    picky = Classifier(Fastidious(takes), bounds=MODEL.bounds)
    attacks = [PGD(steps=3, restarts=2), Square(queries=20)]
    found, wanted = (measure(model, [BATCH], attacks, THREAT) for model in (picky, MODEL))
    assert wanted["success"].any() and not wanted["success"].all()
    for name in ("prediction", "success", "queries"):
        assert torch.equal(found[name], wanted[name])
    assert picky.batches is None
    with prepared(picky, BATCH.take(torch.arange(3))) as target:
        assert target.optimised.batches == Batches(size, multiples)
        assert any("batch" in note for note in target.notes)
    with prepared(MODEL, BATCH) as target:
        assert target.original.batches is None


def test_a_model_that_takes_no_batch_is_refused_in_its_own_words():
    broken = Classifier(Fastidious(lambda n: False))
    with (
        pytest.raises(TargetError, match=r"no batch of 3\. Check the shape"),
        prepared(broken, BATCH.take(torch.arange(3))),
    ):
        pass


@pytest.mark.parametrize(
    ("constraint", "size"),
    [(L0(2, "pixel"), 2), (L0(torch.inf, "pixel"), 2), (Patch(1, 2), 2), (L0(6), 6), (Linf(0.9), 6)],
    ids=str,
)
def test_l0_sizes_of_colour_images_are_in_the_unit_of_the_threat(constraint, size):
    """All three channels of two neighbouring pixels change."""

    def change(model, batch, threat, rng):
        x = batch.x.clone()
        x[:, :, 1, 1:3] = 0.8
        return x

    model = Classifier(lambda x: torch.stack((0.5 - x[:, 0, 1, 1], x[:, 0, 1, 1] - 0.5), 1))
    batch = Batch(torch.zeros(4, 3, 4, 4), torch.zeros(4).long(), torch.arange(4))
    evidence = measure(model, [batch], [Doing(change)], ThreatModel(constraint))
    assert (evidence["distance_l0"] == size).all()
    for name in ("perturbation_l0", "mean_perturbation_l0"):
        assert estimate(name, evidence).value == size
