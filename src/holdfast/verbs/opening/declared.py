"""Converts settings to declared properties of the model and the data, such as bounds and classes, and determines
properties that are not declared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from holdfast.attacks.parts.images import inner
from holdfast.attacks.parts.sounds import OverTheAir
from holdfast.core.batch import BY_LABEL, Data
from holdfast.core.catalogue import SMOOTHING
from holdfast.core.errors import Remedy, UsageError, data_argument
from holdfast.core.meter import PIECE
from holdfast.core.model import Bounds, Classifier, Normalisation, evaluating, fitted
from holdfast.core.names import MAP, TaskName, did_you_mean
from holdfast.core.tasks import Task
from holdfast.core.threat import ThreatModel
from holdfast.io.data.arrays import Arrays
from holdfast.io.data.clips import SIGNAL_BOUNDS, SUFFIXES, suffix_of_files
from holdfast.io.data.data import Names, Selection, selected
from holdfast.io.data.layouts import DeclaredData, FirstTable, Ranges
from holdfast.io.data.shown_tasks import labels_of_boxes, shown_task
from holdfast.io.doctor.behaviour import unlike_a_logit
from holdfast.io.models.models import BUNDLED_TASKS, Declared
from holdfast.io.models.transformers_folders import ProcessedClips
from holdfast.io.remote.probing import ProbedClassifier, settle_gradients, settle_output, settle_predictions
from holdfast.runs.assess.request import DescribedModel
from holdfast.settings.groups import (
    DataSource,
    ExampleGroups,
    InferenceSource,
    InputSpace,
    SensitiveColumn,
    TaskOfModel,
    ThreatSource,
)
from holdfast.settings.values import InputKind, numbers_by_feature, parse_tolerance
from holdfast.threats.domains import BYTES, SIGNAL, TABLE, TEXT, Domain
from holdfast.threats.parsing import threat_of
from holdfast.threats.signals import sound_of
from holdfast.threats.transformations import OF_OBJECTS
from holdfast.verbs.checked_settings import composed, group_of
from holdfast.verbs.settings import Assess, Certify, Doctor, Opening

if TYPE_CHECKING:
    from holdfast.threats.byte_changes import ByteChanges
    from holdfast.threats.tables import Table
    from holdfast.threats.text_edits import TextEdits

T = TypeVar("T", bound=Assess | Certify)
_LISTED = 20  # classes in an error message
_RANGE_EXAMPLES = 1000
"""number of examples whose range of values is compared"""


def declared(settings: Opening) -> Declared:
    """Return the properties of the model's input and output that the settings declare. Input bounds are included only
    if the user gave them.
    """
    texts, files, table = edits_of(settings) is not None, changes_of(settings) is not None, table_of(settings)
    if texts or files or table is not None:
        inputs = "texts" if texts else "files" if files else "rows of a table, whose rules state their limits"
        _refuse_numeric(settings, inputs)
    return Declared(
        bounds_of_all(settings)
        if "bounds" in settings.model_fields_set
        else (SIGNAL_BOUNDS if is_of_clips(settings) else None),
        settings.mean,
        settings.std,
        settings.classes,
        settings.model_output,
        class_names=settings.class_names,
        normalised=normalisation(settings),
        input_shape=group_of(settings, InferenceSource).input_shape,
        constants=group_of(settings, InferenceSource).constants,
        input_name=None if texts else settings.x,
        texts=texts,
        files=files,
        rules=None if table is None else table.rules,
        task=task_of_settings(settings),
    )


def task_of_settings(settings: Opening) -> Task | None:
    """Return what the model returns, as declared or as the data show, if it is not one score for each class.

    Raises `UsageError` for an objective of attacks, or a place of a patch, of another task.
    """
    if not isinstance(settings, TaskOfModel):
        return None
    name: TaskName | None = settings.task
    if name is None and settings.tolerance is not None:
        name = "regression"
    if name is None and isinstance(settings.model, str):
        name = BUNDLED_TASKS.get(settings.model)
    name = name or shown_task(settings.data, x=settings.x, y=settings.y, split=settings.split)
    threat = settings.threat
    of_masks = threat.objective.startswith(MAP)
    if threat.objective and name != ("segmentation" if of_masks else "detection"):
        of = "masks" if of_masks else "a detector"
        raise UsageError(
            f"the goal {threat.objective} is of an attack on {of}, and the task is {name or 'classes'}; leave the goal "
            "out"
        )
    if threat.constraint.limits.get("at") in OF_OBJECTS and name != "detection":
        raise UsageError(
            f"the threat {threat} is on images with boxes of objects, and the task is {name or 'classes'}; give "
            "another place, as in at=centre"
        )
    if name in (None, "classes"):
        return None
    refuse_other_goals(threat, name)
    from holdfast.tasks.catalogue import task_of  # late: most models are of classes

    if name == "regression":
        assert settings.tolerance is not None
        size, relative = parse_tolerance(settings.tolerance)
        return task_of({"name": name, "tolerance": size, "relative": relative})
    if name == "detection":
        labels = labels_of_boxes(settings.data, x=settings.x, y=settings.y)
        return task_of({"name": name, "ids": labels, "objective": threat.objective})
    fields = {"name": name, "output": settings.model_output}
    return task_of({**fields, "aim": int(threat.objective.removeprefix(MAP))} if of_masks else fields)


def refuse_other_goals(threat: ThreatModel, task: TaskName) -> None:
    """Raise `UsageError` for a target class of a model with another task than classes, and for a threat that moves the
    objects of images away from their masks and boxes.
    """
    if threat.goal is not None or threat.goal_name:
        raise UsageError(
            f"the goal targeted:{threat.goal if threat.goal_name == '' else threat.goal_name} is for models of "
            f"classes, and the task is {task}; leave the goal out"
        )
    if threat.name == "spatial" and task in ("segmentation", "detection"):
        raise UsageError(
            f"the threat {threat} moves the objects of an image, and its masks or boxes stay where they are",
            Remedy("threat", "colour:hue=18,saturation=0.3"),
        )


def is_of_clips(settings: Opening) -> bool:
    """Return whether the inputs are clips: their sampling rate is declared, the threat is on clips, or the data are a
    folder of clips.
    """
    rate = settings.sampling_rate or getattr(
        settings.data, "sampling_rate", None
    )  # the latter of opened data
    if rate is not None or _constraint_on(SIGNAL, settings) is not None:
        return True
    if changes_of(settings) is not None:
        return False
    folder = Path(settings.data) if isinstance(settings.data, str) else None
    return folder is not None and folder.is_dir() and suffix_of_files(folder) in SUFFIXES


def opened_threat(settings: Any) -> ThreatModel:
    """Return the threat model of a command with its files read, on clips if the inputs are clips."""
    threat: ThreatModel = settings.threat.opened()
    if not is_of_clips(settings):
        return threat
    from holdfast.threats.signals import on_clips  # late: few inputs are clips

    return replace(threat, constraint=on_clips(threat.constraint))


def without_silence(data: Data, settings: Opening) -> Data:
    """Return the data set without the clips that have no sound, if the threat model is relative to the loudness of each
    clip, with a note on their number. Raises `UsageError` if no clip has a sound.
    """
    constraint = _constraint_on(SIGNAL, settings)
    if constraint is None:
        return data
    pieces = (
        (start, data.read(start, min(start + PIECE, len(data))).x) for start in range(0, len(data), PIECE)
    )
    rows = [start + row for start, x in pieces for row in (x != 0).flatten(1).any(1).nonzero()[:, 0].tolist()]
    if len(rows) == len(data):
        return data
    n, undefined = len(data) - len(rows), f"so that {constraint} is undefined"
    if not rows:
        raise UsageError(f"{data.name}: no clip has a sound, {undefined}; give clips with sound")
    silent = f"{n:,} of {len(data):,} clips {'is' if n == 1 else 'are'} silent, {undefined}"
    return Selection(
        data, tuple(rows), own_notes=(f"{silent}, and {'it is' if n == 1 else 'they are'} excluded",)
    )


def note_on_padding(settings: Certify, data: Data) -> tuple[str, ...]:
    """Return a note on a certification of clips of different lengths whose method does not keep to the padding."""
    if settings.method not in (SMOOTHING, "lipschitz") or not is_of_clips(settings):
        return ()
    pieces = (data.read(start, min(start + PIECE, len(data))).x for start in range(0, len(data), PIECE))
    padded = sum(int((~sound_of(x)).flatten(1).any(1).sum()) for x in pieces)
    if not padded:
        return ()
    method = "smoothing" if settings.method == SMOOTHING else "Lipschitz constants"
    note = (
        f"{padded:,} of {len(data):,} clips are padded with zeros, and certificates by {method} also cover changes of "
        "the padding, which the threat excludes, so that the radii may be smaller than those of the sound alone"
    )
    return (note,)


def refuse_other_rate(model: Classifier, data: Data) -> None:
    """Raise `UsageError` for data with another sampling rate than the one that a folder of transformers states."""
    net, rate = inner(model).net, getattr(data, "sampling_rate", None)
    if isinstance(net, ProcessedClips) and rate != net.sampling_rate:
        found = "is unknown" if rate is None else f"is {rate:,} Hz"
        raise UsageError(
            f"the sampling rate of {data.name} {found}, and the feature extractor of the model takes "
            f"{net.sampling_rate:,} Hz",
            data_argument(
                "sampling_rate",
                net.sampling_rate,
                reason="to resample files, or to declare the rate of arrays",
            ),
        )


def edits_of(settings: Opening) -> "TextEdits | None":
    """Return the constraint on texts if the threat model is on texts, else None."""
    edits: TextEdits | None = _constraint_on(TEXT, settings)
    return edits


def changes_of(settings: Opening) -> "ByteChanges | None":
    """Return the constraint on files if the threat model is on files, else None."""
    changes: ByteChanges | None = _constraint_on(BYTES, settings)
    return changes


def table_of(settings: Opening) -> "Table | None":
    """Return the constraint on rows of a table if the threat model has rules, else None."""
    table: Table | None = _constraint_on(TABLE, settings)
    return table


def opening_of_symbols(kind: InputKind, settings: Opening) -> Doctor:
    """Return the settings with which a model of files or of texts, and its data, are opened by a command without a
    threat. A threat of any size states the kind.
    """
    threat = threat_of("bytes:change=1" if kind == "files" else "text:edits=1,words=1")
    return composed(Doctor, settings, ThreatSource.model_construct({"threat"}, threat=threat))


def _constraint_on(domain: Domain, settings: Opening) -> Any:
    """Return the constraint of the threat model if it changes inputs of this domain, else None."""
    threat = settings.threat if isinstance(settings, ThreatSource) else None
    return threat.constraint if threat is not None and threat.change.domain is domain else None


def _refuse_numeric(settings: Opening, inputs: str) -> None:
    """Raise `UsageError` for settings of inputs that are numbers without rules."""
    for name in ("bounds", "mean", "std", "data_normalised", "layout", "input_shape", "transform", "guard"):
        if name in settings.model_fields_set and getattr(settings, name) is not None:
            raise UsageError(
                f"{name} is for inputs that are numbers, and the inputs are {inputs}", Remedy(name)
            )


def bounds_of_all(inputs: InputSpace) -> Bounds | None:
    """Return the declared bounds if they are the same for all features, else None."""
    if isinstance(inputs.bounds, Mapping):
        return None
    low, high = inputs.bounds
    return Bounds(low, high) if isinstance(low, float) and isinstance(high, float) else None


def range_of_all(inputs: InputSpace, what: str) -> Bounds:
    """Return the declared bounds of all features. Raises `UsageError` if they were declared for each feature, which
    `what` does not support.
    """
    bounds = bounds_of_all(inputs)
    if bounds is not None:
        return bounds
    sides = inputs.bounds.values() if isinstance(inputs.bounds, Mapping) else zip(*inputs.bounds, strict=True)
    lowest, highest = zip(*sides, strict=True)
    raise UsageError(
        f"bounds were given for each feature, and {what} has one range for all",
        Remedy("bounds", (f"{min(lowest):g}", f"{max(highest):g}")),
    )


def bounds_by_feature(
    inputs: InputSpace, features: Sequence[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lowest and the highest valid value of each feature. Raises `UsageError` if one is not declared."""
    if not isinstance(inputs.bounds, Mapping):
        low, high = (
            side if isinstance(side, tuple) else (float(side),) * len(features) for side in inputs.bounds
        )
        if len(low) != len(features):
            raise UsageError(f"bounds are of {len(low)} features, and the data have {len(features)}")
        return low, high
    sides = [_of_feature(inputs.bounds, features, place, "bounds") for place in range(len(features))]
    return tuple(low for low, _ in sides), tuple(high for _, high in sides)


