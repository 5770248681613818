"""A model made ready to be measured, by the process that holds a run and by each of its workers alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.model import Classifier
from holdfast.harness import LOOKED_AT, Target, prepared
from holdfast.runs.entry import enough_threads
from holdfast.runs.order import Subject


@contextmanager
def readied(
    subject: Subject, data: Data, device: torch.device, *, adaptive: bool = False
) -> Iterator[tuple[Target, Batch]]:
    """The model on its device in eval mode, with the examples that it was looked at with; then as it was.

    `adaptive` looks for what hides its gradient, too.
    """
    sample = data.read(0, min(LOOKED_AT, len(data))).to(device)
    with (
        placed(subject.model, device),
        prepared(subject.model, sample, adaptive=adaptive) as target,
        enough_threads(target.bare, sample.x),
    ):
        yield target, sample


def model_digest(subject: Subject, target: Target) -> str:
    """What a run knows its model by."""
    return digest(canonical([subject.digest, target.randomised]))


@contextmanager
def placed(model: Classifier, device: torch.device) -> Iterator[None]:
    """The model on a device for a while."""
    parameter = next(model.parameters(), None)
    before = parameter.device if parameter is not None else device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
