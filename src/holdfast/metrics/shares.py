"""Metrics that are proportions of examples, with exact confidence intervals, and access to the columns of evidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.core.batch import BY_LABEL
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import TRIGGERED, Evidence
from holdfast.core.types import Labels, Mask, PerExample
from holdfast.statistics.intervals import (
    CONFIDENCE,
    bonferroni,
    complement,
    independent_difference,
    mean,
    proportion,
)

ATTACKED_INPUT = (Remedy("suite", "standard", reason="whose fixed PGD-40 pass measures it"),)
"""remedies for a metric of attacked inputs"""
MINIMUM_NORM = (
    Remedy("curve", True),
    Remedy("suite", "minimum-norm", reason="whose attacks search for the smallest change"),
)
"""remedies for a metric of smallest changes"""
ATTACKED = "run at least one attack"


class Absent(UsageError):
    """Error for a metric whose attack was not run. Its message states how to measure the metric."""


def column(evidence: Evidence, name: str, way_out: str = "", remedies: tuple[Remedy, ...] = ()) -> Tensor:
    """Return a column of the evidence by its name. Raises `Absent` with the advice `way_out` and the remedies if the
    evidence does not contain it.
    """
    if name not in evidence:
        advice = f"; {way_out}" if way_out else ""
        raise Absent(f"this run measured no {name.replace('_', ' ')}{advice}", *remedies)
    return evidence[name]


def within(distance: PerExample, eps: float) -> Mask:
    """Return the mask of the perturbations whose size is at most `eps`. A small tolerance permits rounding errors."""
    return distance.double() <= eps * (1 + 1e-6) + 1e-7


def untargeted(evidence: Evidence, metric: str) -> None:
    """Raise `Absent` if the threat model has a target class, for a metric that is defined only for
    untargeted attacks.
    """
    if evidence.threat.goal is not None:
        raise Absent(
            f"{metric} does not exist under goal=targeted:{evidence.threat.goal}; use targeted_success_rate, or "
            "leave the goal out"
        )


def broken_examples(evidence: Evidence, metric: str, eps: float | None) -> Mask:
    """Return the mask of the correct examples that an attack broke with a change of at most `eps`, by default the eps
    of the run.

    For another eps the distances of the minimum-norm attacks are used.
    """
    untargeted(evidence, metric)
    eps_of_run = evidence.threat.constraint.eps
    if eps is None and math.isinf(eps_of_run):
        raise Absent(
            f"{metric} needs an eps in a minimum-norm run; write {metric}@EPS, as in "
            f"{metric}@{'40dB' if evidence.threat.constraint.in_decibels else 0.5}"
        )
    if eps is None or (eps == eps_of_run and "distance" not in evidence):
        return column(evidence, "success", ATTACKED) & evidence["correct"]
    way_out = f"this run attacked at eps={evidence.threat.constraint.size_text(eps_of_run)} only"
    broken = within(column(evidence, "distance", way_out, MINIMUM_NORM), eps)
    return evidence["correct"] & (broken | evidence["success"] if eps == eps_of_run else broken)


def robust(evidence: Evidence, metric: str, eps: float | None = None) -> Mask:
    """Return the mask of the examples that are classified correctly both without an attack and under every attack of
    the run.
    """
    return evidence["correct"] & ~broken_examples(evidence, metric, eps)


def suite_robust(evidence: Evidence, metric: str) -> Mask:
    """Return the mask of the examples that are classified correctly both without an attack and under every attack of
    the suite. Other attacks of the run are ignored.
    """
    untargeted(evidence, metric)
    if math.isinf(evidence.threat.constraint.eps):
        usual = evidence.threat.with_size(0.5)
        raise Absent(f"{metric} needs an eps", Remedy("threat", usual))
    return evidence["correct"] & ~column(evidence, "suite_success", ATTACKED)


FEWEST_IN_GROUP = 30
"""Number of examples below which a class or a group is unclear. With 30, the interval of an accuracy of 50 % ends at 31
and 69 %, before the correction."""


def clean_accuracy(evidence: Evidence, confidence: float = CONFIDENCE) -> Estimate:
    """Return the clean accuracy: the share of clean inputs that the model classifies correctly."""
    return proportion(evidence["correct"], confidence)


def clean_error_rate(evidence: Evidence) -> Estimate:
    """Return the share of clean inputs that the model misclassifies, which is one minus the clean accuracy."""
    return complement(clean_accuracy(evidence))


def rejection_rate(evidence: Evidence) -> Estimate:
    """Return the share of clean inputs that the detector of a model rejects."""
    way_out = "the model accepts every input; give it a detector with holdfast.with_detector"
    return proportion(column(evidence, "rejected", way_out))


def right_probability(evidence: Evidence, eps: float | None = None) -> PerExample | None:
    """Return the probability that a randomised model classifies each example correctly under the strongest attack.

    Returns None if `eps` is not the eps of the run, or if the model is not randomised.
    """
    at_eps_of_run = eps is None or eps == evidence.threat.constraint.eps
    return (
        evidence["right_probability"].double() if at_eps_of_run and "right_probability" in evidence else None
    )


def robust_accuracy(
    evidence: Evidence, confidence: float = CONFIDENCE, *, eps: float | None = None
) -> Estimate:
    """Return the share of all examples that are classified correctly when clean and under every attack. It is an upper
    bound on the true robust accuracy.

    Attacked means under every attack and every pass of the run inside the threat model (`Evidence.scope`). For a
    randomised model it is the mean probability of a correct answer under the worst attack, over new random numbers.
    """
    mask = robust(evidence, "robust_accuracy", eps)
    chance = right_probability(evidence, eps)
    return proportion(mask, confidence) if chance is None else mean(chance, confidence)


def certified_accuracy(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the share of all examples for which it is proved that no input of the threat model is misclassified.

    With `eps`, it is the share of the correct examples whose certified radius is at least `eps`. It is a lower bound of
    the true robust accuracy on these examples.
    """
    way_out, remedies = "holdfast certify proves robustness", (Remedy("certify", True),)
    certified = column(evidence, "certified", way_out, remedies)
    if eps is not None:
        certified = (
            column(evidence, "certified_radius", "the method smoothing of holdfast certify proves radii")
            >= eps
        )
    return proportion(certified & evidence["correct"])


