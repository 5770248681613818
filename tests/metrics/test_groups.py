"""The intervals of groups hold together, and a small group keeps a gate from passing."""

import dataclasses

import pytest
import torch

from holdfast.core.constraints import Linf
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, judge
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.shares import FEWEST_IN_GROUP, Absent, per_group, worst_group
from holdfast.statistics.intervals import bonferroni, clopper_pearson
from metrics.test_metrics import evidence, minimum_norm


def grouped(counts, *, wrong=0):
    """Evidence with groups of (robust, all) examples, of which the first `wrong` are misclassified when clean."""
    robust = torch.cat([torch.arange(n) < k for k, n in counts])
    group = torch.cat([torch.full((n,), place) for place, (_, n) in enumerate(counts)])
    correct = torch.arange(len(group)) >= wrong
    run = evidence(len(group))
    columns = {**run.columns, "correct": correct, "success": correct & ~robust, "group": group}
    return dataclasses.replace(run, columns=columns)


def test_the_intervals_of_all_groups_hold_together():
    shares, sizes, draws = torch.tensor([0.5, 0.6, 0.75, 0.9, 0.97]), (40, 60, 35, 50, 80), 300
    generator = torch.Generator().manual_seed(3)
    all_hold = worst_holds = 0
    for _ in range(draws):
        counts = [
            (int((torch.rand(n, generator=generator) < share).sum()), n)
            for share, n in zip(shares, sizes, strict=True)
        ]
        run = grouped(counts)
        intervals = [row.robust_accuracy for row in per_group(run)]
        all_hold += all(e.low <= share <= e.high for e, share in zip(intervals, shares.tolist(), strict=True))
        worst = worst_group(run)
        worst_holds += worst.low <= float(shares.min()) <= worst.high
    assert all_hold >= 0.95 * draws and worst_holds >= 0.95 * draws


def test_the_worst_group_is_bounded_by_the_smallest_ends_of_corrected_intervals():
    run = grouped([(30, 40), (60, 100), (45, 50)])
    confidence = bonferroni(0.95, 3)
    ends = [clopper_pearson(k, n, confidence) for k, n in ((30, 40), (60, 100), (45, 50))]
    assert [row.robust_accuracy.value for row in per_group(run)] == [0.75, 0.6, 0.9]
    assert [(row.robust_accuracy.low, row.robust_accuracy.high) for row in per_group(run)] == ends
    worst = worst_group(run)
    assert (worst.value, worst.n) == (0.6, 100)
    assert (worst.low, worst.high) == (min(low for low, _ in ends), min(high for _, high in ends))


def test_a_misclassified_example_is_not_robust_in_its_group():
    first, _ = per_group(grouped([(40, 40), (40, 40)], wrong=10))
    assert (first.clean_accuracy.value, first.robust_accuracy.value) == (0.75, 0.75)


def test_the_worst_group_at_another_eps_counts_the_smallest_changes():
    run = minimum_norm([0.1] * 30 + [0.3] * 30)
    run = dataclasses.replace(run, columns={**run.columns, "group": torch.arange(60) // 30})
    assert worst_group(run, eps=0.05).value == 1
    assert worst_group(run, eps=0.2).value == 0


@pytest.mark.parametrize(
    ("counts", "claim", "verdict"),
    [
        ([(90, 100), (100, 100)], "worst_group >= 0.5", "pass"),
        ([(10, 100), (100, 100)], "worst_group >= 0.5", "fail"),
        ([(90, 100), (FEWEST_IN_GROUP, FEWEST_IN_GROUP)], "worst_group >= 0.5", "pass"),
        ([(90, 100), (FEWEST_IN_GROUP - 1, FEWEST_IN_GROUP - 1)], "worst_group >= 0.5", "unclear"),
        ([(90, 100), (0, FEWEST_IN_GROUP - 1)], "worst_group >= 0.5", "unclear"),
        ([(10, 100), (29, 29)], "worst_group >= 0.5", "fail"),  # whatever the small group's accuracy is
        ([(29, 29), (0, 29)], "worst_group >= 0.5", "unclear"),
        ([(29, 29), (0, 29)], "worst_group <= 0.5", "unclear"),
    ],
)
def test_a_gate_passes_only_if_every_group_has_30_examples(counts, claim, verdict):
    assert judge(parse(claim), grouped(counts), Doubts()).verdict == verdict


def test_small_groups_are_marked_and_do_not_decide_the_value():
    run = grouped([(80, 100), (0, 29)])
    assert [row.unclear for row in per_group(run)] == [False, True]
    worst = worst_group(run)
    assert (worst.value, worst.low, worst.n) == (0.8, 0.0, 100)


def test_a_randomised_model_has_the_mean_chance_of_each_group():
    chance = torch.cat([torch.full((40,), 0.25), torch.full((40,), 0.75)])
    run = grouped([(40, 40), (40, 40)])
    run = dataclasses.replace(run, columns={**run.columns, "right_probability": chance})
    assert [row.robust_accuracy.value for row in per_group(run)] == pytest.approx([0.25, 0.75])


def test_a_run_without_groups_or_with_a_target_has_no_worst_group():
    with pytest.raises(Absent, match=r"needs the group of each example; give groups=array"):
        estimate("worst_group", evidence())
    threat = ThreatModel(Linf(0.25), goal=1)
    with pytest.raises(Absent, match="does not exist under goal=targeted:1"):
        worst_group(dataclasses.replace(grouped([(30, 30), (30, 30)]), threat=threat))


def labelled(counts):
    """Evidence with classes of (robust, all) examples."""
    run = grouped(counts)
    return dataclasses.replace(
        run, columns={**run.columns, "y": run["group"]}, data={"classes": ["normal", "pneumonia"]}
    )


@pytest.mark.parametrize("metric", ["worst_class", "worst_group"])
@pytest.mark.parametrize(
    ("bound", "needed"),
    [
        (0.5, FEWEST_IN_GROUP),
        # 0.0125 ** (1 / n) is the lower end of 2 simultaneous intervals for n robust examples of n
        (0.95, 86),
        (1.0, None),
    ],
)
def test_a_gate_on_the_worst_states_each_class_of_five_examples_and_how_many_would_do(metric, bound, needed):
    run = labelled([(5, 5), (100, 100)])
    run = dataclasses.replace(run, data={**run.data, "groups": {"names": ["normal", "pneumonia"]}})
    judged = judge(parse(f"{metric} >= {bound}"), run, Doubts())
    assert (judged.verdict, bool(judged)) == ("unclear", False)
    assert dict(judged.too_few.counts) == {"normal": 5} and judged.too_few.needed == needed
    kind = {"worst_class": "class", "worst_group": "group"}[metric]
    assert f"too few examples of {kind} normal (5)" in judged.because
    if needed is not None:
        enough = [bonferroni(0.95, 2)] * 2
        lows = [clopper_pearson(n, n, c)[0] for n, c in zip((needed - 1, needed), enough, strict=True)]
        assert needed == FEWEST_IN_GROUP or lows[0] < bound <= lows[1]


def test_few_examples_of_a_class_neither_help_a_gate_nor_hide_a_class_that_fails():
    few = labelled([(0, 5), (100, 100)])
    assert judge(parse("worst_class >= 0.6"), few, Doubts()).verdict == "fail"
    assert judge(parse("worst_class <= 0.7"), few, Doubts()).verdict == "pass"
    assert judge(parse("worst_class <= 0.7"), few, Doubts()).too_few is None
    assert judge(parse("worst_class >= 0.5"), labelled([(30, 30), (99, 100)]), Doubts()).verdict == "pass"
