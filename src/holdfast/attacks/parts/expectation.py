"""Classifiers whose inputs are transformed at random, as between a print and a camera, so that attacks on them maximise
the expected success (expectation over transformation).

Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018, arXiv:1707.07397. Each call samples a new
transformation for each row, so that any attack maximises the expectation. The harness evaluates the model by votes like
every randomised model. Differs from the paper: the whole input is printed, and amounts are uniform in a range around 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.image_transforms import transformed
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs

_AXES = {"shift": ("shift_x", "shift_y"), "perspective": ("perspective_x", "perspective_y")}


class Transformed(nn.Module):
    """Network that applies a random transformation to each input before it calls a classifier. The amount of a
    transformation is at most its limit, in both directions.

    The limits are those of `holdfast.attacks.parts.image_transforms`, and `noise`, the standard deviation of the noise
    that a printer or sensor adds to every value, as a fraction of the box's width. Random numbers are those of torch's
    generator.
    """

    def __init__(self, model: Classifier, limits: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self.limits = dict(limits)

    def forward(self, x: Inputs) -> Tensor:
        """Return the logits of the inputs, each of which is transformed at random first."""
        bounds, amounts = self.model.bounds, {}
        for name, limit in self.limits.items():
            for axis in _AXES.get(name, (name,)) if name != "noise" else ():
                amounts[axis] = limit * (2 * torch.rand(len(x), device=x.device, dtype=x.dtype) - 1)
        view = transformed(x, amounts, bounds)
        if "noise" in self.limits:
            low, high = bounds.like(x)
            view = bounds.clamp(view + self.limits["noise"] * (high - low) * torch.randn_like(x))
        logits: Tensor = self.model(view)
        return logits


def seen_through(model: Classifier, limits: Mapping[str, float]) -> Classifier:
    """Return a classifier that transforms its inputs at random before it calls `model`, with the same bounds, classes
    and access.
    """
    wrapped = Classifier(
        Transformed(model, limits), bounds=model.bounds, classes=model.classes, access=model.access
    )
    wrapped.hides, wrapped.batches, wrapped.rejects = model.hides, model.batches, model.rejects
    wrapped.remote, wrapped.class_names = model.remote, model.class_names
    wrapped.class_labels, wrapped.feature_names = model.class_labels, model.feature_names
    wrapped.failing = model.failing
    return wrapped


def inner(model: Classifier) -> Classifier:
    """Return the classifier without the random transformations of its inputs. A classifier that has none is returned
    unchanged.
    """
    return model.net.model if isinstance(model.net, Transformed) else model
