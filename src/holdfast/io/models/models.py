"""Opens a model of any supported format, and records how it was opened."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from holdfast.core.batch import LARGEST
from holdfast.core.errors import CarriesCode, TargetError, UsageError, model_argument
from holdfast.core.model import EVERY, Batches, Bounds, Classifier, Normalisation, parameter_of, refuse_lazy
from holdfast.core.names import TaskName
from holdfast.core.outputs import OutputKind
from holdfast.core.tasks import Task
from holdfast.core.types import Access, Layout
from holdfast.io.files import ARCHITECTURE, names_of, reading, sha256_of_file, similar_file, similar_name
from holdfast.io.models import factories
from holdfast.io.models.adapting import adapted, digest_of_object, no_classifier
from holdfast.io.models.composed import declared_ensemble, ensemble_of, with_denoiser
from holdfast.io.models.estimators import Adapted, Estimator, Predictor, no_classifier_but_regressor
from holdfast.io.models.exported import FREE_BATCH, SLICES, open_program
from holdfast.io.models.skops_files import ESTIMATOR_SUFFIXES, open_estimator
from holdfast.io.models.weights import (
    Weights,
    digest_of_weights,
    fit_weights,
    read_state_dict,
    refuse_misfit,
    state_dict_content,
)
from holdfast.io.remote.remote import SCHEMES, Remote

if TYPE_CHECKING:
    from holdfast.threats.table_rules import Rules

_SPARE = 1_000
"""Number by which the parameters of a requested network may exceed the tensors of the file.

Up to this number the error message can list the missing tensors.
"""
BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "bundled"
STATE_DICT_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ts", ".jit", ".model", ".ckpt", ".bin")
_OF_NUMBERS = (".pt2", ".json", ".ubj", ".txt")
"""Suffixes of models that cannot be called with texts."""
TEXT_BOUNDS = Bounds(0.0, float(LARGEST))
"""Range of code points, which are the inputs of models of texts."""
_FIXED = 1e6
"""Largest absolute value of a feature that attacks do not change, without other bounds; its square is finite."""
WEIGHTS, CARD, PROGRAM = "model.safetensors", "card.json", "member.pt2"
"""Names of the files of a hardened model in its folder; the program is that of a member of an ensemble."""
ROTATING = "rotating:"
"""Prefix of the address of a pool. The model at such an address is the serving set of the pool."""
_FORMS = (
    "a bundled name, file.py:factory, .safetensors or .pt, .onnx, .pt2, .skops, .json or .ubj of XGBoost, .txt of "
    "LightGBM, a folder that harden wrote, a folder of transformers, or the URL of a server"
)


@dataclass(frozen=True)
class OpenedModel:
    """A classifier that was opened and is ready for attacks, with properties of its source that are stored in the
    evidence.
    """

    model: Classifier
    name: str
    """the address as the user wrote it"""
    how: str
    """the format from which it was opened: `safetensors`, `onnx`, `code` …"""
    files: Mapping[str, str]
    """SHA-256 of every file that was read, by its path as the user wrote it"""
    notes: tuple[str, ...] = ()
    """notes for the report"""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """`architecture` and `arguments` for the metadata of a file with weights, if the network is in the catalogue"""

    @property
    def access(self) -> Access:
        """Highest access that the model gives an attack: gradients, scores or labels."""
        return self.model.access

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the contents of all files of the model. It does not depend on their paths."""
        return hashlib.sha256("\n".join(sorted(self.files.values())).encode()).hexdigest()


