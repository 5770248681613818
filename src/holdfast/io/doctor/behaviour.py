"""Checks of data against a model, and of the behaviour of a model, in this process or behind a server, on a
sample.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from holdfast.attacks.parts.images import inner
from holdfast.attacks.parts.losses import margin_loss
from holdfast.core.batch import Batch, Data, advice
from holdfast.core.batch import remedies as more_classes_of
from holdfast.core.errors import Remedy, TargetError, TargetLost, UnclearOutput
from holdfast.core.model import EVERY, Classifier, out_of_memory
from holdfast.core.outputs import PROBABILITY, are_probabilities
from holdfast.core.training import CUTS
from holdfast.core.types import Labels, Logits, Rows
from holdfast.io.data.arrays import Arrays, ranges_of_features
from holdfast.io.data.data import concatenated
from holdfast.io.data.labels import listed
from holdfast.io.data.pictures import Pictures
from holdfast.io.doctor.readings import (
    BETTER,
    STEADY,
    Examined,
    Finding,
    checked_order,
    class_orders,
    outputs_of,
    relative_change,
    shifted_labels,
    units,
)
from holdfast.io.files import LAYOUT
from holdfast.io.models.estimators import Estimator
from holdfast.io.remote import probing
from holdfast.io.remote.served_model import InspectionCounter, inspection_counter, rows_of_calls
from holdfast.statistics.intervals import against_majority
from holdfast.threats.domains import Domain

SAMPLE = 256
"""Number of examples in the sample that the checks use."""
_MISFITS = 16  # number of examples outside the bounds or the classes that are added to the sample
_CHUNK = 4096  # examples that are converted at once, so that a large array is not copied as a whole


def strange_classes(data: Data) -> Iterator[Finding]:
    """Yield a finding if it is uncertain which class number belongs to a class name, for example if a class of the
    model has no folder of images.
    """
    if isinstance(data, Pictures | Arrays) and data.objection:
        yield Finding("classes", "problem", data.objection.message, remedies=data.objection.remedies)


def names_of_labels(data: Data) -> tuple[str, ...] | None:
    """Return the class names in the order of their numbers if the labels of the data are names, such as strings or
    class folders; otherwise None.
    """
    named = isinstance(data, Pictures) or (isinstance(data, Arrays) and data.text_labels)
    return data.classes if named else None


def range_of_labels(data: Data, batch: Batch) -> tuple[int, int]:
    """Return the smallest and the largest label of all examples if the data are arrays; otherwise those of the sample
    `batch`.
    """
    y = torch.from_numpy(data.y) if isinstance(data, Arrays) else batch.y
    return int(y.min()), int(y.max())


def spread_examples(data: Data, n: int, model: Classifier | None = None) -> Batch:
    """Return at most `n` examples that are spread evenly over a data set, so that all classes occur even if the data
    are sorted by class.

    If `model` is given, some examples that `assess` would reject are added.
    """
    n = min(n, len(data))
    misfits = [] if model is None else _misfits(data, model)
    rows = sorted({*(k * len(data) // n for k in range(n)), *misfits})
    return concatenated([data.read(row, row + 1) for row in rows])


def _misfits(data: Data, model: Classifier) -> list[int]:
    """Return the rows of the first examples that `assess` would reject, for data in arrays.

    For other data the list is empty: images are bytes in class folders, and therefore are always accepted.
    """
    misfits: list[int] = []
    if isinstance(data, Arrays):
        for start in range(0, len(data), _CHUNK):
            batch = data.read(start, min(start + _CHUNK, len(data)))
            misfit = probing.outside(batch.x, model.bounds).flatten(1).any(1) | (batch.y < 0)
            if model.classes is not None:
                misfit |= batch.y >= model.classes
            misfits += (start + misfit.nonzero().flatten()).tolist()
    return misfits[:_MISFITS]


def moved_inside(model: Classifier, x: Tensor, sample: Tensor) -> Tensor:
    """Return the inputs `x` divided by 255, or a similar divisor, if they are pixels outside the bounds of the model;
    otherwise return them unchanged.

    Without this correction, the later checks would report only effects of the wrong
    scale.
    """
    divisor = probing.pixel_divisor(*probing.extremes(sample), sample.dim())
    if bool(probing.outside(sample, model.bounds).any()) and model.bounds.width <= 1 and divisor is not None:
        return x / divisor
    return x


def known_labels(y: Labels, classes: int, labels: tuple[int, int]) -> tuple[Labels, Rows]:
    """Return those labels that are valid class numbers of the model, and their row indices. Labels from 1 to `classes`
    are reduced by 1.

    If the range `labels` of all labels is 1 to `classes`, all labels are reduced by 1. Otherwise labels outside the
    classes are left out; if no label is left, all are clamped to the classes.
    """
    if labels == (1, classes):
        return y - 1, torch.arange(len(y), device=y.device)
    usable = ((y >= 0) & (y < classes)).nonzero()[:, 0]
    if not len(usable):
        return y.clamp(0, classes - 1), torch.arange(len(y), device=y.device)
    return y[usable], usable


def range_of_values(model: Classifier, x: Tensor, data: Data) -> Iterator[Finding]:
    """Yield a finding on whether input values are inside the bounds of the model, and not in an unexpectedly small part
    of them.
    """
    low, high = probing.extremes(x)
    text = f"inputs range from {low:.4g} to {high:.4g}"
    if bool(probing.outside(x, model.bounds).any()):
        if isinstance(data, Arrays) and data.pixels is not None:
            way_out, remedies = data.pixels.advice(high)
        elif isinstance(data, Arrays) and data.x.ndim == 2 and data.units is None:
            way_out, remedies = probing.scaling(x)
            remedies = (*remedies, ranges_of_features(data))
        elif model.bounds.width <= 1 and probing.pixel_divisor(low, high, x.dim()) == 255:
            way_out, remedies = "divide them by 255", (probing.BYTES,)
        else:
            way_out, remedies = probing.scaling(x)
        yield Finding("range", "problem", f"{text}, outside the bounds", way_out, remedies=remedies)
    elif model.bounds.width >= 100 and high <= 1.0:
        reach = float(model.bounds.like(x)[1].max())
        yield Finding(
            "range",
            "problem",
            f"{text}, but the upper bound is {reach:g}",
            remedies=(Remedy("bounds", (0, 1)),),
        )
    else:
        yield Finding("range", "good", f"{text}, inside the bounds")


def without_estimates(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings in which the value range has no advice of its own if there is one on the normalisation: the
    latter is measured, and the former, an estimate from the values alone, may contradict it.
    """
    listed = tuple(findings)
    if not any(finding.check == "normalisation" for finding in listed):
        return listed
    return tuple(
        replace(finding, advice="see the normalisation below", remedies=())
        if (finding.check, finding.level) == ("range", "problem")
        else finding
        for finding in listed
    )


