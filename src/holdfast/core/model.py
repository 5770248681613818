"""Models: functions from inputs within declared bounds to logits, with a declared, differentiable preprocessing; the
normalisation of inputs by channel, and the units in which their values are measured.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from holdfast.core.errors import (
    FunctionRaised,
    HoldfastError,
    InputRefused,
    NoLogits,
    Remedy,
    TargetError,
    TargetLost,
    UnclearOutput,
    UsageError,
    model_argument,
)
from holdfast.core.names import with_article
from holdfast.core.outputs import (
    REFUSED,
    Guarded,
    OutputKind,
    is_single,
    kind_of_single,
    logits_of,
    of_classes,
    refused,
)
from holdfast.core.types import Access, Ids, Inputs, Layout, Logits, Outputs

if TYPE_CHECKING:
    from holdfast.core.tasks import Task


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the normalisation `(x - mean) / std`, with one number for each channel (or feature
    of a table), or one for all.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def done(self, x: Tensor) -> Tensor:
        """Return the normalised inputs `(x - mean) / std`, computed in float64 and returned in the data type of `x`."""
        x64 = x.double()
        mean, std = (torch.tensor(side, dtype=torch.float64) for side in (self.mean, self.std))
        return ((x64 - per_channel(mean, x64)) / per_channel(std, x64)).to(x.dtype)

    def undone(self, x: Tensor) -> Tensor:
        """Return the original inputs `x * std + mean` of normalised inputs, computed in float64 and returned in the
        data type of `x`.
        """
        x64 = x.double()
        mean, std = (torch.tensor(side, dtype=torch.float64) for side in (self.mean, self.std))
        return (x64 * per_channel(std, x64) + per_channel(mean, x64)).to(x.dtype)

    def __str__(self) -> str:
        """Return the value as an argument of `--data-normalised`."""
        return "/".join(",".join(f"{number:g}" for number in side) for side in (self.mean, self.std))


def per_channel(values: Sequence[float] | Tensor, x: Tensor) -> Tensor:
    """Return one value for all channels, or one for each, as a tensor that broadcasts with inputs `x` whose channels
    come first or last.

    The channels are the first axis of an example if its length matches, else the last. Raises `TargetError` if neither
    matches.
    """
    numbers = torch.as_tensor(values).to(x.device, x.dtype)
    channels = x.shape[1] if x.dim() > 1 else 1
    if len(numbers) in (1, channels):
        return numbers.view(1, -1, *[1] * (x.dim() - 2))
    if x.dim() > 2 and len(numbers) == x.shape[-1]:
        return numbers
    raise TargetError(
        f"mean or std has {len(numbers)} entries, but the inputs have {channels} channels; give one number for "
        "each channel"
    )


VOTES = 20
"""number of evaluations of a randomised model that decide whether an example survives; the final evaluation uses as
many new ones"""
AT_TIMES = 0.05
"""largest share of correct outputs with which an attack considers a point of a randomised model broken"""


@dataclass(frozen=True)
class Bounds:
    """Range of valid inputs: the lowest and the highest value, as one number each or as a tensor with one number for
    each input value.
    """

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def clamp(self, x: Inputs, *, out: Tensor | None = None) -> Inputs:
        """Return `x` with each value clamped to its valid range. The result is written to `out` if it is given, which
        may be `x` itself.
        """
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            low, high = self.like(x)
            return torch.clamp(x, low, high, out=out)
        return torch.clamp(x, self.low, self.high, out=out)

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest valid values as tensors with the device and data type of `x`, in shapes
        that broadcast with it.
        """
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        return low.to(x.device, x.dtype), high.to(x.device, x.dtype)

    @property
    def width(self) -> float:
        """Largest difference between the highest and the lowest valid value, over all input values."""
        return float((torch.as_tensor(self.high) - torch.as_tensor(self.low)).max())


@runtime_checkable
class Model(Protocol):
    """Protocol of a classifier that attacks can query.

    `ids` are the ids of the rows of `x`, by which a metered model counts queries; other models ignore them.
    """

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs."""

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes) of the inputs `x` (n, *features)."""


