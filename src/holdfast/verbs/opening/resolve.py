"""Opens the models and the examples of a run, which are given as addresses or as Python objects."""

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from holdfast.attacks.parts.images import seen_through
from holdfast.attacks.parts.sounds import heard_through
from holdfast.core.batch import BY_LABEL, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import (
    OTHER_EXAMPLES,
    FreeSizes,
    NoSplit,
    Remedy,
    TargetError,
    UsageError,
    model_argument,
)
from holdfast.core.gradients import DECAY, skipped
from holdfast.core.model import Bounds, Classifier, Units
from holdfast.core.types import Inputs
from holdfast.io.data.arrays import Arrays, Choice
from holdfast.io.data.clips import with_rate
from holdfast.io.data.data import Selection, grouped, grouped_by_label, noting_fewer, open_data, selected
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_array, as_data
from holdfast.io.data.tables import is_frame, open_frame, text_of
from holdfast.io.models.adapting import object_identity, refuse_no_model
from holdfast.io.models.estimators import Estimator
from holdfast.io.models.models import Declared, OpenedModel, open_model
from holdfast.io.remote.remote import SCHEMES, Remote
from holdfast.recipes.training.fit import drawing
from holdfast.reports.words import amount, strict
from holdfast.runs.assess.request import DescribedModel, Opened
from holdfast.runs.harness.kinds.passes import MATRIX_ROWS
from holdfast.runs.harness.plan import Plan
from holdfast.runs.store.folder import refuse_used
from holdfast.settings import groups
from holdfast.settings.grammar import (
    ENSEMBLE,
    HEARD,
    MIXED,
    parse_surrogate,
    parse_transform,
    per_second,
    seconds,
    transform_meaning,
)
from holdfast.settings.values import SurrogateSettings, address_of
from holdfast.threats.domains import SIGNAL
from holdfast.verbs.checked_settings import ModelReference, composed, group_of
from holdfast.verbs.opening.arguments import beside, differentiable, refuse_other_settings
from holdfast.verbs.opening.declared import (
    bounds_by_feature,
    bounds_of_all,
    constant_where_still,
    declared,
    edits_of,
    ends,
    expected,
    expected_without_model,
    group_column,
    is_of_clips,
    names,
    normalisation,
    notes_of,
    refuse_other_rate,
    sizes_by_feature,
    units_of_eps,
    unlabelled,
    with_found_properties,
    without_silence,
)
from holdfast.verbs.opening.models import open_model_at
from holdfast.verbs.opening.plans import SUPPORTED_DEVICES, Measuring, device_of, examples_to_fit
from holdfast.verbs.settings import Assess, Certify, Opening


def remote(settings: Opening) -> Remote:
    """Return the options for HTTP requests to a model behind a server, such as the timeout and the rate of requests."""
    inference, limits = group_of(settings, groups.InferenceSource), composed(groups.ServerLimits, settings)
    return Remote(
        tuple(inference.allow_hosts),
        tuple(inference.headers),
        inference.http_request,
        inference.http_response,
        inference.http_labels,
        inference.http_max_rows,
        seconds(inference.http_timeout, "http_timeout"),
        inference.http_retries,
        inference.http_concurrency,
        None if inference.http_rate is None else per_second(inference.http_rate),
        limits.max_queries,
        limits.on_refused,
    )


def refuse_unserved(limits: groups.ServerLimits, model: Classifier) -> None:
    """Raise `UsageError` if limits for a server are given but the model is not behind a server."""
    if model.remote:
        return
    if limits.max_queries is not None:
        raise UsageError(
            f"max_queries is {limits.max_queries}, which limits the rows sent to a server, and this model is not "
            "behind a server; a threat such as linf:8/255,queries=1000 limits the queries of each attack on each "
            "example"
        )
    if limits.keep_answers:
        raise UsageError(
            "keep_answers keeps the answers of a server, and this model is not behind a server",
            model_argument("keep_answers"),
        )


def unit_of(settings: Opening) -> str:
    """Return the unit of the eps of the threat model, or an empty string."""
    return settings.threat.unit if isinstance(settings, groups.ThreatSource) else ""


