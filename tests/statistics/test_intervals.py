"""Intervals and tests against closed forms, tables and their own guarantees."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from holdfast.statistics.intervals import (
    Support,
    _chunk,
    bonferroni,
    bootstrap,
    clopper_pearson,
    complement,
    independent_difference,
    mcnemar,
    mean,
    median,
    normal_quantile,
    paired_difference,
    proportion,
)


@given(n=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_is_the_exact_binomial_interval(n, share, confidence):
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(confidence, "exact")
    assert clopper_pearson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.93])
def test_clopper_pearson_covers_at_least_its_nominal_level(p):
    n, covered = 40, 0.0
    for k in range(n + 1):
        low, high = clopper_pearson(k, n)
        covered += float(stats.binom.pmf(k, n, p)) * (low <= p <= high)
    assert covered >= 0.95


def test_no_queries_have_no_score():
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def test_the_complement_of_a_proportion_is_the_proportion_of_the_complement():
    mask = torch.arange(50) % 3 == 0
    whole, other = complement(proportion(mask)), proportion(~mask)
    assert (whole.value, whole.low, whole.high) == pytest.approx((other.value, other.low, other.high))


def test_normal_quantile_and_bonferroni():
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)
    assert bonferroni(0.95, 10) == pytest.approx(0.995)
    assert bonferroni(0.95, 0) == pytest.approx(0.95)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 30, 101])
def test_median_interval_covers_the_median_of_any_distribution(n):
    """The interval [x_(k), x_(n+1-k)] misses the median with the binomial probability of fewer than k below it."""
    estimate = median(torch.arange(1.0, n + 1))
    assert estimate.value == (n + 1) // 2
    below = 0 if estimate.low == 0 else int(estimate.low)
    missed = 2 * stats.binom.cdf(below - 1, n, 0.5) if below else 0.0
    assert missed <= 0.05
    assert estimate.high == (math.inf if below == 0 else n + 1 - below)
    if below:  # and the next narrower one would not do
        assert 2 * stats.binom.cdf(below, n, 0.5) > 0.05


def test_median_keeps_infinite_values():
    half = torch.tensor([1.0, 2.0, 3.0, math.inf])
    assert median(half).value == 2.0
    assert median(torch.tensor([1.0, math.inf, math.inf])).value == math.inf


def test_mean_covers_a_skewed_population_at_about_its_nominal_level():
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(200):
        sample = -torch.log(torch.rand(60, generator=generator, dtype=torch.float64))
        estimate = mean(sample, support=Support(0.0))
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_is_the_same_on_every_call_and_close_to_the_exact_interval():
    mask = torch.arange(300) % 4 == 0
    estimate = mean(mask.double())
    _chunk.cache_clear()
    assert estimate == mean(mask.double())
    assert (estimate.low, estimate.high) == pytest.approx(clopper_pearson(75, 300), abs=0.01)


def test_bootstrap_in_chunks_is_the_bootstrap_in_one(set_limit):
    values = torch.linspace(0, 1, 57, dtype=torch.float64) ** 2
    whole = mean(values)
    set_limit("holdfast.statistics.intervals._CHUNK", 57 * 300)
    assert mean(values) == whole


@pytest.mark.parametrize("n", [1, 20, 400])
def test_a_sample_without_variation_is_not_certain(n):
    """As Clopper and Pearson's interval would be, one-sided by half of the rest."""
    estimate = mean(torch.ones(n))
    assert estimate.value == estimate.high == 1.0
    assert estimate.low == pytest.approx(clopper_pearson(n, n)[0])


def test_a_sample_without_variation_reaches_an_infinite_support():
    estimate = mean(torch.full((5,), 2.0), support=Support(0.0))
    assert estimate.high == math.inf
    assert 0 < estimate.low < 2


def test_two_examples_are_not_a_distribution():
    estimate = mean(torch.tensor([0.4, 0.6]))
    assert estimate.low < 0.1
    assert estimate.high > 0.9


def test_bootstrap_interval_holds_the_value_of_a_biased_statistic():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = bootstrap(lambda rows: values[rows].amax(1), 50)
    assert estimate.low <= estimate.value <= estimate.high <= 1.0


@given(a=st.integers(0, 60), b=st.integers(0, 60))
def test_mcnemar_is_the_exact_sign_test(a, b):
    first = torch.tensor([True] * a + [False] * b + [True, False])
    second = torch.tensor([False] * a + [True] * b + [True, False])
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (a, b)
    assert found.p == pytest.approx(stats.binomtest(a, a + b).pvalue if a + b else 1.0)


def test_paired_difference_covers_at_about_its_nominal_level():
    generator = torch.Generator().manual_seed(5)
    covered = 0
    for _ in range(400):
        u = torch.rand(80, generator=generator)
        first, second = u < 0.85, (u > 0.1) & (u < 0.9)  # shares 0.85 and 0.80, much agreement
        estimate = paired_difference(first, second)
        covered += estimate.low <= 0.05 <= estimate.high
    assert covered / 400 >= 0.94


def test_paired_difference_of_equal_judgements_is_not_certain():
    same = torch.ones(200, dtype=torch.bool)
    estimate = paired_difference(same, same)
    assert estimate.value == 0
    assert -0.03 < estimate.low < 0 < estimate.high < 0.03


def test_independent_difference_is_that_of_newcombe():
    # Newcombe 1998, table II, method 10: 56/70 - 48/80
    estimate = independent_difference(56, 70, 48, 80)
    assert (estimate.value, estimate.n) == (pytest.approx(0.2), 70)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.0524, 0.3339)
    none = independent_difference(0, 10, 0, 20)
    assert (round(none.low, 4), round(none.high, 4)) == (-0.1611, 0.2775)
