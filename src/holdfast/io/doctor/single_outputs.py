"""Whether the one number that a model returns for each example looks like the logit of class 1."""

import torch

from holdfast.attacks.parts.expectation import inner
from holdfast.core.batch import Data
from holdfast.core.model import Classifier
from holdfast.core.types import Logits
from holdfast.io.doctor.data_checks import spread_examples
from holdfast.io.remote.probing import ProbedClassifier
from holdfast.statistics.intervals import against_majority

_EXAMPLES = 64
_ROWS = 8
"""number of examples in one call of the model"""


def outputs_in_words(logits: Logits) -> str:
    """Return what a model with the logits (n, classes) returns, as the subject of a sentence. One output z has the
    logits (0, z).
    """
    if logits.shape[1] == 2 and not bool(logits[:, 0].any()):
        low, high = float(logits[:, 1].min()), float(logits[:, 1].max())
        return f"the numbers from {low:.4g} to {high:.4g} that the model returns, one for each example,"
    return f"the {logits.shape[1]} outputs"


def unlike_a_logit(model: Classifier, data: Data) -> tuple[str, ...]:
    """Return a note if a model returns one number for each example, which is used as a logit, and which predicts labels
    0 and 1 no better than chance, as the number of a regression.

    Cost: the outputs of at most 64 examples. Models with several outputs or behind a server are not called.
    """
    if model.remote or model.rejects or inner(model).output != "logit" or not len(data):
        return ()
    batch, probed = spread_examples(data, _EXAMPLES), ProbedClassifier(model)
    try:
        parts = [probed.outputs(x) for x in torch.split(batch.x, _ROWS)]
    except (RuntimeError, MemoryError):
        return ()  # raised again by the run, with advice
    outputs = [part for part in parts if part is not None]
    if len(outputs) < len(parts) or outputs[0].shape[1] != 2:
        return ()
    logits, known = torch.cat(outputs), (batch.y >= 0) & (batch.y < 2)
    y = batch.y[known]
    if not len(y) or not against_majority(logits[known].argmax(1) == y, y, 2).at_chance:
        return ()
    note = (
        f"{outputs_in_words(logits)} do not look like logits of class 1: accuracy on {len(y)} examples is no better "
        "than chance. A regression is no classifier: give a model that returns a score for each class, or declare "
        "logits with model_output='logit' (--model-output logit)"
    )
    return (note,)
