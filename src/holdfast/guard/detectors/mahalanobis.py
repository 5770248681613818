"""Mahalanobis distance to the nearest class mean, on logits, on the features of an inner layer, or on inputs.

Lee, Lee, Lee & Shin, "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
NeurIPS 2018, arXiv:1807.03888.
Differs from the paper: one layer is used, and inputs are not preprocessed by a gradient step, so that no further pass
is needed. The covariance is shrunk towards a multiple of the identity, as features may be linearly dependent. Inputs
that are images are averaged over the cells of a grid. They are far from the means if cells change that are nearly equal
in benign images, such as the background of digits, which coarse patterns change (`patterns.py`).
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Fraction, Labels, PerExample
from holdfast.guard.detectors.detector_protocol import Need, Observation
from holdfast.guard.detectors.fingerprints import grid_of

_CELLS = 200  # largest number of cells of an image, as in the query detector


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """The squared Mahalanobis distance of the logits or features of an input, or of the input itself, to the nearest
    class mean. It needs no further forward pass.
    """

    on: Literal["logits", "features", "inputs"] = "logits"
    """vectors whose distance is measured: the logits, the features that the application passes to the guard, or the
    inputs"""
    layer: str | None = None
    """module of the network whose output are the features, as in layer4; the guard computes them with it"""
    shrinkage: Fraction = 0.01
    """weight of the identity in the covariance"""
    means: Tensor | None = field(default=None, metadata={"written": False})
    """class means (classes, d), float32; None before the fit"""
    precision: Tensor | None = field(default=None, metadata={"written": False})
    """inverse of the covariance (d, d) that the classes share, float32"""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the detector needs besides inputs and logits."""
        return ("fit", "features") if self.on == "features" else ("fit",)

    @property
    def fitted(self) -> bool:
        """Whether the class means have been estimated."""
        return self.means is not None

    def fit(self, seen: Observation, y: Labels) -> "Mahalanobis":
        """Return the detector with class means and covariance estimated from clean examples.

        Classes without an example are left out. Raises `UsageError` if there are fewer than two examples.
        """
        z = self._vectors(seen).double()
        if len(z) < 2:
            raise UsageError(f"the Mahalanobis distance is fitted on {len(z)} examples; give at least 2")
        classes, codes = torch.unique(y, return_inverse=True)
        counts = torch.bincount(codes, minlength=len(classes))
        means = z.new_zeros(len(classes), z.shape[1]).index_add_(0, codes, z) / counts[:, None]
        centred = z - means[codes]
        covariance = centred.T @ centred / len(z)
        scale = float(covariance.diagonal().mean()) or 1.0
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * scale * torch.eye(
            len(covariance)
        ).double()
        return replace(self, means=means.float(), precision=torch.linalg.pinv(shrunk, hermitian=True).float())

    def __call__(self, seen: Observation) -> PerExample:
        """Return the squared distances (n,)."""
        if self.means is None or self.precision is None:
            raise UsageError(
                "the Mahalanobis distance has no class means yet; run guard.calibrate(model, data)"
            )
        centre, projected, lengths = self._projected
        z = self._vectors(seen)
        z = z - centre.to(z)
        squares = ((z @ self.precision.to(z)) * z).sum(1, keepdim=True)
        return (squares - 2 * z @ projected.to(z).T + lengths.to(z)).amin(1)

    @cached_property
    def _projected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of the class means (d), their differences from it times the precision (classes, d), and the squared
        lengths (classes) of these differences, so that each input needs one product with the precision.
        """
        assert self.means is not None and self.precision is not None
        means, precision = self.means, self.precision
        centre = means.mean(0)
        projected = (means - centre) @ precision
        return centre, projected, (projected * (means - centre)).sum(1)

    def _vectors(self, seen: Observation) -> Tensor:
        if self.on == "logits":
            return seen.logits
        if self.on == "inputs":
            grid = grid_of(seen.x.shape[1:], _CELLS)
            x = seen.x.float()
            return (x if grid is None else F.adaptive_avg_pool2d(x, grid)).flatten(1)
        if seen.features is None:
            raise UsageError(
                "the Mahalanobis distance on features needs features; give them, as in "
                "guard.after(decision, outputs, features=z), or set on: logits"
            )
        return seen.features.flatten(1)
