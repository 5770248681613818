"""The state of a training: checkpoints, number formats, and the errors of a training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.core.errors import LostLoss, Remedy, TargetError
from holdfast.core.model import Classifier

CUTS = "torch.no_grad(), torch.inference_mode(), detach(), .data, argmax() or numpy inside the model"
"""operations that prevent gradients from reaching the inputs or weights, as text for messages"""


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers of a model that its state dict does not contain, and that checkpoints would lose."""
    saved = model.state_dict().keys()
    return {name: value.detach().clone() for name, value in model.named_buffers() if name not in saved}


def refuse_changed(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raise `TargetError` if a training has changed one of the buffers `before` that the state dict does not contain,
    because checkpoints would lose it.
    """
    current = dict(model.named_buffers())
    for name, value in before.items():
        if not torch.equal(current[name], value):
            raise TargetError(
                f"the buffer {name} changes while the network is trained, and its state dict does not contain it, so "
                f"that the new model would lack it; register it with persistent=True"
            )


def refuse_cut(loss: Tensor) -> None:
    """Raise `TargetError` if the loss of a training has no gradient with respect to any weight."""
    if not loss.requires_grad:
        raise TargetError(
            f"no gradient of the loss reaches a weight of this network; remove what stops it: {CUTS}"
        )


def refuse_lost(losses: Tensor, epoch: int, lr: float | None) -> None:
    """Raise `LostLoss` if one of the losses in an epoch of a training is not finite. `lr` is the learning rate in the
    settings, or None if a function of the user determines it.
    """
    lost = (~losses.isfinite()).nonzero()
    if len(lost):
        raise LostLoss(
            f"the loss is not finite from update {int(lost[0]) + 1} of epoch {epoch + 1} on; train with a smaller "
            "learning rate",
            *([] if lr is None else [Remedy("recipe.training.lr", float(f"{lr / 10:g}"))]),
        )


Precision = Literal["auto", "float32", "bfloat16"]
"""number format of convolutions and matrix products: auto is bfloat16 on a GPU that supports it, float32 elsewhere"""
Layout = Literal["auto", "channels-first", "channels-last"]
"""memory layout of images: auto is channels last on a GPU, channels first elsewhere"""


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Context manager inside which matrix products and convolutions of a training use the number format `precision`.

    Enter it for each pass separately: casts of weights are cached inside the context and miss changes in place.
    """
    if precision == "auto":
        narrow = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        narrow = precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        yield


@contextmanager
def exactly(x: Tensor) -> Iterator[None]:
    """Context manager inside which matrix products and convolutions have the full precision of their inputs, for
    certified bounds that account for every rounding. On a GPU, they do not use the shorter format TF32.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def have_compiled(model: Classifier) -> None:
    """Compile the forward pass of the network of a model with torch, in place. The names of its tensors do not change.

    The forward is wrapped in a function, because torch does not compile the forward of its own modules, such as
    `Sequential`.
    """
    net = model.net
    assert isinstance(net, nn.Module)  # anything else has no weights to train
    forward = net.forward

    def through(*inputs: Tensor, **named_inputs: Tensor) -> object:
        return forward(*inputs, **named_inputs)

    net.forward = torch.compile(through)


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """Return images in the memory layout `layout`, such as channels last. Tensors that are not images are unchanged."""
    last = layout == "channels-last" or (layout == "auto" and x.device.type == "cuda")
    if x.dim() == 4 and last:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def lay_out(net: nn.Module, layout: Layout) -> None:
    """Change the memory layout of the convolution kernels of a network in place, such as to channels last."""
    for weight in net.parameters():
        weight.data = laid_out(weight.data, layout)


WEIGHTS, AVERAGE, MEMORY, STATE = "weights.", "average.", "memory.", "state."
"""prefixes of the names of tensors: weights in training, their running average, state of the optimiser, and state of
the recipe"""
NUMBER, GROUP, EPOCH = "number.", "group.", "epoch."
"""prefixes of the names of tensors: numbers in the state of an optimiser, numbers of its parameter groups, and sums
over the completed part of an epoch"""


def without_prefix(tensors: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    """Return the tensors of a dictionary whose names begin with the prefix `first`, by their names without this
    prefix.
    """
    return {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}


@dataclass(frozen=True)
class TrainingPlan:
    """Plan of a training: the total number of its updates, from which the schedules are computed. It applies from the
    update `at` on, until the next plan.

    The completed fraction of the schedules of learning rate and eps grows linearly from `share` after `at` updates to 1
    after `end` updates.
    """

    at: int
    """number of completed updates when the plan was made"""
    share: float
    """completed fraction of the schedules when the plan was made"""
    end: int
    """total number of updates"""
    review: int
    """number of updates after which the next plan must be made at the latest"""
    spent_s: float = 0.0
    """seconds of the budget that were used when the plan was made"""
    update_s: float = 0.0
    """estimated seconds for one update"""
    look_s: float = 0.0
    """estimated seconds after an epoch, for the evaluation on held-out examples and for writing a checkpoint"""
    rewound: bool = False
    """whether this plan is an earlier one that was moved back to the update from which a guard repeats the training"""
    looked: int = 0
    """number of updates before the last evaluation on held-out examples; 0 if there was none"""

    def done(self, updates: int) -> float:
        """Return the completed fraction of the schedules of learning rate and eps after `updates` updates."""
        return self._along(updates, self.end)

    def rated(self, updates: int) -> float:
        """Return the fraction of the learning rate schedule for the next update. It is one update ahead of the
        completed fraction and does not reach 1.
        """
        return self._along(updates + 1, self.end + 1)

    def _along(self, updates: int, end: int) -> float:
        return (
            self.share + (1 - self.share) * ((updates - self.at) / (end - self.at)) if end > self.at else 1.0
        )


@dataclass(frozen=True)
class Checkpoint:
    """State of a training after an epoch, or within one: all tensors and counts that are needed to continue it exactly,
    including the parameters of the new model.

    Random numbers are counter-based and determine the batches, so that no state of generators or loaders is needed.
    """

    epoch: int
    """number of epochs so far; the last of them may be incomplete"""
    of: int
    """planned number of epochs"""
    tensors: Mapping[str, Tensor]
    """copies of tensors by name: `weights.…`, `average.…` if the weights are averaged, `memory.…` and `state.…`; within
    an epoch also `epoch.…`"""
    measured: Mapping[str, float]
    """measurements of the epoch: `loss` and `accuracy` on the training inputs, the learning rate `lr`, the number
    `forwards` of forward passes for an example, and `dearer`, the cost of an update relative to the first one"""
    part: float = 1.0
    """completed fraction of the last epoch"""
    updates: int = 0
    """number of completed updates"""
    plans: tuple[TrainingPlan, ...] = ()
    """all plans of a training with a time budget, in order; empty if the number of epochs was given"""
    step: int = 0
    """number of completed updates of the epoch after `epoch`; 0 at the end of an epoch"""

    @property
    def share(self) -> float:
        """Completed fraction of the training, on which the schedules of learning rate and eps depend."""
        return self.plans[-1].done(self.updates) if self.plans else self.epoch / self.of

    @property
    def averaged(self) -> bool:
        """Whether the new model has an average of the weights over the training, instead of the last weights."""
        return any(name.startswith(AVERAGE) for name in self.tensors)

    def put_into(self, model: Classifier) -> None:
        """Load the weights of the new model from the checkpoint into a model of the same architecture. The averaged
        weights are used if there are any.
        """
        first = AVERAGE if self.averaged else WEIGHTS
        model.load_state_dict(without_prefix(self.tensors, first))
