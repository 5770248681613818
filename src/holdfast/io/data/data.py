"""Opens a data set of any supported format: a file, a folder or a name in the catalogue, and selects examples."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.core.batch import BY_LABEL, CLASSIFIERS_ONLY, UNLABELLED, Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import Remedy, TargetError, UsageError, data_argument
from holdfast.core.types import Layout
from holdfast.io.data import dicom, tables
from holdfast.io.data.arrays import Array, Arrays, Choice, first_rows_note, from_numpy, selected_rows
from holdfast.io.data.clips import (
    SUFFIXES,
    open_clips,
    refuse_misfit,
    refuse_rate,
    suffix_of_files,
    with_rate,
)
from holdfast.io.data.dicom import open_dicom
from holdfast.io.data.labels import (
    MOST_NAMES,
    Groups,
    Numbered,
    matched,
    numbered,
    refuse_swapped,
    refuse_unknown,
    renumbered,
    whole_numbers,
)
from holdfast.io.data.layouts import DeclaredData, layout_of_images
from holdfast.io.data.npz import Npz, arrays_of_split, named_arrays
from holdfast.io.data.pictures import Pictures, open_folder, open_pictures, open_tagged
from holdfast.io.data_catalogue import CATALOGUE, GENERATED, data_folder, refuse_environment
from holdfast.io.files import names_of, reading, similar_file, similar_name
from holdfast.io.models.models import BUNDLED_FOLDER


@dataclass(frozen=True)
class Selection:
    """A data set of selected rows of another data set. The examples keep their ids."""

    whole: Data
    rows: tuple[int, ...]
    own_groups: Groups | None = None
    """group of each selected example, if it is not that of the original data set"""
    own_notes: tuple[str, ...] = ()
    """notes on the selection for the report"""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the original data set and on the selection."""
        return (*getattr(self.whole, "notes", ()), *self.own_notes)

    @property
    def name(self) -> str:
        """Name of the original data set, which is shown in reports."""
        return self.whole.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes of the data set, or None if they are unknown."""
        return self.whole.classes

    @property
    def features(self) -> tuple[str, ...] | None:
        """Names of the feature columns if the data set is a table, else None."""
        features: tuple[str, ...] | None = getattr(self.whole, "features", None)
        return features

    @property
    def sampling_rate(self) -> int | None:
        """Number of samples of a second if the data set contains clips, else None."""
        return getattr(self.whole, "sampling_rate", None)

    @property
    def groups(self) -> Groups | None:
        """Group of each selected example, or None if it is unknown."""
        groups: Groups | None = getattr(self.whole, "groups", None)
        return groups.taken(self.rows) if self.own_groups is None and groups is not None else self.own_groups

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the digest of the original data set and of the selected row numbers."""
        return digest(canonical([self.whole.digest, self.rows]))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> Batch:
        """Return the examples from `start` to `stop` - 1 of the selection as a batch. Consecutive rows are read at
        once.
        """
        rows = self.rows[start:stop]
        if rows and rows == tuple(range(rows[0], rows[0] + len(rows))):
            return self.whole.read(rows[0], rows[-1] + 1)
        return concatenated([self.whole.read(row, row + 1) for row in rows])


def selected(data: Data, *, n: int | None, sample: int | None, seed: int) -> Data:
    """Return a data set with the first `n` examples of `data`, a random sample determined by `seed`, or all of them."""
    if n is None and sample is None:
        return data
    rows = selected_rows(len(data), n=n, sample=sample, seed=seed, name=data.name)
    if len(rows) == len(data):
        return data
    notes = first_rows_note(data.y, data.y[rows], n) if isinstance(data, Arrays) else ()
    return Selection(data, tuple(rows.tolist()), own_notes=notes)


def in_random_blocks(data: Data, ends: Sequence[int], seed: int) -> Data:
    """Return the examples of a data set in a random order that depends on `seed`, divided into blocks with these ends.
    Within a block they are in the order of the data set, in which they are read faster.
    """
    blocks = np.split(np.random.default_rng(seed).permutation(len(data)), ends[:-1])
    return Selection(data, tuple(np.concatenate([np.sort(block) for block in blocks]).tolist()))


