"""Attacks that begin with the examples nearest to falling, and go on while that pays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from holdfast.attacks.suites import LEAST
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.assembly import due_examples, untried_bound
from holdfast.runs.harness.measure import measure_plan
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member

N = 40 * LEAST


@dataclass(frozen=True)
class Doing:
    """An attack that does what it is told."""

    act: Callable
    needs: ClassVar = "gradients"

    def __call__(self, model, batch, threat, *, rng):
        return self.act(model, batch, threat, rng)


class Slope(torch.nn.Module):
    """Two classes; the margin of an example is its first feature."""

    def forward(self, x):
        return torch.stack((x[:, 0], torch.zeros_like(x[:, 0])), dim=1)


def problem():
    """Examples in no order of margin, and how each ranks among all by it."""
    rank = torch.arange(N) * 7 % N
    x = torch.stack((0.5 + 0.4 * rank / N, torch.zeros(N)), dim=1)
    return Batch(x, torch.zeros(N, dtype=torch.int64), torch.arange(N)), rank


def breaks(rank, below, asked):
    """An attack that breaks the examples of the lowest ranks, and notes whom it was given."""

    def act(model, batch, threat, rng):
        asked.append(batch.ids)
        falls = rank[batch.ids] < below
        return torch.where(falls[:, None], torch.zeros_like(batch.x), batch.x)

    return Doing(act)


def plan(*members, **settings):
    return Plan(members, ThreatModel(Linf(1.0)), **settings)


def run(below, waves=3, **settings):
    batch, rank = problem()
    asked = []
    member = Member("Nearest", breaks(rank, below, asked), waves)
    evidence = measure_plan(Classifier(Slope()), [*batch.split(500)], plan(member, **settings))
    return evidence, rank, asked


@pytest.mark.parametrize(
    ("below", "reached"),
    [(0, N // 8), (1, N // 4), (N // 8, N // 4), (N // 8 + 1, N // 2), (N // 2 + 1, N)],
)
def test_a_wave_that_breaks_nothing_is_the_last(below, reached):
    evidence, rank, asked = run(below)
    assert sorted(rank[torch.cat(asked)].tolist()) == list(range(reached))
    assert int(evidence["success"].sum()) == below


def test_waves_are_one_attack_in_the_evidence_with_the_examples_that_they_left():
    evidence, _, _ = run(N // 8)
    (record,) = evidence.attacks
    assert (record.name, record.surviving_before, record.surviving_after) == ("Nearest", N, N - N // 8)
    assert record.cost.forwards == N // 4
    assert set(evidence["broken_by"].tolist()) == {-1, 0}
    (said,) = record.notes
    assert record.residual is not None
    assert (record.residual.untried, round(record.residual.at_most, 3)) == (N - N // 4, 0.027)
    assert said == (
        f"it was run on {N // 4} of the {N:,} robust examples, lowest margins first. The last {N // 8} all "
        f"survived, so with 95 % confidence it would break at most 2.7 % of the other {N - N // 4}, if none of those "
        "is more likely to be broken"
    )


@pytest.mark.parametrize("sizes", [(32, 32, 32, 38, 75), (157, 157, 314, 628, 1256)], ids=["few", "many"])
def test_the_bound_on_the_other_examples_is_wrong_in_at_most_5_percent(sizes):
    """The examples being alike: where a share `p` falls, each wave may hold by luck, and end the attack."""
    for p in torch.linspace(0.001, 0.3, 300).tolist():
        wrong, reached = 0.0, 1.0
        for size in sizes:
            holds = (1 - p) ** size
            wrong += reached * holds * (p > untried_bound(size, len(sizes) + 1))
            reached *= 1 - holds
        assert wrong <= 0.05


def test_an_attack_that_finished_all_examples_has_no_note():
    evidence, _, _ = run(N // 2 + 1)
    assert (evidence.attacks[0].notes, evidence.attacks[0].residual) == ((), None)


def test_a_full_plan_queries_every_example_at_once():
    _, _, asked = run(0, full=True)
    assert len(torch.cat(asked)) == N


def test_few_examples_are_one_wave():
    batch, rank = problem()
    few, asked = batch.take(rank < LEAST), []
    measure_plan(Classifier(Slope()), [few], plan(Member("Nearest", breaks(rank, 0, asked), 5)))
    assert len(torch.cat(asked)) == LEAST


def test_an_earlier_attack_decides_which_examples_are_nearest():
    """The lowest margin that any attack has left counts, not the clean one."""
    batch, rank = problem()

    def lower(model, batch, threat, rng):
        high = (rank[batch.ids] >= N - LEAST)[:, None]
        return torch.where(high, torch.full_like(batch.x, 0.01), batch.x)

    asked = []
    members = Member("Lower", Doing(lower)), Member("Nearest", breaks(rank, 0, asked), 5)
    measure_plan(Classifier(Slope()), [batch], plan(*members))
    assert set(rank[torch.cat(asked)].tolist()) >= set(range(N - LEAST, N))


def test_no_example_is_due_after_a_wave_without_success():
    asked = []
    batch, rank = problem()
    waves = plan(Member("Nearest", breaks(rank, 0, asked), 3))
    stages = waves.stages()
    clean = {
        "correct": torch.ones(N, dtype=torch.bool),
        "eligible": torch.ones(N, dtype=torch.bool),
        "margin": batch.x[:, 0],
    }
    first = {
        "ran": due_examples(stages[1], waves, {"clean": clean}),
        "success": torch.zeros(N, dtype=torch.bool),
        "dead": torch.zeros(N, dtype=torch.bool),
        "backwards": torch.zeros(N, dtype=torch.int64),
        "height": batch.x[:, 0],
    }
    by_stage = {"clean": clean, stages[1].name: first}
    assert not due_examples(stages[2], waves, by_stage).any()


@pytest.mark.parametrize(("below", "asked_again"), [(0, 0), (1, N - 1)])
def test_an_attack_after_another_is_run_only_if_that_one_broke_an_example(below, asked_again):
    batch, rank = problem()
    first, second = [], []
    members = (
        Member("First", breaks(rank, below, first)),
        Member("Second", breaks(rank, 0, second), after="First"),
    )
    evidence = measure_plan(Classifier(Slope()), [batch], plan(*members))
    assert sum(map(len, second)) == asked_again
    notes = evidence.attacks[1].notes
    assert ("it was not run, because First broke no example" in notes) == (not asked_again)
