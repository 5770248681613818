"""What an explanation is about, and its values as text: classes, features, distances and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.constraints import L0, Constraint, Linf
from holdfast.core.model import Classifier
from holdfast.explanation.explained import Picture
from holdfast.reports.curves import class_name
from holdfast.reports.gallery import is_image, png, shrunk
from holdfast.reports.numbers import plain

_BLUE, _RED = (0.13, 0.40, 0.67), (0.70, 0.09, 0.17)


@dataclass(frozen=True)
class About:
    """What an explanation is about."""

    model: str
    """name of the model"""
    data: str
    """name of the data"""
    threat: str
    """the threat model in the syntax of the command line"""
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """names of the columns of a table; empty for other inputs"""
    seed: int = 0
    digest: str = ""
    """digest of the model"""
    notes: tuple[str, ...] = ()

    def name_of(self, label: int) -> str:
        """Return the name of a class; "rejected" for -1."""
        return "rejected" if label < 0 else class_name(label, self.classes)

    def feature(self, place: int) -> str:
        """Return the name of a column, or its position if it has no name."""
        return self.features[place] if place < len(self.features) else f"feature {place}"

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Names and values for the end of the page."""
        digest = f", digest {self.digest[:16]}" if self.digest else ""
        return (
            ("model", f"{self.model}{digest}"),
            ("data", self.data),
            ("threat", self.threat),
            ("seed", str(self.seed)),
        )


def distance_text(constraint: Constraint, distance: float, model: Classifier) -> str:
    """Return a distance as text, as in `0.8/255`."""
    if isinstance(constraint, Linf) and model.units is None and _of_pixels(model):
        return f"{plain(distance * 255, 2 if distance * 255 < 10 else 3)}/255"
    if isinstance(constraint, L0):
        return f"{distance:.0f} changed {constraint.per}{'' if distance == 1 else 's'}"
    if constraint.name in ("table", "text"):
        eps = constraint.eps
        return f"{100 * distance / eps:.3g} % of the budget" if eps else plain(distance)
    return plain(distance, 3)


def _of_pixels(model: Classifier) -> bool:
    low, high = model.bounds.low, model.bounds.high
    return not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low, high) == (0.0, 1.0)


def picture(x: Tensor, caption: str, model: Classifier) -> Picture:
    """Return the picture of an image (channels, height, width)."""
    low, high = (torch.as_tensor(side) for side in (model.bounds.low, model.bounds.high))
    return Picture(png(shrunk(((x - low) / (high - low)).float())), caption)


def signed_picture(values: Tensor, caption: str, scale: float | None = None) -> Picture:
    """Return the picture of values (height, width), red if positive, blue if negative and white if 0.

    `scale` is the absolute value with full colour; without it, it is the largest one.
    """
    size = float(values.abs().max()) if scale is None else scale
    share = (values / size if size > 0 else values * 0).clamp(-1, 1).float()
    colour = torch.where(
        share[None] >= 0, torch.tensor(_RED)[:, None, None], torch.tensor(_BLUE)[:, None, None]
    )
    return Picture(png(shrunk(1 - share.abs()[None] * (1 - colour))), caption)


def plane(values: Tensor) -> Tensor:
    """Return values of an image (channels, height, width) summed over the channels."""
    return values.sum(0) if values.dim() == 3 else values


def is_picture(shape: Sequence[int]) -> bool:
    """Return whether inputs of a shape are shown as pictures."""
    return is_image(shape)


def percent(share: float) -> str:
    """Return a fraction as a percentage without decimal places, or with one if it is below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
