"""Differences between two runs on the same examples, which are paired by a digest of input and label."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence, Scope
from holdfast.core.goal import Goal
from holdfast.core.types import Mask, Rows
from holdfast.metrics.columns import robust, suite_robust
from holdfast.metrics.shares import right_probability, suite_right_probability
from holdfast.statistics.intervals import Support, mean, paired_difference


@dataclass(frozen=True)
class Pairs:
    """Row indices of the examples that two runs share, in the order of the first run."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first)


def paired_examples(first: Evidence, second: Evidence) -> Pairs:
    """Return the row indices of the examples that two runs share. Examples are equal if the digests of input and label
    are.

    Raises `UsageError` if the runs share no example.
    """
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(_keys(second["digest"])):
        places[key].append(row)
    # an example that occurs twice is paired with another row each time
    matches = [(row, places[key].pop(0)) for row, key in enumerate(_keys(first["digest"])) if places.get(key)]
    if not matches:
        raise UsageError(
            f"the two runs share no example ({len(first)} against {len(second)}); assess both models on the same "
            "data with the same -n"
        )
    rows = torch.tensor(matches)
    return Pairs(rows[:, 0], rows[:, 1])


def _keys(digests: Tensor) -> list[bytes]:
    return [bytes(row) for row in digests.tolist()]


def basis(first: Evidence, second: Evidence) -> Scope:
    """Return which adversarial examples count in a comparison of two runs: those of all attacks and probes, or only
    those of the suites.

    Every pass counts if both runs had equal passes, that is equal attacks, settings and surrogates. Otherwise only the
    suites count, because the model of the run with more passes would seem weaker.
    """
    return "every pass" if _passes(first) == _passes(second) else "suite only"


def _passes(evidence: Evidence) -> tuple[object, ...]:
    """Attacks and passes whose examples count, for comparison."""
    attacks = [(record.name, record.settings) for record in evidence.attacks]
    passes = [(record.stage, record.settings) for record in evidence.passes]
    return evidence.suite, attacks, passes, [surrogate["digest"] for surrogate in evidence.surrogates]


def robust_in_scope(evidence: Evidence, scope: Scope) -> Mask:
    """Return the mask of the robust examples of a run, counting the adversarial examples of all attacks or, by `scope`,
    only those of the suite.
    """
    if scope == "suite only" and "suite_success" in evidence:
        return suite_robust(evidence, "regression")
    return robust(evidence, "regression")


def regression(evidence: Evidence, baseline: Evidence) -> Estimate:
    """Return the loss of robust accuracy relative to the baseline run, on the examples that both runs share. Positive
    values mean a less robust model.

    `basis` determines which adversarial examples count.
    """
    shared, scope = paired_examples(evidence, baseline), basis(evidence, baseline)
    probability = right_probability if scope == "every pass" else suite_right_probability
    chance, chance_before = probability(evidence), probability(baseline)
    mask, mask_before = robust_in_scope(evidence, scope), robust_in_scope(baseline, scope)
    if chance is None and chance_before is None:
        return paired_difference(mask_before[shared.second], mask[shared.first])
    after = (mask.double() if chance is None else chance)[shared.first]
    before = (mask_before.double() if chance_before is None else chance_before)[shared.second]
    return mean(before - after, support=Support(-1.0, 1.0))


def clean_accuracy_drop(evidence: Evidence, baseline: Evidence) -> Estimate:
    """Return the loss of clean accuracy relative to the baseline run, on the examples that both runs share. Positive
    values mean a less accurate model.
    """
    shared = paired_examples(evidence, baseline)
    return paired_difference(baseline["correct"][shared.second], evidence["correct"][shared.first])


def certified_accuracy_drop(evidence: Evidence, baseline: Evidence) -> Estimate:
    """Return the loss of certified accuracy relative to the baseline run, on the examples that both runs share."""
    shared = paired_examples(evidence, baseline)
    after, before = (each["certified"] & each["correct"] for each in (evidence, baseline))
    return paired_difference(before[shared.second], after[shared.first])


LOSSES: Final[Mapping[str, Callable[[Evidence, Evidence], Estimate]]] = {
    "robust_accuracy": regression,
    "clean_accuracy": clean_accuracy_drop,
    "certified_accuracy": certified_accuracy_drop,
}
"""Functions that return the loss of a metric relative to a baseline run on the same examples, by the metric."""


def change(metric: str, after: Evidence, before: Evidence) -> Estimate:
    """Return the value of a metric in one run minus that in an earlier one, with the confidence interval of the
    difference on the examples that both share.
    """
    return _negated(LOSSES[metric](after, before))


def improvement(goal: Goal, difference: Estimate) -> Estimate:
    """Return the change of the metric of a goal with the sign that makes positive values better."""
    return difference if goal.better == "higher" else _negated(difference)


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(0.0 - estimate.value, 0.0 - estimate.high, 0.0 - estimate.low, estimate.n)
