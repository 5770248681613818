"""What is attacked: a callable from inputs inside `bounds` to logits, its preprocessing declared and differentiable."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from holdfast.core.errors import (
    HoldfastError,
    InputRefused,
    TargetError,
    TargetLost,
    UnclearOutput,
    UsageError,
)
from holdfast.core.guard import Guarded
from holdfast.core.normalisation import per_channel
from holdfast.core.outputs import REFUSED, OutputKind, is_single, kind_of_single, of_classes, refused
from holdfast.core.types import Access, Ids, Inputs, Layout, Logits

VOTES = 20
"""Draws of a randomised model that decide whether an example stands; as many fresh ones judge it."""


@dataclass(frozen=True)
class Bounds:
    """The box that inputs live in; each side a number, or a tensor with one entry a feature."""

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def clamp(self, x: Inputs, *, out: Tensor | None = None) -> Inputs:
        """The nearest point of the box; in `out` if it is given, which may be `x`."""
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            low, high = self.like(x)
            return torch.clamp(x, low, high, out=out)
        return torch.clamp(x, self.low, self.high, out=out)

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides as tensors with the device and type of `x`, ready to broadcast against it."""
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        return low.to(x.device, x.dtype), high.to(x.device, x.dtype)

    @property
    def width(self) -> float:
        """The longest edge of the box."""
        return float((torch.as_tensor(self.high) - torch.as_tensor(self.low)).max())


@runtime_checkable
class Model(Protocol):
    """A classifier as an attacker meets it.

    `ids` names the rows of `x`, so that a metered model can book the queries; a model that does not meter ignores it.
    """

    @property
    def bounds(self) -> Bounds:
        """The box that `x` lies in."""

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Logits (n, classes) of the inputs `x` (n, *features)."""


@dataclass(frozen=True)
class Batches:
    """The batches that a network takes: of `size` rows, or of any multiple of it."""

    size: int
    multiples: bool = False

    @property
    def says(self) -> str:
        """What a reader of the evidence must know."""
        if not self.multiples:
            return f"the model takes batches of {self.size} only; others are cut and filled up"
        how = f"filled up to a multiple of {self.size} with copies of its last example, whose outputs are dropped"
        return f"the model refuses some batch sizes; each batch is {how}"

    def through(self, net: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """Outputs of all rows: the last one is repeated until the batch fits, and what comes of the copies is cut.

        The first output that has no rows, such as a tuple, is returned as it is, for the caller to name.
        """
        short = -len(x) % self.size
        filled = torch.cat((x, x[-1:].expand(short, *x.shape[1:]))) if short else x
        parts = (filled,) if self.multiples else torch.split(filled, self.size)
        outputs = [net(part) for part in parts]
        for output in outputs:
            if not isinstance(output, Tensor) or not output.dim():
                foreign: Tensor = output
                return foreign
        return torch.cat(outputs)[: len(x)]


EVERY = Batches(1, multiples=True)
"""Those of a model that is known to take any number of rows, so that it is not asked which."""

_TRIED = (*range(1, 13), 16, 20, 25, 32, 50, 64, 100, 128, 200, 256)
"""numbers of rows that a network is asked for before it is said to take none"""

IN_PLACE = "the model changes its input in place, so it is given a copy each time"
"""what is said of a `Classifier` with `rewrites`"""

_NO_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU, MPS: the driver's or the allocator's
    "can't allocate memory",  # DefaultCPUAllocator, and on Windows:
    "not enough memory",
    "bad_alloc",
    "status_alloc_failed",  # cuBLAS, cuDNN to 8, cuSOLVER, cuSPARSE
    "allocation_failed",  # cuDNN from 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "cufft_alloc_failed",
    "out_of_device_memory",  # level zero, under XPU
)
"""how torch and the libraries under it say in a `RuntimeError`, in small letters, that memory ran out"""

_CALLS_NUMPY = "call numpy() on Tensor that requires grad"
_NO_GRADIENT = (
    "No gradient passes through numpy, so let the attacks see scores alone: "
    'a threat such as "linf:8/255,access=scores" and the suite "black-box"'
)


class Classifier(nn.Module):
    """A network with its bounds and its preprocessing: `net((x - mean) / std)`.

    `mean` and `std` hold one number a channel (or a feature, for tables). `access` is the most that the target can
    give: a file served through a runtime without gradients has "scores", and `hides` says why. `batches` are those that
    the network takes, where it refuses some. `output` declares what the network returns: logits, or probabilities,
    whose logarithms are the logits. One output an example becomes two classes: a logit z becomes (0, z), a probability
    p becomes (log(1 - p), log(p)). Without `output` one number an example is a logit once a value outside [0, 1] was
    seen, and raises `UnclearOutput` before. `layout` is the layout of the network's input where that is known: under
    "hwc" images (n, channels, height, width) are given to it with the channels last. `class_labels` are the labels that
    its classes have in the data, in the order of its outputs, where these are whole numbers other than 0, 1, 2, …
    `feature_names` are the columns of a table that it was fitted on. Raises
    `TargetError` when the network does not return a float tensor (n, classes). What `guarded` returned
    `rejects`: its last logit is none of the classes.
    """

    class_labels: tuple[int, ...] | None = None
    feature_names: tuple[str, ...] | None = None

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
        self._took: int | None = None
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", None if mean is None else torch.tensor(mean), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std), persistent=False)
        if self.rejects and output is not None:
            raise UsageError(
                f"the output {output} was declared for a guarded network; declare that of the network inside: "
                f"guarded(net, detector, threshold, output={output!r})"
            )
        if std is not None and not all(s > 0 for s in std):
            raise TargetError(
                f"std is {list(std)}; every entry must be positive, as in --std 0.2470,0.2435,0.2616"
            )

    def renormalised(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "Classifier":
        """The same network, with all that is declared and known of it but other values of `mean` and `std`."""
        other = Classifier(
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
        other.remote, other.rewrites = self.remote, self.rewrites
        return other

    def _advice(self, x: Inputs) -> str:
        n, weight = len(x), next(self.parameters(), x)
        if weight.is_floating_point() and weight.dtype != x.dtype:
            own, given = (str(kind).removeprefix("torch.") for kind in (weight.dtype, x.dtype))
            return (
                f"Its weights are {own} and the inputs {given}: give net.to({x.dtype}), or a network whose forward "
                f"begins with x = x.to({weight.dtype})"
            )
        if self._took is None:
            return "Check the shape, the data type and --mean/--std"
        took = "1 example" if self._took == 1 else f"{self._took} examples"
        if n > self._took:
            return f"It took {took} before: if it takes no more at once, give --batch-size {self._took}"
        return f"It took {took} before, so look at where it failed now, with --debug"

    def preprocess(self, x: Inputs) -> Tensor:
        """`(x - mean) / std`, channel by channel, in the layout that the network takes."""
        if self.mean is not None:
            x = x - per_channel(self.mean, x)
        if self.std is not None:
            x = x / per_channel(self.std, x)
        return x.movedim(1, -1) if self.layout == "hwc" and x.dim() > 3 else x

    def forward(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Logits (n, classes), in the type of `x`."""
        try:
            inputs = self.preprocess(x.clone() if self.rewrites else x)
            logits = self.net(inputs) if self.batches is None else self.batches.through(self.net, inputs)
        except (torch.OutOfMemoryError, MemoryError, HoldfastError):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            advice = _NO_GRADIENT if _CALLS_NUMPY in str(error) else self._advice(x)
            said = f"{type(error).__name__} on inputs of shape {tuple(x.shape)}: {str(error).rstrip('.')}"
            raise TargetError(f"the model raised {said}. {advice}") from error
        self._took = len(x)
        if not isinstance(logits, Tensor):
            kind = type(logits)
            name = f"{'' if kind.__module__ == 'builtins' else f'{kind.__module__}.'}{kind.__qualname__}"
            way_out = "Wrap it in a factory that picks the logits out"
            if name == "numpy.ndarray":
                way_out = f"Return torch.from_numpy(...). {_NO_GRADIENT}"
            raise TargetError(
                f"the model returned a {name}; it must return one tensor of logits (n, classes). {way_out}"
            )
        if logits.dim() not in (1, 2) or len(logits) != len(x) or not logits.is_floating_point():
            raise TargetError(
                f"the model returned {logits.dtype} of shape {tuple(logits.shape)} for {len(x)} inputs; "
                f"it must return float logits of shape ({len(x)}, classes)"
            )
        logits = self._of_classes(logits)
        classes = logits.shape[1] - self.rejects
        if self.classes is not None and classes != self.classes:
            raise TargetError(
                f"the model returned {classes} classes, but {self.classes} were declared; "
                f"correct --classes or the model's last layer"
            )
        return logits.to(x.dtype)

    def _of_classes(self, outputs: Tensor) -> Logits:
        if self.rejects:
            return outputs
        known = outputs
        if self.remote and outputs.dim() == 2:  # a served model marks inputs that it refuses
            answered = ~refused(outputs)
            known = outputs[answered]
        if is_single(known) and len(known):
            self.output = kind_of_single(known, self.output)
        logits = of_classes(known, self.output)
        if len(known) == len(outputs):
            return logits
        marked = logits.new_full((len(outputs), logits.shape[1]), REFUSED)
        marked[answered] = logits
        return marked


