"""Calls a model on a few examples to determine its layout, classes and outputs, and estimates ranges from values."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.images import inner
from holdfast.core.batch import Data
from holdfast.core.errors import (
    HoldfastError,
    NoLogits,
    Placeholder,
    Remedy,
    TargetError,
    TargetLost,
    UnclearOutput,
    data_argument,
)
from holdfast.core.model import Bounds, Classifier, Normalisation, evaluating, fitted, out_of_memory
from holdfast.core.training import CUTS
from holdfast.core.types import Layout, Outputs
from holdfast.io.models.estimators import Estimator

NORMALISATIONS = {
    "MNIST's": ((0.1307,), (0.3081,)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "the half-half": ((0.5,), (0.5,)),
}
"""Common means and standard deviations, by data set."""
BYTES = Remedy(
    "bounds", (0, 255), reason="if the model was trained on values from 0 to 255 (eps is then on that scale)"
)
"""bounds of a model whose inputs are bytes"""
_ROUNDING = 1e-6  # share of the range that a value may be outside the bounds, as float32 rounds
_FEWEST_LEVELS = 2  # a smaller largest value is more likely an outlier of values in [0, 1]
_NEAR_255 = 128  # bytes of real images are rarely all in the lower half of their range


def outside(x: Tensor, bounds: Bounds) -> Tensor:
    """Return the mask of the values of `x` that are outside the bounds by more than rounding."""
    low, high = bounds.like(x)
    slack = _ROUNDING * (high - low)
    return (x < low - slack) | (x > high + slack)


def pixel_divisor(lowest: float, highest: float, dims: int) -> float | None:
    """Return the divisor that scales pixel values to [0, 1], or None if the values are probably not pixels.

    `lowest` and `highest` are the extreme values of an array with `dims` axes. If the largest value is between 128 and
    255, the divisor is 255; otherwise it is the largest value. Values of a table, which has two axes, are pixels only
    if the largest is exactly 255.
    """
    if lowest < 0 or highest < _FEWEST_LEVELS or (dims <= 2 and highest != 255):
        return None
    return 255.0 if _NEAR_255 < highest <= 255 else highest


def as_in_training(lowest: float, highest: float, dims: int) -> str:
    """Return advice for an error message to scale the inputs as in training, with an example if the values may be
    pixels.
    """
    divisor = pixel_divisor(lowest, highest, dims)
    example = "" if divisor is None else f", as in x / {divisor:g} for values from 0 to {divisor:g}"
    return f"scale {'the features' if dims == 2 else 'them'} as in training{example}"


def before_normalisation(mean_std: str = "") -> Remedy:
    """Return the declaration that data were normalised, with an example of its value."""
    reason = "with the values of your training, if they were normalised before"
    return Remedy(
        "data_normalised",
        Placeholder("MEAN/STD", "(mean, std)"),
        reason=f"{reason}{mean_std} (eps is then in the units before the normalisation)",
    )


def range_of_training(low: float, high: float, whence: str = "the range of these inputs") -> Remedy:
    """Return the bounds that contain the data, which are an estimate of the range on which the model was trained."""
    return Remedy(
        "bounds",
        (_rounded(low, math.floor), _rounded(high, math.ceil)),
        reason=f"({whence}; use the limits of your training; eps is then in the units of the data)",
    )


def _rounded(number: float, towards: Callable[[float], int]) -> float:
    """Return a number with about six digits, which is rounded by `towards` so that the bounds contain it. An integer
    remains one.
    """
    if not number:
        return 0
    digits = 5 - math.floor(math.log10(abs(number)))
    scale: float = 10.0 ** abs(digits)
    rounded = towards(number * scale) / scale if digits > 0 else towards(number / scale) * scale
    return int(rounded) if rounded.is_integer() else rounded


def extremes(x: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value that is present; NaN is a missing value. Both are 0 if all are missing.

    >>> import torch
    >>> extremes(torch.tensor([2.0, torch.nan, 1.0])), extremes(torch.tensor([torch.nan]))
    ((1.0, 2.0), (0.0, 0.0))
    """
    present = x[~x.isnan()]
    return (float(present.min()), float(present.max())) if len(present) else (0.0, 0.0)


