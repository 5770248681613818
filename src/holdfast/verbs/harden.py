"""Converts the settings of `holdfast harden` to its inputs: the opened model, the training and test examples, and the
request.
"""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from holdfast.core.batch import UNLABELLED, Batch, Data, TrainingData
from holdfast.core.catalogue import RECIPES, names
from holdfast.core.draws import Draws
from holdfast.core.errors import OTHER_EXAMPLES, Need, NoSplit, Remedy, TargetError, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.gates.grammar import parse
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data, tensors_of
from holdfast.io.data.streamed import Streamed, changing_example, open_by_index, training_data
from holdfast.io.models.composed import with_denoiser
from holdfast.recipes.training import optimisation
from holdfast.recipes.training.fit import Training, drawing
from holdfast.recipes.training.recipe import Recipe, facts_of
from holdfast.runs.assess.request import DescribedModel, HardenRequest
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.harden.attempt_training import copy_of, refuse_untrainable, with_trainable_texts
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.checkpoints import EpochLog, OnEpoch, opened_trackers
from holdfast.runs.harden.harden import harden, refuse_unfit, refuse_unmeasured
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.harden.held_out import without_held
from holdfast.runs.harden.pace import Clock
from holdfast.settings.grammar import AUTO, parse_log, seconds
from holdfast.settings.groups import DataSource, ExampleSelection
from holdfast.settings.values import address_of
from holdfast.threats.domains import CONTROL
from holdfast.threats.parsing import parse_threat
from holdfast.verbs.checked_settings import group_of
from holdfast.verbs.harden_generator import hardened_generator
from holdfast.verbs.opening import declared, resolve
from holdfast.verbs.opening.arguments import beside, gradients
from holdfast.verbs.opening.plans import assess_request, baseline_evidence, examples_to_fit, listed_attacks
from holdfast.verbs.opening.recipes import (
    build_recipe,
    candidates,
    refuse_settings,
    refuse_unheld,
    settings_of,
)
from holdfast.verbs.settings import Harden, RotateSettings

_SECRET = 10**18  # smallest seed that is not found by trying
JUDGED = 1_000
"""Number of test examples for the measurements before and after, sampled by the seed, if the settings give no other."""
USUAL_BUDGET = "10min"
"""Default budget of the recipe `auto`."""
ONCE_READ = (
    "the order of the training examples cannot be repeated, so they were read once into memory, in the order in "
    "which they were given, and are the same in each epoch. A run can be resumed only with the same examples in the "
    "same order"
)
"""Note on a loader or an iterator whose examples cannot be read by index."""
_JUDGED_SHARE = 10  # of data given as an object, one in this many examples is used for measurements


ForHardening = tuple[DescribedModel, TrainingData, Data, Data, tuple[str, ...]]
"""The model to harden, the training examples, the test examples, the data set from which these are sampled, and notes
on how the training examples are read.
"""
_Training = tuple[TrainingData, tuple[str, ...]]
"""training examples, and notes on how they are read"""


def open_for_hardening(settings: Harden | RotateSettings) -> ForHardening:
    """Open the model and the data of a training.

    For the recipe `denoised` the model has an untrained denoiser, which does not change its outputs. If the data are
    given as an object, without `fit`, a tenth of them, sampled by the seed, are the test examples.
    """
    subject = resolve.open_seeded(settings)
    subject = replace(subject, model=with_trainable_texts(subject.model))
    model = subject.model
    if model.access != "gradients":
        refuse_untrainable(model)  # before its data are opened
    if settings.fit is None and settings.data is not None and not isinstance(settings.data, str):
        everything, notes = _open_object(settings, settings, model)
        training, judged = _parted(everything, settings, model)
        all_examples = judged
    else:
        selection = resolve.selection_or(settings, ExampleSelection(sample=JUDGED))
        judged = resolve.open_examples(settings, model, selection=selection)
        training, notes = _open_training(settings, model, judged)
        _refuse_changing(settings, model)
        all_examples = resolve.open_examples(settings, model, selection=ExampleSelection())
    subject = declared.with_found_properties(subject, (), judged)
    if isinstance(settings, Harden):
        subject = _with_denoiser(subject, settings.recipe, training, settings.seed)
        training = _with_unlabelled(training, settings, model, all_examples)
    return subject, training, judged, all_examples, notes


