"""The model with the stateless detectors of a guard as one network that rejects inputs, so that attacks can evaluate
both together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.core.errors import UsageError
from holdfast.core.guard import with_detector
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, PerExample
from holdfast.guard.detectors.mahalanobis import Observation
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.rules import InputDefence


class Defended(nn.Module):
    """Network that squeezes its inputs, as the guard does, before it calls a classifier."""

    def __init__(self, model: Classifier, defence: InputDefence | None) -> None:
        super().__init__()
        self.model, self.defence = model, defence

    def forward(self, x: Inputs) -> Tensor:
        """Return the logits (n, classes) of the squeezed inputs."""
        logits: Tensor = self.model(x if self.defence is None else self.defence(x))
        return logits


class CombinedDetector(nn.Module):
    """The largest score of some stateless detectors, each relative to its threshold and in units of its standard
    deviation on benign inputs. It is positive if a detector fires, and differentiable where the detectors are.

    It costs one forward pass, and those of its detectors.
    """

    def __init__(
        self, model: Classifier, pipeline: GuardPipeline, scales: dict[str, float], rules: Sequence[str]
    ) -> None:
        super().__init__()
        self.model, self.pipeline, self.scales, self.rules = model, pipeline, scales, tuple(rules)

    def forward(self, x: Inputs) -> PerExample:
        """Return the scores (n,)."""
        x = x if self.pipeline.defence is None else self.pipeline.defence(x)
        seen = Observation(x, self.model(x), network=self.model)
        parts = [
            (self.pipeline.detectors[name](seen) - self.pipeline.rules[name].threshold)
            / self.scales.get(name, 1.0)
            for name in self.rules
        ]
        return torch.stack(parts).amax(0)


def rejecting(
    model: Classifier, pipeline: GuardPipeline, scales: dict[str, float], rule: str | None = None
) -> Classifier:
    """Return a classifier with an additional class "rejected", which it predicts where a stateless detector of the
    guard fires, whatever the mode and the action of its rule.

    `scales` are the standard deviations of the scores of benign inputs, by rule. With `rule`, only that rule is used.
    Raises `UsageError` without a stateless detector, for one without a threshold, and for one that needs features.
    """
    rules = [name for name in pipeline.rules if name in pipeline.detectors and rule in (None, name)]
    if not rules:
        known = ", ".join(pipeline.detectors) or "none"
        what = "no stateless detector" if rule is None else f"no detector {rule!r}"
        raise UsageError(f"the guard has {what}, as energy; it has {known}")
    for name in rules:
        if pipeline.rules[name].threshold == torch.inf:
            raise UsageError(
                f"the rule {name} of the guard has no threshold; run holdfast calibrate first, or give a threshold"
            )
        if "features" in pipeline.detectors[name].needs:
            raise UsageError(
                f"the rule {name} needs features, which an assessment does not have; set on: logits, or name another "
                "rule"
            )
    net = with_detector(
        Defended(model, pipeline.defence), CombinedDetector(model, pipeline, scales, rules), 0.0
    )
    wrapped = Classifier(net, bounds=model.bounds, classes=model.classes, access=model.access)
    wrapped.hides, wrapped.batches, wrapped.class_names = model.hides, model.batches, model.class_names
    wrapped.class_labels, wrapped.feature_names = model.class_labels, model.feature_names
    wrapped.failing = model.failing
    return wrapped
