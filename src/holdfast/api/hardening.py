"""Converts the settings of `holdfast harden` to its inputs: the opened model, the training and test examples, and the
request.
"""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from holdfast.api import expecting, resolve
from holdfast.api.grad_mode import gradients
from holdfast.api.plans import assess_request, baseline_evidence, examples_to_fit, listed_attacks
from holdfast.api.recipe_building import build_recipe, candidates, refuse_unheld, settings_of
from holdfast.api.references import beside
from holdfast.api.verb_settings import Harden, RotateSettings, part
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.catalogue import RECIPES, names
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.remedies import OTHER_EXAMPLES, Remedy
from holdfast.io.data.data import open_data
from holdfast.io.data.expected import Expected
from holdfast.io.data.memory import as_data
from holdfast.io.models.denoiser import DenoisedNetwork, with_denoiser
from holdfast.recipes import Denoising
from holdfast.recipes.training import distributed
from holdfast.recipes.training.fit import Training, drawing
from holdfast.recipes.training.recipe import Recipe
from holdfast.runs.assess.request import HardenRequest, Subject
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.epoch_log import EpochLog, OnEpoch, opened_trackers
from holdfast.runs.harden.harden import harden
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.harden.trainable import copy_of, refuse_untrainable
from holdfast.settings.grammar import parse_log, parse_threat, seconds
from holdfast.settings.groups import DataSource, ExampleSelection
from holdfast.settings.naming import AUTO
from holdfast.settings.threats_and_attacks import refuse_settings, threat_model
from holdfast.settings.values import address_of

JUDGED = 1_000
"""Number of test examples for the measurements before and after, sampled by the seed, if the settings give no other."""
USUAL_BUDGET = "10min"
"""Default budget of the recipe `auto`."""
_JUDGED_SHARE = 10  # of data given as an object, one in this many examples is used for measurements


ForHardening = tuple[Subject, Batch, Data, Data]
"""The model to harden, the training examples, the test examples, and the data set from which these are sampled."""


def open_for_hardening(settings: Harden | RotateSettings) -> ForHardening:
    """Open the model and the data of a training.

    For the recipe `denoised` the model has an untrained denoiser, which does not change its outputs. If the data are
    given as an object, without `fit`, a tenth of them, sampled by the seed, are the test examples.
    """
    with drawing(Draws(settings.seed).at("model")):  # a factory initialises weights from the seed
        subject = resolve.open_subject(settings)
    model = subject.model
    if model.access != "gradients":
        refuse_untrainable(model)  # before its data are opened
    if settings.fit is None and settings.data is not None and not isinstance(settings.data, str):
        everything = resolve.open_examples(settings, model, selection=ExampleSelection())
        training, judged = _parted(everything, settings, model)
        all_examples = judged
    else:
        training = _open_training(settings, model)
        given = part(settings, ExampleSelection)
        selection = given if given.n or given.sample else ExampleSelection(sample=JUDGED)
        judged = resolve.open_examples(settings, model, selection=selection)
        all_examples = resolve.open_examples(settings, model, selection=ExampleSelection())
    subject = expecting.with_found_properties(subject, (), judged)
    if isinstance(settings, Harden):
        subject = _with_denoiser(subject, settings.recipe, training, settings.seed)
        training = _with_unlabelled(training, settings, model)
    return subject, training, judged, all_examples


def hardened(
    settings: Harden,
    run: str | Path | None,
    *,
    resume: bool,
    command: str,
    on_epoch: OnEpoch | None = None,
    notify: Notify = ignore,
    **reporting: Any,
) -> Hardened:
    """Open the model and the data of a hardening, and take the steps of the run."""
    folder = resolve.folder_of(run, resume=resume)
    settings.refuse_unusable_cluster(settings.workers, settings.model)
    with gradients():
        listed_attacks(settings)  # before the model is opened
        targets = {target: parse_log(target) for target in settings.log if distributed.first()}
        log = EpochLog(on_epoch, opened_trackers(targets, folder, resume=resume), notify)
        baseline = baseline_evidence(settings)
        subject, training, judged, excluded = settings.open()
        request = harden_request(settings, subject, training, excluded, baseline, command)
        try:
            return harden(
                subject,
                training,
                judged,
                request,
                run=folder,
                resume=resume,
                log=log,
                notify=notify,
                **reporting,
            )
        finally:
            log.close()


