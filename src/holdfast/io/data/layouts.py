"""Layout and ranges of input arrays: what is declared, and what the values themselves show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError, data_argument
from holdfast.core.model import Bounds, Normalisation, Units
from holdfast.core.tasks import Task
from holdfast.core.types import Inputs, Layout, Outputs
from holdfast.io.files import LAYOUT
from holdfast.io.remote.probing import HWC_NOTE, ProbedClassifier

if TYPE_CHECKING:
    from holdfast.threats.byte_changes import ByteChanges
    from holdfast.threats.table_rules import Rules
    from holdfast.threats.text_edits import TextEdits

CHANNELS = (1, 3, 4)
"""Sizes of an axis that may be the channels: grey, colour, colour with transparency."""
_SAME = 1e-5
"""Largest difference, relative to the largest output, between outputs that are treated as equal."""
MOVED_NOTE = "the channels came last and were put first"
GREY_NOTE = (
    "the images are grey and stored in colour: their channels are equal, and the network takes one of them"
)
INSERTED_NOTE = "the network needs an axis of channels, so one of size 1 was inserted"

Array = NDArray[Any]


@dataclass(frozen=True)
class LayoutReading:
    """A possible meaning of the axes of a data array (N, ...), such as channels last, and the conversion to the axes of
    the model's inputs.
    """

    stored: Layout
    """layout of the array"""
    network: Layout | None = None
    """layout of the network's inputs, if it differs from that of the inputs in Holdfast"""
    inserted: bool = False
    """whether an axis with one channel is inserted before the others, as for signals (N, L) and volumes (N, D, H, W)"""
    equal_channels: int | None = None
    """axis of three equal channels of the array, of which the network takes one"""

    def inputs(self, x: Array) -> Array:
        """Return a data array with its axes in the order of the model's inputs, as a view if possible."""
        if self.equal_channels is not None:
            x = x.take([0], axis=self.equal_channels)
        if self.inserted:
            return x[:, None]
        if self.stored == "asis" or x.ndim not in (3, 4, 5):
            return x
        if self.stored == "hwc":  # an array of rank 3 is a signal (N, length, channels)
            return np.moveaxis(x, -1, 1)
        return x[:, None] if x.ndim == 3 else x

    def array(self, x: Array, rank: int) -> Array:
        """Return model inputs with the axes of the original data array, which has `rank` axes. It is the inverse of
        `inputs`.
        """
        if self.equal_channels is not None:
            return replace(self, equal_channels=None).array(x, rank).repeat(3, axis=self.equal_channels)
        if self.inserted:
            return x[:, 0]
        if self.stored == "asis" or rank not in (3, 4, 5):
            return x
        if self.stored == "hwc":
            return np.moveaxis(x, 1, -1)
        return x[:, 0] if rank == 3 else x

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one example in the layout of the network, for a data array of shape `shape`."""
        # An array that is only used for its shape; np.empty does not touch its memory.
        first = self.inputs(np.empty((1, *shape[1:]), dtype=bool)).shape[1:]
        return (*first[1:], first[0]) if self.network == "hwc" else first

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report on changes of the order of axes."""
        moved = (MOVED_NOTE,) if self.stored == "hwc" else ()
        inserted = (INSERTED_NOTE,) if self.inserted else ()
        grey = () if self.equal_channels is None else (GREY_NOTE,)
        return (*grey, *moved, *inserted, *((HWC_NOTE,) if self.network == "hwc" else ()))


def layout_of_images(x: Array) -> Layout | None:
    """Return the layout of an array of images whose colours may be last; None for an array of another rank."""
    if x.ndim not in (3, 4):
        return None
    return "hwc" if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS else "chw"


