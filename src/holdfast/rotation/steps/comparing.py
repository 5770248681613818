"""Computes fractions of examples and paired differences with confidence intervals, for lost accuracy and success rates
of attackers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask
from holdfast.metrics.columns import robust
from holdfast.reports.numbers import percent
from holdfast.rotation.steps.samples import CONFIDENCE
from holdfast.rotation.steps.set_measuring import TransferResult
from holdfast.rotation.steps.transfer_examples import Attacker
from holdfast.statistics.intervals import Support, bonferroni, mean, paired_difference, proportion


@dataclass(frozen=True)
class Loss:
    """Accuracy that a parameter set loses relative to the better of two references: the serving set, and the mean of
    the bases.

    If only the serving set were the reference, small losses could add up over several swaps.
    """

    estimate: Estimate
    """lost accuracy; the interval is for the larger of both losses"""
    reference: str
    """name of the better reference"""


def largest_loss(before: Mapping[str, Sequence[Mask]], after: Mask, confidence: float) -> Loss:
    """Return the largest loss of accuracy relative to several reference sets. `after` is the mask of the correct
    examples of a set, and `before` contains those of the references.
    """
    losses = {name: difference(masks, after, confidence) for name, masks in before.items()}
    reference = max(losses, key=lambda name: losses[name].value)
    joint = bonferroni(confidence, len(before))
    low = max(difference(masks, after, joint).low for masks in before.values())
    value, high = losses[reference].value, max(loss.high for loss in losses.values())
    return Loss(Estimate(value, min(low, value), high, losses[reference].n), reference)


@dataclass(frozen=True)
class Worst:
    """The highest success rate among several attacks on a parameter set, and the attack that achieves it."""

    estimate: Estimate
    """fraction of the correctly classified inputs that are broken; the interval is for the largest
    of all success rates"""
    by: str
    """description of the attacker and its attack"""
    broken: tuple[Mask, ...]
    """for each attack, the mask of the correctly classified inputs that it broke; the most
    successful attack is first"""

    @property
    def description(self) -> str:
        """The highest success rate and its attack as text."""
        return f"examples of {self.by} break {share_text(self.estimate)}"


def worst(
    transferred: TransferResult, attackers: Sequence[Attacker], confidence: float = CONFIDENCE
) -> Worst | None:
    """Return the highest success rate over all transfer attacks of the given attackers, or None if there are no
    attackers.

    The upper end of the interval is the highest of all upper ends, which is above the largest success rate with the
    given confidence. The lower ends are corrected for the number of attacks (Bonferroni).
    """
    right = transferred.evidence["correct"]
    masks = {key: mask[right] for key, mask in transferred.broken.items() if key[0] in attackers}
    if not masks:
        return None
    shares = {key: share_of(mask, confidence) for key, mask in masks.items()}
    order = sorted(masks, key=lambda key: -shares[key].value)
    low = max(share_of(mask, bonferroni(confidence, len(masks))).low for mask in masks.values())
    highest, high = shares[order[0]], max(share.high for share in shares.values())
    attacker, attack = order[0]
    return Worst(
        Estimate(highest.value, min(low, highest.value), high, highest.n),
        f"{attacker.name} by {attack}",
        tuple(masks[key] for key in order),
    )


def robust_mask(white: Evidence) -> Mask:
    """Return the mask of the examples that are robust to the white-box attacks."""
    return robust(white, "robust_accuracy")


def changed_predictions(one: Evidence, other: Evidence) -> Mask:
    """Return the mask of the inputs that two parameter sets classify differently."""
    different: Mask = one["prediction"] != other["prediction"]
    return different


def share_of(mask: Mask, confidence: float = CONFIDENCE) -> Estimate:
    """Return the fraction of true entries of a mask with a confidence interval. For an empty mask the interval is 0 to
    1.
    """
    return proportion(mask, confidence) if len(mask) else Estimate(0.0, 0.0, 1.0, 0)


def difference(before: Sequence[Mask], after: Mask | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean fraction of true entries of the masks in `before`, minus the fraction in `after`, with a
    confidence interval. All masks have the same examples.

    If `after` is None, nothing is subtracted.
    """
    if len(before) == 1:
        only = before[0]
        return share_of(only, confidence) if after is None else paired_difference(only, after, confidence)
    values: Tensor = torch.stack([mask.double() for mask in before]).mean(0)
    if after is None:
        return mean(values, confidence)
    return mean(values - after.double(), confidence, support=Support(-1.0, 1.0))


def share_text(estimate: Estimate) -> str:
    """Return a fraction with its confidence interval and its sample size as text."""
    return (
        f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)}, n = {estimate.n:,})"
    )


def points_text(estimate: Estimate) -> str:
    """Return a loss as text: how many percentage points an accuracy is lower, or higher if the loss is negative, with
    the confidence interval and the sample size.

    >>> points_text(Estimate(0.021, 0.004, 0.038, 500)), points_text(Estimate(-0.009, -0.021, 0.003, 500))
    ('2.1 points lower (0.4 to 3.8, n = 500)', '0.9 points higher (-0.3 to 2.1, n = 500)')
    """
    low, value, high = (100 * end for end in (estimate.low, estimate.value, estimate.high))
    direction = "lower"
    if value < 0:
        low, value, high, direction = -high, -value, -low, "higher"
    return f"{value:.1f} points {direction} ({low:.1f} to {high:.1f}, n = {estimate.n:,})"
