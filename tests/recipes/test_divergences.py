"""Distances of predictions against their definitions."""

import torch

from holdfast.recipes.training.losses import kullback_leibler, squared_error, weighted_gaps

G = torch.Generator().manual_seed(0)
ONE, OTHER = (torch.randn(7, 5, generator=G, dtype=torch.float64) for _ in range(2))
WEIGHT = torch.rand(7, 5, generator=G, dtype=torch.float64)


def test_kullback_leibler_is_the_expected_surprise():
    p, q = OTHER.softmax(1), ONE.softmax(1)
    torch.testing.assert_close(kullback_leibler(ONE, OTHER), (p * (p / q).log()).sum(1))
    assert (kullback_leibler(ONE, ONE) == 0).all()


def test_squared_error_is_of_the_probabilities():
    torch.testing.assert_close(squared_error(ONE, OTHER), ((ONE.softmax(1) - OTHER.softmax(1)) ** 2).sum(1))


def test_weighted_gaps_are_the_double_sum_over_pairs_of_classes():
    gaps = [z[:, :, None] - z[:, None, :] for z in (ONE, OTHER)]
    pairs = WEIGHT[:, :, None] * WEIGHT[:, None, :]
    expected = 0.25 * ((gaps[0] - gaps[1]) ** 2 * pairs).sum((1, 2))
    torch.testing.assert_close(weighted_gaps(ONE, OTHER, WEIGHT), expected)