def suite_robust_accuracy(evidence: Evidence) -> Estimate:
    """Return the robust accuracy under the attacks of the suite only, for a comparison with published numbers."""
    mask = suite_robust(evidence, "suite_robust_accuracy")
    chance = suite_right_probability(evidence)
    return proportion(mask) if chance is None else mean(chance)


def suite_right_probability(evidence: Evidence) -> PerExample | None:
    """Return the probability that a randomised model classifies each example correctly under the strongest attack of
    the suite.

    Returns None if the model is not randomised.
    """
    name = "suite_right_probability"
    return evidence[name].double() if name in evidence else None


def robust_error_rate(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the share of examples that are misclassified when clean or under an attack, which is one minus the robust
    accuracy.
    """
    return complement(robust_accuracy(evidence, eps=eps))


def robustness_score(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the harmonic mean of clean accuracy and robust accuracy, with a confidence interval.

    It increases with both, so the ends of two simultaneous intervals (Bonferroni) give the ends of its interval. A
    bootstrap would give an interval of width zero for a sample without errors.
    """
    single_confidence = bonferroni(CONFIDENCE, 2)
    clean, robust_estimate = (
        clean_accuracy(evidence, single_confidence),
        robust_accuracy(evidence, single_confidence, eps=eps),
    )
    low, value, high = (
        _harmonic(c, r)
        for c, r in (
            (clean.low, robust_estimate.low),
            (clean.value, robust_estimate.value),
            (clean.high, robust_estimate.high),
        )
    )
    return Estimate(value, low, high, len(evidence))


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def attack_success_rate(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the share of the examples with a correctly classified clean input that an attack broke."""
    broken = broken_examples(evidence, "attack_success_rate", eps)[evidence["correct"]]
    if not len(broken):
        raise Absent(
            "attack_success_rate is a share of the examples that are correct when clean, and there are none"
        )
    return proportion(broken)


def perturbed_share(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the share of all examples that an attack broke. The metrics of the mean perturbation are computed over
    these examples.
    """
    return proportion(broken_examples(evidence, "perturbed_share", eps))


def targeted_success_rate(evidence: Evidence) -> Estimate:
    """Return the success rate of targeted attacks, among the examples that are neither labelled nor predicted as the
    target class when clean.

    Eligible examples are neither of that class nor predicted as that class when clean.
    """
    threat = evidence.threat
    if threat.goal is None:
        targeted = replace(threat, goal=0, unit="").text
        raise Absent("targeted_success_rate needs a target", Remedy("threat", targeted))
    eligible = column(evidence, "eligible", "run at least one attack")
    if not eligible.any():
        raise Absent(
            f"no example is eligible: all have class {evidence.threat.goal} as label or clean prediction"
        )
    return proportion(evidence["success"][eligible])


def trigger_success_rate(evidence: Evidence) -> Estimate:
    """Return the share of the examples of other classes that the model assigns to the target class of a trigger, if
    they have the trigger, whether they are correct when clean or not. If the trigger has no target class, it is the
    share of all examples whose predicted class the trigger changes.
    """
    changed, goal = (
        column(evidence, TRIGGERED, "use a threat such as trigger:drill.trigger.npz"),
        evidence.threat.goal,
    )
    if goal is not None:
        changed = changed[evidence["y"] != goal]
    if not len(changed):
        raise Absent(
            f"all examples have the target class {goal} of the trigger; give examples of other classes"
        )
    return proportion(changed)


@dataclass(frozen=True)
class ClassRow:
    """The clean accuracy and the robust accuracy of one class."""

    label: int
    n: int
    clean_accuracy: Estimate
    robust_accuracy: Estimate | None
    """robust accuracy of the class; None if the run has no robust accuracy"""


def per_class(evidence: Evidence) -> tuple[ClassRow, ...]:
    """Return the clean accuracy and the robust accuracy of each class that occurs in the data.

    All intervals of the robust accuracies hold together (Bonferroni), and so do those of the clean accuracies.
    """
    try:
        robust(evidence, "robust_accuracy")
        measured = True
    except Absent:
        measured = False
    labels = torch.unique(evidence["y"]).tolist()
    confidence, rows = bonferroni(CONFIDENCE, len(labels)), []
    for label in labels:
        members = evidence["y"] == label
        rows.append(
            ClassRow(
                label,
                int(members.sum()),
                proportion(evidence["correct"][members], confidence),
                _accuracy_of(evidence, members, "robust_accuracy", confidence) if measured else None,
            )
        )
    return tuple(rows)


def worst_class(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the robust accuracy of the class with the lowest one, among the classes that occur in the data.

    The intervals of all classes are simultaneous (Bonferroni), so the smallest of their ends bound the smallest
    accuracy. A class of fewer than 30 examples, or without examples, could have any accuracy: with one, the interval
    begins at 0.
    """
    y, few = evidence["y"], few_examples(evidence, "worst_class")
    labels = torch.unique(y).tolist()
    single_confidence = bonferroni(CONFIDENCE, len(labels))
    accuracies = [
        _accuracy_of(evidence, y == label, "worst_class", single_confidence, eps) for label in labels
    ]
    worst = min(accuracies, key=lambda estimate: estimate.value)
    low = 0.0 if few else min(e.low for e in accuracies)
    return Estimate(worst.value, low, min(e.high for e in accuracies), worst.n)


@dataclass(frozen=True)
class TooFew:
    """Classes or groups with so few examples that no gate on the worst one can pass."""

    counts: Mapping[str, int]
    """number of examples of each of them, by name"""
    needed: int | None
    """smallest number of examples of each with which the gate can pass; None if no number is enough"""


def too_few(evidence: Evidence, metric: str, bound: float) -> TooFew | None:
    """Return the classes or groups for which a gate that `metric`, `worst_class` or `worst_group`, is at least `bound`
    has too few examples; None if it has enough, or for other metrics.
    """
    if metric not in ("worst_class", "worst_group") or not (counts := few_examples(evidence, metric)):
        return None
    rows = evidence["y" if metric == "worst_class" else "group"]
    n_absent = sum(n == 0 for n in counts.values())
    tail = (1 - bonferroni(CONFIDENCE, len(torch.unique(rows)) + n_absent)) / 2
    if bound >= 1:
        return TooFew(counts, None)
    # the interval of Clopper and Pearson begins at tail ** (1 / n) if all n are robust
    enough = math.ceil(math.log(tail) / math.log(bound)) if bound > 0 else 1
    return TooFew(counts, max(FEWEST_IN_GROUP, enough))


def few_examples(evidence: Evidence, metric: str) -> dict[str, int]:
    """Return the number of examples of each class (`worst_class`) or group (`worst_group`) with fewer than 30, by
    name.
    """
    about = evidence.data.get("groups", {})
    if metric == "worst_class" or about.get("column") == BY_LABEL:
        y, names = evidence["y"], tuple(map(str, evidence.data.get("classes") or ()))
        absent = absent_classes(y, classes_of(evidence.model))
        labels, counts = (each.tolist() for each in torch.unique(y, return_counts=True))
        numbers = {**dict(zip(labels, counts, strict=True)), **dict.fromkeys(absent, 0)}
        found = {names[k] if 0 <= k < len(names) else str(k): n for k, n in sorted(numbers.items())}
    else:
        places, counts = (each.tolist() for each in torch.unique(evidence["group"], return_counts=True))
        named = about.get("names") or range(max(places, default=-1) + 1)
        found = {str(named[place]): n for place, n in zip(places, counts, strict=True)}
        found |= dict.fromkeys(about.get("absent", ()), 0)
    return {name: n for name, n in found.items() if n < FEWEST_IN_GROUP}


_LISTED = 10  # classes in a message


def absent_classes(y: Labels, classes: int | None) -> tuple[int, ...]:
    """Return the classes, out of `classes`, that are the label of no example."""
    return tuple(sorted({*range(classes or 0)} - {*torch.unique(y).tolist()}))


def listed_classes(labels: Sequence[int], names: Sequence[str] = ()) -> str:
    """Return the names, or else the numbers, of classes for a message."""
    shown = ", ".join(names[k] if k < len(names) else str(k) for k in labels[:_LISTED])
    return shown + (f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else "")


def classes_of(model: Mapping[str, Any]) -> int | None:
    """Return the number of outputs of the model of an assessment, from its evidence; None if it is unknown."""
    found: int | None = model.get("outputs")
    return found


def notes_on_absent(evidence: Evidence) -> tuple[str, ...]:
    """Return notes on classes of the model, and on groups of the data, of which there are no examples."""
    notes = []
    absent = absent_classes(evidence["y"], classes_of(evidence.model))
    if absent and "task" not in evidence.model:
        names = tuple(map(str, evidence.data.get("classes") or ()))
        notes.append(
            f"there are no examples of class {listed_classes(absent, names)}, so that no gate on worst_class can pass"
        )
    groups = evidence.data.get("groups", {}).get("absent", ())
    if groups:
        notes.append(
            f"there are no examples of group {', '.join(groups)}, so that no gate on worst_group can pass"
        )
    return tuple(notes)


@dataclass(frozen=True)
class GroupRow:
    """The clean accuracy and the robust accuracy of one group."""

    place: int
    """index of the group in the names of the groups"""
    clean_accuracy: Estimate
    robust_accuracy: Estimate

    @property
    def unclear(self) -> bool:
        """Whether the group has fewer than 30 examples."""
        return self.robust_accuracy.n < FEWEST_IN_GROUP


def per_group(evidence: Evidence, *, eps: float | None = None) -> tuple[GroupRow, ...]:
    """Return the clean accuracy and the robust accuracy of each group that occurs in the data.

    All intervals of the robust accuracies hold together (Bonferroni), and so do those of the clean accuracies. Raises
    `Absent` if the run has no groups or no robust accuracy.
    """
    if "group" not in evidence:
        raise Absent(
            "worst_group needs the group of each example", Remedy("groups", Placeholder("NAME", "array"))
        )
    places = torch.unique(evidence["group"]).tolist()
    confidence = bonferroni(CONFIDENCE, len(places))
    rows = []
    for place in places:
        members = evidence["group"] == place
        clean = proportion(evidence["correct"][members], confidence)
        rows.append(GroupRow(place, clean, _accuracy_of(evidence, members, "worst_group", confidence, eps)))
    return tuple(rows)


def worst_group(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the robust accuracy of the group with the lowest one, among the groups of at least 30 examples.

    The intervals of all groups are simultaneous, so the smallest of their ends bound the smallest accuracy. A smaller
    group, or a group without examples, could have any accuracy: with one, the interval begins at 0, and without a
    larger group it ends at 1.
    """
    rows = per_group(evidence, eps=eps)
    clear = [row.robust_accuracy for row in rows if not row.unclear]
    worst = min(clear or [row.robust_accuracy for row in rows], key=lambda estimate: estimate.value)
    few = few_examples(evidence, "worst_group")
    low = 0.0 if few else min(estimate.low for estimate in clear)
    return Estimate(worst.value, low, min((estimate.high for estimate in clear), default=1.0), worst.n)


def _accuracy_of(
    evidence: Evidence, members: Mask, metric: str, confidence: float = CONFIDENCE, eps: float | None = None
) -> Estimate:
    """Robust accuracy of some examples: a share, or the mean probability of a correct answer for a
    randomised model.
    """
    chance = right_probability(evidence, eps)
    if chance is not None:
        return mean(chance[members], confidence)
    return proportion(robust(evidence, metric, eps)[members], confidence)


def robust_error_gap(robust: int, n: int, robust_in_training: int, n_training: int) -> Estimate:
    """Return the robust error on `n` examples that a model was not trained on minus that on `n_training` training
    examples, with its 95 % confidence interval.

    `robust` and `robust_in_training` are the numbers of examples that the same attack does not break. The interval is
    that of two independent samples. A gap whose interval is above 0 is overfitting.
    """
    return independent_difference(n - robust, n, n_training - robust_in_training, n_training)
