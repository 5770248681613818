"""A model seen through random transformations, as a camera sees what was printed: expectation over transformation.

Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018, arXiv:1707.07397. Each call draws anew for every
row, so that any attack climbs the expectation, and the harness judges by votes as it does every randomised model.
Differs from the paper: what is printed is the whole input, and amounts are uniform in a range about nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from holdfast.core.model import Classifier
from holdfast.core.types import Inputs
from holdfast.ops.transformations import transformed

_AXES = {"shift": ("shift_x", "shift_y"), "perspective": ("perspective_x", "perspective_y")}


class Transformed(nn.Module):
    """A classifier behind random transformations, each drawn uniformly up to its limit, either way.

    The limits are those of `holdfast.ops.transformations`, and `noise`, the standard deviation of what a printer or a
    sensor adds to every value, as a share of the box's width. Draws come from torch's own generator.
    """

    def __init__(self, model: Classifier, limits: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self.limits = dict(limits)

    def forward(self, x: Inputs) -> Tensor:
        """Logits of the inputs, each transformed by a draw of its own."""
        bounds, amounts = self.model.bounds, {}
        for name, far in self.limits.items():
            for axis in _AXES.get(name, (name,)) if name != "noise" else ():
                amounts[axis] = far * (2 * torch.rand(len(x), device=x.device, dtype=x.dtype) - 1)
        seen = transformed(x, amounts, bounds)
        if "noise" in self.limits:
            low, high = bounds.like(x)
            seen = bounds.clamp(seen + self.limits["noise"] * (high - low) * torch.randn_like(x))
        logits: Tensor = self.model(seen)
        return logits


def seen_through(model: Classifier, limits: Mapping[str, float]) -> Classifier:
    """The classifier behind random transformations, with the same bounds, classes and access."""
    behind = Classifier(
        Transformed(model, limits), bounds=model.bounds, classes=model.classes, access=model.access
    )
    behind.hides, behind.batches, behind.rejects = model.hides, model.batches, model.rejects
    behind.remote, behind.class_names = model.remote, model.class_names
    behind.class_labels, behind.feature_names = model.class_labels, model.feature_names
    return behind


def inner(model: Classifier) -> Classifier:
    """The classifier behind transformations, or the one that is given."""
    return model.net.model if isinstance(model.net, Transformed) else model
