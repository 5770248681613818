"""Tables as a data set: numeric columns are the features, one column is the label."""

import csv
import gzip
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import NoSplit, TargetError, UsageError
from holdfast.sources.arrays import Arrays, from_numpy, selected_rows
from holdfast.sources.class_numbers import numbered
from holdfast.sources.expected import Expected
from holdfast.sources.files import megabytes, nearest, readable_file

MAX_BYTES = 2**30
"""of a text table once inflated"""
MAX_CELLS = 200_000_000
"""of a parquet table; its encodings can repeat one value for ever in a few bytes"""
SUFFIXES = (".csv", ".csv.gz", ".parquet")
SPLIT_COLUMN = "split"
"""a column of this name says which rows are train and which are test"""


@dataclass(frozen=True)
class Table:
    """Columns of text, by name, in the order of the file."""

    name: str
    """as messages have it"""
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def open_table(
    path: Path,
    *,
    name: str,
    label: str | None,
    drop: tuple[str, ...] = (),
    split: str | None,
    n: int | None,
    sample: int | None,
    seed: int,
    expected: Expected | None = None,
) -> Arrays:
    """The rows of a split, features as float32.

    Labels that are whole numbers from 0 on are the class numbers; any others are names of classes.
    """
    readable_file(path, "data file")
    table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    return examples(
        table,
        name=name,
        label=label,
        drop=drop,
        split=split,
        n=n,
        sample=sample,
        seed=seed,
        expected=expected,
    )


def examples(
    table: Table,
    *,
    name: str,
    label: str | None,
    drop: tuple[str, ...] = (),
    split: str | None = None,
    n: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    expected: Expected | None = None,
) -> Arrays:
    """The rows of a split of a table that was read, as `open_table` returns them."""
    expected = expected or Expected()
    label = _label(label, table)
    _refuse_dropped(drop, label, table)
    kept = _rows_of_split(table, split)
    chosen = kept[selected_rows(len(kept), n=n, sample=sample, seed=seed, name=name)]
    column = table.columns[label]
    y = _class_numbers(column, name)
    if y is not None:
        y = numbered(y, expected, name).y
    features = [column for column in table.columns if column not in (label, SPLIT_COLUMN, *drop)]
    features = _as_fitted(features, table, expected)
    x = _numbers(table, features, chosen)
    if y is not None:
        data = from_numpy(name, x, y[chosen], chosen, expected, whole=y)
        return replace(data, features=tuple(features))
    # the model has seen the inputs, and its classes are counted, before names are numbered
    data = from_numpy(name, x, np.zeros(len(chosen), np.int64), chosen, expected)
    given = numbered(np.array(column), expected, table.name)
    return replace(
        data,
        y=given.y[chosen],
        features=tuple(features),
        classes=given.names,
        notes=(*data.notes, _numbering(given.names or ())),
        objection=given.objection,
    )


def _numbering(names: tuple[str, ...]) -> str:
    """A note that says which number each class has."""
    shown = ", ".join(f"{name}={i}" for i, name in enumerate(names[:6]))
    return f"text labels were numbered: {shown}{' …' if len(names) > 6 else ''}"


def _as_fitted(features: list[str], table: Table, expected: Expected) -> list[str]:
    """The features in the order in which the model was fitted on them, where it knows their names."""
    wanted = expected.feature_names
    if wanted is None or expected.lenient:
        return features
    missing = [name for name in wanted if name not in features]
    extra = [name for name in features if name not in wanted]
    if missing or extra:
        lacks = (
            f"lacks {', '.join(map(repr, missing[:6]))}{' …' if len(missing) > 6 else ''}" if missing else ""
        )
        has = (
            f"has {', '.join(map(repr, extra[:6]))}{' …' if len(extra) > 6 else ''} beside them"
            if extra
            else ""
        )
        flags = " ".join(f"--drop {shlex.quote(name)}" for name in extra[:6])
        way_out = f"leave those out: {flags}" if not missing else "rename or add the columns as in training"
        raise TargetError(
            f"the model was fitted on {len(wanted)} named columns, and {table.name} "
            f"{' and '.join(filter(None, (lacks, has)))}; {way_out}"
        )
    return list(wanted)


def _label(label: str | None, table: Table) -> str:
    """The name of the label column, if there is one of that name."""
    if label is not None and label in table.columns:
        return label
    wrong = (
        f"{table.name} has no column {label!r}{nearest(label, table.columns)}"
        if label
        else f"{table.name} is a table"
    )
    raise UsageError(f"{wrong}; name its label with --label, one of {', '.join(table.columns)}")


def _refuse_dropped(drop: tuple[str, ...], label: str, table: Table) -> None:
    for column in drop:
        if column not in table.columns:
            several = column.split(",")
            if len(several) > 1 and all(part.strip() in table.columns for part in several):
                flags = " ".join(f"--drop {shlex.quote(part.strip())}" for part in several)
                raise UsageError(f"{table.name} has no column {column!r}; repeat the flag: {flags}")
            raise UsageError(f"{table.name} has no column {column!r} to drop{nearest(column, table.columns)}")
        if column == label:
            raise UsageError(f"{column!r} is the label of {table.name}; leave --drop {column} out")


