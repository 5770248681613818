"""Mahalanobis distance to the nearest class mean, on logits or on the features of an inner layer.

Lee, Lee, Lee & Shin, "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
NeurIPS 2018, arXiv:1807.03888.
Differs from the paper: one layer is used, and inputs are not preprocessed by a gradient step, so that no further pass
is needed. The covariance is shrunk towards a multiple of the identity, as features may be linearly dependent.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Fraction, Labels, PerExample
from holdfast.guard.detectors.detector_protocol import Need, Observation


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """The squared Mahalanobis distance of the logits or features of an input to the nearest class mean. It needs no
    further forward pass.
    """

    on: Literal["logits", "features"] = "logits"
    """vectors whose distance is measured: the logits, or the features that the application passes to the guard"""
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
        z = self._vectors(seen)
        difference = z[:, None] - self.means.to(z)
        return torch.einsum("nkd,de,nke->nk", difference, self.precision.to(z), difference).amin(1)

    def _vectors(self, seen: Observation) -> Tensor:
        if self.on == "logits":
            return seen.logits
        if seen.features is None:
            raise UsageError(
                "the Mahalanobis distance on features needs features; give them, as in "
                "guard.after(decision, outputs, features=z), or set on: logits"
            )
        return seen.features.flatten(1)
