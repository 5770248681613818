"""Matches the columns of tables with those of a model, and converts texts of a data set to rows of a tensor."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.core.batch import encoded, encoded_files
from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError, data_argument
from holdfast.core.names import by_stripped, note_on_spaces
from holdfast.io.data.layouts import DeclaredData, FirstTable
from holdfast.io.files import names_of
from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.table_checking import checked
from holdfast.threats.table_rules import Rules, refuse_other_columns
from holdfast.threats.text_edits import TextEdits

SPLIT_COLUMN = "split"
"""Name of the column that assigns rows to the train and test split."""
MOST_CHARACTERS = 10_000_000
"""Largest total number of characters of the names of classes; comparing them takes a hundred times their memory."""
NUMBER, MISSING, TEXT, INEXACT = 0, 1, 2, 3
"""Kinds of a cell in a feature column; `INEXACT` is a number that loses information as float32."""
EXACT = 1 << 24
"""Largest number up to which float32 represents all whole numbers."""
_NOTICEABLE = 1e-3
"""rounding error in standard deviations of its column above which a number loses information"""
_LARGEST = 2.0**63
"""absolute value from which numbers are no integers of a database or of pandas, but floats"""
_TRUTH: Mapping[str, float] = {"true": 1.0, "false": 0.0}
"""Values of the strings that pandas and pyarrow write for booleans."""


@dataclass(frozen=True)
class Words:
    """A column of strings in compact form: the distinct strings, and for each row the index of its string."""

    words: tuple[str, ...]
    places: NDArray[np.int32]
    """(rows,) indices in `words`"""


@dataclass(frozen=True)
class ColumnInputs:
    """A column of a table in which each cell contains a whole input: the file of an image, or an array."""

    column: str
    unread: tuple[str, ...]
    """names of the other columns, which are not read"""
    cells: Sequence[bytes] | NDArray[np.uint8] | NDArray[np.float32]
    """contents of the files of images, or the arrays (rows, …)"""


@dataclass(frozen=True)
class ColumnTable:
    """A table after conversion: features are numbers, and the columns with labels and splits contain strings."""

    name: str
    """name of the table in messages"""
    columns: tuple[str, ...]
    """names of all columns, in the order of the file"""
    features: tuple[str, ...] = ()
    """names of the columns in `numbers`"""
    numbers: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """(rows, features); NaN for a cell that is not a number"""
    kinds: NDArray[np.uint8] | None = None
    """(rows, features): `NUMBER`, `MISSING` or `TEXT`; None if all cells are numbers"""
    words: Mapping[str, Words] = field(default_factory=dict)
    inputs: ColumnInputs | None = None
    """column whose cells are the inputs, if there is one; the table then has no features"""
    has_header: bool = True
    """whether the file contains the names of the columns; otherwise they are the positions of the columns"""

    def __len__(self) -> int:
        return len(self.numbers)


def as_numbers(cells: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.uint8] | None]:
    """Convert the cells of a table column to float64, with NaN for cells that are not numbers. Also return for each
    cell whether it is a number, missing or text.

    The kinds are None if all cells are numbers.
    """
    try:
        # One pass over all cells is the common and fast case; cells are examined one by one only if it fails.
        return np.array(list(map(float, cells)), np.float64), None
    except ValueError:
        numbers_or_none = [_number(cell) for cell in cells]
    kinds = [
        NUMBER if number is not None else TEXT if cell.strip() else MISSING
        for cell, number in zip(cells, numbers_or_none, strict=True)
    ]
    values = np.array([np.nan if number is None else number for number in numbers_or_none], np.float64)
    return values, np.array(kinds, np.uint8) if any(kinds) else None


def side_by_side(
    columns: Sequence[tuple[NDArray[np.float64], NDArray[np.uint8] | None]], rows: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Stack table columns that `as_numbers` converted. Return their values as float32, and whether each cell is a
    number, missing, text or a number that loses information as float32, both of shape (rows, columns).
    """
    numbers = np.empty((rows, len(columns)), np.float32)
    kinds = np.full((rows, len(columns)), NUMBER, np.uint8)
    for place, (values, cell_kinds) in enumerate(columns):
        numbers[:, place] = rounded(values)
        if cell_kinds is not None:
            kinds[:, place] = cell_kinds
        kinds[inexact(values), place] = INEXACT
    return numbers, kinds