def open_subject(
    settings: Opening, *, transform: str | None = None, adaptive: bool = False
) -> DescribedModel:
    """Open the model under test. If `transform` is given, random transformations are applied to its inputs."""
    properties = declared(settings)
    if settings.model is None:
        raise UsageError("model is missing; give an address, as in mnist-cnn or file.py:factory")
    if isinstance(settings.model, str):
        if settings.model.startswith((ENSEMBLE, MIXED)):
            from holdfast.verbs.opening.models import open_members  # late: few models consist of others

            opened = open_members(settings.model, settings, properties, open_other)
        else:
            opened = _opened(settings, properties, adaptive=adaptive)
        card = {"name": opened.name, "how": opened.how, "digest": opened.digest, "files": dict(opened.files)}
        card |= opened.architecture
        model, notes = opened.model, opened.notes
    else:
        model, card, notes = _wrapped(settings.model, properties)
    refuse_unserved(composed(groups.ServerLimits, settings), model)
    notes += _scaled(model, settings)
    model, transformed, more = _transformed(model, transform)
    relative = isinstance(settings, groups.ThreatSource) and settings.threat.change.domain is SIGNAL
    subject = _subject(model, card | transformed, (*notes, *more), properties, relative=relative)
    guard = group_of(settings, groups.InferenceSource).guard
    if guard is None:
        return subject
    from holdfast.verbs.opening.guard import guarded_subject

    return guarded_subject(subject, guard)


def _opened(settings: Opening, properties: Declared, *, adaptive: bool) -> OpenedModel:
    """Open the model at the address of the settings. A file whose inputs have any shape gets that of the clips, or the
    same with an axis for one channel.
    """
    address = settings.model
    assert isinstance(address, str)
    at = partial(open_model_at, address, settings, remote=remote(settings), adaptive=adaptive)
    try:
        return at(properties)
    except FreeSizes:
        if settings.data is None or not is_of_clips(settings):
            raise
        clips = open_expected(
            settings, expected_without_model(settings, settings), groups.ExampleSelection(n=1)
        )
        shape = tuple(clips.read(0, 1).x.shape[1:])
        for each in (shape, (1, *shape)):
            with suppress(UsageError):  # another number of axes
                return at(replace(properties, input_shape=each))
        raise


def _scaled(model: Classifier, settings: Opening) -> tuple[str, ...]:
    """Set the bounds and the units of a model if they are declared for each feature. Return a note for the report.

    The data are read once more if the features have names, or if their standard deviations are the units.
    """
    of_all = bounds_of_all(settings)
    unit = unit_of(settings)
    if of_all is not None and not unit:
        return ()
    exact = model.access != "gradients"
    by_data = unit == "range" and "bounds" not in settings.model_fields_set
    found = _range_of_data(settings, model) if by_data else None
    if found is not None:
        low, high = found
        units = Units(low, high, tuple(b - a for a, b in zip(low, high, strict=True)), exact, unit)
    elif of_all is not None and unit == "range":
        lowest, highest = ends(of_all)
        units = Units((lowest,), (highest,), (highest - lowest,), exact, unit)
    else:
        raw = _values_of(settings, model.feature_names)
        assert raw is not None
        features = _feature_names(model, raw)
        low, high = bounds_by_feature(settings, features)
        if not unit:
            model.bounds = Bounds(torch.tensor(low), torch.tensor(high))
            return ()
        sizes = sizes_by_feature(unit, features, (low, high), raw)
        if unit == "std":  # a feature without deviations keeps its only value
            low, high = constant_where_still(features, (low, high), sizes, raw)
        units = Units(low, high, sizes, exact, unit)
    units.apply(model)
    still = sum(size == 0 for size in units.size)
    fixed = f"; {amount(still, 'features')} with a unit of 0 cannot change" if still else ""
    if found is not None:
        fixed = (
            f", and the range of each is that of all rows of the data, because no bounds were given{fixed}"
        )
    return (f"eps is measured in a unit of each feature, unit={unit}{fixed}",)


