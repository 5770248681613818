"""Converts settings of a hardening to its inputs: the model, training and test examples, and the request."""

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.config import arguments, expecting, ordering
from holdfast.config.attacks import refuse_settings, threat_model
from holdfast.config.grammar import parse_threat, seconds
from holdfast.config.naming import AUTO
from holdfast.config.recipes import candidates, refuse_unheld, settings_of
from holdfast.config.settings import HardenSettings
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.catalogue import RECIPES
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.ops.fit import Training, drawing
from holdfast.ops.recipe import Recipe
from holdfast.sources.data import open_data
from holdfast.sources.expected import Expected
from holdfast.sources.memory import as_data
from holdfast.verbs.candidates import Candidate
from holdfast.verbs.request import HardenRequest, Subject
from holdfast.verbs.trainable import refuse_untrainable

JUDGED = 1_000
"""Number of test examples, sampled by the seed, for measurements before and after, unless the settings give another."""
USUAL_BUDGET = "10min"
"""Default budget of recipe `auto`."""
_ASIDE = 10  # of data given as an object, one in this many examples is used for measurements


def open_for_hardening(settings: HardenSettings) -> tuple[Subject, Batch, Data, Data]:
    """Return the model, the train split, the examples for measurements, and the data set from which those are
    sampled.
    """
    with _weights_of(settings):
        subject = ordering.opened_subject(settings)
    model = subject.model
    _refuse_estimator(model)
    training = _with_unlabelled(_opened_training(settings, model), settings.unlabelled, settings, model)
    judged = ordering.opened_data(_few(settings), model)
    subject = expecting.with_found_properties(subject, (), judged)
    return subject, training, judged, ordering.opened_data(_all(settings), model)


def given_for_hardening(
    model: arguments.ModelLike,
    data: arguments.DataLike,
    fit: arguments.DataLike | None,
    unlabelled: arguments.DataLike | None,
    settings: HardenSettings,
) -> tuple[Subject, Batch, Data, Data]:
    """Return the same as `opened` for models and data given as objects.

    Of data without `fit`, a tenth, sampled by the seed, is used for measurements.
    """
    with _weights_of(settings):
        subject = arguments.subject_of(model, settings)
    own = subject.model
    _refuse_estimator(own)
    if fit is None and not isinstance(data, str | Path):
        training, judged = _parted(arguments.data_of(data, _all(settings), own), settings, own)
        whole = judged
    else:
        judged = arguments.data_of(data, _few(settings), own)
        whole = arguments.data_of(data, _all(settings), own)
        if fit is None or isinstance(fit, str | Path):
            training = _opened_training(settings, own)
        else:
            given = arguments.held(fit, settings, expecting.expected(settings, own))
            training = given.read(0, len(given))
    subject = expecting.with_found_properties(subject, (), judged)
    return subject, _with_unlabelled(training, unlabelled, settings, own), judged, whole


def _refuse_estimator(model: Classifier) -> None:
    """Refuse a model that cannot be trained before its data are opened."""
    if model.access != "gradients":
        refuse_untrainable(model)


def _weights_of(settings: HardenSettings) -> AbstractContextManager[None]:
    """Return a context in which a factory initialises weights from the seed, so that a resumed run gets equal ones."""
    return drawing(Draws(settings.seed).at("model"))