@dataclass(frozen=True)
class Batches:
    """The batch sizes that a network accepts: exactly `size` inputs, or with `multiples` any multiple of it."""

    size: int
    multiples: bool = False

    @property
    def description(self) -> str:
        """Sentence for the evidence that describes the batch sizes that the network accepts."""
        if not self.multiples:
            return f"the model accepts batches of {self.size} only; other batches are split and padded"
        how = (
            f"padded to a multiple of {self.size} with copies of its last example, whose outputs are dropped"
        )
        return f"the model does not accept all batch sizes; each batch is {how}"

    def through(self, net: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """Return the outputs of `net` for all rows of `x`, which are split and padded to batch sizes that the network
        accepts.

        Copies of the last row fill an incomplete batch, and their outputs are dropped. If an output has no rows, such
        as a tuple, the first such output is returned unchanged, so that the caller can raise an error.
        """
        short = -len(x) % self.size
        filled = torch.cat((x, x[-1:].expand(short, *x.shape[1:]))) if short else x
        pieces = (filled,) if self.multiples else torch.split(filled, self.size)
        outputs = [net(piece) for piece in pieces]
        for output in outputs:
            if not isinstance(output, Tensor) or not output.dim():
                foreign: Tensor = output
                return foreign
        return torch.cat(outputs)[: len(x)]


EVERY = Batches(1, multiples=True)
"""any number of rows; declared for a model that is known to accept all batch sizes, so that they are not tested"""

_TRIED = (*range(1, 13), 16, 20, 25, 32, 50, 64, 100, 128, 200, 256)
"""batch sizes that are tested before a network counts as accepting none"""

_INPUT_NAMES = ("pixel_values", "input_values")
"""parameters for images and signals in the models of Hugging Face; multimodal ones have ids of tokens before them"""

_NAMED = 3
"""Largest number of weights that a message names."""

_FUNCTION_OF_DETECTOR = (
    "import torch",
    "def largest(box): return torch.zeros(91).scatter_reduce(0, box['labels'], box['scores'], 'amax')",
    "def scores(x): return torch.stack([largest(box) for box in net([*x])])",
)
"""code for a detector of torchvision, which returns boxes with labels and scores for each image"""

IN_PLACE = "the model changes its input in place, so it is given a copy each time"
"""note in the evidence about a `Classifier` with `rewrites`"""

_NO_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU, MPS: of the driver or the allocator
    "can't allocate memory",  # DefaultCPUAllocator; the next one is its text on Windows
    "not enough memory",
    "bad_alloc",
    "status_alloc_failed",  # cuBLAS, cuDNN to 8, cuSOLVER, cuSPARSE
    "allocation_failed",  # cuDNN from 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "cufft_alloc_failed",
    "out_of_device_memory",  # level zero, under XPU
)
"""parts of the messages, in lower case, with which torch and its libraries report missing memory"""


