"""What a set loses, and what a thief turns: shares and their differences on the same examples, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask
from holdfast.metrics.columns import robust
from holdfast.ops.statistics import Support, bonferroni, mean, paired_difference, proportion
from holdfast.reports.numbers import percent
from holdfast.runs.rotate.crafting import Attacker
from holdfast.runs.rotate.measuring import Carried
from holdfast.runs.rotate.samples import CONFIDENCE


@dataclass(frozen=True)
class Loss:
    """Accuracy that a set lacks of the better of the incumbent and the mean of the bases.

    Were it compared with the incumbent alone, what each swap may lose would add up over swaps.
    """

    estimate: Estimate
    """its ends hold for the larger of both losses"""
    whom: str
    """which of them is better"""


def largest_loss(before: Mapping[str, Sequence[Mask]], after: Mask, confidence: float) -> Loss:
    """The larger of what is lost against each of those that are named."""
    each = {name: difference(masks, after, confidence) for name, masks in before.items()}
    whom = max(each, key=lambda name: each[name].value)
    surely = bonferroni(confidence, len(before))
    low = max(difference(masks, after, surely).low for masks in before.values())
    value, high = each[whom].value, max(one.high for one in each.values())
    return Loss(Estimate(value, min(low, value), high, each[whom].n), whom)


@dataclass(frozen=True)
class Worst:
    """What the best of some attacks does to a set."""

    estimate: Estimate
    """share of the inputs that the set has right; its ends hold for the largest of all shares"""
    by: str
    """who made the examples, and how"""
    fell: tuple[Mask, ...]
    """of each attack, which of those inputs were turned; the largest first"""

    @property
    def says(self) -> str:
        """The number, and who is behind it."""
        return f"examples of {self.by} turn {number(self.estimate)}"


def worst(carried: Carried, thieves: Sequence[Attacker], confidence: float = CONFIDENCE) -> Worst | None:
    """The most that one of the attacks of one of the thieves turns; None without thieves.

    The upper end is the highest of all, and below it is the largest share with the wanted confidence; the lower ends
    are corrected for how many there are (Bonferroni).
    """
    right = carried.evidence["correct"]
    found = {key: fell[right] for key, fell in carried.fell.items() if key[0] in thieves}
    if not found:
        return None
    each = {key: share(fell, confidence) for key, fell in found.items()}
    order = sorted(found, key=lambda key: -each[key].value)
    low = max(share(fell, bonferroni(confidence, len(found))).low for fell in found.values())
    first, high = each[order[0]], max(one.high for one in each.values())
    thief, attack = order[0]
    return Worst(
        Estimate(first.value, min(low, first.value), high, first.n),
        f"{thief.name} by {attack}",
        tuple(found[key] for key in order),
    )


def held(white: Evidence) -> Mask:
    """Which examples are right whatever attacks that see the set do."""
    return robust(white, "robust_accuracy")


def differing(one: Evidence, other: Evidence) -> Mask:
    """Which inputs two sets put into different classes."""
    different: Mask = one["prediction"] != other["prediction"]
    return different


def share(mask: Mask, confidence: float = CONFIDENCE) -> Estimate:
    """Share of true entries; of none, anything."""
    return proportion(mask, confidence) if len(mask) else Estimate(0.0, 0.0, 1.0, 0)


def difference(before: Sequence[Mask], after: Mask | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """Mean share true before, minus that after, on the same examples; the share alone without an `after`."""
    if len(before) == 1:
        only = before[0]
        return share(only, confidence) if after is None else paired_difference(only, after, confidence)
    values: Tensor = torch.stack([one.double() for one in before]).mean(0)
    if after is None:
        return mean(values, confidence)
    return mean(values - after.double(), confidence, support=Support(-1.0, 1.0))


def number(estimate: Estimate) -> str:
    """A share in words."""
    return (
        f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)}, n = {estimate.n:,})"
    )


def points(estimate: Estimate) -> str:
    """A difference of shares in words."""
    low, value, high = (f"{100 * end:.1f}" for end in (estimate.low, estimate.value, estimate.high))
    return f"{value} points ({low} to {high}, n = {estimate.n:,})"
