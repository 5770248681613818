"""Reads `.csv`, `.csv.gz` and `.parquet` files in blocks of rows, so that a table is never in memory as a whole.

The cells of features are written as numbers, and distinct strings are stored once. A column of a parquet file whose
cells are the files of images, or arrays, is written as it is; the images are decoded later.
"""

import csv
import gc
import gzip
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError, data_argument, importing
from holdfast.io.data.columns import (
    MOST_CHARACTERS,
    SPLIT_COLUMN,
    ColumnInputs,
    ColumnTable,
    Words,
    as_numbers,
    as_words,
    number_of,
    rounded,
    side_by_side,
)
from holdfast.io.files import megabytes, opened, reason_of
from holdfast.io.sandbox.sandbox_main import MEMORY, requested_memory

MAX_BYTES = 2**30
"""Largest number of bytes of a text table after decompression."""
MAX_CELLS = 200_000_000
"""Largest number of cells of a table; parquet can repeat a value any number of times in a few bytes."""
MAX_WORD = 1000
"""Largest number of characters of a label, or of the name of a split or a column."""
MAX_TEXT = 100_000
"""Largest number of characters of a cell that is read as a string because its column was requested."""
_SHOWN = 100
"""Largest number of characters of a name in an error message."""
_BYTES_A_CELL = 20
"""Upper bound of the memory of a cell in both processes, in bytes."""
_BLOCK = 1 << 20
"""Number of cells that are converted at a time."""
_SMALL, _RATIO = 1 << 26, 200
"""Text that needs more than 64 MiB and more than 200 times the size of its file is rejected as a decompression bomb."""
_NUMBERS, _KINDS, _INPUTS, _ENDS = "numbers", "kinds", "inputs", "ends"
"""Names of the files that contain the converted cells."""
_SEPARATORS = (",", ";", "\t", "|", " ")
"""Separators that are considered if a file has another one than the given one."""
_NAMES = {"\t": "tab", " ": "space"}
"""Separators that have a name, because they are hard to read and to write."""
_START, _LINES = 1 << 16, 20
"""Number of characters and of lines at the start of a file in which its separator is searched."""
_ROWS = 256
"""Number of rows with a whole input in one cell that are read at a time."""


class TextCells(list[str]):
    """Cells of one column of a CSV file in a block of rows."""

    def numbers(self) -> tuple[NDArray[np.float64], NDArray[np.uint8] | None]:
        """Return the values of the cells as float64, with NaN for cells that are not numbers, and whether each cell is
        a number, missing or text.
        """
        return as_numbers(self)

    def words(self) -> tuple[Sequence[str], None]:
        """Return the string of each cell of a table column, and None instead of indices."""
        return self, None