def reading_of(
    shape: Sequence[int],
    declared: Layout | None,
    probe: ProbedClassifier | None,
    rows: Callable[[LayoutReading], Tensor],
    y: Tensor,
    name: str,
) -> LayoutReading:
    """Determine what the axes of a data array of shape `shape` (N, ...) mean, such as channels first or channels last.

    `rows` is a function that returns some examples under an interpretation. `y` contains their labels, which are used
    only in the error message. A declared layout takes precedence, then the layout that the model's file declares, then
    the layouts that the network accepts, where those with equal outputs count as one. Raises `UsageError` if a layout
    of images is declared for an array of another rank, and `TargetError` if several interpretations remain, or none.
    """
    if declared is not None:
        _refuse_no_image(shape, declared, name)
        channels_last = declared == "hwc" and len(shape) == 3
        return _channels_last(shape, probe, rows, name) if channels_last else LayoutReading(declared)
    first, *others = _candidates(tuple(shape), None if probe is None else probe.own.layout)
    if probe is None or (probe.model.remote and len(first) == 1):
        return first[0] if len(first) == 1 else LayoutReading("asis")
    accepted = _accepted_as_batch((first, *others), probe, rows) or _accepted(first, probe, rows)
    refused = probe.refused
    for readings in others:
        accepted = accepted or _accepted(readings, probe, rows)
    if not accepted:
        if len(first) == 1:
            return first[0]  # the run calls the model again, and reports the error
        tried = ", ".join(str(reading.shape(shape)) for readings in (first, *others) for reading in readings)
        raise TargetError(
            f"the inputs of {name} have shape {tuple(shape)}, but the model accepts an example in none of the shapes "
            f"{tried}: {'' if refused is None else refused.message}. Reshape the data, or declare how they are stored",
            LAYOUT,
        )
    distinct = _distinct(accepted)
    if len(distinct) > 1:
        raise _ambiguous(shape, distinct, y, name)
    return _as_image(distinct[0][0], shape, probe)


def _channels_last(
    shape: Sequence[int], probe: ProbedClassifier | None, rows: Callable[[LayoutReading], Tensor], name: str
) -> LayoutReading:
    """Return the interpretation of an array of rank 3 under the layout hwc.

    Grey images have no axis of channels, and in signals (N, length, channels) it is the last one.
    """
    grey, signal = LayoutReading("chw"), LayoutReading("hwc")
    if probe is None or probe.model.remote:
        return grey
    distinct = _distinct(_accepted([grey, signal], probe, rows))
    if len(distinct) > 1:
        raise TargetError(
            f"the inputs of {name} have shape {tuple(shape)}; under the layout hwc they are grey images, or signals "
            "whose channels come last, and the model accepts both with different outputs. Store signals as (N, "
            "channels, length)",
            data_argument("layout", "chw", reason="for grey images"),
            data_argument("layout", "asis", reason="for signals that are stored so"),
        )
    return distinct[0][0] if distinct else grey


def _refuse_no_image(shape: Sequence[int], declared: Layout, name: str) -> None:
    if declared != "asis" and len(shape) not in (3, 4, 5):
        raise UsageError(
            f"the layout {declared} is for images and volumes, but the inputs of {name} have shape {tuple(shape)}",
            data_argument("layout"),
            data_argument("layout", "asis"),
        )


def _candidates(shape: tuple[int, ...], network: Layout | None) -> list[list[LayoutReading]]:
    """Return groups of possible interpretations in the order of preference.

    A group is tried only if the network accepts no interpretation of the groups before.
    """
    inserted = [] if network or len(shape) not in (2, 4) else [[LayoutReading("asis", inserted=True)]]
    if network == "asis" or len(shape) not in (3, 4, 5):
        return [[LayoutReading("asis")], *inserted]
    if len(shape) == 3:
        grey = LayoutReading("chw")
        return [[grey]] if network else [[grey, LayoutReading("asis")], [LayoutReading("chw", "hwc")]]
    channels_first, channels_last = LayoutReading("chw"), LayoutReading("hwc")
    may_be_first, may_be_last = shape[1] in CHANNELS, shape[-1] in CHANNELS
    if network and may_be_first != may_be_last:
        return [[channels_last if may_be_last else channels_first]]
    if may_be_first and len({*shape[2:]}) == 1 and len({*shape[1:-1]}) > 1:
        may_be_last = False  # (1, 4, 4) is a square grey image, not an image of 1 x 4 with four channels
    usual = (
        [channels_first]
        if not may_be_last
        else [channels_first, channels_last]
        if may_be_first
        else [channels_last, channels_first]
    )
    network_last = [] if network else [LayoutReading("chw", "hwc")]
    return [usual, [*network_last, *([] if may_be_last else [channels_last])], *inserted]


def _accepted_as_batch(
    groups: Sequence[Sequence[LayoutReading]],
    probe: ProbedClassifier,
    rows: Callable[[LayoutReading], Tensor],
) -> list[tuple[LayoutReading, Outputs]]:
    """Return the interpretations, with outputs, of the first group of which the network accepts some as whole batches.

    Single examples are not a reliable test, because torch treats (1, length) as a signal with one channel and without a
    batch axis.
    """
    for readings in groups:
        accepted = _accepted(readings, probe, rows, whole=True)
        if accepted:
            return accepted
    return []


def _accepted(
    readings: Sequence[LayoutReading],
    probe: ProbedClassifier,
    rows: Callable[[LayoutReading], Tensor],
    *,
    whole: bool = False,
) -> list[tuple[LayoutReading, Outputs]]:
    accepted = []
    for reading in readings:
        outputs = probe.outputs(rows(reading), reading.network, whole=whole)
        if outputs is not None:
            accepted.append((reading, outputs))
    return accepted


