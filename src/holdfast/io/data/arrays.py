"""Data sets of arrays in memory. The arrays are checked once and keep their original type; each batch is converted to
floats when it is read.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import HoldfastError, Placeholder, Remedy, TargetError, UsageError, data_argument
from holdfast.core.model import Bounds, Normalisation, Units
from holdfast.core.types import Inputs, Layout
from holdfast.io.data.columns import EXACT, in_order_of_first, inexact, notes_of_rules
from holdfast.io.data.labels import Numbered, class_labels, refuse_swapped
from holdfast.io.data.layouts import DeclaredData, LayoutReading, reading_of
from holdfast.io.files import NORMALISED_DATA
from holdfast.io.remote import probing

if TYPE_CHECKING:
    from holdfast.io.data.labels import Groups

_CHUNK = 1 << 22
"""Number of values that are checked at a time."""
_ROUNDING = 1e-6
"""Largest distance outside the bounds, relative to their width, that is treated as rounding."""

_EXAMPLES = 3
"""Number of features in an example of bounds."""

_IDS = 2
"""Number of rows with which it is tested whether the inputs are ids of tokens."""

_COMPARED = 64
"""Number of examples on which layouts of an array are compared. For a model behind a server it is two."""

Array = NDArray[Any]

FULL_SCALE = 32768
"""Number by which the samples of a clip in 16 bits are divided."""

_LABELLED = 128
"""Largest number of examples on which it is tested whether labels count from 1."""

_NUMBERS = "uint8 (0 to 255) or floats inside the bounds"
SUPPORTED = (
    "Inputs are images, signals or tables of numbers, which attacks change by small amounts; texts need a threat on "
    "texts, such as text:edits=1,words=3, and ids of tokens are not supported"
)
"""Sentence about the kinds of inputs for messages about others."""


BITS = data_argument("bits")
_BITS = (12, 16)  # bits of a pixel that are advised
_NORMALISED_INSIDE = "mean and std are for a model that needs normalised inputs"


@dataclass(frozen=True)
class Pixels:
    """Callable that converts normalised inputs back to pixel values."""

    normalised: Normalisation
    bounds: Bounds
    """bounds of the pixels"""
    slack: float
    """largest distance outside the bounds that rounding can explain; such pixels are clamped to the bounds"""

    @classmethod
    def of(cls, normalised: Normalisation, bounds: Bounds, resolution: float) -> "Pixels":
        """Return the conversion from inputs with the given normalisation to pixel values.

        `bounds` are those of the pixels, and `resolution` is the relative rounding error of the type in which the
        values were stored.
        """
        low, high = (torch.as_tensor(side, dtype=torch.float64) for side in (bounds.low, bounds.high))
        reach = float(torch.maximum(low.abs().max(), high.abs().max())) + max(map(abs, normalised.mean))
        return cls(normalised, bounds, max(_ROUNDING * bounds.width, 2 * resolution * reach))

    def __call__(self, x: Inputs) -> Inputs:
        """Return the pixels. Values further outside the bounds than rounding explains are not clamped."""
        pixels = self.normalised.undone(x)
        inside = self.bounds.clamp(pixels)
        return torch.where((pixels - inside).abs() <= self.slack, inside, pixels)

    def advice(self, highest: float) -> tuple[str, tuple[Remedy, ...]]:
        """Return advice and remedies for values outside the bounds. `highest` is the largest value after the
        conversion.
        """
        if _is_unit(self.bounds) and probing.pixel_divisor(0.0, round(highest, 3), 4) == 255:
            return (
                "mean and std of data_normalised seem to be on the scale of 0 to 255: divide them by 255",
                (probing.BYTES,),
            )
        return "correct data_normalised: give the mean and std by which the data were normalised", ()


@dataclass(frozen=True)
class Arrays:
    """A data set whose examples are in memory. Bytes are converted to floats when they are read."""

    name: str
    x: Array
    """uint8 or float, (N, …); images with the channels first"""
    y: NDArray[np.int64]
    ids: NDArray[np.int64]
    """row numbers of the examples in the source"""
    classes: tuple[str, ...] | None = None
    scale: float = 1.0
    """divisor of the stored values"""
    notes: tuple[str, ...] = ()
    """notes for the report"""
    pixels: Pixels | None = None
    """conversion of the stored values to pixels, if the stored values are normalised; else None"""
    units: Units | None = None
    """units in which the examples are returned; None for the values themselves"""
    reading: LayoutReading = LayoutReading("asis")
    """conversion of the axes of the original array to those of `x`"""
    features: tuple[str, ...] | None = None
    """names of the columns of a table, in the order of the inputs"""
    named: bool = False
    """whether `features` are names of a table, and not positions"""
    objection: HoldfastError | None = None
    """reason why the class numbers are uncertain, if the data were accepted in spite of it"""
    text_labels: bool = False
    """whether the labels of the source are names, which were numbered"""
    groups: "Groups | None" = None
    """group of each example, if the source states it"""
    sampling_rate: int | None = None
    """number of samples of a second, if the examples are clips; else None"""
    truth: Array | None = None
    """what outputs are compared with, (N, *truth), if the task is not one of classes; else None"""

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the values, labels and ids of the data set, and of the type, shape, scale and normalisation
        of the values.
        """
        digest = hashlib.sha256(f"{self.x.dtype} {self.x.shape} {self.scale}".encode())
        if self.pixels is not None:
            digest.update(repr(self.pixels.normalised).encode())
        if self.units is not None:
            digest.update(repr(self.units).encode())
        rows = _rows(self)
        for start in range(0, len(self.x), rows):
            digest.update(np.ascontiguousarray(self.x[start : start + rows]).tobytes())
        digest.update((self.y if self.truth is None else self.truth).tobytes())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()

    def taken(self, rows: Sequence[int]) -> "Arrays":
        """Return a data set that contains only the examples in the given rows."""
        chosen = np.asarray(rows, dtype=np.int64)
        groups = None if self.groups is None else self.groups.taken(chosen)
        truth = None if self.truth is None else self.truth[chosen]
        return replace(
            self, x=self.x[chosen], y=self.y[chosen], ids=self.ids[chosen], groups=groups, truth=truth
        )

    def labelled(self, numbering: Numbered) -> "Arrays":
        """Return the data set with the notes and the objection of `numbering`, from which its labels are."""
        return replace(
            self,
            notes=(*self.notes, *numbering.notes),
            objection=numbering.objection,
            text_labels=numbering.names is not None,
        )

    def read(self, start: int, stop: int) -> Batch:
        """Return the examples from `start` to `stop` - 1 as a batch of floats."""
        rows = slice(start, stop)
        # Copies, so that a change of the batch in place does not reach the data.
        stored = torch.from_numpy(np.array(self.x[rows], order="C"))
        x = stored if stored.is_floating_point() else stored.float()
        if self.scale != 1.0:
            x = x / self.scale
        if self.pixels is not None:
            x = self.pixels(x)
        if self.units is not None:
            x = self.units.normalisation.undone(x.double() if self.units.exact else x)
        truth = None if self.truth is None else torch.from_numpy(self.truth[rows].copy())
        y, ids = (torch.from_numpy(values[rows].copy()) for values in (self.y, self.ids))
        return Batch(x, y, ids, truth=truth)


