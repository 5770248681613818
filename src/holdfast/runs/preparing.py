"""Prepares a model for measurement, in the main process of a run and in its workers."""

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
    """Yield the model prepared on its device, and the examples it was inspected with; restores the model.

    With `adaptive`, parts that hide the gradient are detected, too.
    """
    sample = data.read(0, min(LOOKED_AT, len(data))).to(device)
    with (
        placed(subject.model, device),
        prepared(subject.model, sample, adaptive=adaptive) as target,
        enough_threads(target.bare, sample.x),
    ):
        yield target, sample


def model_digest(subject: Subject, target: Target) -> str:
    """SHA-256 that identifies the model in a run."""
    return digest(canonical([subject.digest, target.randomised]))


@contextmanager
def placed(model: Classifier, device: torch.device) -> Iterator[None]:
    """Move the model to a device, and back at the end."""
    parameter = next(model.parameters(), None)
    before = parameter.device if parameter is not None else device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