def _distinct(accepted: list[tuple[LayoutReading, Outputs]]) -> list[tuple[LayoutReading, Outputs]]:
    """Return the first interpretation of each set of interpretations with equal outputs."""
    distinct: list[tuple[LayoutReading, Outputs]] = []
    for reading, outputs in accepted:
        if not any(_equal(outputs, known) for _, known in distinct):
            distinct.append((reading, outputs))
    return distinct


def _equal(first: Outputs, second: Outputs) -> bool:
    if first.shape != second.shape:
        return False
    # The clamp prevents a tolerance of zero for outputs that are all zero.
    scale = float(first.nan_to_num().abs().max().clamp_min(1e-12))
    return torch.allclose(first, second, rtol=0, atol=_SAME * scale, equal_nan=True)


def _as_image(reading: LayoutReading, shape: Sequence[int], probe: ProbedClassifier) -> LayoutReading:
    """Return an equivalent interpretation in which images with the channels last have them first inside Holdfast."""
    image = len(shape) in (4, 5) and shape[1] not in CHANNELS and shape[-1] in CHANNELS
    if reading == LayoutReading("chw") and image and probe.own.layout is None:
        return LayoutReading("hwc", "hwc")
    return reading


def _ambiguous(
    shape: Sequence[int], distinct: Sequence[tuple[LayoutReading, Outputs]], y: Tensor, name: str
) -> TargetError:
    options = [
        data_argument(
            "layout",
            # `asis` if the axes do not change
            "asis" if reading.stored == "chw" and len(shape) > 3 else reading.stored,
            reason=f"(an example of shape {reading.shape(shape)} for the network; "
            f"{float((outputs.argmax(1) == y).double().mean()):.0%} of {len(y)} examples right)",
        )
        for reading, outputs in distinct
    ]
    return TargetError(
        f"the inputs of {name} have shape {tuple(shape)}, and the model accepts them in {len(options)} layouts with "
        "different outputs. Declare the one that it was trained with",
        *options,
    )


ClassOrder = Literal["lexical", "numeric"]
"""Order in which class folders and string labels are numbered if no class names are declared."""


@dataclass(frozen=True)
class FirstTable:
    """The data set of a run that was opened first, by whose names of columns those of others are matched."""

    name: str
    columns: tuple[str, ...] | None
    """features in the order of the inputs, or their positions without names; None if the data are no table"""
    named: bool
    """whether `columns` are names"""
    samples: int = 0
    """number of samples of its clips; 0 if it has none"""
    sampling_rate: int | None = None
    """sampling rate of its clips"""

    @property
    def has(self) -> str:
        """The beginning of a message about its columns."""
        return f"the first table, {self.name}, has"