def _with_denoiser(
    subject: Subject, recipe: Recipe | Mapping[str, Any], training: Batch, seed: int
) -> Subject:
    """Return the model with an untrained denoiser in front of its network, if the recipe trains one and it has none."""
    if isinstance(recipe, Mapping):
        if recipe["use"] not in names("recipes"):
            return subject
        recipe = build_recipe(recipe)
    model = subject.model
    if not isinstance(recipe, Denoising) or isinstance(model.net, DenoisedNetwork):
        return subject
    if training.x.dim() != 4 or model.layout == "hwc" or not isinstance(model.net, nn.Module):
        raise UsageError(
            f"denoised puts a denoiser of convolutions in front of a network for images (channels, height, width), "
            f"and the inputs have shape {tuple(training.x.shape[1:])}"
            + (" with the channels last" if model.layout == "hwc" else ""),
            Remedy("recipe", "gaussian-noise"),
        )
    sizes = {"channels": training.x.shape[1], "width": recipe.width, "depth": recipe.depth}
    if model.rejects:
        raise UsageError(
            "denoised puts a denoiser in front of the network, and this model has a detector that rejects inputs; "
            "harden the network without its detector, and combine the new one with it"
        )
    denoised = copy_of(model)
    assert isinstance(denoised.net, nn.Module)
    with drawing(Draws(seed).at("denoiser")):
        denoised.net = with_denoiser(denoised.net, sizes).eval()
    return replace(subject, model=denoised, card={**subject.card, "denoiser": sizes})


def _parted(data: Data, settings: Harden | RotateSettings, model: Classifier) -> tuple[Batch, Data]:
    examples = data.read(0, len(data))
    order = Draws(settings.seed).at("judged").bits(examples.ids).argsort()
    selection = part(settings, ExampleSelection)
    n = selection.n or selection.sample or min(JUDGED, len(examples) // _JUDGED_SHARE)
    if n >= len(examples):
        raise UsageError(
            f"{n} of {len(examples)} examples are used for the assessment, which leaves none to train on; give a "
            "smaller number"
        )
    judged, training = (examples.take(rows.sort().values) for rows in (order[:n], order[n:]))
    return training, as_data(judged.x, judged.y, expected=Expected(model.bounds, model.classes))


def _open_training(settings: Harden | RotateSettings, model: Classifier) -> Batch:
    """Return the train split of `fit`, or all of it if it has none, or the train split of the data."""
    fit = settings.fit
    source: DataSource = settings if fit is None else beside(settings, fit)
    if source.data is None:
        raise UsageError("data is missing; give an address, as in mnist-mini or images.npz")
    properties = expecting.expected(settings, model, source)
    if not isinstance(source.data, str):
        examples = resolve.open_object(source, properties)
        return examples.read(0, len(examples))
    open_split = partial(open_data, source.data, **expecting.names(source), expected=properties)
    try:
        data = open_split(split="train" if fit is None else source.split or "train")
    except NoSplit as error:
        if fit is None or source.data == settings.data:
            where = (
                f"{source.data} is also the data set of the assessment"
                if fit is not None
                else "the data are used for the assessment"
            )
            raise UsageError(
                f"{source.data!r} has no train split to train on, and {where}", OTHER_EXAMPLES
            ) from error
        data = open_split()
    return data.read(0, len(data))


def _with_unlabelled(batch: Batch, settings: Harden, model: Classifier) -> Batch:
    """Append examples without labels to the labelled ones, from a train split or from inputs given as an object."""
    if settings.unlabelled is None:
        return batch
    source = beside(settings, settings.unlabelled)
    expected = expecting.unlabelled(settings, model, source)
    if isinstance(source.data, str):
        data: Data = open_data(
            source.data, split=source.split or "train", **expecting.names(source), expected=expected
        )
    elif isinstance(source.data, torch.Tensor | np.ndarray):
        labels = np.zeros(len(source.data), dtype=np.int64)
        data = as_data(source.data, labels, expected=expected)
    else:
        data = resolve.open_object(source, expected)
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
    settings: Harden,
    subject: Subject,
    training: Batch,
    excluded: Data,
    baseline: Evidence | None,
    command: str,
) -> HardenRequest:
    """Return the request of a run of `holdfast harden`, created from its settings and the opened model and data.

    `excluded` contains the data that must not be trained on. Learned attacks are fitted on training examples.
    """
    assessment = assess_request(
        settings,
        baseline=baseline,
        device=resolve.device_of_model(settings, subject),
        target=subject.model.access,
        command=command,
    )
    surrogates = resolve.open_surrogates(settings, subject.model)
    assessment = replace(assessment, surrogates=surrogates)
    threat = threat_model(parse_threat(settings.threat))
    threat = replace(threat, surrogates=tuple(surrogate.model for surrogate in surrogates))
    recipe: Any = settings.recipe  # or an object
    name = str(recipe["use"]) if isinstance(recipe, Mapping) else name_of(recipe)
    refuse_unheld(threat)
    chosen = (
        candidates(recipe, subject.model, tuple(training.x.shape[1:]))
        if isinstance(recipe, Mapping)
        else (_candidate(name, recipe),)
    )
    return HardenRequest(
        name,
        chosen,
        threat,
        assessment,
        _budget_s(settings.budget, recipe),
        None if settings.assess_budget is None else seconds(settings.assess_budget, "assess_budget"),
        settings.anyway,
        settings.seed,
        assessment.device,
        command,
        examples_to_fit(assessment.plan),
        excluded,
        _open_options(settings, subject),
        tuple(settings.train_only),
        settings.checkpoint_every,
    )


