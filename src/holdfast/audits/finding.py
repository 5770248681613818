"""The result of an audit: its verdict, figures and pictures; and the features of a network that audits compare."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, Strict
from torch import Tensor, nn
from torch.nn.functional import interpolate

from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Logits
from holdfast.reports.gallery import LONGEST_SIDE, png, shrunk
from holdfast.reports.words import strict
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import SUFFIX, Form, validated, validated_columns
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import StoredStage

_ROWS = 500  # examples in one forward pass


@torch.no_grad()
def penultimate(model: Classifier, x: Inputs) -> tuple[Tensor, Logits]:
    """Return the inputs of the last linear layer (n, d), or of the last layer with parameters if there is none, and the
    logits, on the CPU. Inputs with pixels are averaged over their pixels.
    """
    layers = [module for module in model.modules() if [*module.parameters(recurse=False)]]
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0].flatten(2).mean(2) if inputs[0].dim() > 2 else inputs[0])

    hook = (linear or layers)[-1].register_forward_pre_hook(keep)
    try:
        logits = torch.cat([model(piece) for piece in torch.split(x, _ROWS)])
    finally:
        hook.remove()
    return torch.cat(kept).cpu().double(), logits.cpu().double()


Json = dict[str, Any]
AuditVerdict = Literal["flagged", "not flagged", "unclear"]
"""`unclear` if the audit had nothing to compare the model or the data with, or if clean models measure the same."""

PICTURES = "pictures"
"""Name of the stage with the images of an audit, the only part of its report that is not computed again."""
Images = Callable[[], Mapping[str, Tensor]]
"""Type of a function that returns the images (n, channels, height, width) of pictures by name, with values from 0 to 1;
it is called once the steps are stored"""
Measure = Callable[[Run], Images]
"""Type of a function that takes the steps of an audit"""
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


@dataclass(frozen=True)
class Picture:
    """The texts of images of a report under one title. The images are columns of the stage `PICTURES`."""

    name: str
    """name of the column with the images"""
    title: str
    """what the images show, as a sentence that states the finding"""
    captions: Sequence[str]
    """text below each image, which is also its text alternative"""
    together: int = 1
    """number of successive images that are to be compared, and are shown side by side"""


def image_columns(images: Mapping[str, Tensor]) -> Columns:
    """Return the columns of the stage `PICTURES`: images by the names of their pictures, as bytes and at most as large
    as a report shows them. Tensors that are no images with 1 or 3 channels are left out.
    """
    stored = {
        name: torch.stack(
            [
                (255 * shrunk(x.detach().cpu().float()).nan_to_num(0.5).clamp(0, 1)).round().byte()
                for x in each
            ]
        )
        for name, each in images.items()
        if len(each) and each.dim() == 4 and each.shape[1] in (1, 3)
    }
    return {"id": torch.arange(len(stored)), **stored}


def shown(picture: Mapping[str, Any], images: Tensor) -> Json:
    """Return a picture of a finding with its images as data URLs of PNG files, for a report."""
    pngs = [png(_enlarged(image.float() / 255)) for image in images]
    pairs = zip(pngs, picture["captions"], strict=True)
    return {
        "title": picture["title"],
        "together": picture["together"],
        "images": [{"png": content, "caption": caption} for content, caption in pairs],
    }


@dataclass(frozen=True)
class Line:
    """A line of a curve, with its name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Lines of a report on two logarithmic axes up to 1, such as the true-positive rate for each false-positive
    rate.
    """

    title: str
    across: str
    """name of the horizontal axis"""
    upward: str
    """name of the vertical axis"""
    lines: Sequence[Line]
    least: float
    """lowest value of both axes; lower values are drawn there"""
    note: str = ""


@dataclass(frozen=True)
class CountCurve:
    """Lines of a report that show fractions, such as an agreement, over counts on a logarithmic axis."""

    title: str
    across: str
    """name of the horizontal axis"""
    upward: str
    """name of the vertical axis"""
    lines: Sequence[Line]
    note: str = ""


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
    curves: Sequence[Curve | CountCurve] = ()
    limits: Sequence[str] = ()
    """sentences that state what the result does not show"""

    def to_json(self) -> Json:
        """Return the finding as strict JSON."""
        content: Json = strict(asdict(self))
        return content


def in_unit_range(images: Tensor, low: float, high: float) -> Tensor:
    """Return images with values from `low` to `high` scaled to 0 to 1, for a `Picture`."""
    width = high - low or 1.0
    return torch.clamp((images - low) / width, 0, 1)


Number = Annotated[float, Strict(), Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
"""finite number of a document, whose square is finite too"""
Share = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
Size = Annotated[int, Strict(), Field(ge=0, le=2**31)]
"""number of examples, classes or networks"""


class Source(Protocol):
    """Protocol of the storage of the steps: that of a run, or a run folder that is only read."""

    def stage(self, name: str) -> StoredStage | None:
        """Return the stored columns of a stage, or None if it is not stored."""

    def document(self, kind: str) -> Mapping[str, Any] | None:
        """Return a stored JSON document, or None if it is not stored."""


@dataclass(frozen=True)
class StoredSteps:
    """The content of `run.json` of an audit, and its stored steps, which are validated when they are read."""

    manifest: Mapping[str, Any]
    source: Source
    folder: Path = field(default_factory=Path)
    """folder of the run, for messages"""
    prefix: str = ""
    """beginning of the names of the steps"""

    def within(self, prefix: str) -> "StoredSteps":
        """Return the steps whose names begin with a prefix."""
        return replace(self, prefix=prefix)

    def rng(self, name: str) -> Draws:
        """Return the random numbers of the audit for a name."""
        return Draws(self.manifest["seed"]).at(name)

    def settings(self, model: Hashable) -> Any:
        """Return the settings of the audit as a value of a model, such as a typed dictionary."""
        return validated(self.folder / MANIFEST, self.manifest["config"]["settings"], model)

    def data(self, model: Hashable) -> Any:
        """Return what `run.json` states about the data as a value of a model."""
        return validated(self.folder / MANIFEST, self.manifest["data"], model)

    def columns(self, name: str, forms: Mapping[str, Form], **sizes: int) -> Columns:
        """Return the columns of a stage, whose forms may refer to `sizes`."""
        stage = self.source.stage(self.prefix + name)
        if stage is None:
            raise self.absent(name)
        validated_columns(self.file(name), stage.columns, forms, sizes)
        return {key: stage.columns[key] for key in forms if key in stage.columns}

    def document(self, name: str, model: Hashable) -> Any:
        """Return a document as a value of its model."""
        content = self.source.document(self.prefix + name)
        if content is None:
            raise self.absent(name)
        return validated(self.folder / f"{self.prefix}{name}.json", content, model)

    def pictures(self, pictures: Sequence[Picture]) -> tuple[Picture, ...]:
        """Return those of the pictures whose images are stored."""
        stage = self.source.stage(PICTURES)
        if stage is None:
            raise self.absent(PICTURES)
        stored = [picture for picture in pictures if picture.name in stage.columns]
        for picture in stored:
            images_of(stage.columns, picture.name, len(picture.captions), self.file(PICTURES))
        return tuple(stored)

    def file(self, name: str) -> str:
        """Return the path of the file of a stage, for messages."""
        return str(self.folder / f"{self.prefix}{name}{SUFFIX}")

    def absent(self, name: str) -> TargetError:
        """Return the error for a step that is not stored."""
        return TargetError(
            f"{str(self.folder)!r} has no {self.prefix}{name}, from which the finding is computed; restore it from a "
            "copy"
        )

    def refuse(self, name: str, fault: str, expected: str) -> TargetError:
        """Return the error for a step that contradicts the other steps or the settings."""
        return TargetError(
            f"{self.file(name)!r} has {fault}; {expected} was expected: restore it from a copy"
        )


def images_of(columns: Columns, name: str, n: int, file: str) -> Tensor:
    """Return the images of a picture, after a check of their number and size."""
    images = columns[name]
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.shape[0] != n
        or images.shape[1] not in (1, 3)
        or not all(1 <= side <= LONGEST_SIDE for side in images.shape[2:])
    ):
        raise TargetError(
            f"the column {name!r} in {file!r} has the shape {tuple(images.shape)}; {n} images of at most "
            f"{LONGEST_SIDE} pixels were expected: restore it from a copy"
        )
    return images
