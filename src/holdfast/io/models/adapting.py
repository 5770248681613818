"""Wraps models that are neither torch modules nor files, such as estimators, models of texts and models of Keras 3, and
computes the digest of a network in memory.
"""

import hashlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import decoded
from holdfast.core.catalogue import GENERATOR_RECIPES
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.core.outputs import OutputKind
from holdfast.core.types import Layout
from holdfast.io.models import estimators
from holdfast.io.models.estimators import Adapted, Estimator, Predictor, adapted_estimator
from holdfast.io.models.trees import adapted_booster, adapted_lightgbm

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_REFERENCED = (FunctionType, MethodType, partial, nn.Module, type)
_LIBRARIES = frozenset(
    {"torch", "numpy", "keras", "sklearn", "xgboost", "lightgbm", "transformers", *sys.stdlib_module_names}
)
"""Packages whose code is identified by name. A run stores their versions, and can be resumed only with the
same ones.
"""
LOADED = "holdfast_user_"
"""Prefix of the names of modules that are loaded from files of the user. The rest is a digest of the path."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def digest_of_object(net: nn.Module | Callable[..., Any]) -> str:
    """Return the SHA-256 in hex of a network or a function that is given as a Python object.

    It is equal for the same object in other processes, with another number of threads and on other devices.
    """
    sha, objects = hashlib.sha256(), _ObjectList([net])
    for value in objects.objects:  # the list grows during the loop
        for part in _contents(value, objects):
            sha.update(f"{len(part)} ".encode() + part)
    return sha.hexdigest()


class _ObjectList:
    """A list of the objects to digest, in the order of their discovery. Each object occurs once."""

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects
        self.places = {id(value): place for place, value in enumerate(objects)}

    def reference(self, value: Any) -> bytes:
        """Return the index of an object in the list of objects to digest, as bytes. A new object is appended to the
        list first.
        """
        if id(value) not in self.places:
            self.places[id(value)] = len(self.objects)
            self.objects.append(value)
        return f"entry {self.places[id(value)]}".encode()


def _parts(value: Any, objects: _ObjectList) -> Iterator[bytes]:
    """Yield the bytes of a value.

    For a function, a class or a network they are a reference, and its content is digested later.
    """
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, tuple | frozenset):
        inner = [b" ".join(_parts(entry, objects)) for entry in value]
        yield from sorted(inner) if isinstance(value, frozenset) else inner
    elif isinstance(value, Tensor):
        yield from _tensor(value)
    elif isinstance(value, CodeType):
        yield from _code(value, objects)
    elif isinstance(value, BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, _REFERENCED):
        yield objects.reference(value)


def _contents(value: Any, objects: _ObjectList) -> Iterator[bytes]:
    if isinstance(value, FunctionType):
        yield from _function(value, objects)
    elif isinstance(value, MethodType):
        yield objects.reference(value.__func__)
        yield objects.reference(value.__self__)
    elif isinstance(value, partial):
        yield objects.reference(value.func)
        yield from _parts((value.args, tuple(sorted(value.keywords.items()))), objects)
    elif isinstance(value, nn.Module):
        yield from _module(value, objects)
    elif isinstance(value, type):
        yield from _class(value, objects)
    else:
        yield objects.reference(type(value))
        yield from _attributes(value, objects)


def _tensor(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _code(code: CodeType, objects: _ObjectList) -> Iterator[bytes]:
    yield code.co_code
    yield " ".join((*code.co_names, "|", *code.co_freevars)).encode()
    yield from _parts(code.co_consts, objects)


def _function(function: FunctionType, objects: _ObjectList) -> Iterator[bytes]:
    yield function.__qualname__.encode()
    if _is_library(function.__module__):
        return
    yield from _code(function.__code__, objects)
    yield from _parts(function.__defaults__ or (), objects)
    yield from _parts(tuple(sorted((function.__kwdefaults__ or {}).items())), objects)
    for name, value in _references(function):
        yield name.encode()
        yield from _parts(value, objects)


def _references(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that a function refers to: closures, globals, and attributes of modules of
    the user.
    """
    names = sorted(name for name in _names(function.__code__) if not name.startswith("__"))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, _cell_content(cell)
    for name in names:
        value = function.__globals__.get(name)
        yield name, value
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            yield from ((inner, vars(value).get(inner)) for inner in names)


