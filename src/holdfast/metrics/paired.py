"""Differences between two runs of the same examples, paired by the digest of each example's content."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Rows
from holdfast.metrics.columns import robust
from holdfast.metrics.shares import right_probability
from holdfast.ops.statistics import Support, mean, paired_difference


@dataclass(frozen=True)
class Pairs:
    """Rows of two runs that hold the same example, in the order of the first."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first)


def pairs(first: Evidence, second: Evidence) -> Pairs:
    """Pair by digest; the k-th copy of an example with the k-th copy. `UsageError` if none is shared."""
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(_keys(second["digest"])):
        places[key].append(row)
    found = [(row, places[key].pop(0)) for row, key in enumerate(_keys(first["digest"])) if places.get(key)]
    if not found:
        raise UsageError(
            f"the two runs share no example ({len(first)} against {len(second)}); "
            f"assess both models on the same data and the same -n"
        )
    rows = torch.tensor(found)
    return Pairs(rows[:, 0], rows[:, 1])


def _keys(digests: Tensor) -> list[bytes]:
    return [bytes(row) for row in digests.tolist()]


def regression(evidence: Evidence, baseline: Evidence, confidence: float = 0.95) -> Estimate:
    """Robust accuracy of the baseline minus this one's, over the shared examples; positive is worse."""
    shared = pairs(evidence, baseline)
    mine, theirs = right_probability(evidence), right_probability(baseline)
    held, held_before = robust(evidence, "regression"), robust(baseline, "regression")
    if mine is None and theirs is None:
        return paired_difference(held_before[shared.second], held[shared.first], confidence)
    after = (held.double() if mine is None else mine)[shared.first]
    before = (held_before.double() if theirs is None else theirs)[shared.second]
    return mean(before - after, confidence, support=Support(-1.0, 1.0))


def clean_accuracy_drop(evidence: Evidence, baseline: Evidence, confidence: float = 0.95) -> Estimate:
    """Clean accuracy of the baseline minus this one's, over the shared examples; positive is worse."""
    shared = pairs(evidence, baseline)
    return paired_difference(
        baseline["correct"][shared.second], evidence["correct"][shared.first], confidence
    )
