"""Changes of inputs that are not balls: rectangles, flows and transformations of images, rows of tables, and words."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attacks.parts.losses import Best, cross_entropy
from holdfast.attacks.parts.losses import margin as margin_loss
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Logits, PerExample
from holdfast.threats.tables import Table, TableTensors
from holdfast.threats.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS, registered_domains
from holdfast.threats.transformations import Corners, Patch

if TYPE_CHECKING:
    from holdfast.threats.transformations import Transformation


def expect_patch(constraint: Constraint, attack: object) -> Patch:
    """Return the constraint if it is a patch, for attacks on patches. Raises `UsageError` otherwise."""
    if isinstance(constraint, Patch):
        return constraint
    raise UsageError(
        f"{type(attack).__name__} fills a rectangle of an image; the threat model is {constraint}. "
        f"Choose a threat such as patch:5x5, or leave the attack out"
    )


Amounts = Mapping[str, PerExample]
"""amount along each axis for each example, by name of the axis"""

_SPATIAL = ("rotate", "shift_x", "shift_y", "scale", "perspective_x", "perspective_y")
_COLOURED = ("hue", "saturation")
_TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def transformed(x: Inputs, amounts: Amounts, bounds: Bounds) -> Inputs:
    """Transform the images `x` (n, channels, height, width), such as by rotation, shift or hue. Each image has its own
    amount of each transformation.

    With all amounts zero the result is bitwise equal to `x` and still has a gradient. `rotate` and `hue` are in
    degrees, `shift_x` and `shift_y` in pixels (right and down). `scale`, `saturation` and `contrast` are added to a
    factor of one. `brightness` is a fraction of the box's width. `blur` is the standard deviation of a Gaussian in
    pixels (its sign is ignored). `perspective_x` and `perspective_y` are how much nearer the right or the lower side is
    than the centre.
    """
    if not amounts:
        return x
    out = x
    if any(name in amounts for name in _SPATIAL):
        out = _warped(out, amounts, bounds)
    if "blur" in amounts:
        out = _blurred(out, amounts["blur"])
    if any(name in amounts for name in (*_COLOURED, "brightness", "contrast")):
        out = _recoloured(out, amounts, bounds)
    still = torch.stack([amount == 0 for amount in amounts.values()]).all(0)
    # the value of `x` with the gradient of `out`
    return torch.where(spread(still, x), x + (out - out.detach()), bounds.clamp(out))


def flowed(x: Inputs, flow: Tensor, bounds: Bounds) -> Inputs:
    """Return images whose pixels are displaced: each pixel is read from `x` at an offset `flow` (n, 2, height, width),
    in pixels to the right and down.

    Outside of the image the value of the border continues. Pixels without a displacement are bitwise unchanged, and
    have a gradient.
    """
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=x.device, dtype=x.dtype) + flow[:, 0]
    grid = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), dim=-1)
    out = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    still = (flow == 0).all(1, keepdim=True)
    # the value of `x` with the gradient of `out`
    return torch.where(still, x + (out - out.detach()), bounds.clamp(out))


def reached(x: Inputs, position: Tensor, constraint: "Transformation", bounds: Bounds) -> Inputs:
    """Return images transformed by `position` (n, axes), which gives the amount of each transformation as a fraction of
    its limit, from -1 to 1.
    """
    amounts = {axis: limit * position[:, k] for k, (axis, limit) in enumerate(constraint.axes.items())}
    return transformed(x, amounts, bounds)


def _warped(x: Inputs, amounts: Amounts, bounds: Bounds) -> Inputs:
    """Apply rotation, scale, shift and perspective as one homography by backward mapping."""
    height, width = x.shape[2:]
    zero = x.new_zeros(len(x))
    angle = torch.deg2rad(amounts.get("rotate", zero))
    zoom = 1 + amounts.get("scale", zero)
    rows = torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2
    columns = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    down = rows[None, :, None] - amounts.get("shift_y", zero)[:, None, None]
    right = columns[None, None, :] - amounts.get("shift_x", zero)[:, None, None]
    cos, sin = ((side / zoom)[:, None, None] for side in (angle.cos(), angle.sin()))
    from_right, from_down = cos * right + sin * down, cos * down - sin * right
    nearer = (
        1
        + amounts.get("perspective_x", zero)[:, None, None] * from_right * 2 / width
        + amounts.get("perspective_y", zero)[:, None, None] * from_down * 2 / height
    )
    grid = torch.stack((from_right * 2 / width / nearer, from_down * 2 / height / nearer), dim=-1)
    low, _ = bounds.like(x)
    # shifted, because pixels from outside are 0 in `grid_sample` and must be the lower bound
    return F.grid_sample(x - low, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + low


def _blurred(x: Inputs, sigma: PerExample) -> Inputs:
    """A Gaussian blur along rows, then along columns, with its own width for each example."""
    reach = min(4, x.shape[2] - 1, x.shape[3] - 1)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    # a width of zero would divide by zero; one of 1e-3 changes no pixel
    kernel = torch.exp(-(offsets**2) / (2 * sigma.abs().clamp_min(1e-3)[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, channels, height, width = x.shape
    weight = kernel.repeat_interleave(channels, 0)[:, None]
    flat = F.pad(x.reshape(1, n * channels, height, width), (reach,) * 4, mode="replicate")
    once = F.conv2d(flat, weight[:, :, None], groups=n * channels)
    return F.conv2d(once, weight[..., None], groups=n * channels).view_as(x)


def _recoloured(x: Inputs, amounts: Amounts, bounds: Bounds) -> Inputs:
    if any(name in amounts for name in _COLOURED):
        x = _chroma(x, amounts)
    if "contrast" in amounts:
        mean = x.flatten(1).mean(1)
        x = spread(mean, x) + spread(1 + amounts["contrast"], x) * (x - spread(mean, x))
    if "brightness" in amounts:
        x = x + bounds.width * spread(amounts["brightness"], x)
    return x


def _chroma(x: Inputs, amounts: Amounts) -> Inputs:
    """Rotate and scale the two colour channels of YIQ, which keeps the brightness."""
    no_change = x.new_zeros(len(x))
    angle = torch.deg2rad(amounts.get("hue", no_change))
    stretch = 1 + amounts.get("saturation", no_change)
    cos, sin = stretch * angle.cos(), stretch * angle.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rotation = torch.stack((one, zero, zero, zero, cos, -sin, zero, sin, cos), dim=1).view(-1, 3, 3)
    to_yiq = torch.tensor(_TO_YIQ, device=x.device, dtype=x.dtype)
    mixed = torch.linalg.inv(to_yiq) @ rotation @ to_yiq
    return torch.einsum("nij,njhw->nihw", mixed, x)


_AXES = {"shift": ("shift_x", "shift_y"), "perspective": ("perspective_x", "perspective_y")}


class Transformed(nn.Module):
    """Network that applies a random transformation to each input before it calls a classifier. The amount of a
    transformation is at most its limit, in both directions.

    The limits are those of `holdfast.attacks.parts.images`, and `noise`, the standard deviation of the noise
    that a printer or sensor adds to every value, as a fraction of the box's width. Random numbers are those of torch's
    generator.
    """

    def __init__(self, model: Classifier, limits: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self.limits = dict(limits)

    def forward(self, x: Inputs) -> Tensor:
        """Return the logits of the inputs, each of which is transformed at random first."""
        logits: Tensor = self.model(self.view(x, len(x)))
        return logits

    def view(self, x: Inputs, n: int) -> Inputs:
        """Return the inputs behind `n` random transformations, one for each input or 1 for all of them."""
        bounds, amounts = self.model.bounds, {}
        for name, limit in self.limits.items():
            for axis in _AXES.get(name, (name,)) if name != "noise" else ():
                drawn = limit * (2 * torch.rand(n, device=x.device, dtype=x.dtype) - 1)
                amounts[axis] = drawn.expand(len(x))
        view = transformed(x, amounts, bounds)
        if "noise" in self.limits:
            low, high = bounds.like(x)
            noise = torch.randn(n, *x.shape[1:], device=x.device, dtype=x.dtype)
            view = bounds.clamp(view + self.limits["noise"] * (high - low) * noise)
        return view


class MeanView(nn.Module):
    """Network that returns the logarithms of the mean class probabilities over `draws` transformations of a
    `Transformed`, which are the same for all inputs and in all calls, so that the outputs are not random.
    """

    def __init__(self, random: Transformed, draws: int, seed: int) -> None:
        super().__init__()
        self.random, self.draws, self.seed = random, draws, seed

    def forward(self, x: Inputs) -> Tensor:
        """Return the logarithms of the mean probabilities. Cost: `draws` passes."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            views = [self.random.view(x, 1) for _ in range(self.draws)]
        mean = torch.stack([self.random.model(view).softmax(1) for view in views]).mean(0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


def seen_through(model: Classifier, limits: Mapping[str, float]) -> Classifier:
    """Return a classifier that transforms its inputs at random before it calls `model`, with the same bounds, classes
    and access.
    """
    return around(model, Transformed(model, limits))


def averaged_views(model: Classifier, draws: int, seed: int) -> Classifier:
    """Return a classifier with random transformations of its inputs as the mean over `draws` fixed transformations."""
    assert isinstance(model.net, Transformed)
    return around(model, MeanView(model.net, draws, seed))


def around(model: Classifier, net: nn.Module) -> Classifier:
    """A network that calls a classifier, as a classifier with the same properties."""
    wrapped = Classifier(net, bounds=model.bounds, classes=model.classes, access=model.access)
    wrapped.hides, wrapped.batches, wrapped.rejects = model.hides, model.batches, model.rejects
    wrapped.remote, wrapped.class_names = model.remote, model.class_names
    wrapped.class_labels, wrapped.feature_names = model.class_labels, model.feature_names
    wrapped.failing = model.failing
    return wrapped


def inner(model: Classifier) -> Classifier:
    """Return the classifier without the random transformations of its inputs, or their mean. A classifier that has
    none is returned unchanged.
    """
    net = model.net.random if isinstance(model.net, MeanView) else model.net
    return net.model if isinstance(net, Transformed) else model


_ENOUGH = 9.0  # cross-entropy at which an example is clipped, so that none dominates the others (1811.11304)


def truncated(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of each example, clipped at 9 so that broken examples do not dominate. With targets, it
    is minus the cross-entropy of the target.
    """
    return cross_entropy(logits, batch).clamp_max(_ENOUGH)


def draw_minibatch(batch: Batch, n: int, rng: Draws, step: int) -> Batch:
    """Return `n` random examples of a batch for one step of a fit. Each example is used once before any is used
    again.
    """
    n = min(n, len(batch))
    steps = len(batch) // n
    order = rng.at("order", step // steps).bits(batch.ids).argsort()
    return batch.take(order[step % steps * n :][:n])


def unfitted(attack: object) -> UsageError:
    """Return the error for an attack that was called before it was fitted."""
    name = type(attack).__name__
    return UsageError(
        f"{name} must be fitted before it attacks: {name}().fit(model, other_examples, threat, rng=…) and then "
        f"{name}().fitted(…), or use assess, which fits it"
    )


@dataclass(frozen=True)
class Added:
    """Attack that adds one fitted perturbation to every input and projects the result onto the valid inputs of the
    ball.
    """

    learned: Tensor
    """fitted change, of shape (1, *features)"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return threat.constraint.project(batch.x + self.learned.to(batch.x), batch.x, model.bounds)


@dataclass(frozen=True)
class Pasted:
    """Attack that pastes one fitted patch into each image, at the allowed position where the margin is lowest.

    The threat model leaves the position to the attacker, who queries the model. Positions are tried in random order
    until the image is broken. Cost: a forward for each position.
    """

    learned: Tensor
    """fitted patch, of shape (1, channels, height, width)"""
    places: int = 1_000
    """largest number of positions that are tried for an image; of more, some are chosen at random, the same for all
    images"""

    needs: ClassVar[Access] = "labels"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        best = Best(batch)
        for corner in self._corners(threat, batch.x.shape[1:], rng.at("places")):
            remaining = batch.take(best.surviving)
            if not len(remaining):
                break
            corners = (corner[0].expand(len(remaining)), corner[1].expand(len(remaining)))
            x = self._pasted(model, remaining, threat, corners)
            with torch.no_grad():
                best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
        return best.x

    def tried(self, threat: ThreatModel, shape: torch.Size) -> int:
        """Return the largest number of positions at which the patch is tried in an image of this shape (channels,
        height, width).
        """
        rows, columns = expect_patch(threat.constraint, self).places(shape)
        return min(len(rows) * len(columns), self.places)

    def at_random(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        """Return the images with the patch at one random position of each image, without queries of the model."""
        patch = expect_patch(threat.constraint, self)
        return self._pasted(model, batch, threat, patch.drawn(batch.ids, batch.x.shape[1:], rng.at("place")))

    def _corners(self, threat: ThreatModel, shape: torch.Size, rng: Draws) -> Tensor:
        """The upper left corners that are tried, in order: int64 (places, 2)."""
        rows, columns = expect_patch(threat.constraint, self).places(shape)
        positions = torch.arange(len(rows) * len(columns), device=self.learned.device)
        chosen = positions[rng.bits(positions).argsort()[: self.places]]
        return torch.stack((chosen // len(columns) + rows.start, chosen % len(columns) + columns.start), 1)

    def _pasted(self, model: Model, batch: Batch, threat: ThreatModel, corners: Corners) -> Inputs:
        return model.bounds.clamp(
            expect_patch(threat.constraint, self).pasted(batch.x, self.learned.to(batch.x), corners)
        )


def expect_table(constraint: Constraint, attack: object) -> Table:
    """Return the constraint if it is that of a table. Raises `UsageError` otherwise."""
    if isinstance(constraint, Table):
        return constraint
    raise UsageError(
        f"{type(attack).__name__} changes rows of a table by its rules, and the threat is {constraint}; give a threat "
        "such as table:rules.yaml"
    )


_ROWS_AT_ONCE = 8192
"""Number of rows that are repaired and evaluated together, which limits memory."""


def evaluated(
    model: Model, batch: Batch, constraint: Table, candidates: Tensor, best: Best
) -> tuple[Tensor, Tensor]:
    """Make candidates (k, n, columns) for the examples of a batch valid, query the model with them, and offer them to
    `best`. Return the valid rows, and their margins (k, n).
    """
    each = max(1, _ROWS_AT_ONCE // max(len(batch), 1))
    parts = [_evaluated(model, batch, constraint, part) for part in torch.split(candidates, each)]
    rows, margins = (torch.cat([part[k] for part in parts]) for k in range(2))
    for x, heights in zip(rows, margins, strict=True):
        best.offer(batch, x, heights)
    return rows, margins


def _evaluated(model: Model, batch: Batch, constraint: Table, candidates: Tensor) -> tuple[Tensor, Tensor]:
    k = len(candidates)
    several = batch.take(torch.arange(len(batch)).repeat(k))
    x = constraint.valid(constraint.moved(candidates.flatten(0, 1), several.x), several.x)
    heights = margin_loss(model(x, several.ids), several)
    return x.view_as(candidates), heights.view(k, len(batch))


def decisions(tensors: TableTensors) -> tuple[tuple[int, ...], ...]:
    """Return the columns that an attacker may change, one by one, and the columns of each one-hot group together."""
    single = (tensors.mutable & ~tensors.grouped).nonzero()[:, 0].tolist()
    groups = tuple(group for group in tensors.groups if tensors.mutable[list(group)].any())
    return (*((place,) for place in single), *groups)


def single_change(x: Tensor, columns: tuple[int, ...], values: Tensor) -> Tensor:
    """Return the rows `x` with one decision changed to `values` (n): the value of a column, or the position of the 1 in
    a one-hot group.
    """
    changed = x.clone()
    if len(columns) == 1:
        changed[:, columns[0]] = values.to(x.dtype)
    else:
        places = torch.tensor(columns, device=x.device)
        changed[:, places] = torch.nn.functional.one_hot(values.long(), len(columns)).to(x.dtype)
    return changed


_LONGEST = 64  # longer words are data or addresses, and their edits would need too much memory

Operation = tuple[int, int, str]
"""Replacement of the characters from a position up to another one by a text."""


def edited(word: str, done: tuple[Operation, ...] = ()) -> dict[str, tuple[Operation, ...]]:
    """Return the words that one edit makes of a word beside the operations `done`, with all their operations.

    No two operations change a common character. The registered domains of URLs do not change.
    """
    found: dict[str, tuple[Operation, ...]] = {}
    for operation in _operations(word):
        together = (*done, operation)
        new = word
        for start, stop, text in sorted(together, reverse=True):
            new = new[:start] + text + new[stop:]
        if new and all(_apart(operation, other) for other in done) and _changes(word, new):
            found.setdefault(new, together)
    return found


def _operations(word: str) -> Iterator[Operation]:
    """Yield the single edits that the constraint allows, in the first `_LONGEST` characters of a word."""
    for place, character in enumerate(word[:_LONGEST]):
        yield place, place, INVISIBLE
        if HOMOGLYPHS.get(character):
            yield place, place + 1, HOMOGLYPHS[character]
        if word[place + 1 : place + 2] not in ("", character):
            yield place, place + 2, word[place + 1] + character
        yield place, place + 1, ""
        yield place, place, character
        for key in NEIGHBOURS.get(character, ""):
            yield place, place + 1, key
    yield len(word), len(word), INVISIBLE


def _apart(one: Operation, other: Operation) -> bool:
    """Return whether two operations change no common character, and do not insert at the same position."""
    if one[0] == one[1] and other[0] == other[1]:
        return one[0] != other[0]
    return one[1] <= other[0] or other[1] <= one[0]


def _changes(word: str, new: str) -> bool:
    """Return whether two words differ, and have the same registered domains."""
    return new != word and registered_domains(new) == registered_domains(word)
