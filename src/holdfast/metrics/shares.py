"""Accuracies, error rates and success rates: proportions with exact intervals.

`eps` asks for another eps than the run attacked at, and is read off the distances of minimum-norm attacks.
"""

from dataclasses import dataclass

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask, PerExample
from holdfast.metrics.columns import Absent, broken, column, robust, suite_robust
from holdfast.ops.statistics import bonferroni, complement, mean, proportion


def clean_accuracy(evidence: Evidence, confidence: float = 0.95) -> Estimate:
    """Share of examples classified correctly unattacked."""
    return proportion(evidence["correct"], confidence)


def clean_error_rate(evidence: Evidence, confidence: float = 0.95) -> Estimate:
    """One minus the clean accuracy."""
    return complement(clean_accuracy(evidence, confidence))


def rejection_rate(evidence: Evidence, confidence: float = 0.95) -> Estimate:
    """Share of unattacked inputs that a model with a detector rejects."""
    way_out = "the model accepts every input; give it a detector with holdfast.guarded"
    return proportion(column(evidence, "rejected", way_out), confidence)


def right_probability(evidence: Evidence, eps: float | None = None) -> PerExample | None:
    """Of a randomised model, the chance that each example is right under the worst case; None at another eps."""
    own = eps is None or eps == evidence.threat.constraint.eps
    return evidence["right_probability"].double() if own and "right_probability" in evidence else None


def robust_accuracy(evidence: Evidence, confidence: float = 0.95, *, eps: float | None = None) -> Estimate:
    """Share of all examples classified correctly, both clean and attacked; an upper bound of the truth.

    Attacked means under every attack and every pass of the run inside the threat model (`Evidence.scope`). For a
    randomised model it is the mean probability of being right, over fresh draws under the worst case.
    """
    held = robust(evidence, "robust_accuracy", eps)
    chance = right_probability(evidence, eps)
    return proportion(held, confidence) if chance is None else mean(chance, confidence)


def suite_robust_accuracy(evidence: Evidence, confidence: float = 0.95) -> Estimate:
    """Robust accuracy under the suite's own attacks only, for comparison with published numbers."""
    held = suite_robust(evidence, "suite_robust_accuracy")
    chance = suite_right_probability(evidence)
    return proportion(held, confidence) if chance is None else mean(chance, confidence)


def suite_right_probability(evidence: Evidence) -> PerExample | None:
    """Of a randomised model, the chance that each example is right under the suite's own attacks."""
    name = "suite_right_probability"
    return evidence[name].double() if name in evidence else None


def robust_error_rate(evidence: Evidence, confidence: float = 0.95, *, eps: float | None = None) -> Estimate:
    """One minus the robust accuracy."""
    return complement(robust_accuracy(evidence, confidence, eps=eps))


def robustness_score(evidence: Evidence, confidence: float = 0.95, *, eps: float | None = None) -> Estimate:
    """Harmonic mean of clean and robust accuracy.

    It rises with both, so the ends of two intervals that hold together (Bonferroni) give the ends of its own; a
    bootstrap would call a perfect sample certain.
    """
    each = bonferroni(confidence, 2)
    clean, held = clean_accuracy(evidence, each), robust_accuracy(evidence, each, eps=eps)
    low, value, high = (
        _harmonic(c, r)
        for c, r in ((clean.low, held.low), (clean.value, held.value), (clean.high, held.high))
    )
    return Estimate(value, low, high, len(evidence))


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def attack_success_rate(
    evidence: Evidence, confidence: float = 0.95, *, eps: float | None = None
) -> Estimate:
    """Share of originally correct examples that an attack turned wrong."""
    fell = broken(evidence, "attack_success_rate", eps)[evidence["correct"]]
    if not len(fell):
        raise Absent("attack_success_rate is a share of the originally correct examples, and none is correct")
    return proportion(fell, confidence)


def perturbed_share(evidence: Evidence, confidence: float = 0.95, *, eps: float | None = None) -> Estimate:
    """Share of all examples that an attack turned wrong: the successes that the mean perturbations run over."""
    return proportion(broken(evidence, "perturbed_share", eps), confidence)


def targeted_success_rate(evidence: Evidence, confidence: float = 0.95) -> Estimate:
    """Share of examples turned into the target, of those that are neither of its class nor already predicted so."""
    if evidence.threat.goal is None:
        raise Absent("targeted_success_rate needs a target; write --threat linf:8/255,goal=targeted:3")
    eligible = column(evidence, "eligible", "run at least one attack")
    if not eligible.any():
        raise Absent(
            f"no example is eligible: all are of class {evidence.threat.goal} or predicted as it already"
        )
    return proportion(evidence["success"][eligible], confidence)


@dataclass(frozen=True)
class ClassRow:
    """One class of the per-class table."""

    label: int
    n: int
    clean_accuracy: Estimate
    robust_accuracy: Estimate | None
    """None where the run has no robust accuracy"""


def per_class(evidence: Evidence, confidence: float = 0.95) -> tuple[ClassRow, ...]:
    """Clean and robust accuracy of each class that occurs, with intervals that do not allow for the many classes."""
    try:
        robust(evidence, "robust_accuracy")
        measured = True
    except Absent:
        measured = False
    rows = []
    for label in torch.unique(evidence["y"]).tolist():
        members = evidence["y"] == label
        rows.append(
            ClassRow(
                label,
                int(members.sum()),
                proportion(evidence["correct"][members], confidence),
                _held(evidence, members, "robust_accuracy", confidence) if measured else None,
            )
        )
    return tuple(rows)


def worst_class(evidence: Evidence, confidence: float = 0.95, *, eps: float | None = None) -> Estimate:
    """The smallest robust accuracy over the classes that occur; n is the size of that class.

    The intervals of all classes hold together (Bonferroni), hence the smallest of their ends bound the smallest
    accuracy.
    """
    y = evidence["y"]
    labels = torch.unique(y).tolist()
    each = bonferroni(confidence, len(labels))
    found = [_held(evidence, y == label, "worst_class", each, eps) for label in labels]
    worst = min(found, key=lambda estimate: estimate.value)
    return Estimate(worst.value, min(e.low for e in found), min(e.high for e in found), worst.n)


def _held(
    evidence: Evidence, members: Mask, metric: str, confidence: float, eps: float | None = None
) -> Estimate:
    """Robust accuracy among some examples: a share, or of a randomised model the mean chance of being right."""
    chance = right_probability(evidence, eps)
    if chance is not None:
        return mean(chance[members], confidence)
    return proportion(robust(evidence, metric, eps)[members], confidence)
