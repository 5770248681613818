"""Bounds of the margins of pixels, which prove the classes of pixels of a segmentation."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.certifiers.bounds.crown import Functions, cuts, relaxed
from holdfast.certifiers.bounds.graph import Graph, Relaxation, region_of
from holdfast.certifiers.bounds.operations import Nonnegative
from holdfast.certifiers.bounds.windows import Frame, Windows
from holdfast.certifiers.protocol import PIXELS, Proofs
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.model import Bounds
from holdfast.core.training import exactly
from holdfast.tasks.segmentation import IGNORED, Segmentation

_WORTH = 0.25
"""part of the margins that a substitution that ends before the input must prove, so that it is continued"""


@dataclass(frozen=True, eq=False)
class PixelBounder:
    """A function that bounds the margin of each pixel over all other classes, over the inputs of a threat model.

    A pixel is proved if the class in the mask is above all others for every input. The margins are bounded from the
    intervals of the last hidden values first, and those that are not proved from earlier values and from the input.
    """

    task: Segmentation
    graph: Graph
    constraint: Constraint
    bounds: Bounds
    substituted: bool
    """whether the bounds of hidden values are computed by backward substitution"""
    to_input: bool
    """whether the substitution of a margin continues to the input"""
    timeout_s: float
    """time limit for one image, half of it for the bounds of hidden values"""

    def __call__(self, batch: Batch) -> Proofs:
        """Return the pixels of each image that are proved, and whether its mean IoU is above 1/2 in any case."""
        with torch.no_grad(), exactly(batch.x):
            parts = [self._image(one) for one in batch.split(1)]
        return Proofs.joined([Proofs.none(batch.take(torch.zeros_like(batch.ids[:0]))), *parts])

    def _image(self, one: Batch) -> Proofs:
        now = time.perf_counter()
        assert one.truth is not None
        outputs, y = self.graph(one.x), one.truth
        classes, counted = outputs.shape[1], y != IGNORED
        label = y.clamp_min(0)[:, None]
        right = (outputs.argmax(1) == y) & counted  # others cannot be proved
        open_margins = right[:, None].expand_as(outputs).scatter(1, label, False)
        region = region_of(one.x, self.constraint, self.bounds)
        relaxation = relaxed(
            self.graph, region, substituted=self.substituted, deadline=now + self.timeout_s / 2
        )
        left, stopped = self._unproved(relaxation, open_margins, label, now + self.timeout_s)
        proved = right & ~left.any(1)
        none = Proofs.none(one)
        numbers = [_numbers(mask, label[:, 0], classes) for mask in (proved, counted)]
        bound = self.task.lowest_lead(*numbers)
        late = torch.full_like(none.stopped, stopped or relaxation.stopped) & bool(left.any())
        return replace(
            none,
            certified=bound > 0,
            bound=bound,
            work=torch.ones_like(none.work),
            stopped=late,
            undefined=relaxation.undefined(one.ids),
            of_task={PIXELS: numbers[0]},
        )

    def _unproved(
        self, relaxation: Relaxation, unknown: Tensor, label: Tensor, deadline: float
    ) -> tuple[Tensor, bool]:
        """The margins (1, classes, height, width) of the unknown ones that are not proved, and whether the deadline
        ended the search.
        """
        shape, unknown = unknown.shape, unknown.flatten(1)
        index, source = sources(self.graph)
        source = source.flatten().to(label.device)
        for until in self._ends(index):
            functions = Functions(relaxation, index, until)
            for _, rows in functions.pieces(unknown) if bool(unknown.any()) else ():
                if time.perf_counter() >= deadline:
                    return unknown.view(shape), True
                pixels = rows % label[0].numel()
                of_label = label.flatten(1).gather(1, pixels) * label[0].numel() + pixels
                lower = functions.lower_of(_differences(functions, source[of_label], source[rows]))
                unknown.scatter_(1, rows, unknown.gather(1, rows) & ~(lower > 0))
                if until and self.to_input and (lower > 0).float().mean() < _WORTH:
                    break
        return unknown.view(shape), False

    def _ends(self, index: int) -> list[int]:
        """The values at which the substitution of a margin ends, the nearest first."""
        last = max((i for i in self.graph.nonlinear if i < index), default=0)
        needed = [i for i in self.graph.ancestors(index) if i > last]
        passed = all(j >= last for i in needed for j in self.graph.node(i).inputs)
        first = last if passed else index
        return [
            first,
            *(cuts(self.graph, index) if self.to_input else ()),
            *((0,) if self.to_input and first else ()),
        ]


def sources(graph: Graph) -> tuple[int, Tensor]:
    """Return the earliest value from which the outputs (classes, height, width) are only moved, such as before a pixel
    shuffle, and the index of each output in it. The scores of a pixel have the same row and column there.
    """
    index = graph.output
    source = torch.arange(graph.shape_of(index).numel()).view(graph.shape_of(index))
    known = index, source
    while index and isinstance((node := graph.node(index)).operation, Nonnegative):
        shape = graph.shape_of(node.inputs[0])
        if node.operation.terms or len(node.inputs) > 1 or len(shape) != 3:
            break
        # counted from 1; 0 is padding
        numbers = torch.arange(1, shape.numel() + 1, dtype=torch.float64).view(1, *shape)
        source = node.operation(numbers)[0].long().flatten()[source] - 1
        places = source % (shape[1] * shape[2])
        if bool((source < 0).any()) or bool((places != places[:1]).any()):
            break
        index = node.inputs[0]
        known = index, source
    return known


def _differences(functions: Functions, label: Tensor, other: Tensor) -> Windows | Tensor:
    """The functions that are one value minus another at the same place, with indices (n, k) each, of the value of
    `functions`.
    """
    region, shape = functions.relaxation.region.low, functions.relaxation.graph.shape_of(functions.index)
    ones = torch.ones(label.shape, dtype=region.dtype, device=region.device)[..., None]
    if functions.index not in functions.frames:
        a = ones.new_zeros(*label.shape, shape.numel())
        a = a.scatter_(2, label[..., None], ones).scatter_(2, other[..., None], -ones)
        return a.view(*label.shape, *shape)
    rows, columns = shape[1:]
    channels, place = (
        [each[..., None] // (rows * columns) for each in (label, other)],
        label % (rows * columns),
    )
    a = ones.new_zeros(*label.shape, shape[0])
    a = a.scatter_(2, channels[0], ones).scatter_(2, channels[1], -ones)[..., None, None]
    places = (place // columns).flatten(), (place % columns).flatten()
    return Windows(a, places, (rows, columns), Frame(0, 0, 1, 1, 1, 1), inside=True)


def _numbers(mask: Tensor, label: Tensor, classes: int) -> Tensor:
    """Number of pixels (n, classes) in a mask (n, height, width), by their class."""
    zeros = torch.zeros(len(mask), classes, dtype=torch.long, device=mask.device)
    return zeros.scatter_add_(1, label.flatten(1), mask.flatten(1).long())
