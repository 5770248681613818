"""Every attack of the catalogue beside a reference implementation, at equal settings."""

from benchmarks.comparisons import black_box, gradients, scores, smallest, sparse
from benchmarks.comparisons.comparison import Comparison

COMPARISONS = [
    *gradients.COMPARISONS,
    *black_box.COMPARISONS,
    *scores.COMPARISONS,
    *smallest.COMPARISONS,
    *sparse.COMPARISONS,
]

__all__ = ["COMPARISONS", "Comparison"]
