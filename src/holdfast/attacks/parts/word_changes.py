"""Edits of the characters of single words of a text."""

from collections.abc import Iterator

from holdfast.threats.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS, registered_domains

_LONGEST = 64  # longer words are data or addresses, and their edits would need too much memory

Operation = tuple[int, int, str]
"""Replacement of the characters from a position up to another one by a text."""


def edited(word: str, done: tuple[Operation, ...] = ()) -> dict[str, tuple[Operation, ...]]:
    """Return the words that one edit makes of a word beside the operations `done`, with all their operations.

    No two operations change a common character. The registered domains of URLs do not change.
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
    """Return whether two words differ, and have the same registered domains."""
    return new != word and registered_domains(new) == registered_domains(word)