def hardened(
    settings: Harden,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
    command: str = "",
    on_epoch: OnEpoch | None = None,
    held_out: Batch | None = None,
    clock: Clock = time.perf_counter,
) -> Hardened[Any, Any]:
    """Open the model and the data of a hardening, and take the steps of the run. Examples that are equal to one of
    `held_out` are not trained on. `clock` returns the seconds in which the budget is counted. A recipe for generators
    trains a GAN instead.
    """
    if settings.threat.change.domain is CONTROL:
        from holdfast.verbs.control import hardened_policy  # late, as few models are policies

        return hardened_policy(
            settings, folder, resume=resume, progress=progress, notify=notify, command=command
        )
    if settings.trains_generator:
        return hardened_generator(
            settings, folder, resume=resume, progress=progress, notify=notify, command=command
        )
    place, settings = resolve.folder_of(folder, resume=resume), _with_threat_of_recipe(settings)
    settings.refuse_unusable_cluster()
    with gradients():
        listed_attacks(settings)  # before the model is opened
        targets = {target: parse_log(target) for target in settings.log if optimisation.first()}
        log = EpochLog(on_epoch, opened_trackers(targets, place, resume=resume), notify)
        baseline = baseline_evidence(settings)
        subject, training, judged, excluded, notes = settings.open()
        if held_out is not None:
            training, _ = without_held(training, held_out)
        request = harden_request(settings, subject, training, excluded, baseline, command)
        request = replace(request, notes=(*notes, *_seed_notes(request)))
        with log.closing():
            return harden(
                subject,
                training,
                judged,
                request,
                run=place,
                resume=resume,
                log=log,
                progress=progress,
                notify=notify,
                detail=detail,
                clock=clock,
            )


def needs_of_hardening(
    settings: Harden, opened: ForHardening, gates: Sequence[str], held_out: Batch | None = None
) -> tuple[Need, ...]:
    """Return what `hardened` needs with the opened model and data, and `gates` that are judged on both assessments."""
    subject, training, judged, excluded, _ = opened
    if held_out is not None:
        training, _ = without_held(training, held_out)

    @cache
    def request() -> HardenRequest:
        return harden_request(_with_threat_of_recipe(settings), subject, training, excluded, None, "")

    def refuse_gates() -> None:
        refuse_unmeasured(subject, judged, request(), tuple(map(parse, gates)), paired=True)

    return (
        Need("harden", lambda: refuse_unfit(subject, training, judged, request())),
        Need("gates", refuse_gates),
    )


def _with_threat_of_recipe(settings: Harden) -> Harden:
    """Return the settings with the threat of a recipe for changes of the training set, if they have the default one.

    Raises `UsageError` for a budget of such a recipe.
    """
    recipe = _built(settings.recipe)
    threat = None if recipe is None else facts_of(recipe).threat_of_training_set
    if threat is None:
        return settings
    if settings.budget is not None:
        raise UsageError(
            f"the budget is {settings.budget}, and the members of {name_of(recipe)} must be functions of the training "
            "set, which a training of limited time is not; set recipe.training.epochs",
            Remedy("budget"),
        )
    usual = type(settings).model_fields["threat"].default
    return (
        settings.model_copy(update={"threat": parse_threat(threat)})
        if str(settings.threat) == usual
        else settings
    )


def _seed_notes(request: HardenRequest) -> tuple[str, ...]:
    """A note if the noise of a private training follows from a seed that is easily guessed."""
    private = any(facts_of(candidate.recipe).private for candidate in request.candidates)
    if not private or request.seed >= _SECRET:
        return ()
    note = (
        f"the noise of dp-sgd is a function of the seed, and the seed is {request.seed}: whoever guesses it can remove "
        "the noise, and epsilon does not hold against them. Repeat the training with a random seed of 19 digits that "
        "begins with 1 to 8, keep the seed secret, and publish the weights only"
    )
    return (note,)


def _with_denoiser(
    subject: DescribedModel, recipe: Recipe | Mapping[str, Any], training: TrainingData, seed: int
) -> DescribedModel:
    """Return the model with an untrained denoiser in front of its network, if the recipe trains one and it has none."""
    built = _built(recipe)
    sizes = None if built is None else facts_of(built).denoiser(subject.model, training.example_shape)
    if sizes is None:
        return subject
    denoised = copy_of(subject.model)
    assert isinstance(denoised.net, nn.Module)
    with drawing(Draws(seed).at("denoiser")):
        denoised.net = with_denoiser(denoised.net, sizes).eval()
    return replace(subject, model=denoised, card={**subject.card, "denoiser": sizes})


