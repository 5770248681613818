"""References to models and data that are not opened yet, with options for opening them: the results of `open_model` and
`open_data`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from holdfast.config.groups import (
    DataSource,
    ExampleSelection,
    InferenceSource,
    InputSpace,
    ModelSource,
    ServerLimits,
)
from holdfast.config.wording import check_groups
from holdfast.core.errors import UsageError
from holdfast.core.outputs import OutputKind
from holdfast.core.remedies import Remedy
from holdfast.core.types import Layout
from holdfast.sources.adapting import refuse_no_model
from holdfast.sources.estimators import Predictor
from holdfast.sources.expected import ClassOrder
from holdfast.sources.frames import is_frame

Numbers = Sequence[float]
BoundsLike = Sequence[Any] | Mapping[str, Sequence[float]] | str
"""Bounds of inputs: two numbers, two arrays, or a mapping from feature to two numbers, also in a file (`@FILE`)."""


@dataclass(frozen=True)
class ModelReference:
    """A model that is not opened yet, and options for opening it. The run opens it, so that the run counts all requests
    to a server.
    """

    given: "nn.Module | Callable[[Tensor], Tensor] | Predictor | str | None"
    """an address, a network, a function from inputs to logits, or an estimator"""
    source: ModelSource = field(default_factory=ModelSource)
    inference: InferenceSource = field(default_factory=InferenceSource)
    limits: ServerLimits = field(default_factory=ServerLimits)

    @property
    def address(self) -> str | None:
        """Path, URL or bundled name of the model; None for a model that is given as a Python object."""
        return self.given if isinstance(self.given, str) else None


@dataclass(frozen=True)
class DataReference:
    """Examples that are not read yet, and options for reading them. The run reads them, because some options depend on
    the model.
    """

    given: Any
    """an address, `(x, y)` as tensors or arrays, a loader or dataset of pairs, a data frame, or a `Data`"""
    source: DataSource = field(default_factory=DataSource)

    @property
    def address(self) -> str | None:
        """Path or bundled name of the examples; None for examples that are given as a Python object."""
        return self.given if isinstance(self.given, str) else None


ModelLike = nn.Module | Callable[[Tensor], Tensor] | Predictor | str | Path | ModelReference
"""A network, a function from inputs to logits, an estimator, an address, or the result of `holdfast.open_model`."""
DataLike = Any
"""Examples: `(x, y)` as tensors or arrays, a loader or dataset of pairs, a data frame, a `Data`, an address, or the
result of `holdfast.open_data`."""


@dataclass(frozen=True)
class Sources:
    """The model and the examples of a run before they are opened, with options for opening them."""

    model: ModelReference
    data: DataReference
    inputs: InputSpace = field(default_factory=InputSpace)
    selection: ExampleSelection = field(default_factory=ExampleSelection)
    seed: int = 0
    unit: str = ""
    """unit of the eps of the threat model"""

    def all_examples(self) -> "Sources":
        """Return a copy of these references that reads all examples of the data instead of a selection."""
        return replace(self, selection=ExampleSelection())

    def beside(self, data: DataLike) -> DataReference:
        """Return the reference to additional data of a run, by default read with the same options as the main data,
        except the split.
        """
        unnamed = {"x": None, "y": None} if isinstance(data, tuple) else {}  # a pair has no named entries
        return data_reference(data, self.data.source.model_copy(update={"split": None, **unnamed}))


def open_model(
    model: ModelLike,
    *,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    trust_code: bool = False,
    model_output: OutputKind | None = None,
    classes: int | None = None,
    class_names: Sequence[str] | str | None = None,
    class_order: ClassOrder | None = None,
    input_shape: Sequence[int] | None = None,
    allow_hosts: Sequence[str] = (),
    headers: Sequence[str] = (),
    http_request: str | None = None,
    http_response: str | None = None,
    http_labels: bool = False,
    http_max_rows: int = 64,
    http_timeout: str = "30s",
    http_retries: int = 5,
    http_concurrency: int = 1,
    http_rate: str | None = None,
    guard: str | Path | None = None,
    max_queries: int | None = None,
    on_refused: Literal["reject", "stop"] = "reject",
    keep_answers: bool = False,
) -> ModelReference:
    """Return a reference to a model with options for opening it, as an argument for `assess`, `harden`, `attack` and
    other functions.

    `model` is an address (`"net.py:make"`, `"model.onnx"`, a URL) or an object. `arch` and `model_args` define the
    network of a state dict; `trust_code` allows a file to run the code that it contains. `model_output`, `classes`,
    `class_names` and `class_order` define the meaning of the outputs, and `input_shape` the sizes that an ONNX file
    does not fix. `guard` is the file of a guard (`"guard.yaml"`, or `"guard.yaml:energy"` for one rule), whose
    calibrated stateless detectors become a part of the model, which then rejects inputs. The other arguments are for
    models behind a server. The arguments are checked immediately. The model is opened by the function to which the
    reference is passed, so that requests to a server are counted in its run. Raises `UsageError` for an invalid
    argument.
    """
    if isinstance(model, ModelReference):
        raise UsageError("model is a result of open_model already; give all arguments in one call")
    source, inference, limits = check_groups(
        "open_model()",
        {
            "arch": arch,
            "model_args": model_args,
            "trust_code": trust_code,
            "model_output": model_output,
            "classes": classes,
            "class_names": class_names,
            "class_order": class_order,
            "input_shape": input_shape,
            "allow_hosts": allow_hosts,
            "headers": headers,
            "http_request": http_request,
            "http_response": http_response,
            "http_labels": http_labels,
            "http_max_rows": http_max_rows,
            "http_timeout": http_timeout,
            "http_retries": http_retries,
            "http_concurrency": http_concurrency,
            "http_rate": http_rate,
            "guard": None if guard is None else str(guard),
            "max_queries": max_queries,
            "on_refused": on_refused,
            "keep_answers": keep_answers,
        },
        (ModelSource, InferenceSource, ServerLimits),
    )
    reference = ModelReference(model_reference(model).given, source, inference, limits)
    if reference.address is None:
        outputs = ("model_output", "classes", "class_names", "class_order", "guard")
        refuse_other_settings(reference, "a model given as a Python object", *outputs)
    return reference


def open_data(
    data: DataLike,
    *,
    split: str | None = None,
    label: str | None = None,
    drop: Sequence[str] = (),
    x: str | None = None,
    y: str | None = None,
    separator: str | None = None,
    header: bool = True,
    layout: Layout | None = None,
) -> DataReference:
    """Return a reference to examples with options for reading them, as an argument for `assess`, `harden`, `attack` and
    other functions.

    `data` is an address or an object. `split` selects a part of the data, `label` and `drop` are names of columns of a
    table, and `x` and `y` names of arrays in an `.npz` file or of entries in batches that are mappings; `x` may also be
    a column of images in a `.parquet` file. `separator` and `header` are those of a `.csv` file, and `layout` gives the
    axes of stored arrays (`"chw"`, `"hwc"`, `"asis"`). The examples are read by the function to which the reference is
    passed, because some properties depend on the model. Raises `UsageError` for an invalid argument, and for one that
    selects from a file if the data are an object.
    """
    if isinstance(data, DataReference):
        raise UsageError("data is a result of open_data already; give all arguments in one call")
    (source,) = check_groups(
        "open_data()",
        {
            "split": split,
            "label": label,
            "drop": drop,
            "x": x,
            "y": y,
            "separator": separator,
            "header": header,
            "layout": layout,
        },
        (DataSource,),
    )
    reference = DataReference(data_reference(data).given, source)
    if reference.address is None:
        _refuse_names(reference)
    return reference


def _refuse_names(data: DataReference) -> None:
    """Raise `UsageError` for settings that select from a file or a catalogue, if the data are an object."""
    keys = ("x", "y") if is_frame(data.given) else ("split", "label", "drop")
    options = {
        key: value
        for key in (*keys, "separator", "header")
        if (value := getattr(data.source, key)) != getattr(DataSource(), key)
    }
    if options:
        raise UsageError(
            f"{_written(options)} is not possible for data given as a Python object: it is for an address, such as "
            "table.csv; select the rows and columns before",
            _removal(options, "open_data"),
        )


def refuse_other_settings(reference: ModelReference, what: str, *possible: str) -> None:
    """Raise `UsageError` if a reference to a model has options that are not allowed for its use, for example
    as a surrogate.

    Limits of servers are excluded, because they are checked when the model is opened.
    """
    options = {
        key: value
        for group in (reference.source, reference.inference)
        for key, value in group
        if key not in (*possible, "model") and value != getattr(type(group)(), key)
    }
    if options:
        raise UsageError(f"{_written(options)} is not possible for {what}", _removal(options, "open_model"))


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _removal(options: Iterable[str], function: str) -> Remedy:
    """Return the removal of arguments of a function."""
    first, *others = (Remedy(key, function=function) for key in options)
    return replace(first, also=tuple(others))


def model_reference(model: ModelLike) -> ModelReference:
    """Return the reference to a model that is given as an object, an address or a reference. Raises `UsageError` for
    any other object.
    """
    if isinstance(model, ModelReference):
        return model
    if isinstance(model, str | Path):
        return ModelReference(str(model))
    refuse_no_model(model)
    return ModelReference(model)


def data_reference(data: DataLike, default: DataSource | None = None) -> DataReference:
    """Return the reference to examples that are given as an object, an address or a reference.

    `default` contains the options for reading them if they are not given as a reference.
    """
    if isinstance(data, DataReference):
        return data
    return DataReference(str(data) if isinstance(data, str | Path) else data, default or DataSource())
