"""Splits the text of a VNN-LIB file into parentheses, words and positions."""

import re
from collections.abc import Iterator

from holdfast.core.errors import TargetError

MOST_DEPTH = 128
"""largest number of parentheses that may be open at once"""

_TOKEN = re.compile(r"[ \t\r\n\f\v]+|;[^\n]*|([()])|(\"(?:[^\"\\]|\\.)*\"|[^\s()\";]+)")


def tokens(text: str, path: str) -> Iterator[tuple[str, int]]:
    """Yield parentheses and words with their offsets in the text. Blanks and comments are left out.

    Raises `TargetError` for a parenthesis that is not closed or not opened, and for too many open ones.
    """
    depth, position = 0, 0
    for match in _TOKEN.finditer(text):
        if match.start() != position:
            break
        position = match.end()
        word = match[1] or match[2]
        if word is None:
            continue
        if word == "(":
            depth += 1
            if depth > MOST_DEPTH:
                raise mistake(text, match.start(), path, f"more than {MOST_DEPTH} parentheses are open here")
        elif word == ")":
            depth -= 1
            if depth < 0:
                raise mistake(text, match.start(), path, "this parenthesis closes nothing")
        yield word, match.start()
    if position < len(text):
        raise mistake(text, position, path, f"{text[position]!r} is not expected here")
    if depth:
        raise mistake(text, len(text), path, f"the file ends before {depth} parentheses are closed")


def mistake(text: str, offset: int, path: str, what: str) -> TargetError:
    """Return the error for a mistake at an offset of a text, with its line and column."""
    line = text.count("\n", 0, offset) + 1
    column = offset - (text.rfind("\n", 0, offset) + 1) + 1
    return TargetError(f"{path!r}, line {line}, column {column}: {what}")


def first_command(text: str, path: str) -> str:
    """Return the first word of a file, such as `declare-const`. Raises `TargetError` if there is none."""
    for word, offset in tokens(text, path):
        if word == ")":
            raise mistake(text, offset, path, "a command such as (declare-const X_0 Real) was expected")
        if word != "(":
            return word
    raise TargetError(f"{path!r} contains no command; (declare-const X_0 Real) was expected")
