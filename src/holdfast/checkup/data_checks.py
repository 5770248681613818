"""What the data alone say, and what of a model's bounds and classes they do not fit: nothing is asked of the model."""

from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.checkup.examined import Finding
from holdfast.core.batch import Batch, Data
from holdfast.core.labels import advice
from holdfast.core.model import Classifier
from holdfast.core.types import Labels, Rows
from holdfast.sources.arrays import Arrays
from holdfast.sources.estimates import pixel_divisor, scaling
from holdfast.sources.pictures import Pictures

SAMPLE = 256
"""examples that are looked at"""
_MISFITS = 16  # examples outside the bounds or the classes that are added to them
_CHUNK = 4096
_ROUNDING = 1e-6


def strange_classes(data: Data) -> Iterator[Finding]:
    """Named classes whose numbers are not certain, as of a folder that lacks one of the model's classes."""
    if isinstance(data, Pictures | Arrays) and data.objection:
        yield Finding("classes", "problem", data.objection)


def range_of_labels(data: Data, batch: Batch) -> tuple[int, int]:
    """The smallest and the largest label: of arrays those of all examples, else those of the sample."""
    y = torch.from_numpy(data.y) if isinstance(data, Arrays) else batch.y
    return int(y.min()), int(y.max())


def sampled(data: Data, n: int, model: Classifier | None = None) -> Batch:
    """At most `n` examples spread evenly over the data set, so that files sorted by class show all of them.

    With a `model` those are added that an assessment of it would refuse.
    """
    n = min(n, len(data))
    misfits = [] if model is None else _misfits(data, model)
    rows = sorted({*(k * len(data) // n for k in range(n)), *misfits})
    pieces = [data.read(row, row + 1) for row in rows]
    return Batch(
        torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces]), torch.cat([p.ids for p in pieces])
    )


def _misfits(data: Data, model: Classifier) -> list[int]:
    """The first rows of arrays that an assessment would refuse; images are bytes in named folders and always fit."""
    found: list[int] = []
    if isinstance(data, Arrays):
        for start in range(0, len(data), _CHUNK):
            batch = data.read(start, min(start + _CHUNK, len(data)))
            misfit = _outside(batch.x, model).flatten(1).any(1) | (batch.y < 0)
            if model.classes is not None:
                misfit |= batch.y >= model.classes
            found += (start + misfit.nonzero().flatten()).tolist()
    return found[:_MISFITS]


def _outside(x: Tensor, model: Classifier) -> Tensor:
    low, high = model.bounds.like(x)
    slack = _ROUNDING * (high - low)
    return (x < low - slack) | (x > high + slack)


def moved_inside(model: Classifier, x: Tensor, seen: Tensor) -> Tensor:
    """Inputs `x`, divided as the finding on the range of the examples `seen` says: other checks mean more then."""
    divisor = pixel_divisor(float(seen.min()), float(seen.max()), seen.dim())
    if bool(_outside(seen, model).any()) and model.bounds.width <= 1 and divisor is not None:
        return x / divisor
    return x


def known_labels(y: Labels, classes: int, labels: tuple[int, int]) -> tuple[Labels, Rows]:
    """The labels as the finding on their range, `labels`, would have them, and the rows of those that can be used."""
    if labels == (1, classes):
        return y - 1, torch.arange(len(y), device=y.device)
    known = ((y >= 0) & (y < classes)).nonzero()[:, 0]
    if not len(known):
        return y.clamp(0, classes - 1), torch.arange(len(y), device=y.device)
    return y[known], known


def range_of_values(model: Classifier, x: Tensor, data: Data) -> Iterator[Finding]:
    """Whether the values of the inputs lie inside the bounds, and fill them."""
    low, high = (float(end) for end in (x.min(), x.max()))
    seen = f"inputs run from {low:.4g} to {high:.4g}"
    if bool(_outside(x, model).any()):
        if isinstance(data, Arrays) and data.pixels is not None:
            way_out = data.pixels.advice(high)
        elif model.bounds.width <= 1 and pixel_divisor(low, high, x.dim()) == 255:
            way_out = "divide them by 255 (or --bounds 0,255, if the network takes them so)"
        else:
            way_out = scaling(x)
        yield Finding("range", "problem", f"{seen}, outside the bounds", way_out)
    elif model.bounds.width >= 100 and high <= 1.0:
        reach = float(model.bounds.like(x)[1].max())
        yield Finding("range", "problem", f"{seen}, but the bounds reach to {reach:g}", "use --bounds 0,1")
    else:
        yield Finding("range", "good", f"{seen}, inside the bounds")


def labels_outside(lowest: int, highest: int, classes: int, *, remote: bool) -> Iterator[Finding]:
    """Labels that are none of the classes of the model."""
    if lowest < 0 or highest >= classes:
        text = f"labels run from {lowest} to {highest}, but the model knows classes 0 to {classes - 1}"
        from_one = (lowest, highest) == (1, classes)
        other = advice(lowest, highest, classes, remote=remote)
        yield Finding("labels", "problem", text, "they seem to start at 1: subtract 1" if from_one else other)