def scaling(x: Tensor) -> tuple[str, tuple[Remedy, ...]]:
    """Return advice and remedies for inputs outside the bounds. They mark numbers that are derived from the data alone
    as estimates.
    """
    low, high = extremes(x)
    advice = as_in_training(low, high, x.dim())
    estimates = [
        f"{name} values, {Normalisation(mean, std)}, would undo it"
        for name, (mean, std) in NORMALISATIONS.items()
        if len(mean) in (1, x.shape[1]) and _are_pixels(Normalisation(mean, std).undone(x))
    ]
    guess = f" (an estimate: {'; '.join(estimates)})" if estimates else ""
    whence = f"an estimate from {len(x)} examples"
    return advice, (before_normalisation(guess), range_of_training(low, high, whence))


def _are_pixels(x: Tensor) -> bool:
    """Return whether the values lie in [0, 1] and cover most of it."""
    low, high = extremes(x)
    return -1e-3 <= low <= 0.05 and 0.95 <= high <= 1 + 1e-3


_ROWS = 2
"""Number of examples with which a shape is tested; a single row might be treated as an image without a batch axis."""
_SEARCHED = 2048
"""Number of examples that are searched for an output outside [0, 1]."""
_CHUNK, _VALUES = 256, 1 << 26
"""Largest number of examples, and largest number of their values, that are processed at a time."""
_COMPARED = 512
"""Number of examples whose scores are compared with the labels that an estimator predicts."""
HWC_NOTE = "the network has its channels last; its inputs are transposed inside the model"
"""Note for a `Classifier` whose layout was found to be hwc."""

NO_GRADIENT = (
    "no gradient reaches the input, so gradient-based attacks stay near their starting points, and the robust accuracy "
    f"is not meaningful; remove the operations that interrupt it ({CUTS}), or use the suite black-box, which needs "
    "only scores"
)
"""Note for a model whose outputs have no computation graph, if an attack needs gradients."""


