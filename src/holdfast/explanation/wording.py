"""What an explanation is about, and its values as text: classes, features, distances and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from holdfast.core.constraints import Constraint
from holdfast.core.model import Classifier
from holdfast.core.names import in_255ths
from holdfast.core.texts import decoded
from holdfast.core.types import Access
from holdfast.reports.curves import class_name
from holdfast.reports.gallery import png, shrunk
from holdfast.reports.numbers import plain
from holdfast.reports.tree import Picture
from holdfast.reports.words import amount
from holdfast.threats.domains import TABLE, TEXT

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
    examples: bool = True
    """whether pictures and words of examples are shown"""

    def name_of(self, label: int) -> str:
        """Return the name of a class; "rejected" for -1."""
        return "rejected" if label < 0 else class_name(label, self.classes)

    def called(self, label: int) -> str:
        """Return a class for a sentence: its name in quotation marks, or its number."""
        return f"“{self.name_of(label)}”" if 0 <= label < len(self.classes) else self.name_of(label)

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
    """Return a distance as text in the unit of eps, such as `0.8/255` under `linf:8/255`."""
    if constraint.bounds_each_value and model.units is None and in_255ths(constraint.eps):
        return f"{plain(distance * 255, 2 if distance * 255 < 10 else 3)}/255"
    if constraint.counts_changes:
        return amount(round(distance), "pixels" if constraint.counts_pixels else "values")
    if constraint.domain is TABLE:
        return f"{percent(distance / constraint.eps)} of the budget" if constraint.eps else plain(distance)
    return plain(distance)


def allowed_text(about: About, constraint: Constraint, model: Classifier) -> str:
    """Return what the threat model allows, such as `linf:8/255 allows 8/255`."""
    if not math.isfinite(constraint.eps):
        return f"{about.threat} allows changes of any size"
    return f"{about.threat} allows {distance_text(constraint, constraint.eps, model)}"


def certifiable(constraint: Constraint, access: Access) -> bool:
    """Return whether `holdfast certify` applies to a network under a constraint."""
    return constraint.in_input_units and access == "gradients"


def training_advice(about: About, constraint: Constraint, access: Access) -> str:
    """Return how a more robust model is trained."""
    if constraint.domain is TEXT:
        return (
            "Train a more robust model, if it is a network or a pipeline that ends with a linear classifier: holdfast "
            f"harden MODEL DATA --fit TRAIN --threat {about.threat} --recipe masked-words."
        )
    if access != "gradients":
        return (
            "Train a network (holdfast harden), or train the model with changed examples as well: holdfast assess "
            "--save-adversarial stores them. A model without gradients is not hardened by Holdfast."
        )
    return f"Train a more robust model: holdfast harden MODEL DATA --threat {about.threat} --budget 10min."


def changed_words(x: Tensor, x_adv: Tensor) -> list[tuple[str, str]]:
    """Return the words of a text (1, length) that differ from those of another, each with its replacement. An appended
    word replaces an empty one.
    """
    before, after = (decoded(text)[0].split() for text in (x, x_adv))
    return [(a, b) for a, b in zip_longest(before, after, fillvalue="") if a != b]


def listed(texts: Sequence[str], most: int = 3, noun: str = "others") -> str:
    """Return texts as a list in a sentence, of which at most `most` are named.

    >>> listed(["a"]), listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], 2, "more words")
    ('a', 'a, b and c', 'a, b and 2 more words')
    """
    shown = [*texts[:most]] + ([amount(len(texts) - most, noun)] if len(texts) > most else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def picture(x: Tensor, caption: str, model: Classifier) -> Picture:
    """Return the picture of an image (channels, height, width)."""
    low, high = (torch.as_tensor(side) for side in (model.bounds.low, model.bounds.high))
    return Picture(png(shrunk(((x.cpu() - low.cpu()) / (high - low).cpu()).float())), caption)


def signed_picture(values: Tensor, caption: str, scale: float | None = None) -> Picture:
    """Return the picture of values (height, width), red if positive, blue if negative and white if 0.

    `scale` is the absolute value with full colour; without it, it is the largest one.
    """
    values = values.cpu()
    size = float(values.abs().max()) if scale is None else scale
    share = (values / size if size > 0 else values * 0).clamp(-1, 1).float()
    colour = torch.where(
        share[None] >= 0, torch.tensor(_RED)[:, None, None], torch.tensor(_BLUE)[:, None, None]
    )
    return Picture(png(shrunk(1 - share.abs()[None] * (1 - colour))), caption)


def plane(values: Tensor) -> Tensor:
    """Return values of an image (channels, height, width) summed over the channels."""
    return values.sum(0) if values.dim() == 3 else values


def percent(share: float) -> str:
    """Return a fraction as a percentage without decimal places, or with one if it is below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
