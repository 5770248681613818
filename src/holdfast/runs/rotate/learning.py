"""Learning what is collected: the codec, the gate of its round trip, and the latent diffusion."""

import time
from dataclasses import dataclass
from statistics import mean

import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import Inconclusive
from holdfast.rotation import Codec, Embedding, Generator, LatentDiffusion, Members
from holdfast.rotation.generating import packed, unpacked
from holdfast.runs.order import Notify, ignore
from holdfast.runs.rotate.collecting import members, secret
from holdfast.runs.rotate.terms import Terms, accuracy
from holdfast.store.pool import Pool

_KEPT = "generator"
_LOST = 0.003  # of accuracy, at most, by the way through the codec and back
_JUDGED = 24  # sets, spread over the collection, that go that way
_TRIED = 16  # draws of what was learned
_ASTRAY = 0.1  # of accuracy, at most, that the best of them lacks of the bases


@dataclass(frozen=True)
class Learned:
    """What came of it."""

    sets: int
    parameters: int
    rank: int
    """directions in which the sets differ"""
    variance_lost: float
    """share of their differences that the codec does not give back"""
    accuracy_lost: float
    """by the way through the codec and back, as a mean over sets"""
    codec_s: float
    diffusion_s: float


def learn(
    pool: Pool, terms: Terms, codec: Codec, diffusion: LatentDiffusion, *, notify: Notify = ignore
) -> Learned:
    """Fit codec and diffusion to what is collected, and seal them; what was learned before is replaced.

    Raises `UsageError` where nothing or a single set is collected, or another process is at it, `LostLoss` where
    training diverges, and `Inconclusive` where sets lose more than 0.3 points on their way through the codec, or no
    draw comes within ten points of the bases: what was there before stands.
    """
    with pool.alone_at("train"):
        return _learned_anew(pool, terms, codec, diffusion, notify)


def _learned_anew(
    pool: Pool, terms: Terms, codec: Codec, diffusion: LatentDiffusion, notify: Notify
) -> Learned:
    collected, draws = members(pool), secret(pool).at("generator")
    begin = time.perf_counter()
    embedding = codec(collected, rng=draws.at("codec"))
    codec_s = time.perf_counter() - begin
    notify(
        f"codec: {len(collected)} sets of {collected.parameters:,} numbers along {embedding.span.rank} directions, "
        f"{100 * embedding.lost:.2g} % of their differences lost, {codec_s:.1f} s"
    )
    lost = _lost(terms, embedding, collected)
    notify(f"round trip: {100 * lost:.2f} points of accuracy, of {100 * _LOST:g} that it may lose")
    if lost > _LOST:
        raise Inconclusive(
            f"sets lose {100 * lost:.2f} points of accuracy through the codec and back, and {100 * _LOST:g} were "
            f"allowed: what is drawn would be no better. Collect more sets of each run, or give the codec more room, "
            f"as in --set codec.dims={2 * codec.dims} --set codec.steps={2 * codec.steps}"
        )
    begin = time.perf_counter()
    generator = diffusion(embedding, collected, rng=draws.at("diffusion"))
    diffusion_s = time.perf_counter() - begin
    _refuse_astray(terms, generator, collected, draws.at("tried"), diffusion)
    notify(f"diffusion: regulariser {diffusion.regulariser}, {diffusion_s:.1f} s")
    found = Learned(
        len(collected), collected.parameters, embedding.span.rank, embedding.lost, lost, codec_s, diffusion_s
    )
    pool.keep(_KEPT, packed(generator), vars(found))
    return found


def _refuse_astray(
    terms: Terms, generator: Generator, collected: Members, rng: Draws, diffusion: LatentDiffusion
) -> None:
    """`Inconclusive` where nothing that is drawn comes near the bases: what was learned is no set of parameters."""
    held = terms.first_held
    drawn, bases = generator.drawn(_TRIED, rng), collected.bases()
    best = max(accuracy(terms.of_weights(drawn.one(k)), held) for k in range(len(drawn)))
    usual = mean(accuracy(terms.of_weights(bases.one(k)), held) for k in range(len(bases)))
    if best < usual - _ASTRAY:
        raise Inconclusive(
            f"of {_TRIED} draws the best is right on {100 * best:.1f} %, where the bases are on {100 * usual:.1f}: the "
            f"diffusion went astray, and what was learned before stands. Regularise less (regulariser is "
            f"{diffusion.regulariser}, weight {diffusion.weight:g}), or train it longer, as in --set "
            f"generator.steps={2 * diffusion.steps}"
        )


def learned(pool: Pool, terms: Terms) -> Generator | None:
    """The generator that is sealed in the pool; None where none was learned."""
    kept = pool.kept(_KEPT)
    if kept is None:
        return None
    device = torch.device(terms.device)
    return unpacked({name: value.to(device) for name, value in kept.columns.items()})


def what_was_learned(pool: Pool) -> Learned | None:
    """What `learn` said of the generator that is there."""
    kept = pool.kept(_KEPT)
    return None if kept is None else Learned(**kept.about)


def _lost(terms: Terms, embedding: Embedding, collected: Members) -> float:
    """Accuracy that sets lose on held-out examples, as a mean."""
    places = torch.linspace(0, len(collected) - 1, min(_JUDGED, len(collected))).round().long()
    some = collected.take(places)
    back = Members(embedding.decoded(embedding.encoded(some)), some.basins)
    held = terms.first_held

    def right(sets: Members) -> float:
        return mean(accuracy(terms.of_weights(sets.one(k)), held) for k in range(len(sets)))

    return right(some) - right(back)
