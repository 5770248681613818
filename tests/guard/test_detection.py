"""What a detector is worth: the numbers against closed forms, the passes that they come from, the adaptive attacks."""

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from guard.test_guard import LIMIT, N, offset, pair, problem, sides
from holdfast.attacks import PGD
from holdfast.core.constraints import L0, Linf
from holdfast.core.errors import UsageError
from holdfast.core.gradients import through
from holdfast.core.model import Classifier
from holdfast.core.outputs import (
    Aim,
    rejected_as_correct,
    score,
    softly_rejected_as_correct,
    with_aim,
    with_detector,
)
from holdfast.core.threat import ThreatModel
from holdfast.io.data.loaders import as_data
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.names import DETECTION
from holdfast.metrics.shares import Absent
from holdfast.runs.assess.assess import assess
from holdfast.runs.harness.kinds.passes import PASSES
from holdfast.runs.harness.plan import adaptive_members
from holdfast.runs.harness.stage import Against, Member
from holdfast.runs.harness.target import WithDetector
from holdfast.statistics.intervals import auroc, balance, median_width, threshold
from runs.fakes import FAST, data, order, settled, subject

EPS = 0.2


def assessed(model, batch, **changes):
    changes = {"threat": ThreatModel(Linf(EPS)), "gates": (), "shard_size": N, **changes}
    plan = order(FAST, **changes)
    return assess(subject(model), as_data(batch.x, batch.y), plan)


@cache
def usual():
    """The result of the pair whose closed form is known."""
    model, batch, _, _ = problem()
    return assessed(model, batch)


@cache
def walled():
    """The result at a scale at which the suite sees the score as a wall, so that it breaks less than the passes do."""
    return assessed(STEEP, problem()[1])


STEEP = with_detector(sides, offset, LIMIT, scale=1e-4)


def reach(batch):
    """The lowest score, above the threshold, of an input within reach that the network alone has wrong; else inf."""
    x, y = batch.x, batch.y
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    nearest, farthest = torch.where(y == 0, 0.5, low[:, 0]), torch.where(y == 0, high[:, 0], 0.5)
    gap = torch.maximum(low[:, 1] - farthest, nearest - high[:, 1]).clamp_min(0)
    return torch.where(nearest < farthest, gap - LIMIT, torch.inf)


@pytest.mark.slow
def test_no_pass_wins_within_the_closed_form_and_thresholds_are_reached():
    batch, found = problem()[1], usual().evidence
    truth, aware = reach(batch), found["aware_score"].double()
    assert (aware >= truth - 1e-9).all()
    assert (found["oblivious_score"] >= aware).all()
    for rate in (0.5, 0.05, 0.01, 0.001):
        limit = threshold(found["score"], rate)
        assert ((aware <= limit) != (truth <= limit)).sum() <= 1
    assert (found["class_margin"] > 0).all()


class Sign(torch.nn.Module):
    """Yes or no, as floats."""

    def forward(self, x):
        return (offset(x) > LIMIT).to(x.dtype)