def grouped(
    data: Data, groups: Groups | None, *, whole: bool, positions: NDArray[np.int64] | None = None
) -> Data:
    """Return a data set whose examples have `groups`, which contain one for each example of its source, in the order of
    the source. If `groups` is None, the data set itself must state them.

    `whole` is True if all examples of the source are in the data set. `positions` are those of the examples in the
    source; None if the data set has them. Raises `UsageError` if the number of groups is wrong, or if they cannot be
    used.
    """
    own: Groups | None = getattr(data, "groups", None)
    if groups is not None:
        positions = _positions(data) if positions is None else positions
        n, is_whole = len(groups.places), whole and bool((positions == np.arange(len(data))).all())
        if n <= positions.max() or (is_whole and n != len(data)):
            raise UsageError(
                f"groups has {n} values, and the data have {'' if is_whole else 'at least '}{positions.max() + 1} "
                "examples; one value for each example was expected"
            )
        own = groups.taken(positions)
    if own is None:
        raise UsageError(
            f"{data.name} has no columns or arrays with names that could state the groups; in Python, groups may be an "
            "array with one value for each example",
            Remedy("groups"),
        )
    return _with_groups(data, own)


def grouped_by_label(data: Data) -> Data:
    """Return a data set whose groups are its classes. Raises `UsageError` for a single class, or more than 50."""
    if isinstance(data, Arrays | Pictures):
        y = data.y
    else:
        y = torch.cat([data.read(row, row + _PIECE).y for row in range(0, len(data), _PIECE)]).numpy()
    names = data.classes or ()
    names += tuple(map(str, range(len(names), int(y.max()) + 1)))
    return _with_groups(data, Groups(names, y, BY_LABEL))


_PIECE = 1024  # examples that are read at a time


def _with_groups(data: Data, groups: Groups) -> Data:
    usable = groups.refuse_unusable()
    if isinstance(data, Arrays | Pictures):
        return replace(data, groups=usable)
    return Selection(data, tuple(range(len(data))), usable)


def _positions(data: Data) -> NDArray[np.int64]:
    """Return the positions of the examples of a data set in its source."""
    if isinstance(data, Selection):
        return _positions(data.whole)[list(data.rows)]
    return data.ids if isinstance(data, Arrays | Pictures) else np.arange(len(data))


def concatenated(batches: list[Batch]) -> Batch:
    """Return one batch that contains the examples of several batches."""
    truths = [batch.truth for batch in batches if batch.truth is not None]
    return Batch(
        torch.cat([batch.x for batch in batches]),
        torch.cat([batch.y for batch in batches]),
        torch.cat([batch.ids for batch in batches]),
        truth=torch.cat(truths) if truths else None,
    )


D = TypeVar("D", bound=Data)

_FORMS = (
    "a bundled or catalogue name, .npz, a folder of classes (images, DICOM files or clips), or a table in .csv or "
    ".parquet"
)


def bundled_data() -> dict[str, Path]:
    """Return the paths of the data sets that are bundled with Holdfast, by name."""
    return {path.stem: path for path in sorted(BUNDLED_FOLDER.glob("*.npz"))}


class Names(TypedDict):
    """Arguments of `open_data` that select columns of a table, or arrays of an `.npz` file, by name, and those that
    state how files are read.
    """

    label: str | None
    drop: tuple[str, ...]
    x: str | None
    y: str | None
    separator: str | None
    header: bool
    follow_links: bool
    sampling_rate: int | None


def open_data(
    address: str,
    *,
    split: str | None = None,
    label: str | None = None,
    drop: tuple[str, ...] = (),
    x: str | None = None,
    y: str | None = None,
    separator: str | None = None,
    header: bool = True,
    follow_links: bool = False,
    sampling_rate: int | None = None,
    n: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    expected: DeclaredData | None = None,
) -> Arrays | Pictures:
    """Return the data set at an address, which is a path or a name. Raises `UsageError` or `TargetError` with advice.

    `n` selects the first n examples of the split in source order, `sample` a random sample that depends on `seed`. If
    `split` is None, the test split is used if there is one. `label` is the label column of a table, and `drop` lists
    columns that are not features. `x` and `y` are names of arrays in an `.npz` file, and `x` that of a column of images
    or of arrays in a `.parquet` file. `separator` and `header` are those of a `.csv` file. `follow_links` permits links
    that lead out of a folder of images or clips. `sampling_rate` in Hz is that of clips in arrays, and the one to which
    clips in files are resampled. `expected` declares properties of the data. If `expected` has a model as its probe,
    the layout of its inputs and the number of its classes are determined from the data.
    """
    choice = Choice(split, n, sample, seed)
    expected = expected or DeclaredData()
    options = _Options(choice, label, drop, x, y, separator, header, follow_links, sampling_rate, expected)
    if address in GENERATED:
        data: Arrays | Pictures = _open_generated(address, options)
    else:
        place = _located(address)
        with reading(address):
            data = _opened(place, address, options)
    if isinstance(data, Arrays):
        data = with_rate(data, sampling_rate)
    return noting_fewer(data, n or sample)