def _names(code: CodeType) -> set[str]:
    """Return the names that a function and its inner functions look up."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _cell_content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _module(net: nn.Module, objects: _ObjectList) -> Iterator[bytes]:
    yield str(net).encode()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        yield name.encode()
        yield from _tensor(tensor)
    for name, module in net.named_modules():
        yield name.encode()
        yield objects.reference(type(module))
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            yield str(module.code).encode()
        else:
            yield from _attributes(module, objects)


def _attributes(holder: Any, objects: _ObjectList) -> Iterator[bytes]:
    """Yield the bytes of the public attributes and hooks, which affect the computation.

    The mode (train or eval) is left out, because the run sets it.
    """
    for name, value in sorted(getattr(holder, "__dict__", {}).items()):
        if name in _HOOKS:
            yield from _parts(tuple(value.values()), objects)
        elif not name.startswith("_") and name != "training":
            yield name.encode()
            yield from _parts(value, objects)


def _class(cls: type, objects: _ObjectList) -> Iterator[bytes]:
    """Yield the bytes of the methods and settings of a class, and references to its base classes."""
    yield f"{'' if cls.__module__.startswith(LOADED) else cls.__module__}.{cls.__qualname__}".encode()
    if _is_library(cls.__module__):
        return
    yield b" ".join(objects.reference(base) for base in cls.__bases__)
    for name, value in sorted(vars(cls).items()):
        inner = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(inner, FunctionType) or not name.startswith("_"):
            yield name.encode()
            yield from _parts(inner, objects)


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


class KerasNet(nn.Module):
    """A Keras model wrapped as a torch module. Dropout and updates of batch norm are active only in train mode."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.name = type(model).__qualname__

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the Keras model for a batch."""
        try:
            outputs: Tensor = self.model(x, training=self.training)
        except (ValueError, RuntimeError) as error:  # raised by an input or a layer of another shape
            error.args = (error_line(str(error)),)
            raise
        return outputs

    def __deepcopy__(self, memo: dict[int, object]) -> "KerasNet":
        """Return a copy with the same layers and its own weights.

        The copy function of Keras is not used, because it would write a file.
        """
        import keras

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras converts numbers in a way that numpy deprecates
            model = keras.models.clone_model(self.model)
        with torch.no_grad():
            for copy, original in zip(model.variables, self.model.variables, strict=True):
                copy.value.data.copy_(original.value.data)
        copied = KerasNet(model)
        copied.train(self.training)
        return copied


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # escape sequences of terminals, which Keras writes into messages
_TENSOR = re.compile(r"\s*\btensor\(\[.*?\](?:, [^()]*)?\)", re.DOTALL)
_LONGEST = 300
"""Largest number of characters of an error of Keras that a message contains."""


def error_line(text: str) -> str:
    r"""Return the first line of a Keras error message, without layer names, terminal colours and tensor values.

    >>> error_line("Exception encountered when calling A\n\n\x1b[1mshapes (4, 2) and (3, 1)\x1b[0m\n\nArguments: x")
    'shapes (4, 2) and (3, 1)'
    >>> error_line("Invalid shape for input tensor([[0.1],\n [0.2]]). Expected (None, 2), got (2, 1)")
    'Invalid shape for input. Expected (None, 2), got (2, 1)'
    """
    cleaned = _TENSOR.sub("", _COLOURS.sub("", text))
    lines = [line.strip() for line in cleaned.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Exception encountered when calling"):
        del lines[0]
    first = lines[0] if lines else ""
    return first[:_LONGEST] + ("…" if len(first) > _LONGEST else "")


def adapted_keras(model: Any) -> Adapted:
    """Return a Keras model wrapped as a torch network, with the layout of its inputs and whether its outputs are
    probabilities.

    Raises `TargetError` for another back end than torch, and for a model without weights.
    """
    import keras

    backend = keras.backend.backend()
    if backend != "torch":
        raise TargetError(
            f"the Keras model uses the back end {backend}, but torch was expected; set the environment variable "
            "KERAS_BACKEND=torch before keras is imported, and load or build the model again"
        )
    if not model.built:
        raise TargetError(
            f"the {type(model).__qualname__} of Keras has no weights before its first input; begin it with "
            "keras.Input(shape), or call it on a batch first"
        )
    return Adapted(KerasNet(model), output=_output(model, keras), layout=_layout(model, keras))


def _layout(model: Any, keras: Any) -> Layout | None:
    """Return the layout of images or volumes according to the layers of the model, or None for other inputs."""
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) not in (4, 5):
        return None
    declared = [
        layer.data_format for layer in model.layers if isinstance(getattr(layer, "data_format", None), str)
    ]
    order = declared[0] if declared else keras.config.image_data_format()
    return "hwc" if order == "channels_last" else "chw"


def _output(model: Any, keras: Any) -> OutputKind | None:
    """Return "probability" if the last layer computes probabilities. Otherwise return None.

    The result is also None for a model of a user-defined class, whose outputs are unknown.
    """
    if len(getattr(model, "outputs", None) or ()) != 1:
        return None
    last = model.layers[-1]  # layers are in the order of the graph
    if isinstance(last, keras.Model):
        return _output(last, keras)
    if isinstance(last, keras.layers.Softmax):
        return "probability"
    probabilities = (keras.activations.softmax, keras.activations.sigmoid)
    return "probability" if getattr(last, "activation", None) in probabilities else None


def accepted(model: object) -> bool:
    """Return whether the object is a model of a supported kind: a network, a function or an estimator."""
    if isinstance(model, nn.Module) and _forward(type(model)) is _forward(nn.Module):
        return False  # a generator, or a container of modules
    return callable(model) or isinstance(model, Predictor)


def _forward(kind: type) -> object:
    """The method `forward` of a class, without the descriptor that TorchScript puts in its place."""
    return inspect.getattr_static(kind, "forward")


def refuse_generator(model: object, what: str) -> None:
    """Raise `UsageError` for a generator, which is no classifier. `what` begins the message, as in "model is"."""
    if callable(getattr(model, "sample", None)) and not accepted(model):
        raise no_classifier(f"{what} a generator ({type(model).__name__})")


def no_classifier(what: str) -> UsageError:
    """Return the error for a generator in the place of a classifier. `what` begins the message."""
    return UsageError(
        f"{what}, and a classifier was expected; holdfast audit generator audits generators, and holdfast harden "
        f"trains them with the recipes {' and '.join(GENERATOR_RECIPES)}"
    )


def refuse_no_model(model: object, argument: str = "model") -> None:
    """Raise `UsageError` for an object that is not a model, such as a state dict, a class, or a function that builds a
    network. `argument` is the name of the argument in the message.
    """
    if isinstance(model, type):
        raise UsageError(
            f"{argument} is the class {model.__qualname__}; give an object of it, as in {model.__qualname__}()"
        )
    if isinstance(model, Mapping):
        raise UsageError(
            f"{argument} is {kind_of(model)}, as a state dict is, which contains weights and not the network; build "
            "the network, load the weights, as in net.load_state_dict(weights), and give net"
        )
    if takes_no_input(model):
        raise UsageError(
            f"{argument} is a function that accepts no inputs; a network, or a function from inputs to logits, was "
            "expected. If it builds the network, give the network that it returns, as in net = make()"
        )
    refuse_generator(model, f"{argument} is")
    if not accepted(model):
        raise UsageError(
            f"{argument} is {kind_of(model)}; expected a network, a function from inputs to logits, an estimator, or "
            "an address"
        )


def takes_no_input(model: object) -> bool:
    """Return whether the object is a function that cannot be called with inputs, such as one that builds a network."""
    if isinstance(model, nn.Module) or not callable(model):
        return False
    try:
        inspect.signature(model).bind(None)
    except TypeError:
        return True
    except ValueError:  # no signature is known, as of some built-in functions
        return False
    return False


def adapted(model: object) -> Adapted | None:
    """Return a model of another library, such as scikit-learn, wrapped as a torch module. Return None if the model is a
    torch network or a function.

    Raises `TargetError` for an object that is not a classifier, is not fitted, or runs on another back end than torch,
    and `UsageError` for an object that is not a model.
    """
    refuse_no_model(model)
    # Keras models are callable, so they are recognised before functions.
    if _is(model, "keras", "Model"):
        return adapted_keras(model)
    if _is(model, "xgboost", "Booster"):
        return adapted_booster(model)
    if _is(model, "lightgbm", "Booster"):
        return adapted_lightgbm(model)
    if isinstance(model, nn.Module) or callable(model) or not isinstance(model, Predictor):
        return None
    return adapted_estimator(model)


def object_identity(net: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """Return the name of a model given as a Python object, the strings that identify it in the evidence, and notes for
    the report.

    A note states what a resumed run cannot verify about the model.
    """
    kind = type(net) if isinstance(net, nn.Module) else net
    name = (
        net.name
        if isinstance(net, Estimator | KerasNet)
        else getattr(kind, "__qualname__", type(net).__name__)
    )
    unknown = "a resumed run cannot detect whether"
    notes: tuple[str, ...] = ()
    if not isinstance(net, nn.Module):
        notes = (
            f"{name} is a function, not a torch module: {unknown} the objects that it refers to have changed",
        )
    elif isinstance(net, Estimator) and not net.digest:
        notes = (f"the {name} cannot be pickled: {unknown} it has changed",)
    return name, [str(getattr(kind, "__module__", "")), name, digest_of_object(net)], notes


def _is(model: object, library: str, kind: str) -> bool:
    library_class = getattr(sys.modules.get(library), kind, None)
    return isinstance(library_class, type) and isinstance(model, library_class)


Texts = Callable[[list[str]], Any]


class TextEstimator(estimators.Estimator):
    """An estimator that is called with texts, such as a pipeline of scikit-learn that begins with a vectoriser."""

    def rows(self, x: Tensor) -> estimators.Array:
        """Return the texts in the rows of `x`, as an array of strings."""
        return np.array(decoded(x), dtype=object)

    def _forms(self) -> tuple[estimators.Form, ...]:
        return ("array",)

    def _compared(self, x: Tensor) -> Tensor:
        return x  # there is no midpoint of two texts


class TextFunction(nn.Module):
    """A function from a list of strings to scores (n, classes), which are a tensor, an array, or a list of rows."""

    def __init__(self, model: Texts, digest: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.digest = digest or digest_of_object(model)
        """digest of the function, for a function that is an object"""

    def __deepcopy__(self, memo: dict[int, object]) -> "TextFunction":
        """Return the module itself, because a call of the function does not change it, and a copy may be large. A
        network is copied, since copies of it are converted to double precision.
        """
        if not isinstance(self.model, nn.Module):
            return self
        return TextFunction(deepcopy(self.model, memo), self.digest)

    def inputs(self, x: Tensor) -> list[Any]:
        """Return the texts in the rows of `x`."""
        return decoded(x)

    def forward(self, x: Tensor) -> object:
        """Return the scores of the texts in the rows of `x`."""
        outputs = self.model(self.inputs(x))
        if not isinstance(outputs, np.ndarray | list | tuple):
            return outputs.to(x.device) if isinstance(outputs, Tensor) else outputs
        _refuse_labels(outputs)
        try:
            return torch.as_tensor(np.asarray(outputs, dtype=np.float64)).to(x.device, x.dtype)
        except (TypeError, ValueError) as error:
            raise TargetError(
                f"the model returned {outputs[0]!r:.80} for the first input; scores (n, classes) were expected, as a "
                "tensor, an array or a list of rows of numbers"
            ) from error


def _refuse_labels(outputs: Sequence[Any] | estimators.Array) -> None:
    """Raise `TargetError` if the outputs of a function are labels: strings, or whole numbers of which one is no
    probability.
    """
    first = outputs[0] if len(outputs) else None
    is_label = isinstance(first, str)
    if isinstance(first, int | np.integer):
        is_label = any(not 0 <= number <= 1 for number in outputs)
    if is_label:
        raise TargetError(
            f"the model returned labels, such as {first!s:.80} for the first input, and scores (n, classes) were "
            "expected; return a row for each input, with 1 for its class and 0 for the others, and set model_output: "
            "probability"
        )


class _Pipeline:
    """A function from texts to the probabilities that a pipeline `text-classification` of transformers returns."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.labels = tuple(pipeline.model.config.id2label[k] for k in sorted(pipeline.model.config.id2label))

    def __call__(self, texts: list[str]) -> list[list[float]]:
        results: Sequence[Sequence[Mapping[str, Any]]] = self.pipeline(texts, top_k=None, truncation=True)
        by_label = [{entry["label"]: float(entry["score"]) for entry in result} for result in results]
        return [[scores[label] for label in self.labels] for scores in by_label]