@dataclass(frozen=True)
class Declared:
    """Properties of a model's inputs and outputs that the user declares. If a property is None, the file or the default
    determines it.
    """

    bounds: Bounds | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    classes: int | None = None
    output: OutputKind | None = None
    layout: Layout | None = None
    """layout of the network's inputs"""
    class_names: tuple[str, ...] | None = None
    normalised: Normalisation | None = None
    """normalisation of the data; a model without preprocessing applies it to its inputs"""
    input_shape: Sequence[int] | None = None
    """shape of one example, if an ONNX file does not specify it"""
    constants: Mapping[str, float] = field(default_factory=dict)
    """values of further inputs of an ONNX file"""
    input_name: str | None = None
    """name of the inputs in the data; the parameter of the network with this name gets them"""
    class_labels: tuple[int, ...] | None = None
    """class labels of the data, if they are not 0, 1, 2, …"""
    texts: bool = False
    """whether the model is called with a list of strings"""
    files: bool = False
    """whether the model is called with a list of the contents of files"""
    rules: "Rules | None" = None
    """rules of the table whose rows are the inputs"""
    task: Task | None = None
    """what the model returns, if it is not one score for each class"""

    @property
    def is_called_with_lists(self) -> bool:
        """Whether the model is called with a list of strings or of bytes, and not with a tensor."""
        return self.texts or self.files

    def wrap(
        self, net: factories.Model, *, access: Access = "gradients", batches: Batches | None = None
    ) -> Classifier:
        """Return a network as a classifier with the declared bounds and preprocessing.

        If `net` is a `Classifier`, its values are used where nothing is declared. An estimator or a Keras model
        declares its own properties. Raises `TargetError` for an estimator that is not a fitted classifier.
        """
        if isinstance(net, Classifier):
            return self.over(net).wrap(net.net, access=net.access, batches=net.batches)
        if self.texts:
            from holdfast.io.models.adapting import adapted_text_model  # late: few models are of texts

            adapted_model = adapted_text_model(net)
        elif self.files:
            from holdfast.io.models.byte_models import adapted_file_model  # late: few models are of files

            adapted_model = adapted_file_model(net)
        else:
            adapted_model = adapted(net)
        if adapted_model is not None and self.rules is not None:
            from holdfast.io.models.trees import adapted_to_table  # late: few models have rules

            adapted_model = adapted_to_table(adapted_model, self.rules)
        if adapted_model is not None:
            return self.of(adapted_model)
        assert callable(net)
        if isinstance(net, nn.Module):
            refuse_lazy(net)
        mean, std = self.mean, self.std
        if mean is None and std is None and self.normalised is not None:
            mean, std = self.normalised.mean, self.normalised.std
        model = Classifier(
            net,
            bounds=self._bounds,
            mean=mean,
            std=std,
            classes=self.classes,
            access=access,
            batches=batches,
            output=self.output,
            layout=self.layout,
        )
        model.class_names, model.class_labels, model.task = self.class_names, self.class_labels, self.task
        if self.input_name is not None:
            model.input_name = parameter_of(net, (self.input_name,)) or model.input_name
        return model

    @property
    def _bounds(self) -> Bounds | None:
        if self.texts:
            return TEXT_BOUNDS
        if self.files:
            return Bounds(0.0, 256.0)
        if self.rules is None:
            return self.bounds
        low, high = ([side(name) for name in self.rules.names] for side in (self.rules.low, self.rules.high))
        return Bounds(torch.tensor(low), torch.tensor(high))

    def of(self, adapted_model: Adapted) -> Classifier:
        """Return a wrapped model of another library, such as scikit-learn, as a classifier with the declared
        properties. Raises `TargetError` for a regressor, unless the task is a regression, and for any other estimator
        if it is.
        """
        of_numbers = self.task is not None and self.task.name == "regression"
        if isinstance(adapted_model.net, Estimator) and adapted_model.numbers != of_numbers:
            if adapted_model.numbers:
                raise no_classifier_but_regressor(adapted_model.net.name)
            raise TargetError(
                f"the {adapted_model.net.name} is no regressor, and the task is a regression; leave the tolerance out"
            )
        properties = Declared(
            bounds=adapted_model.bounds,
            classes=adapted_model.classes,
            output=adapted_model.output,
            layout=adapted_model.layout,
            class_names=adapted_model.class_names,
            class_labels=adapted_model.class_labels,
        )
        model = self.filled(properties).wrap(adapted_model.net, access=adapted_model.access)
        model.hides, model.feature_names = adapted_model.hides, adapted_model.feature_names
        return model

    def over(self, other: Classifier) -> "Declared":
        """Return the declared properties, with missing values taken from the classifier `other`."""
        mean = None if other.mean is None else other.mean.tolist()
        std = None if other.std is None else other.std.tolist()
        properties = (other.classes, other.output, other.layout, other.class_names)
        labels = other.class_labels
        declared = Declared(
            other.bounds, mean, std, *properties, class_labels=labels, input_name=other.input_name
        )
        return self.filled(declared)

    def filled(self, defaults: "Declared") -> "Declared":
        """Return the declared properties, with missing values taken from `defaults`."""
        declared = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(defaults, **{name: value for name, value in declared.items() if value is not None})


@dataclass(frozen=True)
class _Opening:
    """All options with which a model is opened."""

    address: str
    arch: str | None
    arguments: Mapping[str, str] = field(default_factory=dict)
    declared: Declared = field(default_factory=Declared)
    trust_code: bool = False
    remote: Remote = field(default_factory=Remote)


