"""Differences between two runs of the same examples, paired by the digest of each example's content."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence, Scope
from holdfast.core.types import Mask, Rows
from holdfast.metrics.columns import robust, suite_robust
from holdfast.metrics.shares import right_probability, suite_right_probability
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


def basis(first: Evidence, second: Evidence) -> Scope:
    """Which adversarial examples a comparison counts: those of every pass where both runs made the same ones.

    Passes are the same where the attacks, all settings and the surrogates are. Else those of the suites
    only: a run that was searched by more passes would seem the weaker model.
    """
    mine, theirs = map(_passes, (first, second))
    return "every pass" if mine == theirs and mine is not None else "suite only"


def _passes(evidence: Evidence) -> tuple[object, ...] | None:
    """The attacks and passes whose examples a verdict counts; None where it counts those of the suite only."""
    if evidence.scope == "suite only":
        return None
    attacks = [(each.name, each.settings) for each in evidence.attacks]
    passes = [(each.stage, each.settings) for each in evidence.passes]
    return evidence.suite, attacks, passes, [surrogate["digest"] for surrogate in evidence.surrogates]


def compared(evidence: Evidence, scope: Scope) -> Mask:
    """Which examples are robust, as a comparison that counts `scope` takes it."""
    if scope == "suite only" and "suite_success" in evidence:
        return suite_robust(evidence, "regression")
    return robust(evidence, "regression")


def regression(evidence: Evidence, baseline: Evidence, confidence: float = 0.95) -> Estimate:
    """Robust accuracy of the baseline minus this one's, over the shared examples; positive is worse.

    `basis` says which adversarial examples it counts.
    """
    shared, scope = pairs(evidence, baseline), basis(evidence, baseline)
    chances = right_probability if scope == "every pass" else suite_right_probability
    mine, theirs = chances(evidence), chances(baseline)
    held, held_before = compared(evidence, scope), compared(baseline, scope)
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