def adapted_text_model(model: object) -> estimators.Adapted | None:
    """Return a model of texts as a torch module whose inputs are rows of code points. Return None if it is such a
    module already.
    """
    if isinstance(model, TextEstimator | TextFunction):
        return None
    if isinstance(model, estimators.Estimator):
        return _estimator(estimators.as_model(model.interface, model.digest))
    refuse_no_model(model)
    name = getattr(model, "__qualname__", type(model).__qualname__)
    hidden = f"{name} is called with texts, which have no gradients"
    pipeline = getattr(sys.modules.get("transformers"), "Pipeline", None)
    if isinstance(pipeline, type) and isinstance(model, pipeline):
        function = _Pipeline(model)
        net = TextFunction(function)
        return estimators.Adapted(
            net, "scores", hidden, len(function.labels), function.labels, output="probability"
        )
    if isinstance(model, nn.Module) or callable(model):
        return estimators.Adapted(TextFunction(model), "scores", hidden)
    assert isinstance(model, estimators.Predictor)
    return _estimator(estimators.as_model(estimators.interface_of(model), estimators.contents(model)))


def _estimator(adapted_model: estimators.Adapted) -> estimators.Adapted:
    """Return an estimator that is called with texts instead of numbers."""
    assert isinstance(adapted_model.net, estimators.Estimator)
    net = TextEstimator(adapted_model.net.interface, adapted_model.net.digest)
    return replace(adapted_model, net=net, feature_names=None)


