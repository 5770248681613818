"""The result of an audit: its verdict, the numbers behind it, and the tables and pictures of its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from holdfast.core.estimate import Estimate
from holdfast.reports.gallery import LONGEST_SIDE, png, shrunk
from holdfast.reports.numbers import strict

Json = dict[str, Any]
AuditVerdict = Literal["flagged", "not flagged", "unclear"]
"""`unclear` if the audit had nothing to compare the model or the data with, or if clean models measure the same."""

_SMALLEST_SIDE = 56  # pixels; smaller images are enlarged so that single pixels can be seen


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]
    note: str = ""
    """what a reader needs in order to read the table; empty for none"""
    texts: bool = False
    """whether the columns after the first contain sentences instead of numbers, and are aligned left"""

    def to_json(self) -> Json:
        """Return the table as strict JSON."""
        content: Json = strict(
            {
                "title": self.title,
                "headings": list(self.headings),
                "rows": [list(row) for row in self.rows],
                "note": self.note,
                "texts": self.texts,
            }
        )
        return content


@dataclass(frozen=True)
class Picture:
    """Images of a report under one title."""

    title: str
    """what the images show, as a sentence that states the finding"""
    images: Tensor
    """values from 0 to 1 (n, channels, height, width), with 1 or 3 channels"""
    captions: Sequence[str]
    """text below each image, which is also its text alternative"""
    together: int = 1
    """number of successive images that are to be compared, and are shown side by side"""

    def to_json(self) -> Json:
        """Return the images as data URLs of PNG files, with their captions, as strict JSON."""
        images = [_enlarged(shrunk(image.detach().cpu().float())) for image in self.images]
        shown = [
            {"png": png(image), "caption": text} for image, text in zip(images, self.captions, strict=True)
        ]
        return {"title": self.title, "together": self.together, "images": shown}


@dataclass(frozen=True)
class Curve:
    """Lines of a report on two logarithmic axes, such as the true-positive rate for each false-positive rate."""

    title: str
    across: str
    """name of the horizontal axis"""
    upward: str
    """name of the vertical axis"""
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    """name and points of each line, with values from 0 to 1"""
    least: float
    """lowest value of both axes; lower values are drawn there"""
    note: str = ""

    def to_json(self) -> Json:
        """Return the curve as strict JSON."""
        content: Json = strict(
            {
                "title": self.title,
                "across": self.across,
                "upward": self.upward,
                "lines": [{"name": name, "points": [list(p) for p in points]} for name, points in self.lines],
                "least": self.least,
                "note": self.note,
            }
        )
        return content


def _enlarged(image: Tensor) -> Tensor:
    """A small image (channels, height, width) with each pixel repeated."""
    factor = min(-(-_SMALLEST_SIDE // min(image.shape[1:])), LONGEST_SIDE // max(image.shape[1:]))
    return image if factor <= 1 else interpolate(image[None], scale_factor=factor, mode="nearest")[0]


@dataclass(frozen=True)
class Finding:
    """What an audit found."""

    verdict: AuditVerdict
    headline: str
    """the result in one sentence"""
    reasons: Sequence[str] = ()
    """sentences that state what the verdict rests on"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """measured numbers for programs, as plain values by name"""
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    """estimates on which gates can be set, by name"""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    curves: Sequence[Curve] = ()
    limits: Sequence[str] = ()
    """sentences that state what the result does not show"""

    def to_json(self) -> Json:
        """Return the finding as strict JSON."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "reasons": list(self.reasons),
            "facts": strict(dict(self.facts)),
            "metrics": {name: strict(vars(estimate)) for name, estimate in self.metrics.items()},
            "tables": [table.to_json() for table in self.tables],
            "pictures": [picture.to_json() for picture in self.pictures],
            "curves": [curve.to_json() for curve in self.curves],
            "limits": list(self.limits),
        }


def in_unit_range(images: Tensor, low: float, high: float) -> Tensor:
    """Return images with values from `low` to `high` scaled to 0 to 1, for a `Picture`."""
    width = high - low or 1.0
    return torch.clamp((images - low) / width, 0, 1)
