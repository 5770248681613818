"""Every metric against its definition, written out by hand on small evidence."""

import dataclasses
import math

import pytest
import torch

from holdfast.core.constraints import L2, Linf
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.threat import ThreatModel
from holdfast.metrics import comparisons, predictions, shares
from holdfast.metrics.catalogue import BY_EPS, PAIRED, PLAIN, estimate, estimates
from holdfast.metrics.names import AT_EPS, DETECTION, METRICS, OF_TASKS
from holdfast.metrics.names import PAIRED as PAIRED_NAMES
from holdfast.metrics.predictions import ACCURACIES, POINTS, accuracy_against_eps, accuracy_against_queries
from holdfast.metrics.shares import Absent, robust_error_gap
from holdfast.reports.card import generalisation_note
from holdfast.runs.harden.hardened import generalisation

EPS = 0.25


def evidence(n=60, *, seed=0, threat=None, **columns):
    """Evidence of a suite with its fixed pass: 3 classes, a fifth wrong unattacked, a third of the rest broken."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    correct = torch.arange(n) % 5 != 0
    success = correct & (torch.arange(n) % 3 == 1)
    distance = torch.where(success, 0.2, math.inf).where(correct, torch.tensor(0.0))
    chances = torch.rand(n, generator=generator)
    whole = {
        "id": torch.arange(n),
        "y": y,
        "digest": torch.arange(n)[:, None].expand(n, 32).to(torch.uint8),
        "prediction": torch.where(correct, y, (y + 1) % 3),
        "correct": correct,
        "confidence": 0.5 + chances / 2,
        "entropy": chances,
        "probability_margin": torch.where(correct, chances, -chances),
        "success": success,
        "queries": torch.full((n,), 100),
        "first_success": torch.where(success, torch.arange(n) + 1, 0),
        **{f"distance_{norm}": distance for norm in ("linf", "l2", "l1", "l0")},
        "attacked_prediction": torch.where(correct & ~success, y, (y + 1) % 3),
        "attacked_confidence": 0.4 + chances / 2,
        "attacked_entropy": chances + 0.25,
        "attacked_probability_margin": torch.where(correct & ~success, chances, -chances),
    }
    return Evidence({**whole, **columns}, threat or ThreatModel(Linf(EPS)), "standard@1", (), 0)


def minimum_norm(distances, *, eps=math.inf):
    distances = torch.tensor(distances)
    correct = distances > 0
    return evidence(
        len(distances),
        threat=ThreatModel(L2(eps)),
        correct=correct,
        success=correct & (distances <= eps),
        distance=distances,
        prediction=torch.where(correct, torch.arange(len(distances)) % 3, 3),
    )


def test_the_names_are_the_catalogue():
    assert set(METRICS) == {*PLAIN, *BY_EPS, *PAIRED}
    assert set(BY_EPS) == AT_EPS
    assert set(PAIRED) == PAIRED_NAMES


def test_every_value_is_in_its_interval_and_has_its_n():
    run = evidence(distance=torch.linspace(0, 1, 60))
    found = estimates(run, baseline=evidence(seed=1))
    corrupted = {*ACCURACIES, "corruption_error_rate", "worst_corruption", "mce"}
    others = {
        *DETECTION,
        *OF_TASKS,
        "certified_accuracy",
        "rejection_rate",
        "targeted_success_rate",
        "trigger_success_rate",
        "transfer_success",
        "suite_robust_accuracy",
        "worst_group",
    }
    assert set(found) == set(METRICS) - others - corrupted
    for name, seen in found.items():
        assert seen.low <= seen.value <= seen.high, name
        assert 0 < seen.n <= 60, name


def test_accuracies():
    run = evidence()
    correct, success = run["correct"], run["success"]
    assert shares.clean_accuracy(run).value == pytest.approx(48 / 60)
    assert shares.clean_error_rate(run).value == pytest.approx(12 / 60)
    robust = int((correct & ~success).sum())
    assert shares.robust_accuracy(run).value == pytest.approx(robust / 60)
    assert shares.robust_error_rate(run).value == pytest.approx(1 - robust / 60)
    assert shares.attack_success_rate(run).value == pytest.approx((48 - robust) / 48)
    assert shares.attack_success_rate(run).n == 48
    assert shares.perturbed_share(run).value == pytest.approx((48 - robust) / 60)
    assert shares.robustness_score(run).value == pytest.approx(2 / (60 / 48 + 60 / robust))


def test_a_misclassified_example_is_never_robust():
    run = evidence(success=torch.zeros(60, dtype=torch.bool))
    assert shares.robust_accuracy(run).value == shares.clean_accuracy(run).value
    run = evidence(success=torch.ones(60, dtype=torch.bool))
    assert shares.robust_accuracy(run).value == 0
    assert shares.attack_success_rate(run).value == 1


def test_robust_accuracy_of_a_randomised_model_is_the_mean_chance_of_being_right():
    chance = torch.linspace(0, 1, 60)
    run = evidence(right_probability=chance)
    assert shares.robust_accuracy(run).value == pytest.approx(0.5)
    assert shares.robust_accuracy(run, eps=EPS) == shares.robust_accuracy(run)


def test_worst_class_is_the_smallest_and_its_interval_holds_for_all_classes_together():
    run = evidence()
    rows = shares.per_class(run)
    assert [row.label for row in rows] == [0, 1, 2]
    assert [row.n for row in rows] == [20, 20, 20]
    worst, smallest = shares.worst_class(run), min(rows, key=lambda row: row.robust_accuracy.value)
    assert worst.value == smallest.robust_accuracy.value == 0
    assert worst.high == smallest.robust_accuracy.high


def test_no_attack_leaves_its_metrics_absent():
    run = evidence()
    bare = dataclasses.replace(
        run,
        columns={
            k: v for k, v in run.columns.items() if not k.startswith(("attacked", "success", "distance"))
        },
    )
    found = estimates(bare)
    assert set(found) == {
        "clean_accuracy",
        "clean_error_rate",
        "precision",
        "recall",
        "f1",
        "calibration_error",
    }
    with pytest.raises(Absent, match="suite='standard'"):
        estimate("attacked_f1", bare)
    with pytest.raises(Absent, match="curve=True"):
        estimate("robust_margin", bare)
    with pytest.raises(Absent, match="baseline="):
        estimate("regression", bare)


def test_a_baseline_is_a_usage_matter():
    assert issubclass(Absent, UsageError)
    with pytest.raises(UsageError, match="no metric 'robustness'"):
        estimate("robustness", evidence())
    with pytest.raises(UsageError, match="robust_margin without @0.5"):
        estimate("robust_margin", evidence(), eps=0.5)


def test_another_eps_is_read_off_the_distances():
    run = minimum_norm([0.0, 0.1, 0.2, 0.3, math.inf])
    for eps, expected in [(0.0, 0.8), (0.1, 0.6), (0.15, 0.6), (0.3, 0.2), (9.0, 0.2)]:
        assert estimate("robust_accuracy", run, eps=eps).value == pytest.approx(expected), eps
    assert estimate("attack_success_rate", run, eps=0.2).value == pytest.approx(0.5)


def test_a_distance_that_rounding_put_beyond_the_eps_counts_as_broken():
    run = minimum_norm([0.3 + 5e-8, 0.31])
    assert estimate("robust_accuracy", run, eps=0.3).value == 0.5


def test_without_minimum_norm_attacks_there_is_the_runs_own_eps_only():
    run = evidence()
    assert estimate("robust_accuracy", run, eps=EPS) == estimate("robust_accuracy", run)
    with pytest.raises(Absent, match="attacked at eps=0.25 only"):
        estimate("robust_accuracy", run, eps=0.1)


def test_a_minimum_norm_run_has_no_robust_accuracy_without_an_eps():
    run = minimum_norm([0.1, 0.2, 0.3])
    with pytest.raises(Absent, match="robust_accuracy@EPS"):
        estimate("robust_accuracy", run)
    assert "robust_accuracy" not in estimates(run)
    assert "robust_margin" in estimates(run)


def test_medians_run_over_all_examples_and_means_over_the_successes():
    run = evidence()
    assert estimate("perturbation_linf", run).value == math.inf  # more than half stand
    few = torch.where(run["correct"] & (torch.arange(60) % 4 == 0), math.inf, 0.5).where(
        run["correct"], torch.tensor(0.0)
    )
    run = evidence(distance_l2=few, success=run["correct"] & few.isfinite())
    assert estimate("perturbation_l2", run).value == 0.5
    mean = estimate("mean_perturbation_l2", run)
    assert mean.value == 0.5
    assert mean.n == int((run["correct"] & few.isfinite()).sum())
    assert mean.n / 60 == pytest.approx(estimate("perturbed_share", run).value)


def test_the_mean_size_in_the_norm_of_the_threat_is_at_most_eps():
    run = evidence()
    assert estimate("mean_perturbation_linf", run).high <= EPS
    assert estimate("mean_perturbation_l2", run).high == math.inf  # all alike, and nothing bounds this norm


def test_robust_margin_is_the_median_with_inf_kept():
    assert estimate(
        "robust_margin", minimum_norm([0.0, 0.1, 0.4, math.inf, math.inf])
    ).value == pytest.approx(0.4)
    assert estimate("robust_margin", minimum_norm([0.1, math.inf, math.inf])).value == math.inf


@pytest.mark.parametrize(
    "distances", [[0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.2, 0.3], [0.5], [0.0, 0.2, math.inf, math.inf]]
)
def test_adversarial_radius_is_the_last_eps_that_keeps_half_of_clean_accuracy(distances):
    run = minimum_norm(distances)
    radius = estimate("adversarial_radius", run).value
    half = estimate("clean_accuracy", run).value / 2
    if math.isfinite(radius):
        assert estimate("robust_accuracy", run, eps=radius - 1e-3).value >= half
        assert estimate("robust_accuracy", run, eps=radius + 1e-3).value < half
    else:
        assert estimate("robust_accuracy", run, eps=1e9).value >= half


def test_the_radius_of_a_model_that_is_never_right_is_zero():
    assert estimate("adversarial_radius", minimum_norm([0.0, 0.0])).value == 0


def test_macro_scores_by_hand():
    # classes 0, 1, 2; hits 2, 1, 0; predicted 3, 2, 1; labelled 2, 2, 2
    run = evidence(6, y=torch.tensor([0, 0, 1, 1, 2, 2]), prediction=torch.tensor([0, 0, 1, 2, 0, 1]))
    assert estimate("precision", run).value == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert estimate("recall", run).value == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert estimate("f1", run).value == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)


def test_a_class_that_is_only_predicted_counts():
    run = evidence(4, y=torch.tensor([0, 0, 1, 1]), prediction=torch.tensor([0, 2, 1, 1]))
    assert estimate("f1", run).value == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_entropy_and_margin():
    run = evidence()
    assert estimate("defensive_entropy", run).value == pytest.approx(float(run["attacked_entropy"].mean()))
    assert estimate("defensive_entropy_rise", run).value == pytest.approx(0.25, abs=1e-6)
    drop = (run["probability_margin"] - run["attacked_probability_margin"]).mean()
    assert estimate("defensive_margin", run).value == pytest.approx(float(drop), abs=1e-6)


def test_an_example_that_gave_nan_is_left_out_of_the_means():
    entropy = torch.full((60,), 0.5)
    entropy[7] = math.nan
    seen = estimate("defensive_entropy", evidence(attacked_entropy=entropy))
    assert (seen.value, seen.n) == (0.5, 59)


def test_a_model_that_gave_nan_alone_has_no_entropy():
    with pytest.raises(Absent, match="NaN for all 60"):
        estimate("defensive_entropy", evidence(attacked_entropy=torch.full((60,), math.nan)))


def test_calibration_error_by_hand():
    run = evidence(
        4,
        y=torch.tensor([0, 0, 0, 0]),
        prediction=torch.tensor([0, 1, 0, 0]),
        confidence=torch.tensor([0.9, 0.9, 0.52, 0.52]),
    )
    assert predictions.calibration_error(run).value == pytest.approx(
        (2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.52)) / 4
    )
    sure = evidence(4, y=torch.zeros(4, dtype=torch.long), prediction=torch.zeros(4, dtype=torch.long))
    assert (
        estimate(
            "calibration_error",
            dataclasses.replace(sure, columns={**sure.columns, "confidence": torch.ones(4)}),
        ).value
        == 0
    )


def test_targeted_runs_have_their_own_metric():
    eligible = torch.arange(60) % 3 != 2
    run = evidence(
        threat=ThreatModel(Linf(EPS), goal=2),
        eligible=eligible,
        success=eligible & (torch.arange(60) % 2 == 0),
    )
    found = estimates(run)
    assert found["targeted_success_rate"].value == pytest.approx(0.5)
    assert found["targeted_success_rate"].n == 40
    assert not {"robust_accuracy", "attack_success_rate", "worst_class", "robust_margin"} & set(found)
    with pytest.raises(Absent, match="targeted_success_rate"):
        estimate("robust_accuracy", run)
    with pytest.raises(Absent, match="goal=targeted"):
        estimate("targeted_success_rate", evidence())


def test_the_success_rate_of_a_trigger_is_over_the_examples_of_other_classes():
    run = evidence()
    triggered = torch.arange(60) % 3 == 0
    assert estimate("trigger_success_rate", evidence(triggered=triggered)).value == pytest.approx(1 / 3)
    aimed = evidence(threat=ThreatModel(Linf(8 / 255), goal=0), triggered=triggered)
    others = run["y"] != 0
    found = estimate("trigger_success_rate", aimed)
    assert found.n == int(others.sum())
    assert found.value == pytest.approx(float(triggered[others].double().mean()))
    with pytest.raises(Absent, match="use a threat such as trigger"):
        estimate("trigger_success_rate", run)


def test_runs_are_paired_by_digest_whatever_their_order():
    before, after = evidence(), evidence(success=torch.zeros(60, dtype=torch.bool))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(after, columns={k: v[order] for k, v in after.columns.items()})
    assert comparisons.regression(after, before) == comparisons.regression(shuffled, before)
    gained = shares.robust_accuracy(after).value - shares.robust_accuracy(before).value
    assert comparisons.regression(after, before).value == pytest.approx(-gained)
    assert comparisons.clean_accuracy_drop(after, before).value == 0


def test_copies_of_an_example_are_paired_one_by_one():
    same = torch.zeros(60, 32, dtype=torch.uint8)
    assert len(comparisons.paired_examples(evidence(digest=same), evidence(digest=same))) == 60
    assert len(comparisons.paired_examples(evidence(digest=same), evidence())) == 1


def test_runs_of_other_examples_are_refused():
    with pytest.raises(UsageError, match="share no example"):
        comparisons.regression(evidence(), evidence(digest=torch.full((60, 32), 200, dtype=torch.uint8)))


def test_regression_of_a_randomised_model_compares_chances():
    before = evidence(right_probability=torch.full((60,), 0.75))
    after = evidence(right_probability=torch.full((60,), 0.5))
    assert comparisons.regression(after, before).value == pytest.approx(0.25)


def test_the_eps_curve_falls_from_clean_accuracy_and_agrees_with_the_metric():
    run = minimum_norm([0.0, 0.1, 0.2, 0.2, math.inf])
    curve = accuracy_against_eps(run)
    assert curve.x == pytest.approx((0.0, 0.1, 0.2))
    assert [point.value for point in curve.y] == pytest.approx([0.8, 0.6, 0.2])
    for at, point in zip(curve.x, curve.y, strict=True):
        assert point.value == pytest.approx(estimate("robust_accuracy", run, eps=at).value)


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    run = minimum_norm([0.001 * k for k in range(1, 500)])
    curve = accuracy_against_eps(run)
    assert len(curve.x) <= POINTS
    assert curve.x[-1] == pytest.approx(0.499)
    assert curve.y[-1].value == 0


def test_the_query_curve_ends_at_robust_accuracy():
    run = evidence()
    curve = accuracy_against_queries(run)
    assert curve.y[0].value == shares.clean_accuracy(run).value
    assert curve.y[-1].value == shares.robust_accuracy(run).value
    assert curve.x[1] == float(run["first_success"][run["success"]].min())


def test_classes_of_a_randomised_model_count_chances_as_the_whole_does():
    chance = torch.tensor([1.0, 0.5, 0.0, 0.5])
    columns = {
        "id": torch.arange(4),
        "y": torch.tensor([0, 0, 1, 1]),
        "correct": torch.ones(4, dtype=torch.bool),
        "success": chance < 0.5,
        "right_probability": chance,
    }
    evidence = Evidence(columns, ThreatModel(Linf(0.1)), "rand@1", (), 0)
    rows = [row.robust_accuracy.value for row in shares.per_class(evidence)]
    assert rows == [0.75, 0.25]
    assert shares.worst_class(evidence).value == 0.25
    assert shares.robust_accuracy(evidence).value == 0.5


def test_the_robust_generalisation_gap_is_a_difference_of_errors_and_has_a_sentence_on_the_card():
    gap = robust_error_gap(60, 100, 90, 100)
    assert gap.value == pytest.approx(0.3) and 0.15 < gap.low < 0.3 < gap.high < 0.45
    note = generalisation_note(generalisation(100, 0.6, n_training=100, robust_in_training=0.9))
    assert "on held-out examples is 30.0 percentage points higher (+18." in note and "above 0" in note
    lower = generalisation_note(generalisation(100, 0.9, n_training=100, robust_in_training=0.6))
    assert "is 30.0 percentage points lower (+18." in lower and "above 0" not in lower
    equal = generalisation_note(generalisation(100, 0.6, n_training=100, robust_in_training=0.6))
    assert "is equal to that on 100 training examples (difference −1" in equal
