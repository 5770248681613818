"""Finds out whether a model of texts ignores the end of long texts, by a few calls."""

import re

import torch

from holdfast.core.batch import Data
from holdfast.core.model import Classifier
from holdfast.core.texts import decoded, encoded
from holdfast.io.remote.probing import ProbedClassifier

_READ = 512
"""Number of texts of which the longest is examined."""
_LONG, _IGNORED = 48, 16
"""Smallest number of words of a text that is examined, and of words at its end that change nothing."""


def truncation_notes(model: Classifier, data: Data) -> tuple[str, ...]:
    """Return a note for the report if the scores of the longest text do not depend on its last words.

    The words after a position are replaced by the first words of the text, and by themselves in reverse order. The
    smallest position at which the scores of both stay equal is found by bisection. Cost: about ten forward passes of
    two texts.
    """
    rows = data.read(0, min(_READ, len(data))).x
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
