"""Metrics of the detector of a model: how well it separates attacked from clean inputs, and how many misclassified
inputs it accepts.

An attacked input counts as positive only if the network alone misclassifies it and classifies its clean input
correctly; for other inputs there is nothing to detect. Thresholds are computed on the clean inputs of the sample, so
that the intervals describe only the attacked ones. Carlini & Wagner, "Adversarial examples are not easily detected",
AISec 2017, arXiv:1705.07263, for attackers that know the detector; Tramèr, ICML 2022, arXiv:2107.11630, for robust
accuracy with rejection.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask, PerExample
from holdfast.metrics.columns import Absent, column
from holdfast.metrics.names import DETECTION, PERCENTS, at_percent
from holdfast.statistics.conformal import fewest_examples
from holdfast.statistics.detection_rates import auroc as area_under_roc
from holdfast.statistics.detection_rates import threshold
from holdfast.statistics.intervals import proportion

Attacker = Literal["aware", "oblivious"]
_MEASURABLE = 0.01
"""false positive rate below which a sample may have too few clean inputs"""
_WAY_OUT = (
    "it needs holdfast.with_detector(net, detector, ...), a named suite, access to gradients and no target"
)


def _scores(evidence: Evidence, of: Attacker) -> tuple[PerExample, PerExample, Mask]:
    """Return clean and attacked scores of all examples, and the mask of those that the attacker broke."""
    attacked = column(evidence, f"{of}_score", _WAY_OUT)
    return evidence["score"], attacked, (evidence["class_margin"] > 0) & (attacked < torch.inf)


def _fooled(evidence: Evidence, of: Attacker) -> tuple[PerExample, PerExample]:
    clean, attacked, broken = _scores(evidence, of)
    if not broken.any():
        raise Absent("no attacked input was misclassified by the network, so there is nothing to detect")
    return clean[broken], attacked[broken]


def auroc_estimate(evidence: Evidence, *, of: Attacker = "aware") -> Estimate:
    """Return the area under the ROC curve of a detector: the probability that its score is higher for an attacked input
    than for a clean one.
    """
    return area_under_roc(*_fooled(evidence, of))


def rate_estimate(evidence: Evidence, *, false_positives: float, of: Attacker = "aware") -> Estimate:
    """Return the detection rate: the share of attacked inputs that the detector rejects at the threshold with a given
    false positive rate.

    `false_positives` is a fraction of the clean inputs.
    """
    attacked = _fooled(evidence, of)[1]
    return proportion(attacked > _limit(evidence["score"], false_positives))


def accepted_right(evidence: Evidence, *, false_positives: float) -> Estimate:
    """Return robust accuracy with rejection: the share of examples that are classified correctly and accepted when
    clean, and for which no attacked input is accepted and misclassified.

    The threshold rejects the fraction `false_positives` of the clean inputs.
    """
    clean, attacked, _ = _scores(evidence, "aware")
    limit = _limit(clean, false_positives)
    return proportion((evidence["class_margin"] > 0) & (clean <= limit) & (attacked > limit))


def accepted_wrong(evidence: Evidence, *, false_positives: float) -> Estimate:
    """Return the share of examples for which a clean or attacked input is misclassified and accepted by the detector.

    The threshold rejects the fraction `false_positives` of the clean inputs.
    """
    clean, attacked, _ = _scores(evidence, "aware")
    return proportion(attacked <= _limit(clean, false_positives))


def _limit(clean: PerExample, false_positives: float) -> float:
    """The threshold with a false positive rate. Rates below 1 % need enough clean inputs to distinguish them from 0."""
    least = fewest_examples(false_positives)
    if false_positives < _MEASURABLE and len(clean) < least:
        raise Absent(
            f"a false positive rate of {100 * false_positives:g} % is measured on {least:,} clean inputs or more, and "
            f"the sample has {len(clean):,}"
        )
    return threshold(clean, false_positives)


def _at_rates() -> Mapping[str, Callable[[Evidence], Estimate]]:
    metrics: dict[str, Callable[[Evidence], Estimate]] = {
        "detection_auroc": auroc_estimate,
        "oblivious_detection_auroc": partial(auroc_estimate, of="oblivious"),
    }
    for percent in PERCENTS:
        rate = float(percent) / 100
        metrics |= {
            at_percent("detection_rate", percent): partial(rate_estimate, false_positives=rate),
            at_percent("oblivious_detection_rate", percent): partial(
                rate_estimate, false_positives=rate, of="oblivious"
            ),
            at_percent("accepted_right", percent): partial(accepted_right, false_positives=rate),
            at_percent("accepted_wrong", percent): partial(accepted_wrong, false_positives=rate),
        }
    return {name: metrics[name] for name in DETECTION}


DETECTION_METRICS: Final = _at_rates()
"""metrics of a detector by name"""