@dataclass(frozen=True)
class DeclaredData:
    """Declared properties of a data set, and the model that will be called with it. A property is None if it is
    unknown.
    """

    bounds: Bounds = Bounds()
    """valid range; floats outside it are rejected, and it determines how bytes are scaled"""
    classes: int | None = None
    """number of classes; labels that are not below it are rejected"""
    class_names: tuple[str, ...] | None = None
    """names of the model's outputs, in their order"""
    class_labels: tuple[int, ...] | None = None
    """labels of the model's outputs, in their order, if they are integers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """names of the columns of the table that the model was fitted on, in their order"""
    names_declared: bool = False
    """whether the user declared the class names; False if they come from the model's file"""
    class_order: ClassOrder | None = None
    layout: Layout | None = None
    """layout of the stored arrays"""
    normalised: Normalisation | None = None
    """normalisation of the stored values; it is undone when they are read"""
    units: Units | None = None
    """units in which inputs are measured when they are read; `bounds` are in these units"""
    probe: ProbedClassifier | None = None
    """model whose accepted input shapes and number of classes are determined by calling it"""
    lenient: bool = False
    """whether values outside the bounds and labels outside the classes are accepted"""
    accepts_missing: bool = False
    """whether missing values are accepted without a test of the model"""
    checks_labels: bool = True
    """whether labels are checked; False if they are not used"""
    needs_labels: bool = True
    """whether data without labels are refused; otherwise their labels are `UNLABELLED`"""
    groups: str | None = None
    """column of a table, or array of an `.npz` file, that states the group of each example"""
    group_setting: str = "groups"
    """name of the setting with this column or array"""
    needs_groups: bool = True
    """whether data without this column or array are refused; False if their groups are not used"""
    words: tuple[str, ...] | None = ()
    """columns of a table that are read as strings, and are no numeric features; None for all columns"""
    rules: "Rules | None" = None
    """rules of the table whose rows are the inputs; None for other inputs"""
    bits: int | None = None
    """bits of a pixel of stored whole numbers, the largest of which is read as 1; None for bytes and other numbers"""
    first: FirstTable | None = None
    """data set whose columns those of a table are matched with; None for the first of a run"""
    has_threat: bool = True
    """whether the verb has a threat model, which may have rules of a table or be on texts"""
    edits: "TextEdits | None" = None
    """constraint on texts, if the inputs are texts; None for numbers"""
    changes: "ByteChanges | None" = None
    """constraint on files, if the inputs are files; None for numbers"""
    task: Task | None = None
    """what the model returns, if it is not one score for each class; the labels are then its truth"""

    @property
    def of_symbols(self) -> bool:
        """Whether the inputs are texts or files."""
        return self.edits is not None or self.changes is not None

    @property
    def of_numbers(self) -> bool:
        """Whether the inputs are numbers, without rules of a table."""
        return not self.of_symbols and self.rules is None

    @property
    def bounds_of_values(self) -> Bounds:
        """Valid range of the stored values."""
        return self.bounds if self.units is None else self.units.values

    @property
    def column_names(self) -> tuple[str, ...] | None:
        """Names of the columns of the first table or, without one, of those that the model was fitted on."""
        return self.first.columns if self.first is not None and self.first.named else self.feature_names

    @property
    def column_source(self) -> str:
        """The source of `column_names`, as the beginning of a message."""
        named = self.first is not None and self.first.named
        return self.first.has if self.first is not None and named else "the model was fitted on"

    @property
    def any_label(self) -> bool:
        """Whether labels outside the classes of the model are accepted."""
        return self.lenient or not self.checks_labels

    @property
    def remote(self) -> bool:
        """Whether the model that will be called with the data is behind a server."""
        return self.probe is not None and self.probe.model.remote


_LEAST_WIDTH, _MOST_SHIFT = 0.55, 1 / 3
"""width of a range, and shift of its middle, relative to the wider one, beyond which the units are probably others"""
_USUAL = ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5), (0.0, 255.0))
_NEAR = 0.05  # distance of the ends from those of a usual range, relative to its width
_ENDS = (0.01, 0.99)  # quantiles of the values of rows, in which single values may be far away
_VALUES = 1_000_000  # of which quantiles are computed


@dataclass(frozen=True)
class Ranges:
    """The ranges of the values of two sets of examples."""

    own: tuple[float, float]
    first: tuple[float, float]
    """range of the examples with which the others are compared"""

    @classmethod
    def of(cls, x: Inputs, first: Inputs) -> "Ranges":
        """Return the ranges of inputs (n, *features): those of all values, and for rows those of 98 % of them."""
        return cls(_range(x), _range(first))

    @property
    def differ(self) -> bool:
        """Whether one range is twice as wide as the other, or shifted by a third of it. A single value inside the range
        of the first examples is none: the inputs are constant.
        """
        (low, high), (first_low, first_high) = self.own, self.first
        width, first_width = high - low, first_high - first_low
        largest, shift = max(width, first_width), abs(low + high - first_low - first_high) / 2
        if width == 0 and first_low <= low <= first_high:
            return False
        return min(width, first_width) <= _LEAST_WIDTH * largest or shift >= _MOST_SHIFT * largest

    @property
    def may_be_poor(self) -> bool:
        """Whether the range lies inside that of the first examples and is not a usual one, so that a generator may be
        poor instead of having other units.
        """
        low, high = self.own
        is_usual = any(
            max(abs(low - usual), abs(high - other)) <= _NEAR * (other - usual) for usual, other in _USUAL
        )
        return self.first[0] <= low and high <= self.first[1] and not is_usual

    def sentence(self, subject: str, first: str) -> str:
        """Return a sentence with both ranges, whose subjects include the verb."""
        (low, high), (first_low, first_high) = self.own, self.first
        return (
            f"{subject} values from {low:.4g} to {high:.4g}, and {first} values from {first_low:.4g} to "
            f"{first_high:.4g}"
        )

    def refuse(self, subject: str, first: str) -> None:
        """Raise `UsageError` if the ranges differ."""
        if self.differ:
            raise UsageError(f"{self.sentence(subject, first)}; write both in the same range")


def _range(x: Inputs) -> tuple[float, float]:
    values = x.nan_to_num().flatten()
    if x.dim() > 2:
        return float(values.min()), float(values.max())
    some = values[:: -(-len(values) // _VALUES)].double()
    low, high = torch.quantile(some, some.new_tensor(_ENDS)).tolist()
    return low, high