def noting_fewer(data: D, requested: int | None) -> D:
    """Add a note for the report to a data set that has fewer examples than the `requested` number, and return the data
    set.
    """
    if requested is None or len(data) >= requested or not isinstance(data, Arrays | Pictures):
        return data
    note = f"{requested:,} examples were requested, and the data have {len(data):,}: all of them were used"
    return replace(data, notes=(*data.notes, note))


@dataclass(frozen=True)
class _Options:
    """Options of the user for opening a data set, other than its address."""

    choice: Choice
    label: str | None
    drop: tuple[str, ...]
    x: str | None
    y: str | None
    separator: str | None
    header: bool
    follow_links: bool
    sampling_rate: int | None
    expected: DeclaredData


@dataclass(frozen=True)
class _Location:
    """The file or folder of an address, with the properties that the catalogue declares for it."""

    path: Path
    classes: tuple[str, ...] | None = None
    label: str | None = None
    drop: tuple[str, ...] = ()
    layout: Layout | None = None
    """layout of the arrays that the catalogue declares"""


def _opened(place: _Location, address: str, options: _Options) -> Arrays | Pictures:
    path = place.path
    if options.drop and path.exists() and not path.name.endswith(tables.SUFFIXES):
        raise UsageError(f"{address!r} is not a table and has no columns", data_argument("drop"))
    if path.exists():
        _refuse_foreign(path, address, options)
    if path.is_dir() and options.expected.changes is not None:
        from holdfast.io.data.byte_files import open_files  # late: few inputs are files

        return open_files(path, options.choice, options.expected, follow_links=options.follow_links)
    task = None if options.expected.task is None else options.expected.task.name
    if task == "detection" and path.exists() and path.suffix != ".npz":
        from holdfast.io.data.boxes import open_boxes  # late: few data have boxes

        boxes = open_boxes(path, follow_links=options.follow_links)
        truth = boxes.truth.astype(np.float32)
        return open_pictures(
            address,
            boxes.paths,
            truth,
            boxes.names,
            options.choice,
            options.expected,
            follow_links=options.follow_links,
        )
    if path.is_dir() and task == "multilabel":
        return open_tagged(path, options.choice, options.expected, follow_links=options.follow_links)
    suffix = suffix_of_files(path) if path.is_dir() else ""
    if suffix in SUFFIXES:
        rate = options.sampling_rate
        return open_clips(
            path, options.choice, options.expected, sampling_rate=rate, follow_links=options.follow_links
        )
    if path.is_dir():
        refuse_rate(address, options.sampling_rate)
        opening = open_dicom if suffix in dicom.SUFFIXES else open_folder
        return opening(path, options.choice, options.expected, follow_links=options.follow_links)
    if path.name.endswith(tables.SUFFIXES):
        return tables.open_table(
            path,
            options.choice,
            name=address,
            label=options.label or place.label,
            drop=(*place.drop, *options.drop),
            expected=options.expected,
            inputs=options.x,
            separator=options.separator,
            header=options.header,
        )
    if path.suffix != ".npz" and path.exists():
        raise UsageError(f"{address!r} has an unknown data format; give {_FORMS}")
    return _open_archive(Npz(path), place, address, options)


def _open_generated(address: str, options: _Options) -> Arrays:
    """Return generated scenes with their masks or boxes. Raises `UsageError` for the task of classes."""
    from holdfast.io.data.scenes import CLASSES, SPLITS, scenes  # late: few runs are on scenes

    if options.drop:
        raise UsageError(f"{address!r} is not a table and has no columns", data_argument("drop"))
    _refuse_foreign(Path(address), address, options)
    refuse_rate(address, options.sampling_rate)
    split = options.choice.split or "test"
    rows = options.choice.rows(SPLITS.get(split, 1), address)
    made, task = scenes(int(rows[-1]) + 1, split=split), options.expected.task
    if task is None and options.expected.needs_labels and options.expected.checks_labels:
        raise UsageError(f"{address!r} has masks and boxes, and no class of each image. {CLASSIFIERS_ONLY}")
    expected = options.expected if task is not None else replace(options.expected, checks_labels=False)
    unlabelled = np.full(len(rows), UNLABELLED)
    name = "" if task is None else task.name
    truths: dict[str, Array] = {"segmentation": made.masks, "detection": made.boxes}
    labels = truths[name][rows] if name in truths else unlabelled
    return from_numpy(address, made.x[rows], labels, rows, expected, layout="chw", class_names=CLASSES)