def _built(recipe: Recipe | Mapping[str, Any]) -> Recipe | None:
    """The recipe of the settings; None for a name that stands for several, such as `auto`."""
    if not isinstance(recipe, Mapping):
        return recipe
    return build_recipe(recipe) if recipe["use"] in names("recipes") else None


def _parted(
    examples: TrainingData, settings: Harden | RotateSettings, model: Classifier
) -> tuple[TrainingData, Data]:
    if isinstance(examples, Streamed) and examples.changing is not None:
        raise _changing(examples.changing)
    order = Draws(settings.seed).at("judged").bits(examples.ids).argsort()
    selection = group_of(settings, ExampleSelection)
    n = selection.n or selection.sample or min(JUDGED, len(examples) // _JUDGED_SHARE)
    if n >= len(examples):
        raise UsageError(
            f"{n} of {len(examples)} examples are used for the assessment, which leaves none to train on; give a "
            "smaller number"
        )
    judged, training = examples.take(order[:n].sort().values), examples.subset(order[n:].sort().values)
    test = as_data(judged.x, judged.y, expected=DeclaredData(model.bounds, model.classes))
    return training, resolve.with_groups(test, settings, whole=False, positions=judged.ids.cpu().numpy())


def _changing(row: int) -> TargetError:
    return TargetError(
        f"example {row} of the data differs between two readings, and test examples must not change; give test "
        "examples that do not change as the data, and these, which change at random, as fit"
    )


def _refuse_changing(settings: Harden | RotateSettings, model: Classifier) -> None:
    """Raise `TargetError` if the test examples are given as a data set that changes its examples at random."""
    if isinstance(settings.data, Dataset | DataLoader):
        row = changing_example(settings.data, (settings.x, settings.y))
        if row is not None:
            raise _changing(row)


def _open_object(
    source: DataSource, settings: Harden | RotateSettings, model: Classifier, first: Data | None = None
) -> _Training:
    """Return training examples that are given as an object. Those of a torch data set or loader are read by index, if
    possible. The columns of a table are matched with those of the data `first`.
    """
    properties = declared.expected(settings, model, source, first=first)
    tensors = tensors_of(source.data)
    if tensors is not None:
        return _in_memory(as_data(*tensors, expected=properties))
    streamed = open_by_index(source.data, properties, entries=(source.x, source.y))
    if streamed is not None:
        return streamed, streamed.notes
    opened = resolve.open_object(source, properties)
    training, notes = _in_memory(opened)
    notes = (*notes, *(() if first is None else declared.notes_of(opened)))
    if isinstance(source.data, DataLoader | Iterator):
        notes += (ONCE_READ,)
    return training, notes


def _in_memory(data: Data) -> _Training:
    training = training_data(data)
    return training, training.notes if isinstance(training, Streamed) else ()


def _open_training(settings: Harden | RotateSettings, model: Classifier, first: Data) -> _Training:
    """Return the train split of `fit`, or all of it if it has none, or the train split of the data. The columns of a
    table are matched with those of the data `first`.
    """
    fit = settings.fit
    source: DataSource = settings if fit is None else beside(settings, fit)
    if source.data is None:
        raise UsageError("data is missing; give an address, as in mnist-mini or images.npz")
    if not isinstance(source.data, str):
        return _open_object(source, settings, model, first)
    properties = declared.expected(settings, model, source, first=first)
    open_split = partial(open_data, source.data, **declared.names(source), expected=properties)
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
    training, notes = _in_memory(data)
    return training, (*notes, *(() if fit is None else declared.notes_of(data)))


def _with_unlabelled(
    batch: TrainingData, settings: Harden, model: Classifier, first: Data | None = None
) -> TrainingData:
    """Append examples without labels to the labelled ones, from a train split or from inputs given as an object."""
    if settings.unlabelled is None:
        return batch
    if not isinstance(batch, Batch):
        raise UsageError(
            "examples without labels are appended to the labelled ones in memory, and these are read by index when "
            "they are used; give the labelled ones as arrays (x, y) that fit into memory",
            Remedy("unlabelled"),
        )
    source = beside(settings, settings.unlabelled)
    expected = declared.unlabelled(settings, model, source, first)
    if isinstance(source.data, str):
        data: Data = open_data(
            source.data, split=source.split or "train", **declared.names(source), expected=expected
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
    subject: DescribedModel,
    training: TrainingData,
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
    assessment = replace(assessment, surrogates=surrogates, sampled=settings.n is None)
    threat = declared.opened_threat(settings)
    threat = replace(threat, surrogates=tuple(surrogate.model for surrogate in surrogates))
    recipe: Any = settings.recipe  # or an object
    name = str(recipe["use"]) if isinstance(recipe, Mapping) else name_of(recipe)
    refuse_unheld(threat, name)
    chosen = (
        candidates(recipe, subject.model, training.example_shape)
        if isinstance(recipe, Mapping)
        else (_candidate(name, recipe),)
    )
    _refuse_two_limits(settings.budget, chosen[0].recipe)
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
        control=_control(chosen[0].recipe, settings, subject.model),
        teacher=_teacher(chosen[0].recipe, settings, subject, training, excluded),
    )


def _control(recipe: Recipe, settings: Harden, model: Classifier) -> DescribedModel | None:
    """Open the network that a recipe names for comparison, as a surrogate is opened; None without one."""
    if not (address := facts_of(recipe).control):
        return None
    control = resolve.open_named(address, settings, "control")
    resolve.refuse_other_bounds(control, model, "control")
    return control


def _teacher(
    recipe: Recipe, settings: Harden, subject: DescribedModel, training: TrainingData, examples: Data
) -> DescribedModel | None:
    """Open the network whose predictions a recipe learns; None without one.

    Raises `UsageError` if it takes inputs from another range, or has other classes.
    """
    if not (address := facts_of(recipe).teacher):
        return None
    teacher, x = resolve.open_named(address, settings, "teacher"), training.first(1).x
    resolve.refuse_other_bounds(teacher, subject.model, "teacher")
    with torch.no_grad():
        classes = copy_of(subject.model).to(x.device).eval()(x).shape[1]
    resolve.refuse_other_classes(teacher, classes, x, "teacher")
    declared.with_found_properties(subject, (teacher,), examples)  # determines the layout of its inputs
    return teacher


def _candidate(name: str, recipe: Recipe) -> Candidate:
    """Return a candidate for a recipe given as an object, with validated settings."""
    refuse_settings(recipe, type(recipe).__name__)
    facts = facts_of(recipe)
    if facts.opened is not None and not facts.teacher:
        raise UsageError(
            f"{type(recipe).__name__} has an opened teacher, which a stored run cannot name; give its file instead, as "
            "in teacher='robust.safetensors,arch=net.py:make'"
        )
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


def _refuse_two_limits(budget: str | None, recipe: Recipe) -> None:
    """Raise `UsageError` if both a budget and a number of passes are given."""
    if budget is not None and (passes := facts_of(recipe).most_passes):
        raise UsageError(
            f"recipe.passes is {passes:g}, and the budget is {budget}, which determines the number of passes; "
            "only one of both was expected",
            Remedy("budget"),
        )


def _usual_epochs(recipe: Any) -> int | None:
    """Default number of epochs of such a recipe; None if it has no default."""
    (training,) = (field for field in fields(recipe) if field.name == "training")
    usual = training.default if training.default_factory is MISSING else training.default_factory()
    return usual.epochs if isinstance(usual, Training) else None


def _open_options(settings: Harden, subject: DescribedModel) -> str:
    """Flags with which the new model is opened and assessed, as far as its file does not contain them."""
    flags = ["--threat", str(settings.threat)]
    if "architecture" not in subject.card:
        addresses = (settings.arch, address_of(settings.model))
        code = next((address for address in addresses if address and ".py:" in address), None)
        flags += ["--arch", code or "FILE.py:FACTORY"]
        for key, value in settings.model_args.items():
            flags += ["--model-args", f"{key}={value}"]
    normalised = declared.normalisation(settings)
    for flag, text in (
        ("--split", settings.split),
        ("--label", settings.label),
        ("--groups", settings.groups if isinstance(settings.groups, str) else None),
        ("--x", settings.x),
        ("--y", settings.y),
        ("--data-normalised", None if normalised is None else str(normalised)),
        ("--bits", settings.bits and str(settings.bits)),
        ("--layout", settings.layout),
        ("--class-order", settings.class_order),
    ):
        flags += [flag, text] if text else []
    for column in settings.drop:
        flags += ["--drop", column]
    if "bounds" in settings.model_fields_set and declared.bounds_of_all(settings) is None:
        flags += ["--bounds", "@FILE"]  # the file of the model has no bounds of each feature
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