def inexact(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which numbers (n,) of a column lose information as float32: the whole numbers above `EXACT` that float32
    does not represent, and in a column with fractions, the numbers above `EXACT` whose rounding error is noticeable
    beside the spread of the column, such as that of times in seconds.
    """
    lost: NDArray[np.bool_] = (np.abs(values) > EXACT) & (np.abs(values) < _LARGEST)
    if lost.any():
        finite = values[np.isfinite(values)]
        whole = bool((finite == np.round(finite)).all())
        most = 0.0 if whole else _NOTICEABLE * float(finite.std())
        lost[lost] = np.abs(values[lost] - rounded(values[lost])) > most
    return lost


def as_words(cells: Sequence[str], known: dict[str, int]) -> NDArray[np.int32]:
    """Return the index in `known` of the string in each cell of a table column. Strings that are not yet in `known` are
    added to it.
    """
    return np.array([known.setdefault(cell, len(known)) for cell in cells], np.int32)


def number_of(text: str) -> float | None:
    """Return the number that a string represents, or None if it does not represent one."""
    try:
        return float(text)
    except ValueError:
        return None


def _number(cell: str) -> float | None:
    truth = _TRUTH.get(cell.lower())
    return number_of(cell) if truth is None else truth


def rounded(values: ArrayLike) -> NDArray[np.float32]:
    """Round float64 values to float32. Values outside the range of float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32)


_LISTED = 20
"""Largest number of columns that a remedy lists."""
_SHOWN = 6
"""Number of columns in a note."""


def matched_columns(
    table: ColumnTable, features: Sequence[str], expected: DeclaredData
) -> tuple[ColumnTable, tuple[str, ...], bool, tuple[str, ...]]:
    """Return a table, the names of its features in the order of the model's inputs, whether they are names and not
    positions, and notes for the report.

    The names are matched with those of the first table of the run if it has names, and else with those that the model
    was fitted on. Without names on one side, columns are taken in their order. Raises `TargetError` for a column that
    is missing, and in the first table also for others.
    """
    first, wanted = expected.first, expected.column_names
    if wanted is None:
        notes = _in_order(table.name, features, first)
        return table, tuple(features), table.has_header, notes
    if not table.has_header:
        _refuse_other_number(table.name, features, wanted, expected.column_source, fitted=first is None)
        named = dict(zip(features, wanted, strict=True))
        listed = _few([f"{position}={name}" for position, name in named.items()])
        source = "those of " + first.name if first is not None and first.named else "the model's"
        note = f"the file has no header; its columns were taken in the order of {source}: {listed}"
        table = replace(table, features=tuple(named.get(name, name) for name in table.features))
        return table, wanted, True, (note,)
    further = [name for name in features if name not in wanted]
    missing = [name for name in wanted if name not in features]
    if missing and first is not None:
        columns = "column" if len(missing) == 1 else "columns"
        raise TargetError(
            f"{table.name} lacks the {columns} {names_of(missing)}. Its columns are {names_of(features)}, and "
            f"{expected.column_source} {names_of(wanted)}; give the same columns, in any order"
        )
    if missing or (further and first is None):
        present = "" if further else f" (its columns are {_few(list(map(repr, features)))})"
        lacks = f"lacks {_few(list(map(repr, missing)))}{present}" if missing else ""
        has = f"has {_few(list(map(repr, further)))} beside them" if further else ""
        raise TargetError(
            f"{expected.column_source} {len(wanted)} named columns, and {table.name} "
            f"{' and '.join(filter(None, (lacks, has)))}; give the columns as in training",
            *(() if missing else without(further)),
        )
    return table, wanted, True, left_out(table.name, further)


def left_out(name: str, further: Sequence[str]) -> tuple[str, ...]:
    """Return the note on columns of a table that the first one does not have."""
    return (f"{name} has further columns, which were left out: {_few(further)}",) if further else ()