def in_original_form(data: Arrays, changed: Inputs, original: Array) -> Array:
    """Convert the attacked inputs `changed` back to the axes, the scale and the normalisation of the user's array
    `original`, and return them as an array.

    The type is that of `original`. It is float32 if `original` has integers or half precision, because these types
    would round small changes away. Values that did not change are bitwise equal to those of `original`.
    """
    x = data.read(0, len(data)).x
    unchanged, changed = changed == x, changed.to(x.dtype)
    values = changed if data.units is None else data.units.normalisation.done(changed)
    values = values if data.pixels is None else data.pixels.normalised.done(values)
    if data.scale != 1.0:
        values = values * data.scale
    original_values, changed_values = (
        data.reading.array(array.numpy(), original.ndim) for array in (unchanged, values)
    )
    dtype = original.dtype if original.dtype in (np.float32, np.float64) else np.dtype(np.float32)
    return np.where(original_values, original.astype(dtype), changed_values.astype(dtype))


@dataclass(frozen=True)
class Choice:
    """Which examples of a data set are opened; see `selected_rows`."""

    split: str | None = None
    n: int | None = None
    sample: int | None = None
    seed: int = 0

    def rows(self, n_rows: int, name: str) -> NDArray[np.int64]:
        """Return the numbers of the selected rows of `n_rows` rows of a split, in ascending order."""
        return selected_rows(n_rows, n=self.n, sample=self.sample, seed=self.seed, name=name)


