"""Transformations of images as what may change: the threats that are written `spatial:rotate=30` and `colour:hue=18`.

Engstrom et al., "Exploring the Landscape of Spatial Robustness", ICML 2019, arXiv:1712.02779, for the first, and Xiao
et al., "Spatially Transformed Adversarial Examples", ICLR 2018, arXiv:1801.02612, for its flow; Hsiung et al., "Towards
Compositional Adversarial Robustness", CVPR 2023, arXiv:2202.04235, for the second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from holdfast.core.errors import UsageError
from holdfast.core.names import MOST_SCALED, limits_text, refuse_mixed
from holdfast.core.types import Fraction, Inputs, NonNegative, PerExample
from holdfast.core.whole_image import Whole


@dataclass(frozen=True)
class Spatial(Whole):
    """Images turned, shifted and scaled, or bent, each by no more than its limit.

    There is no ball: any image inside the box counts as allowed, since only attacks that transform run under it, which
    draw on these limits alone, and every other attack is refused.
    """

    rotate: NonNegative = 0.0
    """degrees, either way"""
    shift: NonNegative = 0.0
    """pixels, along each side and either way"""
    scale: Fraction = 0.0
    """share by which an image may grow or shrink, at most 0.9"""
    flow: NonNegative = 0.0
    """pixels that each pixel may come from, in any direction; alone, since no attack searches both at once"""

    def __post_init__(self) -> None:
        refuse_mixed(self.limits)
        if self.scale > MOST_SCALED:
            raise UsageError(
                f"scale={self.scale:g} leaves nothing of an image; expected at most {MOST_SCALED:g}"
            )

    @property
    def eps(self) -> float:
        """All of what is allowed."""
        return 1.0

    @property
    def limits(self) -> Mapping[str, float]:
        """What may be done, as it is written, and how far."""
        return _limits(self)

    @property
    def axes(self) -> Mapping[str, float]:
        """The same, each direction apart: a name of `holdfast.ops.transformations` and how far it goes either way."""
        along = {"shift": ("shift_x", "shift_y")}
        return {axis: far for name, far in self.limits.items() for axis in along.get(name, (name,))}

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """1 where anything changed, else 0."""
        return _changed(x_adv, x)

    def refusal(self) -> UsageError:
        """Names the attacks that transform."""
        return _refusal(self)

    def resized(self, eps: float) -> "Spatial":
        """Every limit times `eps`."""
        return Spatial(
            self.rotate * eps, self.shift * eps, min(self.scale * eps, MOST_SCALED), self.flow * eps
        )

    def __str__(self) -> str:
        return limits_text("spatial", self.limits)


@dataclass(frozen=True)
class Colour(Whole):
    """Images with other colours, brighter or darker, each by no more than its limit; allowed as under `Spatial`."""

    hue: NonNegative = 0.0
    """degrees round the circle of colours, either way"""
    saturation: Fraction = 0.0
    """share by which colours may be stronger or paler"""
    brightness: Fraction = 0.0
    """share of the box's width, either way"""
    contrast: Fraction = 0.0
    """share by which differences from the mean brightness may be larger or smaller"""

    @property
    def eps(self) -> float:
        """All of what is allowed."""
        return 1.0

    @property
    def limits(self) -> Mapping[str, float]:
        """What may be done, and how far."""
        return _limits(self)

    @property
    def axes(self) -> Mapping[str, float]:
        """The same: colours have one direction each."""
        return self.limits

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """1 where anything changed, else 0."""
        return _changed(x_adv, x)

    def refusal(self) -> UsageError:
        """Names the attacks that transform."""
        return _refusal(self)

    def resized(self, eps: float) -> "Colour":
        """Every limit times `eps`."""
        shares = (min(share * eps, 1.0) for share in (self.saturation, self.brightness, self.contrast))
        return Colour(self.hue * eps, *shares)

    def __str__(self) -> str:
        return limits_text("colour", self.limits)


Transformations = Spatial | Colour
"""The threats under which images are transformed as wholes."""


def _limits(constraint: Transformations) -> dict[str, float]:
    named = {f.name: float(getattr(constraint, f.name)) for f in fields(constraint)}
    return {name: far for name, far in named.items() if far > 0}


def _changed(x_adv: Inputs, x: Inputs) -> PerExample:
    return (x_adv != x).flatten(1).any(1).to(x)


def _refusal(constraint: Transformations) -> UsageError:
    suited = "Flow" if "flow" in constraint.limits else "GridSearch or TransformPGD"
    return UsageError(
        f"under {constraint} images are transformed as wholes, and this attack changes values one by one; "
        f"choose {suited}, or a threat such as linf:8/255"
    )
