"""The loop under every recipe: batches, updates of the weights, their average, and a checkpoint after each epoch.

What a recipe adds is `inner`, which changes the inputs of a batch for the worse, and `loss`, the mean over a batch and
what `inner` made of it, whose graph reaches the weights. Everything that is drawn (the order of the examples, the
augmentation, the starts of attacks, dropout) is a function of the seed, the epoch and the step, so a training that is
stopped after an epoch goes on to the same weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import AVERAGE, MEMORY, STATE, WEIGHTS, Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError
from holdfast.core.types import Inputs, NonNegative, Positive, Steps
from holdfast.ops.augment import Augmentation, augmented
from holdfast.ops.perturbed import perturbed


@dataclass(frozen=True)
class Turn:
    """An update: what is drawn for it, and how far the training has come."""

    rng: Draws
    epoch: int
    """epochs that are done"""
    done: float
    """share of all updates that are done"""


Inner = Callable[[Batch, Turn], Inputs]
"""The inputs that a batch is trained on."""
TrainingLoss = Callable[[Batch, Inputs], tuple[Tensor, Tensor]]
"""The mean loss of a batch and its changed inputs, and how many of its examples were right there."""

Rate = Literal["cycle", "cosine", "steps", "flat"]


@dataclass(frozen=True)
class Training:
    """What the loop is told, whatever the loss."""

    epochs: Steps = 30
    """passes over the training data; a time budget sets it"""
    batch: Steps = 128
    """examples of one update"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    """largest learning rate"""
    schedule: Rate = "cycle"
    """of the rate: a cycle up and down, down along a cosine, by tenths at half and three quarters, or flat"""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """of sgd"""
    weight_decay: NonNegative = 5e-4
    average: Annotated[float, Ge(0), Lt(1)] = 0.999
    """how much of the running average of the weights an update leaves; 0 keeps none"""
    awp: NonNegative = 0.0
    """adversarial weight perturbation: share of each weight tensor's norm that it is moved up the loss; 0 for none"""
    augment: Augmentation = "none"
    """what changes the training images: nothing, a shift by up to two pixels, or a shift by four and a flip"""


def rate(schedule: Rate, done: float) -> float:
    """What the learning rate is multiplied with after a share `done` of the training."""
    if schedule == "cycle":
        return done / 0.3 if done < 0.3 else (1 - done) / 0.7
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "steps":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0


def updates(n: int, batch: int) -> int:
    """Updates of one epoch: what is left over after whole batches waits for another epoch, but for a single batch."""
    return max(n // batch, 1)


def fit(
    model: nn.Module,
    data: Batch,
    inner: Inner,
    loss: TrainingLoss,
    how: Training,
    *,
    rng: Draws,
    after: Checkpoint | None = None,
    state: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[Checkpoint]:
    """Train the weights of `model` in place, and yield a checkpoint after each epoch.

    With `after` it goes on where that stands; `state` are tensors that the loss changes in place and must find again.
    Raises `HoldfastError` where the loss is no number any more.
    """
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _optimizer(learned, how)
    average = (
        {name: value.detach().clone() for name, value in model.state_dict().items()} if how.average else {}
    )
    begun = 0
    if after is not None:
        begun = after.epoch
        _restore(after, model, average, optimizer, state)
    per_epoch = updates(len(data), how.batch)
    for epoch in range(begun, how.epochs):
        rows = rng.at("order", epoch).bits(data.ids).argsort()
        losses, right = [], torch.zeros((), device=data.x.device)
        for step, some in enumerate(torch.split(rows[: per_epoch * how.batch], how.batch)):
            place, before = rng.at(epoch, step), epoch * per_epoch + step
            lr = how.lr * rate(how.schedule, (before + 1) / (how.epochs * per_epoch + 1))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = augmented(data.take(some), how.augment, place)
            with torch.enable_grad(), drawing(place):
                x_adv = inner(batch, Turn(place, epoch, before / (how.epochs * per_epoch)))
                optimizer.zero_grad(set_to_none=True)
                with perturbed(model, lambda: loss(batch, x_adv)[0], how.awp):  # noqa: B023  called at once
                    value, hits = loss(batch, x_adv)
                    value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            _averaged(average, model, how.average, before)
            losses.append(value.detach())
            right += hits
        seen = torch.stack(losses).double()
        _refuse_lost(seen, epoch)
        told = {
            "loss": seen.mean().item(),
            "accuracy": right.item() / (per_epoch * min(how.batch, len(data))),
            "lr": lr,
        }
        yield Checkpoint(epoch + 1, how.epochs, _kept(model, average, optimizer, state), told)


@contextmanager
def drawing(rng: Draws) -> Iterator[None]:
    """Within it torch's own generators, which dropout asks, draw what the place says; they are put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(rng.at("torch").key >> 1)
        yield


def _optimizer(learned: list[nn.Parameter], how: Training) -> torch.optim.Optimizer:
    if how.optimizer == "sgd":
        nesterov = how.momentum > 0
        return torch.optim.SGD(
            learned, how.lr, how.momentum, weight_decay=how.weight_decay, nesterov=nesterov
        )
    return torch.optim.AdamW(learned, how.lr, weight_decay=how.weight_decay)


@torch.no_grad()
def _averaged(average: dict[str, Tensor], model: nn.Module, keep: float, step: int) -> None:
    """Move the average towards the weights; of the first updates it is the plain mean, so that no start lingers."""
    if not average:
        return
    share = 1 - min(keep, (step + 1) / (step + 10))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, share)
        else:
            average[name].copy_(value)


def _kept(
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Copies of all that the training needs to go on, on the CPU."""
    found = {WEIGHTS + name: value for name, value in model.state_dict().items()}
    found |= {AVERAGE + name: value for name, value in average.items()}
    found |= {STATE + name: value for name, value in state.items()}
    for place, memory in optimizer.state_dict()["state"].items():
        for name, value in memory.items():
            if isinstance(value, Tensor):
                found[f"{MEMORY}{place}.{name}"] = value
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in found.items()
    }


def _restore(
    after: Checkpoint,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
) -> None:
    def begins(first: str) -> dict[str, Tensor]:
        return {name.removeprefix(first): t for name, t in after.tensors.items() if name.startswith(first)}

    model.load_state_dict(begins(WEIGHTS))
    for known, first in ((average, AVERAGE), (state, STATE)):
        for name, value in begins(first).items():
            known[name].copy_(value)
    memory: dict[int, dict[str, Tensor]] = {}
    for name, value in begins(MEMORY).items():
        place, _, key = name.partition(".")
        memory.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": memory})


def _refuse_lost(losses: Tensor, epoch: int) -> None:
    lost = (~losses.isfinite()).nonzero()
    if len(lost):
        raise HoldfastError(
            f"the loss is no number any more from update {int(lost[0]) + 1} of epoch {epoch + 1} on; the last "
            f"checkpoint still stands: go on from it with a smaller learning rate, as in --set recipe.training.lr=0.01"
        )