def first_rows_note(all_labels: Array, labels: Array, n: int | None) -> tuple[str, ...]:
    """Return the note on the first `n` examples of data if they have fewer classes than all of them, as in a file that
    is sorted by class.
    """
    if n is None or len(all_labels) == len(labels):
        return ()
    present, total = (len(np.unique(each)) for each in (labels, all_labels))
    first, random = ("example has", "a random one") if n == 1 else (f"{n:,} examples have", "random ones")
    note = f"the first {first} {present:,} of the {total:,} classes of the data"
    note += f"; sample={n} (--sample {n}) takes {random}"
    return () if present == total else (note,)


def selected_rows(
    n_rows: int, *, n: int | None, sample: int | None, seed: int, name: str
) -> NDArray[np.int64]:
    """Return the row numbers of the selected examples in ascending order: the first `n`, a random sample that depends
    on `seed`, or all.

    Raises `UsageError` if both `n` and `sample` are given or one is less than 1, and `TargetError` if there are no
    rows.
    """
    if n is not None and sample is not None:
        raise UsageError(
            f"n is {n} and sample is {sample}, which exclude each other: n is for the first examples, and sample for "
            "random ones",
            Remedy("sample"),
            Remedy("n", option="-n"),
        )
    for argument, number in (("n", n), ("sample", sample)):
        if number is not None and number < 1:
            raise UsageError(f"{argument} is {number}; at least one example is needed")
    if n_rows == 0:
        raise TargetError(f"{name} is empty; at least one example is needed")
    if sample is not None and sample < n_rows:
        return np.sort(np.random.default_rng(seed).choice(n_rows, sample, replace=False)).astype(np.int64)
    return np.arange(min(n or n_rows, n_rows), dtype=np.int64)