def _candidate(name: str, recipe: Recipe) -> Candidate:
    """Return a candidate for a recipe given as an object, with validated settings."""
    refuse_settings(recipe, type(recipe).__name__)
    return Candidate(name, recipe, settings_of(recipe))


def _budget_s(given: str | None, recipe: Recipe | Mapping[str, Any]) -> float | None:
    """Return the budget in seconds, or None. Raises `UsageError` if both epochs and a budget are given."""
    auto = isinstance(recipe, Mapping) and recipe["use"] == AUTO
    budget = given or (USUAL_BUDGET if auto else None)
    if budget is None:
        return None
    if isinstance(recipe, Mapping):
        epochs = recipe.get("training", {}).get("epochs")
    else:
        epochs_of_recipe = recipe.training.epochs
        epochs = None if epochs_of_recipe == _usual_epochs(recipe) else epochs_of_recipe
    if epochs is not None:
        raise UsageError(
            f"recipe.training.epochs is {epochs}, and the budget {'of recipe auto ' if auto else ''}is {budget}, which "
            f"determines them; only one of both was expected{', and with epochs a recipe' if auto else ''}"
        )
    return seconds(budget, "budget")


def _usual_epochs(recipe: Any) -> int | None:
    """Default number of epochs of such a recipe; None if it has no default."""
    (training,) = (field for field in fields(recipe) if field.name == "training")
    usual = training.default if training.default_factory is MISSING else training.default_factory()
    return usual.epochs if isinstance(usual, Training) else None


def _open_options(settings: Harden, subject: Subject) -> str:
    """Flags with which the new model is opened and assessed, as far as its file does not contain them."""
    flags = ["--threat", settings.threat]
    if "architecture" not in subject.card:
        addresses = (settings.arch, address_of(settings.model))
        code = next((address for address in addresses if address and ".py:" in address), None)
        flags += ["--arch", code or "FILE.py:FACTORY"]
        for key, value in settings.model_args.items():
            flags += ["--model-args", f"{key}={value}"]
    normalised = expecting.normalisation(settings)
    for flag, text in (
        ("--split", settings.split),
        ("--label", settings.label),
        ("--x", settings.x),
        ("--y", settings.y),
        ("--data-normalised", None if normalised is None else str(normalised)),
        ("--layout", settings.layout),
        ("--class-order", settings.class_order),
    ):
        flags += [flag, text] if text else []
    for column in settings.drop:
        flags += ["--drop", column]
    return shlex.join(flags)


def name_of(recipe: object) -> str:
    """Return the command-line name of a recipe object, or its class name if the recipe is not in the catalogue of
    recipes.
    """
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
