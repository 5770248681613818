"""The size and the quality of the trained generator of a pool, which are read without torch."""

from dataclasses import dataclass

from holdfast.rotation.pool.pool import Pool

GENERATOR = "generator"
"""Name of the file with the trained generator."""


@dataclass(frozen=True)
class TrainedGenerator:
    """Size and quality of the trained generator of a pool."""

    sets: int
    parameters: int
    rank: int
    """number of directions in which the sets differ"""
    variance_lost: float
    """fraction of the variance that the codec does not reconstruct"""
    accuracy_lost: float
    """accuracy that a set loses by encoding and decoding, as a mean over sets"""
    codec_s: float
    diffusion_s: float


def trained_generator(pool: Pool) -> TrainedGenerator | None:
    """Return the size and the quality of the generator of a pool, or None if there is no generator."""
    stored = pool.kept(GENERATOR)
    return None if stored is None else TrainedGenerator(**stored.about)
