"""Reads the JSON file of a threat on texts, with synonyms, words and protected patterns."""

import json
import re
from pathlib import Path
from typing import Any

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.io.files import content_of_file, refuse_address
from holdfast.threats.text_edits import TextEdits

MOST_BYTES = 4_000_000
"""Largest size of the file; its content is stored with each run."""
_MOST_SYNONYMS, _MOST_PATTERNS, _LONGEST = 1000, 1000, 1000
"""Largest number of synonyms of a word and of protected patterns, and of characters of a word. Each text gets the
memory of the longest new word, and each word is compared with every pattern.
"""
SIMILARITY = 0.7
"""Smallest cosine similarity of synonyms from embeddings, if none is given."""
_EXAMPLE = '{"synonyms": {"good": ["great", "fine"]}, "insert": ["hello"], "protect": ["^[0-9]+$"]}'
_KEYS = ("synonyms", "insert", "protect")


def text_edits(
    *,
    edits: int = 0,
    words: int = 0,
    synonyms: int = 0,
    inserts: int = 0,
    file: str = "",
    similarity: float | None = None,
) -> TextEdits:
    """Return the constraint with these limits and the content of the file, or the synonyms from the embeddings of a
    folder with a model of transformers.

    Raises `UsageError` if the limits do not fit together, and `TargetError` for a file that is not as expected.
    """
    empty = TextEdits(edits, words, synonyms, inserts, file)
    embedded = bool(synonyms and file) and Path(file).is_dir()
    if similarity is not None and not embedded:
        raise UsageError(
            f"similarity is {similarity:g}, and no synonyms are taken from the embeddings of a folder; leave it out, "
            "or give text:synonyms=2,file=FOLDER with a folder of transformers"
        )
    if not file:
        return empty
    refuse_address(file, "the file of words is", "text:synonyms=2,file=words.json")
    if embedded:
        similarity = SIMILARITY if similarity is None else similarity
        lists = _embedded(Path(file), similarity)
    else:
        lists = _lists(Path(file))
    needed = {"synonyms": synonyms, "insert": inserts}
    for key, limit in needed.items():
        if limit and not lists.get(key):
            raise TargetError(f"{file!r} has no {key}; a JSON object such as {_EXAMPLE} was expected")
    content = json.dumps(lists, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return TextEdits(edits, words, synonyms, inserts, file, similarity or 0.0, content)


def _embedded(folder: Path, similarity: float) -> dict[str, Any]:
    """Return the synonyms from the embeddings of a folder. Raises `TargetError` if there are none, or too many."""
    from holdfast.io.text_embeddings import embedded_synonyms  # late: few threats are of folders

    synonyms = embedded_synonyms(folder, similarity)
    size = len(json.dumps(synonyms))
    if not 0 < size <= MOST_BYTES or not synonyms:
        raise TargetError(
            f"{len(synonyms):,} words of {str(folder)!r} have synonyms with a similarity of {similarity:g}, which take "
            f"{size:,} bytes; at least one word and at most {MOST_BYTES:,} bytes were expected: give a "
            f"{'smaller' if not synonyms else 'larger'} similarity, as in similarity={SIMILARITY}"
        )
    return {"synonyms": synonyms}


def _lists(path: Path) -> dict[str, Any]:
    """Return the content of the file after checks of its size, keys and types."""
    content = content_of_file(
        path, "file of words", most=MOST_BYTES, advice="leave words out that do not occur in the texts"
    )
    try:
        lists = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise TargetError(f"{str(path)!r} is not JSON: {error}; {_EXAMPLE} was expected") from error
    if not isinstance(lists, dict):
        raise TargetError(f"{str(path)!r} contains {kind_of(lists)}; {_EXAMPLE} was expected")
    unknown = [key for key in lists if key not in _KEYS]
    if unknown:
        raise TargetError(f"{str(path)!r} has the key {unknown[0]!r}; expected any of {', '.join(_KEYS)}")
    synonyms = lists.get("synonyms", {})
    if not isinstance(synonyms, dict):
        raise TargetError(f"synonyms in {str(path)!r} is {kind_of(synonyms)}; {_EXAMPLE} was expected")
    for old, new in synonyms.items():
        _refuse_no_words(new, f"the entry {old!r} of synonyms in {str(path)!r}")
        _refuse_no_words([old], f"the keys of synonyms in {str(path)!r}")
    if "insert" in lists:
        _refuse_no_words(lists["insert"], f"insert in {str(path)!r}")
    _refuse_many(max(map(len, synonyms.values()), default=0), _MOST_SYNONYMS, "synonyms of one word", path)
    _refuse_many(len(lists.get("protect", ())), _MOST_PATTERNS, "patterns in protect", path)
    if "protect" in lists:
        _refuse_patterns(lists["protect"], f"protect in {str(path)!r}")
    return lists


def _refuse_many(n: int, most: int, what: str, path: Path) -> None:
    if n > most:
        raise TargetError(f"{str(path)!r} has {n:,} {what}; at most {most:,} were expected: leave some out")


def _refuse_no_words(words: object, name: str) -> None:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise TargetError(f"{name} is {words!r:.80}; a list of at least one word was expected")
    for word in words:
        if len(word.split()) != 1 or word.split()[0] != word or "\0" in word or not _is_unicode(word):
            raise TargetError(f"{name} contains {word!r:.80}; a word without whitespace was expected")
        if len(word) > _LONGEST:
            raise TargetError(
                f"{name} contains {word!r:.80} of {len(word):,} characters; a word of at most {_LONGEST:,} was expected"
            )


def _is_unicode(word: str) -> bool:
    """Return whether a text has no surrogates, which no encoding can write."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in word)


def _refuse_patterns(patterns: object, name: str) -> None:
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TargetError(f"{name} is {patterns!r:.80}; a list of regular expressions was expected")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise TargetError(
                f"{name} contains {pattern!r}, which is no regular expression: {error}"
            ) from error
