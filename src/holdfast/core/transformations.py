"""Transformations of images as constraints, such as `spatial:rotate=30` and `colour:hue=18` in threat models.

Engstrom et al., "Exploring the Landscape of Spatial Robustness", ICML 2019, arXiv:1712.02779, for the first, and Xiao
et al., "Spatially Transformed Adversarial Examples", ICLR 2018, arXiv:1801.02612, for its flow; Hsiung et al., "Towards
Compositional Adversarial Robustness", CVPR 2023, arXiv:2202.04235, for the second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from holdfast.core.errors import UsageError
from holdfast.core.names import MOST_SCALED, limits_text, refuse_mixed
from holdfast.core.types import Fraction, Inputs, NonNegative, PerExample
from holdfast.core.whole_image import Whole


@dataclass(frozen=True)
class Spatial(Whole):
    """Constraint that allows rotations, shifts and scales of an image, or displacements of its pixels, each up to a
    limit.

    There is no ball: any image inside the box is allowed, since only attacks that transform images run under this
    constraint, and these respect the limits. Every other attack raises `UsageError`.
    """

    name: ClassVar[str] = "spatial"

    rotate: NonNegative = 0.0
    """largest rotation in degrees, in both directions"""
    shift: NonNegative = 0.0
    """largest shift in pixels, along each axis in both directions"""
    scale: Fraction = 0.0
    """largest fraction by which an image may grow or shrink, at most 0.9"""
    flow: NonNegative = 0.0
    """largest displacement of each pixel in pixels, in any direction; it excludes other limits, since no attack
    searches both"""

    def __post_init__(self) -> None:
        refuse_mixed(self.limits)
        if self.scale > MOST_SCALED:
            raise UsageError(
                f"scale={self.scale:g} is too large: almost nothing of an image would be left; expected at most "
                f"{MOST_SCALED:g}"
            )

    @property
    def eps(self) -> float:
        """Always 1, because the constraint has limits for each transformation instead of a radius."""
        return 1.0

    @property
    def limits(self) -> Mapping[str, float]:
        """Limits of the transformations by their names in the threat string, without those that are 0."""
        return _limits(self)

    @property
    def axes(self) -> Mapping[str, float]:
        """Largest amount of each transformation in both directions, by the names that
        `holdfast.attacks.parts.image_transforms` uses, such as `shift_x`.
        """
        along = {"shift": ("shift_x", "shift_y")}
        return {axis: limit for name, limit in self.limits.items() for axis in along.get(name, (name,))}

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example 1 if the image changed, else 0."""
        return _changed(x_adv, x)

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint. Its message names the attacks that
        transform images.
        """
        return _refusal(self)

    def resized(self, eps: float) -> "Spatial":
        """Return the constraint with the limit of every transformation multiplied by `eps`."""
        return Spatial(
            self.rotate * eps, self.shift * eps, min(self.scale * eps, MOST_SCALED), self.flow * eps
        )

    def __str__(self) -> str:
        return limits_text("spatial", self.limits)


@dataclass(frozen=True)
class Colour(Whole):
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

    @property
    def eps(self) -> float:
        """Always 1, because the constraint has limits for each colour change instead of a radius."""
        return 1.0

    @property
    def limits(self) -> Mapping[str, float]:
        """Limits of the colour changes by name, without those that are 0."""
        return _limits(self)

    @property
    def axes(self) -> Mapping[str, float]:
        """Largest amount of each colour change in both directions, by name; the same as `limits`."""
        return self.limits

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example 1 if the image changed, else 0."""
        return _changed(x_adv, x)

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint. Its message names the attacks that
        transform images.
        """
        return _refusal(self)

    def resized(self, eps: float) -> "Colour":
        """Return the constraint with the limit of every colour change multiplied by `eps`."""
        shares = (min(share * eps, 1.0) for share in (self.saturation, self.brightness, self.contrast))
        return Colour(self.hue * eps, *shares)

    def __str__(self) -> str:
        return limits_text("colour", self.limits)


Transformations = Spatial | Colour
"""constraints under which images are transformed as a whole"""


def _limits(constraint: Transformations) -> dict[str, float]:
    named = {f.name: float(getattr(constraint, f.name)) for f in fields(constraint)}
    return {name: limit for name, limit in named.items() if limit > 0}


def _changed(x_adv: Inputs, x: Inputs) -> PerExample:
    return (x_adv != x).flatten(1).any(1).to(x)


def _refusal(constraint: Transformations) -> UsageError:
    suited = "Flow" if "flow" in constraint.limits else "GridSearch or TransformPGD"
    return UsageError(
        f"under {constraint} an attack transforms whole images, but this attack changes single values; choose "
        f"{suited}, or a threat such as linf:8/255"
    )
