"""What a run on a served model would send to the server: computed, after a look at a few clean examples."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.model import Classifier
from holdfast.harness import LOOKED_AT, Target
from holdfast.ops.logits import change
from holdfast.runs.assess import agreed
from holdfast.runs.entry import refuse_data
from holdfast.runs.expected_rows import ExpectedRows, expected_of
from holdfast.runs.making import Making
from holdfast.runs.order import Order, Subject, silent
from holdfast.runs.selection import gathered
from holdfast.runs.served import served_by
from holdfast.sources.counting import Look, rows_of_calls

_TRIED = 32
"""clean examples that say how many are right"""
_SAME = 1e-4
"""share of the largest logit by which the answers to equal inputs may differ"""


@dataclass(frozen=True)
class Rehearsed:
    """What a run would cost, and what it cost to find out."""

    n: int
    """examples of the run"""
    attacks: tuple[str, ...]
    most: ExpectedRows
    """if every example is right that may be"""
    likely: ExpectedRows | None
    """the same if as large a share of all examples is right as of those that were tried; None where all were tried"""
    right: int
    """how many of the examples tried are right"""
    tried: int
    sent: int
    """rows that the server was sent for this"""
    batches: str = ""
    """what batches the server takes, where it does not take any number of rows"""


def rehearsed(subject: Subject, data: Data, order: Order, counted: Look) -> Rehearsed:
    """What a run would send to a server that is sent only what `counted` leaves. Raises what the run would raise."""
    refuse_data(data)
    model, opening = subject.model, counted.rows
    first, second = rows_of_calls(model, counted.remaining, min(_TRIED, len(data)), LOOKED_AT)
    tried = min(max(first, 1), len(data))
    rows = [k * len(data) // tried for k in range(tried)]
    sample = gathered([data.read(row, row + 1) for row in rows])
    right, randomised = 0, False
    classes = model.classes or len(data.classes or ()) or int(sample.y.max()) + 1
    if first:
        classes, right, randomised = _looked_at(model, sample, second)
    target = Target(model, model, model, randomised, classes)
    with ExitStack() as stack:
        plan = agreed(subject, data, order, target, sample, stack)
        shape = tuple(sample.x.shape[1:])
        device = torch.device(order.device)
        served = served_by(model)
        made = Making(subject, data, order, plan, target, device, shape, silent, _unopened, served)
        cut = made.manifest(None)["plan"]

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


def _unopened() -> tuple[Subject, Data, tuple[Subject, ...]]:
    raise AssertionError("a rehearsal has no workers, for which a run is opened again")


def _looked_at(model: Classifier, sample: Batch, again: int) -> tuple[int, int, bool]:
    """The number of classes, how many of the sample are right, and whether the model draws at random.

    The last is looked for on the first examples `again`, where that is not 0.
    """
    with torch.no_grad():
        logits = model(sample.x)
        more = model(sample.x[:again]) if again else logits[:0]
    randomised = bool((change(logits[:again], more) > _SAME).any()) if again else False
    known = logits[:, :-1] if model.rejects else logits
    return known.shape[1], int((known.argmax(1) == sample.y).sum()), randomised
