"""Thresholds of several scores that together are exceeded by at most a given share of new inputs.

Split conformal prediction: Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005; for
several scores, each input counts with its best rank among all scores. If the calibration inputs and a new input are
exchangeable, the probability that the new input exceeds any threshold is at most the given share, for any sample size.

Why several scores need no further split: let A(k) be the inputs, among the n calibration inputs and the new one, that
have one of the k largest values of some score. A(k) grows with k and treats all n + 1 inputs alike, so that the new
input is in A(K), for the largest K with at most alpha (n + 1) inputs, with probability at most alpha. The thresholds
are the k-th largest calibration values, for a k of which the calibration inputs alone show that k <= K.
"""

import math
from collections.abc import Sequence

import torch

from holdfast.core.types import Mask, PerExample

_ROUNDED = 1e-9  # so that 0.001 * 1000 counts as 1


def fewest_examples(false_positives: float, scores: int = 1) -> int:
    """Return the number of calibration inputs with which `scores` scores can always be combined: scores / alpha - 1.

    >>> fewest_examples(0.001), fewest_examples(0.001, 2)
    (999, 1999)
    """
    return math.ceil(scores / false_positives - _ROUNDED) - 1


def combined_thresholds(
    scores: Sequence[PerExample], false_positives: float, already: Mask | None = None
) -> tuple[float, ...] | None:
    """Return a threshold for each score, such that a new input exceeds one of them with a probability of at most
    `false_positives`; None if there are too few inputs.

    Each of `scores` has the values of one score for all calibration inputs (n,). `already` is the mask of the inputs on
    which a rule with a given threshold fires, which counts as well; without scores it is decided whether these rules
    alone keep to the share. The k-th largest value of each score is its threshold, with the same k for all.
    """
    masks = [*scores, *([] if already is None else [already])]
    n = len(masks[0])
    allowed = math.floor(false_positives * (n + 1) + _ROUNDED)
    if already is not None and not scores:
        return () if int(already.sum()) + 1 <= allowed else None
    ranks = torch.stack([_ranks(values) for values in scores])
    fixed = torch.zeros(n, dtype=torch.bool) if already is None else already
    for k in range(min(allowed, n), 0, -1):
        inside = ranks <= k
        n_exceeding = int((inside.any(0) | fixed).sum())
        # A new input that exceeds the threshold of a score has a larger value than the k-th largest, whose own rank
        # becomes k + 1; it leaves unless another rule includes it.
        pushed = [
            int((inside[j] & (ranks[j] == k) & ~fixed & ~_others(inside, j)).sum())
            for j in range(len(scores))
        ]
        n_with_new = n_exceeding + 1 - (min(pushed) if already is None else 0)
        if n_with_new <= allowed:
            return tuple(float(values.sort(descending=True).values[k - 1]) for values in scores)
    return None


def _ranks(values: PerExample) -> torch.Tensor:
    """Number of values that are at least as large, for each value."""
    ordered = values.sort().values
    return len(values) - torch.searchsorted(ordered, values.contiguous())


def _others(inside: torch.Tensor, j: int) -> Mask:
    """Mask of the inputs that are inside for another score than the j-th."""
    return inside.sum(0) > inside[j].int()
