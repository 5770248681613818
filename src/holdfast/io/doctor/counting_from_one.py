"""Checks labels without a 0 against the outputs of a model, when data are opened."""

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.core.types import Logits
from holdfast.io.doctor.examined import Examined
from holdfast.io.doctor.readings import labels_from_one
from holdfast.statistics.intervals import against_majority


def note_on_labels(
    model: Classifier, batch: Batch, logits: Logits, highest: int, name: str
) -> tuple[str, ...]:
    """Return a note if labels from 1 to `highest` are those of all outputs but the first, and the model with the
    outputs `logits` on some examples is no better than chance.

    Raises `TargetError` if the model is far more accurate with 1 subtracted from the labels.
    """
    text = f"the labels of {name} range from 1 to {highest}, and class numbers start at 0"
    for finding in labels_from_one(Examined(model, batch, (), logits, len(batch), moved_by=0.0)):
        raise TargetError(f"{text}: {finding.message}; they count from 1: subtract 1")
    classes = logits.shape[1] - model.rejects
    result = against_majority(logits.argmax(1) == batch.y, batch.y, classes)
    if highest != classes - 1 or not result.at_chance:
        return ()
    advice = "is no better on them than chance; if they count from 1, subtract 1"
    return (f"{text}. The model, which has {classes} classes, {advice}",)
