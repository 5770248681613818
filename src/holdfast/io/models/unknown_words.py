"""Finds out how often an edit of a word gives one that a model of texts does not know."""

from collections.abc import Callable
from typing import Any

from holdfast.attacks.parts.word_changes import edited
from holdfast.core.batch import Data
from holdfast.core.model import Classifier
from holdfast.core.texts import decoded
from holdfast.io.models.estimators import Estimator
from holdfast.io.models.transformers_folders import TokenisedTexts
from holdfast.threats.text_edits import TextEdits

_READ, _WORDS = 64, 50
"""Number of texts that are read, and of their words that are edited."""


def unknown_notes(model: Classifier, data: Data, edits: TextEdits) -> tuple[str, ...]:
    """Return a note for the report on edited words that the model does not know, with an example.

    Words are known or unknown to the tokenizer of a folder of transformers, and to a pipeline of scikit-learn that
    begins with a vectoriser of words. Nothing is stated about other models, whose words are not known here.
    """
    is_unknown = _is_unknown(model)
    if is_unknown is None or not edits.edits:
        return ()
    texts = decoded(data.read(0, min(_READ, len(data))).x)
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