def in_order_of_first(name: str, expected: DeclaredData, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the note on an array beside a table, whose inputs have this `shape` and no names of columns. Raises
    `TargetError` if the numbers of columns differ.
    """
    if expected.first is None or expected.first.columns is None or len(shape) != 1:
        return ()
    return _in_order(name, list(map(str, range(shape[0]))), expected.first)


def _in_order(name: str, columns: Sequence[str], first: FirstTable | None) -> tuple[str, ...]:
    """Return the note on columns that were not matched by names. Raises `TargetError` for another number of them."""
    if first is None:
        return ()
    if first.columns is not None:
        _refuse_other_number(name, columns, first.columns, first.has, fitted=False)
    nameless = name if first.named else first.name
    note = (
        f"the columns of {name} are taken in the order of those of {first.name}, because {nameless} has no names of "
        f"columns: {_few(first.columns if first.named and first.columns else columns)}"
    )
    return (note,)


def refuse_repeated(columns: Sequence[str], name: str, first: FirstTable | None = None) -> None:
    """Raise `TargetError` for names of columns that are not distinct. `first` is the table whose columns they are
    matched with.
    """
    repeated = [column for column, n in Counter(columns).items() if n > 1]
    if repeated:
        others = f", and {first.has} {names_of(first.columns)}" if first and first.columns else ""
        raise TargetError(
            f"{name} has several columns named {repeated[0]!r}. Its columns are {names_of(columns)}{others}; give each "
            "column a name of its own"
        )


def without(columns: Sequence[str]) -> tuple[Remedy, ...]:
    """Return the argument with which columns are no features; none if they are too many to be listed."""
    drop = data_argument("drop", tuple(columns), repeated=True)
    return (drop,) if len(columns) <= _LISTED else ()


def _refuse_other_number(
    name: str, features: Sequence[str], wanted: Sequence[str], source: str, *, fitted: bool
) -> None:
    """Raise `TargetError` if a table without names has another number of columns than the `wanted` ones."""
    if len(features) != len(wanted):
        drop = data_argument("drop", Placeholder("COLUMN", "[COLUMN]"))
        raise TargetError(
            f"{source} {len(wanted)} columns ({names_of(wanted)}), and {name} without names has {len(features)} "
            f"beside its label ({names_of(features)}); give as many, in the same order",
            *((drop,) if fitted and len(features) > len(wanted) else ()),
        )


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"


def refuse_inexact(
    table: ColumnTable, features: Sequence[str], kinds: NDArray[np.uint8], rows: NDArray[np.int64]
) -> None:
    """Raise `TargetError` for a number that loses information as float32, in which rows are stored."""
    for name, column in zip(features, kinds.T, strict=True):
        inexact = np.flatnonzero(column == INEXACT)
        if len(inexact):
            raise TargetError(
                f"the column {name!r} of {table.name} has numbers above {EXACT:,}, first in row "
                f"{rows[inexact[0]]}, and float32, in which rows are stored, represents all whole numbers only up to "
                "it: scale the column as in training, or leave it out if it is an id",
                *(without([name]) if len(features) > 1 else ()),
            )


def rows_by_rules(
    table: ColumnTable, rules: Rules, label: str | None, drop: Sequence[str], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Return the inputs (n, columns) in the given rows of a table, in the order of the rules, and notes. Missing values
    are NaN. Categories are compared without spaces at their ends.

    Raises `UsageError` if the columns of the table are not those of the rules, and `TargetError` for cells that the
    rules do not expect.
    """
    present = [name for name in table.columns if name not in (label, SPLIT_COLUMN, *drop)]
    dropped = next((name for name in drop if name in rules.columns), None)
    if dropped is not None:
        raise UsageError(
            f"the column {dropped!r} is dropped, and the rules have it; remove it from the rules, or do not drop it"
        )
    refuse_other_columns(rules, present, table.name)
    x, notes = np.empty((len(rows), len(rules.names)), np.float32), tuple[str, ...]()
    for place, (name, column) in enumerate(rules.columns.items()):
        if column.type == "category":
            words = table.words[name]
            read_as = by_stripped((word for word in words.words if word.strip()), column.values)
            x[:, place] = _codes(words, read_as, column.values, name, rows, table.name)
            notes += note_on_spaces(f"the column {name!r} of {table.name}", read_as)
            continue
        at = table.features.index(name)
        if table.kinds is not None:
            refuse_inexact(table, [name], table.kinds[rows, at : at + 1], rows)
            text = np.flatnonzero(table.kinds[rows, at] == TEXT)
            if len(text):
                raise TargetError(
                    f"row {rows[text[0]]} of {table.name} has text in the column {name!r}, which is a number in "
                    "the rules; set its type to category, and list its values"
                )
        x[:, place] = table.numbers[rows, at]
    return x, notes


def _codes(
    words: Words,
    read_as: Mapping[str, str],
    values: Sequence[str],
    name: str,
    rows: NDArray[np.int64],
    table: str,
) -> NDArray[np.float32]:
    """Return the position in `values` of the name as which the string in each row is read; NaN for empty strings."""
    known = {value: float(place) for place, value in enumerate(values)}
    codes = np.array(
        [known.get(read_as[word], -1.0) if word in read_as else np.nan for word in words.words], np.float32
    )
    result = codes[words.places[rows]]
    unknown = np.flatnonzero(result == -1)
    if len(unknown):
        row = int(rows[unknown[0]])
        word = words.words[words.places[row]]
        raise TargetError(
            f"row {row} of {table} has {word!r} in the column {name!r}, whose values in the rules are "
            f"{names_of(values)}; add it to them if the model was trained with it, or leave such rows out"
        )
    return result


def notes_of_rules(
    rules: Rules, x: NDArray[np.float32], ids: NDArray[np.int64], name: str
) -> tuple[str, ...]:
    """Compare the inputs (n, columns) with the rules, and return notes for the report.

    Raises `TargetError` for inputs with another number of columns, and for missing values that the rules forbid.
    """
    if x.ndim != 2 or x.shape[1] != len(rules.names):
        raise TargetError(
            f"the inputs of {name} have shape {x.shape}, and the rules have {len(rules.names)} columns; rows with "
            "a value for each of them were expected, in their order"
        )
    for place, (column_name, column) in enumerate(rules.columns.items()):
        missing = np.flatnonzero(np.isnan(x[:, place]))
        if len(missing) and not column.missing:
            raise TargetError(
                f"the value of {column_name} in row {ids[missing[0]]} of {name} is missing, which the rules "
                "forbid; set missing: true if the model accepts such rows, or leave them out"
            )
    return checked(rules, x.astype(np.float64)).notes(len(x))


MOST_VALUES = 1 << 28
"""Largest number of code points of a data set with padding: 1 GiB of memory."""


def codes(
    texts: NDArray[np.str_], edits: TextEdits, ids: NDArray[np.int64], name: str
) -> NDArray[np.float32]:
    """Return the code points of texts (n, width), each padded with zeros to the length of the longest text that the
    constraint allows. `ids` are the row numbers of the texts in the source.

    Raises `TargetError` for empty texts, and for texts with characters that cannot be stored.
    """
    if texts.dtype.kind != "U" or texts.ndim != 1:
        raise TargetError(
            f"the inputs of {name} are {texts.dtype} of shape {texts.shape}, and the threat {edits} changes texts; a "
            "list of strings, or one column of texts, was expected"
        )
    rows: list[str] = texts.tolist()
    for text, row in zip(rows, ids.tolist(), strict=True):
        if not text.strip():
            raise TargetError(f"the text in row {row} of {name} is empty; remove such rows")
        if "\0" in text or any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise TargetError(
                f"the text in row {row} of {name} contains the character 0 or a surrogate; remove it from the texts"
            )
    words, growth = edits.room
    width = max(map(len, rows)) + words * max(0, growth)
    if width * len(rows) > MOST_VALUES:
        raise TargetError(
            f"the {len(rows):,} texts of {name} need {width:,} characters each, because the longest has "
            f"{max(map(len, rows)):,}; at most {MOST_VALUES:,} together were expected: shorten the longest texts, or "
            f"take fewer"
        )
    array: NDArray[np.float32] = encoded(rows, width).numpy()
    return array


def rows_of_symbols(
    inputs: NDArray[Any], expected: DeclaredData, ids: NDArray[np.int64], name: str
) -> NDArray[np.float32]:
    """Return texts or files as rows of numbers; see `codes` and `rows_of_files`."""
    if expected.changes is not None:
        return rows_of_files(inputs, expected.changes, ids, name)
    assert expected.edits is not None
    return codes(inputs, expected.edits, ids, name)


def rows_of_files(
    contents: NDArray[Any], changes: ByteChanges, ids: NDArray[np.int64], name: str
) -> NDArray[np.float32]:
    """Return the bytes of files (n, width), each padded with zeros to the length of the longest file that the
    constraint allows. `ids` are the row numbers of the files in the source.

    Raises `TargetError` for empty files, for files that the reader of their format does not open, and for more bytes
    than fit into memory, and `UsageError` if the rules allow no place in any file.
    """
    if contents.dtype != object or not all(isinstance(content, bytes) for content in contents):
        raise TargetError(
            f"the inputs of {name} are {contents.dtype} of shape {contents.shape}, and the threat {changes} changes "
            "files; a folder with one folder of files for each class, or a list of bytes, was expected"
        )
    files: list[bytes] = list(contents)
    fixed = 0
    for content, row in zip(files, ids.tolist(), strict=True):
        if not content:
            raise TargetError(f"the file in row {row} of {name} is empty; remove such files")
        places = changes.places(content)
        fixed += places.is_empty
        fault = changes.unopened(content, content, places)
        if fault:
            raise TargetError(
                f"the file in row {row} of {name} is not opened by the reader of its format, {places.format} "
                f"({fault}); remove it, or let the rule match other files with starts"
            )
    if fixed == len(files):
        raise UsageError(
            f"the rules of {changes} allow no place in any of the {len(files):,} files of {name}; check starts, change "
            "and insert of the rules, and the kinds of change in the threat"
        )
    longest = max(map(len, files))
    width = longest + changes.growth
    if width * len(files) > MOST_VALUES:
        raise TargetError(
            f"the {len(files):,} files of {name} need {width:,} bytes each, because the longest has {longest:,}; at "
            f"most {MOST_VALUES:,} together were expected: take fewer or shorter files"
        )
    array: NDArray[np.float32] = encoded_files(files, width).numpy()
    return array


def column_of_texts(
    table: ColumnTable,
    requested: str | None,
    label: str | None,
    drop: tuple[str, ...],
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.str_], tuple[str, ...]]:
    """Return the texts in the given rows of a table, and a note for the report if other columns are not used.

    Without a `requested` column, it is the only column beside the label that contains no numbers. Raises `UsageError`
    if there is no such column, or if there are several.
    """
    if requested is not None and requested == label:
        raise UsageError(
            f"{label!r} is the label of {table.name}, and the inputs",
            data_argument("x", Placeholder("COLUMN")),
        )
    others = [name for name in table.columns if name not in (label, SPLIT_COLUMN, *drop)]
    found = [requested] if requested else [name for name in others if _is_text(table, name)]
    if len(found) != 1 or found[0] not in table.words:
        problem = f"the columns of texts {names_of(found)}" if len(found) > 1 else "no such column of texts"
        raise UsageError(
            f"{table.name} has {problem}; its columns beside the label are {names_of(others)}",
            data_argument("x", Placeholder("COLUMN")),
        )
    column = table.words[found[0]]
    unread = [name for name in others if name != found[0]]
    note = f"the texts are the column {found[0]}; other columns were not used: {names_of(unread)}"
    texts = np.array([column.words[place] for place in column.places[rows].tolist()], np.str_)
    return texts, (note,) if unread else ()


def _is_text(table: ColumnTable, name: str) -> bool:
    """Return whether most of the distinct cells of a column are not numbers."""
    words = table.words[name].words if name in table.words else ()
    return sum(number_of(word) is None for word in words) > len(words) / 2