class ArrowCells:
    """Cells of one column of a parquet file in a block of rows. They are converted to strings by `str`."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def numbers(self) -> tuple[NDArray[np.float64], NDArray[np.uint8] | None]:
        """Return the values of the cells as float64, and whether each cell is a number, missing or text. Cells are not
        converted to strings if all are numbers.
        """
        import pyarrow as pa

        kind = self.column.type
        if self.column.null_count == 0 and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return self.column.to_numpy(zero_copy_only=False).astype(np.float64), None
        return as_numbers(_texts(self.column))

    def words(self) -> tuple[Sequence[str], NDArray[np.int32] | None]:
        """Return the distinct values of a table column as strings, and for each cell the index of its string.

        For types of which arrow cannot find the distinct values, return the strings of all cells, and None. Raises
        `NotImplementedError` for extension types, such as UUID and JSON.
        """
        import pyarrow as pa

        kind = self.column.type
        if pa.types.is_dictionary(kind) or pa.types.is_nested(kind):
            return _texts(self.column), None
        try:
            coded = self.column.dictionary_encode(null_encoding="encode")
        except pa.ArrowNotImplementedError as error:
            raise NotImplementedError(str(kind)) from error
        return _texts(coded.dictionary), coded.indices.to_numpy(zero_copy_only=False).astype(np.int32)


def _texts(column: Any) -> list[str]:
    return ["" if value is None else str(value) for value in column.to_pylist()]


Cells = TextCells | ArrowCells
"""cells of one table column in a block of rows"""
Blocks = Iterator[Mapping[str, Cells]]


@dataclass(frozen=True)
class TableRequest:
    """What is read of a table file."""

    label: str | None
    """column of the labels; if the table has none, no rows are read if `needs_label`"""
    drop: Sequence[str]
    inputs: str | None
    """column whose cells are the inputs"""
    separator: str
    header: bool
    """whether a CSV file has names of columns; without them they are named 0, 1, 2, …"""
    words: Sequence[str] | None
    """columns that are read as strings, like the label; None for all"""
    groups: str | None
    """column that is read as strings as well as numbers"""
    needs_label: bool


def read(path: Path, content: bytes | None, folder: Path, **request: Any) -> dict[str, Any]:
    """Return the column names and the distinct label strings of a table file, and write its converted cells to files in
    the folder. `request` has the fields of a `TableRequest`. No rows are read if names of columns are repeated.
    """
    assert content is None, "a table is read from its file"
    requested = TableRequest(**request)
    with opened(path, "data file") as source:
        if path.suffix == ".parquet":
            return _read_parquet(path, source, folder, requested)
        names, blocks = _csv(path, source, requested.label, requested.separator, has_header=requested.header)
        return _read_columns(path, folder, requested, names, blocks)


def _read_columns(
    path: Path, folder: Path, request: TableRequest, header: list[str], blocks: Blocks
) -> dict[str, Any]:
    label, drop, words = request.label, request.drop, request.words
    if not header:
        raise TargetError(f"{str(path)!r} needs a header of distinct names; found nothing")
    longest = max(map(len, header))
    if longest > MAX_WORD:
        raise TargetError(
            f"{str(path)!r} has a column with a name of {longest:,} characters; at most {MAX_WORD:,} were expected: "
            "rename it"
        )
    read_as_words = [name for name in header if name not in drop] if words is None else words
    only_texts = (label, SPLIT_COLUMN, *read_as_words)
    is_read = (label in header or not request.needs_label) and len({*header}) == len(header)
    texts = [name for name in header if name in (*only_texts, request.groups) and is_read]
    features = [name for name in header if name not in (*only_texts, *drop)] if is_read else []
    indices_of_words: list[dict[str, int]] = [{} for _ in texts]
    rows, all_numbers = 0, True
    with ExitStack() as files:
        word_files = [files.enter_context((folder / f"words-{i}").open("wb")) for i in range(len(texts))]
        numbers, kinds = (files.enter_context((folder / name).open("wb")) for name in (_NUMBERS, _KINDS))
        for block in blocks if is_read else ():
            rows += len(block[header[0]])
            _refuse_many(path, rows, len(header))
            for name, places, file in zip(texts, indices_of_words, word_files, strict=True):
                longest_word = MAX_TEXT if name in read_as_words else MAX_WORD
                file.write(_as_words(block[name], places, name, path, longest_word).tobytes())
            all_numbers &= _write_numbers([block[name] for name in features], numbers, kinds)
    return {
        "columns": header,
        "features": features,
        "rows": rows,
        "words": dict(zip(texts, map(list, indices_of_words), strict=True)),
        "all_numbers": all_numbers,
    }


def _read_parquet(
    path: Path, source: io.BufferedReader, folder: Path, request: TableRequest
) -> dict[str, Any]:
    label, drop, inputs = request.label, request.drop, request.inputs
    file = _open_parquet(path, source)
    header = list(file.schema_arrow.names)
    whole = [
        field.name
        for field in file.schema_arrow
        if field.name not in (label, SPLIT_COLUMN, *drop) and is_whole_input(field.type)
    ]
    if inputs is not None and inputs not in whole:
        raise UsageError(
            f"{str(path)!r} has no column {inputs!r} of images or of arrays; columns of numbers are selected with "
            "--drop",
            Remedy("x"),
        )
    if len(whole) > 1 and inputs is None:
        raise UsageError(
            f"{str(path)!r} has {len(whole)} columns of images or of arrays: {', '.join(whole[:6])}; one is the input",
            *(data_argument("x", name) for name in whole[:3]),
        )
    if not whole or (label not in header and request.needs_label):
        return _read_columns(path, folder, request, header, _batches(path, file, header))
    column = inputs or whole[0]
    words = [*(request.words or ()), *([] if request.groups is None else [request.groups])]
    texts = [name for name in header if name in (label, SPLIT_COLUMN, *words)]
    blocks = _batches(path, file, [*texts, column], _ROWS)
    with (folder / _INPUTS).open("wb") as cells, (folder / _ENDS).open("wb") as ends:
        write = _InputWriter(path, column, cells, ends)
        of_texts = replace(request, drop=[*drop, column], words=words, groups=None, needs_label=False)
        description = _read_columns(path, folder, of_texts, [*texts, column], write.through(blocks))
    unread = [name for name in header if name not in (*texts, column)]
    return description | {"columns": header, "inputs": write.description() | {"unread": unread}}


def is_whole_input(kind: Any) -> bool:
    """Return whether each cell of a column of this arrow type contains a whole input: the file of an image, as bytes or
    as a struct with the field `bytes`, or an array of numbers, as nested lists.
    """
    import pyarrow as pa

    kind = getattr(kind, "storage_type", kind)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    if not _is_list(kind):
        return _is_bytes(kind)
    while _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


class _InputWriter:
    """Writes the cells of a column of whole inputs to a file: the contents of images, or arrays of one shape."""

    def __init__(self, path: Path, column: str, cells: IO[bytes], ends: IO[bytes]) -> None:
        self._path, self._column, self._cells, self._ends = path, column, cells, ends
        self._rows = self._n_bytes = 0
        self._shape: tuple[int, ...] | None = None
        self._are_bytes = True  # whether all numbers are whole ones from 0 to 255

    def through(self, blocks: Blocks) -> Blocks:
        """Write the cells of the column in each block, and yield the block."""
        for block in blocks:
            cells = block[self._column]
            assert isinstance(cells, ArrowCells)
            self._write(cells.column)
            self._rows += len(cells)
            yield block

    def description(self) -> dict[str, Any]:
        """Return the name of the column, and the shape of its arrays, or None for images."""
        return {"column": self._column, "shape": self._shape, "are_bytes": self._are_bytes}

    def _write(self, column: Any) -> None:
        import pyarrow as pa

        shape: tuple[int, ...] = ()
        if isinstance(column.type, pa.FixedShapeTensorType):
            shape = tuple(column.type.shape)
        column = getattr(column, "storage", column)
        beside = ""
        if pa.types.is_struct(column.type):
            column = column.field("bytes")
            beside = "; images are read from the file itself, and not from paths: write their bytes into the column"
        if column.null_count:
            row = self._rows + column.is_null().to_pylist().index(True)
            raise TargetError(
                f"the column {self._column!r} of {str(self._path)!r} has no content in row {row}{beside}"
            )
        if _is_list(column.type):
            self._write_arrays(column, shape)
        else:
            self._write_images(column)

    def _write_images(self, column: Any) -> None:
        for content in column:
            file = content.as_py()
            self._n_bytes += len(file)
            if self._n_bytes > max(MAX_BYTES, requested_memory()):
                raise TargetError(
                    f"the column {self._column!r} of {str(self._path)!r} holds more than {megabytes(MAX_BYTES)}; use "
                    f"fewer rows. If you trust it, raise the limit with {MEMORY}=16GB"
                )
            self._cells.write(file)
            self._ends.write(np.int64(self._n_bytes).tobytes())

    def _write_arrays(self, column: Any, shape: tuple[int, ...]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        sizes: list[int] = []
        n = len(column)
        while _is_list(column.type):
            lengths = set(pc.unique(pc.list_value_length(column)).to_pylist())
            if len(lengths) != 1 or None in lengths:
                raise self._unequal(
                    f"lists of {min(lengths - {None}, default=0)} to {max(lengths - {None}, default=0)}"
                )
            sizes.append(lengths.pop())
            column = column.flatten()
        shape = shape or tuple(sizes)
        if self._shape not in (None, shape):
            raise self._unequal(f"the shapes {self._shape} and {shape}")
        self._shape = shape
        _refuse_many(self._path, self._rows + n, int(np.prod(shape)))
        values = column.to_numpy(zero_copy_only=False)
        is_whole = pa.types.is_integer(column.type) and column.null_count == 0
        self._are_bytes &= bool(is_whole and len(values) and values.min() >= 0 and values.max() <= 255)
        self._cells.write(rounded(values).tobytes())

    def _unequal(self, found: str) -> TargetError:
        return TargetError(
            f"the cells of the column {self._column!r} of {str(self._path)!r} have {found}; arrays of one shape were "
            "expected"
        )


def table(path: Path, description: Mapping[str, Any], folder: Path) -> ColumnTable:
    """Assemble a table from the result of `read` and the files that `read` wrote to the folder."""
    shape = description["rows"], len(description["features"])
    inputs = description.get("inputs")
    kinds = None if description["all_numbers"] else np.fromfile(folder / _KINDS, np.uint8).reshape(shape)
    return ColumnTable(
        repr(str(path)),
        tuple(description["columns"]),
        tuple(description["features"]),
        np.fromfile(folder / _NUMBERS, np.float32).reshape(shape),
        kinds,
        {
            name: Words(tuple(words), np.fromfile(folder / f"words-{i}", np.int32))
            for i, (name, words) in enumerate(description["words"].items())
        },
        None if inputs is None else _column_inputs(inputs, description["rows"], folder),
    )


def _column_inputs(inputs: Mapping[str, Any], rows: int, folder: Path) -> ColumnInputs:
    column, unread = inputs["column"], tuple(inputs["unread"])
    if inputs["shape"] is None:
        content, ends = (folder / _INPUTS).read_bytes(), np.fromfile(folder / _ENDS, np.int64).tolist()
        starts = [0, *ends[:-1]]
        return ColumnInputs(column, unread, [content[a:b] for a, b in zip(starts, ends, strict=True)])
    values = np.fromfile(folder / _INPUTS, np.float32).reshape(rows, *inputs["shape"])
    return ColumnInputs(column, unread, values.astype(np.uint8) if inputs["are_bytes"] else values)


def _write_numbers(columns: Sequence[Cells], numbers: IO[bytes], kinds: IO[bytes]) -> bool:
    """Write the numbers and kinds of the features of a block, row by row. Return whether all cells are numbers."""
    values, cell_kinds = side_by_side(
        [cells.numbers() for cells in columns], len(columns[0]) if columns else 0
    )
    numbers.write(values.tobytes())
    kinds.write(cell_kinds.tobytes())
    return not cell_kinds.any()


def _refuse_many(path: Path, rows: int, columns: int) -> None:
    limit = max(MAX_CELLS, requested_memory() // _BYTES_A_CELL)
    if rows * columns > limit:
        raise TargetError(
            f"{str(path)!r} has {rows:,} rows of {columns:,} columns or more; at most {limit:,} cells are read. If you "
            f"trust it, raise the limit with {MEMORY}=16GB"
        )


def _as_words(
    cells: Cells, indices_of_words: dict[str, int], name: str, path: Path, longest: int
) -> NDArray[np.int32]:
    """Return the index of each cell in the known strings.

    Raises `TargetError` for strings that have more than `longest` characters, or too many all together, and for a type
    that has no strings.
    """
    try:
        texts, places = cells.words()
    except NotImplementedError as error:
        raise TargetError(
            f"the column {name!r} of {str(path)!r} has the type {error}, which is not supported for labels, categories "
            "and names of splits; text or whole numbers were expected: convert the column to text, as in "
            f"frame[{name!r}] = frame[{name!r}].astype(str) of pandas, and write the file again"
        ) from error
    if max(map(len, texts), default=0) > longest:
        wanted = "labels, or names of splits, were expected" if longest == MAX_WORD else "shorten it"
        raise TargetError(
            f"the column {name!r} of {str(path)!r} has a text of more than {longest:,} characters; {wanted}"
        )
    indices = as_words(texts, indices_of_words)
    if sum(map(len, indices_of_words)) > MOST_CHARACTERS:
        raise TargetError(
            f"the column {name!r} of {str(path)!r} has {len(indices_of_words):,} different texts or more, of more than "
            f"{MOST_CHARACTERS:,} characters in all; labels, or names of splits, were expected: shorten them, or "
            "number the classes 0, 1, 2, …",
            data_argument("label", Placeholder("COLUMN"), reason="if another column has the labels"),
        )
    return indices if places is None else indices[places]


def _csv(
    path: Path, source: io.BufferedReader, label: str | None, separator: str, *, has_header: bool
) -> tuple[list[str], Blocks]:
    try:
        lines = _lines(_decoded(path, source), separator)
        first = next(lines, [])
        probable = _probable_separator(path, source) if len(first) < 2 else separator
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error
    if probable != separator:
        raise TargetError(
            f"the first row of {str(path)!r} has no separator {separator!r}, and its rows seem to be separated by "
            f"{probable!r}",
            data_argument("separator", _NAMES.get(probable, probable)),
        )
    if has_header and _is_data(first, label):
        raise TargetError(
            f"the first row of {str(path)!r} has numbers ({', '.join(first[:4])[:_SHOWN]} …), and the names of the "
            "columns were expected",
            data_argument("header", False, reason="to read it as data, with columns named 0, 1, 2, …"),
        )
    if not has_header:
        names = [str(place) for place in range(len(first))]
        return names, _blocks(path, names, chain([first], lines))
    return first, _blocks(path, first, lines)


def _lines(text: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Return an iterator over the rows of a CSV file. Several spaces count as one separator."""
    return csv.reader(text, strict=True, delimiter=separator, skipinitialspace=separator == " ")


