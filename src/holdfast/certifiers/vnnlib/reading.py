"""Opens VNN-LIB files of the versions 1.0 and 2, with limits of size and depth."""

import gzip
import zlib
from io import BufferedReader
from pathlib import Path

from holdfast.certifiers.vnnlib.query import Query, refuse_unbounded_inputs
from holdfast.certifiers.vnnlib.tokens import first_command
from holdfast.certifiers.vnnlib.version1 import query_of_version_1
from holdfast.certifiers.vnnlib.version2 import query_of_version_2
from holdfast.core.errors import TargetError
from holdfast.io.files import megabytes, opened

MAX_BYTES_OF_QUERY = 512_000_000
"""largest number of bytes of a query after decompression"""


def read_query(path: Path) -> Query:
    """Return the query in a VNN-LIB file, which may be compressed with gzip (`.vnnlib.gz`).

    Raises `TargetError` for a file that is too large, damaged or no query, with line and column of the mistake, and
    `UsageError` if a package is missing that reads version 2.
    """
    text = _text(path)
    if first_command(text, str(path)) == "vnnlib-version":
        query = query_of_version_2(text, str(path))
    else:
        query = query_of_version_1(text, str(path))
    refuse_unbounded_inputs(query, str(path))
    return query


def _text(path: Path) -> str:
    try:
        with opened(path, "query") as file:
            text: gzip.GzipFile | BufferedReader = (
                gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            )
            content = text.read(MAX_BYTES_OF_QUERY + 1)
        if len(content) > MAX_BYTES_OF_QUERY:
            raise TargetError(
                f"{str(path)!r} has more than {megabytes(MAX_BYTES_OF_QUERY)}; split it into several queries"
            )
        return content.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TargetError(f"{str(path)!r} is no VNN-LIB file: {error}; a text file was expected") from error
