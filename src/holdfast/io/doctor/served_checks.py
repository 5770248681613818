"""Checks of a model behind a server. At most 64 inputs are sent, because each may cost money.

About 20 examples are sent, and sent again in reverse order. The remaining rows are used to try alternative
interpretations of the data.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError, TargetLost, UnclearOutput
from holdfast.core.model import Classifier
from holdfast.io.doctor.behaviour import (
    accuracy_of,
    batch_sizes,
    gradient_findings,
    label_findings,
    outputs,
    unclear_output,
)
from holdfast.io.doctor.data_checks import (
    SAMPLE,
    known_labels,
    labels_outside,
    moved_inside,
    names_of_labels,
    range_of_labels,
    range_of_values,
    spread_examples,
    strange_classes,
    without_estimates,
)
from holdfast.io.doctor.examined import BETTER, STEADY, Examined, Finding, outputs_of, relative_change
from holdfast.io.doctor.readings import units
from holdfast.io.models.declarations import LAYOUT
from holdfast.io.remote.counting import InspectionCounter, inspection_counter, rows_of_calls

_ASKED = 20
"""Number of examples that are sent if the server accepts any number of rows."""


def examine_served(model: Classifier, data: Data) -> tuple[Finding, ...]:
    """Run the checks of `holdfast doctor` on a model behind a server, and return their findings. The last one states
    how many inputs were sent.

    Raises `TargetError` if the model can be run on the data neither in this layout nor with the channels last.
    """
    server = inspection_counter(model)
    assert server is not None
    findings = without_estimates(_findings(model, data, server))
    if any(finding.check == "classes" for finding in findings):  # this finding already explains wrong labels
        findings = tuple(finding for finding in findings if finding.check != "labels")
    text = f"{server.rows} rows were sent to the server; doctor sends at most {server.most}"
    return (*findings, Finding("rows sent", "good", text))


def _findings(model: Classifier, data: Data, server: InspectionCounter) -> Iterator[Finding]:
    yield from strange_classes(data)
    sample = spread_examples(data, SAMPLE, model)
    yield from range_of_values(model, sample.x, data)
    yield from batch_sizes(model)
    n_first, n_again = rows_of_calls(model, server.remaining, min(_ASKED, len(data)), _ASKED)
    if not n_first:
        text = "the model was not checked: all rows were needed to determine the layout of the data"
        yield Finding(
            "model",
            "warning",
            text,
            remedies=(LAYOUT,),
        )
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
        yield from _response_findings(model, batch, logits, ends, n_again, server, names)


def _response_findings(
    model: Classifier,
    batch: Batch,
    logits: Tensor,
    ends: tuple[int, int],
    again: int,
    server: InspectionCounter,
    names: tuple[str, ...] | None,
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
