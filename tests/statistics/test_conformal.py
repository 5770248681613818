"""Thresholds of several scores are exceeded by at most the requested share of new inputs."""

import itertools
from fractions import Fraction

import pytest
import torch

from holdfast.statistics.intervals import combined_thresholds, confidence_sequence, fewest_examples


@pytest.mark.parametrize("rules", [1, 2, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_over_all_orders_of_few_inputs_the_rate_is_at_most_the_requested_one(rules, fixed):
    """Exact: every one of n + 1 inputs is the new one once, as exchangeability states."""
    generator, allowed = torch.Generator().manual_seed(rules), Fraction(1, 4)
    fewest, n_thresholds = 2.0, 0
    for _ in range(60):
        n = int(torch.randint(3, 24, (), generator=generator))
        # few values, so that there are ties
        scores = torch.randint(0, 9, (n + 1, rules), generator=generator).double()
        already = torch.rand(n + 1, generator=generator) < 0.05 if fixed else None
        n_fired = 0
        for new in range(n + 1):
            others = torch.arange(n + 1) != new
            thresholds = combined_thresholds(
                list(scores[others].T), float(allowed), None if already is None else already[others]
            )
            if thresholds is not None:
                n_thresholds += 1
                n_fired += bool((scores[new] > torch.tensor(thresholds)).any()) or bool(
                    fixed and already[new]
                )
        assert Fraction(n_fired, n + 1) <= allowed
        fewest = min(fewest, float(allowed) - n_fired / (n + 1))
    assert n_thresholds > 300 and fewest < 0.05  # the thresholds are not needlessly high


@pytest.mark.parametrize("rules", [1, 2, 3])
def test_the_stated_number_of_inputs_always_suffices(rules):
    n = fewest_examples(0.05, rules)
    for order in itertools.islice(itertools.permutations(range(rules)), 3):
        scores = [torch.zeros(n).index_fill(0, torch.tensor([place]), 1.0) for place in order]
        assert combined_thresholds(scores, 0.05) == (1.0,) * rules
    distinct = [torch.zeros(n - 1).index_fill(0, torch.tensor([place]), 1.0) for place in range(rules)]
    assert combined_thresholds(distinct, 0.05) is None
    assert fewest_examples(0.001) == 999


def test_one_score_gets_the_usual_conformal_quantile():
    values = torch.arange(1, 1000).double()
    assert combined_thresholds([values], 0.001) == (999.0,)
    assert combined_thresholds([values], 0.01) == (990.0,)


def test_the_interval_contains_the_rate_at_all_times():
    generator, runs, steps = torch.Generator().manual_seed(0), 100, 300
    for rate in (0.02, 0.5):
        draws = (torch.rand(runs, steps, generator=generator) < rate).cumsum(1)
        missed = 0
        for k in draws.tolist():
            looks = ((k[n - 1], n) for n in range(1, steps + 1, 7))
            missed += any(
                not low <= rate <= high
                for low, high in (confidence_sequence(*at, 0.9, expected=0.02) for at in looks)
            )
        assert missed <= 0.1 * runs
    assert confidence_sequence(0, 0) == (0.0, 1.0)
    assert confidence_sequence(3, 3)[1] == 1.0 and confidence_sequence(0, 3)[0] == 0.0
    low, high = confidence_sequence(100, 100_000, expected=0.001)
    assert 0.0005 < low < 0.001 < high < 0.0016


def test_rules_with_given_thresholds_alone_must_keep_to_the_share():
    for fired, thresholds in ((0, ()), (9, ()), (10, None), (990, None)):
        already = torch.arange(999) < fired
        assert combined_thresholds([], 0.01, already) == thresholds
