"""Draws are pure functions of seed, place, id and position, and look random."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.draws import Draws

IDS = torch.arange(4000)
KEYS = st.integers(0, 2**64 - 1)


def splitmix(z):
    """SplitMix64's finaliser on uint64, as published."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@given(key=KEYS, ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=5, unique=True))
def test_bits_are_those_of_unsigned_arithmetic(key, ids):
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        rows = splitmix(splitmix(np.array(ids, dtype=np.uint64) * golden) + np.uint64(key))
        expected = splitmix(rows[:, None] + np.arange(1, 8, dtype=np.uint64) * golden)
    assert (Draws(key).bits(torch.tensor(ids), 7).numpy().view(np.uint64) == expected).all()


def test_a_place_is_a_hash_of_the_place_before_it():
    named = hashlib.blake2b(b"0000000000000007/str:start", digest_size=8).digest()
    assert Draws(7).at("start") == Draws(int.from_bytes(named, "little"))


def test_places_are_distinguished():
    rng = Draws(0)
    places = [
        rng,
        rng.at(0),
        rng.at("0"),
        rng.at(1),
        rng.at(0, 1),
        rng.at(1, 0),
        rng.at("a", "b"),
        rng.at("ab"),
        Draws(1),
    ]
    assert len({place.key for place in places}) == len(places)
    assert rng.at("a").at("b") == rng.at("a", "b")


@given(key=KEYS, rows=st.permutations(range(9)))
def test_a_subset_in_any_order_draws_what_it_would_inside_the_whole(key, rows):
    rng, ids, some = Draws(key), torch.arange(9) * 7, torch.tensor(rows[:4])
    for draw in (
        lambda i: rng.uniform(i, 2, 3),
        lambda i: rng.uniform(i, 5, dtype=torch.float64),
        lambda i: rng.normal(i, 5),
        lambda i: rng.integers(i, 10, 5),
        lambda i: rng.signs(i, 5),
    ):
        assert torch.equal(draw(ids)[some], draw(ids[some]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_draws_of_half_a_word_are_finite_and_below_one(dtype):
    u, v = Draws(1).uniform(IDS, 25, dtype=dtype), Draws(1).normal(IDS, 25, dtype=dtype)
    assert u.dtype == v.dtype == dtype and u.min() >= 0 and u.max() < 1 and v.isfinite().all()


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 24), (torch.float64, 53)])
def test_uniform_fills_the_interval_evenly(dtype, digits):
    u = Draws(1).uniform(IDS, 25, dtype=dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    assert torch.equal(
        (u.double() * 2.0**digits).frac(), torch.zeros_like(u).double()
    )  # no bit is lost to rounding
    counts = torch.histc(u.double(), 100, 0, 1)
    chi2 = ((counts - u.numel() / 100) ** 2 / (u.numel() / 100)).sum().item()
    assert 50 < chi2 < 165  # 99 degrees of freedom: one in ten thousand beyond either end


def test_neighbouring_ids_and_positions_are_uncorrelated():
    u = Draws(2).uniform(IDS, 25, dtype=torch.float64) - 0.5
    for one, other in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        r = (one * other).mean() * 12
        assert abs(r.item()) < 4 / math.sqrt(one.numel())


def test_normal_has_the_moments_of_a_standard_normal():
    z = Draws(3).normal(IDS, 25, dtype=torch.float64)
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 4 * math.sqrt(variance / n), f"moment {power}"
    assert z.isfinite().all()


def test_integers_and_signs_cover_their_ranges_evenly():
    rng = Draws(4)
    k = rng.integers(IDS, 7, 10)
    assert k.dtype == torch.int64 and k.unique().tolist() == list(range(7))
    counts = k.flatten().bincount().double()
    assert ((counts - 40000 / 7) ** 2 / (40000 / 7)).sum() < 28  # 6 degrees of freedom
    s = rng.signs(IDS, 10)
    assert s.unique().tolist() == [-1, 1] and abs(s.mean().item()) < 4 / 200


def test_torch_s_own_state_is_not_touched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Draws(0).normal(IDS, 3)
    assert torch.equal(torch.get_rng_state(), before)