def open_model(
    address: str,
    *,
    arch: str | None = None,
    model_args: Mapping[str, str] | None = None,
    declared: Declared | None = None,
    trust_code: bool = False,
    remote: Remote | None = None,
) -> OpenedModel:
    """Return the model at an address, which is a path, a name or a URL. Raises `UsageError` or `TargetError` with
    advice.

    `arch` is the architecture for a file that contains only weights, and `model_args` are arguments of the function
    that builds the network. `trust_code` permits files that run code. `remote` contains the options for a server.
    """
    properties = declared or Declared()
    if properties.input_shape is not None and Path(address).suffix != ".onnx":
        raise UsageError(
            f"input_shape is for an .onnx file with free sizes, but the model is {address!r}",
            model_argument("input_shape"),
        )
    if properties.constants and Path(address).suffix != ".onnx":
        raise UsageError(
            f"constants are for further inputs of an .onnx file, but the model is {address!r}",
            model_argument("constants", option="--constant"),
        )
    opening = _Opening(address, arch, dict(model_args or {}), properties, trust_code, remote or Remote())
    of_numbers = Path(address).suffix in _OF_NUMBERS or address in bundled_models()
    if properties.texts and (of_numbers or address.partition(":")[0] in SCHEMES):
        raise UsageError(
            f"{address!r} is called with numbers, and the inputs are texts; give FILE.py:FACTORY, where the factory "
            "returns a function from a list of strings to scores, or a pipeline of scikit-learn"
        )
    if properties.files and not (factories.names_code(address) or Path(address).suffix == ".onnx"):
        raise UsageError(
            f"{address!r} is called with numbers, and the inputs are files; give FILE.py:FACTORY, where the factory "
            "returns a function from a list of bytes to scores, or an .onnx file with one input of whole numbers"
        )
    if address.partition(":")[0] in SCHEMES:
        return _open_http(opening)
    _refuse_remote(address)
    if factories.names_code(address):
        return _open_code(opening)
    factories.refuse_without_factory(address)
    path = Path(address)
    if path.is_dir():
        with reading(address):
            return _open_folder(opening, path)
    if path.suffix in _OPENERS:
        with reading(address):
            return _OPENERS[path.suffix](opening, path)
    if path.exists():
        raise UsageError(f"{address!r} has an unknown model format; give {_FORMS}")
    return _open_bundled(opening)


BUNDLED_TASKS: Final[Mapping[str, TaskName]] = {"scenes-unet": "segmentation", "scenes-detector": "detection"}
"""Tasks of the bundled models that are no classifiers, by name."""


def bundled_models() -> dict[str, Path]:
    """Return the paths of the models that are bundled with Holdfast, by name."""
    return {path.stem: path for path in sorted(BUNDLED_FOLDER.glob("*.safetensors"))}


def _refuse_remote(address: str) -> None:
    scheme = address.partition(":")[0]
    if scheme in ("hf", "timm"):
        raise UsageError(
            f"{address!r} is the address of a model hub, which is not opened; load the network in a file of yours and "
            "give file.py:factory, or export it to ONNX"
        )
    if address.startswith(ROTATING):
        raise UsageError(
            f"{address!r} is a rotating pool, which can only be the model of an assessment; give a file of "
            "weights, or a bundled name"
        )


def _open_code(opening: _Opening) -> OpenedModel:
    if opening.arch is not None:
        raise UsageError(
            f"the architecture {opening.arch} and the factory {opening.address} both specify code; one of them was "
            "expected",
            model_argument("arch"),
        )
    built = factories.build_from_file(opening.address, opening.arguments)
    model = opening.declared.wrap(built.net)
    # The code may read weights that no argument names; therefore the tensors are digested too.
    net = built.net if isinstance(built.net, nn.Module) else model.net
    if (
        isinstance(net, nn.Module)
        and not isinstance(net, Estimator)
        and not opening.declared.is_called_with_lists
    ):
        state_digest = sha256_of_state(net)
    else:
        state_digest = digest_of_object(net)
    files = {**built.files, f"{opening.address} state": state_digest}
    return OpenedModel(model, opening.address, "code", files)


