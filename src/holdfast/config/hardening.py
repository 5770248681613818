"""Converts the settings of `holdfast harden` to its inputs: the opened model, the training and test examples, and the
request.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from holdfast.config import expecting, resolve
from holdfast.config.attacks import refuse_settings, threat_model
from holdfast.config.grammar import parse_threat, seconds
from holdfast.config.groups import ExampleSelection
from holdfast.config.naming import AUTO
from holdfast.config.planning import assess_request, examples_to_fit
from holdfast.config.recipes import build_recipe, candidates, refuse_unheld, settings_of
from holdfast.config.references import DataLike, Sources
from holdfast.config.settings import HardenSettings
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.catalogue import RECIPES, names
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.remedies import OTHER_EXAMPLES, Remedy
from holdfast.ops.denoiser import DenoisedNetwork, with_denoiser
from holdfast.ops.fit import Training, drawing
from holdfast.ops.recipe import Recipe
from holdfast.recipes import Denoising
from holdfast.sources.data import open_data
from holdfast.sources.expected import Expected
from holdfast.sources.memory import as_data
from holdfast.verbs.candidates import Candidate
from holdfast.verbs.request import HardenRequest, Subject
from holdfast.verbs.trainable import copy_of, refuse_untrainable

JUDGED = 1_000
"""Number of test examples for the measurements before and after, sampled by the seed, if the settings give no other."""
USUAL_BUDGET = "10min"
"""Default budget of the recipe `auto`."""
_JUDGED_SHARE = 10  # of data given as an object, one in this many examples is used for measurements


def open_for_hardening(
    sources: Sources,
    fit: DataLike | None,
    unlabelled: DataLike | None,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
) -> tuple[Subject, Batch, Data, Data]:
    """Return the model to harden, the training examples, the test examples, and the data set from which the test
    examples are sampled.

    For the recipe `denoised` the model has an untrained denoiser, which does not change its outputs. If the data are
    given as an object, without `fit`, a tenth of them, sampled by the seed, are the test examples.
    """
    with drawing(Draws(sources.seed).at("model")):  # a factory initialises weights from the seed
        subject = resolve.open_subject(sources)
    model = subject.model
    if model.access != "gradients":
        refuse_untrainable(model)  # before its data are opened
    if fit is None and sources.data.given is not None and sources.data.address is None:
        training, judged = _parted(resolve.open_examples(sources.all_examples(), model), sources, model)
        all_examples = judged
    else:
        training = _open_training(sources, fit, model)
        judged = resolve.open_examples(_sampled(sources), model)
        all_examples = resolve.open_examples(sources.all_examples(), model)
    subject = expecting.with_found_properties(subject, (), judged)
    subject = _with_denoiser(subject, recipe, training, sources.seed)
    return subject, _with_unlabelled(training, unlabelled, sources, model), judged, all_examples


def open_for_settings(settings: HardenSettings, sources: Sources) -> tuple[Subject, Batch, Data, Data]:
    """Return what `open_for_hardening` returns, for the settings of the command line or of a configuration file."""
    return open_for_hardening(sources, settings.fit, settings.unlabelled, settings.recipe)


def _with_denoiser(
    subject: Subject, recipe: Recipe | str | Mapping[str, Any] | None, training: Batch, seed: int
) -> Subject:
    """Return the model with an untrained denoiser in front of its network, if the recipe trains one and it has none."""
    if isinstance(recipe, str | Mapping):
        spec = {"use": recipe} if isinstance(recipe, str) else recipe
        recipe = build_recipe(spec) if spec["use"] in names("recipes") else None
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


def _parted(data: Data, sources: Sources, model: Classifier) -> tuple[Batch, Data]:
    examples = data.read(0, len(data))
    order = Draws(sources.seed).at("judged").bits(examples.ids).argsort()
    n = sources.selection.n or sources.selection.sample or min(JUDGED, len(examples) // _JUDGED_SHARE)
    if n >= len(examples):
        raise UsageError(
            f"{n} of {len(examples)} examples are used for the assessment, which leaves none to train on; give a "
            "smaller number"
        )
    judged, training = (examples.take(rows.sort().values) for rows in (order[:n], order[n:]))
    return training, as_data(judged.x, judged.y, expected=Expected(model.bounds, model.classes))


def _sampled(sources: Sources) -> Sources:
    selection = sources.selection
    return (
        sources
        if selection.n or selection.sample
        else replace(sources, selection=ExampleSelection(sample=JUDGED))
    )


def _open_training(sources: Sources, fit: DataLike | None, model: Classifier) -> Batch:
    """Return the train split of `fit`, or all of it if it has none, or the train split of the data."""
    reference = sources.data if fit is None else sources.beside(fit)
    address, address_of_data = reference.address, sources.data.address
    if reference.given is None:
        raise UsageError("data is missing; give an address, as in mnist-mini or images.npz")
    properties = expecting.expected(sources, model, reference)
    if address is None:
        examples = resolve.open_object(reference, properties)
        return examples.read(0, len(examples))
    open_split = partial(open_data, address, **expecting.names(reference.source), expected=properties)
    try:
        data = open_split(split="train" if fit is None else reference.source.split or "train")
    except NoSplit as error:
        if fit is None or address == address_of_data:
            where = (
                f"{address} is also the data set of the assessment"
                if fit is not None
                else "the data are used for the assessment"
            )
            raise UsageError(
                f"{address!r} has no train split to train on, and {where}", OTHER_EXAMPLES
            ) from error
        data = open_split()
    return data.read(0, len(data))


def _with_unlabelled(batch: Batch, unlabelled: DataLike | None, sources: Sources, model: Classifier) -> Batch:
    """Append examples without labels to the labelled ones, from a train split or from inputs given as an object."""
    if unlabelled is None:
        return batch
    reference = sources.beside(unlabelled)
    expected, source = expecting.unlabelled(sources, model, reference), reference.source
    if reference.address is not None:
        data: Data = open_data(
            reference.address, split=source.split or "train", **expecting.names(source), expected=expected
        )
    elif isinstance(reference.given, torch.Tensor | np.ndarray):
        labels = np.zeros(len(reference.given), dtype=np.int64)
        data = as_data(reference.given, labels, expected=expected)
    else:
        data = resolve.open_object(reference, expected)
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
    sources: Sources,
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
    """Return the request of a run of `holdfast harden`, created from its settings and the opened model and data.

    `recipe` is a recipe given as an object, and `excluded` contains the data that must not be trained on. Learned
    attacks are fitted on training examples.
    """
    assessment = assess_request(
        settings, baseline=baseline, device=device, target=subject.model.access, command=command
    )
    assessment = replace(assessment, surrogates=tuple(surrogates))
    threat = threat_model(parse_threat(settings.threat))
    threat = replace(threat, surrogates=tuple(surrogate.model for surrogate in surrogates))
    name = str(settings.recipe["use"]) if recipe is None else name_of(recipe)
    refuse_unheld(threat)
    chosen = (
        candidates(settings.recipe, subject.model, tuple(training.x.shape[1:]))
        if recipe is None
        else (_candidate(name, recipe),)
    )
    budget_s, learn = _budget_s(settings, recipe), examples_to_fit(assessment.plan)
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
        _open_options(settings.threat, sources, subject),
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


def _open_options(threat: str, sources: Sources, subject: Subject) -> str:
    """Flags with which the new model is opened and assessed, as far as its file does not contain them."""
    flags = ["--threat", threat]
    model, data = sources.model.source, sources.data.source
    if "architecture" not in subject.card:
        addresses = (model.arch, sources.model.address)
        code = next((address for address in addresses if address and ".py:" in address), None)
        flags += ["--arch", code or "FILE.py:FACTORY"]
        for key, value in model.model_args.items():
            flags += ["--model-args", f"{key}={value}"]
    normalised = expecting.normalisation(sources.inputs)
    for flag, text in (
        ("--split", data.split),
        ("--label", data.label),
        ("--x", data.x),
        ("--y", data.y),
        ("--data-normalised", None if normalised is None else str(normalised)),
        ("--layout", data.layout),
        ("--class-order", model.class_order),
    ):
        flags += [flag, text] if text else []
    for column in data.drop:
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
