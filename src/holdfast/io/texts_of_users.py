"""Synonyms and protected words of a threat on texts: from a JSON file, and from the input embeddings of a model."""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.io.files import content_of_file, reading, refuse_address, refusing
from holdfast.io.models.weights import read_once, read_state_dict
from holdfast.threats.text_edits import TextEdits

_TOKENIZER, _WEIGHTS = "tokenizer.json", "model.safetensors"
_MOST_BYTES = 64_000_000  # of the tokenizer
_MATRICES = (
    "word_embeddings.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embedding.weight",
    "shared.weight",
)
_BEGINNINGS = ("\u2581", "\u0120")
"""Characters with which the first token of a word begins in SentencePiece and in byte-level BPE."""
_MOST = 10  # synonyms of a word
_ROWS = 1024  # words that are compared with all others at once


def embedded_synonyms(folder: Path, similarity: float) -> dict[str, list[str]]:
    """Return for each word of a folder's vocabulary the words whose input embeddings have at least this cosine
    similarity, at most ten, the most similar first.

    Only tokens that are whole words of letters are used. Words that differ only in case are no synonyms. Raises
    `TargetError` if the folder has no vocabulary or no embeddings. Cost: about ten seconds for 30,000 tokens.
    """
    with reading(folder):
        paths = folder / _TOKENIZER, folder / _WEIGHTS
        for path in paths:
            if not path.exists():
                raise TargetError(
                    f"the folder {str(folder)!r} has no {path.name}, from which synonyms are taken; give a JSON file, "
                    "or save tokenizer and model again with save_pretrained"
                )
        changed = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
        return _synonyms(folder, similarity, changed)


@lru_cache(maxsize=4)  # a threat is parsed several times
def _synonyms(folder: Path, similarity: float, changed: object) -> dict[str, list[str]]:
    content = json.loads(read_once(folder / _TOKENIZER, "tokenizer", max_bytes=_MOST_BYTES))
    tokens = _whole_words(content["model"]["vocab"])
    path = folder / _WEIGHTS
    tensors = read_state_dict(path, read_once(path, "weights file"))[0].tensors
    matrix = next((value for name, value in tensors.items() if name.endswith(_MATRICES)), None)
    if matrix is None or matrix.ndim != 2 or not tokens or len(matrix) <= max(tokens.values()):
        raise TargetError(
            f"{str(path)!r} has no matrix of the embeddings of {len(tokens):,} words, such as {_MATRICES[0]}; give a "
            "JSON file of synonyms"
        )
    words = list(tokens)
    units = F.normalize(matrix[list(tokens.values())].float(), dim=1)
    listed: dict[str, list[str]] = {}
    for first in range(0, len(words), _ROWS):
        # one more for the word itself, and one for the same word in another case
        near = (units[first : first + _ROWS] @ units.T).topk(min(_MOST + 2, len(words)), dim=1)
        for word, cosines, places in zip(words[first:], near.values, near.indices, strict=False):
            listed[word] = _of_word(word, cosines, [words[place] for place in places.tolist()], similarity)
    return {word: news for word, news in listed.items() if news}


def _of_word(word: str, cosines: Tensor, others: list[str], similarity: float) -> list[str]:
    """Return the other words that are similar enough."""
    news = [
        other
        for cosine, other in zip(cosines.tolist(), others, strict=True)
        if cosine >= similarity and other.lower() != word.lower()
    ]
    return news[:_MOST]


def _whole_words(vocab: Any) -> dict[str, int]:
    """Return the positions of the tokens that are words of at least two letters, by their texts."""
    numbers = vocab if isinstance(vocab, dict) else {token: place for place, (token, _) in enumerate(vocab)}
    begins = next((begin for begin in _BEGINNINGS if any(token.startswith(begin) for token in numbers)), "")
    whole = {
        token.removeprefix(begins): place for token, place in numbers.items() if token.startswith(begins)
    }
    return {token: place for token, place in whole.items() if len(token) > 1 and token.isalpha()}


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
    # UnicodeDecodeError and JSONDecodeError are among these errors
    with refusing(f"{str(path)!r} is not JSON", (ValueError, RecursionError), f"{_EXAMPLE} was expected"):
        lists = json.loads(content)
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
        with refusing(f"{name} contains {pattern!r}, which is no regular expression", re.error):
            re.compile(pattern)
