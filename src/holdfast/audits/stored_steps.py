"""What the finding of an audit is computed from: its settings in `run.json`, and its stored steps.

A finding is computed in one way, by the audit itself and whenever a stored audit is opened.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field, Strict
from torch import Tensor

from holdfast.audits.finding import PICTURES, Picture
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.evidence import Columns
from holdfast.reports.gallery import LONGEST_SIDE
from holdfast.runs.store.column_forms import Form, validated_columns
from holdfast.runs.store.columns import SUFFIX
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import StoredStage
from holdfast.runs.store.forms import validated

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
