"""Data sets of files as they are, in folders with one subfolder for each class."""

from dataclasses import replace
from pathlib import Path

from holdfast.core.batch import array_of_files
from holdfast.io.data.arrays import Arrays, Choice, from_numpy
from holdfast.io.data.columns import MOST_VALUES
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.pictures import class_folders
from holdfast.io.files import content_of_file


def open_files(folder: Path, choice: Choice, expected: DeclaredData, *, follow_links: bool = False) -> Arrays:
    """Return a data set of all files in a folder with one subfolder for each class; see `class_folders`.

    Raises `TargetError` for an empty file, and see `rows_of_files`.
    """
    files = class_folders(folder, choice, None, "file", follow_links=follow_links)
    contents = [content_of_file(path, "file", most=MOST_VALUES) for path in files.paths]
    y, classes, objection, notes = files.numbered(expected, choice.n)
    lengths = [len(content) for content in contents]
    size = (
        f"{min(lengths):,} to {max(lengths):,} bytes"
        if min(lengths) < max(lengths)
        else f"{lengths[0]:,} byte{'s' * (lengths[0] > 1)}"
    )
    data = from_numpy(
        str(folder),
        array_of_files(contents),
        y,
        files.rows,
        expected,
        class_names=classes,
        notes=(f"{len(contents):,} files of {size}", *files.notes, *notes),
    )
    return replace(data, objection=objection, text_labels=True)