def _probable_separator(path: Path, source: io.BufferedReader) -> str:
    """Return the separator that divides the first lines into equally many cells, the most of all separators.

    It is the comma if no separator does.
    """
    place = source.tell()
    source.seek(0)
    start = _decoded(path, source).read(_START)
    source.seek(place)
    lines = [line for line in start.splitlines() if line.strip()]
    complete = lines[: min(_LINES, len(lines) - (len(start) == _START))] or lines[:1]
    n_cells = {each: {*map(len, _lines(complete, each))} for each in _SEPARATORS}
    sizes = {each: next(iter(counts)) if len(counts) == 1 else 1 for each, counts in n_cells.items()}
    return max(_SEPARATORS, key=lambda each: sizes[each])


def _is_data(first: list[str], label: str | None) -> bool:
    """Return whether the first row of a file seems to be data: most cells are numbers that do not increase, as names of
    wavelengths or years do, or no cell is the name of the label.
    """
    numbers = [number for cell in first if (number := number_of(cell)) is not None]
    increase = all(a < b for a, b in pairwise(numbers))
    return 2 * len(numbers) > len(first) and (not increase or label not in first)


def _blocks(path: Path, header: list[str], lines: Iterator[list[str]]) -> Blocks:
    size, n_earlier = max(1, _BLOCK // max(len(header), 1)), 0
    # Garbage collection would scan all rows repeatedly, and they contain no reference cycles.
    gc.disable()
    try:
        while rows := list(islice(lines, size)):
            filled_rows = [row for row in rows if row] if [] in rows else rows
            if {*map(len, filled_rows)} - {len(header)}:
                number = next(k for k, row in enumerate(filled_rows) if len(row) != len(header))
                raise TargetError(
                    f"row {n_earlier + number + 1} of {str(path)!r} has {len(filled_rows[number])} cells; the header "
                    f"has {len(header)}: correct the row"
                )
            n_earlier += len(filled_rows)
            if filled_rows:
                yield dict(zip(header, map(TextCells, zip(*filled_rows, strict=True)), strict=True))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error
    finally:
        gc.enable()


class _LimitedReader(io.RawIOBase):
    """A stream of the bytes of a table with limits: at most `most` bytes, and fewer if the compression ratio is
    implausible.
    """

    def __init__(self, path: Path, source: io.BufferedReader, most: int) -> None:
        self.path, self.most, self.n_read = path, most, 0
        self.stream: Any = gzip.GzipFile(fileobj=source) if path.suffix == ".gz" else source
        self.n_bytes = os.fstat(source.fileno()).st_size
        self.small = max(_SMALL, _RATIO * self.n_bytes)

    def readable(self) -> bool:
        """Return True, because the file is open for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes of a table file into the buffer and return their number. Raises `TargetError` if the file
        exceeds the limits.
        """
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        self.n_read += len(content)
        if self.n_read > max(self.small, requested_memory()):
            raise TargetError(
                f"{str(self.path)!r} has {megabytes(self.n_bytes)} and inflates to more than "
                f"{megabytes(self.small)}: a bomb rather than data. If it is data, inflate it before it is given, or "
                f"set {MEMORY}=16GB"
            )
        if self.n_read > self.most:
            raise TargetError(
                f"{str(self.path)!r} holds more than {megabytes(self.most)}; use parquet or fewer rows. If you trust "
                f"it, raise the limit with {MEMORY}=16GB"
            )
        return len(content)


def _decoded(path: Path, source: io.BufferedReader) -> io.TextIOWrapper:
    counted = _LimitedReader(path, source, max(MAX_BYTES, requested_memory()))
    # The encoding skips a byte order mark, which spreadsheets write; `csv` requires that line ends are not converted.
    return io.TextIOWrapper(io.BufferedReader(counted, 1 << 20), encoding="utf-8-sig", newline="")


def _unreadable(path: Path, error: Exception) -> TargetError:
    return TargetError(f"{str(path)!r} is no readable UTF-8 table: {reason_of(error)}; write it again")


def _open_parquet(path: Path, source: io.BufferedReader) -> Any:
    pa, parquet = (
        importing(module, f"{str(path)!r} is parquet, and pyarrow is missing", "parquet")
        for module in ("pyarrow", "pyarrow.parquet")
    )
    try:
        file = parquet.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error
    _refuse_many(path, file.metadata.num_rows, len(file.schema_arrow.names))
    return file


def _unreadable_parquet(path: Path, error: Exception) -> TargetError:
    return TargetError(
        f"{str(path)!r} is no readable parquet file: {reason_of(error)}; write it again, without encryption, or "
        "download it again"
    )


def _batches(path: Path, file: Any, columns: list[str], rows: int | None = None) -> Blocks:
    import pyarrow as pa

    size = rows or max(1, _BLOCK // max(len(columns), 1))
    try:
        for batch in file.iter_batches(batch_size=size, columns=columns, use_threads=False):
            yield dict(zip(batch.schema.names, map(ArrowCells, batch.columns), strict=True))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error
