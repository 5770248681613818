"""Determines the layout of input arrays, such as channels first: the declared layout, or else the only one that the
network accepts.

Inside Holdfast the channels of images come first. A `LayoutReading` defines how the axes of a stored array are
converted to those of the inputs, and which layout the network receives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Remedy
from holdfast.core.types import Layout, Logits
from holdfast.io.models.declarations import LAYOUT
from holdfast.io.remote.probing import HWC_NOTE, ProbedClassifier

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
            Remedy("layout", "chw", function="open_data", reason="for grey images"),
            Remedy("layout", "asis", function="open_data", reason="for signals that are stored so"),
        )
    return distinct[0][0] if distinct else grey


def _refuse_no_image(shape: Sequence[int], declared: Layout, name: str) -> None:
    if declared != "asis" and len(shape) not in (3, 4, 5):
        raise UsageError(
            f"the layout {declared} is for images and volumes, but the inputs of {name} have shape {tuple(shape)}",
            Remedy("layout", function="open_data"),
            Remedy("layout", "asis", function="open_data"),
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
) -> list[tuple[LayoutReading, Logits]]:
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
) -> list[tuple[LayoutReading, Logits]]:
    accepted = []
    for reading in readings:
        outputs = probe.outputs(rows(reading), reading.network, whole=whole)
        if outputs is not None:
            accepted.append((reading, outputs))
    return accepted


def _distinct(accepted: list[tuple[LayoutReading, Logits]]) -> list[tuple[LayoutReading, Logits]]:
    """Return the first interpretation of each set of interpretations with equal outputs."""
    distinct: list[tuple[LayoutReading, Logits]] = []
    for reading, outputs in accepted:
        if not any(_equal(outputs, known) for _, known in distinct):
            distinct.append((reading, outputs))
    return distinct


def _equal(first: Logits, second: Logits) -> bool:
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
    shape: Sequence[int], distinct: Sequence[tuple[LayoutReading, Logits]], y: Tensor, name: str
) -> TargetError:
    options = [
        Remedy(
            "layout",
            _declared(reading, shape),
            function="open_data",
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


def _declared(reading: LayoutReading, shape: Sequence[int]) -> Layout:
    """Return the layout that declares an interpretation: `asis` if the axes do not change."""
    return "asis" if reading.stored == "chw" and len(shape) > 3 else reading.stored
