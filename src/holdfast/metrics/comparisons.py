"""Metrics that compare models: paired differences between two runs, and the transfer of adversarial examples
between models.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from holdfast.core.errors import SURROGATE, UsageError
from holdfast.core.estimate import Estimate, Goal
from holdfast.core.evidence import TRIGGERED, Evidence, Scope
from holdfast.core.types import Mask, Rows
from holdfast.metrics.shares import Absent, right_probability, robust, suite_right_probability, suite_robust
from holdfast.statistics.intervals import Support, mean, paired_difference, proportion


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
    suites count, because the model of the run with more passes would seem weaker. A probe that was not run because it
    could not change the result is a pass, too (`PassRecord.tried` is 0).
    """
    return "every pass" if _passes(first) == _passes(second) else "suite only"


def _passes(evidence: Evidence) -> tuple[object, ...]:
    """Attacks and passes whose examples count, for comparison. Stored inputs of an earlier run are left out, since its
    suite had found them.
    """
    attacks = [(record.name, record.settings) for record in evidence.attacks if record.reuse is None]
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


def trigger_success_drop(evidence: Evidence, baseline: Evidence) -> Estimate:
    """Return the drop of the success rate of a trigger relative to the baseline run, on the examples of
    `trigger_success_rate` that both runs share. Positive values mean that the trigger moves fewer examples.
    """
    shared, goal = paired_examples(evidence, baseline), evidence.threat.goal
    counted = torch.ones_like(evidence["y"], dtype=torch.bool) if goal is None else evidence["y"] != goal
    kept = counted[shared.first]
    after, before = evidence[TRIGGERED][shared.first[kept]], baseline[TRIGGERED][shared.second[kept]]
    return paired_difference(before, after)


LOSSES: Final[Mapping[str, Callable[[Evidence, Evidence], Estimate]]] = {
    "robust_accuracy": regression,
    "clean_accuracy": clean_accuracy_drop,
    "certified_accuracy": certified_accuracy_drop,
    "trigger_success_rate": trigger_success_drop,
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


ALL = "all surrogates"
"""name of the row of examples that were computed on the mean of all surrogates"""


@dataclass(frozen=True)
class TransferRow:
    """Row of the transfer matrix: the success rate on each model of adversarial examples that were computed on one
    model.
    """

    maker: str
    of: int | None
    """index of the model on which the examples were computed; None for all surrogates together"""
    shares: tuple[Estimate | None, ...]
    """for each model, the share of its correctly classified inputs that the examples break; None if there are no such
    inputs"""


def model_names(evidence: Evidence) -> tuple[str, ...]:
    """Return the names of the models in the transfer matrix: the target, followed by the surrogates."""
    return tuple(str(card.get("name", "model")) for card in (evidence.model, *evidence.surrogates))


def matrix(evidence: Evidence) -> tuple[TransferRow, ...]:
    """Return the transfer matrix, with one row for each model on which adversarial examples were computed.

    Raises `Absent` if no surrogate was given or time ran out.
    """
    if "wrong" not in evidence.transfer:
        raise Absent("transfer was not measured", SURROGATE)
    names, right, wrong = model_names(evidence), evidence.transfer["right"], evidence.transfer["wrong"]
    target_row = [0] if evidence.threat.gives("gradients") else []
    sources: list[int | None] = [*target_row, *range(1, len(names))]
    sources += [None] * (wrong.shape[1] - len(sources))
    return tuple(
        TransferRow(
            ALL if of is None else names[of],
            of,
            tuple(
                proportion(wrong[right[:, j], i, j]) if right[:, j].any() else None for j in range(len(names))
            ),
        )
        for i, of in enumerate(sources)
    )


def accuracies(evidence: Evidence) -> tuple[Estimate, ...]:
    """Return the clean accuracy of each model of the transfer matrix, on the examples of the matrix."""
    return tuple(proportion(column) for column in evidence.transfer["right"].T)


def transfer_success(evidence: Evidence) -> Estimate:
    """Return the share of the inputs classified correctly by the target that adversarial examples computed on the
    surrogates break.

    The examples are those computed on all surrogates at once.
    """
    share = matrix(evidence)[-1].shares[0]
    if share is None:
        raise Absent("the model classifies no input of the transfer matrix correctly")
    return share