_COEFFICIENTS = ("coef_", "intercept_")
_ATTRIBUTES = {
    "LogisticRegression": _COEFFICIENTS,
    "LogisticRegressionCV": _COEFFICIENTS,
    "LinearSVC": _COEFFICIENTS,
    "SGDClassifier": _COEFFICIENTS,
    "RidgeClassifier": _COEFFICIENTS,
    "MultinomialNB": ("feature_log_prob_", "class_log_prior_"),
}
"""Attributes of linear classifiers with the weights (rows, features) and the offsets (rows,) of their scores."""


@dataclass(frozen=True, eq=False)
class _Features:
    """The steps of a pipeline before its classifier."""

    pipeline: Any

    def __deepcopy__(self, memo: dict[int, object]) -> "_Features":
        """Return the object itself, because a call does not change it, and a vocabulary may be large."""
        return self

    def __call__(self, texts: list[str]) -> "csr_matrix":
        from scipy.sparse import csr_matrix

        return csr_matrix(self.pipeline[:-1].transform(np.array(texts, dtype=object)))


class LinearTexts(nn.Module):
    """Logits of texts by a pipeline of scikit-learn that ends with a linear classifier. Only its weights are trained;
    the steps before it, such as the vocabulary, do not change.

    Raises `TargetError` for a model that is no pipeline, or that ends with another classifier.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        steps = list(pipeline.steps) if type(pipeline).__name__ == "Pipeline" else []
        kind = type(steps[-1][1] if steps else pipeline).__name__
        if len(steps) < 2 or kind not in _ATTRIBUTES:
            raise TargetError(
                f"the model is {'a pipeline that ends with ' if steps else ''}{kind}, which has no weights that "
                f"harden trains; give a pipeline that ends with one of {', '.join(_ATTRIBUTES)}, or a torch.nn.Module "
                "whose forward takes a list of strings"
            )
        self.features = _Features(pipeline)
        weights, offsets = (np.asarray(getattr(steps[-1][1], name)) for name in _ATTRIBUTES[kind])
        self.weight = nn.Parameter(torch.tensor(weights.T, dtype=torch.float32))
        """(features, rows), with one row for two classes whose score is one number"""
        self.bias = nn.Parameter(torch.tensor(offsets, dtype=torch.float32).expand(len(weights)).clone())

    def forward(self, texts: list[str]) -> Tensor:
        """Return the logits (n, classes) of texts."""
        counts, like = self.features(texts), self.weight
        scores = self.bias + F.embedding_bag(
            torch.from_numpy(counts.indices.astype(np.int64)).to(like.device),
            like,
            torch.from_numpy(counts.indptr[:-1].astype(np.int64)).to(like.device),
            per_sample_weights=torch.from_numpy(counts.data).to(like),
            mode="sum",
        )
        return torch.cat((torch.zeros_like(scores), scores), 1) if scores.shape[1] == 1 else scores

    def fitted_pipeline(self) -> Any:
        """Return a copy of the pipeline whose classifier has the current weights."""
        pipeline = deepcopy(self.features.pipeline)
        classifier = pipeline.steps[-1][1]
        for name, value in zip(
            _ATTRIBUTES[type(classifier).__name__], (self.weight.T, self.bias), strict=True
        ):
            setattr(classifier, name, value.detach().cpu().double().numpy().copy())
        return pipeline
