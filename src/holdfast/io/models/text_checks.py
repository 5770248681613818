"""Finds out by a few calls how a model of texts treats long texts and unknown words."""

import re
from collections.abc import Callable
from typing import Any

import torch

from holdfast.attacks.parts.rows_and_words import edited
from holdfast.core.batch import Data
from holdfast.core.model import Classifier
from holdfast.core.texts import decoded, encoded
from holdfast.io.models.estimators import Estimator
from holdfast.io.models.transformers_folders import TokenisedTexts
from holdfast.io.remote.probing import ProbedClassifier
from holdfast.threats.text_edits import TextEdits

_N_ROWS = 512
"""Number of texts of which the longest is examined."""
_LONG, _IGNORED = 48, 16
"""Smallest number of words of a text that is examined, and of words at its end that change nothing."""


def truncation_notes(model: Classifier, data: Data) -> tuple[str, ...]:
    """Return a note for the report if the scores of the longest text do not depend on its last words.

    The words after a position are replaced by the first words of the text, and by themselves in reverse order. The
    smallest position at which the scores of both stay equal is found by bisection. Cost: about ten forward passes of
    two texts.
    """
    rows = data.read(0, min(_N_ROWS, len(data))).x
    text = max(decoded(rows), key=lambda each: len(each.split()))
    words = re.findall(r"\S+\s*", text)
    if len(words) < _LONG:
        return ()
    probe = ProbedClassifier(model)

    def scores(kept: int) -> torch.Tensor | None:
        others = words[: len(words) - kept], words[kept:][::-1]
        changed = ["".join((*words[:kept], *other)) for other in others]
        return probe.outputs(encoded(changed, max(*map(len, changed), rows.shape[1])).to(rows))

    whole, low, high = scores(len(words)), 0, len(words)
    if whole is None:
        return ()
    while low < high:
        middle = (low + high) // 2
        found = scores(middle)
        if found is not None and torch.equal(found, whole):
            high = middle
        else:
            low = middle + 1
    if not 0 < high <= len(words) - _IGNORED:
        return ()
    ignored = f"the scores of a text of {len(words)} words do not depend on the words after the first {high}"
    return (f"{ignored}: the model probably truncates texts, and changes of later words have no effect",)


_N_TEXTS, _WORDS = 64, 50
"""Number of texts that are read, and of their words that are edited."""


def unknown_notes(model: Classifier, data: Data, edits: TextEdits) -> tuple[str, ...]:
    """Return a note for the report on edited words that the model does not know, with an example.

    Words are known or unknown to the tokenizer of a folder of transformers, and to a pipeline of scikit-learn that
    begins with a vectoriser of words. Nothing is stated about other models, whose words are not known here.
    """
    is_unknown = _is_unknown(model)
    if is_unknown is None or not edits.edits:
        return ()
    texts = decoded(data.read(0, min(_N_TEXTS, len(data))).x)
    distinct = dict.fromkeys(word for text in texts for word in text.split())
    known = [word for word in distinct if not is_unknown(word)][:_WORDS]
    changed = [(word, new) for word in known for new in edited(word)]
    unknown = [(word, new) for word, new in changed if is_unknown(new)]
    if not unknown:
        return ()
    word, new = unknown[0]
    share = (
        f"{100 * len(unknown) / len(changed):.0f} % of the words that one edit makes of {len(known)} words"
    )
    return (
        f"the model does not know {share} it knows, such as {new!a} instead of {word!r}: the edit hides the word",
    )


def _is_unknown(model: Classifier) -> Callable[[str], bool] | None:
    """Return a function that states whether a model does not know a word; None if this cannot be found out."""
    if isinstance(model.net, TokenisedTexts):
        tokenizer = model.net.tokenizer
        unknown_id = tokenizer.unk_token_id
        if unknown_id is None:
            return None
        return lambda word: unknown_id in tokenizer(word, add_special_tokens=False)["input_ids"]
    source: Any = model.net.interface.source if isinstance(model.net, Estimator) else None
    vectoriser: Any = source.steps[0][1] if type(source).__name__ == "Pipeline" else None
    places = getattr(vectoriser, "vocabulary_", None)
    if places is None or getattr(vectoriser, "analyzer", "") != "word":
        return None
    analyse = vectoriser.build_analyzer()
    return lambda word: not any(term in places for term in analyse(word))