def sha256_of_state(net: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and values of a network's parameters and buffers, in hex."""
    return digest_of_weights(net.state_dict())


def _open_state_dict(opening: _Opening, path: Path) -> OpenedModel:
    content = state_dict_content(path)
    try:
        weights, metadata = read_state_dict(path, content)
    except CarriesCode:
        if not opening.trust_code:
            raise
        return _open_trusted(opening, path, content)
    return _filled(opening, weights, metadata, path.suffix.removeprefix("."), weights.digest)


def _open_trusted(opening: _Opening, path: Path, content: bytes) -> OpenedModel:
    """Open a file that runs code: it contains a whole network, or weights with other objects."""
    from holdfast.io.models.factories import open_trusted  # late: few files run code

    content_or_module, how, digest = open_trusted(path, content)
    if isinstance(content_or_module, Weights):
        return _filled(opening, content_or_module, {}, how, digest)
    if opening.arch is not None:
        raise UsageError(
            f"{opening.address!r} contains a whole model, and the architecture {opening.arch} is given",
            model_argument("arch"),
        )
    return OpenedModel(
        opening.declared.wrap(content_or_module), opening.address, how, {opening.address: digest}
    )


def _filled(
    opening: _Opening, weights: Weights, metadata: Mapping[str, Any], how: str, digest: str
) -> OpenedModel:
    """Build the architecture, load the weights into it, and return it as a model."""
    members = (metadata.get("ensemble") or {}).get("members", 1)
    if members > len(weights.tensors):
        raise TargetError(
            f"{opening.address!r} states {members:,} members and has {len(weights.tensors):,} tensors; write the file "
            "again"
        )
    built, properties = _architecture(opening, metadata, weights)
    net = built.net.net if isinstance(built.net, Classifier) else built.net
    if (
        opening.declared.texts and "training" in metadata
    ):  # of `harden`, which trains a network of texts inside
        tensors = {name.removeprefix("model."): value for name, value in weights.tensors.items()}
        weights = replace(weights, tensors=tensors)
    if opening.declared.texts and isinstance(net, Predictor) and not isinstance(net, nn.Module):
        return _filled_pipeline(opening, built, net, weights, digest)
    if not isinstance(net, nn.Module):
        raise TargetError(
            f"the architecture {opening.arch} returned {'a function' if callable(net) else 'an estimator'}, which "
            "has no weights to load; return a torch.nn.Module"
        )
    refuse_lazy(net)
    notes = fit_weights(net, weights, repr(opening.address))
    files = {**built.files, opening.address: digest}
    net.eval()
    model = opening.declared.filled(properties).wrap(built.net)
    if metadata.get("ensemble"):
        notes += declared_ensemble(net, model, metadata["ensemble"], repr(opening.address))
    if metadata.get("int8"):
        from holdfast.io.models.architectures import note_of  # late: few models have rounded layers

        notes += (note_of(net),)
    catalogued = _catalogued(opening, metadata)
    return OpenedModel(model, opening.address, how, files, notes, architecture=catalogued)


def _filled_pipeline(
    opening: _Opening, built: factories.Built, pipeline: Predictor, weights: Weights, digest: str
) -> OpenedModel:
    """Load weights into the linear classifier of a pipeline of scikit-learn, and return it as a model of texts."""
    from holdfast.io.models.adapting import LinearTexts  # late: few models are pipelines for texts

    trained = LinearTexts(pipeline)
    notes = fit_weights(trained, weights, repr(opening.address))
    model = opening.declared.wrap(trained.fitted_pipeline())
    return OpenedModel(model, opening.address, "safetensors", {**built.files, opening.address: digest}, notes)


def _catalogued(opening: _Opening, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the architecture for the metadata of a file with weights; empty for networks from the user's code."""
    denoiser = {"denoiser": metadata["denoiser"]} if metadata.get("denoiser") else {}
    if factories.names_code(opening.arch or "") or not (opening.arch or metadata.get("architecture")):
        return denoiser
    integers = {name: int(value) for name, value in opening.arguments.items()}
    arguments = integers or ({} if opening.arch is not None else metadata.get("arguments", {}))
    return {"architecture": opening.arch or metadata["architecture"], "arguments": arguments, **denoiser}


def _architecture(
    opening: _Opening, metadata: Mapping[str, Any], weights: Weights
) -> tuple[factories.Built, Declared]:
    """Return the network for the weights and the properties that the file declares.

    The architecture is the declared one if it is given, else the one in the catalogue that the file names.
    """
    from holdfast.io.models.architectures import ARCHITECTURES  # late: nothing else needs the catalogue

    if opening.arch is not None and factories.names_code(opening.arch):
        built = factories.build_from_file(opening.arch, opening.arguments)
        properties = Declared() if isinstance(built.net, Classifier) else _known(metadata)
        return replace(built, net=_with_parts(built.net, metadata)), properties
    name = opening.arch or metadata.get("architecture")
    path = Path(opening.address)
    program = (path if path.is_dir() else path.parent) / PROGRAM
    if name is None and metadata.get("ensemble") and program.is_file():
        member = open_program(program, trust_code=opening.trust_code)
        return factories.Built(_extended(member.net, metadata), {str(program): member.digest}), _known(
            metadata
        )
    if name is None:
        raise UsageError(
            f"{opening.address!r} contains weights but no architecture, such as one of "
            f"{', '.join(sorted(ARCHITECTURES))}",
            ARCHITECTURE,
        )
    if name not in ARCHITECTURES:
        factories.refuse_without_factory(opening.arch or "")
        hint = (
            similar_name(str(name), ARCHITECTURES)
            or f"; the architectures are {', '.join(sorted(ARCHITECTURES))}"
        )
        raise UsageError(
            f"there is no architecture {name!r}{hint}", replace(ARCHITECTURE, reason="for your own")
        )
    if opening.arguments or opening.arch is not None:
        factory, address = ARCHITECTURES[name], f"architecture {name}"
        make = partial(factory, **factories.converted_arguments(factory, opening.arguments, address))
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):  # raised again below
            refuse_misfit(lambda: _extended(make(), metadata), weights, repr(opening.address), spare=_SPARE)
        built = factories.call_factory(factory, opening.arguments, address, {})
        return replace(built, net=_with_parts(built.net, metadata)), _known(metadata)
    try:
        make = partial(ARCHITECTURES[name], **metadata.get("arguments", {}))
        refuse_misfit(lambda: _extended(make(), metadata), weights, repr(opening.address))
        net = _extended(make(), metadata)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TargetError(
            f"{opening.address!r} specifies the architecture {name} with invalid arguments: {first_line}; write the "
            "file again",
            ARCHITECTURE,
        ) from error
    return factories.Built(net, {}), _known(metadata)


def _extended(net: nn.Module, metadata: Mapping[str, Any]) -> nn.Module:
    """Return the network with what the metadata of a weights file add to it: a denoiser in front of it, the other
    members of an ensemble, or layers of 8-bit integers.
    """
    net = with_denoiser(net, metadata["denoiser"]) if metadata.get("denoiser") else net
    if metadata.get("ensemble"):
        net = ensemble_of(net, metadata["ensemble"])
    if metadata.get("int8"):
        from holdfast.io.models.architectures import with_int8  # late: few models have rounded layers

        net = with_int8(net, metadata["int8"])
    return net


def _with_parts(model: factories.Model, metadata: Mapping[str, Any]) -> factories.Model:
    """Return the model of a factory with what a weights file adds to its network, if anything."""
    if isinstance(model, Classifier) and isinstance(model.net, nn.Module):
        model.net = _extended(model.net, metadata)
        return model
    return _extended(model, metadata) if isinstance(model, nn.Module) else model


def _known(metadata: Mapping[str, Any]) -> Declared:
    bounds, names = metadata.get("bounds"), metadata.get("class_names")
    return Declared(
        bounds=None if bounds is None else Bounds(*bounds),
        mean=metadata.get("mean"),
        std=metadata.get("std"),
        classes=metadata.get("classes"),
        output=metadata.get("output"),
        layout=metadata.get("layout"),
        class_names=None if names is None else tuple(names),
    )


def _open_bundled(opening: _Opening) -> OpenedModel:
    bundled = bundled_models()
    name = opening.address
    if name not in bundled:
        looks_like_path = "/" in name or "\\" in name or bool(Path(name).suffix)
        if looks_like_path:
            raise TargetError(f"model {name!r} does not exist{similar_file(Path(name))}; give {_FORMS}")
        if (BUNDLED_FOLDER / "generators" / f"{name}.safetensors").is_file():
            raise no_classifier(f"{name} is a bundled generator")
        raise UsageError(f"there is no bundled model {name!r}{similar_name(name, bundled)}; give {_FORMS}")
    opened = _open_state_dict(opening, bundled[name])
    files = {f"bundled:{name}": sha256_of_file(bundled[name])}
    return replace(opened, name=name, how="bundled", files=files)


def _open_exported(opening: _Opening, path: Path) -> OpenedModel:
    program = open_program(path, trust_code=opening.trust_code)
    size = program.batch_size
    notes = (
        ()
        if size is None
        else (f"the program accepts only batches of {size} examples; {SLICES} {FREE_BATCH}",)
    )
    files = {opening.address: program.digest}
    return OpenedModel(opening.declared.wrap(program.net), opening.address, "pt2", files, notes)


def _open_onnx(opening: _Opening, path: Path) -> OpenedModel:
    from holdfast.io.onnx.opening import open_onnx  # late: onnx is an extra

    declared = opening.declared
    if declared.files:
        return _open_onnx_of_files(opening, path)
    rules = declared.rules
    columns = None if rules is None else {name: rules.categories.get(name, ()) for name in rules.names}
    graph = open_onnx(path, declared.input_shape, declared.constants, texts=declared.texts, columns=columns)
    if declared.texts:  # the network takes rows of code points, and not strings
        declared = replace(declared, texts=False, bounds=TEXT_BOUNDS)
    properties = Declared(
        classes=graph.classes,
        output=graph.output,
        class_names=graph.class_names,
        class_labels=graph.class_labels,
    )
    model = declared.filled(properties).wrap(graph.net, access=graph.access)
    model.hides, model.feature_names, notes = graph.hides, graph.feature_names, graph.notes
    model.inputs = graph.inputs
    if graph.fixed is not None and rules is None:
        assert graph.feature_names is not None
        model.fixed = torch.tensor(graph.fixed)
        # the bounds are those of the attacked inputs
        sides = zip((-_FIXED, _FIXED), (model.bounds.low, model.bounds.high), strict=True)
        model.bounds = Bounds(
            *(torch.where(model.fixed, torch.tensor(far), torch.as_tensor(side)) for far, side in sides)
        )
        fixed = [name for name, stays in zip(graph.feature_names, graph.fixed, strict=True) if stays]
        notes += (f"attacks do not change the further inputs: {names_of(fixed)}",)
    return OpenedModel(model, opening.address, "onnx", graph.files, notes)


def _open_onnx_of_files(opening: _Opening, path: Path) -> OpenedModel:
    """Open an ONNX model of whole numbers, which are the bytes of files."""
    from holdfast.io.models.byte_models import open_onnx_of_files  # late: few models are of files

    graph, reading_notes, output = open_onnx_of_files(path)
    properties = Declared(classes=graph.classes, class_names=graph.class_names, output=output)
    model = opening.declared.filled(properties).wrap(graph.net, access=graph.access)
    model.hides = graph.hides
    return OpenedModel(model, opening.address, "onnx", graph.files, (*reading_notes, *graph.notes))


def _open_estimator(opening: _Opening, path: Path) -> OpenedModel:
    adapted_model, digest, notes = open_estimator(path, trust_code=opening.trust_code)
    how = path.suffix.removeprefix(".")
    return OpenedModel(
        opening.declared.of(adapted_model), opening.address, how, {opening.address: digest}, notes
    )


def _open_folder(opening: _Opening, path: Path) -> OpenedModel:
    """Open a folder that harden wrote, or one with a model of transformers."""
    if not opening.declared.texts and (path / WEIGHTS).is_file() and (path / CARD).is_file():
        return replace(_open_state_dict(opening, path / WEIGHTS), name=opening.address)
    from holdfast.io.models.transformers_folders import open_folder  # late: few models are folders

    opened = open_folder(path, texts=opening.declared.texts)
    files = {f"{opening.address.rstrip('/')}/{name}": digest for name, digest in opened.files.items()}
    return OpenedModel(
        opening.declared.of(opened.adapted), opening.address, "transformers", files, opened.notes
    )


def _open_http(opening: _Opening) -> OpenedModel:
    from holdfast.io.remote.http import open_http  # late: few models are behind a server

    declared = opening.declared
    served = open_http(
        opening.address,
        opening.remote,
        declared.classes,
        declared.class_names,
        declared=declared.output is not None,
    )
    model = declared.filled(Declared(classes=served.classes)).wrap(
        served.net, access=served.access, batches=served.batches or EVERY
    )
    model.hides, model.remote = served.hides, True
    files = {opening.address: served.digest}
    return OpenedModel(model, opening.address, "http", files, served.notes)


_OPENERS: Mapping[str, Callable[[_Opening, Path], OpenedModel]] = {
    ".onnx": _open_onnx,
    ".pt2": _open_exported,
    **dict.fromkeys(STATE_DICT_SUFFIXES, _open_state_dict),
    **dict.fromkeys(ESTIMATOR_SUFFIXES, _open_estimator),
}
