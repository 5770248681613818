"""From the settings of a hardening to what its run takes: the model, training and test examples, and the wish."""

import torch

from holdfast.config import ordering
from holdfast.config.attacks import threat_model
from holdfast.config.grammar import parse_threat, seconds
from holdfast.config.recipes import build_recipe, settings_of
from holdfast.config.settings import HardenSettings
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.runs.hardening import Wish
from holdfast.runs.order import Subject
from holdfast.sources.data import open_data

JUDGED = 1_000
"""Test examples that the model is judged on before and after, where nobody says how many."""


def opened(settings: HardenSettings) -> tuple[Subject, Batch, Data]:
    """The model, the whole train split, and the examples to judge on."""
    subject = ordering.opened_subject(settings)
    few = settings if settings.n or settings.sample else settings.model_copy(update={"n": JUDGED})
    return subject, _training(settings, subject), ordering.opened_data(few, subject.model)


def _training(settings: HardenSettings, subject: Subject) -> Batch:
    address = settings.fit or settings.data
    assert address is not None
    try:
        data = open_data(
            address,
            split="train",
            label=settings.label,
            drop=tuple(settings.drop),
            classes=subject.model.classes,
            bounds=subject.model.bounds,
        )
    except UsageError as error:
        raise UsageError(
            f"{address!r} has no train split to train on ({error}); name other examples with --fit DATA"
        ) from error
    batch = data.read(0, len(data))
    if len(torch.unique(batch.y)) < 2:
        raise TargetError(
            f"all {len(batch)} training labels of {address} are {int(batch.y[0])}; two classes are needed"
        )
    if settings.unlabelled is None:
        return batch
    return _with_unlabelled(batch, settings.unlabelled, settings, subject.model.bounds)


def _with_unlabelled(batch: Batch, address: str, settings: HardenSettings, bounds: Bounds) -> Batch:
    """The train split at an address behind the labelled examples, its labels taken off."""
    data = open_data(address, split="train", label=settings.label, drop=tuple(settings.drop), bounds=bounds)
    more = data.read(0, len(data))
    if more.x.shape[1:] != batch.x.shape[1:]:
        raise UsageError(
            f"unlabelled examples of {address} have shape {tuple(more.x.shape[1:])}, and the labelled ones "
            f"{tuple(batch.x.shape[1:])}; give examples of the same kind"
        )
    ids = more.ids + batch.ids.max() + 1  # no two examples share one
    y = torch.cat((batch.y, torch.full_like(more.y, UNLABELLED)))
    return Batch(torch.cat((batch.x, more.x.to(batch.x))), y, torch.cat((batch.ids, ids)))


def wish(settings: HardenSettings, subject: Subject, *, command: str = "") -> Wish:
    """What the settings ask for."""
    judge = ordering.order(settings, target=subject.model.access, command=command)
    recipe = build_recipe(settings.recipe)
    return Wish(
        recipe,
        str(settings.recipe["use"]),
        settings_of(recipe),
        threat_model(parse_threat(settings.threat)),
        judge,
        None if settings.budget is None else seconds(settings.budget, "budget"),
        settings.seed,
        judge.device,
        command,
    )
