"""A network with a detector: what is robust of it can be computed, and is found by attacks that see the pair."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import holdfast
from holdfast.attacks import APGD, FGSM, FMN, PGD, HopSkipJump, Square
from holdfast.attacks.parts.images import seen_through
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.outputs import rejected_as_correct, with_detector
from holdfast.core.threat import ThreatModel
from holdfast.io.data.loaders import as_data
from holdfast.io.models.adapting import digest_of_object
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.shares import Absent
from holdfast.runs.assess.assess import assess
from holdfast.runs.harness.measure import measure
from holdfast.runs.harness.plan import members_of
from holdfast.runs.harness.stage import Member
from holdfast.threats.transformations import Corruptions
from runs.fakes import data, network, order, settled, subject

N, FEATURES, LIMIT = 40, 2, 0.3


def sides(x):
    """Class 1 where the first value is above a half."""
    return torch.stack((0.5 - x[:, 0], x[:, 0] - 0.5), dim=1)


def offset(x):
    """The mean distance of the values to the middle: near a corner an input is a stranger."""
    return (x[:, 1] - x[:, 0]).abs()


def problem(eps=0.2):
    """A pair, examples, whom it accepts, and who stands.

    To be accepted and wrong the first value must lie beyond a half, and the second within the limit of it: each has an
    interval to itself, and what counts is the gap between the two.
    """
    x = torch.rand(N, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, low, high = sides(x).argmax(1), (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    nearest, farthest = torch.where(y == 0, 0.5, low[:, 0]), torch.where(y == 0, high[:, 0], 0.5)
    gap = torch.maximum(low[:, 1] - farthest, nearest - high[:, 1])
    accepted = offset(x) < LIMIT
    falls = (nearest < farthest) & (gap < LIMIT)
    return with_detector(sides, offset, LIMIT), Batch(x, y, torch.arange(N)), accepted, accepted & ~falls


@pytest.mark.parametrize("access", ["gradients", "scores"])
def test_an_example_survives_if_no_accepted_input_is_misclassified(access):
    model, batch, accepted, stands = problem()
    attacks = [PGD(steps=60, restarts=4)] if access == "gradients" else [Square(queries=1500)]
    evidence = measure(Classifier(model), [batch], attacks, ThreatModel(Linf(0.2), access=access))
    assert torch.equal(evidence["correct"], accepted)
    assert torch.equal(evidence["rejected"], ~accepted)
    assert torch.equal(evidence["correct"] & ~evidence["success"], stands)
    assert 0 < stands.sum() < accepted.sum()


def test_labels_alone_lead_to_accepted_wrong_inputs():
    model, batch, accepted, stands = problem()
    threat = ThreatModel(Linf(0.2), access="labels", queries=400)
    evidence = measure(Classifier(model), [batch], [HopSkipJump()], threat)
    fallen = evidence["success"]
    assert fallen.any()
    assert not (fallen & (stands | ~accepted)).any()
    assert (evidence["adversarial_prediction"][fallen] == 1 - batch.y[fallen]).all()


def test_an_attacker_without_the_detector_breaks_fewer():
    model, batch, accepted, stands = problem()
    threat = ThreatModel(Linf(0.2))
    evidence = measure(Classifier(model), [batch], [Unaware()], threat)
    assert stands.sum() < (evidence["correct"] & ~evidence["success"]).sum() < accepted.sum()


@dataclass(frozen=True)
class Unaware:
    """PGD on the bare network, whatever model it is given."""

    needs: ClassVar = "gradients"

    def __call__(self, model, batch, threat, *, rng):
        return PGD()(Classifier(sides), batch, threat, rng=rng)


def test_the_smallest_change_is_to_an_accepted_wrong_input():
    model, batch, accepted, _ = problem()
    threat = ThreatModel(L2(math.inf))
    evidence = measure(Classifier(model), [batch], [FMN(steps=200)], threat)
    assert (evidence["distance_l2"][~accepted] == 0).all()
    # every point over the line and within the limit: the foot on the line, where the detector lets it be
    x = batch.x[accepted]
    foot = torch.stack((torch.full((len(x),), 0.5), x[:, 1].clamp(0.5 - LIMIT, 0.5 + LIMIT)), dim=1)
    truth = (foot - x).norm(dim=1)
    found = evidence["distance_l2"][accepted].double()
    assert (found >= truth - 1e-6).all()
    assert (found <= truth * 1.05 + 1e-3).double().mean() > 0.8


def test_a_goal_is_to_be_accepted_as_a_class():
    model, batch, _, stands = problem()
    evidence = measure(
        Classifier(model), [batch], [PGD(steps=60, restarts=4)], ThreatModel(Linf(0.2), goal=1)
    )
    zeros = (batch.y == 0) & evidence["correct"]
    assert torch.equal(evidence["success"][zeros], ~stands[zeros])
    assert (evidence["adversarial_prediction"][evidence["success"]] == 1).all()


@pytest.mark.parametrize("threshold, scale", [(0.5, 1.0), (0.5, 0.25), (-0.5, 4.0)])
def test_a_detector_may_return_a_decision_or_a_score(threshold, scale):
    _, batch, accepted, _ = problem()

    def whole(x):
        return (offset(x) >= LIMIT).long() - int(threshold < 0)

    assert with_detector(sides, whole, torch.tensor(threshold)).threshold == threshold
    for detector in (whole, lambda x: whole(x) > threshold):
        model = Classifier(
            with_detector(sides, detector, threshold if detector is whole else 0.5, scale=scale)
        )
        evidence = measure(model, [batch], [FGSM()], ThreatModel(Linf(0.2)))
        assert torch.equal(evidence["rejected"], ~accepted)


def test_a_rejected_input_counts_for_its_label():
    y = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 4.0], [1.0, 3.0, math.nan], [1.0, 3.0, 4.0]])
    wanted = torch.tensor([[2.0, 3.0], [4.0, 3.0], [math.nan, 3.0], [1.0, 4.0]])
    assert torch.equal(rejected_as_correct(logits, y).nan_to_num(9.0), wanted.nan_to_num(9.0))


def test_the_scale_of_the_score_changes_no_verdict():
    model, batch, _, _ = problem()
    for scale in (0.01, 100.0):
        other = with_detector(sides, offset, LIMIT, scale=scale)
        assert torch.equal(Classifier(other)(batch.x).argmax(1), Classifier(model)(batch.x).argmax(1))


def test_metrics_of_a_model_that_rejects():
    model, batch, accepted, _ = problem()
    evidence = measure(Classifier(model), [batch], [PGD()], ThreatModel(Linf(0.2)))
    assert estimate("rejection_rate", evidence).value == pytest.approx(1 - float(accepted.double().mean()))
    assert estimate("precision", evidence).value == 1.0
    recall = [float(accepted[batch.y == k].double().mean()) for k in (0, 1)]
    assert estimate("recall", evidence).value == pytest.approx(sum(recall) / 2)
    gap = float((1 - evidence["confidence"][accepted]).double().mean())
    assert 0 < estimate("calibration_error", evidence).value <= gap + 1e-9
    bare = measure(Classifier(sides), [batch], [PGD()], ThreatModel(Linf(0.2)))
    with pytest.raises(Absent, match="the model accepts every input; give it a detector"):
        estimate("rejection_rate", bare)
    nobody = measure(Classifier(with_detector(sides, offset, -1)), [batch], [PGD()], ThreatModel(Linf(0.2)))
    assert estimate("clean_accuracy", nobody).value == 0
    with pytest.raises(Absent, match="the model accepts none"):
        estimate("calibration_error", nobody)


def pair(threshold=0.9):
    """A network of four classes, and the distance of an input to the middle."""
    return with_detector(network(), Off(), threshold, scale=0.5)


class Off(torch.nn.Module):
    def forward(self, x):
        return (x - 0.5).flatten(1).norm(dim=1, keepdim=True)


@pytest.mark.slow
def test_doubts_and_gates_see_the_pair():
    asked = order(doubts="all", gates=("rejection_rate <= 1", "robust_accuracy >= 0"), shard_size=40)
    whole = assess(subject(pair()), data(), asked).evidence
    assert 0 < whole["rejected"].sum() < len(whole)
    assert torch.equal(whole["prediction"] == -1, whole["rejected"])
    assert not (whole["success"] & (whole["adversarial_prediction"] < 0)).any()
    assert {doubt.state for doubt in whole.doubts} & {"clear", "raised"}
    assert any("the model rejects inputs with a high detector score" in note for note in whole.notes)


@pytest.mark.slow
def test_an_adaptive_attack_replaces_the_stage_that_masks_the_gradient_of_a_pair():
    _, batch, _, stands = problem()
    masked = with_detector(lambda x: sides(rounded(x)), lambda x: offset(rounded(x)), LIMIT)
    given, arms = as_data(batch.x, batch.y), (Member("BPDA", APGD(steps=60)),)
    threat, quick = ThreatModel(Linf(0.2)), Member("FGSM", FGSM())
    found = [
        assess(subject(masked), given, order(quick, threat=threat, adaptive=each, doubts="all", shard_size=N))
        for each in ((), arms)
    ]
    broken = (
        found[0].evidence["suite_success"],
        found[1].evidence["success"],
    )  # probes break some of the first
    naive, adaptive = (int((found[0].evidence["correct"] & ~each).sum()) for each in broken)
    assert stands.sum() - 3 <= adaptive < naive - 3


def rounded(x):
    return (100 * x).round() / 100


@pytest.mark.slow
def test_a_resumed_run_is_the_same_and_another_threshold_is_refused(tmp_path):
    def stop(step):
        if step.stage.startswith("2") and step.done:
            raise KeyboardInterrupt

    asked = order(doubts="all", shard_size=20)
    given = in_hand(pair())
    assess(given, data(), asked, run=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        assess(given, data(), asked, run=tmp_path / "cut", progress=stop)
    assess(given, data(), asked, run=tmp_path / "cut", resume=True)
    assert settled(tmp_path / "cut") == settled(tmp_path / "whole")
    with pytest.raises(UsageError, match="model"):
        assess(in_hand(pair(0.8)), data(), asked, run=tmp_path / "cut", resume=True)


def in_hand(net):
    """As `holdfast.assess` takes a network in hand: known by what it holds."""
    return subject(net, digest_of_object(net))


def test_the_expectation_over_transformations_rejects_too():
    model = seen_through(Classifier(pair()), {"noise": 0.01})
    x = torch.rand(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = Batch(x, network()(x).argmax(1), torch.arange(30))
    evidence = measure(model, [batch], [PGD(steps=3)], ThreatModel(Linf(0.05)))
    assert 0 < evidence["rejected"].sum() < 30
    assert "right_probability" in evidence


def test_classes_are_counted_without_the_rejection():
    model, batch, _, _ = problem()
    assert Classifier(model, classes=2)(batch.x).shape == (N, 3)
    with pytest.raises(TargetError, match="returned 2 classes, but 3 were declared"):
        Classifier(model, classes=3)(batch.x)
    one = with_detector(lambda x: x[:, 0] - 0.5, offset, LIMIT)
    assert Classifier(one, classes=2)(batch.x).shape == (N, 3)
    evidence = holdfast.assess(
        holdfast.open_model(model, classes=2), (batch.x, batch.y), "linf:0.2", [PGD()]
    ).evidence
    assert 0 < evidence["rejected"].sum() < N


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match="expected a network and a detector"):
        with_detector(sides, 3.0, LIMIT)
    with pytest.raises(UsageError, match="scale is 0"):
        with_detector(sides, offset, LIMIT, scale=0)
    with pytest.raises(UsageError, match="scale is inf"):
        with_detector(sides, offset, LIMIT, scale=math.inf)
    for threshold in (math.nan, "half", torch.zeros(3)):
        with pytest.raises(UsageError, match="threshold is .*; expected a number"):
            with_detector(sides, offset, threshold)
    _, batch, _, _ = problem()
    with pytest.raises(TargetError, match=r"the detector returned \(40, 2\) for 40 inputs"):
        Classifier(with_detector(sides, lambda x: x, LIMIT))(batch.x)
    with pytest.raises(TargetError, match="the model returned a tuple"):
        Classifier(with_detector(lambda x: (x, x), offset, LIMIT)).eval()(batch.x)
    inner = torch.nn.Sequential(with_detector(network(), Off(), 0.9))
    with pytest.raises(TargetError, match="a guarded network is part of another"):
        assess(subject(inner), data(), order())
    with pytest.raises(UsageError, match="the surrogate fake has a detector that rejects inputs"):
        assess(subject(), data(), replace(order(), surrogates=(subject(pair()),)))
    clouded = order(*members_of([PGD()]), threat=ThreatModel(Corruptions(3)))
    with pytest.raises(UsageError, match="this model has one"):
        assess(subject(pair()), data(), clouded)
