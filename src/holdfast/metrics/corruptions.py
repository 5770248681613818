"""Metrics of the accuracy of a model under common image corruptions, such as noise and blur.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
arXiv:1903.12261, for the mean corruption error (mCE). Differs from the paper: it uses the one severity of the run,
where the paper averages over five, and a baseline of the user's choice instead of AlexNet.
"""

from functools import partial
from typing import Final

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import PerExample
from holdfast.metrics.columns import Absent, column
from holdfast.metrics.names import CORRUPTIONS
from holdfast.metrics.paired import paired_examples
from holdfast.statistics.intervals import (
    CONFIDENCE,
    Support,
    bonferroni,
    bootstrap,
    complement,
    mean,
    proportion,
)

_WAY_OUT: Final = "use a threat such as corruptions:3"


def measured(evidence: Evidence) -> list[str]:
    """Return the names of the common corruptions under which a run evaluated the model."""
    return [name for name in CORRUPTIONS if f"{name}.right" in evidence]


def _right(evidence: Evidence) -> Tensor:
    """Whether each example is correct under each corruption, (corruptions, n)."""
    names = measured(evidence)
    if not names:
        raise Absent(f"this run measured none of the fifteen common corruptions; {_WAY_OUT}")
    return torch.stack([evidence[f"{name}.right"] for name in names])


def corrupted_accuracy(evidence: Evidence, *, name: str) -> Estimate:
    """Return the share of all examples that the model classifies correctly under the corruption `name`."""
    return proportion(column(evidence, f"{name}.right", _WAY_OUT))


def corruption_error_rate(evidence: Evidence) -> Estimate:
    """Return the error rate of the model under common corruptions, averaged over the corruptions that were measured."""
    return complement(mean(_right(evidence).double().mean(0)))


def worst_corruption(evidence: Evidence) -> Estimate:
    """Return the accuracy under the corruption with the lowest accuracy. The interval is corrected for the number of
    corruptions (Bonferroni).
    """
    right = _right(evidence)
    intervals = [proportion(row, bonferroni(CONFIDENCE, len(right))) for row in right]
    worst = min(intervals, key=lambda estimate: estimate.value)
    return Estimate(worst.value, min(e.low for e in intervals), min(e.high for e in intervals), worst.n)


def mce(evidence: Evidence, baseline: Evidence) -> Estimate:
    """Return the mean corruption error: the error rate under each corruption divided by that of the baseline, averaged
    over the corruptions.

    Raises `Absent` if the baseline has no error under a corruption, or measured other corruptions.
    """
    refuse_incomparable(evidence, baseline)
    shared = paired_examples(evidence, baseline)
    after, before = ~_right(evidence)[:, shared.first], ~_right(baseline)[:, shared.second]
    wrong = torch.stack((after, before)).double()

    def statistic(rows: Tensor) -> PerExample:
        errors = wrong[:, :, rows].mean(-1)
        # if the baseline makes no error in a resample, half an error is counted
        return (errors[0] / errors[1].clamp_min(0.5 / rows.shape[1])).mean(0)

    return bootstrap(statistic, len(shared), support=Support(0.0, float(2 * len(shared))))


def refuse_incomparable(evidence: Evidence, baseline: Evidence) -> None:
    """Raise `Absent`, with the reason and advice, if the mean corruption error (mCE) cannot be computed relative to
    this baseline.
    """
    _right(evidence)
    if measured(evidence) != measured(baseline):
        raise Absent(
            "mce needs a baseline with the same corruptions; assess both runs with the same corruptions"
        )
    wrong = ~_right(baseline)[:, paired_examples(evidence, baseline).second]
    spotless = [name for name, errors in zip(measured(baseline), wrong, strict=True) if not errors.any()]
    if spotless:
        raise Absent(
            f"mce has no value: the baseline makes no error under {', '.join(spotless)}, and a mean corruption error "
            "divides by its error rates; raise the severity, take more examples, or skip these corruptions"
        )


ACCURACIES = {f"{name}_accuracy": partial(corrupted_accuracy, name=name) for name in CORRUPTIONS}
"""functions for the accuracy under each corruption, by the names of the catalogue"""