def _range_of_data(
    settings: Opening, model: Classifier
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the smallest and the largest value of each feature in all rows of a table, in the order of the model's
    inputs, or None if all values are inside the bounds of the model.
    """
    raw = _values_of(settings, model.feature_names, groups.ExampleSelection(), table_only=False)
    if raw is None:
        return None
    named = raw.features or ()
    order = [named.index(name) for name in _feature_names(model, raw)] if named else slice(None)
    low, high = (side(raw.x, axis=0)[order] for side in (np.nanmin, np.nanmax))
    # fixed features have values of any size
    inside = model.fixed is None and bool(
        (low >= float(model.bounds.low)).all() and (high <= float(model.bounds.high)).all()
    )
    return None if inside else (tuple(low.tolist()), tuple(high.tolist()))


def _feature_names(model: Classifier, values: Arrays) -> tuple[str, ...]:
    """Return the names of the features in the order of the model's inputs; their positions if there are no names."""
    fitted, present = model.feature_names, values.features
    if fitted is not None and len(fitted) == values.x.shape[1] and {*fitted} == {*(present or fitted)}:
        return fitted
    return present or tuple(map(str, range(values.x.shape[1])))


def _values_of(
    settings: Opening,
    fitted: tuple[str, ...] | None,
    selection: groups.ExampleSelection | None = None,
    *,
    table_only: bool = True,
) -> Arrays | None:
    """Return the values of the examples as they are stored, without regard to the model, except that columns without
    names get the `fitted` ones. `selection` replaces that of the settings.

    Without `table_only`, the result is None for other inputs than rows of a table. Otherwise raises `UsageError` for
    them, because only features of a table have bounds and units of their own.
    """
    any_value = Bounds(torch.tensor(-torch.inf), torch.tensor(torch.inf))
    properties = DeclaredData(
        any_value,
        feature_names=fitted,
        lenient=True,
        normalised=normalisation(settings),
        accepts_missing=True,
        groups=group_column(settings),
        needs_groups=False,
    )
    raw = open_expected(settings, properties, selection)
    arrays = (
        raw.whole.taken(raw.rows) if isinstance(raw, Selection) and isinstance(raw.whole, Arrays) else raw
    )
    if not isinstance(arrays, Arrays) or arrays.x.ndim != 2:
        if not table_only:
            return None
        raise UsageError(
            "bounds or units of each feature were given, and the inputs are not rows of features (n, features); give "
            "two numbers as bounds, and an eps without unit="
        )
    return arrays


def _wrapped(net: object, properties: Declared) -> tuple[Classifier, dict[str, Any], tuple[str, ...]]:
    """Return a model given as an object, its card and notes.

    It is identified by its weights, its code and the objects that it refers to.
    """
    differs = isinstance(net, nn.Module) and not properties.is_called_with_lists
    model = properties.wrap(differentiable(net) if differs else net)  # type: ignore[arg-type]
    of_lists = properties.is_called_with_lists and not isinstance(model.net, Estimator)
    name, identity, notes = object_identity(net if of_lists else model.net)
    return model, {"name": name, "how": "python", "digest": digest(canonical(identity))}, notes


def _transformed(
    model: Classifier, transform: str | None
) -> tuple[Classifier, dict[str, Any], tuple[str, ...]]:
    """Return the model behind the named random transformations, with entries for its card and notes."""
    if transform is None:
        return model, {}, ()
    limits = parse_transform(transform)
    note = f"every input is transformed at random before the model: {transform_meaning(limits)}"
    through = heard_through if HEARD.issuperset(limits) else seen_through
    return through(model, limits), {"seen_through": limits}, (note,)


def _subject(
    model: Classifier,
    card: Mapping[str, Any],
    notes: tuple[str, ...],
    declared: Declared | None = None,
    *,
    relative: bool = False,
) -> DescribedModel:
    """The subject of a model. With `relative`, eps is relative to each input, and in none of its units."""
    properties = strict(
        {
            "bounds": [model.bounds.low, model.bounds.high],
            **({} if model.units is None else {"units": model.units}),
            "mean": model.mean,
            "std": model.std,
            "classes": model.classes,
            "access": model.access,
            **({} if model.output is None else {"output": model.output}),
            **({} if model.layout is None else {"layout": model.layout}),
            **({} if model.input_name is None else {"input_name": model.input_name}),
            **({} if model.task is None else {"task": model.task.card()}),
            **({} if declared is None or not declared.constants else {"constants": dict(declared.constants)}),
        }
    )
    identity = digest(canonical([card["digest"], properties, card.get("seen_through")]))
    shown_properties = {**properties, "bounds": list(ends(model.attacked_bounds))}
    parameters = sum(weight.numel() for weight in model.parameters())
    normalised = None if declared is None else declared.normalised
    if normalised is not None:
        shown_properties["data_normalised"] = str(normalised)
    if model.units is not None:  # of the values, with which a hardened model is opened again
        mean, std = model.units.normalisation_of_values(model)
        shown_properties |= strict({"bounds": ends(model.units.values), "mean": mean, "std": std})
    has_eps = not relative and (
        declared is None or not (declared.is_called_with_lists or declared.rules is not None)
    )
    units = units_of_eps(model, normalised) if has_eps else ()
    return DescribedModel(
        model, identity, {**card, "parameters": parameters, **shown_properties}, (*notes, *units)
    )


def open_surrogates(settings: Measuring, target: Classifier) -> tuple[DescribedModel, ...]:
    """Open the surrogate models, which are given as settings or as objects."""
    subjects = []
    for surrogate in settings.surrogates:
        subjects.append(open_other(surrogate, settings, "surrogate"))
        refuse_other_bounds(subjects[-1], target)
    return tuple(subjects)


def open_other(other: object, settings: Opening, role: str) -> DescribedModel:
    """Open a further model of a run, which is given as settings or as an object. `role` names it in errors."""
    if isinstance(other, ModelReference):
        refuse_other_settings(other, f"a {role}", "arch", "model_args", "trust_code")
    if isinstance(other, ModelReference) and isinstance(other.model, str):
        spec = SurrogateSettings(model=other.model, arch=other.arch, model_args=other.model_args)
        return subject_at(spec, settings, trust_code=other.trust_code, role=role)
    if isinstance(other, SurrogateSettings):
        return subject_at(other, settings, trust_code=settings.trust_code, role=role)
    net = other.model if isinstance(other, ModelReference) else other
    refuse_no_model(net, f"a {role}")
    # its preprocessing is its own, or undoes that of the data
    properties = Declared(normalised=normalisation(settings))
    return _subject(*_wrapped(net, properties), properties)


def refuse_other_bounds(subject: DescribedModel, target: Classifier, role: str = "surrogate") -> None:
    """Give another model the units of the model `target`, and raise `UsageError` if it takes inputs from another
    range.
    """
    if target.units is not None:
        target.units.apply(subject.model)
    bounds, target_ends = (ends(model.bounds) for model in (subject.model, target))
    if bounds not in (target_ends, ends(Bounds())):
        raise UsageError(
            f"the {role} {subject.card['name']} takes inputs from {bounds[0]:g} to {bounds[1]:g}, the model from "
            f"{target_ends[0]:g} to {target_ends[1]:g}; wrap it in a factory that rescales them"
        )


def open_named(text: str, settings: Opening, role: str) -> DescribedModel:
    """Open another model than the one under test, such as a teacher, from text such as
    `weights.pt,arch=net.py:build`, which has the grammar of a surrogate. `role` names it in errors.
    """
    spec = SurrogateSettings.model_validate(parse_surrogate(text, role))
    return subject_at(spec, settings, trust_code=settings.trust_code, role=role)


def refuse_other_classes(subject: DescribedModel, classes: int, x: Inputs, role: str) -> None:
    """Raise `UsageError` if another model cannot be called with the inputs `x`, or returns another number of
    classes.
    """
    name = f"the {role} {subject.card['name']}"
    try:
        with torch.no_grad():
            found = deepcopy(subject.model).to(x.device).eval()(x).shape[1]
    except (TargetError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{name} fails on inputs of shape {tuple(x.shape[1:])}, which the model takes: {first_line}; give a model "
            "with the same inputs"
        ) from error
    if found != classes:
        raise UsageError(
            f"{name} has {found} classes, but the model has {classes}; give a model with the same classes"
        )


_NEEDS_WEIGHTS = {
    "surrogate": "transfer examples are computed from gradients",
    "suspect": "its margins on thousands of examples are compared",
    "teacher": "its answers are needed in every update of the training",
    "features": "the outputs of its layers are needed",
}
"""why another model cannot be behind a server, by its role"""


def subject_at(
    spec: SurrogateSettings, settings: Opening, *, trust_code: bool, role: str = "surrogate"
) -> DescribedModel:
    """Open a surrogate or another model that is needed beside the model under test, at an address."""
    if spec.model.partition(":")[0] in SCHEMES:
        reason = _NEEDS_WEIGHTS.get(role, "attacks on it are computed from gradients")
        raise UsageError(f"the {role} {spec.model} is behind a server, and {reason}; give its weights")
    opened = open_model(
        spec.model,
        arch=spec.arch,
        model_args=spec.model_args,
        declared=Declared(mean=spec.mean, std=spec.std, normalised=normalisation(settings)),
        trust_code=trust_code,
    )
    card = {"name": opened.name, "how": opened.how, "digest": opened.digest}
    notes = opened.notes
    if spec.skip is not None:
        share = DECAY if spec.decay is None else spec.decay
        net = skipped(opened.model.net, spec.skip, decay=share)
        opened.model.net = net
        card["digest"] = digest(canonical([opened.digest, spec.skip, share]))
        notes += (
            f"{share:g} of the gradient passes back through {spec.skip}, {len(net.branches)} of its modules",
        )
    return _subject(opened.model, card, notes)


def open_examples(
    settings: Opening,
    model: Classifier,
    *,
    selection: groups.ExampleSelection | None = None,
    lenient: bool = False,
    first: Data | None = None,
) -> Data:
    """Open the examples on which the model is evaluated, or another `selection` of the data. With `lenient`, examples
    that do not fit the model are accepted as well. The columns of a table are matched with those of the data `first`.
    """
    data = open_expected(settings, expected(settings, model, lenient=lenient, first=first), selection)
    refuse_other_rate(model, data)
    data = without_silence(data, settings)
    chosen = selection or group_of(settings, groups.ExampleSelection)
    return with_groups(data, settings, whole=not chosen.selects)


def with_groups(
    data: Data, settings: Opening, *, whole: bool, positions: NDArray[np.int64] | None = None
) -> Data:
    """Return the data set with the groups of the settings, or unchanged without such a setting.

    `whole` is True if all examples of the source are in the data set. `positions` are those of the examples in the
    source; None if the data set has them.
    """
    given = group_of(settings, groups.ExampleGroups).groups
    if given is None:
        return data
    from holdfast.io.data.labels import Groups  # only for data with groups

    if isinstance(given, str):
        return grouped_by_label(data) if given == BY_LABEL else grouped(data, None, whole=whole)
    is_series = hasattr(given, "isna") and given.ndim == 1
    values = np.array(text_of(given)) if is_series else as_array(given, "groups")
    return grouped(data, Groups.of_values(values), whole=whole, positions=positions)


def open_source(settings: Opening, source: groups.DataSource, properties: DeclaredData) -> Data:
    """Open the data of a command, if `source` are its settings, or all examples of other data beside them."""
    if isinstance(source, Opening):
        return open_expected(source, properties)
    return open_beside(settings, source, properties)


def open_beside(settings: Opening, source: groups.DataSource, properties: DeclaredData) -> Data:
    """Open all examples of other data than those of the settings, such as training examples that are compared. `n` and
    `sample` do not select from them.
    """
    return open_expected(composed(type(settings), settings, source), properties, groups.ExampleSelection())


def selection_or(settings: Opening, usual: groups.ExampleSelection) -> groups.ExampleSelection:
    """Return the selection of the settings, or the `usual` one if they do not select any examples."""
    given = group_of(settings, groups.ExampleSelection)
    return given if given.selects else usual


def random_instead(settings: groups.ExampleSelection) -> tuple[Remedy, ...]:
    """Return the remedy for a single class among the first examples, as in a file that is sorted by class: random ones.
    There is none if the settings do not select the first examples.
    """
    if settings.n is None:
        return ()
    return (Remedy("sample", settings.n, also=(Remedy("n", option="-n"),)),)


def open_expected(
    settings: Opening, properties: DeclaredData, selection: groups.ExampleSelection | None = None
) -> Data:
    """Open the examples of the data with these declared properties."""
    if settings.data is None:
        raise UsageError("data is missing; give an address, as in mnist-mini or images.npz")
    selection = selection or group_of(settings, groups.ExampleSelection)
    chosen: dict[str, Any] = {"n": selection.n, "sample": selection.sample, "seed": settings.seed}
    if isinstance(settings.data, str):
        return open_data(
            settings.data, split=settings.split, **names(settings), **chosen, expected=properties
        )
    if is_frame(settings.data):
        examples: Data = _frame(settings, properties, **chosen)
    else:
        all_examples = as_data(
            settings.data,
            expected=properties,
            n=selection.n if selection.sample is None else None,
            entries=(settings.x, settings.y),
        )
        if isinstance(all_examples, Arrays):
            all_examples = with_rate(all_examples, settings.sampling_rate)
        examples = selected(all_examples, **chosen)
    return noting_fewer(examples, selection.n or selection.sample)


def _frame(source: groups.DataSource, properties: DeclaredData, **chosen: Any) -> Data:
    return open_frame(
        source.data,
        label=source.label,
        drop=source.drop,
        choice=Choice(source.split, **chosen),
        expected=properties,
    )


def open_object(source: groups.DataSource, expected: DeclaredData) -> Data:
    """Return all examples of additional data that are given as a Python object, such as a pair of arrays or a data
    frame.
    """
    if is_frame(source.data):
        return _frame(source, expected)
    return as_data(source.data, expected=expected, entries=(source.x, source.y))


def open_seeded(settings: Opening) -> DescribedModel:
    """Open the model under test. A factory initialises its weights from the seed, so that it returns the same network
    in each process.
    """
    with drawing(Draws(settings.seed).at("model")):
        return open_subject(settings)


def open_train_split(
    settings: Opening,
    model: Classifier,
    first: Data | None = None,
    *,
    selection: groups.ExampleSelection | None = None,
) -> Data | None:
    """Open the train split of the data, or return None if there is none or the settings choose a split. The columns of
    a table are matched with those of the data `first`. `selection` replaces that of the settings.
    """
    if isinstance(settings.data, str) and settings.split is None:
        with suppress(NoSplit):  # the file has only one split
            split = settings.model_copy(update={"split": "train"})
            return open_expected(split, expected(settings, model, first=first), selection)
    return None


def open_training_examples(settings: Opening, model: Classifier) -> tuple[Data, tuple[str, ...]]:
    """Open the train split of the data if there is one, and all examples otherwise. A split of the settings takes
    precedence. Return notes for the report on the split and the examples as well.
    """
    train = open_train_split(settings, model)
    data = open_expected(settings, expected(settings, model)) if train is None else train
    split = settings.split if train is None else "train"
    notes = notes_of(data)
    if split is not None:
        notes += (f"{data.name}: {len(data):,} examples of the split {split} are audited",)
    whole = not group_of(settings, groups.ExampleSelection).selects
    return with_groups(data, settings, whole=whole), notes


def open_all(settings: Assess | Certify) -> Opened:
    """Open the model, the examples and the surrogates of an assessment. The members of an ensemble are further
    surrogates of an attacker who has the model.
    """
    subject = open_subject(settings, transform=settings.transform, adaptive=settings.adaptive)
    surrogates = open_surrogates(settings, subject.model)
    # examples are computed on single members by gradients within a ball
    by_gradients = settings.threat.access == "gradients" and settings.threat.constraint.is_ball
    if isinstance(settings, Assess) and settings.members and by_gradients:
        from holdfast.verbs.opening.models import members_as_surrogates  # the same

        surrogates = (*surrogates, *members_as_surrogates(subject))
    data = open_examples(settings, subject.model)
    subject = with_found_properties(subject, surrogates, data)
    edits = edits_of(settings)
    if edits is not None and len(data):
        from holdfast.io.models.transformers_folders import truncation_notes, unknown_notes

        notes = (*truncation_notes(subject.model, data), *unknown_notes(subject.model, data, edits))
        subject = replace(subject, notes=(*subject.notes, *notes))
    return subject, data, surrogates


def open_fit(settings: Measuring, model: Classifier, plan: Plan, first: Data) -> Data | None:
    """Open the examples on which learned attacks are fitted: those in `fit` or, if `fit` is None, the train split of
    the data. The columns of a table are matched with those of the data `first`.

    Returns None if no attack is learned and `fit` is None.
    """
    count, fit = examples_to_fit(plan), settings.fit
    if fit is None and not (count and isinstance(settings.data, str)):
        return None
    source: groups.DataSource = settings if fit is None else beside(settings, fit)
    properties, address = expected(settings, model, source, first=first), address_of(source.data)
    if address is None:
        return selected(open_object(source, properties), n=None, sample=count or 1, seed=settings.seed)
    is_same_data = address == settings.data
    split = None if fit is None else source.split
    if is_same_data and split in (None, "train") and settings.split == "train":
        raise UsageError(
            f"attacks are fitted on the train split of {address!r}, which is also evaluated", OTHER_EXAMPLES
        )
    open_split = partial(
        open_data, address, **names(source), sample=count or 1, seed=settings.seed, expected=properties
    )
    try:
        return open_split(split=split or "train")
    except (UsageError, TargetError) as error:
        if split is not None:
            raise
        if not is_same_data:  # data that were given for the fit are used as a whole if they have no split
            return open_split()
        raise UsageError(
            f"{address!r} has no train split to fit attacks on ({error.message})", OTHER_EXAMPLES
        ) from error


def open_others(settings: Assess | Certify, model: Classifier, first: Data) -> tuple[Data, ...]:
    """Open the data sets between which perturbations are transferred. Their labels are not used, so they may have other
    classes than the model. The columns of tables are matched with those of the data `first`.

    From data at an address, a random sample is opened, because no more examples are used.
    """
    opened: list[Data] = []
    for data in settings.across:
        source = beside(settings, data)
        properties = unlabelled(settings, model, source, first)
        if not isinstance(source.data, str):
            opened.append(open_object(source, properties))
        else:
            opened.append(
                open_data(
                    source.data,
                    split=source.split,
                    **names(source),
                    sample=MATRIX_ROWS,
                    seed=settings.seed,
                    expected=properties,
                )
            )
    return tuple(opened)


def device_of_model(settings: Measuring, subject: DescribedModel) -> str:
    """Return the name of the torch device of a run: that of the weights of a network that is given as an object, unless
    the setting `device` determines another one.
    """
    weight = next(subject.model.parameters(), None)
    if isinstance(settings.model, str) or settings.device != "auto" or weight is None:
        return device_of(settings.device)
    if weight.device.type not in SUPPORTED_DEVICES:
        raise UsageError(
            f"the network is on the device {weight.device}, and one of {', '.join(SUPPORTED_DEVICES)} was expected; "
            "move it before you pass it, as in net.to('cpu')"
        )
    return str(weight.device)


def folder_of(run: str | Path | None, *, resume: bool) -> Path | None:
    """Return the path of a run folder, or None if none is given. Raises `UsageError` if a run is to be resumed and no
    folder is given.
    """
    if resume and run is None:
        raise UsageError("resume=True continues a run; give its folder, as in run='runs/h1'")
    return None if run is None else Path(run)


def free_folder_of(run: str | Path | None, *, resume: bool) -> Path | None:
    """Return the path of a run folder as `folder_of` does. Raises `UsageError`, before anything is opened, if a run
    cannot begin or be resumed there.
    """
    place = folder_of(run, resume=resume)
    if place is not None:
        refuse_used(place, resume=resume)
    return place
