"""The codec and the diffusion: what is exact, what is lost, and what a draw is."""

import pytest
import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss, UsageError
from holdfast.rotation import Basins, Codec, LatentDiffusion, Members, collect, put
from holdfast.rotation.collecting import apart, nearest_sets
from holdfast.rotation.generating import Diffusion, packed_generator, span, unpacked_generator
from rotation.problem import accuracy, examples, task

CODEC = Codec(rank=12, dims=6, hidden=64, steps=400)
DIFFUSION = LatentDiffusion(Diffusion(50), width=64, steps=400)


@pytest.fixture(scope="module")
def members():
    return collect(Basins(seeds=3, sets=8, every=2), task(), rng=Draws(0))


@pytest.fixture(scope="module")
def embedding(members):
    return CODEC(members, rng=Draws(1))


@pytest.fixture(scope="module")
def generator(embedding, members):
    return DIFFUSION(embedding, members, rng=Draws(2))


def flat(members):
    return torch.cat([value.flatten(1) for value in members.tensors.values()], 1).double()


@pytest.mark.slow
def test_the_span_is_that_of_the_singular_vectors_and_loses_nothing(members):
    whole = span(members)
    assert whole.rank == len(members) - 1
    assert whole.kept == pytest.approx(1)
    back = Members(whole.sets(whole.coordinates(members)), members.basins)
    torch.testing.assert_close(flat(back), flat(members), atol=1e-5, rtol=0)
    few = span(members, 3)
    known = flat(members) - flat(members).mean(0)
    values = torch.linalg.svdvals(known)
    torch.testing.assert_close(few.coordinates(members).norm(dim=0).double(), values[:3], rtol=1e-4, atol=0)
    assert few.kept == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), rel=1e-5)
    rows = torch.cat([value.flatten(1) for value in few.directions.values()], 1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-5, rtol=0)
    columns = torch.tensor([0, 5, 700, 3])
    found = flat(Members(few.sets(few.coordinates(members)), members.basins))[:, columns]
    torch.testing.assert_close(few.at(few.coordinates(members), columns).double(), found, atol=1e-5, rtol=0)


def test_a_collection_must_hold_two_sets_that_differ(members):
    with pytest.raises(UsageError, match="the collection contains 1 parameter set; at least two"):
        span(members.take(torch.tensor([0])))
    with pytest.raises(UsageError, match="all parameter sets of the collection are equal"):
        span(members.take(torch.tensor([0, 0, 0])))


def test_the_round_trip_keeps_the_accuracy_and_latents_are_standardised(members, embedding):
    latents = embedding.encoded(members)
    assert latents.shape == (24, 6)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(6), atol=1e-3, rtol=0)
    assert embedding.lost < 0.05
    back, model, held = Members(embedding.decoded(latents), members.basins), task().model, examples(1)
    for place in range(0, 24, 5):
        before, after = (accuracy(put(model, one.one(place)), held) for one in (members, back))
        assert after >= before - 0.01


@pytest.mark.slow
def test_noise_on_latents_makes_the_decoder_steady(members, embedding):
    bare = Codec(rank=12, dims=6, hidden=64, steps=400, parameter_noise=0, latent_noise=0)(
        members, rng=Draws(1)
    )

    def moved(one):
        latents = one.encoded(members)
        shaken = latents + 0.3 * Draws(3).normal(torch.arange(24), 6)
        return (one.coordinates(shaken) - one.coordinates(latents)).square().mean().item()

    assert moved(embedding) < moved(bare)
    assert bare.lost < embedding.lost


@pytest.mark.slow
def test_drawn_sets_are_near_the_collection_and_some_are_accurate(members, generator):
    drawn = generator.drawn(40, Draws(7))
    again = generator.drawn(40, Draws(7))
    assert all(torch.equal(value, again.tensors[name]) for name, value in drawn.tensors.items())
    assert not torch.equal(generator.drawn(1, Draws(8)).tensors["0.weight"], drawn.tensors["0.weight"][:1])
    model, held = task().model, examples(1)
    found = torch.tensor([accuracy(put(model, drawn.one(k)), held) for k in range(40)])
    middling = Members(generator.embedding.decoded(Draws(9).normal(torch.arange(40), 6)), drawn.basins)
    blind = torch.tensor([accuracy(put(model, middling.one(k)), held) for k in range(40)])
    assert (found > 0.9).sum() > 2 * (blind > 0.9).sum()  # of latents drawn as if they had one middle
    assert (found > 0.9).float().mean() > 0.2
    distances, whose = nearest_sets(drawn.take(found > 0.9), members.bases())
    assert distances.max() < apart(members)
    assert len(set(whose.tolist())) == 3  # from every basin
    quick = generator.drawn(40, Draws(7), "ddim")
    assert (torch.tensor([accuracy(put(model, quick.one(k)), held) for k in range(40)]) > 0.9).sum() > 10
    assert accuracy(put(model, generator.mean()), held) < found.max()  # between basins there is no model


def test_what_is_kept_draws_the_same(generator):
    back = unpacked_generator(packed_generator(generator))
    one, other = generator.drawn(3, Draws(4)), back.drawn(3, Draws(4))
    for name, value in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], value)
    assert back.diffusion == generator.diffusion
    assert back.embedding.lost == generator.embedding.lost


@pytest.mark.slow
def test_the_printed_sign_pulls_and_the_others_push(members, embedding):
    def far(**said):
        made = LatentDiffusion(Diffusion(50), width=64, steps=250, **said)(embedding, members, rng=Draws(2))
        return nearest_sets(made.drawn(40, Draws(7)), members)[0].mean().item()

    off = far()
    assert far(weight=7.0) == off  # nothing is added, whatever its weight
    assert far(regulariser="printed", weight=5.0) < far(regulariser="away", weight=5.0)
    assert far(regulariser="away", weight=5.0) > 1.05 * off
    assert far(regulariser="hinge", weight=5.0, margin=1.0) > 1.05 * off
    assert far(regulariser="hinge", weight=10.0, margin=1e-9) == pytest.approx(off, rel=1e-3)


def test_a_generator_that_diverges_is_refused(members, embedding):
    with pytest.raises(
        LostLoss, match=r"the diffusion, in update \d+ is NaN .* smaller learning rate than 1e\+30"
    ):
        LatentDiffusion(Diffusion(50), width=64, steps=20, lr=1e30)(embedding, members, rng=Draws(2))
    with pytest.raises(LostLoss, match="the weights of the codec are NaN or infinite"):
        Codec(rank=12, dims=6, hidden=64, steps=1, lr=1e30)(members, rng=Draws(1))
    with pytest.raises(LostLoss, match=r"the codec, in update \d+ is NaN"):
        Codec(rank=12, dims=6, hidden=64, steps=20, lr=1e30)(members, rng=Draws(1))
