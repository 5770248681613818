"""Errors of a training, such as a loss without a gradient or a finite value, or buffers that a checkpoint does not
contain.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from holdfast.core.errors import LostLoss, TargetError
from holdfast.core.remedies import Remedy

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