def refuse_lazy(net: nn.Module) -> None:
    """`TargetError` for lazy layers that have met no input yet: they have neither sizes nor weights."""
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            raise TargetError(
                f"{name} is {type(value).__name__}: a lazy layer has no weights before it meets an input; run a batch "
                f"through the network before it is given, as in net(x[:2])"
            )


@contextmanager
def fitted(model: Classifier, x: Inputs) -> Iterator[None]:
    """The model as rows like `x` show it: with the `batches` that it takes, and given copies where it rewrites them."""
    before = model.batches, model.rewrites
    try:
        model.batches = model.batches or _batches(model, x)
        n = 1 if model.batches is None else model.batches.size
        model.rewrites = model.rewrites or rewrites(model, x[torch.arange(n, device=x.device) % len(x)])
        yield
    finally:
        model.batches, model.rewrites = before


def rewrites(model: Classifier, x: Inputs) -> bool:
    """Whether the model changes inputs like `x` in place; `x` itself is left as it is."""
    rows = x.clone()
    version = rows._version
    try:
        with torch.no_grad():
            model(rows)
    except (TargetLost, InputRefused):  # a server would be sent more rows, which it refuses as well
        raise
    except (TargetError, RuntimeError, MemoryError):
        pass  # said by whoever asks next
    # numpy and `.data` write without a new version, and an operation in place may leave the values as they are
    return rows._version != version or not torch.equal(rows.nan_to_num(), x.nan_to_num())


def _batches(model: Classifier, x: Inputs) -> Batches | None:
    """The smallest batches that the model takes; None where it takes all, or none of those that are tried."""
    for size in _TRIED:
        if _takes(model, x, size):
            multiples = _takes(model, x, 2 * size) and _takes(model, x, 3 * size)
            return None if size == 1 and multiples else Batches(size, multiples)
    return None


def _takes(model: Classifier, x: Inputs, n: int) -> bool:
    try:
        with torch.no_grad():
            model(x[torch.arange(n, device=x.device) % len(x)])
    except TargetLost:
        raise
    except UnclearOutput:
        return True
    except TargetError:
        return False
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
