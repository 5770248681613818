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
        logits: Tensor = self.model(self.view(x, len(x)))
        return logits

    def view(self, x: Inputs, n: int) -> Inputs:
        """Return the inputs behind `n` random transformations, one for each input or 1 for all of them."""
        bounds, amounts = self.model.bounds, {}
        for name, limit in self.limits.items():
            for axis in _AXES.get(name, (name,)) if name != "noise" else ():
                drawn = limit * (2 * torch.rand(n, device=x.device, dtype=x.dtype) - 1)
                amounts[axis] = drawn.expand(len(x))
        view = transformed(x, amounts, bounds)
        if "noise" in self.limits:
            low, high = bounds.like(x)
            noise = torch.randn(n, *x.shape[1:], device=x.device, dtype=x.dtype)
            view = bounds.clamp(view + self.limits["noise"] * (high - low) * noise)
        return view


class MeanView(nn.Module):
    """Network that returns the logarithms of the mean class probabilities over `draws` transformations of a
    `Transformed`, which are the same for all inputs and in all calls, so that the outputs are not random.
    """

    def __init__(self, random: Transformed, draws: int, seed: int) -> None:
        super().__init__()
        self.random, self.draws, self.seed = random, draws, seed

    def forward(self, x: Inputs) -> Tensor:
        """Return the logarithms of the mean probabilities. Cost: `draws` passes."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            views = [self.random.view(x, 1) for _ in range(self.draws)]
        mean = torch.stack([self.random.model(view).softmax(1) for view in views]).mean(0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


def seen_through(model: Classifier, limits: Mapping[str, float]) -> Classifier:
    """Return a classifier that transforms its inputs at random before it calls `model`, with the same bounds, classes
    and access.
    """
    return _around(model, Transformed(model, limits))


def averaged_views(model: Classifier, draws: int, seed: int) -> Classifier:
    """Return a classifier with random transformations of its inputs as the mean over `draws` fixed transformations."""
    assert isinstance(model.net, Transformed)
    return _around(model, MeanView(model.net, draws, seed))


def _around(model: Classifier, net: nn.Module) -> Classifier:
    """A network that calls a classifier, as a classifier with the same properties."""
    wrapped = Classifier(net, bounds=model.bounds, classes=model.classes, access=model.access)
    wrapped.hides, wrapped.batches, wrapped.rejects = model.hides, model.batches, model.rejects
    wrapped.remote, wrapped.class_names = model.remote, model.class_names
    wrapped.class_labels, wrapped.feature_names = model.class_labels, model.feature_names
    wrapped.failing = model.failing
    return wrapped


def inner(model: Classifier) -> Classifier:
    """Return the classifier without the random transformations of its inputs, or their mean. A classifier that has
    none is returned unchanged.
    """
    net = model.net.random if isinstance(model.net, MeanView) else model.net
    return net.model if isinstance(net, Transformed) else model