SLOPE = {"plain": Sign(), "declared": through(Sign(), backward=lambda x: offset(x) - LIMIT + 0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOPE)
def test_a_detector_without_a_gradient_raises_a_doubt_that_only_a_way_round_it_answers(kind):
    _, batch, _, stands = problem()
    model, arms = with_detector(sides, SLOPE[kind], 0.5), (Member("BPDA", PGD(steps=10)),)
    blind, known = (assessed(model, batch, doubts="all", adaptive=chosen) for chosen in ((), arms))
    doubts = [{doubt.name: doubt for doubt in found.doubts}["zero-gradient"] for found in (blind, known)]
    assert doubts[0].state == "raised"
    assert "no gradient of the detector's score reaches any input" in doubts[0].message
    assert doubts[1].state == ("answered" if kind == "declared" else "raised")
    left = int((known.evidence["correct"] & ~known.evidence["success"]).sum())
    assert left >= stands.sum()


@pytest.mark.slow
def test_a_detector_with_a_gradient_raises_none():
    model, batch, _, _ = problem()
    found = assessed(model, batch, doubts="all")
    assert {doubt.name: doubt.state for doubt in found.doubts}["zero-gradient"] == "clear"


def test_a_stage_that_gives_no_floats_has_no_gradient_to_stand_in_for():
    _, batch, _, _ = problem()
    whole = through(lambda x: offset(x) > LIMIT, backward=offset)
    arms = (Member("BPDA", PGD(steps=10)),)
    with pytest.raises(UsageError, match=r"the stage net.detector returns torch.bool, .* as in .float\(\)"):
        assessed(with_detector(sides, whole, 0.5), batch, doubts="all", adaptive=arms)


def test_the_numbers_are_those_of_the_scores():
    found = usual().evidence
    clean, aware = found["score"], found["aware_score"]
    limit = clean.sort().values[-1 - int(0.05 * len(clean))]
    turned = aware < math.inf
    assert estimate("detection_rate_at_5_percent", found).value == pytest.approx(
        float((aware[turned] > limit).double().mean())
    )
    assert estimate("detection_rate_at_5_percent", found).n == turned.sum() < len(clean)
    right = (clean <= limit) & (aware > limit)
    assert estimate("accepted_right_at_5_percent", found).value == pytest.approx(float(right.double().mean()))
    wrong = estimate("accepted_wrong_at_5_percent", found)
    assert wrong.value == pytest.approx(float((aware <= limit).double().mean()))
    with pytest.raises(Absent, match="0.1 % is measured on 999 clean inputs or more, and the sample has 40"):
        estimate("detection_rate_at_0_1_percent", found)
    for name in (name for name in DETECTION if "_0_1_" not in name):
        number = estimate(name, found)
        assert 0 <= number.low <= number.value <= number.high <= 1
    assert (
        estimate("detection_auroc", found).value <= estimate("oblivious_detection_auroc", found).value + 1e-12
    )


def test_the_area_counts_pairs_and_ties_half():
    g = torch.Generator().manual_seed(0)
    clean, attacked = torch.randint(0, 6, (25,), generator=g), torch.randint(2, 8, (25,), generator=g)
    above = (attacked[:, None] > clean).double() + 0.5 * (attacked[:, None] == clean)
    assert auroc(clean.double(), attacked.double()).value == pytest.approx(float(above.mean()))
    same = torch.full((9,), -torch.inf)
    assert auroc(same, same).value == 0.5


def test_a_threshold_is_exceeded_by_no_larger_a_share():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, -torch.inf, 5.0, 4.0, 0.0, 9.0, 7.0])
    assert [threshold(scores, rate) for rate in (0.0, 0.05, 0.1, 0.29, 0.5)] == [9.0, 9.0, 7.0, 5.0, 2.0]
    assert median_width(torch.tensor([-3.0, 3.0, 1.0])) == 3.0
    assert median_width(torch.tensor([math.nan, 3.0])) == 0.0
    assert balance(2 * torch.arange(8.0), 3.0) == pytest.approx(3 / 8)
    assert (
        balance(torch.ones(8), 1.0) == balance(torch.ones(1), 1.0) == balance(torch.arange(8.0), 0.0) == 1.0
    )


def test_another_scale_and_threshold_change_what_is_rejected_alone():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 4.5], [1.0, math.nan, 4.0]])
    assert score(logits).tolist() == [-1.0, 1.5, -math.inf]
    moved = with_aim(logits[:2], Aim(weight=2.0, beyond=1.0))
    assert moved.tolist() == [[1.0, 3.0, -1.0], [1.0, 3.0, 4.0]]
    unaware = rejected_as_correct(with_aim(logits[:2], Aim(beyond=math.inf)), torch.tensor([0, 0]))
    assert torch.equal(unaware, logits[:2, :2])


