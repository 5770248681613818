"""Reads `.csv`, `.csv.gz` and `.parquet` files in blocks of rows, so that a table is never in memory as a whole.

The cells of features are written as numbers, and distinct strings are stored once.
"""

import csv
import gc
import gzip
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Install, Placeholder, Remedy
from holdfast.sources.columns import (
    MOST_CHARACTERS,
    SPLIT_COLUMN,
    ColumnTable,
    Words,
    as_numbers,
    as_words,
    rounded,
    side_by_side,
)
from holdfast.sources.files import megabytes, reason_of
from holdfast.sources.limited.limits import MEMORY, requested_memory

MAX_BYTES = 2**30
"""Largest number of bytes of a text table after decompression."""
MAX_CELLS = 200_000_000
"""Largest number of cells of a table; parquet can repeat a value any number of times in a few bytes."""
MAX_WORD = 1000
"""Largest number of characters of a label, or of the name of a split or a column."""
_SHOWN = 100
"""Largest number of characters of a name in an error message."""
_BYTES_A_CELL = 20
"""Upper bound of the memory of a cell in both processes, in bytes."""
_BLOCK = 1 << 20
"""Number of cells that are converted at a time."""
_SMALL, _RATIO = 1 << 26, 200
"""Text that needs more than 64 MiB and more than 200 times the size of its file is rejected as a decompression bomb."""
_NUMBERS, _KINDS = "numbers", "kinds"


class Cells(Protocol):
    """Protocol of the cells of one table column in a block of rows."""

    def __len__(self) -> int:
        """Return the number of cells."""

    def numbers(self) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """Return the values of the cells as float32, with NaN for cells that are not numbers, and whether each cell is
        a number, missing or text.
        """

    def words(self) -> tuple[Sequence[str], NDArray[np.int32] | None]:
        """Return the strings in the cells of a table column, and for each cell the index of its string.

        The indices are None if the strings are those of the cells in order. Raises `NotImplementedError`, whose message
        is the type of the cells, if they cannot be converted.
        """