class Classifier(nn.Module):
    """A network with its range of valid inputs and its preprocessing, which computes `net((x - mean) / std)`.

    `mean` and `std` have one number for each channel (or each feature of a table). `access` is the largest access that
    the model can give: a file that runs without gradients has "scores", and `hides` is the reason; `failing` is true if
    the reason is an error in the backward pass of the network, and `cut` if no gradient reaches the input. `batches`
    are the batch sizes that the network accepts, if it rejects some. `output` declares what the network returns:
    logits, or probabilities, whose logarithms are the logits. If the network returns one number for each example, it
    becomes two classes: a logit z becomes (0, z), a probability p becomes (log(1 - p), log(p)). Without `output`, a
    single number is interpreted as a logit once a value outside [0, 1] has occurred; before that, `UnclearOutput` is
    raised. `layout` is the layout of the network's input if known: with "hwc", images (n, channels, height, width) are
    passed with the channels last. `class_labels` are the labels of the classes in the data, in the order of the
    outputs, if they are whole numbers other than 0, 1, 2, … `feature_names` are the columns of the table that the model
    was fitted on.
    `units` are the units of the inputs, if they are not the values of the data.
    `input_name` is the parameter of the network for its inputs, if it is not the first.
    `rejects` is true for the result of `with_detector`, whose last logit is not a class. The network returns a float
    tensor (n, classes), or an object or mapping with such a tensor as `logits`; in training mode it may return a tuple,
    whose first element is used (`logits_of`). Raises `TargetError` for other outputs.
    """

    class_labels: tuple[int, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    units: "Units | None" = None
    fixed: Tensor | None = None
    """features (truth values) that attacks do not change, such as further inputs of a file; None if there are none"""
    inputs: Mapping[str, int] | None = None
    """number of features of each input of a file with several inputs, whose values are one after another"""
    task: "Task | None" = None
    """what the network returns, if it is not one score for each class; its outputs then have a shape of their own"""

    def __init__(
        self,
        net: nn.Module | Callable[[Tensor], Tensor],
        *,
        bounds: Bounds | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: int | None = None,
        access: Access = "gradients",
        batches: Batches | None = None,
        output: OutputKind | None = None,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.input_name = parameter_of(net, _INPUT_NAMES)
        self.output = output
        self.layout = layout
        self.remote = False
        self.class_names: tuple[str, ...] | None = None
        self.bounds = bounds or Bounds()
        self.classes = classes
        self.access: Access = access
        self.batches = batches
        self.rewrites = False
        self.rejects = isinstance(net, Guarded)
        self.hides = ""
        self.failing = False
        self.cut = False
        self._accepted: int | None = None
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", None if mean is None else torch.tensor(mean), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std), persistent=False)
        if self.rejects and output is not None:
            raise UsageError(
                f"the output {output} was declared for a guarded network; declare that of the network inside: "
                f"with_detector(net, detector, threshold, output={output!r})"
            )
        if std is not None and not all(s > 0 for s in std):
            raise TargetError(f"std is {list(std)}; every entry must be positive, as in 0.2470,0.2435,0.2616")

    def renormalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "Classifier":
        """Return a classifier with the same network and declarations, but with other values of `mean` and `std`."""
        classifier = Classifier(
            self.net,
            bounds=self.bounds,
            mean=mean,
            std=std,
            classes=self.classes,
            access=self.access,
            batches=self.batches,
            output=self.output,
            layout=self.layout,
        )
        classifier.remote, classifier.rewrites, classifier.units = self.remote, self.rewrites, self.units
        classifier.input_name, classifier.fixed, classifier.inputs = self.input_name, self.fixed, self.inputs
        classifier.task = self.task
        return classifier

    @property
    def attacked_bounds(self) -> Bounds:
        """Lowest and highest valid values of the features that attacks may change."""
        if self.fixed is None:
            return self.bounds
        low, high = (
            torch.as_tensor(side).expand(self.fixed.shape) for side in (self.bounds.low, self.bounds.high)
        )
        return Bounds(low[~self.fixed], high[~self.fixed])

    def _advice(self, x: Inputs) -> tuple[str, tuple[Remedy, ...]]:
        n, weight = len(x), next(self.parameters(), x)
        if weight.is_floating_point() and weight.dtype != x.dtype:
            weight_type, input_type = (str(kind).removeprefix("torch.") for kind in (weight.dtype, x.dtype))
            way_out = (
                f"Its weights are {weight_type} and the inputs {input_type}: give net.to({x.dtype}), or a network "
                f"whose forward begins with x = x.to({weight.dtype})"
            )
            return way_out, ()
        if self._accepted is None:
            return f"Check the shape, the data type, and the normalisation (mean and std){self._tokens()}", ()
        accepted = "1 example" if self._accepted == 1 else f"{self._accepted} examples"
        if n > self._accepted and self._answers_in_pieces(x, self._accepted):
            smaller = Remedy("batch_size", self._accepted, reason="because it accepts no larger batch")
            return f"It accepted {accepted} before", (smaller,)
        way_out = (
            f"It accepted {accepted} before, so its code fails for some of these inputs: return logits for every "
            "input inside the bounds. If it rejects inputs on purpose, remove this check and give it as a detector to "
            "holdfast.with_detector(net, detector, threshold), which counts rejected inputs"
        )
        return way_out, ()

    def _answers_in_pieces(self, x: Inputs, size: int) -> bool:
        """Return whether the network accepts all inputs in batches of at most `size`."""
        try:
            with torch.no_grad():
                for start in range(0, len(x), size):
                    self._outputs(self.preprocess(x[start : start + size]))
        except Exception:  # noqa: BLE001 - the code of a user may raise anything
            return False
        return True

    def _tokens(self) -> str:
        """Return a sentence about ids of tokens for a network with an embedding, which may expect them as inputs."""
        if not any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in self.modules()):
            return ""
        return (
            ". It has an embedding: a network whose inputs are ids of tokens is not supported, because attacks change "
            "numbers by small amounts; give a function from a list of strings to scores, which calls the tokenizer and "
            "the network, with a threat on texts such as text:edits=2,words=3, or a function from a list of bytes, "
            "with a threat on files such as bytes:change=16"
        )

    def preprocess(self, x: Inputs) -> Tensor:
        """Return the normalised inputs `(x - mean) / std`, in the order of dimensions that the network expects."""
        if self.mean is not None:
            x = x - per_channel(self.mean, x)
        if self.std is not None:
            x = x / per_channel(self.std, x)
        if self.units is not None and self.units.exact:
            x = x.float()  # removes the rounding errors of the change of variables
        return x.movedim(1, -1) if self.layout == "hwc" and x.dim() > 3 else x

    def forward(self, x: Inputs, ids: Ids | None = None) -> Outputs:
        """Return the logits (n, classes) of the inputs `x`, or the outputs of another task, in the data type of `x`.
        They have no gradient if the model gives no access to it.
        """
        x = x if self.access == "gradients" else x.detach()
        try:
            inputs = self.preprocess(x.clone() if self.rewrites else x)
            logits = (
                self._outputs(inputs) if self.batches is None else self.batches.through(self._outputs, inputs)
            )
        except (torch.OutOfMemoryError, MemoryError, HoldfastError):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            advice, remedies = self._advice(x)
            text = f"{type(error).__name__} on inputs of shape {tuple(x.shape)}: {str(error).rstrip('.')}"
            raise TargetError(f"the model raised {text}. {advice}", *remedies) from error
        self._accepted = len(x)
        if self.task is not None:
            assert isinstance(logits, Tensor)  # the task has read them
            return logits.to(x.device, x.dtype)
        if not isinstance(logits, Tensor):
            raise _no_logits(logits, training=isinstance(self.net, nn.Module) and self.net.training)
        if logits.dim() not in (1, 2) or len(logits) != len(x) or not logits.is_floating_point():
            raise TargetError(
                f"the model returned {logits.dtype} of shape {tuple(logits.shape)} for {len(x)} inputs; "
                f"it must return float logits of shape ({len(x)}, classes)"
            )
        logits = self._of_classes(logits)
        classes = logits.shape[1] - self.rejects
        if self.classes is not None and classes != self.classes:
            raise TargetError(
                f"the model returned {classes} classes, but {self.classes} were declared; correct the declaration or "
                "the model's last layer",
                model_argument("classes", classes),
            )
        return logits.to(x.device, x.dtype)  # `to(x)` would look like an operation on the inputs

    def _outputs(self, x: Tensor) -> object:
        net: Callable[..., object] = self.net
        outputs = net(x) if self.input_name is None else net(**{self.input_name: x})
        if self.task is not None:
            return self.task.read(outputs, x.movedim(-1, 1) if self.layout == "hwc" and x.dim() > 3 else x)
        return logits_of(outputs, in_training=isinstance(self.net, nn.Module) and self.net.training)

    def _of_classes(self, outputs: Tensor) -> Logits:
        if self.rejects:
            return outputs
        scores = outputs
        if self.remote and outputs.dim() == 2:  # a served model marks inputs that it refuses
            answered = ~refused(outputs)
            scores = outputs[answered]
        if is_single(scores) and len(scores):
            self.output = kind_of_single(scores, self.output)
        logits = of_classes(scores, self.output)
        if len(scores) == len(outputs):
            return logits
        marked = logits.new_full((len(outputs), logits.shape[1]), REFUSED)
        marked[answered] = logits
        return marked


def _no_logits(outputs: object, *, training: bool) -> NoLogits:
    """Return the error for outputs of a network that are no tensor."""
    kind, code = type(outputs), tuple[str, ...]()
    name = f"{'' if kind.__module__ == 'builtins' else f'{kind.__module__}.'}{kind.__qualname__}"
    way_out = "Wrap it in a function that returns the logits only, as in lambda x: net(x)[0]"
    if training:
        way_out = "Return the logits only in training mode as well"
    if isinstance(outputs, nn.Module):
        way_out = "If the model is a function that builds a network, give the network that it returns"
    if isinstance(outputs, list) and outputs and isinstance(outputs[0], Mapping):
        way_out = (
            "For a detector, assess, certify and explain have the task detection (--task detection). Elsewhere, "
            "write a function that returns the largest score of each class over the boxes, here of 91 classes, and "
            "give it in place of net"
        )
        code = _FUNCTION_OF_DETECTOR
    return NoLogits(
        f"the model returned {with_article(name)}{' in training mode' if training else ''}; it must return "
        f"one tensor of logits (n, classes). {way_out}"
    ).with_code(*code)


def parameter_of(net: object, names: Sequence[str]) -> str | None:
    """Return the first of the names that is a parameter of the forward function of a network after the first
    parameter. A value for such a parameter is passed by its name. Return None if there is none.
    """
    if not isinstance(net, nn.Module):
        return None
    try:
        parameters = list(inspect.signature(net.forward).parameters)[1:]
    except (TypeError, ValueError):  # no signature is known, as of some compiled functions
        return None
    return next((name for name in names if name in parameters), None)


def refuse_lazy(net: nn.Module) -> None:
    """Raise `TargetError` if weights of a network have no values, because its lazy layers were never called, or the
    weights are on the device meta.
    """
    meta = [name for name, value in (*net.named_parameters(), *net.named_buffers()) if value.is_meta]
    if meta:
        shown = f"{', '.join(meta[:_NAMED])}{', …' if len(meta) > _NAMED else ''}"
        raise TargetError(
            f"{len(meta)} weights are on the device meta, which has shapes and no values: {shown}; load the weights "
            "before you pass the network, as in net.load_state_dict(weights, assign=True)"
        )
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            raise TargetError(
                f"{name} is {type(value).__name__}: a lazy layer has no weights before its first input; call the "
                "network on a batch before you pass it, as in net(x[:2])"
            )


@contextmanager
def evaluating(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """Context manager inside which a model is in eval mode and, with `frozen`, its weights require no gradient. Both
    are restored on exit, also after an error, since the model belongs to the caller.
    """
    # a frozen script module has no mode
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]
    weights = [(weight, weight.requires_grad) for weight in model.parameters() if frozen]
    try:
        model.eval()
        for weight, _ in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, trained in weights:
            weight.requires_grad_(trained)


@contextmanager
def fitted(model: Classifier, x: Inputs) -> Iterator[None]:
    """Context manager that finds by tests on inputs like `x` which batch sizes a model accepts and whether it changes
    inputs in place, and resets these settings on exit.
    """
    settings = model.batches, model.rewrites
    try:
        model.batches = model.batches or _batches(model, x)
        n = 1 if model.batches is None else model.batches.size
        model.rewrites = model.rewrites or rewrites(model, x[torch.arange(n, device=x.device) % len(x)])
        yield
    finally:
        model.batches, model.rewrites = settings


def rewrites(model: Classifier, x: Inputs) -> bool:
    """Return whether a model changes its inputs in place, by a test on a copy of `x`."""
    rows = x.clone()
    version = rows._version
    try:
        with torch.no_grad():
            model(rows)
    except (TargetLost, InputRefused):  # a server would reject further rows as well
        raise
    except (TargetError, RuntimeError, MemoryError):
        pass  # the next call raises it again
    # numpy and `.data` do not change the version, and an operation in place may leave the values unchanged
    return rows._version != version or not torch.equal(rows.nan_to_num(), x.nan_to_num())


def _batches(model: Classifier, x: Inputs) -> Batches | None:
    """The smallest batch size that the model accepts; None if it accepts all, or none of those that are tested."""
    for size in _TRIED:
        if _accepts(model, x, size):
            multiples = _accepts(model, x, 2 * size) and _accepts(model, x, 3 * size)
            return None if size == 1 and multiples else Batches(size, multiples)
    return None


def _accepts(model: Classifier, x: Inputs, n: int) -> bool:
    try:
        with torch.no_grad():
            model(x[torch.arange(n, device=x.device) % len(x)])
    except TargetLost:
        raise
    except UnclearOutput:  # the batch was accepted; the meaning of the outputs is checked elsewhere
        return True
    except TargetError:
        return False
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error was raised because memory ran out, on the CPU or on any accelerator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in message for phrase in _NO_MEMORY)