def _refuse_foreign(path: Path, address: str, options: _Options) -> None:
    """Raise `UsageError` for options of other formats."""
    has_column = path.suffix == ".parquet" or options.expected.edits is not None
    named = [name for name in "xy" if getattr(options, name) and not (name == "x" and has_column)]
    if named and path.suffix != ".npz":
        first, *others = (data_argument(name) for name in named)
        raise UsageError(
            f"{address!r} is not an .npz file and has no named arrays", replace(first, also=tuple(others))
        )
    for key, value, default in (("separator", options.separator, None), ("header", options.header, True)):
        if value != default and not path.name.endswith((".csv", ".csv.gz")):
            raise UsageError(f"{address!r} is not a .csv file, and {key} is {value!r}", data_argument(key))


def _class_names(archive: Npz, address: str) -> tuple[str, ...]:
    """Return the class names in an archive. Their number is checked before they are read."""
    n = archive.rows("classes")
    if n > MOST_NAMES:
        raise TargetError(
            f"classes in {address!r} has {n:,} entries; at most {MOST_NAMES:,} class names were expected"
        )
    return tuple(str(name) for name in archive.array("classes"))


def _open_archive(archive: Npz, place: _Location, address: str, options: _Options) -> Arrays:
    x_name, y_name, inputs = _array_names(archive, address, options)
    if y_name is None:
        x = _inputs_of(archive, x_name, inputs, address)
        rows = options.choice.rows(len(x), address)
        labels, expected = np.full(len(rows), UNLABELLED), replace(options.expected, checks_labels=False)
        return from_numpy(address, x[rows], labels, rows, expected, layout=_layout(place.layout, x))
    n_rows, n_labels = archive.rows(x_name), archive.rows(y_name)
    if n_rows != n_labels:
        message = f"{x_name} of {address!r} has {n_rows} rows and {y_name} {n_labels}"
        raise TargetError(f"{message}; one label per example was expected")
    name = f"{x_name} of {address!r}"
    rows = options.choice.rows(n_rows, name)
    stop = int(rows[-1]) + 1
    x, all_labels = (
        _inputs_of(archive, x_name, inputs, address, stop=stop),
        archive.array(y_name),
    )
    names = place.classes
    if names is None and "classes" in archive.names:
        names = _class_names(archive, address)
    if options.expected.task is not None:
        layout, expected = _layout(place.layout, x), options.expected
        data = from_numpy(
            address, x[rows], all_labels[rows], rows, expected, layout=layout, class_names=names
        )
        return replace(data, groups=_groups(archive, n_rows, rows, address, expected))
    all_labels = whole_numbers(all_labels)
    other = data_argument("y", x_name)
    refuse_swapped(x, all_labels[:stop], repr(address), data_argument("x", y_name, also=(other,)))
    if len(rows) < stop:
        x = x[rows]
    numbering = Numbered(all_labels)
    if all_labels.dtype.kind == "U" and all_labels.ndim == 1:
        class_names = options.expected.class_names or names
        numbering = numbered(all_labels, replace(options.expected, class_names=class_names), name)
        all_labels, names = numbering.y, numbering.names
    else:
        if names is None and all_labels.dtype.kind in "iu":
            all_labels = numbered(all_labels, options.expected, name).y
        names, numbers = matched(names, options.expected)
        if numbers is not None and all_labels.dtype.kind in "iu" and all_labels.ndim == 1:
            all_labels = renumbered(all_labels, numbers, address)
    if options.sampling_rate is not None:
        refuse_misfit(x, options.expected, address, options.sampling_rate, of_files=False)
    data = from_numpy(
        address,
        x,
        all_labels[rows],
        rows,
        options.expected,
        layout=_layout(place.layout, x),
        class_names=names,
        notes=first_rows_note(all_labels, all_labels[rows], options.choice.n),
        source_labels=all_labels,
    )
    return replace(data.labelled(numbering), groups=_groups(archive, n_rows, rows, address, options.expected))