def from_numpy(
    name: str,
    x: Array,
    y: Array,
    ids: NDArray[np.int64],
    expected: DeclaredData | None = None,
    *,
    layout: Layout | None = None,
    class_names: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
    source_labels: Array | None = None,
    preserve: bool = False,
    resolution: float | None = None,
    features: tuple[str, ...] | None = None,
) -> Arrays:
    """Return a data set of the inputs `x` and the labels `y` after checks of their shapes, types and values. The rows
    must already be selected.

    `layout` is the layout of the source; a layout declared in `expected` takes precedence. `source_labels` contains the
    labels of the whole source, and `features` the names of the columns of a table. `preserve` is True for a tensor,
    whose axes and float64 type are preserved; `resolution` is then the relative rounding error of its type.
    """
    expected = expected or DeclaredData()
    names, probe = class_names or expected.class_names, expected.probe
    if len(x) == 0:
        raise TargetError(f"{name} is empty; at least one example is needed")
    if expected.of_symbols:
        from holdfast.io.data.columns import rows_of_symbols  # late: few inputs are texts or files

        x, preserve = rows_of_symbols(x, expected, ids, name), True
    if expected.rules is not None:
        notes += notes_of_rules(expected.rules, x, ids, name)
    if features is None and expected.of_numbers:
        notes += in_order_of_first(name, expected, x.shape[1:])
    task, truth = expected.task, None
    if task is not None:
        from holdfast.tasks.truth import truth_of  # late: most data have classes

        truth, y = truth_of(task.name, y, len(x), name), np.zeros(len(x), np.int64)
        expected, source_labels = replace(expected, checks_labels=False), None
        names = {"regression": None, "detection": class_names}.get(task.name, names)
    refuse_swapped(x, y, name)
    _refuse_no_numbers(x, name, preserve=preserve)
    _refuse_ids(x, probe)
    n_classes = expected.classes or (None if names is None else len(names))
    y = class_labels(y, len(x), expected, classes=n_classes, name=name, source_labels=source_labels)
    stored, scale, scale_notes = _stored(x, expected, name, preserve=preserve)
    pixels = _pixels(x, expected, name, resolution)
    unmoved = Arrays(
        name, stored, y, ids, names, scale, (), pixels, expected.units, features=features, truth=truth
    )
    declared = expected.layout or layout
    axis = _equal_channels(unmoved, probe)
    source = unmoved if axis is None else replace(unmoved, x=stored.take([0], axis=axis))
    reading = LayoutReading("asis") if preserve and declared is None else _reading(source, declared, probe)
    reading = replace(reading, equal_channels=axis)
    inputs = np.ascontiguousarray(reading.inputs(stored))
    data = replace(unmoved, x=inputs, reading=reading, notes=(*notes, *reading.notes, *scale_notes))
    if probe is not None:
        probe.own.layout = "asis" if declared == "asis" else reading.network or probe.own.layout
        data = with_network_layout(data, expected)
        if declared is not None:
            probe.own.layout = probe.own.layout or "chw"
        # Again, because the number of classes may have become known with the first outputs of the network.
        class_labels(y, len(x), expected, classes=probe.classes, name=name, source_labels=source_labels)
    check_inputs(data, expected)
    return with_note_on_labels(data, expected, y if source_labels is None else source_labels)


def _refuse_no_numbers(x: Array, name: str, *, preserve: bool) -> None:
    """Raise `TargetError` for inputs that are no numbers, or that have a single axis that is not preserved."""
    if x.dtype.kind not in "iubf":
        kind = "text" if x.dtype.kind in "UST" else str(x.dtype)
        raise TargetError(f"the inputs of {name} are {kind}; {_NUMBERS} were expected. {SUPPORTED}")
    if x.ndim < 2 and not preserve:
        raise TargetError(
            f"the inputs of {name} have shape {x.shape}; at least two axes were expected, (N, features) or more: give "
            "x.reshape(len(x), -1)"
        )


def with_note_on_labels(data: Arrays, expected: DeclaredData, all_labels: Array) -> Arrays:
    """Return the data set, with a further note if its labels seem to count from 1 instead of 0: the lowest is 1, the
    highest is the last class of the model, and the model is no more accurate on them than chance.

    `all_labels` are the labels of the whole source, of which `data` may be a part. A model behind a server is not
    called, and the data set is then unchanged. Raises `TargetError` if the model is far more accurate with 1 subtracted
    from the labels. Cost: a forward pass of at most 128 examples if the lowest label is 1.
    """
    probe = expected.probe
    if probe is None or probe.model.remote or expected.any_label or int(all_labels.min()) != 1:
        return data
    from holdfast.io.doctor.readings import note_on_labels  # late: few labels have no 0

    places = np.unique(np.linspace(0, len(data) - 1, min(_LABELLED, len(data))).astype(np.int64))
    batch = data.taken(places.tolist()).read(0, len(places))
    logits = probe.outputs(batch.x)
    if logits is None:
        return data  # the run raises the error of the network again, with advice
    notes = note_on_labels(probe.model, batch, logits, int(all_labels.max()), data.name)
    return replace(data, notes=(*data.notes, *notes))