class TextCells(list[str]):
    """Cells of one column of a CSV file in a block of rows."""

    def numbers(self) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """Return the values of the cells as float32, with NaN for cells that are not numbers, and whether each cell is
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

    def numbers(self) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """Return the values of the cells as float32, and whether each cell is a number, missing or text. Cells are not
        converted to strings if all are numbers.
        """
        import pyarrow as pa

        kind = self.column.type
        if self.column.null_count == 0 and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            return rounded(self.column.to_numpy(zero_copy_only=False)), None
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


Blocks = Iterator[Mapping[str, Cells]]


def read(
    path: Path, content: bytes | None, folder: Path, label: str | None, drop: list[str]
) -> dict[str, Any]:
    """Return the column names and the distinct label strings of a table file, and write its converted cells to files in
    the folder.

    If the table has no column `label`, no rows are read.
    """
    assert content is None, "a table is read from its file"
    header, blocks = (_parquet if path.suffix == ".parquet" else _csv)(path)
    if not header or len(set(header)) != len(header):
        doubled = [name for name, n in Counter(header).items() if n > 1]
        shown = [name[:_SHOWN] for name in doubled[:3]] or "nothing"
        raise TargetError(f"{str(path)!r} needs a header of distinct names; found {shown}")
    longest = max(map(len, header))
    if longest > MAX_WORD:
        raise TargetError(
            f"{str(path)!r} has a column with a name of {longest:,} characters; at most {MAX_WORD:,} were expected: "
            "rename it"
        )
    texts = [name for name in header if name in (label, SPLIT_COLUMN)] if label in header else []
    features = [name for name in header if name not in (*texts, *drop)] if label in header else []
    indices_of_words: list[dict[str, int]] = [{} for _ in texts]
    rows, all_numbers = 0, True
    with ExitStack() as files:
        words = [files.enter_context((folder / f"words-{i}").open("wb")) for i in range(len(texts))]
        numbers, kinds = (files.enter_context((folder / name).open("wb")) for name in (_NUMBERS, _KINDS))
        for block in blocks if label in header else ():
            rows += len(block[header[0]])
            _refuse_many(path, rows, len(header))
            for name, places, file in zip(texts, indices_of_words, words, strict=True):
                file.write(_as_words(block[name], places, name, path).tobytes())
            all_numbers &= _write_numbers([block[name] for name in features], numbers, kinds)
    return {
        "columns": header,
        "features": features,
        "rows": rows,
        "words": dict(zip(texts, map(list, indices_of_words), strict=True)),
        "all_numbers": all_numbers,
    }


def table(path: Path, description: Mapping[str, Any], folder: Path) -> ColumnTable:
    """Assemble a table from the result of `read` and the files that `read` wrote to the folder."""
    shape = description["rows"], len(description["features"])
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
    )


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


def _as_words(cells: Cells, indices_of_words: dict[str, int], name: str, path: Path) -> NDArray[np.int32]:
    """Return the index of each cell in the known strings.

    Raises `TargetError` for strings that are too long for labels, one or all together, and for a type that cannot be a
    label.
    """
    try:
        texts, places = cells.words()
    except NotImplementedError as error:
        raise TargetError(
            f"the column {name!r} of {str(path)!r} has the type {error}, which is not supported for labels and names "
            "of splits; text or whole numbers were expected: convert the column to text, as in "
            f"frame[{name!r}] = frame[{name!r}].astype(str) of pandas, and write the file again"
        ) from error
    if max(map(len, texts), default=0) > MAX_WORD:
        raise TargetError(
            f"the column {name!r} of {str(path)!r} has a text of more than {MAX_WORD:,} characters; labels, or names "
            "of splits, were expected"
        )
    indices = as_words(texts, indices_of_words)
    if sum(map(len, indices_of_words)) > MOST_CHARACTERS:
        raise TargetError(
            f"the column {name!r} of {str(path)!r} has {len(indices_of_words):,} different texts or more, of more than "
            f"{MOST_CHARACTERS:,} characters in all; labels, or names of splits, were expected: shorten them, or "
            "number the classes 0, 1, 2, …",
            Remedy(
                "label",
                Placeholder("COLUMN"),
                function="open_data",
                reason="if another column has the labels",
            ),
        )
    return indices if places is None else indices[places]


def _csv(path: Path) -> tuple[list[str], Blocks]:
    lines = csv.reader(_decoded(path), strict=True)
    try:
        header = next(lines, [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error
    return header, _blocks(path, header, lines)


def _blocks(path: Path, header: list[str], lines: Iterator[list[str]]) -> Blocks:
    size, n_earlier = max(1, _BLOCK // len(header)), 0
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

    def __init__(self, path: Path, stream: Any, most: int) -> None:
        self.path, self.stream, self.most, self.n_read = path, stream, most, 0
        self.small = max(_SMALL, _RATIO * path.stat().st_size)

    def readable(self) -> bool:
        """Return True, because the file is open for reading."""
        return True

    def close(self) -> None:
        """Close the table file."""
        self.stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes of a table file into the buffer and return their number. Raises `TargetError` if the file
        exceeds the limits.
        """
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        self.n_read += len(content)
        if self.n_read > max(self.small, requested_memory()):
            raise TargetError(
                f"{str(self.path)!r} has {megabytes(self.path.stat().st_size)} and inflates to more than "
                f"{megabytes(self.small)}: a bomb rather than data. If it is data, inflate it before it is given, or "
                f"set {MEMORY}=16GB"
            )
        if self.n_read > self.most:
            raise TargetError(
                f"{str(self.path)!r} holds more than {megabytes(self.most)}; use parquet or fewer rows. If you trust "
                f"it, raise the limit with {MEMORY}=16GB"
            )
        return len(content)


def _decoded(path: Path) -> io.TextIOWrapper:
    stream: Any = gzip.GzipFile(path) if path.suffix == ".gz" else io.FileIO(path)
    counted = _LimitedReader(path, stream, max(MAX_BYTES, requested_memory()))
    # The encoding skips a byte order mark, which spreadsheets write; `csv` requires that line ends are not converted.
    return io.TextIOWrapper(io.BufferedReader(counted, 1 << 20), encoding="utf-8-sig", newline="")


def _unreadable(path: Path, error: Exception) -> TargetError:
    return TargetError(f"{str(path)!r} is no readable UTF-8 table: {reason_of(error)}; write it again")


def _parquet(path: Path) -> tuple[list[str], Blocks]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"{str(path)!r} is parquet, and pyarrow is missing", Install("parquet")) from error
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error
    header = list(file.schema_arrow.names)
    _refuse_many(path, file.metadata.num_rows, len(header))
    return header, _batches(path, file, header)


def _unreadable_parquet(path: Path, error: Exception) -> TargetError:
    return TargetError(
        f"{str(path)!r} is no readable parquet file: {reason_of(error)}; write it again, without encryption, or "
        "download it again"
    )


def _batches(path: Path, file: Any, header: list[str]) -> Blocks:
    import pyarrow as pa

    try:
        for batch in file.iter_batches(batch_size=max(1, _BLOCK // max(len(header), 1)), use_threads=False):
            yield dict(zip(header, map(ArrowCells, batch.columns), strict=True))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error