def labels_outside(
    lowest: int, highest: int, classes: int, *, remote: bool, class_labels: tuple[int, ...] | None = None
) -> Iterator[Finding]:
    """Yield a finding if the lowest or the highest label is not a class number of the model. `class_labels` are the
    labels in the data for which the numbers stand, if they are others.
    """
    if (lowest < 0 or highest >= classes) and class_labels is not None:
        text = f"there are labels outside the classes of the model, which are {listed(list(map(str, class_labels)))}"
        yield Finding("labels", "problem", text, "give the labels that the model was fitted on")
    elif lowest < 0 or highest >= classes:
        text = f"labels range from {lowest} to {highest}, but the model has classes 0 to {classes - 1}"
        from_one = (lowest, highest) == (1, classes)
        way_out = "they seem to start at 1: subtract 1" if from_one else advice(lowest, highest, classes)
        more_classes = more_classes_of(lowest, highest, classes, remote=remote)
        yield Finding("labels", "problem", text, way_out, remedies=more_classes)


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
    batch, probed = spread_examples(data, _EXAMPLES), probing.ProbedClassifier(model)
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
            f"{probing.refused_gradient(error)}: attacks use only the scores, and the default suite is black-box",
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


_ASKED = 20
"""Number of examples that are sent if the server accepts any number of rows."""


def examine_served(model: Classifier, data: Data, domain: Domain | None) -> tuple[Finding, ...]:
    """Run the checks of `holdfast doctor` on a model behind a server, and return their findings. The last one states
    how many inputs were sent. `domain` is that of the inputs if it is known.

    Raises `TargetError` if the model can be run on the data neither in this layout nor with the channels last.
    """
    server = inspection_counter(model)
    assert server is not None
    findings = without_estimates(_findings(model, data, server, domain))
    if any(finding.check == "classes" for finding in findings):  # this finding already explains wrong labels
        findings = tuple(finding for finding in findings if finding.check != "labels")
    text = f"{server.rows} rows were sent to the server; doctor sends at most {server.most}"
    return (*findings, Finding("rows sent", "good", text))