@contextmanager
def raising(
    function: str, when: str = "", advice: str = "", kind: type[TargetError] = FunctionRaised
) -> Iterator[None]:
    """Context manager that raises `kind` for an exception of a function of the user. `function` and `when` describe the
    call in the message, as in "the function augment" and "in the first update".

    Errors of Holdfast and those of memory are raised unchanged.
    """
    try:
        yield
    except Exception as error:  # the user's code may raise anything
        if isinstance(error, HoldfastError) or out_of_memory(error):
            raise
        place = when and f" {when}"
        raise kind(
            f"{function} raised {type(error).__name__}{place}: {error}{advice and f'; {advice}'}"
        ) from error


@dataclass(frozen=True)
class Units:
    """Change of variables from the values of features to multiples of a unit above the lowest valid value.

    Inside a run, inputs are `(x - low) / size`, so that attacks, certificates and distances are in units. A feature
    whose unit has the size 0 has equal lowest and highest values, and does not change.
    """

    low: tuple[float, ...]
    """lowest valid value of each feature, or of all"""
    high: tuple[float, ...]
    """highest valid value of each feature, or of all"""
    size: tuple[float, ...]
    """size of the unit of each feature, or of all"""
    exact: bool
    """whether inputs are float64, so that the model gets exactly the values of the data, as thresholds of trees need"""
    text: str = field(default="", repr=False, compare=False)
    """the unit in the syntax of a threat, as in `range`"""

    @property
    def normalisation(self) -> Normalisation:
        """The change of variables as a normalisation of inputs in units, which the model applies."""
        sizes = self._sizes()
        mean = tuple(-low / size for low, size in zip(self.low, sizes, strict=True))
        return Normalisation(mean, tuple(1 / size for size in sizes))

    @property
    def bounds(self) -> Bounds:
        """Range of valid inputs in units."""
        sides = zip(self.low, self.high, self._sizes(), strict=True)
        widths = [(high - low) / size for low, high, size in sides]
        if len(set(widths)) == 1:
            return Bounds(0.0, widths[0])
        return Bounds(torch.zeros(len(widths)), torch.tensor(widths))

    @property
    def values(self) -> Bounds:
        """Range of valid values of the features."""
        if len(self.low) == 1:
            return Bounds(self.low[0], self.high[0])
        return Bounds(torch.tensor(self.low), torch.tensor(self.high))

    def _sizes(self) -> tuple[float, ...]:
        return tuple(size or 1.0 for size in self.size)

    def apply(self, model: Classifier) -> None:
        """Change a model of values to one of inputs in units. Its own normalisation is applied afterwards."""
        normalisation, dtype = self.normalisation, torch.float64
        mean, std = (torch.tensor(side, dtype=dtype) for side in (normalisation.mean, normalisation.std))
        own_mean = 0.0 if model.mean is None else model.mean.to(dtype)
        own_std = 1.0 if model.std is None else model.std.to(dtype)
        model.mean, model.std = mean + own_mean * std, own_std * std
        model.bounds, model.units = self.bounds, self

    def normalisation_of_values(self, model: Classifier) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean and the standard deviation that a model of inputs in units applies to values; None for 0
        and 1.
        """
        assert model.mean is not None and model.std is not None
        sides, device = self.normalisation, model.mean.device
        mean, std = (
            torch.tensor(side, dtype=torch.float64, device=device) for side in (sides.mean, sides.std)
        )
        own_mean, own_std = ((model.mean - mean) / std).float(), (model.std / std).float()
        return (own_mean if own_mean.any() else None), (own_std if (own_std != 1).any() else None)

    def undo(self, model: Classifier) -> None:
        """Change a model of inputs in units to one of values: the inverse of `apply`."""
        model.mean, model.std = self.normalisation_of_values(model)
        model.bounds, model.units = self.values, None


def of_values(model: Classifier) -> Classifier:
    """Return the model of the values of features for a model whose inputs may be in units, which is not changed."""
    if model.units is None:
        return model
    copied = deepcopy(model)
    model.units.undo(copied)
    return copied
