"""Changes of images as constraints: rotations and shifts, colours, common corruptions, and patches, of which only one
rectangle changes.
"""

import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Count, Fraction, Ids, Inputs, Mask, NonNegative, PerExample, Steps
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
                f"inputs have {x.shape[1]}, so leave them out, as in colour:brightness=0.2,contrast=0.3"
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


_PIXELS_AT_ONCE = 65_536
"""Number of pixels that are compared with all printable colours together, which limits memory."""
Corners = tuple[Tensor, Tensor]
"""row and column of the upper left corner of a rectangle, for each example, each int64 (n)"""


OF_OBJECTS: Final = ("on", "beside")
"""positions that depend on the boxes of the objects of an image"""


@dataclass(frozen=True)
class Patch(Constraint):
    """Constraint that only one rectangle of an image changes, or a shape in it, and that its pixels may have any valid
    value, or any colour of a printer.

    `at` is the row and column of its upper left corner, `centre`, or `anywhere`, where the attacker chooses the
    position; for images with boxes of objects also `on`, where its centre is in a box, or `beside`, where it touches
    none. With `jitter` the position varies by up to that many pixels. The patch stays inside the rectangle `within`, if
    there is one: `anywhere` and `centre` then refer to that rectangle.
    """

    name: ClassVar[str] = "patch"
    provers: ClassVar[tuple[str, ...]] = ("patch-masks",)

    height: Steps = 5
    width: Steps = 5
    at: str = "anywhere"
    """`anywhere`, `centre`, `on`, `beside` or `ROW:COLUMN`"""
    jitter: Count = 0
    """largest deviation from the position in pixels, along each axis"""
    within: str = ""
    """`ROW:COLUMN-ROW:COLUMN`, the first and the last pixel that the patch may cover; empty for the whole image"""
    printable: str = ""
    """table of the colours that can be printed: `default`, or `@` and the path of a file; empty for any colours"""
    shape: str = ""
    """pixels of the rectangle that may change: `circle`, `bars`, or `@` and the path of an image; empty for all"""
    content: str = ""
    """JSON with the colours (`colours`, rows of red, green and blue between the lists `low` and `high`) and the shape
    (`shape`, rows of 0 and 1)"""

    @property
    def counts_pixels(self) -> bool:
        """Always true: a patch changes pixels."""
        return True

    def refuse_unfit(self, x: Inputs) -> None:
        """Raise `UsageError` if the patch does not fit into images in the shape of `x`."""
        self.places(x.shape[1:])
        if self.colours is not None and x.shape[1] not in (1, 3):
            raise UsageError(
                f"the threat {self} has printable colours, and the images have {x.shape[1]} channels; 1 or 3 were "
                "expected: leave printable out"
            )
        if (self.height, self.width) == tuple(x.shape[2:]) and self.pixels.all():
            raise UsageError(
                f"the patch {self.height}x{self.width} covers the whole image, so that nothing of the object is left; "
                "give a smaller one, or a shape that leaves a part of the image, such as shape=bars"
            )

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Settings of the patch by name, such as its height and width."""
        given = {name: getattr(self, name) for name in ("within", "printable", "shape", "content")}
        present = {name: text for name, text in given.items() if text}
        return {"height": self.height, "width": self.width, "at": self.at, "jitter": self.jitter, **present}

    @cached_property
    def _files(self) -> Mapping[str, Any]:
        """The content as a mapping, which is parsed once."""
        files: Mapping[str, Any] = json.loads(self.content or "{}")
        return files

    @cached_property
    def pixels(self) -> Tensor:
        """Which pixels of the rectangle may change: bool (height, width)."""
        rows = self._files.get("shape")
        return torch.ones(self.height, self.width).bool() if rows is None else torch.tensor(rows).bool()

    @cached_property
    def colours(self) -> Tensor | None:
        """The printable colours (k, 3) in the units of the inputs; None if any can be printed."""
        colours = self._files.get("colours")
        return None if colours is None else torch.tensor(colours, dtype=torch.float32)

    def in_bounds(self, bounds: Bounds) -> "Patch":
        """Return the constraint with its colours in the units of a model whose inputs are within `bounds`."""
        if self.colours is None:
            return self
        low, high = (
            side.reshape(len(side) if side.dim() else 1, -1).double().mean(1)
            for side in map(torch.as_tensor, (bounds.low, bounds.high))
        )
        before, after, colours = (
            torch.tensor(self._files[name], dtype=torch.float64) for name in ("low", "high", "colours")
        )
        if before.equal(low) and after.equal(high):
            return self
        colours = low + (colours - before) / (after - before) * (high - low)
        content = {**self._files, "colours": colours.tolist(), "low": low.tolist(), "high": high.tolist()}
        return replace(self, content=json.dumps(content))

    def printed(self, x: Inputs, changed: Tensor) -> Inputs:
        """Return images (n, channels, height, width) in which the pixels `changed`, bool (n, 1, height, width), have
        the nearest printable colours. Without a table of colours nothing changes.
        """
        if self.colours is None:
            return x
        table = self._table(x)
        place = changed[:, 0].nonzero(as_tuple=True)
        x = x.movedim(1, -1).clone()
        parts = [table[torch.cdist(part, table).argmin(1)] for part in torch.split(x[place], _PIXELS_AT_ONCE)]
        x[place] = torch.cat(parts) if parts else x[place]
        return x.movedim(-1, 1)

    def _table(self, x: Inputs) -> Tensor:
        """The printable colours (k, channels); of images with one channel, their brightness."""
        assert self.colours is not None, "there are printable colours"
        table = self.colours.to(x)
        return table if x.shape[1] == 3 else table @ torch.tensor([[0.299], [0.587], [0.114]]).to(x)

    def as_stored(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the images with each changed pixel in the nearest printable colour."""
        return self.printed(x_adv, (x_adv != x).any(1, keepdim=True))

    def places(self, shape: torch.Size) -> tuple[range, range]:
        """Return the rows and the columns at which the upper left corner of the patch may be, in images of `shape`
        (channels, height, width).

        Raises `UsageError` if the patch does not fit.
        """
        if len(shape) != 3:
            raise UsageError(
                f"{self} needs images (n, channels, height, width); the inputs have shape {tuple(shape)}"
            )
        first_row, first_column, last_row, last_column = 0, 0, shape[1] - 1, shape[2] - 1
        if self.within:
            first_row, first_column, last_row, last_column = map(int, re.split("[:-]", self.within))
        rows, columns = (
            range(first_row, last_row - self.height + 2),
            range(first_column, last_column - self.width + 2),
        )
        row, column = rows.start + (len(rows) - 1) // 2, columns.start + (len(columns) - 1) // 2
        if ":" in self.at:
            row, column = map(int, self.at.split(":"))
        outside = last_row >= shape[1] or last_column >= shape[2]
        if outside or row not in rows or column not in columns:
            raise UsageError(
                f"{self} does not fit into images of {shape[1]}x{shape[2]}; give a smaller one, or another place"
            )
        if self.at in ("anywhere", *OF_OBJECTS):
            return rows, columns
        return _near(row, self.jitter, rows), _near(column, self.jitter, columns)

    def allowed(self, truth: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Return which positions are allowed in each image, bool (n, rows, columns), by the boxes of its objects,
        `truth` (n, k, 6); None if all are.

        Raises `UsageError` for images without boxes if the patch is on or beside objects.
        """
        if self.at not in OF_OBJECTS:
            return None
        if truth is None or truth.dim() != 3 or truth.shape[2] != 6:
            raise UsageError(
                f"the threat {self} is for data with boxes of objects; give another place, as in at=centre"
            )
        rows, columns = self.places(shape)
        top = torch.arange(rows.start, rows.stop, device=truth.device)[:, None, None]
        left = torch.arange(columns.start, columns.stop, device=truth.device)[None, :, None]
        x1, y1, x2, y2, label = (each[:, None, None] for each in truth[..., :5].unbind(2))
        if self.at == "on":
            down, right = top + self.height / 2, left + self.width / 2
            inside = (down >= y1) & (down <= y2) & (right >= x1) & (right <= x2)
            return (inside & (label >= 0)).any(3)
        touches = (top < y2) & (top + self.height > y1) & (left < x2) & (left + self.width > x1)
        return ~(touches & (label >= 0)).any(3)

    def in_place(self, x_adv: Inputs, batch: Batch) -> Mask:
        """Return the mask of the images whose changes are covered by one patch that is on or beside the objects, as
        the position requires; true for other positions. Raises `UsageError` for images without boxes.
        """
        shape = batch.x.shape[1:]
        allowed, changed = self.allowed(batch.truth, shape), (x_adv != batch.x).any(1).to(batch.x)
        if allowed is None:
            return torch.ones(len(x_adv), dtype=torch.bool, device=x_adv.device)
        covered = self.sums(changed, shape).masked_fill(~allowed, 0.0)
        return changed.flatten(1).sum(1) - covered.flatten(1).amax(1) < 0.5  # `sums` is not exact

    def drawn(self, ids: Ids, shape: torch.Size, rng: Draws) -> Corners:
        """Return a random allowed position of the patch for each example, as the row and column of its upper left
        corner.
        """
        rows, columns = self.places(shape)
        down = rng.at("row").integers(ids, len(rows)) + rows.start
        return down, rng.at("column").integers(ids, len(columns)) + columns.start

    def mask(self, x: Inputs, corners: Corners) -> Tensor:
        """Return a mask (n, 1, height, width) of the pixels that a patch with its upper left corner at `corners`
        covers.
        """
        down = torch.arange(x.shape[2], device=x.device) - corners[0][:, None]
        right = torch.arange(x.shape[3], device=x.device) - corners[1][:, None]
        inside = ((down >= 0) & (down < self.height))[:, :, None] & ((right >= 0) & (right < self.width))[
            :, None, :
        ]
        if not self.pixels.all():
            rows, columns = down.clamp(0, self.height - 1), right.clamp(0, self.width - 1)
            inside &= self.pixels.to(x.device)[rows[:, :, None], columns[:, None, :]]
        return inside[:, None]

    def pasted(self, x: Inputs, filling: Tensor, corners: Corners) -> Inputs:
        """Return the images with the patch values `filling` (1, channels, height, width) pasted at a position of each
        image. The result is differentiable in `filling`.
        """
        down, right = self.pixels.to(x.device).nonzero(as_tuple=True)
        rows, columns = corners[0][:, None] + down, corners[1][:, None] + right
        images = torch.arange(len(x), device=x.device)[:, None]
        values = filling[0, :, down, right].T.expand(len(x), -1, -1)
        return x.movedim(1, -1).index_put((images, rows, columns), values).movedim(-1, 1)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example 0 if nothing changed, 1 if one patch covers all changes, and they have printable
        colours, else infinity.
        """
        differs = (x_adv != x).any(1)
        changed = differs.to(x)
        missed = changed.flatten(1).sum(1) - self.sums(changed, x.shape[1:]).flatten(1).amax(1)
        anything = changed.flatten(1).any(1).to(x)
        # A number of pixels that was computed from averages is not exact.
        outside = missed > 0.5
        if self.colours is not None:
            low, high = self._files["low"], self._files["high"]
            step = max(top - bottom for bottom, top in zip(low, high, strict=True)) / 255
            away = (x_adv - self.printed(x_adv, differs[:, None])).abs().flatten(1).amax(1)
            outside |= away > step / 2  # as an image of 8 bits stores them
        return torch.where(outside, torch.inf, anything)

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the images with all changes undone outside one patch, placed where it contains most of the change, and
        with its values clamped to their valid range, or in printable colours.
        """
        clamped = bounds.clamp(x_adv)
        size = self.sums(((clamped - x) ** 2).sum(1), x.shape[1:])
        best = size.flatten(1).argmax(1)
        rows, columns = self.places(x.shape[1:])
        corners = (best // len(columns) + rows.start, best % len(columns) + columns.start)
        inside = self.mask(x, corners)
        return torch.where(inside, self.printed(clamped, inside), x)

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Return the sign of the gradient, multiplied by the width of the range of valid values."""
        low, high = bounds.like(x)
        return gradient.sign() * (high - low)

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Return the images with uniform noise inside one patch at a random position of each image."""
        low, high = bounds.like(batch.x)
        u = rng.at("value").uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
        inside = self.mask(batch.x, self.drawn(batch.ids, batch.x.shape[1:], rng))
        return torch.where(inside, self.printed(low + u * (high - low), inside), batch.x)

    def resized(self, eps: float) -> "Patch":
        """Return the patch itself for any `eps`, because a patch has no radius."""
        return self

    def sums(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return the sums of `values` (n, height, width) over the pixels of the patch at each of its positions, as (n,
        rows, columns).
        """
        rows, columns = self.places(shape)
        inside = values[
            :, None, rows.start : rows.stop + self.height - 1, columns.start : columns.stop + self.width - 1
        ]
        if not self.pixels.all():
            return F.conv2d(inside, self.pixels.to(inside)[None, None])[:, 0]
        size = (self.height, self.width)
        return F.avg_pool2d(inside, size, stride=1)[:, 0] * (self.height * self.width)


def _near(middle: int, reach: int, free: range) -> range:
    """The part of `free` that is at most `reach` away from `middle`."""
    return range(max(free.start, middle - reach), min(free.stop - 1, middle + reach) + 1)
