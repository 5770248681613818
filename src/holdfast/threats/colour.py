"""Changes of the colours of images as a constraint, such as `colour:hue=18` in threat models.

Hsiung et al., "Towards Compositional Adversarial Robustness", CVPR 2023, arXiv:2202.04235.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.types import Fraction, NonNegative
from holdfast.threats.transformations import Transformation


@dataclass(frozen=True)
class Colour(Transformation):
    """Constraint that allows changes of the hue, saturation, brightness and contrast of an image, each up to a
    limit.
    """

    name: ClassVar[str] = "colour"

    hue: NonNegative = 0.0
    """largest rotation of the hue in degrees, in both directions"""
    saturation: Fraction = 0.0
    """largest fraction by which colours may become stronger or paler"""
    brightness: Fraction = 0.0
    """largest change in both directions, as a fraction of the width of the box"""
    contrast: Fraction = 0.0
    """largest fraction by which differences from the mean brightness may grow or shrink"""

    def resized(self, eps: float) -> "Colour":
        """Return the constraint with the limit of every colour change multiplied by `eps`."""
        shares = (min(share * eps, 1.0) for share in (self.saturation, self.brightness, self.contrast))
        return Colour(self.hue * eps, *shares)
