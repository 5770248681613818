"""Robust accuracy of each group of examples, with simultaneous confidence intervals.

Dunn, "Multiple comparisons among means", JASA 56, 1961 (Bonferroni's correction).
"""

from dataclasses import dataclass

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.metrics.columns import Absent
from holdfast.metrics.shares import accuracy_of
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, proportion

FEWEST_IN_GROUP = 30
"""Number of examples below which a group is unclear. With 30, the interval of an accuracy of 50 % ends at 31 and 69 %,
before the correction."""


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
    `Absent` if the run has no groups.
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
        rows.append(GroupRow(place, clean, accuracy_of(evidence, members, "worst_group", confidence, eps)))
    return tuple(rows)


def worst_group(evidence: Evidence, *, eps: float | None = None) -> Estimate:
    """Return the robust accuracy of the group with the lowest one, among the groups of at least 30 examples.

    The intervals of all groups are simultaneous, so the smallest of their ends bound the smallest accuracy. A smaller
    group could have any accuracy: with one, the interval begins at 0, and without a larger group it ends at 1.
    """
    rows = per_group(evidence, eps=eps)
    clear = [row.robust_accuracy for row in rows if not row.unclear]
    worst = min(clear or [row.robust_accuracy for row in rows], key=lambda estimate: estimate.value)
    low = min(estimate.low for estimate in clear) if len(clear) == len(rows) else 0.0
    return Estimate(worst.value, low, min((estimate.high for estimate in clear), default=1.0), worst.n)
