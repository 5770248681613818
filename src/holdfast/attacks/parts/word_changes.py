"""Changes of single words of a text: edits of characters, and synonyms."""

import re
from collections.abc import Iterator, Mapping, Sequence

from holdfast.core.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS, PUNCTUATION

_AROUND = re.compile(rf"([{re.escape(PUNCTUATION)}]*)(.*?)([{re.escape(PUNCTUATION)}]*)", re.DOTALL)
_HOST = re.compile(rf"(?:.*?://|[{re.escape(PUNCTUATION)}]*(?=www\.))([^/?#]*)", re.DOTALL | re.IGNORECASE)

_LONGEST = 64  # longer words are data or addresses, and their edits would need too much memory

Operation = tuple[int, int, str]
"""Replacement of the characters from a position up to another one by a text."""


def edited(word: str, done: tuple[Operation, ...] = ()) -> dict[str, tuple[Operation, ...]]:
    """Return the words that one edit makes of a word beside the operations `done`, with all their operations.

    No two operations change a common character. The host of a URL does not change.
    """
    found: dict[str, tuple[Operation, ...]] = {}
    for operation in _operations(word):
        together = (*done, operation)
        new = word
        for start, stop, text in sorted(together, reverse=True):
            new = new[:start] + text + new[stop:]
        if new and all(_apart(operation, other) for other in done) and _changes(word, new):
            found.setdefault(new, together)
    return found


def synonyms(word: str, listed: Mapping[str, Sequence[str]]) -> dict[str, tuple[Operation, ...]]:
    """Return the word with each of its listed synonyms between its punctuation, each without operations."""
    around = _AROUND.fullmatch(word)
    assert around is not None
    before, core, after = around.groups()
    exact = core in listed
    raised = core[:1].isupper() and not exact
    entries = listed.get(core, ()) if exact else listed.get(core.lower(), ())
    found = (before + (new[:1].upper() + new[1:] if raised else new) + after for new in entries)
    return {new: () for new in found if _changes(word, new)}


def _operations(word: str) -> Iterator[Operation]:
    """Yield the single edits that the constraint allows, in the first `_LONGEST` characters of a word."""
    for place, character in enumerate(word[:_LONGEST]):
        yield place, place, INVISIBLE
        if HOMOGLYPHS.get(character):
            yield place, place + 1, HOMOGLYPHS[character]
        if word[place + 1 : place + 2] not in ("", character):
            yield place, place + 2, word[place + 1] + character
        yield place, place + 1, ""
        yield place, place, character
        for key in NEIGHBOURS.get(character, ""):
            yield place, place + 1, key
    yield len(word), len(word), INVISIBLE


def _apart(one: Operation, other: Operation) -> bool:
    """Return whether two operations change no common character, and do not insert at the same position."""
    if one[0] == one[1] and other[0] == other[1]:
        return one[0] != other[0]
    return one[1] <= other[0] or other[1] <= one[0]


def _changes(word: str, new: str) -> bool:
    """Return whether two words differ, and are URLs of the same host or no URLs."""
    return new != word and _host(new) == _host(word)


def _host(word: str) -> str | None:
    """Return the host of a URL as it is written, or None for another word."""
    matched = _HOST.match(word)
    return None if matched is None else matched[1]
