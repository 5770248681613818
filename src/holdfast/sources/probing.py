"""A model's outputs on a few examples, which decide a layout and count the classes when data are opened."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from holdfast.core.batch import Data
from holdfast.core.errors import HoldfastError, TargetError, TargetLost, UnclearOutput
from holdfast.core.model import Classifier, fitted, out_of_memory
from holdfast.core.types import Layout, Logits
from holdfast.ops.expectation import inner
from holdfast.ops.refusals import CUTS
from holdfast.sources.estimators import Estimator

_ROWS = 2
"""of a look at the shape: one row may pass for an image without its batch"""
_LOOKED_AT = 2048
"""examples among which an output outside [0, 1] is looked for"""
_CHUNK, _VALUES = 256, 1 << 26
"""examples, and values of them, that are looked at together"""
_COMPARED = 512
"""examples whose scores are compared with the labels that an estimator predicts"""
HWC_NOTE = "the network takes the channels last; its inputs are transposed inside the model"
"""said of a `Classifier` whose layout was found to be hwc"""

NO_GRADIENT = (
    "no gradient reaches the input, so attacks that follow one stay near where they start, and a robust accuracy by "
    f"them says little; take out what cuts it ({CUTS}), or use the suite black-box, which needs scores only"
)
"""said of a model whose outputs have no graph"""


class Probe:
    """Asks a classifier for outputs in eval mode, without gradients, and leaves it as it was.

    The draws of a randomised network are those of one seed, so that equal inputs have equal outputs.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.own = inner(model)
        """without the transformations that its inputs are seen through"""
        self.classes = model.classes
        """of the network; None until outputs were seen"""
        self.refused: TargetError | None = None
        """why the network took the last inputs that it did not take"""

    def outputs(self, x: Tensor, layout: Layout | None = None, *, whole: bool = False) -> Logits | None:
        """Logits of `x` (n, *features) given to the network in a layout; None where it does not take them.

        With `whole` all rows are given at once, else in batches of a size that the network takes.
        Outputs that may be logits or probabilities are compared as if they were logits.
        """
        own = self.own
        before = own.layout, own.output
        own.layout = layout or before[0]
        try:
            found = self._asked(x, whole=whole)
        except TargetLost:
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
            own.layout, own.output = before
        self.classes = found.shape[1] - self.model.rejects
        return found

    def _asked(self, x: Tensor, *, whole: bool) -> Logits:
        try:
            return _forwarded(self.model, x, whole=whole)
        except UnclearOutput:
            self.own.output = "logit"
            return _forwarded(self.model, x, whole=whole)

    def suit(self, x: Tensor) -> tuple[str, ...]:
        """Give a network that takes images only with the channels last its inputs so, and say it.

        `x` are examples as the data set reads them. A network whose layout is known is not asked, nor is one behind a
        server, which would charge for it. Raises `TargetError` where it takes them with an axis of one channel only.
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
                f"the model refuses an example of shape {tuple(x.shape[1:])} and takes one with its last axis first: "
                'declare --layout hwc (in Python layout="hwc")'
            )
        if x.dim() in (2, 3, 4) and self.outputs(rows[:, None]) is not None:
            raise TargetError(
                f"the model refuses an example of shape {tuple(x.shape[1:])} and takes one of {(1, *x.shape[1:])}: "
                "insert the axis of one channel in the data, give x[:, None], or in the network"
            )
        self.refused = refused
        return ()


def settle_output(model: Classifier, data: Data) -> None:
    """Find out whether single outputs are logits: a value outside [0, 1] among the examples shows it.

    Raises `UnclearOutput` where there is none. Cost: forwards until one is found, of at most 2048 examples; a model
    whose outputs are declared, or that returns one number a class, is asked for two. A model behind a server is asked
    by the run alone.
    """
    if inner(model).output is not None or model.remote or model.rejects:
        return
    unclear: UnclearOutput | None = None
    chunk = max(1, min(_CHUNK, _VALUES // max(1, data.read(0, 1).x.numel()))) if len(data) else _CHUNK
    for start in (0, *range(_ROWS, min(len(data), _LOOKED_AT), chunk)):
        stop = _ROWS if start == 0 else start + chunk
        try:
            _forwarded(model, data.read(start, min(stop, len(data))).x)
        except UnclearOutput as error:
            unclear = error
        except TargetLost:
            raise
        except (TargetError, RuntimeError, MemoryError):
            return  # raised again, with its advice, when the run asks
        else:
            return
    if unclear is not None:
        raise unclear


def settle_predictions(model: Classifier, data: Data) -> tuple[str, ...]:
    """Find out whether the largest score of an estimator is the class that it predicts, and return a note where not.

    Cost: the scores and the labels of at most 1,024 rows. Anything but an estimator is not asked.
    """
    own = inner(model)
    if not isinstance(own.net, Estimator) or not len(data):
        return ()
    notes = own.net.settle(own.preprocess(data.read(0, min(_COMPARED, len(data))).x))
    if own.net.gives == "labels":
        own.access = model.access = "labels"
        if notes:
            own.hides = model.hides = f"the scores of {own.net.name} are not those of its classes"
    return notes


def settle_gradients(model: Classifier, data: Data) -> tuple[str, ...]:
    """Treat a model whose backward pass raises as one that gives scores alone, and return a note of the reason.

    A model whose outputs have no graph gets a note alone: attacks go on, and the doubt `zero-gradient` is raised.

    Such models are ordinary: an operator without a derivative, a value that is written in place after it was saved, an
    LSTM of cuDNN in eval mode. Cost: one forward and one backward of two examples.
    """
    if model.access != "gradients" or model.remote or not len(data):
        return ()
    weight = next(model.parameters(), None)
    rows = data.read(0, min(_ROWS, len(data))).x
    x = (rows if weight is None else rows.to(weight.device)).clone().requires_grad_()
    with _looked_at(model), torch.enable_grad():
        try:
            logits = model(x)
        except TargetLost:
            raise
        except (HoldfastError, RuntimeError, MemoryError):
            return ()  # raised again, with its advice, when the run asks
        if not logits.requires_grad:
            return (NO_GRADIENT,)
        try:
            torch.autograd.grad(logits.sum(), x, allow_unused=True)
        except RuntimeError as error:
            if out_of_memory(error):
                return ()
            model.access = "scores"
            first = (str(error).splitlines() or [""])[0].rstrip(".")
            model.hides = f"its backward pass raises {type(error).__name__}: {first}"
            return (f"the model is attacked by its scores, because {model.hides}",)
    return ()


def _forwarded(model: Classifier, x: Tensor, *, whole: bool = False) -> Logits:
    """Logits of `x`, on the CPU; unless `whole`, in batches of a size that the network takes."""
    weight = next(model.parameters(), None)
    rows = x if weight is None else x.to(weight.device)
    with _looked_at(model):
        try:
            logits: Logits = model(rows.clone())
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
def _looked_at(model: Classifier) -> Iterator[None]:
    """The model in eval mode, without gradients and with torch's generators put back afterwards."""
    # a frozen script has no mode
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes:
            module.training = training