def _refuse_ids(x: Array, probe: probing.ProbedClassifier | None) -> None:
    """Raise `TargetError` if the inputs are rows of numbers, and the model accepts ids of tokens."""
    takes_ids = (
        x.ndim == 2
        and probe is not None
        and probe.takes_ids(torch.from_numpy(np.array(x[:_IDS], np.float32)))
    )
    if takes_ids:
        raise TargetError(
            f"the model rejects floats and accepts whole numbers, as models of texts do. {SUPPORTED}"
        )


def with_network_layout(data: Arrays, expected: DeclaredData) -> Arrays:
    """Determine the order of axes that the network accepts for its inputs. Return the data set, with a note for the
    report if the layout of the network was set.
    """
    if expected.probe is None:
        return data
    return replace(data, notes=(*data.notes, *expected.probe.suit(data.read(0, 2).x)))


def _reading(data: Arrays, declared: Layout | None, probe: probing.ProbedClassifier | None) -> LayoutReading:
    """Return how the axes of the stored array correspond to those of the inputs."""
    n = 2 if probe is not None and probe.model.remote else _COMPARED
    positions = np.unique(np.linspace(0, len(data) - 1, min(n, len(data))).astype(np.int64))
    if len(positions) == 1:
        # Two rows, because a network may treat a single one as an example without a batch axis.
        positions = positions.repeat(2)

    def rows(reading: LayoutReading) -> Tensor:
        chosen = replace(
            data, x=reading.inputs(data.x[positions]), y=data.y[positions], ids=data.ids[positions]
        )
        return chosen.read(0, len(positions)).x

    y = torch.from_numpy(data.y[positions])
    return reading_of(data.x.shape, declared, probe, rows, y, data.name)


def _equal_channels(data: Arrays, probe: probing.ProbedClassifier | None) -> int | None:
    """Return the axis of three equal channels of images, if the network rejects colour images and accepts grey ones."""
    rows = data.x[:_COMPARED]
    axes = [axis for axis in (1, 3) if rows.ndim == 4 and rows.shape[axis] == 3]
    equal = [axis for axis in axes if (rows == rows.take([0], axis=axis)).all()]
    if probe is None or not equal or not (data.x == data.x.take([0], axis=equal[0])).all():
        return None
    few = replace(data, x=np.moveaxis(rows, equal[0], 1), y=data.y[: len(rows)], ids=data.ids[: len(rows)])
    return equal[0] if probe.needs_grey(few.read(0, 2).x) else None


def _pixels(x: Array, expected: DeclaredData, name: str, resolution: float | None) -> Pixels | None:
    if expected.normalised is None:
        return None
    if x.dtype.kind != "f":
        raise TargetError(
            f"the inputs of {name} are {x.dtype}, but normalised values are floats; {_NORMALISED_INSIDE}",
            NORMALISED_DATA,
        )
    if min(expected.normalised.mean) > 0 and x.min() >= 0 and x.max() <= 1:
        raise TargetError(
            f"the inputs of {name} range from {x.min():.6g} to {x.max():.6g}, but normalised values lie on both sides "
            f"of 0: these seem not to be normalised; {_NORMALISED_INSIDE}",
            NORMALISED_DATA,
        )
    return Pixels.of(
        expected.normalised, expected.bounds_of_values, resolution or float(np.finfo(x.dtype).eps)
    )


def check_inputs(data: Arrays, expected: DeclaredData) -> None:
    """Raise `TargetError` if inputs of the data set are not finite or are outside the bounds. Bytes divided by 255 are
    always valid and are not checked.

    NaN is a missing value, which is accepted if the model has finite outputs for the examples with missing values.
    """
    bounds, probe = expected.bounds, expected.probe
    if data.x.dtype == np.uint8 and data.scale == 255.0 and _is_unit(bounds):
        return
    lowest, highest, outside = np.inf, -np.inf, False
    rows = _rows(data)
    for start in range(0, len(data), rows):
        batch = data.read(start, start + rows)
        not_finite = ~torch.isfinite(batch.x.reshape(len(batch), -1)).all(1)
        if not_finite.any():
            x = batch.x[not_finite]
            handled = expected.accepts_missing or (probe is not None and probe.handles_missing(x))
            if x.isinf().any() or not handled:
                reason = "" if probe is None else ", and the model has no finite output for such rows"
                raise TargetError(
                    f"{data.name} contains NaN or infinity, first in row {int(batch.ids[not_finite][0])}{reason}; "
                    "replace or remove such rows"
                )
        numbers = batch.x[~batch.x.isnan()]
        if len(numbers):
            lowest, highest = min(lowest, float(numbers.min())), max(highest, float(numbers.max()))
        outside |= _outside(batch.x, bounds, data.name)
    if outside and not expected.lenient:
        if isinstance(bounds.high, Tensor) or data.units is not None:
            raise _outside_of_feature(data, bounds)
        raise _out_of_range(data, lowest, highest, bounds)


def handles_missing(x: Array, expected: DeclaredData) -> bool:
    """Return whether the model accepts the rows `x` (n, features) of a table that have missing values."""
    rows = np.isnan(x).any(1)
    ids = np.flatnonzero(rows)
    pixels = _pixels(x, expected, "the table", None)
    data = Arrays(
        "the table", x[rows], np.zeros(len(ids), np.int64), ids, pixels=pixels, units=expected.units
    )
    if expected.accepts_missing:
        return True
    return expected.probe is not None and expected.probe.handles_missing(data.read(0, len(data)).x)


