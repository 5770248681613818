"""What a detector is worth: how well it tells attacked inputs from clean ones, and what it lets be wrong.

An attacked input counts for a detector if the network alone has it wrong, and its clean one right: there is nothing to
detect of others. Thresholds are those of the clean inputs of the sample, so that the intervals are of the attacked ones
alone. Carlini & Wagner, "Adversarial examples are not easily detected", AISec 2017, arXiv:1705.07263, for attackers who
know the detector; Tramèr, ICML 2022, arXiv:2107.11630, for robust accuracy with rejection.
"""

from typing import Literal

import torch

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask, PerExample
from holdfast.metrics.columns import Absent, column
from holdfast.ops import detection
from holdfast.ops.statistics import proportion

Attacker = Literal["aware", "oblivious"]
_WAY_OUT = "holdfast.guarded(net, detector, ...), a named suite, gradients and no target bring it"


def _scores(evidence: Evidence, of: Attacker) -> tuple[PerExample, PerExample, Mask]:
    """Clean and attacked scores of all examples, and which of them that attacker turned wrong."""
    attacked = column(evidence, f"{of}_score", _WAY_OUT)
    return evidence["score"], attacked, (evidence["class_margin"] > 0) & (attacked < torch.inf)


def _fooled(evidence: Evidence, of: Attacker) -> tuple[PerExample, PerExample]:
    clean, attacked, turned = _scores(evidence, of)
    if not turned.any():
        raise Absent("no attacked input turned the network wrong, so the detector had nothing to detect")
    return clean[turned], attacked[turned]


def auroc(evidence: Evidence, confidence: float = 0.95, *, of: Attacker = "aware") -> Estimate:
    """Chance that an attacked input scores above a clean one."""
    return detection.auroc(*_fooled(evidence, of), confidence)


def rate(
    evidence: Evidence, confidence: float = 0.95, *, false_positives: float, of: Attacker = "aware"
) -> Estimate:
    """Share of attacked inputs rejected at the threshold that rejects so many of the clean ones."""
    attacked = _fooled(evidence, of)[1]
    return proportion(attacked > detection.threshold(evidence["score"], false_positives), confidence)


def accepted_right(evidence: Evidence, confidence: float = 0.95, *, false_positives: float) -> Estimate:
    """Robust accuracy with rejection at that threshold."""
    clean, attacked, _ = _scores(evidence, "aware")
    limit = detection.threshold(clean, false_positives)
    return proportion((evidence["class_margin"] > 0) & (clean <= limit) & (attacked > limit), confidence)


def accepted_wrong(evidence: Evidence, confidence: float = 0.95, *, false_positives: float) -> Estimate:
    """Share of examples of which an input, clean or attacked, is accepted and wrong at that threshold."""
    clean, attacked, _ = _scores(evidence, "aware")
    return proportion(attacked <= detection.threshold(clean, false_positives), confidence)