def _array_names(
    archive: Npz, address: str, options: _Options
) -> tuple[str, str | None, Mapping[str, int] | None]:
    """Return the names of the arrays of the inputs and the labels, the second of which may be None, and the inputs of a
    model with several, whose first array is that of the inputs.
    """
    needs_labels, split = options.expected.needs_labels, options.choice.split
    probe = options.expected.probe
    inputs = None if probe is None or options.expected.rules is not None else probe.model.inputs
    if inputs is not None:
        missing = next((each for each in inputs if each not in archive.names), None)
        if missing is not None:
            raise TargetError(
                f"the model has the input {missing!r}, and {address!r} has no such array; it has "
                f"{names_of(archive.names)}"
            )
        first, y = next(iter(inputs)), options.y or "y"
        return *named_arrays(archive, first, y, split, address, needs_labels=needs_labels), inputs
    if options.x or options.y:
        x, y_name = named_arrays(archive, options.x, options.y, split, address, needs_labels=needs_labels)
    else:
        x, y_name = arrays_of_split(archive, split, address, needs_labels=needs_labels)
    return x, y_name, None


def _inputs_of(
    archive: Npz, x: str, inputs: Mapping[str, int] | None, address: str, *, stop: int | None = None
) -> Array:
    """Return the array `x` of an archive, or rows with the values of all `inputs` of a model one after another. Raises
    `TargetError` for an array with another number of rows or of values of a row.
    """
    if inputs is None:
        return archive.array(x, stop=stop)
    n_rows, parts = archive.rows(x), []
    for name, size in inputs.items():
        values = archive.array(name, stop=stop)
        n_values = prod(values.shape[1:])
        if archive.rows(name) != n_rows or n_values != size:
            raise TargetError(
                f"the array {name!r} of {address!r} has {archive.rows(name)} rows of {n_values} values; {n_rows} rows "
                f"of {size} were expected"
            )
        parts.append(values.reshape(len(values), -1) / np.float32(255 if values.dtype == np.uint8 else 1))
    return np.concatenate(parts, 1).astype(np.float32)


def _groups(
    archive: Npz, n_rows: int, rows: NDArray[np.int64], address: str, expected: DeclaredData
) -> Groups | None:
    """Return the group of each example in the given rows, or None if no groups are requested."""
    name = expected.groups
    if name is None or not expected.needs_groups:
        return None
    refuse_unknown(name, archive.names, repr(address), expected.group_setting)
    if archive.rows(name) != n_rows:
        raise UsageError(
            f"the array {name!r} of {address!r} has {archive.rows(name)} rows, and there are {n_rows} examples; one "
            "group for each example was expected"
        )
    return Groups.of_values(archive.array(name), name).taken(rows)


def _layout(declared: Layout | None, x: Array) -> Layout | None:
    """Return the layout of the images in an archive of the catalogue; colour images may have their channels last."""
    return None if declared is None else layout_of_images(x)


def _located(address: str) -> _Location:
    if not address.strip():
        raise UsageError(f"the address of the data is empty ({address!r}); give {_FORMS}")
    bundled = bundled_data()
    if address in bundled:
        return _Location(bundled[address], layout="chw")
    if address in CATALOGUE:
        return _in_catalogue(address)
    if "://" in address:
        raise UsageError(
            f"{address!r} is a URL, but data are read from files: download it first, and give {_FORMS}"
        )
    path = Path(address)
    if path.exists():
        return _Location(path)
    refuse_environment(address)
    if os.sep in address or path.suffix:
        raise TargetError(f"data {address!r} does not exist{similar_file(path)}; give {_FORMS}")
    raise UsageError(
        f"there is no data set {address!r}{similar_name(address, [*bundled, *GENERATED, *CATALOGUE])}; give {_FORMS}"
    )


def _in_catalogue(name: str) -> _Location:
    entry = CATALOGUE[name]
    path = data_folder() / entry.file
    if not path.exists():
        fetch = (
            f"get it with holdfast data fetch {name}"
            if entry.remotes
            else "it has no official mirror that can be downloaded"
        )
        raise TargetError(
            f"{name} is not in {str(data_folder())!r}: {fetch}, or fill the folder with holdfast data import FOLDER"
        )
    return _Location(path, entry.classes, entry.label, entry.drop, layout="chw")
