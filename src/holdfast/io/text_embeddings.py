"""Synonyms from the input embeddings of a model of transformers: the nearest whole words by cosine similarity.

Such lists are candidates in Jin et al., "Is BERT Really Robust?", AAAI 2020, arXiv:1907.11932. Differs from the paper:
it takes embeddings in which antonyms were moved apart, while the nearest words in those of a language model include
antonyms, inflections and names of the same kind.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.io.files import reading
from holdfast.io.models.archive import read_once
from holdfast.io.models.weights import read_state_dict

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