def _findings(
    model: Classifier, data: Data, server: InspectionCounter, domain: Domain | None
) -> Iterator[Finding]:
    yield from strange_classes(data)
    sample = spread_examples(data, SAMPLE, model)
    yield from range_of_values(model, sample.x, data)
    yield from batch_sizes(model)
    n_first, n_again = rows_of_calls(model, server.remaining, min(_ASKED, len(data)), _ASKED)
    if not n_first:
        text = "the model was not checked: all rows were needed to determine the layout of the data"
        yield Finding("model", "warning", text, remedies=(LAYOUT,))
        return
    batch = spread_examples(data, n_first)
    batch = batch.at(moved_inside(model, batch.x, sample.x))
    try:
        logits = outputs_of(model, batch.x)
    except UnclearOutput as error:
        yield unclear_output(error)
    except TargetLost:
        raise
    except TargetError:
        if not _takes_channels_last(model, batch.x, server):
            raise
        shape = tuple(batch.x.shape[1:])
        text = f"the model refuses inputs of shape {shape}, but accepts them with the channels last"
        way_out = "write $x_last in the template of the requests, which puts the channels last"
        yield Finding("layout", "problem", text, way_out)
    else:
        ends, names = range_of_labels(data, sample), names_of_labels(data)
        yield from _response_findings(model, batch, logits, ends, n_again, server, names, domain)


def _response_findings(
    model: Classifier,
    batch: Batch,
    logits: Tensor,
    ends: tuple[int, int],
    again: int,
    server: InspectionCounter,
    names: tuple[str, ...] | None,
    domain: Domain | None,
) -> Iterator[Finding]:
    """Yield the findings about the first responses. The first `again` examples are sent once more. `names` are the
    class names if the labels of the data are names.
    """
    classes = logits.shape[1] - model.rejects
    yield from labels_outside(*ends, classes, remote=True)
    moved, unsteady = _moved(model, batch.x[:again], logits[:again], server)
    y, rows = known_labels(batch.y, classes, ends)
    labelled = Batch(batch.x[rows], y, batch.ids[rows])
    examined = Examined(
        model,
        labelled,
        (),
        logits[rows],
        len(rows),
        left=lambda: server.remaining,
        moved_by=moved,
        names=names,
        domain=domain,
    )
    off = tuple(label_findings(examined))
    yield from (*outputs(examined), *off, *accuracy_of(examined))
    explained = any(examined.accuracy + (finding.gain or 0.0) >= 1 - BETTER for finding in off)
    if not explained:
        yield from units(examined)
    if examined.untried:
        n = len(examined.untried)
        yield Finding(
            "readings",
            "warning",
            f"{n} other {'reading' if n == 1 else 'readings'} of the data (scale, normalisation) "
            f"{'was' if n == 1 else 'were'} not tried: doctor sends at most {server.most} rows to a server",
            "compare with how the server's other clients scale and normalise their inputs",
        )
    yield unsteady
    yield from gradient_findings(examined)


def _takes_channels_last(model: Classifier, x: Tensor, server: InspectionCounter) -> bool:
    """Return whether the server accepts images with the channels last; False if too few rows are left for a test."""
    images = x[:2]
    if images.dim() != 4 or max(len(images), _size(model)) > server.remaining:
        return False
    try:
        outputs_of(model, images.permute(0, 2, 3, 1).contiguous())
    except TargetError:
        return False
    return True


def _moved(model: Classifier, x: Tensor, logits: Tensor, server: InspectionCounter) -> tuple[float, Finding]:
    """Return the largest change of outputs when `x` is sent in reverse order, relative to the largest output, and a
    finding.
    """
    if not len(x):
        description = (
            f"not checked: another batch would exceed the {server.most} rows that doctor sends at most"
        )
        return 0.0, Finding("steadiness", "warning", description)
    reversed_change = relative_change(outputs_of(model, x.flip(0)).flip(0), logits)
    if reversed_change <= STEADY:
        description = f"the same inputs get the same outputs, in any order (on {len(x)} examples)"
        return reversed_change, Finding("steadiness", "good", description)
    fits = server.remaining // _size(model) * _size(model) >= len(x)
    # NaN, with which both comparisons are false, if too few rows are left for the test
    repeated_change = relative_change(outputs_of(model, x), logits) if fits else torch.nan
    if repeated_change > STEADY:
        return repeated_change, Finding(
            "randomness",
            "warning",
            f"two calls on the same inputs differ by {repeated_change:.2g} of the largest logit",
            "if this is not a defence, dropout may be active; a run judges each input by a vote over 41 rows",
        )
    text = "outputs depend on the other inputs in the batch, or differ from call to call"
    if repeated_change <= STEADY:
        text = "outputs depend on the other inputs in the batch"
    return reversed_change, Finding(
        "state",
        "problem",
        f"{text} (by {reversed_change:.2g} of the largest logit)",
        "check whether batch norm uses batch statistics, or the model stores a state between calls",
    )


def _size(model: Classifier) -> int:
    return 1 if model.batches is None else model.batches.size
