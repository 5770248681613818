"""Converts settings to declared properties of the model and the data, such as bounds and classes, and determines
properties that are not declared.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from holdfast.config.groups import DataSource, InputSpace
from holdfast.config.references import DataReference, Sources
from holdfast.core.batch import Data
from holdfast.core.model import Bounds, Classifier
from holdfast.core.normalisation import Normalisation
from holdfast.sources.data import Names
from holdfast.sources.expected import Expected
from holdfast.sources.models import Declared
from holdfast.sources.probing import ProbedClassifier, settle_gradients, settle_output, settle_predictions
from holdfast.verbs.request import Subject


def declared(sources: Sources) -> Declared:
    """Return the properties of the model's input and output that the settings declare. Input bounds are included only
    if the user gave them.
    """
    source, inputs = sources.model.source, sources.inputs
    return Declared(
        Bounds(*inputs.bounds) if "bounds" in inputs.model_fields_set else None,
        inputs.mean,
        inputs.std,
        source.classes,
        source.model_output,
        class_names=source.class_names,
        normalised=normalisation(inputs),
        input_shape=sources.model.inference.input_shape,
    )


def names(source: DataSource) -> Names:
    """Return the names of arrays and columns to read from data files, such as that of the label column, and the
    separator and the header of a CSV file, as given in the settings.
    """
    return {
        "label": source.label,
        "drop": tuple(source.drop),
        "x": source.x,
        "y": source.y,
        "separator": source.separator,
        "header": source.header,
    }


def normalisation(inputs: InputSpace) -> Normalisation | None:
    """Return the normalisation that was applied to the data before they were stored, as declared in the settings, or
    None if none is declared.
    """
    return None if inputs.data_normalised is None else Normalisation(*inputs.data_normalised)


def expected(
    sources: Sources, model: Classifier, data: DataReference | None = None, *, lenient: bool = False
) -> Expected:
    """Return the properties that data must have to fit the model, such as bounds and number of classes, and options for
    reading the data.

    With `lenient`, data that do not fit the model are accepted as well.
    """
    source = sources.model.source
    names = source.class_names or model.class_names
    return Expected(
        model.bounds,
        model.classes,
        None if names is None else tuple(names),
        model.class_labels,
        model.feature_names,
        source.class_names is not None,
        source.class_order,
        (data or sources.data).source.layout,
        normalisation(sources.inputs),
        ProbedClassifier(model),
        lenient,
    )


def unlabelled(sources: Sources, model: Classifier, data: DataReference) -> Expected:
    """Return the properties that data must have to fit the model if only their inputs are used and their labels are
    not.
    """
    return replace(
        expected(sources, model, data),
        classes=None,
        class_names=None,
        class_labels=None,
        checks_labels=False,
    )


def with_found_properties(subject: Subject, surrogates: Sequence[Subject], data: Data) -> Subject:
    """Determine those properties of the model that are not declared, by tests on the data. Return the model under test
    with notes about them.

    The properties are: whether single outputs are logits, whether the largest score of an estimator is that of its
    class, whether the backward pass of the model works, and the layouts of surrogates. Raises `UnclearOutput` if single
    outputs may be probabilities.
    """
    model = subject.model
    for examined in (model, *(surrogate.model for surrogate in surrogates)):
        if examined is not model:
            ProbedClassifier(examined).suit(data.read(0, min(2, len(data))).x)
        settle_output(examined, data)
    notes = (*settle_predictions(model, data), *settle_gradients(model, data))
    card = {**subject.card, "access": model.access} if notes else subject.card
    return replace(subject, card=card, notes=(*subject.notes, *notes))


def units_of_eps(model: Classifier, normalised: Normalisation | None) -> tuple[str, ...]:
    """Return a note on the unit of the perturbation radius eps if inputs are not pixels in [0, 1]; otherwise an empty
    tuple.
    """
    low, high = ends(model.bounds)
    legal = f"legal values from {low:g} to {high:g}"
    if normalised is not None:
        unit = "pixels" if low == 0 else "the units before normalisation"
        note = f"the data were normalised by {normalised}; this is undone, and eps is in {unit}, with {legal}"
        return (f"{note}; the model normalises its input inside",)
    if (low, high) == (0.0, 1.0):
        return ()
    return (f"eps is in the units of the inputs, with {legal}",)


def ends(bounds: Bounds) -> tuple[float, float]:
    """Return the lowest and the highest value that the input bounds of a model permit for any feature."""
    return _end(bounds.low, min), _end(bounds.high, max)


def _end(side: float | torch.Tensor, extreme: Any) -> float:
    return float(extreme(side.flatten().tolist())) if isinstance(side, torch.Tensor) else float(side)