def test_a_soft_gradient_changes_no_logit():
    model, batch, _, _ = problem()
    x = batch.x.clone().requires_grad_()
    sharp = WithDetector(Classifier(model), batch, Aim(2.0))(x)
    soft = WithDetector(Classifier(model), batch, Aim(2.0, softness=0.5))(x)
    assert torch.equal(sharp, soft)
    slopes = [torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in (sharp, soft)]
    assert (slopes[0][:, 1] == 0).any()
    assert (slopes[1][:, 1] != 0).all()  # it leads along the detector's score before that rejects
    tiny = softly_rejected_as_correct(model(batch.x), batch.y, 1e-6)
    torch.testing.assert_close(tiny, rejected_as_correct(model(batch.x), batch.y), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_what_a_pass_on_the_detector_breaks_is_a_doubt():
    doubt = next(doubt for doubt in walled().doubts if doubt.name == "not-exhausted")
    assert doubt.state == "raised"
    assert "on the detector" in doubt.message


@pytest.mark.slow
def test_the_adaptive_run_tries_several_weights_and_only_on_a_detector():
    _, batch, _, stands = problem()
    short = PGD(steps=20, restarts=2)
    arms = tuple(replace(member, attack=short) for member in adaptive_members(Linf(EPS)) if member.against)
    naive, adaptive = walled(), assessed(STEEP, batch, adaptive=arms)
    assert [record.name for record in adaptive.attacks] == ["PGD", "Pair", "Pair-light", "Pair-heavy"]
    assert adaptive.attacks[1].notes[0].startswith("the detector's score weighs 0.3 times")
    assert adaptive.attacks[1].notes[1].startswith("run because of a detector")
    correct, arms_broke = naive.evidence["correct"], adaptive.evidence["broken_by"] > 0
    alone = int((correct & ~naive.evidence["suite_success"]).sum())  # the passes on a detector break more
    left = int((correct & ~adaptive.evidence["success"]).sum())
    assert arms_broke.any() and left < alone
    assert left <= int(stands.sum()) + 1
    bare = assessed(sides, batch, adaptive=arms)
    assert [record.name for record in bare.attacks] == ["PGD"]
    assert {member.name for member in adaptive_members(L0(2)) if member.against} == {m.name for m in arms}


@pytest.mark.slow
def test_a_model_without_a_detector_or_with_another_goal_is_not_measured():
    model, batch, _, _ = problem()
    bare = assessed(sides, batch)
    aimed = assessed(model, batch, threat=ThreatModel(Linf(EPS), goal=1))
    blind = assessed(model, batch, threat=ThreatModel(Linf(EPS), access="gradients"), attacked=False)
    for run in (bare, aimed, blind):
        assert not set(DETECTION) & set(run.metrics)
        with pytest.raises(Absent, match="with_detector"):
            estimate("detection_auroc", run.evidence)
    with pytest.raises(UsageError, match="with_detector"):
        assessed(sides, batch, gates=("detection_auroc >= 0.9",))
    gated = assessed(model, batch, gates=("detection_auroc >= 0.999",))
    assert gated.gates[0].verdict == "fail"


@pytest.mark.slow
def test_a_pair_without_a_decision_is_no_detector():
    _, batch, _, _ = problem()
    found = assessed(
        with_detector(sides, lambda x: torch.zeros(len(x), dtype=x.dtype), LIMIT), batch
    ).evidence
    assert estimate("detection_auroc", found).value == 0.5
    wrong = estimate("accepted_wrong_at_1_percent", found).value
    assert wrong == pytest.approx(estimate("robust_error_rate", found).value)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_passes_on_the_detector(tmp_path):
    def stop(step):
        if step.stage == PASSES[2] and step.done:
            raise KeyboardInterrupt

    asked = order(FAST, shard_size=20, adaptive=(Member("Pair", PGD(steps=5), against=Against(0.3)),))
    whole = assess(subject(pair()), data(), asked, run=tmp_path / "whole")
    assert {"aware_score", "oblivious_score"} <= set(whole.evidence.columns)
    with pytest.raises(KeyboardInterrupt):
        assess(subject(pair()), data(), asked, run=tmp_path / "cut", progress=stop)
    assess(subject(pair()), data(), asked, run=tmp_path / "cut", resume=True)
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")


@pytest.mark.slow
def test_batches_make_no_difference():
    first, second = (
        assess(subject(pair()), data(20), order(FAST, batch_size=size, shard_size=size)) for size in (7, 20)
    )
    for name in ("aware_score", "oblivious_score", "score"):
        torch.testing.assert_close(first.evidence[name], second.evidence[name])


@pytest.mark.slow
def test_the_example_of_the_documentation_prints_its_stated_output(capsys):
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "adaptive.md").read_text(encoding="utf-8")
    code, printed = re.search(
        r"```python\n(import holdfast\n.*?)```\n\n```text\n(.*?)```", page, re.DOTALL
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