def _read_csv(path: Path) -> Table:
    try:
        with path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise TargetError(
                f"{str(path)!r} holds more than {megabytes(MAX_BYTES)}; use parquet or fewer rows"
            )
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        return _table(path, lines)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TargetError(f"{str(path)!r} is no readable UTF-8 table: {error}") from error


def _table(path: Path, lines: Iterator[list[str]]) -> Table:
    header = next(lines, [])
    if not header or len(set(header)) != len(header):
        doubled = [name for name in header if header.count(name) > 1]
        raise TargetError(f"{str(path)!r} needs a header of distinct names; found {doubled[:3] or 'nothing'}")
    rows = [row for row in lines if row]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise TargetError(
                f"row {number} of {str(path)!r} has {len(row)} cells; the header has {len(header)}"
            )
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in header]
    return Table(repr(str(path)), dict(zip(header, columns, strict=True)))


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            f'{str(path)!r} is parquet; reading it needs pip install "holdfast[parquet]"'
        ) from error
    try:
        said = pq.read_metadata(path)
        if said.num_rows * said.num_columns > MAX_CELLS:
            raise TargetError(
                f"{str(path)!r} declares {said.num_rows} rows of {said.num_columns} columns; "
                f"at most {MAX_CELLS} cells are read"
            )
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise TargetError(f"{str(path)!r} is no readable parquet file: {error}") from error
    columns = {
        name: ["" if value is None else str(value) for value in table.column(name).to_pylist()]
        for name in table.column_names
    }
    return Table(repr(str(path)), columns)


def _rows_of_split(table: Table, split: str | None) -> NDArray[np.int64]:
    column = table.columns.get(SPLIT_COLUMN)
    if column is None:
        if split is not None:
            raise NoSplit(f"{table.name} has no column {SPLIT_COLUMN!r}; leave --split {split} out")
        return np.arange(len(table), dtype=np.int64)
    wanted = split or "test"
    rows = np.flatnonzero(np.array(column) == wanted).astype(np.int64)
    if not len(rows) and wanted not in column:
        found = sorted(set(column))
        raise NoSplit(
            f"{table.name} has no split {wanted!r}{nearest(wanted, found)}; it has {', '.join(found)}"
        )
    return rows


def _class_numbers(column: Sequence[str], name: str) -> NDArray[np.int64] | None:
    """Labels that are whole numbers from 0 on, which are the class numbers; None for labels that are names."""
    if any(not cell.strip() for cell in column):
        row = next(i for i, cell in enumerate(column) if not cell.strip())
        raise TargetError(f"the label of row {row} of {name} is missing; drop such rows")
    values = set(column)
    whole = {value: _whole(value) for value in values}
    if all(number is not None and number >= 0 for number in whole.values()):
        return np.array([whole[cell] for cell in column], dtype=np.int64)
    if all(_number(value) is not None for value in values) and None in whole.values():
        row = next(i for i, cell in enumerate(column) if whole[cell] is None)
        raise TargetError(
            f"the label of row {row} of {name} is {column[row]}; whole numbers from 0 on, or names, were expected"
        )
    return None


def _whole(text: str) -> int | None:
    number = _number(text)
    return int(number) if number is not None and number.is_integer() else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(table: Table, features: list[str], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    if not features:
        raise TargetError(f"{table.name} has no column beside its label; at least one feature was expected")
    x = np.empty((len(rows), len(features)), dtype=np.float32)
    text: list[str] = []
    for i, name in enumerate(features):
        cells = [table.columns[name][row] for row in rows]
        try:
            x[:, i] = [_TRUTH.get(cell.lower(), cell) for cell in cells]
        except ValueError:
            _refuse_missing(table, name, cells, rows)
            text.append(name)
    if text:
        raise _not_numbers(table, text)
    return x


def _refuse_missing(table: Table, name: str, cells: list[str], rows: NDArray[np.int64]) -> None:
    """Raise `TargetError` for a column of numbers with an empty cell."""
    filled = [cell for cell in cells if cell.strip()]
    if len(filled) == len(cells) or any(_number(_plain(cell)) is None for cell in filled):
        return
    row = next(row for row, cell in zip(rows, cells, strict=True) if not cell.strip())
    raise TargetError(
        f"the value of {name} in row {row} of {table.name} is missing; fill or drop such rows, or leave the column out "
        f"with --drop {shlex.quote(name)}"
    )


def _plain(cell: str) -> str:
    return str(_TRUTH.get(cell.lower(), cell))


def _not_numbers(table: Table, text: list[str]) -> TargetError:
    """What is said of columns that hold text."""
    counted = "1 column" if len(text) == 1 else f"{len(text)} columns"
    few, more = text[:6], " …" if len(text) > 6 else ""
    flags = " ".join(f"--drop {shlex.quote(name)}" for name in few)
    return TargetError(
        f"{counted} of {table.name} {'is' if len(text) == 1 else 'are'} not numbers: {', '.join(few)}{more}. Leave "
        f"{'it' if len(text) == 1 else 'them'} out with {flags}{more}, or write numbers in place of the text, as the "
        "model was trained"
    )


_TRUTH: dict[str, float] = {"true": 1.0, "false": 0.0}
"""how pandas and pyarrow write booleans"""
