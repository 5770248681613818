"""References to models and data that are not opened yet, with options for opening them: the functions `open_model` and
`open_data`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from holdfast.api.checked_settings import DataReference, ModelReference, composed
from holdfast.api.python_functions import verb_with
from holdfast.api.reading_settings import given
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.io.data.tables import is_frame
from holdfast.io.models.adapting import refuse_no_model
from holdfast.io.models.estimators import Predictor
from holdfast.settings.groups import DataSource, ServerLimits
from holdfast.settings.values import address_of

ModelLike = nn.Module | Callable[[Tensor], Tensor] | Predictor | str | Path | ModelReference
"""A network, a function from inputs to logits, an estimator, an address, or the result of `holdfast.open_model`."""
DataLike = Any
"""Examples: `(x, y)` as tensors or arrays, a loader or dataset of pairs, a data frame, a `Data`, an address, or the
result of `holdfast.open_data`."""


@verb_with(ModelReference)
def open_model(model: ModelLike, **settings: Any) -> ModelReference:
    """Return a reference to a model with options for opening it, as an argument for `assess`, `harden`, `attack` and
    other functions.

    `model` is an address (`"net.py:make"`, `"model.onnx"`, a URL) or an object. The arguments are checked immediately.
    The model is opened by the function to which the reference is passed, so that requests to a server are counted in
    its run. Raises `UsageError` for an invalid argument.
    """
    if isinstance(model, ModelReference):
        raise UsageError("model is a result of open_model already; give all arguments in one call")
    reference = model_reference(model, **settings)
    if address_of(reference.model) is None:
        outputs = ("model_output", "classes", "class_names", "class_order", "guard")
        refuse_other_settings(reference, "a model given as a Python object", *outputs)
    return reference


@verb_with(DataReference)
def open_data(data: DataLike, **settings: Any) -> DataReference:
    """Return a reference to examples with options for reading them, as an argument for `assess`, `harden`, `attack` and
    other functions.

    `data` is an address or an object. The examples are read by the function to which the reference is passed, because
    some properties depend on the model. Raises `UsageError` for an invalid argument, and for one that selects from a
    file if the data are an object.
    """
    if isinstance(data, DataReference):
        raise UsageError("data is a result of open_data already; give all arguments in one call")
    reference = DataReference(**given(data=data, **settings))
    if address_of(reference.data) is None:
        keys = ("x", "y") if is_frame(reference.data) else ("split", "label", "drop")
        options = _changed(reference, (*keys, "separator", "header", "follow_links"))
        if options:
            raise UsageError(
                f"{_written(options)} is not possible for data given as a Python object: it is for an address, such as "
                "table.csv; select the rows and columns before",
                _removal(options, "open_data"),
            )
    return reference


def refuse_other_settings(reference: ModelReference, what: str, *possible: str) -> None:
    """Raise `UsageError` if a reference to a model has options that are not allowed for its use, for example
    as a surrogate.

    Limits of servers are excluded, because they are checked when the model is opened.
    """
    excluded = {"model", *possible, *ServerLimits.model_fields}
    options = _changed(reference, (key for key in ModelReference.model_fields if key not in excluded))
    if options:
        raise UsageError(f"{_written(options)} is not possible for {what}", _removal(options, "open_model"))


def _changed(reference: ModelReference | DataReference, keys: Iterable[str]) -> dict[str, Any]:
    """Return those options of a reference that differ from the defaults."""
    usual = type(reference).model_construct()
    return {key: value for key in keys if (value := getattr(reference, key)) != getattr(usual, key)}


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _removal(options: Iterable[str], function: str) -> Remedy:
    """Return the removal of arguments of a function."""
    first, *others = (Remedy(key, function=function) for key in options)
    return replace(first, also=tuple(others))


def model_reference(model: ModelLike, **settings: Any) -> ModelReference:
    """Return the reference to a model that is given as an object, an address or a reference. Raises `UsageError` for
    any other object.
    """
    if isinstance(model, ModelReference):
        return model
    if not isinstance(model, str | Path):
        refuse_no_model(model)
    return ModelReference(**given(model=model, **settings))


def beside(settings: DataSource, data: DataLike) -> DataSource:
    """Return the reference to additional data of a run, by default read with the same options as the main data,
    except the split.
    """
    if isinstance(data, DataReference):
        return data
    unnamed = {"x": None, "y": None} if isinstance(data, tuple) else {}  # a pair has no named entries
    return composed(DataSource, settings).model_copy(update={"data": data, "split": None, **unnamed})
