"""Bugs that others have shipped, planted one by one: the law that forbids each turns red, and is green without it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from holdfast.attacks import PGD, pgd
from holdfast.attacks.parts import ascent
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered
from holdfast.core.threat import ThreatModel
from holdfast.gates.judging import AtLeast
from holdfast.runs.harness import target as verdict
from holdfast.testing import geometry, laws
from holdfast.testing.laws import Case
from metrics import test_gates

CLIMB = PGD(steps=8)
LINF, EUCLID = Case(CLIMB, Linf), Case(CLIMB, L2)


@dataclass(frozen=True)
class Planted:
    """PGD with something done to what it returns."""

    spoil: Callable
    needs: ClassVar = "gradients"

    def __call__(self, model, batch, threat, *, rng):
        return self.spoil(model, batch, threat, CLIMB(model, batch, threat, rng=rng))


def case(spoil):
    return Case(Planted(spoil), Linf)


# --- attacks that are wrong in themselves


def outside_the_ball(model, batch, threat, x_adv):
    return model.bounds.clamp(batch.x + 1.01 * (x_adv - batch.x))


def outside_the_box(model, batch, threat, x_adv):
    return x_adv + (x_adv - batch.x).sign() * 1e-6


def not_a_number(model, batch, threat, x_adv):
    return torch.where(x_adv == batch.x, x_adv, x_adv / (x_adv - batch.x).abs().gt(1e-12) * torch.nan)


def the_clean_input(model, batch, threat, x_adv):
    return batch.x.clone()


def in_place(model, batch, threat, x_adv):
    batch.x.copy_(x_adv)
    return x_adv


def mixed_with_its_company(model, batch, threat, x_adv):
    moved = x_adv - batch.x
    return threat.constraint.project(x_adv + 0.1 * moved.mean(0) - 0.1 * moved, batch.x, model.bounds)


def fresh_draws(model, batch, threat, x_adv):
    return threat.constraint.project(x_adv + 0.01 * torch.randn_like(x_adv), batch.x, model.bounds)


def contiguous_only(model, batch, threat, x_adv):
    return batch.x.view(len(batch), -1).view_as(x_adv) * 0 + x_adv


def towards_the_next_class(model, batch, threat, x_adv):
    """The best answer to one rival; with two classes there is no other."""
    rival = batch.towards((batch.y + 1) % model(batch.x, batch.ids).shape[1])
    aimed = ThreatModel(threat.constraint, goal=1, access=threat.access)
    return CLIMB(model, rival, aimed, rng=Draws(0))


def ten_classes(model, batch, threat, x_adv):
    model(batch.x, batch.ids).gather(1, torch.full((len(batch), 1), 9))
    return x_adv


@pytest.mark.parametrize(
    "spoil, law",
    [
        (outside_the_ball, laws.stays_inside),
        (outside_the_box, laws.stays_inside),
        (not_a_number, laws.stays_inside),
        (the_clean_input, laws.returns_successful_queries),
        (the_clean_input, laws.agrees_with_exact_distances),
        (towards_the_next_class, laws.agrees_with_exact_distances),
        (the_clean_input, laws.reaches_targets),
        (in_place, laws.does_not_change_its_arguments),
        (mixed_with_its_company, laws.does_not_depend_on_the_batch),
        (fresh_draws, laws.is_reproducible),
    ],
)
def test_a_bad_attack_breaks_its_law(spoil, law):
    law(case(lambda model, batch, threat, x_adv: x_adv))
    with pytest.raises(AssertionError, match="Planted"):
        law(case(spoil))


@pytest.mark.parametrize(
    "spoil, law, error",
    [
        (contiguous_only, laws.handles_unusual_batches, RuntimeError),
        (ten_classes, laws.works_for_any_number_of_classes, RuntimeError),
    ],
)
def test_an_attack_that_cannot_take_the_odd_input_raises_in_its_law(spoil, law, error):
    with pytest.raises(error):
        law(case(spoil))


def test_gradients_left_on_the_weights_are_seen():
    def forgets(model, batch, threat, x_adv):
        model(batch.x.clone().requires_grad_(), batch.ids).sum().backward()
        return x_adv

    with pytest.raises(AssertionError, match="left a gradient on"):
        laws.does_not_change_the_model(case(forgets))


def test_an_attack_that_declares_too_little_is_seen():
    @dataclass(frozen=True)
    class Modest:
        needs: ClassVar = "scores"

        def __call__(self, model, batch, threat, *, rng):
            return CLIMB(model, batch, threat, rng=rng)

    with pytest.raises(AssertionError, match="sees more than scores"):
        laws.needs_only_the_declared_access(Case(Modest(), Linf))


def test_restarts_that_forget_are_seen():
    """More restarts return what the last of them found."""

    @dataclass(frozen=True)
    class Forgetful:
        restarts: int
        needs: ClassVar = "gradients"

        def __call__(self, model, batch, threat, *, rng):
            return CLIMB(model, batch, threat, rng=rng) if self.restarts == 1 else batch.x.clone()

    laws.breaks_all_that_a_weaker_one_breaks(PGD(steps=3), PGD(steps=3, restarts=3), Linf)
    with pytest.raises(AssertionError, match="loses"):
        laws.breaks_all_that_a_weaker_one_breaks(Forgetful(1), Forgetful(3), Linf)


# --- bugs in what attacks stand on: the owner, the name and the wrong value of an attribute


def moves_feasible_points():
    project = Linf.project
    return (Linf, "project", lambda self, x_adv, x, box: x + 0.999 * (project(self, x_adv, x, box) - x))


def box_after_ball():
    """The usual shortcut: shrink to the ball, then clamp; inside, yet not the nearest point."""

    def shortcut(self, x_adv, x, box):
        delta = x_adv - x
        size = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))
        return box.clamp(x + delta * (self.eps / size).clamp_max(1))

    return (L2, "project", shortcut)


def no_box():
    return (Linf, "project", lambda self, x_adv, x, box: x_adv.clamp(x - self.eps, x + self.eps))


def sign_step_under_l2():
    return (L2, "steepest", Linf.steepest)


def gaussian_start_outside():
    def sample(self, batch, bounds, rng):
        return batch.x + self.eps * rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)

    return (L2, "sample", sample)


def batch_wide_radius():
    within = L1.within
    return (
        L1,
        "within",
        lambda self, x_adv, x, box, radius: within(self, x_adv, x, box, radius.amax().expand_as(radius)),
    )


def seed_by_position():
    bits = Draws.bits
    return (Draws, "bits", lambda self, ids, *shape: bits(self, torch.arange(len(ids)), *shape))


def seed_by_batch_size():
    bits = Draws.bits
    return (Draws, "bits", lambda self, ids, *shape: bits(Draws(self.key ^ len(ids)), ids, *shape))


def last_iterate():
    return (pgd, "ascend", partial(ascent.ascend, keep="last"))


def margin_over_the_wrong_axis():
    def margin(logits, batch):
        own = logits.gather(1, batch.y[:, None])[:, 0]
        return own - logits.amax(0)[: len(batch)].amax()

    return (ascent, "margin", margin)


def margin_upside_down():
    margin = ascent.margin
    return (ascent, "margin", lambda logits, batch: -margin(logits, batch))


def one_query_too_many():
    start = Metered.__init__

    def generous(self, model, batch, threat):
        start(
            self,
            model,
            batch,
            threat if threat.queries is None else replace(threat, queries=threat.queries + 1),
        )

    return (Metered, "__init__", generous)


def forgets_when_cut_short():
    return (Metered, "adversarial", lambda self: self._batch.x.clone())


def believes_the_attack():
    """The harness takes whatever comes back from an attack for a success."""
    judged = verdict.votes

    def believing(target, batch, x, seen):
        logits, right, fresh = judged(target, batch, x, seen)
        return (logits, right, fresh) if x is batch.x else (logits, right * 0, fresh * 0)

    return (verdict, "votes", believing)


@pytest.mark.parametrize(
    "plant, law",
    [
        (moves_feasible_points, partial(geometry.does_not_change_feasible_points, Linf(0.3), 0)),
        (moves_feasible_points, partial(geometry.projection_is_idempotent, Linf(0.3), 0)),
        (box_after_ball, partial(geometry.projects_to_the_nearest, L2(0.5), 0)),
        (no_box, partial(geometry.projects_inside, Linf(0.3), 0)),
        (no_box, partial(laws.stays_inside, LINF)),
        (sign_step_under_l2, partial(geometry.steps_along_the_steepest, L2(0.5), 0)),
        (gaussian_start_outside, partial(geometry.samples_inside, L2(0.5), 0)),
        (batch_wide_radius, partial(geometry.radii_apply_to_each_example, L1(0.5), 0)),
        (seed_by_position, partial(geometry.samples_inside, Linf(0.3), 0)),
        (seed_by_position, partial(laws.does_not_depend_on_the_batch, LINF)),
        (seed_by_batch_size, partial(geometry.samples_inside, Linf(0.3), 0)),
        (seed_by_batch_size, partial(laws.does_not_depend_on_the_batch, EUCLID)),
        (last_iterate, partial(laws.returns_successful_queries, Case(PGD(steps=5, reach=40), Linf))),
        (margin_over_the_wrong_axis, partial(laws.agrees_with_exact_distances, LINF)),
        (margin_upside_down, partial(laws.agrees_with_exact_distances, LINF)),
        (one_query_too_many, partial(laws.respects_the_query_budget, LINF)),
        (forgets_when_cut_short, partial(laws.respects_the_query_budget, Case(PGD(steps=40), Linf))),
        (believes_the_attack, partial(laws.agrees_with_exact_distances, LINF)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.func.__name__,
)
def test_a_planted_bug_breaks_its_law(plant, law, monkeypatch):
    law()
    monkeypatch.setattr(*plant())
    with pytest.raises(AssertionError):
        law()


# --- gates


@pytest.mark.parametrize("rounded", ["unclear", "doubted"])
def test_a_gate_that_rounds_unclear_up_is_seen(rounded, monkeypatch):
    def lenient(self, estimate, doubts):
        if estimate.high < self.bound:
            return "fail"
        low = estimate.value if rounded == "unclear" else estimate.low
        return "pass" if low >= self.bound and (rounded == "doubted" or not doubts.open) else "unclear"

    tests = [
        partial(test_gates.test_the_interval_is_judged_and_not_the_point, 0.3, 0.7, "unclear", "unclear"),
        test_gates.test_an_open_doubt_turns_pass_into_unclear_and_leaves_fail_alone,
    ]
    law = tests[rounded == "doubted"]
    law()
    monkeypatch.setattr(AtLeast, "__call__", lenient)
    with pytest.raises(AssertionError):
        law()
