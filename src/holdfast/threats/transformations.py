"""Changes of images as constraints: rotations and shifts, colours, and common corruptions; and the base classes
of constraints that are no balls.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.remedies import Remedy
from holdfast.core.types import Fraction, Inputs, NonNegative, PerExample
from holdfast.threats.domains import refuse_no_images
from holdfast.threats.parsing import MOST_SCALED, refuse_mixed


class Whole(Constraint):
    """Base class of constraints that change an input as a whole, such as rotations, under which attacks on single input
    values raise `UsageError`.
    """

    @abstractmethod
    def refusal(self) -> UsageError:
        """Return the error for an attack on single input values, which cannot be used under such a constraint."""

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise an error, because an attack that projects cannot be used: no nearest allowed input can be computed."""
        raise self.refusal()

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise an error, because an attack that steps along gradients cannot be used under this constraint."""
        raise self.refusal()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Raise an error, because the constraint has no ball from which a random input could be sampled."""
        raise self.refusal()


_COLOURED = ("hue", "saturation")
"""transformations that need three channels"""


class Transformation(Whole):
    """Base class of the constraints under which images are transformed as a whole. Their fields are the limits."""

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Limits of the transformations by their names in the threat string, without those that are 0."""
        named = {name: float(value) for name, value in vars(self).items()}
        return {name: limit for name, limit in named.items() if limit > 0}

    @property
    def axes(self) -> Mapping[str, float]:
        """Largest amount of each transformation in both directions, by name; the same as `limits`."""
        return {name: float(limit) for name, limit in self.limits.items()}

    def without_surrogates(self) -> str:
        """Return why surrogates are not used: images are transformed as a whole."""
        return f"under {self}, because whole images are transformed"

    def refuse_unfit(self, x: Inputs) -> None:
        """Raise `UsageError` if inputs are not images with the channels that the transformations need."""
        if x.dim() != 4:
            raise UsageError(
                f"a change of {', '.join(self.limits)} needs images (channels, height, width); the inputs "
                f"have shape {tuple(x.shape[1:])}"
            )
        coloured = [name for name in _COLOURED if name in self.limits]
        if coloured and x.shape[1] != 3:
            raise UsageError(
                f"a change of {' and '.join(coloured)} needs three channels, red, green and blue; the "
                f"inputs have {x.shape[1]}, so "
                f"leave them out, as in colour:brightness=0.2,contrast=0.3"
            )

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example 1 if the image changed, else 0."""
        return (x_adv != x).flatten(1).any(1).to(x)

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint. Its message names the attacks that
        transform images.
        """
        suited = "Flow" if "flow" in self.limits else "GridSearch or TransformPGD"
        return UsageError(
            f"under {self} an attack transforms whole images, but this attack changes single values; choose "
            f"{suited}, or a threat such as linf:8/255"
        )


@dataclass(frozen=True)
class Spatial(Transformation):
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
    def axes(self) -> Mapping[str, float]:
        """Largest amount of each transformation in both directions, by the names that
        `holdfast.attacks.parts.images` uses, such as `shift_x`.
        """
        along = {"shift": ("shift_x", "shift_y")}
        return {axis: limit for name, limit in super().axes.items() for axis in along.get(name, (name,))}

    def resized(self, eps: float) -> "Spatial":
        """Return the constraint with the limit of every transformation multiplied by `eps`."""
        return Spatial(
            self.rotate * eps, self.shift * eps, min(self.scale * eps, MOST_SCALED), self.flow * eps
        )


def expect_transformations(constraint: Constraint, attack: object) -> Transformation:
    """Return the constraint if it allows rotations, shifts or colour changes of images. Raises `UsageError`
    otherwise.
    """
    if isinstance(constraint, Transformation) and "flow" not in constraint.limits:
        return constraint
    raise UsageError(
        f"{type(attack).__name__} rotates, shifts or recolours images; the threat model is {constraint}. "
        f"Choose a threat such as spatial:rotate=30,shift=3 or colour:hue=18,saturation=0.3"
    )


def expect_flow(constraint: Constraint, attack: object) -> float:
    """Return the largest displacement of a pixel if the constraint allows displacements of pixels. Raises `UsageError`
    otherwise.
    """
    if isinstance(constraint, Spatial) and constraint.flow:
        return constraint.flow
    raise UsageError(
        f"{type(attack).__name__} displaces the pixels of images; the threat model is {constraint}. "
        f"Choose a threat such as spatial:flow=1.5"
    )


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


@dataclass(frozen=True)
class Corruptions(Whole):
    """Constraint of one common corruption of an image, such as fog, at a severity from 1 to 5. The severity is `eps`.

    There is no ball: any image inside the box is allowed, since only corruptions run under this constraint and every
    other attack raises `UsageError`. The corruptions are in `holdfast.corruptions`.
    """

    name: ClassVar[str] = "corruptions"
    judges_misclassified: ClassVar[bool] = True
    drawn_at_random: ClassVar[bool] = True

    severity: int = 3

    def without_surrogates(self) -> str:
        """Return why surrogates are not used: a corruption uses no model."""
        return "under common corruptions"

    def refuse_unfit(self, x: Inputs) -> None:
        """Raise `UsageError` if inputs are not images."""
        refuse_no_images(x)

    @property
    def eps(self) -> float:
        """Severity of the corruption, from 1 to 5."""
        return float(self.severity)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example the severity of the corruption if the image changed, else 0."""
        return self.eps * (x_adv != x).flatten(1).any(1).to(x)

    def resized(self, eps: float) -> "Corruptions":
        """Return the constraint of corruptions whose severity is the integer from 1 to 5 that is nearest to `eps`."""
        return Corruptions(round(min(max(eps, 1), 5)))

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint. Its message names the suite of
        corruptions.
        """
        return UsageError(
            f"under {self} images are corrupted, not attacked",
            Remedy("suite", "corruptions"),
            Remedy("threat", "linf:8/255"),
        )
