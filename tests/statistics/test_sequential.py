"""The sequential test: its errors by the exact distribution over all outcomes, and its limits."""

import itertools
import math

import numpy as np
import pytest
from scipy.special import bdtr

from holdfast.core.errors import UsageError
from holdfast.statistics.intervals import fewest_draws, fixed_test, sequential_test

CASES = [(0.3, 60, 0.05), (0.05, 300, 0.02), (0.5, 40, 0.01), (0.02, 250, 0.01)]


def outcomes(test, q):
    """Probability of each pair of look and misses with which the test ends, by all paths from look to look."""
    states, ended, before = {0: 1.0}, {}, 0
    for look, n in enumerate(test.looks):
        step, reached = n - before, {}
        for misses, mass in states.items():
            for more in range(step + 1):
                p = mass * math.comb(step, more) * q**more * (1 - q) ** (step - more)
                reached[misses + more] = reached.get(misses + more, 0.0) + p
        ends = {k for k in reached if k <= test.proves[look] or k >= test.gives_up[look]}
        ended |= {(look, k): reached[k] for k in ends}
        states, before = {k: v for k, v in reached.items() if k not in ends}, n
    assert not states
    return ended


@pytest.mark.parametrize(("limit", "draws", "alpha"), CASES)
def test_its_claim_is_wrong_with_at_most_the_failure_probability(limit, draws, alpha):
    test = sequential_test(limit, draws, alpha)
    wrong = {
        q: sum(p for (look, k), p in outcomes(test, q).items() if k <= test.proves[look])
        for q in (limit, (1 + limit) / 2)
    }
    assert 0.5 * alpha < wrong[limit] <= alpha
    assert wrong[(1 + limit) / 2] < wrong[limit]


@pytest.mark.parametrize(("limit", "draws", "alpha"), CASES)
def test_its_upper_limit_is_below_the_truth_with_at_most_the_failure_probability(limit, draws, alpha):
    test = sequential_test(limit, draws, alpha)
    for q in (limit / 3, limit * 0.999, limit, 1.2 * limit, 1.5 * limit, 0.8):
        ended = outcomes(test, q)
        assert sum(ended.values()) == pytest.approx(1)
        assert sum(p for end, p in ended.items() if p > 1e-14 and test.upper_limit(*end) < q) <= alpha


@pytest.mark.parametrize(("limit", "draws", "alpha"), CASES)
def test_its_upper_limit_is_within_the_claim_exactly_if_it_ends_with_it(limit, draws, alpha):
    test = sequential_test(limit, draws, alpha)
    for look, k in outcomes(test, limit):
        proved = k <= test.proves[look]
        assert (test.upper_limit(look, k) <= limit) == proved


def test_its_probabilities_of_an_end_are_those_of_all_paths():
    test, q = sequential_test(0.05, 300, 0.02), 0.03
    ends, ended = test.ends(q), outcomes(test, q)
    for look in range(len(test.looks)):
        proved = sum(p for (at, k), p in ended.items() if at == look and k <= test.proves[look])
        assert ends.proved[look] == pytest.approx(proved)
    assert ends.draws == pytest.approx(sum(p * test.looks[look] for (look, _), p in ended.items()))


@pytest.mark.parametrize("limit", [0.3, 0.1, 0.0228, 0.0062])
def test_it_proves_nearly_what_all_draws_prove_and_needs_far_fewer(limit):
    draws, alpha = 10_000, 0.001
    last = max(k for k in range(draws) if bdtr(k, draws, limit) <= alpha)
    test = sequential_test(limit, draws, alpha)
    for share in (0.1, 0.5, 0.8):
        q = share * last / draws
        assert test.ends(q).proved.sum() >= 0.97 * bdtr(last, draws, q)
    assert test.ends(last / draws).proved.sum() >= 0.8 * bdtr(last, draws, last / draws)
    assert test.ends(last / draws / 2).draws < 0.5 * draws
    assert test.ends(2 * limit).draws < 0.2 * draws


def test_limits_grow_with_the_misses_of_an_end():
    test = sequential_test(0.05, 300, 0.02)
    ended = sorted(outcomes(test, 0.05))
    for look in range(len(test.looks)):
        limits = [test.upper_limit(at, k) for at, k in ended if at == look]
        assert all(low <= high + 1e-11 for low, high in itertools.pairwise(limits))


def test_a_fixed_test_has_the_limit_of_clopper_and_pearson():
    test = fixed_test(50, 0.01)
    for k in (0, 1, 20, 49):
        assert bdtr(k, 50, test.upper_limit(0, k)) == pytest.approx(0.01, rel=1e-5)
    assert test.upper_limit(0, 50) == 1.0


def test_fewer_draws_than_any_proof_needs_are_refused():
    fewest = fewest_draws(0.02, 0.001)
    assert (1 - 0.02) ** fewest <= 0.001 < (1 - 0.02) ** (fewest - 1)
    assert sequential_test(0.02, fewest, 0.001).proves[-1] == 0
    with pytest.raises(UsageError, match=f"at least {fewest} are needed"):
        sequential_test(0.02, fewest - 1, 0.001)


def test_many_cases_keep_their_errors():
    rng = np.random.default_rng(0)
    for limit, alpha in zip(rng.uniform(0.001, 0.5, 40), 10 ** rng.uniform(-5, -1, 40), strict=True):
        draws = int(fewest_draws(limit, alpha) * rng.uniform(1, 20))
        test = sequential_test(limit, draws, alpha)
        ends = test.ends(limit)
        assert ends.proved.sum() <= alpha
        assert ends.proved.sum() + ends.given_up.sum() == pytest.approx(1, abs=1e-9)
        assert test.looks[-1] <= draws
