"""Two models on the same inputs: no principal decides alone, and none hides what others see."""

import numpy as np
import pytest

from holdfast.verbs.adapt_comparison import ERROR, compared


def comparison(*clients):
    """The comparison of clients, each with numbers of inputs on which the candidate alone, the served model alone, and
    neither is at fault, in this order of time.
    """
    principals, candidate, served = [], [], []
    for name, (ours, theirs, none) in zip("abcdefgh", clients, strict=False):
        principals += [name] * (ours + theirs + none)
        candidate += [True] * ours + [False] * (theirs + none)
        served += [False] * ours + [True] * theirs + [False] * none
    return compared(principals, np.array(candidate, bool), np.array(served, bool))


@pytest.mark.parametrize(
    ("clients", "worse"),
    [
        ([], False),
        ([(6, 0, 100)], False),  # 2^-6 is above 1 %, and 2^-7 below
        ([(7, 0, 100)], True),
        ([(7, 0, 9000)], True),
        ([(7, 7, 100)], False),
        ([(9, 0, 100), (0, 0, 5)], True),  # one of two decides
        ([(9, 0, 100), (0, 900, 0)], True),  # and the other one does not hide it
        ([(900, 0, 0), (0, 0, 100), (0, 0, 100)], False),  # one of three does not decide
        ([(900, 0, 0), (8, 0, 100), (0, 0, 100)], False),  # 2^-8 is above 1 % / 4, and 2^-9 below
        ([(9, 0, 100), (9, 0, 100), (0, 0, 100)], True),
        ([(9, 0, 100), (9, 0, 100), (0, 0, 9000)], True),  # a flood of the third one hides nothing
        ([(9, 0, 100), (9, 0, 100), (0, 900, 0)], True),
        ([(20, 0, 100), (20, 0, 100), (0, 900, 0), (0, 900, 0)], False),  # two that work together do
        ([(900, 0, 0), (900, 0, 0), (0, 0, 100), (0, 0, 100)], True),
    ],
)
def test_a_candidate_is_worse_or_not(clients, worse):
    assert comparison(*clients).worse is worse


def test_flags_of_a_single_client_are_named():
    found = comparison((900, 0, 0), (0, 0, 100), (0, 0, 100))
    assert not found.worse and found.alone == ("a",)
    assert comparison((9, 0, 100), (9, 0, 100), (0, 0, 100)).alone == ()


def test_clients_whose_inputs_are_not_compared_are_clients():
    names = np.repeat(["a", "b", "c"], 100)
    for labelled, worse in (("a", False), ("ab", True)):
        rows = np.isin(names, list(labelled))
        found = compared(names.tolist(), rows, ~rows, rows=rows)
        assert (found.n, found.candidate, found.served) == (rows.sum(), rows.sum(), 0)
        assert (found.worse, found.alone) == (worse, () if worse else ("a",))
    assert compared(names.tolist(), rows, rows, rows=np.zeros(300, bool)).n == 0


def test_one_of_three_clients_counts_at_most_half_of_the_inputs_and_its_newest_ones():
    found = comparison((50, 0, 50), (0, 0, 10), (0, 0, 10))
    assert (found.n, found.candidate) == (40, 0), "its older inputs do not count"
    assert comparison((0, 0, 20), (0, 0, 10), (0, 0, 10)).n == 40
    assert comparison((0, 0, 21), (0, 0, 10), (0, 0, 10)).n == 40
    assert comparison((0, 0, 100), (0, 0, 10)).n == 110, "without a majority, all count"


@pytest.mark.parametrize("clients", [1, 2, 3, 8])
def test_equal_models_are_seldom_found_to_differ(clients):
    rng, names = np.random.default_rng(0), np.repeat(np.arange(clients).astype(str), 50)
    found = sum(
        compared(list(names), rng.random(len(names)) < 0.1, rng.random(len(names)) < 0.1).worse
        for _ in range(400)
    )
    assert found <= 400 * ERROR


def test_more_clients_than_are_compared():
    names = [f"c{k}" for k in range(600) for _ in range(2)]
    assert compared(names, np.ones(1200, bool), np.zeros(1200, bool)).worse
