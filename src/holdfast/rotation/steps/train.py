"""The step `train` of a rotation: it trains the generator, which consists of a codec that compresses parameter sets and
a latent diffusion model.
"""

import time
from dataclasses import dataclass, field
from statistics import mean

import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import Inconclusive
from holdfast.core.remedies import Remedy
from holdfast.rotation import Codec, Embedding, Generator, LatentDiffusion, Members
from holdfast.rotation.generating import packed_generator
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.contents import collected_members, secret
from holdfast.rotation.steps.generator_quality import GENERATOR, TrainedGenerator
from holdfast.rotation.steps.rotation_request import RotateRequest, accuracy
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.runs.engine.signals import stoppable

_LOST = 0.003  # largest loss of accuracy by encoding and decoding
_JUDGED = 24  # sets for that test, spread over the collection
_TRIED = 16  # generated sets on which the generator is tested
_DIVERGED = 0.1  # largest difference in accuracy between the bases and the best of them


@dataclass(frozen=True)
class TrainRequest:
    """The pool on whose parameter sets a generator is trained, and the settings of the generator."""

    pool: Pool
    common: RotateRequest
    """the settings that all sets of the pool share"""
    codec: Codec = field(default_factory=Codec)
    diffusion: LatentDiffusion = field(default_factory=LatentDiffusion)


def train(request: TrainRequest, *, again: str = "", notify: Notify = ignore) -> TrainedGenerator:
    """Train a generator on the collected parameter sets of a pool and store it encrypted. It replaces an earlier
    generator.

    `again` states how a stopped call is started again. Raises `UsageError` if fewer than two sets are collected or
    another process trains, and `LostLoss` if the training diverges. Raises `Inconclusive` if sets lose more than 0.3
    points of accuracy in the codec, or if no generated set comes within ten points of the bases. After an error, an
    earlier generator is kept.
    """
    pool, common, codec, diffusion = request.pool, request.common, request.codec, request.diffusion
    again = again or "an earlier generator is kept; train again with the same arguments"
    with stoppable(again) as stopper, pool.alone_at("train"), common.enough_threads():
        collected, draws = collected_members(pool), secret(pool).at("generator")
        begin = time.perf_counter()
        embedding = codec(collected, rng=draws.at("codec"))
        codec_s = time.perf_counter() - begin
        notify(
            f"codec: {len(collected)} sets of {collected.parameters:,} parameters, {embedding.span.rank} directions, "
            f"{100 * embedding.lost:.2g} % of the variance lost, {codec_s:.1f} s"
        )
        lost = _lost_accuracy(common, embedding, collected)
        notify(
            f"encoding and decoding: {100 * lost:.2f} percentage points of accuracy lost, at most {100 * _LOST:g} "
            "allowed"
        )
        if lost > _LOST:
            raise Inconclusive(
                f"sets lose {100 * lost:.2f} percentage points of accuracy by encoding and decoding, and at most "
                f"{100 * _LOST:g} are allowed: generated sets would lose as much. Collect more sets of each run, or "
                "use a larger codec",
                Remedy("codec.dims", 2 * codec.dims, also=(Remedy("codec.steps", 2 * codec.steps),)),
            )
        begin = time.perf_counter()
        generator = diffusion(embedding, collected, rng=draws.at("diffusion"))
        diffusion_s = time.perf_counter() - begin
        _refuse_diverged(common, generator, collected, draws.at("tried"), diffusion)
        notify(f"diffusion: regulariser {diffusion.regulariser}, {diffusion_s:.1f} s")
        n, parameters, rank = len(collected), collected.parameters, embedding.span.rank
        result = TrainedGenerator(n, parameters, rank, embedding.lost, lost, codec_s, diffusion_s)
        with stopper.finishing():
            pool.keep(GENERATOR, packed_generator(generator), vars(result))
    return result


def _refuse_diverged(
    request: RotateRequest, generator: Generator, collected: Members, rng: Draws, diffusion: LatentDiffusion
) -> None:
    """Raise `Inconclusive` if no generated set has nearly the accuracy of the bases."""
    held_out = request.first_held_out
    drawn, bases = generator.drawn(_TRIED, rng), collected.bases()
    best_accuracy = max(accuracy(request.of_weights(drawn.one(k)), held_out) for k in range(len(drawn)))
    usual = mean(accuracy(request.of_weights(bases.one(k)), held_out) for k in range(len(bases)))
    if best_accuracy < usual - _DIVERGED:
        raise Inconclusive(
            f"the best of {_TRIED} generated sets has an accuracy of {100 * best_accuracy:.1f} %, the bases "
            f"{100 * usual:.1f} %: the diffusion diverged, and an earlier generator is kept. Regularise less "
            f"(regulariser is {diffusion.regulariser}, weight {diffusion.weight:g}), or train longer",
            Remedy("generator.steps", 2 * diffusion.steps),
        )


def _lost_accuracy(request: RotateRequest, embedding: Embedding, collected: Members) -> float:
    """Mean accuracy on held-out examples that sets lose by encoding and decoding."""
    places = torch.linspace(0, len(collected) - 1, min(_JUDGED, len(collected))).round().long()
    some = collected.take(places)
    decoded = Members(embedding.decoded(embedding.encoded(some)), some.basins)
    held_out = request.first_held_out

    def mean_accuracy(sets: Members) -> float:
        return mean(accuracy(request.of_weights(sets.one(k)), held_out) for k in range(len(sets)))

    return mean_accuracy(some) - mean_accuracy(decoded)
