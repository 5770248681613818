"""Copies of training examples among samples: exact and near ones, rows that repeat by nature, and false alarms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import holdfast
from holdfast.audits.generator.copies import copies, measured_copies
from holdfast.statistics.repeats import expected_repeats

Kind = Callable[[int, torch.Generator], Tensor]


def images(n: int, rng: torch.Generator) -> Tensor:
    return torch.randint(256, (n, 1, 6, 6), generator=rng) / 255


def numbers(n: int, rng: torch.Generator) -> Tensor:
    return torch.randn(n, 3, generator=rng)


def mixed(n: int, rng: torch.Generator) -> Tensor:
    """One number and two categories."""
    columns = torch.randn(n, generator=rng), *(torch.randint(k, (n,), generator=rng) for k in (40, 2))
    return torch.stack(columns, 1)


def categories(n: int, rng: torch.Generator, columns: int = 10, values: int = 4) -> Tensor:
    """Categories that equal the one before with a probability of 0.3."""
    x = torch.randint(values, (n, columns), generator=rng)
    for place in range(1, columns):
        same = torch.rand(n, generator=rng) < 0.3
        x[same, place] = x[same, place - 1]
    return x.float()


def few_categories(n: int, rng: torch.Generator) -> Tensor:
    return categories(n, rng, 6, 3)


def prices(n: int, rng: torch.Generator) -> Tensor:
    """A price, the price with a tax, and a wave of the price, as cents of which each has many possible values."""
    price = (30_000 * torch.randn(n, generator=rng)).round().double()
    return torch.stack((price, 2 * price + 1, (price / 5000).sin()), 1)


def sets(kind: Kind, seed: int, samples: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, training examples and held-out examples, which are all new."""
    rng = torch.Generator().manual_seed(seed)
    return kind(samples, rng), kind(400, rng), kind(250, rng)


@pytest.mark.parametrize("kind", [images, numbers, mixed])
def test_one_copy_decides_if_rows_do_not_repeat_by_nature(kind):
    samples, training, held_out = sets(kind, 0)
    assert not copies(samples, training, held_out).copied
    samples[17] = training[5]
    found = copies(samples, training, held_out)
    assert found.copied and not found.repeating and found.expected < 0.02
    assert found.is_copy.nonzero().tolist() == [[17]] and found.nearest[17] == 5 and found.distance[17] == 0


def test_exact_copies_are_not_counted_with_their_near_neighbours():
    samples, training, held_out = sets(images, 0, 2000)
    samples[:8] = training[:8]
    samples[8:12] = training[8:12] + 1 / 255
    found = copies(samples, training, held_out)
    assert found.rate.value == 0.004 and found.rate.high < 0.01
    assert found.near.value == pytest.approx(0.002 + found.near_held_out.value, abs=0.015)


def test_rows_of_few_values_are_judged_by_the_share_of_held_out_rows_that_repeat():
    samples, training, held_out = sets(few_categories, 0)
    natural = copies(samples, training, held_out)
    assert natural.repeating and natural.rate.value > 0.3 and natural.held_out.value > 0.3
    assert not natural.copied
    copied = copies(torch.cat((samples[:100], training[:200])), training, held_out)
    assert copied.copied and copied.p < 1e-4


def test_rows_of_a_table_are_compared_by_the_values_of_the_file():
    ids = torch.arange(400, dtype=torch.float64)[:, None] + 2.0**40
    rows = (ids + 0.5, ids, ids - 1000)
    scaled = tuple((each / 2**41).float() for each in rows)
    assert copies(*scaled).is_copy.all()
    assert not measured_copies(scaled, rows)["copy"].any()


def test_a_float32_copy_of_training_examples_with_more_digits_is_a_copy():
    samples, training, held_out = (each.double() for each in sets(numbers, 0))
    precise = training + 1e-9
    samples[0] = precise[3].float().double()
    assert copies(samples, precise, held_out).is_copy.nonzero().tolist() == [[0]]


def test_columns_that_are_functions_of_each_other_count_as_one():
    _, training, held_out = sets(prices, 0)
    assert expected_repeats(300, training, held_out) > 0.02
    rng = torch.Generator().manual_seed(0)
    others = [torch.cat((each, torch.randn(len(each), 1, generator=rng)), 1) for each in (training, held_out)]
    assert expected_repeats(300, *others) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", [images, numbers, mixed, categories, few_categories, prices])
def test_generators_without_copies_are_flagged_with_at_most_the_stated_level(kind):
    flagged = 0
    for seed in range(200):
        found = copies(*sets(kind, seed))
        flagged += found.copied or found.nearly_copied
    assert flagged <= 10  # 5 % of 200


def test_arrays_whose_rows_repeat_by_nature_are_audited():
    def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x = categories(n, torch.Generator().manual_seed(seed), 5, 4)
        return x, x.long().sum(1) % 3

    class Rows:
        def sample(self, n: int, seed: int) -> Tensor:
            return drawn(n, seed)[0]

    result = holdfast.audit.generator(Rows(), drawn(800, 1), held_out=drawn(400, 2), samples=400, latent=0)
    assert result.facts["rows_repeat"] is True and result.facts["copy_rate"] > 0.05
    assert "rows repeat by nature" in result.content["reasons"][0]
    assert result.facts["collapsed"] is False
