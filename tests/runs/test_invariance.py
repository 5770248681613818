"""How the work is cut up changes neither a draw nor a verdict."""

import pytest
import torch

from holdfast.core.draws import Draws
from holdfast.core.meter import batch_size_for
from holdfast.runs.assess.assess import assess
from runs.fakes import N, data, order, subject

SHARDS = {1: N, 2: N // 2, 7: -(-N // 7)}


@pytest.fixture(scope="module")
def whole():
    return assess(subject(), data(), order(shard_size=N, batch_size=64)).evidence


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("shards", SHARDS)
def test_shards_and_batches_leave_the_evidence_alone(whole, shards, batch_size):
    cut = assess(subject(), data(), order(shard_size=SHARDS[shards], batch_size=batch_size)).evidence
    assert cut.columns.keys() == whole.columns.keys()
    for name, values in whole.columns.items():
        if values.is_floating_point():
            torch.testing.assert_close(cut[name], values, rtol=1e-5, atol=1e-7, msg=name)
        else:
            assert torch.equal(cut[name], values), name
    assert cut.doubts == whole.doubts
    for mine, theirs in zip(cut.attacks, whole.attacks, strict=True):
        assert (mine.surviving_before, mine.surviving_after) == (
            theirs.surviving_before,
            theirs.surviving_after,
        )
        assert mine.cost.queries == theirs.cost.queries
    for name, values in whole.gallery.items():
        torch.testing.assert_close(cut.gallery[name], values)


def test_a_part_draws_what_it_would_have_drawn_inside_the_whole():
    ids = torch.arange(N)
    rng = Draws(3).at("stage", "1-pgd").at("restart", 0)
    assert torch.equal(rng.uniform(ids, 12)[7:9], rng.uniform(ids[7:9], 12))


def test_another_seed_is_another_run(whole):
    other = assess(subject(), data(), order(seed=4)).evidence
    assert not torch.equal(other["distance_l2"], whole["distance_l2"])


def test_the_batch_shrinks_with_the_input():
    assert batch_size_for(784, "cpu") == batch_size_for(3 * 32 * 32, "cpu") == 256
    assert 8 <= batch_size_for(3 * 224 * 224, "cpu") < 32
    assert batch_size_for(10**9, "cpu") == 8
