"""Checks of the behaviour of a model on a sample of its data: its accuracy, its outputs, whether they are repeatable,
and its gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.attacks.parts.expectation import inner
from holdfast.attacks.parts.losses import margin_loss
from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError, UnclearOutput
from holdfast.core.model import EVERY, Classifier, out_of_memory
from holdfast.core.outputs import PROBABILITY, are_probabilities
from holdfast.core.refusals import CUTS
from holdfast.core.remedies import Remedy
from holdfast.core.types import Logits
from holdfast.io.doctor.data_checks import spread_examples
from holdfast.io.doctor.examined import STEADY, Examined, Finding
from holdfast.io.doctor.readings import checked_order, class_orders, shifted_labels
from holdfast.io.models.estimators import Estimator
from holdfast.io.remote.probing import ProbedClassifier, refused_gradient
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


def batch_sizes(model: Classifier) -> Iterator[Finding]:
    """Yield a finding if the network accepts only batches of certain sizes."""
    if model.batches is not None and model.batches != EVERY:
        yield Finding(
            "batches",
            "warning",
            model.batches.description,
            "let it accept any number of rows, which is faster",
        )


def unclear_output(error: UnclearOutput) -> Finding:
    """Return the finding for a model with one output per example that may be a logit or a probability."""
    return Finding("output", "problem", error.message, remedies=error.remedies)


def outputs(examined: Examined) -> Iterator[Finding]:
    """Yield findings for outputs that are NaN, that are probabilities, or that are equal for all inputs."""
    logits = examined.logits
    if bool(logits.isnan().any()):
        share = float(logits.isnan().any(1).double().mean())
        yield Finding(
            "nan",
            "problem",
            f"{share:.0%} of the outputs contain NaN",
            "look for a division or a logarithm of zero",
        )
        return
    if are_probabilities(logits) and examined.model.access != "labels":  # labels are one-hot
        text = "the outputs are probabilities, not logits: attacks see vanishing gradients"
        way_out = "return the layer before the softmax, or declare the outputs"
        if examined.model.access == "scores":
            text = "the outputs are probabilities, which hide small changes if the model is confident"
            way_out = "declare the outputs"
        yield Finding("probabilities", "warning", text, way_out, remedies=(PROBABILITY,))
    y = examined.batch.y
    if examined.accuracy == 1 and bool((y == y[0]).all()):
        return  # right for the only label, so that the outputs may be equal
    # equal up to rounding; the clamp is for outputs that are all 0
    if len(logits) > 1 and float((logits - logits[0]).abs().max()) <= 1e-6 * float(
        logits.abs().max().clamp_min(1e-12)
    ):
        yield Finding(
            "constant",
            "problem",
            "every input gets the same output",
            "check the weights and the preprocessing",
        )


def label_findings(examined: Examined) -> Iterator[Finding]:
    """Yield findings for labels that seem to be in another order or shifted by one, and for labels that are all
    equal.
    """
    yield from class_orders(examined)
    yield from shifted_labels(examined)
    y = examined.batch.y
    if len(y) > 1 and bool((y == y[0]).all()):
        yield Finding(
            "labels",
            "warning",
            f"all {len(y)} sampled labels are {int(y[0])}",
            "check that it is the right split",
        )


def accuracy_of(examined: Examined) -> Iterator[Finding]:
    """Yield a finding that compares the accuracy of the model with the accuracy of always predicting the most frequent
    class.
    """
    y = examined.batch.y
    compared = against_majority(examined.logits.argmax(1) == y, y, examined.logits.shape[1])
    text = f"accuracy is {examined.accuracy:.1%} on {len(y)} examples"
    names = None if any(class_orders(examined)) else examined.names
    if compared.at_chance:
        yield Finding(
            "accuracy",
            "warning",
            f"{text}, no better than always predicting the majority class ({compared.majority:.1%}): "
            f"{outputs_in_words(examined.logits)} do not look like logits or probabilities of the labels",
            "check that the data belong to the model, and that it is a classifier whose outputs are scores of classes",
            remedies=(checked_order(names),) if names else (),
        )
    else:
        yield Finding("accuracy", "good", text)


def steadiness_findings(examined: Examined) -> Iterator[Finding]:
    """Yield findings on whether the model returns equal outputs for equal inputs, even if the other inputs in the batch
    differ.
    """
    if examined.in_training:
        names = ", ".join(examined.in_training[:3]) + (" …" if len(examined.in_training) > 3 else "")
        yield Finding(
            "mode",
            "problem",
            f"layers are in train mode: {names}",
            "call model.eval() before the model is passed, or in its factory",
        )
    if examined.moved > STEADY:
        yield Finding(
            "randomness",
            "warning",
            f"two calls on the same inputs differ by {examined.moved:.2g} of the largest logit",
            "if this is not a defence, dropout may be active; if it is, attacks must average over draws",
            remedies=(Remedy("suite", "rand"),),
        )
        return
    change = examined.change(examined.ask(examined.model, examined.batch.x.flip(0)).flip(0))
    if change > STEADY:
        text = f"outputs depend on the other inputs in the batch (by {change:.2g} of the largest logit)"
        way_out = "check whether batch norm uses batch statistics, or the model stores a state between calls"
        yield Finding("state", "problem", text, way_out)
    else:
        yield Finding("steadiness", "good", "the same inputs get the same outputs, in any order")


def gradient_findings(examined: Examined) -> Iterator[Finding]:
    """Yield a finding on whether the gradient of the model with respect to its input can be computed and is nonzero."""
    if examined.model.access != "gradients":
        why = f" ({examined.model.hides})" if examined.model.hides else ""
        text = f"the model gives {examined.model.access} only{why}: the default suite is black-box"
        if isinstance(examined.model.net, Estimator):
            text += ", or trees for a tree ensemble"
        yield Finding("gradients", "good", text)
        return
    try:
        gradients = [_gradient(examined.model, piece) for piece in examined.batches]
    except TargetError as error:  # the model accepted the same inputs without gradients
        yield Finding(
            "gradients",
            "warning",
            f"{refused_gradient(error)}: attacks use only the scores, and the default suite is black-box",
            "if a network of torch is behind it, give the network itself",
        )
        return
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        yield Finding(
            "gradients",
            "problem",
            f"the gradient fails: {error}",
            "correct the network, or leave its gradients unused until then",
            remedies=(Remedy("suite", "black-box"),),
        )
        return
    if any(grad is None for grad in gradients):
        yield Finding(
            "gradients",
            "problem",
            "no gradient reaches the input",
            f"remove what stops it: {CUTS}",
            remedies=(Remedy("suite", "black-box"),),
        )
        return
    grad = torch.cat([each for each in gradients if each is not None])
    zero = float((grad.flatten(1).nan_to_num().abs().amax(1) == 0).double().mean())
    if zero > 0.01:
        text = f"{zero:.0%} of the examples have a zero gradient, so gradient attacks have no direction there"
        saturated = "return the logit, the output of the layer before the sigmoid or softmax"
        rounding = "a rounding or saturated operation may hide it; the doubts of assess contain more details"
        way_out = saturated if examined.model.output == "probability" else rounding
        yield Finding("gradients", "warning", text, way_out)
    else:
        yield Finding("gradients", "good", "gradients reach the input")


def _gradient(model: Classifier, batch: Batch) -> Tensor | None:
    """Return the gradient of the margins with respect to the inputs, or None if it does not reach them."""
    x = batch.x.clone().requires_grad_()
    logits = model(x)
    if not logits.requires_grad:
        return None
    grad: Tensor | None = torch.autograd.grad(margin_loss(logits, batch).sum(), x, allow_unused=True)[0]
    return grad