def _parted(data: Data, settings: HardenSettings, model: Classifier) -> tuple[Batch, Data]:
    whole = data.read(0, len(data))
    order = Draws(settings.seed).at("judged").bits(whole.ids).argsort()
    n = settings.n or settings.sample or min(JUDGED, len(whole) // _ASIDE)
    if n >= len(whole):
        raise UsageError(
            f"{n} of {len(whole)} examples are used for the assessment, which leaves none to train on; give a smaller "
            f"number"
        )
    aside, rest = (whole.take(rows.sort().values) for rows in (order[:n], order[n:]))
    return rest, as_data(aside.x, aside.y, expected=Expected(model.bounds, model.classes))


def _few(settings: HardenSettings) -> HardenSettings:
    return settings if settings.n or settings.sample else settings.model_copy(update={"sample": JUDGED})


def _all(settings: HardenSettings) -> HardenSettings:
    return settings.model_copy(update={"n": None, "sample": None})


def _opened_training(settings: HardenSettings, model: Classifier) -> Batch:
    """Return the train split of `fit`, or all of it if it has none, or the train split of the data."""
    address = settings.fit or settings.data
    if address is None:
        raise UsageError("data is missing; give an address, as in mnist-mini or images.npz")
    wanted = partial(
        open_data,
        address,
        **expecting.names(settings),
        expected=expecting.expected(settings, model),
    )
    try:
        data = wanted(split="train")
    except NoSplit as error:
        if settings.fit in (None, settings.data):
            same = (
                f"--fit {settings.fit} is the data set of the assessment"
                if settings.fit
                else "the data are used for the assessment"
            )
            raise UsageError(
                f"{address!r} has no train split to train on, and {same}; give other examples with --fit DATA"
            ) from error
        data = wanted()
    return data.read(0, len(data))


def _with_unlabelled(
    batch: Batch, given: arguments.DataLike | None, settings: HardenSettings, model: Classifier
) -> Batch:
    """Append examples without labels to the labelled ones, from a train split or from inputs given as an object."""
    if given is None:
        return batch
    expected = expecting.unlabelled(settings, model)
    if isinstance(given, str | Path):
        named = expecting.names(settings)
        data: Data = open_data(str(given), split="train", **named, expected=expected)
    elif isinstance(given, torch.Tensor | np.ndarray):
        data = as_data(given, np.zeros(len(given), dtype=np.int64), expected=expected)
    else:
        data = arguments.held(given, settings, expected)
    more = data.read(0, len(data))
    if more.x.shape[1:] != batch.x.shape[1:]:
        raise UsageError(
            f"unlabelled examples have shape {tuple(more.x.shape[1:])}, and the labelled ones "
            f"{tuple(batch.x.shape[1:])}; give examples of the same shape"
        )
    ids = more.ids + batch.ids.max() + 1  # ids are unique
    y = torch.cat((batch.y, torch.full_like(more.y, UNLABELLED)))
    return Batch(torch.cat((batch.x, more.x.to(batch.x))), y, torch.cat((batch.ids, ids)))


def harden_request(
    settings: HardenSettings,
    subject: Subject,
    *,
    recipe: Recipe | None = None,
    surrogates: Sequence[Subject] = (),
    baseline: Evidence | None = None,
    training: Batch,
    excluded: Data,
    device: str | None = None,
    command: str = "",
) -> HardenRequest:
    """Return the request of the settings.

    `recipe` is a recipe given as an object, and `excluded` the data that must not be trained on. Attacks that are
    learned use training examples.
    """
    if settings.across:
        raise UsageError(
            "across is a setting of assess, and harden transfers nothing to other data; leave --across out"
        )
    if settings.transform:
        raise UsageError(
            f"a network that is trained behind the transformations {settings.transform} cannot be used without them; "
            f"leave --transform out, and assess the new model with it"
        )
    order = ordering.order(
        settings, baseline=baseline, device=device, target=subject.model.access, command=command
    )
    assessment = replace(order, surrogates=tuple(surrogates))
    threat = threat_model(parse_threat(settings.threat))
    threat = replace(threat, surrogates=tuple(held.model for held in surrogates))
    name = str(settings.recipe["use"]) if recipe is None else name_of(recipe)
    refuse_unheld(threat)
    chosen = (
        candidates(settings.recipe, subject.model, tuple(training.x.shape[1:]))
        if recipe is None
        else (_candidate(name, recipe),)
    )
    budget_s, learn = _budget_s(settings, recipe), ordering.examples_to_fit(order.plan)
    return HardenRequest(
        name,
        chosen,
        threat,
        assessment,
        budget_s,
        settings.seed,
        assessment.device,
        command,
        learn,
        excluded,
        _open_options(settings, subject),
    )


def _candidate(name: str, recipe: Recipe) -> Candidate:
    """Return a candidate for a recipe given as an object, with validated settings."""
    refuse_settings(recipe, type(recipe).__name__)
    return Candidate(name, recipe, settings_of(recipe))


def _budget_s(settings: HardenSettings, recipe: Recipe | None) -> float | None:
    """Return the budget in seconds, or None. Raises `UsageError` if both epochs and a budget are given."""
    auto = recipe is None and settings.recipe["use"] == AUTO
    budget = settings.budget or (USUAL_BUDGET if auto else None)
    if budget is None:
        return None
    if recipe is None:
        epochs = settings.recipe.get("training", {}).get("epochs")
    else:
        given_epochs = recipe.training.epochs
        epochs = None if given_epochs == _usual_epochs(recipe) else given_epochs
    if epochs is not None:
        raise UsageError(
            f"recipe.training.epochs is {epochs}, and the budget {'of recipe auto ' if auto else ''}is {budget}, which "
            f"determines them; give only one of both{', and with epochs a recipe, as in --recipe pgd' if auto else ''}"
        )
    return seconds(budget, "budget")


def _usual_epochs(recipe: Any) -> int | None:
    """Default number of epochs of such a recipe; None if it has no default."""
    (training,) = (field for field in fields(recipe) if field.name == "training")
    usual = training.default if training.default_factory is MISSING else training.default_factory()
    return usual.epochs if isinstance(usual, Training) else None


def _open_options(settings: HardenSettings, subject: Subject) -> str:
    """Flags with which the new model is opened and assessed, as far as its file does not contain them."""
    words = ["--threat", settings.threat]
    if "architecture" not in subject.card:
        code = next((said for said in (settings.arch, settings.model) if said and ".py:" in said), None)
        words += ["--arch", code or "FILE.py:FACTORY"]
        for key, value in settings.model_args.items():
            words += ["--model-args", f"{key}={value}"]
    normalised = expecting.normalisation(settings)
    for flag, said in (
        ("--split", settings.split),
        ("--label", settings.label),
        ("--x", settings.x),
        ("--y", settings.y),
        ("--data-normalised", None if normalised is None else str(normalised)),
        ("--layout", settings.layout),
        ("--class-order", settings.class_order),
    ):
        words += [flag, said] if said else []
    for column in settings.drop:
        words += ["--drop", column]
    return shlex.join(words)


def name_of(recipe: object) -> str:
    """Name of a recipe object on the command line, or its class name if it is not in the catalogue."""
    if isinstance(recipe, type):
        raise UsageError(f"recipe is the class {recipe.__name__}; give an instance: {recipe.__name__}()")
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"recipe is {recipe!r}; expected a name, or a recipe such as holdfast.recipes.TRADES(beta=6)"
        )
    names = [
        name for name, entry in RECIPES.items() if entry.cls == type(recipe).__name__ and not entry.settings
    ]
    return names[0] if names else type(recipe).__name__