class ProbedClassifier:
    """Wrapper that computes test outputs of a classifier in eval mode, without gradients, and restores its state
    afterwards.

    The random numbers of a randomised network start from a fixed seed, so that equal inputs have equal outputs.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.own = inner(model)
        """the classifier without the transformations that wrap it"""
        self.classes = model.classes
        """number of classes of the network; None before its first outputs"""
        self.refused: TargetError | None = None
        """error of the network for the last inputs that it rejected"""

    def outputs(self, x: Tensor, layout: Layout | None = None, *, whole: bool = False) -> Outputs | None:
        """Return the logits of the inputs `x` (n, *features) if the network has the given layout, or None if the
        network rejects the inputs. Raises `NoLogits` if it accepts them and returns something else.

        If `whole` is True, all rows are passed at once, else in batches of a size that the network accepts. Outputs
        that may be logits or probabilities are treated as logits.
        """
        own = self.own
        saved = own.layout, own.output
        own.layout = layout or saved[0]
        try:
            logits = self._logits(x, whole=whole)
        except (TargetLost, NoLogits):
            raise
        except TargetError as error:
            self.refused = error
            return None
        except (RuntimeError, MemoryError) as error:
            if not whole:
                raise
            self.refused = TargetError(str(error))
            return None
        finally:
            own.layout, own.output = saved
        self.classes = logits.shape[1] - self.model.rejects
        return logits

    def _logits(self, x: Tensor, *, whole: bool) -> Outputs:
        try:
            return _forwarded(self.model, x, whole=whole)
        except UnclearOutput:
            self.own.output = "logit"
            return _forwarded(self.model, x, whole=whole)

    def suit(self, x: Tensor) -> tuple[str, ...]:
        """Detect a network that accepts images only with the channels last, and set its layout. Return a note for the
        report if the layout was set.

        `x` contains examples as the data set returns them. Networks behind a server are not called, because queries may
        cost money. Raises `TargetError` if the network accepts the examples only with another order of the axes or with
        an axis for one channel.
        """
        if self.model.remote:
            return ()
        rows = x[torch.arange(_ROWS) % len(x)]
        if self.outputs(rows) is not None:
            return ()
        refused = self.refused
        if self.own.layout is None and x.dim() >= 4 and self.outputs(rows, "hwc") is not None:
            self.own.layout = "hwc"
            return (HWC_NOTE,)
        if x.dim() > 3 and self.outputs(rows.movedim(-1, 1)) is not None:
            raise TargetError(
                f"the model rejects an example of shape {tuple(x.shape[1:])} and accepts one with its last axis first",
                data_argument("layout", "hwc"),
            )
        if x.dim() in (2, 3, 4) and self.outputs(rows[:, None]) is not None:
            raise TargetError(
                f"the model rejects an example of shape {tuple(x.shape[1:])} and accepts one of shape "
                f"{(1, *x.shape[1:])}: insert an axis for one channel in the data, as in x[:, None], or in the network"
            )
        self.refused = refused
        return ()

    def handles_missing(self, x: Tensor) -> bool:
        """Return whether the outputs of the network are finite for the inputs `x`, some values of which are NaN."""
        logits = self.outputs(x)
        return logits is not None and bool(logits.isfinite().all())

    def takes_ids(self, x: Tensor) -> bool:
        """Return whether the network rejects the rows `x` (n, features) and accepts whole numbers, because its inputs
        are the numbers of the entries of an embedding.
        """
        net = self.own.net
        if self.model.remote or not (isinstance(net, nn.Module) and any(map(_is_embedding, net.modules()))):
            return False
        if self.outputs(x[torch.arange(_ROWS) % len(x)]) is not None:
            return False
        weight = next(net.parameters(), x)
        with _evaluating(self.model), suppress(Exception):  # the code of the network may raise anything
            net(torch.zeros(_ROWS, x.shape[1], dtype=torch.int64, device=weight.device))
            return True
        return False

    def needs_grey(self, x: Tensor) -> bool:
        """Return whether the network rejects the colour images `x` (n, 3, height, width) and accepts one of their
        channels.
        """
        if self.model.remote:
            return False
        rows = x[torch.arange(_ROWS) % len(x)]

        def accepts(images: Tensor) -> bool:
            return self.outputs(images) is not None or self.outputs(images, "hwc") is not None

        return not accepts(rows) and accepts(rows[:, :1])


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def settle_output(model: Classifier, data: Data) -> None:
    """Determine whether a model with one output per example returns a logit or a probability. An output outside [0, 1]
    proves that it is a logit.

    Raises `UnclearOutput` if no example has such a value. Cost: forward passes of at most 2048 examples, until one is
    found; of two examples for a model with an output for each class. A model whose outputs are declared, or that is
    behind a server, is not called.
    """
    if inner(model).output is not None or model.remote or model.rejects:
        return
    unclear: UnclearOutput | None = None
    chunk = max(1, min(_CHUNK, _VALUES // max(1, data.read(0, 1).x.numel()))) if len(data) else _CHUNK
    for start in (0, *range(_ROWS, min(len(data), _SEARCHED), chunk)):
        stop = _ROWS if start == 0 else start + chunk
        try:
            _forwarded(model, data.read(start, min(stop, len(data))).x)
        except UnclearOutput as error:
            unclear = error
        except TargetLost:
            raise
        except (TargetError, RuntimeError, MemoryError):
            return  # raised again by the run, with advice
        else:
            return
    if unclear is not None:
        raise unclear


def settle_predictions(model: Classifier, data: Data) -> tuple[str, ...]:
    """Compare the class with the largest score of an estimator with the class that it predicts. Return a note for the
    report if they differ.

    Cost: the scores and the labels of at most 1,024 rows. Models other than estimators are not called.
    """
    classifier = inner(model)
    if not isinstance(classifier.net, Estimator) or not len(data):
        return ()
    notes = classifier.net.settle(classifier.preprocess(data.read(0, min(_COMPARED, len(data))).x))
    if classifier.net.gives == "labels":
        classifier.access = model.access = "labels"
        if notes:
            classifier.hides = model.hides = (
                f"the scores of {classifier.net.name} are not those of its classes"
            )
    return notes


def settle_gradients(model: Classifier, data: Data) -> tuple[str, ...]:
    """Restrict attacks to the scores of a model whose backward pass raises an error, or which accepts no input that
    requires a gradient. Return a note for the report with the reason.

    Such models are common: an operator without a derivative, a value that is changed in place after it was saved, a
    cuDNN LSTM in eval mode, a function that passes its inputs to numpy or another runtime. If the outputs have no
    graph, the model is marked as `cut`: attacks continue, and the doubt `zero-gradient` is raised. Cost: one forward
    and one backward pass of two examples.
    """
    if model.access != "gradients" or model.remote or not len(data):
        return ()
    weight = next(model.parameters(), None)
    rows = data.read(0, min(_ROWS, len(data))).x
    x = (rows if weight is None else rows.to(weight.device)).clone().requires_grad_()
    with _evaluating(model), torch.enable_grad():
        try:
            logits = model(x)
        except TargetLost:
            raise
        except TargetError as error:
            if not _accepts(model, x.detach()):
                return ()  # raised again by the run, with advice
            return _of_scores(model, refused_gradient(error))
        except (HoldfastError, RuntimeError, MemoryError):
            return ()  # raised again by the run, with advice
        if not logits.requires_grad:
            model.cut = True
            return ()
        try:
            grad = cast("Tensor | None", torch.autograd.grad(logits.sum(), x, allow_unused=True)[0])
        except RuntimeError as error:
            if out_of_memory(error):
                return ()
            model.failing = True
            return _of_scores(model, f"its backward pass raises {_first_line(error)}")
    model.cut = grad is None
    return ()


def _accepts(model: Classifier, x: Tensor) -> bool:
    """Whether a model returns logits for inputs that require no gradient."""
    try:
        with torch.no_grad():
            model(x)
    except (HoldfastError, RuntimeError, MemoryError):
        return False
    return True


def _of_scores(model: Classifier, reason: str) -> tuple[str, ...]:
    """Restrict attacks to the scores of a model, and return a note with the reason."""
    model.access, model.hides = "scores", reason
    return (f"attacks use only the scores of the model, because {reason}",)


def refused_gradient(error: TargetError) -> str:
    """Return in words why a model accepts no input that requires a gradient, from the error that it raises."""
    return f"an input that requires a gradient raises {_first_line(error.__cause__ or error)}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.')}"


def _forwarded(model: Classifier, x: Tensor, *, whole: bool = False) -> Outputs:
    """Return the logits of `x` on the CPU.

    If the network rejects all rows at once and `whole` is False, they are computed in batches of a size that it
    accepts.
    """
    weight = next(model.parameters(), None)
    rows = x if weight is None else x.to(weight.device)
    with _evaluating(model):
        try:
            # Cloned, because a network may change its inputs in place, and the rows are used again below.
            logits: Outputs = model(rows.clone())
            return logits.cpu()
        except (TargetLost, UnclearOutput):
            raise
        except (TargetError, RuntimeError, MemoryError) as error:
            if whole or model.remote or not (isinstance(error, TargetError) or out_of_memory(error)):
                raise
        with fitted(model, rows[:1]):
            logits = model(rows.clone())
        return logits.cpu()


@contextmanager
def _evaluating(model: Classifier) -> Iterator[None]:
    """Context manager that sets the model to eval mode without gradients, and restores its mode and torch's
    generators.
    """
    # The random state of the user is restored, so that a probe does not change the numbers of later draws.
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield
