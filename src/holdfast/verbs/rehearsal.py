"""Estimates how many rows a run would send to the server of a served model, from a few clean examples."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.model import Classifier
from holdfast.harness import LOOKED_AT, Target
from holdfast.ops.logits import change
from holdfast.sources.counting import Look, rows_of_calls
from holdfast.sources.selection import concatenated
from holdfast.verbs.checks import refuse_data
from holdfast.verbs.expected_rows import ExpectedRows, expected_of
from holdfast.verbs.manifest import work_of
from holdfast.verbs.preparation import plan_for
from holdfast.verbs.request import AssessRequest, Subject
from holdfast.verbs.served import served_by

_TRIED = 32
"""clean examples from which the clean accuracy is estimated"""
_SAME = 1e-4
"""largest difference of the logits of equal inputs, as a share of the largest logit, for a deterministic model"""


@dataclass(frozen=True)
class Rehearsed:
    """Expected number of rows of a run on a served model, and the number of rows that were sent for the estimate."""

    n: int
    """number of examples of the run"""
    attacks: tuple[str, ...]
    most: ExpectedRows
    """upper bounds on the rows, for the largest possible number of correct examples"""
    likely: ExpectedRows | None
    """expected rows if the fraction of correct examples is that of the sample; None if the sample
    is empty or complete"""
    right: int
    """number of correct examples in the sample"""
    tried: int
    sent: int
    """number of rows that were sent to the server for the estimate"""
    batches: str = ""
    """description of the batch sizes that the server accepts; empty if it accepts any number of rows"""


def rehearsed(subject: Subject, data: Data, order: AssessRequest, counted: Look) -> Rehearsed:
    """Return an estimate of the rows that a run sends to the server.

    `counted` limits and counts the rows that are sent for the estimate. Raises the same errors as the run itself.
    """
    refuse_data(data)
    model, opening = subject.model, counted.rows
    first, second = rows_of_calls(model, counted.remaining, min(_TRIED, len(data)), LOOKED_AT)
    tried = min(max(first, 1), len(data))
    rows = [k * len(data) // tried for k in range(tried)]
    sample = concatenated([data.read(row, row + 1) for row in rows])
    right, randomised = 0, False
    classes = model.classes or len(data.classes or ()) or int(sample.y.max()) + 1
    if first:
        classes, right, randomised = _looked_at(model, sample, second)
    target = Target(model, model, model, randomised, classes)
    with ExitStack() as stack:
        plan = plan_for(subject, data, order, target, sample, stack)
        shape = tuple(sample.x.shape[1:])
        cut = work_of(len(data), order, plan, shape, served=served_by(model))

        def expected(right: int | None) -> ExpectedRows:
            return expected_of(order, plan, target, len(data), cut, right=right, opening=opening)

        every = first >= len(data)
        most = expected(right if every else None)
        share = right / tried if first else 1.0
        likely = None if every or not first else expected(round(share * len(data)))
    names = tuple(member.name for member in plan.members)
    size = 1 if model.batches is None else model.batches.size
    batches = model.batches.says if model.batches is not None and size > 1 else ""
    return Rehearsed(len(data), names, most, likely, right, tried if first else 0, counted.rows, batches)


def _looked_at(model: Classifier, sample: Batch, again: int) -> tuple[int, int, bool]:
    """The number of classes, the number of correct examples in a sample, and whether the model is randomised.

    Randomness is tested on the first `again` examples, unless `again` is 0.
    """
    with torch.no_grad():
        logits = model(sample.x)
        more = model(sample.x[:again]) if again else logits[:0]
    randomised = bool((change(logits[:again], more) > _SAME).any()) if again else False
    known = logits[:, :-1] if model.rejects else logits
    return known.shape[1], int((known.argmax(1) == sample.y).sum()), randomised