def sizes_by_feature(
    unit: str, features: Sequence[str], bounds: tuple[Sequence[float], Sequence[float]], values: Arrays
) -> tuple[float, ...]:
    """Return the size of the unit of each feature: the range of its bounds, the standard deviation of its values in the
    examples, or the number in a file.
    """
    if unit == "range":
        return tuple(high - low for low, high in zip(*bounds, strict=True))
    if unit == "std":
        names = values.features or features
        columns = dict(zip(names, values.read(0, len(values)).x.double().T, strict=True))
        present = (columns[name][~columns[name].isnan()] for name in features)
        return tuple(float(column.std(correction=0)) if len(column) else 0.0 for column in present)
    sizes = numbers_by_feature(unit.removeprefix("@"), "unit")
    return tuple(_size_of(sizes, features, place) for place in range(len(features)))


def constant_where_still(
    features: Sequence[str],
    bounds: tuple[Sequence[float], Sequence[float]],
    sizes: Sequence[float],
    values: Arrays,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the bounds with both of a feature at its only value if its standard deviation is 0."""
    names = values.features or features
    first = dict(zip(names, values.read(0, 1).x[0].tolist(), strict=True))
    still = [size == 0 and not math.isnan(first[name]) for name, size in zip(features, sizes, strict=True)]
    low, high = (
        tuple(first[name] if fixed else end for name, fixed, end in zip(features, still, side, strict=True))
        for side in bounds
    )
    return low, high


def _size_of(sizes: Mapping[str, Any], features: Sequence[str], place: int) -> float:
    size = _of_feature(sizes, features, place, "unit")
    if not isinstance(size, int | float) or not 0 < size < float("inf"):
        raise UsageError(
            f"the unit of {features[place]} is {size!r}; give a number above 0. A feature that does not change has "
            "equal bounds, if it is constant in the data"
        )
    return float(size)


def _of_feature(content: Mapping[str, Any], features: Sequence[str], place: int, what: str) -> Any:
    """Return the entry of a feature, by its name or its position. Raises `UsageError` if there is none, or one of a
    feature that the data do not have.
    """
    known = {*features, *map(str, range(len(features)))}
    unknown = [name for name in content if name not in known]
    if unknown:
        raise UsageError(f"{what} has the feature {unknown[0]!r}{did_you_mean(unknown[0], features)}")
    for name in (features[place], str(place)):
        if name in content:
            return content[name]
    raise UsageError(
        f"{what} has no entry for {features[place]!r}; give one for each of {len(features)} features"
    )


def names(source: DataSource) -> Names:
    """Return the names of arrays and columns to read from data files, such as that of the label column, and how
    files are read, as given in the settings.
    """
    return {
        "label": source.label,
        "drop": tuple(source.drop),
        "x": source.x,
        "y": source.y,
        "separator": source.separator,
        "header": source.header,
        "follow_links": source.follow_links,
        "sampling_rate": source.sampling_rate,
    }


def normalisation(inputs: InputSpace) -> Normalisation | None:
    """Return the normalisation that was applied to the data before they were stored, as declared in the settings, or
    None if none is declared.
    """
    return None if inputs.data_normalised is None else Normalisation(*inputs.data_normalised)


def expected(
    settings: Opening,
    model: Classifier,
    data: DataSource | None = None,
    *,
    lenient: bool = False,
    first: Data | None = None,
) -> DeclaredData:
    """Return the properties that data must have to fit the model, such as bounds and number of classes, and options for
    reading the data.

    With `lenient`, data that do not fit the model are accepted as well. `first` are the data of the run that were
    opened before, whose columns those of a table are matched with.
    """
    names = settings.class_names or model.class_names
    source, edits, table = data or settings, edits_of(settings), table_of(settings)
    words: tuple[str, ...] | None = () if table is None else tuple(table.rules.categories)
    if edits is not None:
        words = None if source.x is None else (source.x,)
    return DeclaredData(
        model.bounds,
        model.classes,
        None if names is None else tuple(names),
        model.class_labels,
        model.feature_names,
        settings.class_names is not None,
        settings.class_order,
        source.layout,
        normalisation(settings),
        model.units,
        ProbedClassifier(model),
        lenient,
        bits=source.bits,
        first=None if first is None else first_table(first),
        groups=group_column(settings),
        group_setting="sensitive" if isinstance(settings, SensitiveColumn) else "groups",
        needs_groups=data is None,
        words=words,
        has_threat=isinstance(settings, ThreatSource),
        edits=edits,
        changes=changes_of(settings),
        rules=None if table is None else table.rules,
        task=model.task,
    )


def expected_without_model(settings: Opening, source: DataSource, first: Data | None = None) -> DeclaredData:
    """Return the properties that data must have if no model is called with them, whose labels may be missing."""
    return DeclaredData(
        class_names=settings.class_names,
        class_order=settings.class_order,
        layout=source.layout,
        bits=source.bits,
        normalised=normalisation(settings),
        lenient=True,
        needs_labels=False,
        first=None if first is None else first_table(first),
    )


def first_table(data: Data) -> FirstTable:
    """Return the columns of a data set, with which those of another table are matched."""
    arrays = data.whole if isinstance(data, Selection) else data
    if not isinstance(arrays, Arrays):
        return FirstTable(data.name, None, named=False)
    samples = 0 if arrays.sampling_rate is None else arrays.x.shape[-1]
    named = arrays.features is not None and arrays.named
    rate = arrays.sampling_rate
    return FirstTable(data.name, arrays.features, named=named, samples=samples, sampling_rate=rate)


def refuse_other_range(first: Data, second: Data) -> None:
    """Raise `UsageError` if the values of images or signals are in another range than those of the data `first`: twice
    as wide, half as wide, or shifted by a third of it.

    Values of a table have units of their own.
    """
    ranges = []
    for data in (first, second):
        some = selected(data, n=None, sample=_RANGE_EXAMPLES, seed=0)  # a file may be sorted by class
        ranges.append(some.read(0, len(some)).x)
    first_x, x = ranges
    if min(x.dim(), first_x.dim()) > 2:
        Ranges.of(x, first_x).refuse(f"{second.name} has", f"{first.name} has")


def notes_of(*data: Data | None) -> tuple[str, ...]:
    """Return the notes on data sets for the report. A note on several of them is stated once."""
    return tuple(dict.fromkeys(note for each in data for note in getattr(each, "notes", ())))


def group_column(settings: Opening) -> str | None:
    """Return the name of the column or array that states the groups of the examples, or None if there is none,
    as for groups by label.
    """
    sensitive = group_of(settings, SensitiveColumn).sensitive
    if sensitive is not None:
        return sensitive
    given = group_of(settings, ExampleGroups).groups
    return given if isinstance(given, str) and given != BY_LABEL else None


def unlabelled(
    settings: Opening, model: Classifier, data: DataSource, first: Data | None = None
) -> DeclaredData:
    """Return the properties that data must have to fit the model if only their inputs are used and their labels are
    not.
    """
    return replace(
        expected(settings, model, data, first=first),
        classes=None,
        class_names=None,
        class_labels=None,
        checks_labels=False,
    )


def with_found_properties(
    subject: DescribedModel, surrogates: Sequence[DescribedModel], data: Data
) -> DescribedModel:
    """Determine those properties of the model that are not declared, by tests on the data. Return the model under test
    with notes about them.

    The properties are: whether single outputs are logits, and look like logits of the labels, whether the largest score
    of an estimator is that of its class, whether the backward pass of the model works, and the layouts of surrogates.
    Raises `UnclearOutput` if single outputs may be probabilities.
    """
    model = subject.model
    if model.task is not None:
        return replace(subject, notes=(*subject.notes, *_settled_task(model, data)))
    if isinstance(model.net, OverTheAir):
        model.net.suit(getattr(data, "sampling_rate", None))
    declared = inner(model).output is not None
    for examined in (model, *(surrogate.model for surrogate in surrogates)):
        if examined is not model:
            ProbedClassifier(examined).suit(data.read(0, min(2, len(data))).x)
        settle_output(examined, data)
        refuse_other_rate(examined, data)
    notes = (
        *settle_predictions(model, data),
        *(() if declared else unlike_a_logit(model, data)),
        *settle_gradients(model, data),
    )
    card = {**subject.card, "access": model.access} if notes else subject.card
    return replace(subject, card=card, notes=(*subject.notes, *notes))


_TASK_EXAMPLES = 32
"""number of examples whose outputs are compared with the truth before a run"""


def _settled_task(model: Classifier, data: Data) -> tuple[str, ...]:
    """Compare the outputs of a model with another task than classes with the truth of some examples. Return a note on
    the access that the model gives, if it is not that of its kind. Raises `TargetError` if they do not fit.
    """
    assert model.task is not None
    batch = data.read(0, min(_TASK_EXAMPLES, len(data)))
    x = batch.x.to(next(model.parameters(), batch.x).device)
    with torch.no_grad(), evaluating(model), fitted(model, x):
        outputs = model(x).to(batch.x.device)
    model.task.refuse(outputs, batch, data.name)
    return settle_gradients(model, data)


def with_numbered_goal(settings: T, model: Classifier, data: Data, name: str | None = None) -> T:
    """Return the settings with the number of the target class in the threat, if it or `name` states the class by name.

    Raises `UsageError` if there is no class with this name; its message lists classes with their numbers.
    """
    name = name or settings.threat.goal_name
    if not name:
        return settings
    names = settings.class_names or model.class_names or data.classes or ()
    if name not in names:
        listed = ", ".join(f"{k} ({class_name})" for k, class_name in enumerate(names[:_LISTED]))
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = f"expected one of {listed}{more}" if names else "this model has no names for its classes"
        raise UsageError(
            f"goal is {name!r}, which is not the name of a class; {listed}; give the number of a class, as in goal=3"
        )
    threat = replace(settings.threat, goal=list(names).index(name), goal_name="")
    return cast("T", settings.model_copy(update={"threat": threat}))


def units_of_eps(model: Classifier, normalised: Normalisation | None) -> tuple[str, ...]:
    """Return a note on the unit of the perturbation radius eps if inputs are not in [0, 1]; otherwise an empty
    tuple.
    """
    if model.units is not None:
        return ()
    low, high = ends(model.attacked_bounds)
    legal = f"legal values from {low:g} to {high:g}"
    if normalised is not None:
        note = (
            f"the data were normalised by {normalised}; this is undone, and eps is in the units before the "
            f"normalisation, with {legal}"
        )
        return (f"{note}; the model normalises its input inside",)
    if (low, high) == (0.0, 1.0):
        return ()
    return (f"eps is in the units of the inputs, with {legal}",)


def ends(bounds: Bounds) -> tuple[float, float]:
    """Return the lowest and the highest value that the input bounds of a model permit for any feature."""
    return _end(bounds.low, min), _end(bounds.high, max)


def _end(side: float | torch.Tensor, extreme: Any) -> float:
    return float(extreme(side.flatten().tolist())) if isinstance(side, torch.Tensor) else float(side)