def _rows(data: Arrays) -> int:
    """Return the number of examples that are checked at a time."""
    return max(1, _CHUNK // max(1, prod(data.x.shape[1:])))


def _outside(x: Tensor, bounds: Bounds, name: str) -> bool:
    try:
        return bool(probing.outside(x, bounds).any())
    except RuntimeError as error:
        shape = tuple(bounds.like(x)[0].shape)
        raise UsageError(
            f"the bounds have shape {shape}, but an input of {name} has shape {tuple(x.shape[1:])}; give "
            "two numbers, or bounds of the shape of an input"
        ) from error


def ranges_of_features(data: Arrays) -> Remedy:
    """Return the remedy for a table whose features are not scaled to one range: bounds of each feature, in which eps is
    measured, unless it is measured in other units already.

    The bounds of the example are the ranges of the values.
    """
    x = _values(data, data.read(0, len(data)).x)
    names = data.features or tuple(map(str, range(x.shape[1])))
    ends = [probing.extremes(column) for column in x[:, :_EXAMPLES].T]
    shown = ", ".join(
        f'"{name}": [{low:g}, {high:g}]' for name, (low, high) in zip(names[:_EXAMPLES], ends, strict=True)
    )
    mapping = f"{{{shown}{', …' if len(names) > _EXAMPLES else ''}}}"
    measured = data.units is not None
    return Remedy(
        "bounds",
        Placeholder("@FILE", mapping, f"FILE contains JSON such as {mapping}"),
        also=() if measured else (Remedy("threat", "linf:0.05,unit=range"),),
        reason=f"for features with different ranges{'' if measured else ', in which eps is then measured'}",
    )


def _values(data: Arrays, x: Tensor) -> Tensor:
    """Return the values of a data set in their own units."""
    return x if data.units is None else data.units.normalisation.done(x)


def _outside_of_feature(data: Arrays, bounds: Bounds) -> TargetError:
    """Return the error for the first value outside the bounds of its feature."""
    batch = data.read(0, len(data))
    low, high = bounds.like(batch.x)
    row, *place = ((batch.x < low) | (batch.x > high)).nonzero()[0].tolist()
    values = _values(data, batch.x)
    sides = bounds if data.units is None else data.units.values
    lowest, highest = (
        float(torch.as_tensor(side).expand(batch.x.shape[1:])[tuple(place)]) for side in sides.like(batch.x)
    )
    feature = data.features[place[0]] if data.features is not None else f"feature {place[0]}"
    found = (
        f"the value of {feature} in row {int(batch.ids[row])} of {data.name} is {float(values[row, *place]):g}, "
        f"outside its bounds {lowest:g} to {highest:g}"
    )
    if data.units is not None and len({*zip(data.units.low, data.units.high, strict=True)}) == 1:
        # the same bounds for all, such as those by default
        return TargetError(
            f"{found}; a unit of each feature, unit={data.units.text}, needs the bounds of each feature",
            ranges_of_features(data),
        )
    return TargetError(f"{found}; correct the bounds, or remove such rows")


def _out_of_range(data: Arrays, lowest: float, highest: float, bounds: Bounds) -> TargetError:
    """Return the error for inputs outside the bounds."""
    expected = f"{_side(bounds.low)} to {_side(bounds.high)} was expected"
    message = f"range from {lowest:.6g} to {highest:.6g}; {expected}"
    if data.pixels is not None:
        subject = f"the inputs of {data.name}, their normalisation {data.pixels.normalised} undone, {message}"
        advice, remedies = data.pixels.advice(highest)
        return TargetError(f"{subject}; {advice}", *remedies)
    message = f"the inputs of {data.name} {message}"
    if not _is_unit(bounds):
        # other data of the run are inside the declared bounds
        low, high = float(bounds.low), float(bounds.high)
        both = probing.range_of_training(
            min(lowest, low), max(highest, high), "the bounds and the range of these inputs"
        )
        return TargetError(f"{message}; scale them", both)
    bytes_ = probing.pixel_divisor(lowest, highest, data.x.ndim) == 255
    advice = (
        "divide them by 255 (or save them as uint8)"
        if bytes_
        else probing.as_in_training(lowest, highest, data.x.ndim)
    )
    if data.features is None and data.x.ndim == 2 and bool((data.x == np.round(data.x)).all()):
        # they may be ids of tokens
        advice = f"{advice}. {SUPPORTED}."
    by_feature = () if data.features is None else (ranges_of_features(data),)
    common = (probing.before_normalisation(), probing.range_of_training(lowest, highest))
    return TargetError(f"{message}; {advice}", *common, *by_feature)


def _side(side: float | Tensor) -> str:
    return (
        f"{side:g}" if isinstance(side, (int, float)) else f"[{float(side.min()):g} … {float(side.max()):g}]"
    )


def _is_unit(bounds: Bounds) -> bool:
    return isinstance(bounds.low, (int, float)) and (bounds.low, bounds.high) == (0, 1)


def _stored(
    x: Array, expected: DeclaredData, name: str, *, preserve: bool
) -> tuple[Array, float, tuple[str, ...]]:
    """Return the values to store, the number by which they are divided when they are read, and notes for the report."""
    bounds = expected.bounds_of_values
    if expected.bits is not None:
        return *_of_bits(x, expected.bits, bounds, name), ()
    if x.dtype == np.bool_:
        return x.astype(np.uint8), 1.0, ()
    if x.dtype == np.uint8:
        # A table of binary features; dividing it by 255 would make all values nearly equal.
        if x.ndim == 2 and x.max() <= 1:
            return x, 1.0, ("the features are 0 or 1 and were not divided by 255",)
        if isinstance(bounds.high, (int, float)) and (bounds.low, bounds.high) == (0, 255):
            return x, 1.0, ("the bounds are 0 to 255, so the bytes were not divided by 255",)
        if isinstance(bounds.high, Tensor):
            return x, 1.0, ("each feature has its own bounds, so the bytes were not divided by 255",)
        return x, 255.0, ()
    if x.dtype.kind == "f":
        if preserve and x.dtype == np.float64:
            return x, 1.0, ()
        if x.dtype == np.float64:
            _refuse_inexact(x, name)
        return x.astype(np.float32, copy=False), 1.0, ()
    if x.dtype == np.int16 and isinstance(bounds.low, (int, float)) and (bounds.low, bounds.high) == (-1, 1):
        return x, float(FULL_SCALE), ()
    if _is_unit(bounds) and (x.ndim > 2 or _may_be_audio(x)):
        raise _of_integers(x, name)
    lowest, highest = int(x.min()), int(x.max())
    if max(abs(lowest), abs(highest)) > EXACT:
        raise TargetError(
            f"the inputs of {name} are {x.dtype} from {lowest} to {highest}, and float32, in which the model computes, "
            f"represents all whole numbers only up to {EXACT}: scale the features as in training"
        )
    return x.astype(np.float32), 1.0, ()


def _of_bits(x: Array, bits: int, bounds: Bounds, name: str) -> tuple[Array, float]:
    """Return the pixels of a declared number of bits, and the number by which they are divided when they are read."""
    highest = 2**bits - 1
    if x.dtype.kind not in "iu":
        raise UsageError(
            f"bits is {bits}, and the inputs of {name} are {x.dtype}; whole numbers were expected", BITS
        )
    if not _is_unit(bounds):
        raise UsageError(
            f"bits is {bits}, with which the inputs of {name} are from 0 to 1, and the bounds are {_side(bounds.low)} "
            f"to {_side(bounds.high)}; for a model that takes the stored values, measure eps with unit=range",
            BITS,
        )
    if x.min() < 0 or x.max() > highest:
        raise TargetError(
            f"the inputs of {name} range from {x.min()} to {x.max()}; 0 to {highest}, for {bits} bits, was expected",
            *(data_argument("bits", n) for n in _BITS if bits < n and x.min() >= 0 and x.max() < 2**n),
        )
    return x.astype(np.uint16), float(highest)


def _refuse_inexact(x: NDArray[np.float64], name: str) -> None:
    """Raise `TargetError` for a feature whose numbers lose information as float32."""
    if not (np.abs(x) > EXACT).any():
        return
    for place, column in enumerate(x.reshape(len(x), -1).T):
        rows = np.flatnonzero(inexact(column))
        if len(rows):
            raise TargetError(
                f"the inputs of {name} have the value {float(column[rows[0]])!r} in feature {place}, and float32, in "
                f"which the model computes, represents all whole numbers only up to {EXACT}: scale the features as in "
                "training"
            )


def _of_integers(x: Array, name: str) -> TargetError:
    """Return the error for integers of a scale that is not known, in a model whose inputs are from 0 to 1.

    Bytes are recognised by their range, and samples of audio by their type.
    """
    lowest, highest = int(x.min()), int(x.max())
    message = f"the inputs of {name} are {x.dtype} from {lowest} to {highest}; {_NUMBERS} were expected"
    if _may_be_audio(x):
        return TargetError(
            f"{message}: if they are samples of audio, whose largest value is {FULL_SCALE}",
            Remedy("bounds", (-1, 1), reason="if the model was trained on values from -1 to 1"),
            Remedy(
                "bounds",
                (-32768, 32767),
                reason="if it was trained on these values (eps is then on that scale)",
            ),
        )
    if probing.pixel_divisor(lowest, highest, x.ndim) == 255:
        return TargetError(f"{message}: give x.astype('float32') / 255 if they are pixels. {SUPPORTED}")
    by_bits = (
        data_argument("bits", n, reason=f"for pixels of {n} bits, with a model that takes values from 0 to 1")
        for n in _BITS
        if lowest >= 0 and highest < 2**n
    )
    return TargetError(
        f"{message}: if they are signals or pixels, scale them as in the training of the model. {SUPPORTED}",
        *by_bits,
    )


def _may_be_audio(x: Array) -> bool:
    return x.dtype == np.int16 and int(x.min()) < 0
